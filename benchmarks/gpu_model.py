"""Part of the GPU check: whole models in transformers, random planes against 16-bit weights, under CUDA graphs.

    python -m benchmarks.gpu_model --json model.json

Qwen2.5-7B's shapes, and 72B's with 8 of its blocks, k = 2 and G = 128, three ways: `stored` as transformers runs a
checkpoint (`checkpoint.loader.BPDQLinear`), `tiled` by the kernels that vLLM uses, and `16 bits`, torch's Linears
with the same planes dequantized. Decoding is greedy with a static cache, a step is one CUDA graph. Compared: the
three ways' logits, graphs with eager steps, and bytes on the device with what `bpdq plan` says.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from benchmarks.gpu_part import Parser, Row, finish, new_report, save
from benchmarks.kernel_bench import markdown
from benchmarks.random_models import CONFIGS, generator, materialize, write_config
from benchmarks.random_planes import random_planes
from bpdq_kernels import dequantize, linear, prepare
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored
from bpdq_quantizer.fit import kv_bytes, plan
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.weights import weights_in

SCHEME = Scheme(2, 128)
WAYS = ("stored", "tiled", "16 bits")
BATCHES = (1, 8)
CONTEXT = 128  # of the static cache; attention reads all of it in every step
CHECKED_STEPS, TIMED_STEPS = 8, 64
LOGITS_TOLERANCE = 0.15  # of the norm: what roundings to bf16 become in 28 random blocks; 0.076 and 0.046 on an H100
GRAPH_TOLERANCE = 1e-3  # likewise: the same kernels on the same numbers
WEIGHTS_TOLERANCE = 0.01  # of the planned bytes


class TiledLinear(nn.Module):
    """A Linear [N, K] prepared for the fast kernels, as the vLLM plugin holds it."""

    def __init__(self, B: Tensor, c: Tensor, in_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.prepared = prepare(B, c, SCHEME.group_size, in_features, torch.bfloat16, B.device)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.prepared, self.bias)


class Decoder:
    """Greedy decoding of a batch, step by step, in tensors that stay where they are. tokens: [batch, 1], read next."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=CONTEXT)
        self.first = (torch.arange(batch, device=model.device) * 37 % model.config.vocab_size).view(batch, 1)
        self.tokens = self.first.clone()

    def restart(self) -> None:
        self.cache.reset()
        self.tokens.copy_(self.first)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Logits [batch, vocabulary] after `tokens`, which then hold the likeliest ones."""
        logits = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Graph:
    """A decoder's step as one CUDA graph."""

    def __init__(self, decoder: Decoder) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = decoder.step()

    def step(self) -> Tensor:
        self.graph.replay()
        return self.logits


class Plan(NamedTuple):
    """What `bpdq plan` says of a model, in bytes. weights: by way; overhead: all that it allows beside them."""

    weights: dict[str, int]
    kv_per_token: int
    overhead: int


def planned(config: Path) -> Plan:
    m = plan.read_model(str(config))
    settings = plan.Settings(SCHEME, None, None, 80, CONTEXT)
    stored, tiled = plan.checkpoint_bytes(m, settings), plan.card_bytes(m, settings)
    dense = sum(stored) - stored.linear + sum(n * k for n, k in m.linears) * m.itemsize
    weights = {"stored": sum(stored), "tiled": sum(tiled), "16 bits": dense}
    return Plan(weights, kv_bytes.bytes_per_token("auto", m.layers), plan.overhead(m, settings, graphs=True))


def build(config: Path, way: str, device: str) -> PreTrainedModel:
    """The model of a config.json with random planes in its blocks' Linears: the same ones, whichever `way`."""
    model = plain_skeleton(str(config), buffers=True).eval()
    prefix, blocks = decoder_blocks(model)
    random = generator(device, 1)
    for name, weight in weights_in(blocks, prefix).items():
        outputs, inputs = weight.shape
        B, c = random_planes(outputs, inputs, SCHEME, random)
        if way == "stored":
            weight.replace(Stored(B, c), SCHEME.group_size)
        elif way == "tiled":
            model.set_submodule(name, TiledLinear(B, c, inputs, weight.linear.bias))
        else:
            W = dequantize(B, c, SCHEME.group_size, inputs).bfloat16()
            weight.linear.weight = nn.Parameter(W, requires_grad=False)
    return materialize(model, generator(device, 2))


def allocated(model: PreTrainedModel, device: str, before: int) -> int:
    """Bytes of device memory since `before`; on a CPU those of the model's tensors."""
    if device == "cuda":
        return requested_bytes() - before
    prepared = [t for m in model.modules() if isinstance(m, TiledLinear) for t in m.prepared if isinstance(t, Tensor)]
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *prepared])


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`; NaN and infinity count as 1."""
    error = ((y.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if error < 1 else 1.0


def seconds_per_step(step: Decoder | Graph, decoder: Decoder, device: str, steps: int) -> float:
    decoder.restart()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            step.step()
        return (time.perf_counter() - start) / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step.step()
    start.record()
    for _ in range(steps):
        step.step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / steps


def measure_batch(model: PreTrainedModel, batch: int, device: str, steps: int) -> tuple[Row, Tensor]:
    """Tokens/s, and graph against eager steps; also the logits [CHECKED_STEPS, batch, vocabulary] for fixed tokens."""
    decoder = Decoder(model, batch)
    random = torch.randint(model.config.vocab_size, (CHECKED_STEPS, batch, 1), generator=generator("cpu", batch))
    logits = []
    for tokens in random.to(device):
        decoder.tokens.copy_(tokens)
        logits.append(decoder.step().float().cpu())
    row: Row = {"kv_bytes": decoder.cache_bytes()}
    runner: Decoder | Graph = decoder
    if device == "cuda":
        decoder.restart()
        eager = torch.stack([decoder.step().clone() for _ in range(CHECKED_STEPS)])
        runner = Graph(decoder)
        decoder.restart()
        replayed = torch.stack([runner.step().clone() for _ in range(CHECKED_STEPS)])
        row["graph_error"] = relative_error(replayed, eager)
    row["ms_per_step"] = 1e3 * seconds_per_step(runner, decoder, device, steps)
    row["tokens_per_s"] = 1e3 * batch / row["ms_per_step"]
    return row, torch.stack(logits)


def measure(config: Path, device: str, steps: int) -> Iterator[Row]:
    """One row for each way to multiply, which its figures follow: by batch, in bytes, and against `stored`."""
    expected: dict[int, Tensor] = {}
    plans = planned(config)
    for way in WAYS:
        before = emptied_memory() if device == "cuda" else 0
        started = time.perf_counter()
        model = build(config, way, device)
        row: Row = {"way": way, "build_s": time.perf_counter() - started, "planned_weight_bytes": plans.weights[way]}
        row["weight_bytes"] = allocated(model, device, before)
        row["batches"] = {}
        for batch in BATCHES:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found, logits = measure_batch(model, batch, device, steps)
            found["planned_kv_bytes"] = plans.kv_per_token * batch * CONTEXT
            found["logits_error"] = relative_error(logits, expected.setdefault(batch, logits))
            if device == "cuda":
                peak = torch.cuda.max_memory_allocated() - before
                found["beside_bytes"] = peak - row["weight_bytes"] - found["kv_bytes"]
                found["planned_beside_bytes"] = plans.overhead
            row["batches"][batch] = found
        yield row
        del model


def emptied_memory() -> int:
    """Bytes that tensors still hold on the device once what nobody refers to is gone."""
    gc.collect()
    torch.cuda.empty_cache()
    return requested_bytes()


def requested_bytes() -> int:
    """Bytes of all tensors on the device, as asked for: the allocator's blocks are up to a MiB larger each."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def failures(name: str, row: Row, device: str) -> list[str]:
    """What is wrong with a row of `measure`, a line each."""
    found, label = [], f"{name}, {row['way']}"
    weights, planned_weights = row["weight_bytes"], row["planned_weight_bytes"]
    comparable = device == "cuda" or row["way"] != "tiled"  # a CPU's arrangement is not the one that plan counts
    if comparable and abs(weights / planned_weights - 1) > WEIGHTS_TOLERANCE:
        found.append(f"{label}: weights take {weights} bytes, plan says {planned_weights}")
    for batch, at in row["batches"].items():
        if not at["logits_error"] <= LOGITS_TOLERANCE:
            found.append(f"{label}, batch {batch}: logits are off by {at['logits_error']:.3g} of their norm")
        if not at.get("graph_error", 0.0) <= GRAPH_TOLERANCE:
            found.append(f"{label}, batch {batch}: a CUDA graph differs from eager steps by {at['graph_error']:.3g}")
        if at["kv_bytes"] != at["planned_kv_bytes"]:
            found.append(f"{label}, batch {batch}: the cache has {at['kv_bytes']} bytes, not {at['planned_kv_bytes']}")
        if at.get("beside_bytes", 0) > at.get("planned_beside_bytes", 0):
            found.append(
                f"{label}, batch {batch}: {at['beside_bytes']} bytes beside weights and cache, "
                f"plan allows {at['planned_beside_bytes']}"
            )
    return found


def table(models: dict[str, list[Row]]) -> str:
    """A line for each model and way; x: times the tokens/s of 16 bits."""
    lines = []
    for name, rows in models.items():
        dense = next((row for row in rows if row["way"] == "16 bits"), None)
        for row in rows:
            cells = [name, row["way"]]
            for batch, at in row["batches"].items():
                ratio = f" ({at['tokens_per_s'] / dense['batches'][batch]['tokens_per_s']:.2f} x)" if dense else ""
                cells.append(f"{at['tokens_per_s']:.1f}{ratio}")
            share = row["weight_bytes"] / row["planned_weight_bytes"]
            cells += [f"{row['weight_bytes'] / 1e9:.3f} ({share:.3f} of plan)"]
            cells.append(", ".join(f"{at['logits_error']:.4f}" for at in row["batches"].values()))
            lines.append(cells)
    head = ["model", "way", *(f"tokens/s, batch {batch}" for batch in BATCHES), "weights, GB", "logits off by"]
    return markdown(head, lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    return Parser("gpu_model", __doc__).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the part; returns the exit status."""
    args = parse_args(argv)
    models = {"tiny": {}} if args.tiny else {"qwen2.5-7b": {}, "qwen2.5-72b": {"num_hidden_layers": 8}}
    report = new_report(args) | {"scheme": SCHEME.__dict__, "context": CONTEXT, "models": {}}
    report["cuda_graphs"] = args.device == "cuda" or "skipped: they need a GPU"
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in models.items():
            blocks = changes.get("num_hidden_layers", CONFIGS[name]["num_hidden_layers"])
            label = f"{name}, {blocks} blocks"
            rows = report["models"][label] = []
            steps = 4 if args.tiny else TIMED_STEPS
            for row in measure(write_config(Path(folder) / name, name, **changes), args.device, steps):
                rows.append(row)
                report["failures"] += failures(label, row, args.device)
                print(f"{label}, {row['way']}: built in {row['build_s']:.1f} s", file=sys.stderr, flush=True)
                save(report, args.json)
    print(table(report["models"]))
    return finish(report, args.json)


if __name__ == "__main__":
    sys.exit(main())
