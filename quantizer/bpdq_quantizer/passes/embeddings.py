"""The input embedding and the LM head in bit-planes: two tables [N, K] of N tokens, or one table if they are tied.

They are quantized last, in the model as it will be served: tuning needs the 16-bit head for what the 16-bit model
predicts, and a stopped run goes on without knowing of tables.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bpdq_kernels import layout
from bpdq_kernels.format import Scheme
from bpdq_kernels.skeleton import embedding_names, is_tied
from bpdq_quantizer.algorithm.hessian import accumulate, symmetrize
from bpdq_quantizer.algorithm.solver import Solve
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.modules import looks_up_rows, replace
from bpdq_quantizer.passes.blocks import LayerReport
from bpdq_quantizer.storage.offload import Batches

CHUNK_ELEMENTS = 1 << 25  # weights solved at a time: about 2 GB of device memory
# Of the identity in the metric of tied tables, in units of the mean of diag(H). Perplexity of SmolLM2 at 4 bits: 39.99
# with 0.1, 40.00 with 1, 40.14 with 0, 44.45 with the identity alone (39.32 with the table in 16 bits).
TIED_SHARE = 0.1


def table_schemes(
    model: PreTrainedModel, embed_bits: int | None, head_bits: int | None, group_size: int
) -> dict[str, Scheme]:
    """The scheme of each table that is to be quantized, by name; None leaves one in 16 bits.

    Tied tables are one: either option means both. Raises InputError where the options contradict each other, the
    embedding does more than look up rows, or a table holds NaN or infinity.
    """
    embedding, head = embedding_names(model)
    if is_tied(model):
        if None not in (embed_bits, head_bits) and embed_bits != head_bits:
            raise InputError(
                f"--embed-bits {embed_bits} --head-bits {head_bits}: this model's embedding and LM head are tied, one "
                "table for both: give the same number, or only one of them"
            )
        embed_bits = head_bits = embed_bits or head_bits
    module = model.get_input_embeddings()
    if embed_bits and not looks_up_rows(module):
        raise InputError(
            f"--embed-bits: {embedding} is a {type(module).__name__}, which is not supported: leave it out"
        )
    bits = {embedding: embed_bits, head: head_bits}
    schemes = {name: Scheme(k, group_size) for name, k in bits.items() if k}
    for name in schemes:
        if not torch.isfinite(model.get_submodule(name).weight).all():
            raise InputError(f"{name}.weight holds NaN or infinity: the model is damaged, download it again")
    return schemes


@torch.no_grad()
def quantize_tables(
    model: PreTrainedModel, states: Batches, schemes: Mapping[str, Scheme], device: torch.device, solve: Solve
) -> list[LayerReport]:
    """Quantize the tables of `table_schemes` in place; returns a report for each, of tied ones for the embedding only.

    states: what the LM head reads of the calibration set in the model with quantized blocks, in batches [n, L, D]
    (`activations.head_inputs`). The model is on the CPU. The metric of an
    embedding is the identity, as its rows are looked up and multiply nothing; that of an LM head is the Hessian of
    `states`; that of tied tables is the sum of both, with TIED_SHARE of the identity.
    """
    embedding, head = embedding_names(model)
    tied = is_tied(model)
    reports = []
    for name in (embedding,) if tied else (embedding, head):
        if name not in schemes:
            continue
        started = time.perf_counter()
        weight = model.get_submodule(name).weight
        H = torch.eye(weight.shape[1], device=device)
        if tied or name == head:
            H.zero_()
            tokens = sum(batch.shape[:2].numel() for batch in states)
            for batch in states:
                accumulate(H, batch.to(device), tokens)
            symmetrize(H)
            if tied:
                H.diagonal().add_(TIED_SHARE * H.diagonal().mean())
        if not torch.isfinite(H).all():
            raise InputError(f"{name}: its calibration inputs hold NaN or infinity: check the model and its dtype")
        B, c, loss, energy, damping = solve_rows(name, weight, H, schemes[name], solve)
        if not torch.isfinite(c).all():
            raise InputError(f"{name}: its coefficients overflow {c.dtype}: convert the model to bfloat16 first")
        replace(model, name, B, c, schemes[name].group_size)
        reports.append(
            LayerReport(
                name=name,
                in_features=weight.shape[1],
                out_features=weight.shape[0],
                bits=schemes[name].bits,
                group_size=schemes[name].group_size,
                bits_per_weight=8 * schemes[name].stored_bytes(*weight.shape) / weight.numel(),
                loss=loss,
                relative_error=loss / energy if energy else 0.0,
                damping=damping,
                seconds=time.perf_counter() - started,
            )
        )
    return reports


def solve_rows(
    name: str,
    weight: Tensor,
    H: Tensor,
    scheme: Scheme,
    solve: Solve,
) -> tuple[Tensor, Tensor, float, float, float]:
    """Quantize a table [N, K] of any float dtype against H [K, K], CHUNK_ELEMENTS at a time on H's device.

    Returns B and c as stored (`bpdq_kernels.layout`) on the CPU, and the sums over rows of `Solution`'s loss and
    energy, and its damping.
    """
    planes, coefficients, loss, energy, damping = [], [], 0.0, 0.0, 0.0
    chunks = weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1]))
    for rows in tqdm(chunks, desc=f"quantizing {name}", unit="chunk"):
        solution = solve(rows.to(H.device), H, scheme.bits, scheme.group_size)
        bits = torch.stack([(solution.codes >> p) & 1 for p in range(scheme.bits)])
        planes.append(layout.pack(bits).cpu())
        coefficients.append(solution.c.cpu())
        loss += solution.loss.sum().item()
        energy += solution.energy.sum().item()
        damping = solution.damping
    return torch.cat(planes, dim=2), torch.cat(coefficients, dim=2), loss, energy, damping
