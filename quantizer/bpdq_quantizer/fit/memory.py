"""Memory that `bpdq quantize` needs, on the device where it solves and on the host beside it."""

from math import isqrt, prod

from bpdq_quantizer.algorithm.in_turn import CHUNK, steps
from bpdq_quantizer.algorithm.refine import CHUNK_ELEMENTS, matrices_at_once
from bpdq_quantizer.fit.parts import Mixture, Model
from bpdq_quantizer.model.activations import ACTIVATION_BYTES, LOSS_ELEMENTS, kept_states, windows_per_batch
from bpdq_quantizer.model.windows import gradient_tokens

LOSS_COPIES = 6  # logits, their logarithms, probabilities, sums of these, two gradients
CALIBRATION = 128, 2048  # windows and their tokens, defaults of `bpdq quantize`


def quantize_device_bytes(m: Model, gpu: bool = True) -> int:
    """What `bpdq quantize` needs where it solves: a block and its copy, one stage's matrices, a batch's activations,
    and what the experts that are solved at once read."""
    stages = [stage_bytes(n, k, gpu) for block in m.blocks for n, k in block.stages]
    stages += [experts_bytes(n, k, gpu, experts_at_once(x)) for x in m.mixtures for n, k in x.stages]
    activations = ACTIVATION_BYTES * (2 if m.mixtures else 1)
    return 2 * m.itemsize * sum(n * k for n, k in m.heaviest) + max(stages) + covariance_bytes(m) + activations


def covariance_bytes(m: Model) -> int:
    """Of a block's outputs, in chunks, and of one stage's factors."""
    blocks = [(sum(n for n, _ in b.linears), max((n for n, _ in b.stages), default=0)) for b in m.blocks]
    return 4 * CHUNK * max(outputs + widest for outputs, widest in blocks)


def experts_at_once(x: Mixture) -> int:
    """How many are solved at once, at most (`passes.experts.slices`); 1 where all stay in 16 bits."""
    return min([x.count, *(matrices_at_once(n, k) for n, k in x.stages)]) if x.stages else 1


def expert_input_bytes(m: Model, tokens: int) -> int:
    """What a layer's experts are given, [tokens, H], in the quantized and in the 16-bit model, each twice while they
    are put together."""
    return max((4 * m.itemsize * tokens * max(k for _, k in x.linears) for x in m.mixtures if x.linears), default=0)


def stage_bytes(n: int, k: int, gpu: bool = True) -> int:
    """Of that, a stage with weights [n, k]: about four fp32 [k, k] (H, its factors, a solver's copy), three [n, k] (W,
    the target, what is left of it), and of the rows of a turn four [rows, k] and what `refinement_bytes` says."""
    rows = -(-n // steps(n))
    return 4 * (4 * k * k + 3 * n * k + 4 * rows * k) + refinement_bytes(rows, k, gpu)


def experts_bytes(n: int, k: int, gpu: bool, count: int) -> int:
    """The same of `count` experts with weights [n, k], whose rows are solved at once."""
    return 4 * 4 * count * (k * k + n * k) + refinement_bytes(count * n, k, gpu)


def refinement_bytes(rows: int, k: int, gpu: bool) -> int:
    """Of four temporaries: on a GPU features of the rows, with two planes and a bias, on a CPU the rows themselves."""
    return 4 * 4 * (min(3 * rows * k, CHUNK_ELEMENTS) if gpu else min(rows * k, CHUNK_ELEMENTS // 3))


def quantize_host_bytes(m: Model, calibration: tuple[int, int] = CALIBRATION, page_locked: bool = True) -> int:
    """What `bpdq quantize` needs of the host beside it: embedding and head, one block, and hidden states of both
    models and what experts are given, or what gradients take before that, or `--evaluate` after it.

    calibration: windows and their tokens; page_locked: as with a GPU, where each batch takes a power of two bytes.
    """
    (windows, length), hidden_size = calibration, m.embedding[1]
    rows = max(sum(n for n, _ in kind.linears + sum((x.linears for x in kind.experts), ())) for kind in m.blocks)
    batch = windows_per_batch(length, hidden_size, rows, m.itemsize)
    batches = [min(batch, windows - first) for first in range(0, windows, batch)]
    states = [m.itemsize * count * length * hidden_size for count in batches]
    if page_locked:
        states = [1 << (size - 1).bit_length() for size in states]
    solving = 2 * sum(states) + expert_input_bytes(m, windows * length)
    gradients = gradient_bytes(m, *calibration) + fp32_head_bytes(m)
    return host_weights(m) + max(solving, gradients, evaluation_bytes(m))


def host_weights(m: Model) -> int:
    """Embedding, LM head and one block."""
    return m.itemsize * (prod(m.embedding) + prod(m.head or (0,)) + sum(n * k for n, k in m.heaviest))


def evaluation_bytes(m: Model) -> int:
    """While a run measures its checkpoint: the weights of the original and of the quantized model, as they are on a
    GPU."""
    return 2 * host_weights(m)


def gradient_bytes(m: Model, windows: int, length: int) -> int:
    """While gradients are followed: these, the hidden states in front of those blocks that are kept and of those
    between two of them, and of the logits LOSS_COPIES in fp32."""
    tokens, blocks = min(windows * length, gradient_tokens(windows * length)), sum(kind.count for kind in m.blocks)
    states = len(kept_states(blocks)) + isqrt(blocks) - 1
    logits = min(LOSS_ELEMENTS, length * (m.head or m.embedding)[0])
    return m.itemsize * tokens * m.embedding[1] * states + LOSS_COPIES * 4 * logits


def fp32_head_bytes(m: Model) -> int:
    """Of the LM head while gradients are followed, on a CPU that has no products of 16 bits."""
    return 4 * prod(m.head or m.embedding)
