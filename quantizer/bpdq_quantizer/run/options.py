"""The options of `bpdq quantize`, each declared once; `run.resolved` decides those that are not given."""

import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from bpdq_kernels.format import CODE_OPTIONS, MAX_PLANES, Scheme
from bpdq_quantizer.algorithm.grid import paper_start
from bpdq_quantizer.model.calibration import shown_name
from bpdq_quantizer.model.support import FLOATS, TABLE_BITS
from bpdq_quantizer.model.windows import FEWEST_TOKENS, MOST_TOKENS
from bpdq_quantizer.run.fields import PathName, option

SOLVERS = {  # options of `quantize_linear`
    "refined": {"refinements": 2, "alpha": 1e-6, "damping": 0.01},
    "paper": {"refinements": 0, "alpha": 1e-4, "damping": 0.05, "starts": (paper_start,)},
}
ASYMMETRIC = {"refined": 0.5, "paper": 0.0}  # share of the shift of its inputs that a weight is corrected for
COEFFICIENT_BITS = {"refined": 8, "paper": 16}
GROUP_SIZE = {8: 64, 16: 128}  # by coefficient_bits: as many bytes
TUNE_STEPS = {"none": None, "model": 200}
HELD_OUT, HELD_OUT_FROM = 8, 128  # windows to evaluate, and how many are calibrated on where that costs little


@dataclass(frozen=True, kw_only=True)
class Files:
    """what is read and written"""

    model: PathName = option(
        MISSING,
        "Hugging Face folder, hub id or .gguf file",
        "Hugging Face folder, hub id, or `.gguf` file (dequantized first; `pip install 'vllm-bpdq[gguf]'`); in 16 "
        "bits, or [quantized already](#sources-that-are-quantized-already)",
        positional=True,
    )
    output: PathName = option(
        MISSING,
        "checkpoint folder to create",
        "must not exist; appears only when it is complete, until then `DIR.partial` holds the finished blocks, after "
        "Ctrl-C (exit status 130) and SIGTERM (143) too. It is locked: a second run is refused",
        metavar="DIR",
        expected="the name of a folder that is to be created",
    )


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """what is stored in how many bits"""

    bits: int = option(2, "bit-planes per weight, 1 to 4", within=(1, MAX_PLANES))
    group_size: int | None = option(
        None,
        "32, 64, 128 or 256",
        "weights that share coefficients: 32, 64, 128 or 256; a short last group is fine",
        unset=f"{GROUP_SIZE[8]}; {GROUP_SIZE[16]} with coefficients in 16 bits",
    )
    coefficient_bits: int | None = option(
        None,
        "of a coefficient, 8 or 16",
        "8: coefficients are integers with a scale for each output and plane, which costs no quality; 16: floats, as "
        "the paper has them and the authors' code reads them",
        unset=f"{COEFFICIENT_BITS['refined']}; paper: {COEFFICIENT_BITS['paper']}",
    )
    code: str = option(
        "plain",
        "of planes: plain, or a trellis' path in each word",
        "`trellis`: one of the `--bits` planes, 1 to 3, is coded so that two are multiplied in its place, which gives "
        "weights twice as many levels ([Format](format.md#trellis-coded-planes)). Layers whose inputs are no multiple "
        "of 32 stay `plain`",
        choices=CODE_OPTIONS,
    )
    embed_bits: int | None = option(
        None,
        "bit-planes of the input embedding, or 16; one for both if tied",
        "bit-planes of the embedding, 1 to 4, in groups of `--group-size`, or 16 bits: for models that have it so in "
        "vLLM (Qwen3.5, Gemma 1 and 2, LFM2, Falcon-H1, which then says so), and to draft with EAGLE or MTP. Tied to "
        "the LM head, they are one matrix: either option means both, and two different numbers are an error. By "
        "default such a one has 4 where it is a tenth of the weights or more, in Llama, Qwen2 and Qwen3",
        unset=f"{FLOATS}; {TABLE_BITS} of small models where tied",
    )
    head_bits: int | None = option(
        None, "likewise for the LM head", "bit-planes of the LM head, 1 to 4, or 16 bits, likewise", unset=f"{FLOATS}"
    )
    target_bpw: float | None = option(
        None,
        "choose bits and group size of each layer for this",
        "bits per weight of the Linears: every layer gets bits and a group size of its own, for the least damage "
        "within that many bytes; `--bits` is then not used, and `--group-size` is that of embedding and head",
        metavar="BITS",
        within=(sys.float_info.min, 16),
        expected="bits per weight, such as 2.5",
    )
    target_size: str | None = option(
        None,
        "likewise for a checkpoint of this size, such as 20GiB",
        "size of all tensors (`20GiB`, `93MB`) instead of `--target-bpw`",
        metavar="SIZE",
    )
    ignore: list[str] | None = option(
        None,
        "leave a block's Linears of this name in 16 bits; may be repeated",
        "leaves Linears of the blocks in 16 bits: names, or patterns such as `re:.*[.]o_proj`, matched from the start "
        "of a name. The option may be repeated, from Python it is a list. What vLLM fuses (q/k/v, gate/up) it takes "
        "whole only: one line says so where a part is left. Routers, gates of states, `kv_b_proj` of latent attention "
        "and what is narrower than 32 are left so in any case",
        metavar="NAME",
    )
    kv_cache_scales: bool = option(
        False,
        "calibrate scales for --kv-cache-dtype fp8_e4m3",
        "calibrates a scale for the keys and one for the values of each layer, for `vllm serve --kv-cache-dtype "
        "fp8_e4m3`: [Serve](serve.md#scales-for-an-fp8-kv-cache)",
    )

    def scheme(self) -> Scheme:
        """The one that they say for Linears; with a target, which does not use `bits`, of any number of them."""
        bits = self.bits if (self.target_bpw, self.target_size) == (None, None) else 1
        return Scheme(bits, self.group_size, self.coefficient_bits, CODE_OPTIONS[self.code])


@dataclass(frozen=True, kw_only=True)
class Text:
    """what the model is calibrated on"""

    calibration: PathName = option(
        "self",
        "self, self:MODEL, FILE.txt, FILE.jsonl, hf:NAME, preset:NAME or python",
        "[what the model is calibrated on](#calibration): `self` is text that the model itself writes, `self:MODEL` "
        "that of another one with its tokenizer; `FILE.txt`; `FILE.jsonl` (rows with a string `text`, or `messages` "
        "for the chat template; for a model that sees images also with paths of an `image` or several); `hf:NAME` or "
        "`hf:NAME:CONFIG` (a data set's train split, rows likewise, `pip install 'vllm-bpdq[hub]'`); `preset:general`, "
        "`preset:code` and `preset:chat` (open data sets); `python` (the Python language reference, which costs "
        "nothing and is for trying things out). No more is read than the windows take",
        metavar="TEXT",
    )
    samples: int = option(128, "calibration windows")
    seq_len: int = option(
        2048, "tokens per window", within=(2, 2**31 - 1), expected="2 or more, of which the first is not predicted"
    )
    special_tokens: str = option(
        "auto",
        "windows begin with what the tokenizer puts before a text, or with the text",
        "each window begins with what the model's tokenizer puts before a text (Llama's and Gemma's `<bos>`; nothing "
        "for Qwen and SmolLM2), which counts towards `--seq-len`; `none`: all of it is text. Of `bpdq eval` too, where "
        "special tokens are not predicted; `--json` and the report say which they were. `benchmarks/` use `none`",
        choices=("auto", "none"),
    )

    evaluate: int | None = option(
        None,
        "windows of that text, behind those used, to measure the checkpoint on",
        "windows of that text, behind those used, on which perplexity and KL to the original are measured for the "
        "model card: 8 or more for figures that mean something (8 of 512 tokens take a twentieth of SmolLM2's time "
        "with `--samples 128`). Fewer where the text ends, which one line says, and none with images",
        metavar="WINDOWS",
        unset=f"{HELD_OUT}, of {HELD_OUT_FROM} `--samples` or more; else, and with `--offload-dir`, 0",
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """how weights are solved for"""

    iterations: int = option(10, "assign/refit rounds per group")
    solver: str = option(
        "refined",
        "`paper` is the paper's algorithm alone",
        "`paper` is the paper's algorithm alone, for comparisons",
        choices=SOLVERS,
    )
    asymmetric: float | None = option(
        None,
        "correct for shifted inputs",
        "each weight is first corrected for this share of what the quantization of earlier layers did to its inputs "
        "(QEP, GPTAQ), and to the residual stream that its outputs are added to; 0 is off",
        unset=f"{ASYMMETRIC['refined']}; paper: {ASYMMETRIC['paper']:g}",
        metavar="SHARE",
        within=(0, 1),
        expected="0 (off) to 1",
    )
    output_tokens: int | None = option(
        None,
        "tokens for gradients, by which errors are weighed",
        "so many tokens of the calibration text, at least a window, are followed backwards through the 16-bit model: "
        "its gradients say which tokens count how much, and which outputs of a Linear make good each other's errors "
        "(YAQA); 0 is off, as it is for models whose blocks share keys and values (Gemma 3n and 4). Hidden states of "
        "these tokens in front of about 2 sqrt(blocks) blocks are held in host memory, and `DIR.partial` has 2048 "
        "bytes for every output of a Linear",
        unset=f"a quarter of the calibration tokens, from {FEWEST_TOKENS} to {MOST_TOKENS}; paper: 0",
        metavar="TOKENS",
        within=(0, 2**31 - 1),
        expected="0 (off) or more",
    )
    rotate: str = option(
        "none",
        "spread outliers over all channels",
        "`hadamard` multiplies the residual stream and the values of every attention head by random rotations, which "
        "spread outliers over all channels, and folds them into the weights: what is served is the stock graph. For "
        "Llama, Qwen2, Qwen3, Mistral, Gemma 1 and what is built like them. A tied LM head becomes a tensor of its "
        "own: another `2 x vocabulary x width` bytes (SmolLM2: 56.6 MB), or with `--head-bits` those of its bit-planes",
        choices=("none", "hadamard"),
    )
    seed: int = option(
        0,
        "of self, data sets, gradients, tuning and rotation",
        "of text that a model writes, of the order of data sets, of what the model predicts where gradients are taken "
        "(`--output-tokens`), of tuning and rotation",
        within=(0, 2**63 - 1),
    )


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """training of the coefficients"""

    tune: str = option(
        "none",
        "train the coefficients too",
        "`model`: with the planes fixed, distill all coefficients from the 16-bit model's next-token distributions on "
        "the calibration text",
        choices=TUNE_STEPS,
    )
    tune_steps: int | None = option(
        None,
        "of --tune model",
        "of `--tune model`; a step takes 1024 tokens, or one window if that is longer",
        unset=str(TUNE_STEPS["model"]),
    )
    tune_loss: str = option(
        "kl",
        "of --tune model; mix adds the reverse KL",
        "of `--tune model`: KL(16-bit model, this one), or `mix` of that and the reverse, weighed by the 16-bit "
        "model's confidence in the text (BitDistiller)",
        choices=("kl", "mix"),
    )
    tune_samples: int | None = option(
        None,
        "windows to tune the model on",
        "windows to tune the model on, where tuning deserves more text than solving",
        unset="`--samples`",
    )


@dataclass(frozen=True, kw_only=True)
class Execution:
    """how it is run"""

    resume: bool = option(
        False,
        "go on with a run that was stopped",
        "go on with a run that was stopped or killed, from its last finished block or tuning evaluation, to the same "
        "tensors. Other options, another model or text, and another number of CPU threads, release or version of torch "
        "are refused. What is kept is checked by digest: if something is damaged, it or all blocks are done again, and "
        "one line says so, as where there is nothing to go on from",
    )
    keep_statistics: PathName | None = option(
        None,
        "keep what other sizes of the model need there, for `bpdq requantize`",
        "a folder of its own for what does not depend on the size: sensitivities, gradients, calibration tokens. "
        "[Other sizes](#several-sizes-of-one-model) go on from there, and so does this command, if it is repeated",
        metavar="DIR",
    )
    offload_dir: PathName | None = option(
        None,
        "keep the hidden states of the calibration text there",
        "a folder outside `--output` for the hidden states of the calibration text, which otherwise take 4 bytes x "
        "hidden size x tokens of host memory, page-locked where a GPU reads it: 8.6 GB for 128 x 2048 tokens of a 72B "
        "model. The tensors are the same; files need up to three times that",
        metavar="DIR",
    )
    device: str = option(
        "auto",
        "one decoder block at a time goes there",
        "`cpu` or `cuda`; one decoder block at a time is read from the model's files and goes to the device",
        choices=("auto", "cpu", "cuda"),
    )
    devices: str | None = option(
        None,
        "several instead, such as cuda:0,cuda:1: a worker for each",
        "instead of `--device`, a list such as `cuda:0,cuda:1` or `cpu,cpu`: one worker for each, see [Several "
        "devices](devices.md)",
        metavar="LIST",
    )


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """where it goes"""

    push_to_hub: str | None = option(
        None,
        "upload the checkpoint to this repository of the Hugging Face Hub",
        "uploads the finished checkpoint to this repository of the Hugging Face Hub, `OWNER/NAME`, as `bpdq push` "
        "does. Token, name and repository are looked at before the work, too",
        metavar="REPO",
    )
    private: bool = option(
        False,
        "of --push-to-hub: a repository that is created is private",
        "of `--push-to-hub`: a repository that is created is private, and one that is public is refused",
    )
    force: bool = option(
        False,
        "of --push-to-hub: replace what the repository holds",
        "of `--push-to-hub`: replaces all files that the repository holds, which is otherwise refused; its history "
        "keeps them",
    )


@dataclass(frozen=True)
class Options:
    """A run of `bpdq quantize`: what `resolved` returns. None is off, or what the model and the text are yet to
    decide."""

    files: Files
    schemes: Schemes
    text: Text
    method: Method
    tuning: Tuning
    execution: Execution
    publishing: Publishing

    def public(self) -> dict[str, Any]:
        """`by_name` without the model, for whoever reads the checkpoint: folders and files by their last parts."""
        found = {name: value for name, value in self.by_name().items() if name != "model"}
        kind, _, name = self.text.calibration.partition(":")
        if kind == "self" and name:
            found["calibration"] = f"self:{shown_name(name)}"
        elif kind == "hf":
            name, colon, config = name.partition(":")
            found["calibration"] = f"hf:{shown_name(name)}{colon}{config}"
        else:
            found["calibration"] = Path(self.text.calibration).name
        if self.execution.offload_dir is not None:
            found["offload_dir"] = Path(self.execution.offload_dir).name
        return found

    def by_name(self) -> dict[str, Any]:
        """Those that what is written depends on, as JSON: not UNSEEN, nor where it goes."""
        parts = [part for part in vars(self).values() if part is not self.publishing]
        found = {of.name: getattr(part, of.name) for part in parts for of in fields(part)}
        return {name: value for name, value in found.items() if name not in UNSEEN}


UNSEEN = ("output", "resume", "keep_statistics")  # by what is written
PARTS = {part.name: part.type for part in fields(Options)}
FIELDS = {of.name: of for part in PARTS.values() for of in fields(part)}
