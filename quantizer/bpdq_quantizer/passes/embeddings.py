"""The input embedding and the LM head in bit-planes, [N, K] of N tokens each, or one of both if they are tied.

They are quantized last, in the model as it will be served: tuning needs the 16-bit head for what the 16-bit model
predicts, and a stopped run goes on without knowing of them.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored
from bpdq_kernels.skeleton import embedding_names, is_tied
from bpdq_quantizer.algorithm.hessian import accumulate, symmetrize
from bpdq_quantizer.algorithm.solver import Solve
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.modules import looks_up_rows, replace
from bpdq_quantizer.model.support import FLOATS, tied_bits
from bpdq_quantizer.passes.layers import LayerReport, check_finite, layer_report, solve_checked, stored
from bpdq_quantizer.storage.offload import Batches

CHUNK_ELEMENTS = 1 << 25  # weights solved at a time: about 2 GB of device memory
# Of the identity in the metric of a tied embedding, in units of the mean of diag(H). Perplexity of SmolLM2 at 4 bits:
# 39.99 with 0.1, 40.00 with 1, 40.14 with 0, 44.45 with the identity alone (39.32 with the embedding in 16 bits).
TIED_SHARE = 0.1


def embedding_schemes(
    model: PreTrainedModel, embed_bits: int | None, head_bits: int | None, scheme: Scheme
) -> dict[str, Scheme]:
    """The schemes of the embedding and the LM head, by name: `scheme` with their bits, plain where there is no such
    trellis; None and FLOATS leave one in 16 bits.

    Tied, they are one: either option means both. Raises InputError where the options contradict each other, the
    embedding does more than look up rows, or a weight is NaN or infinite.
    """
    embedding, head = embedding_names(model)
    if is_tied(model):
        embed_bits = head_bits = tied_bits(embed_bits, head_bits)
    module = model.get_input_embeddings()
    if embed_bits not in (None, FLOATS) and not looks_up_rows(module):
        raise InputError(
            f"--embed-bits: {embedding} is a {type(module).__name__}, which is not supported: leave it out"
        )
    bits = {name: k for name, k in ((embedding, embed_bits), (head, head_bits)) if k not in (None, FLOATS)}
    schemes = {name: scheme.with_bits(k).for_inputs(module.weight.shape[1]) for name, k in bits.items()}
    check_finite({f"{name}.weight": model.get_submodule(name).weight for name in schemes})
    return schemes


@torch.no_grad()
def quantize_embeddings(
    model: PreTrainedModel, states: Batches, schemes: Mapping[str, Scheme], device: torch.device, solve: Solve
) -> list[LayerReport]:
    """Quantize the embedding and LM head of `embedding_schemes` in place; returns a report for each, of tied ones for
    the embedding only.

    states: what the LM head reads of the calibration set in the model with quantized blocks, in batches [n, L, D]
    (`activations.head_inputs`). The model is on the CPU.
    """
    names = embedding_names(model)[:1] if is_tied(model) else embedding_names(model)
    reports = []
    for name in names:
        if name not in schemes:
            continue
        started, scheme = time.perf_counter(), schemes[name]
        weight = model.get_submodule(name).weight
        H = metric(model, name, states, device)
        check_finite({f"{name}.weight": weight}, H)
        layer, loss, energy, damping = solve_rows(name, weight, H, scheme, solve)
        replace(model, name, layer, scheme.group_size)
        seconds = time.perf_counter() - started
        tokens = sum(batch.shape[:2].numel() for batch in states)
        reports.append(layer_report(name, tuple(weight.shape), scheme, loss, energy, damping, seconds, tokens))
    return reports


def metric(model: PreTrainedModel, name: str, states: Batches, device: torch.device) -> Tensor:
    """The H [K, K] in which the embedding or LM head `name` is solved; states: as for `quantize_embeddings`.

    Of an embedding it is the identity, as its rows are looked up and multiply nothing; of an LM head the Hessian of
    `states`; of tied ones the sum of both, with TIED_SHARE of the identity.
    """
    tied = is_tied(model)
    width = model.get_submodule(name).weight.shape[1]
    if not tied and name == embedding_names(model)[0]:
        return torch.eye(width, device=device)
    H = torch.zeros(width, width, device=device)
    tokens = sum(batch.shape[:2].numel() for batch in states)
    for batch in states:
        accumulate(H, batch.to(device), tokens)
    symmetrize(H)
    if tied:
        H.diagonal().add_(TIED_SHARE * H.diagonal().mean())
    return H


def solve_rows(
    name: str,
    weight: Tensor,
    H: Tensor,
    scheme: Scheme,
    solve: Solve,
) -> tuple[Stored, float, float, float]:
    """Quantize a matrix [N, K] of any float dtype against H [K, K], CHUNK_ELEMENTS at a time on H's device.

    Returns the tensors to store, on the CPU, and the sums over rows of `Solution`'s loss and energy, and its damping.
    """
    parts: list[Stored] = []
    loss, energy, damping = 0.0, 0.0, 0.0
    chunks = weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))
    for rows in tqdm(chunks, desc=f"quantizing {name}", unit="chunk"):
        (solution,) = solve_checked([name], rows.to(H.device), H, scheme, solve)
        parts.append(stored(solution, scheme).to("cpu"))
        loss += solution.loss.sum().item()
        energy += solution.energy.sum().item()
        damping = solution.damping.item()
    joined = [None if tensors[0] is None else torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True)]
    return Stored(*joined), loss, energy, damping
