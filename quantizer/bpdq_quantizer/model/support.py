"""Whether a model can be quantized, seen before any work is done."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import find_stages
from bpdq_quantizer.model.calls import Call, Run, block_inputs, carries, run_block
from bpdq_quantizer.model.modules import BPDQEmbedding
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block, read_weight, solved
from bpdq_quantizer.model.weights import check_numbers, weights_in
from bpdq_quantizer.model.windows import Window, text_windows

FLOATS = 16  # of --embed-bits and --head-bits: no bit-planes
TABLE_BITS = 4  # by default, of an embedding that is the LM head too
TABLE_SHARE, SMALLEST_TABLE = 1 / 10, 1 << 23  # of a model's weights, and weights: of those that are worth it
SERVED_TABLES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # whose classes of vLLM were tried so
CAUSAL = 1e-2  # of an output's norm: what a later token may change, by rounding alone
LARGEST_SHARE = 1 / 8  # of a block's weights that may be in other parameters than Linears: convolutions, gates by head


def check_dense(prefix: str, blocks: nn.ModuleList) -> None:
    """Raise InputError for blocks that hold much of their weights other than in Linears, such as experts fused in a way
    that `bpdq_kernels.experts` does not know: they would stay in 16 bits."""
    for index, block in enumerate(blocks):
        weights = weights_in(block)
        linear = sum(prod(weight.shape) for weight in weights.values())
        for name, parameter in block.named_parameters():
            is_other = parameter.ndim > 1 and name.removesuffix(".weight") not in weights
            if is_other and (parameter.numel() > LARGEST_SHARE * linear or ".experts." in name):
                raise InputError(
                    f"{prefix}.{index}.{name} has shape {tuple(parameter.shape)}: it is no Linear, nor experts as "
                    "transformers has them in most families, and too large to stay in 16 bits: not supported"
                )


@torch.no_grad()
def check_blocks(source: Streamed, windows: Sequence[Window]) -> Streamed:
    """Try, on the CPU, one block of each kind with two windows of two tokens, in the way in which calibration runs it,
    and what is in front of the blocks with the first of `windows`, and the first that has images.

    Returns the source with `by_window` and `carries` as they must be. Raises InputError, which names the architecture
    and the block, where it does not run by itself or does not reach each weight that is to be solved once, or where a
    window is too long; see also `check_dense`.
    """
    check_dense(source.prefix, source.blocks)
    architecture = type(source.model).__name__
    shared = [name for name in source.model.all_tied_weights_keys if name.startswith(f"{source.prefix}.")]
    if shared:  # Zamba
        raise InputError(f"{architecture}: {shared[0]} is another block's too: not supported")
    pair = text_windows(torch.tensor([[0, 1], [1, 0]]))
    try:
        hidden, calls = block_inputs(source.model, source.blocks, pair, source.by_window)
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{architecture} can't be run without its blocks ({e}): not supported") from e
    if hidden[0].ndim != 3:  # Gemma 3n
        raise InputError(
            f"{architecture}: its blocks read hidden states of shape {tuple(hidden[0].shape)}, not one for each token: "
            "not supported"
        )
    attempts = [(torch.cat(hidden), False), (hidden[0], True)]
    faults = []
    for states, by_window in attempts if len(calls[0]) == 1 else attempts[1:]:
        try:
            _try_blocks(source, states, calls)
            source = source._replace(by_window=by_window, carries=any(carries(call) for call, *_ in calls))
            break
        except InputError as e:
            faults.append(e)
    else:
        raise faults[0]
    seeing = [window for window in windows if window.images]
    texts = [window for window in windows if not window.images]
    for window in [*texts[:1], *seeing[:1]]:
        try:
            block_inputs(source.model, source.blocks, [window])
        except InputError:
            raise
        except Exception as e:  # CTRL, of a position beyond its last
            if window.images:
                raise InputError(f"{architecture} can't take an image of its processor ({e}): not supported") from e
            raise InputError(f"--seq-len {window.tokens.shape[1]}: {architecture} can't take it ({e}): lower it") from e
    return source._replace(by_window=source.by_window or bool(seeing))


def check_kept(source: Streamed) -> None:
    """Raise InputError for NaN or infinity in what stays in 16 bits, in blocks and around them, and in embeddings."""
    check_numbers({name: tensor for name, tensor in source.model.state_dict().items() if not tensor.is_meta})
    planes = {f"{name}.weight" for name in solved(source)}
    for name in source.blocks.state_dict(prefix=f"{source.prefix}."):
        if name not in planes:
            check_numbers({name: read_weight(source, name, torch.device("cpu"))})


def _try_blocks(source: Streamed, states: Tensor, calls: list[list[Call]]) -> None:
    """Run one block of each kind on states [n, L, D]; all, where some read what others leave."""
    tried = set()
    for index, (block, (call, *_)) in enumerate(zip(source.blocks, calls, strict=True)):
        kind = index if carries(call) else repr(block)
        if kind in tried:
            continue
        tried.add(kind)
        device = torch.device("cpu")
        load_block(source, index, device)
        run = partial(run_block, block, call, device)
        try:
            _check_causal(run, states)
            find_stages(solved(source, index).values(), run, states)
        except Exception as e:
            raise InputError(
                f"{type(source.model).__name__}: {source.prefix}.{index} can't be quantized ({e}): not supported"
            ) from e
        finally:
            drop_block(block)


def _check_causal(run: Run, states: Tensor) -> None:
    """Raise InputError for a block whose outputs at a token depend on the next one: an encoder's."""
    other = states.clone()
    other[:, 1] *= -1
    before, after = (run(x)[:, 0].double() for x in (states, other))
    if (after - before).norm() > CAUSAL * before.norm():
        raise InputError("its attention sees later tokens, it is no decoder")


def table_bits(architecture: str, table: int, weights: int) -> int | None:
    """Bit-planes that a tied embedding of so many weights, of all of a model's, has by default: where it is much of a
    small model, a file's bytes are worth more elsewhere."""
    is_large = table >= max(SMALLEST_TABLE, TABLE_SHARE * weights)
    return TABLE_BITS if is_large and architecture in SERVED_TABLES else None


def tied_bits(embed_bits: int | None, head_bits: int | None) -> int | None:
    """Bit-planes of an embedding and LM head that are tied: either option means both, None neither.

    Raises InputError where the options contradict each other.
    """
    if None not in (embed_bits, head_bits) and embed_bits != head_bits:
        raise InputError(
            f"--embed-bits {embed_bits} --head-bits {head_bits}: this model's embedding and LM head are tied, one "
            "table for both: give the same number, or only one of them"
        )
    return head_bits if embed_bits is None else embed_bits


def check_tokens(model: PreTrainedModel, windows: Sequence[Window], source: str) -> None:
    """Raise InputError where windows of the text `source` don't fit the tables of tokens or positions."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError as e:
        raise InputError(f"{type(model).__name__} does not say what its embedding is: not supported") from e
    rows = table.out_features if isinstance(table, BPDQEmbedding) else table.num_embeddings
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= rows:
        raise InputError(
            f"{source}: holds token {largest}, but the model's embedding has {rows} rows: the tokenizer is "
            "another model's, or has tokens that were never added to the model"
        )
    check_length(model, max(window.tokens.shape[1] for window in windows))


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise InputError for windows of more tokens than a model has positions for."""
    positions = most_positions(model)
    if positions is not None and length > positions:
        raise InputError(
            f"--seq-len {length}: {type(model).__name__} knows {positions} positions: lower --seq-len to {positions}"
        )


def most_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model can take, MPT's biases among them; None where it can take any number."""
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return getattr(config, "max_seq_len", None)
    rope = getattr(config, "rope_parameters", None)
    if has_position_table(model):
        return positions
    if not rope or getattr(config, "alibi", False):  # Falcon's
        return None
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)]  # of layers
    return max(_stretched(kind, positions) for kind in kinds or [rope])


def _stretched(rope: Mapping[str, Any], positions: int) -> int:
    """How far rotary positions reach where they are interpolated: configs give `positions` before or after that."""
    if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    trained = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(trained * (rope.get("factor") or 1)))


def has_position_table(model: PreTrainedModel) -> bool:
    """Whether positions are looked up in a table: GPT-2 and OPT, GPT-J."""
    decoder = model.get_decoder() or model
    tables = [name for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)]
    tables += [name for name, _ in decoder.named_buffers()]
    return any(name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings") for name in tables)
