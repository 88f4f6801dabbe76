"""The first page of the recipe: open the model and the text, and refuse what can't be done before any of it is."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bpdq_kernels.folder import Headers
from bpdq_kernels.format import Scheme
from bpdq_kernels.skeleton import is_tied
from bpdq_quantizer.checkpoint import writer
from bpdq_quantizer.checkpoint.carried import carry_over
from bpdq_quantizer.checkpoint.config_names import config_names
from bpdq_quantizer.checkpoint.heads import find_heads
from bpdq_quantizer.checkpoint.sentences import check_modules
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.calibration import calibration_windows
from bpdq_quantizer.model.images import sight_of
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.sources import check_source, check_stored, is_gguf
from bpdq_quantizer.model.stream import (
    Stamps,
    Streamed,
    decoder_blocks,
    leave_alone,
    open_model,
    parted,
    solved,
    stamps,
)
from bpdq_quantizer.model.support import (
    FLOATS,
    check_blocks,
    check_dense,
    check_kept,
    check_length,
    check_tokens,
    table_bits,
)
from bpdq_quantizer.model.tokens import leading_tokens, load_tokenizer
from bpdq_quantizer.model.windows import Window, all_tokens, text_windows, token_count
from bpdq_quantizer.passes import kv_scales
from bpdq_quantizer.passes.allocate import least_bytes, most_common, other_bytes, parse_size, uniform
from bpdq_quantizer.passes.embeddings import embedding_schemes
from bpdq_quantizer.passes.rotate import rotated
from bpdq_quantizer.passes.sensitivity import choices
from bpdq_quantizer.run.identity import identity
from bpdq_quantizer.run.options import SOLVERS, Options, Schemes
from bpdq_quantizer.run.own_text import own_windows, writer_of
from bpdq_quantizer.run.recover import recover
from bpdq_quantizer.run.resolved import default_output_tokens
from bpdq_quantizer.run.run_folder import RunFolder, begin
from bpdq_quantizer.run.statistics import check_place, keep
from bpdq_quantizer.run.workers import own_device

FEW_TOKENS = 16384  # of calibration, below which one line says so


class Windows(NamedTuple):
    """What is calibrated on. solving: to solve on; tuning: to tune the model on, tokens [W, L], none with images;
    held_out: of the same text, to evaluate on, tokens [W, L], or None; special_tokens: the names of those that each
    begins with; cost: of writing them, with `--calibration self`."""

    solving: Sequence[Window]
    tuning: Tensor | None
    held_out: Tensor | None
    special_tokens: list[str]
    cost: dict[str, float]


class Run(NamedTuple):
    """What a run works on and with. asked: its options as they were given; options: with what model and text decide;
    stamps: of the source's files, before it was opened; embeddings: schemes of the embedding and LM head, if they are
    quantized; budget: bytes for the blocks' Linears, None for one scheme for all; heads: for multi-token prediction, in
    the source's files."""

    asked: Options
    options: Options
    source: Streamed
    stamps: Stamps
    windows: Windows
    embeddings: dict[str, Scheme]
    budget: int | None
    device: torch.device
    folder: RunFolder
    heads: Headers


def prepare(o: Options, folder: RunFolder, kept: list[Window] | None = None) -> Run:
    """Everything that is needed to begin, or to go on; `folder` is then this run's. kept: calibration windows of a run
    before. Raises InputError."""
    if o.execution.keep_statistics is not None:
        check_place(o.execution.keep_statistics, o.files.output)
    device = own_device(o.execution.devices, o.execution.device)
    torch.manual_seed(o.method.seed)
    asked, model = o, o.files.model
    check_source(model)
    check_modules(Path(model))
    _check_skeleton(model, o.schemes.ignore or [], o.text.seq_len)
    check_stored(model)
    tokenizer = load_tokenizer(model)
    lead = leading_tokens(tokenizer, o.text.special_tokens)
    read, cost = (kept, {}) if kept is not None else _read(o, tokenizer, lead, folder, device)
    found, spare = _parted(o, read)
    before = stamps(model)
    source = leave_alone(open_model(model), o.schemes.ignore or [])
    check_tokens(source.model, [*found, *spare], o.text.calibration)
    source = check_blocks(source, found)
    check_kept(source)
    o = with_gradients(o, source, token_count(found[: o.text.samples]))
    heads = find_heads(model, source.model, source.quantized)
    if o.method.rotate == "hadamard":
        source = rotated(source, o.method.seed)
        if heads:
            tqdm.write(f"{model}: its head for multi-token prediction reads what --rotate turns, and is left out")
            heads = {}
    o = with_table(o, source.model)
    embeddings = embedding_schemes(source.model, o.schemes.embed_bits, o.schemes.head_bits, o.schemes.scheme())
    copied = writer.stored_bytes(heads)
    scales = kv_scales.BLOCK_BYTES * len(source.blocks) if o.schemes.kv_cache_scales else 0
    budget = _budget(source, embeddings, copied + scales, o.schemes)
    if o.schemes.kv_cache_scales:
        kv_scales.check(source, found, device)
    carry_over(model, source.model, tokenizer, folder.path / writer.CARRIED)
    trial = checkpoint_config(source, o, one_scheme(source, o.schemes), embeddings, [])
    writer.write_config(source, trial, folder.resume)
    this = identity(o, found, source.model.dtype, device, before)
    begin(folder, this, writer.contents(folder.path, len(source.blocks), heads))
    recover(folder)
    if o.execution.keep_statistics is not None:
        solving = identity(o, found[: o.text.samples], source.model.dtype, device, before)
        keep(asked, [*found, *spare], solving)
    names = tokenizer.convert_ids_to_tokens(lead)
    tuning = all_tokens(found[: o.tuning.tune_samples]) if o.tuning.tune == "model" else None
    held_out = all_tokens(spare) if spare else None
    windows = Windows(found[: o.text.samples], tuning, held_out, names, cost)
    return Run(asked, o, source, before, windows, embeddings, budget, device, folder, heads)


def _check_skeleton(model: str, ignore: Sequence[str], seq_len: int) -> None:
    """What a model's config.json alone tells of `--ignore`, `--seq-len` and its blocks. Raises InputError."""
    skeleton = plain_skeleton(model)
    prefix, blocks = decoder_blocks(skeleton)
    check_dense(prefix, blocks)
    said = parted(leave_alone(Streamed(skeleton, prefix, blocks, {}), ignore)) if ignore else None
    if said is not None:
        tqdm.write(said, file=sys.stderr)
    check_length(skeleton, seq_len)


def with_gradients(o: Options, source: Streamed, calibration: int) -> Options:
    """o with the number of tokens, of so many that are solved on, whose gradients are followed: none of a model whose
    blocks share keys and values. Raises InputError if such a one is asked for gradients."""
    asked, tokens = o.method.output_tokens, default_output_tokens(o.method.solver, calibration)
    if not source.carries:
        return replace(o, method=replace(o.method, output_tokens=tokens if asked is None else asked))
    name = type(source.model).__name__
    needs = {
        "--target-bpw / --target-size": o.schemes.target_bpw or o.schemes.target_size,
        "--output-tokens": asked,
    }
    for option, given in needs.items():
        if given:
            raise InputError(
                f"{option}: blocks of {name} share keys and values, through which gradients are not followed: leave it "
                "out"
            )
    if asked is None and tokens:
        tqdm.write(f"blocks of {name} share keys and values: --output-tokens is 0", file=sys.stderr)
    return replace(o, method=replace(o.method, output_tokens=0))


def with_table(o: Options, model: PreTrainedModel) -> Options:
    """o with the bits that a model's tied embedding has where none are asked for."""
    s, name = o.schemes, type(model).__name__
    if (s.embed_bits, s.head_bits) != (None, None) or o.method.solver == "paper" or not is_tied(model):
        return o
    table = model.get_input_embeddings().weight
    bits = table_bits(name, table.numel(), sum(parameter.numel() for parameter in model.parameters()))
    if bits is None:
        return o
    tqdm.write(
        f"embedding and LM head, one table of {table.numel() * 2 / 1e6:.0f} MB, get {bits} bit-planes: --embed-bits "
        f"{FLOATS} leaves them in 16 bits",
        file=sys.stderr,
    )
    return replace(o, schemes=replace(s, embed_bits=bits))


def _read(
    o: Options, tokenizer: PreTrainedTokenizerBase, lead: list[int], folder: RunFolder, device: torch.device
) -> tuple[list[Window], dict[str, float]]:
    """All calibration windows, as many as there are, and what writing them cost."""
    calibration, seq_len, seed = o.text.calibration, o.text.seq_len, o.method.seed
    most = _wanted(o) + o.text.evaluate
    writer = writer_of(calibration, o.files.model)
    if writer is not None:
        tokens, cost = own_windows(writer, tokenizer, folder, device, (most, seq_len), lead, seed)
        return text_windows(tokens), cost
    sight = None if is_gguf(o.files.model) else sight_of(o.files.model, tokenizer)
    return calibration_windows(calibration, tokenizer, most, seq_len, seed, lead, sight), {}


def _wanted(o: Options) -> int:
    """How many windows are solved or tuned on."""
    return max(o.text.samples, o.tuning.tune_samples) if o.tuning.tune == "model" else o.text.samples


def _parted(o: Options, read: list[Window]) -> tuple[list[Window], list[Window]]:
    """Windows for solving and tuning, and those of text that are held out; raises InputError where the former are too
    few, or can't be tuned on."""
    seq_len, calibration, tune, wanted = o.text.seq_len, o.text.calibration, o.tuning.tune, _wanted(o)
    found, rest = read[:wanted], read[wanted : wanted + o.text.evaluate]
    spare = [window for window in rest if not window.images]
    if tune != "none" and any(window.images for window in found):
        raise InputError(f"--tune {tune} trains on text alone, and {calibration} has images: leave either out")
    if len(found) < 1 + (tune != "none"):
        raise InputError(
            f"--tune {tune} needs two calibration windows or more, and {calibration} holds {len(found)} of "
            f"{seq_len} tokens: bring more text or lower --seq-len"
        )
    if len(found) < wanted:
        tqdm.write(f"{calibration}: holds {len(found)} windows of {seq_len} tokens, --samples asked for {wanted}")
    tokens = token_count(found[: o.text.samples])
    if tokens < FEW_TOKENS:
        tqdm.write(
            f"{calibration}: {tokens} tokens are few to calibrate on, below {FEW_TOKENS} quality falls: raise "
            "--samples or --seq-len"
        )
    if len(spare) < o.text.evaluate:
        tqdm.write(
            f"{calibration}: holds {len(spare)} windows of text behind those used, --evaluate asked for "
            f"{o.text.evaluate}: bring more text for figures on the model card, or --evaluate 0",
            file=sys.stderr,
        )
    return found, spare


def _budget(source: Streamed, embeddings: Mapping[str, Scheme], added: int, o: Schemes) -> int | None:
    """Bytes for the blocks' Linears, if a target says so; added: those of a checkpoint that are not of the model's
    tensors. Raises InputError if no scheme is as small."""
    scheme = o.scheme()
    least = least_bytes(source, choices(scheme.coefficient_bits, scheme.code))
    if o.target_bpw is not None:
        weights = sum(prod(weight.shape) for weight in solved(source).values())
        budget = int(o.target_bpw * weights / 8)
        asked, smallest = f"--target-bpw {o.target_bpw}", ceil(8e4 * (least + 1) / weights) / 1e4
    elif o.target_size is not None:
        beside = other_bytes(source, embeddings) + added
        budget = parse_size(o.target_size) - beside
        asked, smallest = f"--target-size {o.target_size}", f"{beside + least} bytes"
    else:
        return None
    if least > budget:
        raise InputError(f"{asked}: the smallest schemes take {smallest}: give that or more")
    return budget


def one_scheme(source: Streamed, o: Schemes) -> dict[str, Scheme]:
    """That of all the blocks' Linears, by name, where no target asks for more."""
    return uniform(source, o.scheme())


def checkpoint_config(
    source: Streamed, o: Options, schemes: Mapping[str, Scheme], embeddings: Mapping[str, Scheme], ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config of a checkpoint with these schemes of the blocks' Linears, embedding and LM head."""
    default = most_common(schemes)
    others = {name: s for name, s in {**schemes, **embeddings}.items() if s != default or name in embeddings}
    others = config_names(source, others)
    alpha = SOLVERS[o.method.solver]["alpha"]
    return writer.quantization_config(default, o.method.iterations, alpha, ignore, others, o.schemes.kv_cache_scales)
