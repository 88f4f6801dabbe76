"""The first page of the recipe: open the model and the text, and refuse what can't be done before any of it is."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bpdq_kernels.format import Scheme
from bpdq_quantizer.checkpoint import writer
from bpdq_quantizer.checkpoint.carried import carry_over
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.calibration import calibration_windows
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.sources import check_source
from bpdq_quantizer.model.stream import Stamps, Streamed, decoder_blocks, leave_alone, open_model, solved, stamps
from bpdq_quantizer.model.support import check_blocks, check_dense, check_tokens
from bpdq_quantizer.model.tokens import leading_tokens, load_tokenizer
from bpdq_quantizer.passes import kv_scales
from bpdq_quantizer.passes.allocate import check_budget, most_common, other_bytes, parse_size, uniform
from bpdq_quantizer.passes.embeddings import embedding_schemes
from bpdq_quantizer.passes.rotate import rotated
from bpdq_quantizer.passes.sensitivity import choices
from bpdq_quantizer.run.identity import identity
from bpdq_quantizer.run.options import SOLVERS, Options, Schemes
from bpdq_quantizer.run.recover import recover
from bpdq_quantizer.run.run_folder import RunFolder, begin
from bpdq_quantizer.run.workers import own_device


class Windows(NamedTuple):
    """Calibration text, [W, L] tokens. solving, tuning: to solve on, and to tune the model on; special_tokens: the
    names of those that each begins with."""

    solving: Tensor
    tuning: Tensor
    special_tokens: list[str]


class Run(NamedTuple):
    """What a run works on and with. stamps: of the source's files, before it was opened; embeddings: schemes of the
    embedding and LM head, if they are quantized; budget: bytes for the blocks' Linears, None for one scheme for all."""

    options: Options
    source: Streamed
    stamps: Stamps
    windows: Windows
    embeddings: dict[str, Scheme]
    budget: int | None
    device: torch.device
    folder: RunFolder


def prepare(o: Options, folder: RunFolder) -> Run:
    """Everything that is needed to begin, or to go on; `folder` is then this run's. Raises InputError."""
    device = own_device(o.execution.devices, o.execution.device)
    torch.manual_seed(o.method.seed)
    model = o.files.model
    check_source(model)
    check_dense(*decoder_blocks(plain_skeleton(model)))
    tokenizer = load_tokenizer(model)
    lead = leading_tokens(tokenizer, o.text.special_tokens)
    tokens = _windows(o, tokenizer, lead)
    before = stamps(model)
    source = leave_alone(open_model(model), o.schemes.ignore or [])
    check_tokens(source.model, tokens, o.text.calibration)
    source = check_blocks(source, tokens)
    if source.carries and (o.schemes.target_bpw or o.schemes.target_size):
        raise InputError(
            f"--target-bpw / --target-size: blocks of {type(source.model).__name__} share keys and values, through "
            "which gradients are not followed: leave it out"
        )
    if o.method.rotate == "hadamard":
        source = rotated(source, o.method.seed)
    embeddings = embedding_schemes(
        source.model, o.schemes.embed_bits, o.schemes.head_bits, o.schemes.group_size, o.schemes.coefficient_bits
    )
    budget = _budget(source, embeddings, o.schemes)
    if o.schemes.kv_cache_scales:
        kv_scales.check(source, tokens, device)
    carry_over(model, source.model, tokenizer, folder.path / writer.CARRIED)
    trial = checkpoint_config(o, one_scheme(source, o.schemes), embeddings, [])
    writer.write_config(source, trial, folder.resume)
    this = identity(o, tokens, source.model.dtype, device, before)
    begin(folder, this, writer.contents(folder.path, len(source.blocks)))
    recover(folder)
    names = tokenizer.convert_ids_to_tokens(lead)
    windows = Windows(tokens[: o.text.samples], tokens[: o.tuning.tune_samples], names)
    return Run(o, source, before, windows, embeddings, budget, device, folder)


def _windows(o: Options, tokenizer: Any, lead: list[int]) -> Tensor:
    """The calibration windows [W, L] for solving and tuning; raises InputError where they are too few."""
    samples, seq_len, calibration, tune = o.text.samples, o.text.seq_len, o.text.calibration, o.tuning.tune
    wanted = max(samples, o.tuning.tune_samples) if tune == "model" else samples
    tokens = calibration_windows(calibration, tokenizer, wanted, seq_len, o.method.seed, lead)
    if len(tokens) < 1 + (tune != "none"):
        raise InputError(
            f"--tune {tune} needs two calibration windows or more, and {calibration} holds {len(tokens)} of "
            f"{seq_len} tokens: bring more text or lower --seq-len"
        )
    if len(tokens) < wanted:
        tqdm.write(f"{calibration}: holds {len(tokens)} windows of {seq_len} tokens, --samples asked for {wanted}")
    return tokens


def _budget(source: Streamed, embeddings: Mapping[str, Scheme], o: Schemes) -> int | None:
    """Bytes for the blocks' Linears, if a target says so; raises InputError if no scheme is as small."""
    if o.target_bpw is not None:
        budget = int(o.target_bpw * sum(prod(weight.shape) for weight in solved(source).values()) / 8)
    elif o.target_size is not None:
        budget = parse_size(o.target_size) - other_bytes(source, embeddings)
    else:
        return None
    check_budget(source, budget, choices(o.coefficient_bits))
    return budget


def one_scheme(source: Streamed, o: Schemes) -> dict[str, Scheme]:
    """That of all the blocks' Linears, by name, where no target asks for more."""
    return uniform(source, Scheme(o.bits, o.group_size, o.coefficient_bits))


def checkpoint_config(
    o: Options, schemes: Mapping[str, Scheme], embeddings: Mapping[str, Scheme], ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config of a checkpoint with these schemes of the blocks' Linears, embedding and LM head."""
    default = most_common(schemes)
    others = {name: s for name, s in {**schemes, **embeddings}.items() if s != default or name in embeddings}
    alpha = SOLVERS[o.method.solver]["alpha"]
    return writer.quantization_config(default, o.method.iterations, alpha, ignore, others, o.schemes.kv_cache_scales)
