"""Greedy tokens from vLLM engines, each batch of engines in a process of its own, and from transformers.

Run as a script: reads a JSON list of engines on stdin, `{"load": {LLM arguments}, "reload_from": folder, "lora":
folder, "drafts": true, "likely": true}`, and prints one JSON line per engine: its tokens (and then those after the
reload, and those with the adapter, and how many tokens were drafted and how many of them accepted, or with "likely"
each token beside its log probability), or the error that stopped it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

PROMPTS = [[5, 17, 200, 33, 9, 121, 64], [301], [*range(40, 90)]]
TOKENS = 12
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}


def vllm_tokens(engines: list[dict], multiprocess: bool = False, **env: str) -> list[list[list[int]] | str]:
    """Tokens of every prompt, or the error as text, of each engine; see the module's docstring."""
    env = {**os.environ, **ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocess)), **env}
    run = subprocess.run(
        [sys.executable, __file__], input=json.dumps(engines), env=env, capture_output=True, text=True, timeout=550
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"tokens"')]
    assert len(results) == len(engines), run.stdout[-3000:] + run.stderr[-6000:]
    return [result["tokens"] if result["error"] is None else result["error"] for result in results]


def transformers_tokens(
    model: Path, prompts: list[list[int]] = PROMPTS, scales: dict[str, float] | None = None
) -> list[list[int]]:
    """Tokens of every prompt from the plain checkpoint `model` in float32, without a cache.

    scales: of keys and values by tensor name, which then lose what a KV cache in e4m3 loses on vLLM's CPU backend: that
    rounds towards zero.
    """
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    class Rounded(DynamicCache):
        def update(self, keys, values, layer, *args, **kwargs):
            names = [f"model.layers.{layer}.self_attn.{kind}_scale" for kind in "kv"]
            return tuple(fp8(x / scales[name]) * scales[name] for x, name in zip((keys, values), names, strict=True))

    def fp8(x):
        nearest = x.abs().to(torch.float8_e4m3fn)
        bits = nearest.view(torch.uint8) - (nearest.float() > x.abs()).to(torch.uint8)
        return bits.view(torch.float8_e4m3fn).float().copysign(x)

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return greedy_tokens(network, prompts, Rounded if scales else None)


def greedy_tokens(
    network: "PreTrainedModel", prompts: list[list[int]] = PROMPTS, cache: "Callable[[], Cache] | None" = None
) -> list[list[int]]:
    """Tokens of every prompt, each from all that are before it, written into a new `cache` if there is one."""
    import torch

    results = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(TOKENS):
                kept = {"past_key_values": cache()} if cache else {"use_cache": False}
                ids.append(int(network(torch.tensor([ids]), **kept).logits[0, -1].argmax()))
            results.append(ids[len(prompt) :])
    return results


def same_up_to_a_tie(network: "PreTrainedModel", tokens: list[list[int]], *expected: list[list[int]]) -> bool:
    """Whether each prompt's tokens are those of one of `expected`, up to the first place where rounding decides
    (`_decided_by_rounding`). Routers of experts have ties, too, so that 16 bits may go another way than 32."""
    return all(
        any(_decided_by_rounding(network, prompt, ours, theirs) for theirs in candidates)
        for prompt, ours, *candidates in zip(PROMPTS, tokens, *expected, strict=True)
    )


def _decided_by_rounding(
    network: "PreTrainedModel", prompt: list[int], ours: list[int], theirs: list[int], near: float = 0.05
) -> bool:
    """Whether the first tokens that differ, if any, have logits that are `near` each other, in standard deviations."""
    import torch

    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    if not differing:
        return True
    ids = torch.tensor([prompt + theirs[: differing[0]]])
    with torch.inference_mode():
        logits = network(ids, use_cache=False).logits[0, -1]
    a, b = logits[[ours[differing[0]], theirs[differing[0]]]]
    return bool(abs(a - b) <= near * logits.std())


def off_by(network: "PreTrainedModel", decoded: list[list[tuple[int, float]]]) -> float:
    """The median difference between log probabilities of decoded tokens, which stand beside them, and those that
    `network` gives the same tokens."""
    import torch

    differences = []
    for prompt, pairs in zip(PROMPTS, decoded, strict=True):
        tokens, found = (torch.tensor(column) for column in zip(*pairs, strict=True))
        with torch.inference_mode():
            logits = network(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        differences.append(logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0] - found)
    return torch.cat(differences).abs().median().item()


def _run(
    load: dict, reload_from: str | None = None, lora: str | None = None, drafts: bool = False, likely: bool = False
) -> list[list]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
    try:
        llm = LLM(**{**defaults, **load})
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        logprobs = 0 if likely else None
        sampling = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        if reload_from:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": reload_from})
            llm.reset_prefix_cache()
            outputs += llm.generate(prompts, sampling, use_tqdm=False)
        if lora:
            adapter = LoRARequest("adapter", 1, lora)
            outputs += llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapter)
        names = [f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted") if drafts]
        metrics = {metric.name: metric for metric in llm.get_metrics()} if drafts else {}
        counts = [[metrics[name].value for name in names]] if drafts else []
        found = [output.outputs[0] for output in outputs]
        if likely:
            return [[(t, at[t].logprob) for t, at in zip(x.token_ids, x.logprobs, strict=True)] for x in found]
        return [list(x.token_ids) for x in found] + counts
    finally:
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    for engine in json.load(sys.stdin):
        tokens, error = None, None
        try:
            tokens = _run(**engine)
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        print(json.dumps({"tokens": tokens, "error": error}), flush=True)
