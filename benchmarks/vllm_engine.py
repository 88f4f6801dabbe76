"""One vLLM engine in a process of its own, for `gpu_vllm`: its tokens judged by transformers, or its speed.

Reads its task, a JSON object, on stdin and writes its figures as one to the file that it names. An error is the last
line of its output.
"""

import faulthandler
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vllm_bpdq

Task = dict[str, Any]
PROMPT_LENGTHS = (1, 7, 50, 200)  # one token and more, and more than a block of the KV cache
ROUNDS = 3


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    task = json.load(sys.stdin)
    vllm_bpdq.register()  # as the entry point of an installed plugin does
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False, **task["engine"])
    started = time.perf_counter() - start
    figures = tokens(llm, task) if task["do"] == "tokens" else speed(llm, task)
    Path(task["to"]).write_text(json.dumps({"start_s": started, **figures}))


def generate(llm: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens, `new_tokens` for each prompt, all prompts at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(lengths: tuple[int, ...], vocabulary: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def tokens(llm: Any, task: Task) -> Task:
    """How many of the greedy tokens are transformers' choice too, and `worst`: how far the others' logits are below
    the highest, in standard deviations of the position's logits. Rounding swaps near ties, a wrong kernel more."""
    from transformers import AutoModelForCausalLM

    import bpdq_quantizer  # noqa: F401  lets transformers load the checkpoint

    prompts = random_prompts(PROMPT_LENGTHS, task["vocabulary"])
    answers = generate(llm, prompts, task["new_tokens"])
    model = AutoModelForCausalLM.from_pretrained(task["engine"]["model"], dtype=torch.bfloat16).to(task["device"])
    equal, worst = 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer], device=task["device"])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.float().gather(1, torch.tensor(answer, device=task["device"])[:, None])[:, 0]
        below = (logits.float().amax(1) - chosen) / logits.float().std(1)
        equal += int((below == 0).sum())
        worst = max(worst, below.max().item())
    return {"tokens": sum(map(len, answers)), "equal": equal, "worst": worst}


def speed(llm: Any, task: Task) -> Task:
    """For each batch size the medians of ROUNDS: `ttft_ms` until one token of each sequence, `tpot_ms` for each further
    one of all sequences, `output_throughput` in tokens/s of the whole run, prompts included."""
    runs = []
    for batch in task["batches"]:
        prompts = random_prompts((task["prompt_tokens"],) * batch, task["vocabulary"], seed=batch)
        generate(llm, prompts, 2)  # compiles kernels
        first = median(seconds(llm, prompts, 1) for _ in range(ROUNDS))
        whole = median(seconds(llm, prompts, task["new_tokens"]) for _ in range(ROUNDS))
        runs.append(
            {
                "batch": batch,
                "ttft_ms": 1e3 * first,
                "tpot_ms": 1e3 * (whole - first) / (task["new_tokens"] - 1),
                "output_throughput": batch * task["new_tokens"] / whole,
            }
        )
    return {"runs": runs}


def seconds(llm: Any, prompts: list[list[int]], new_tokens: int) -> float:
    start = time.perf_counter()
    generate(llm, prompts, new_tokens)
    return time.perf_counter() - start


if __name__ == "__main__":
    try:
        main()
    except Exception as e:
        traceback.print_exc()
        sys.exit(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
