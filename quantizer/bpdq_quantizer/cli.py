"""The `bpdq` command."""

import argparse
import json
import os
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from bpdq_quantizer.checkpoint import hub, manifest
from bpdq_quantizer.checkpoint.inspection import alike, inspect
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.checkpoint.picture import check_plot, draw
from bpdq_quantizer.errors import InputError, WorkerError
from bpdq_quantizer.evaluation.logits import run_dtype
from bpdq_quantizer.evaluation.perplexity import finite, perplexity, runnable
from bpdq_quantizer.evaluation.several import compare_models
from bpdq_quantizer.evaluation.several import draw as draw_kl
from bpdq_quantizer.evaluation.tasks import check_tasks, in_transformers
from bpdq_quantizer.fit.plan import MOST_BITS, plan
from bpdq_quantizer.model.calibration import file_windows
from bpdq_quantizer.model.sources import check_source
from bpdq_quantizer.model.support import check_tokens
from bpdq_quantizer.model.tokens import leading_tokens, load_tokenizer
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.run import workers
from bpdq_quantizer.run.fields import add_arguments, checked
from bpdq_quantizer.run.identity import release
from bpdq_quantizer.run.options import FIELDS, PARTS
from bpdq_quantizer.run.pipeline import mean_bits, quantize, requantize
from bpdq_quantizer.run.statistics import OFFERED, other_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Terminated(BaseException):
    """SIGTERM came."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 bad usage or input, 130 and 143 stopped by Ctrl-C and
    SIGTERM, 141 nobody reads the output any more, 1 anything else."""
    args = _parser().parse_args(argv)
    try:
        with _sigterm():
            result = args.run(args)
            if args.json and result is not None:
                print(json.dumps(result))
            sys.stdout.flush()
            if vars(args).get("plot"):
                _save(args.figure(result), args.plot)
    except (InputError, WorkerError) as e:
        _say("error", str(e), e)
        return 2 if isinstance(e, InputError) else 1
    except (KeyboardInterrupt, Terminated) as e:
        interrupted = isinstance(e, KeyboardInterrupt)
        _say("stopped", "by Ctrl-C" if interrupted else "by SIGTERM", e)
        return 130 if interrupted else 143
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 141
    return 0


def _save(figure: "Figure", file: str) -> None:
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as e:
        raise InputError(f"--plot {file}: {e}") from None


def _say(what: str, reason: str, error: BaseException) -> None:
    """One line on stderr, with the error's notes."""
    reason = "; ".join([reason, *getattr(error, "__notes__", [])])
    print(f"bpdq: {what}: {' '.join(reason.split())}", file=sys.stderr)


@contextmanager
def _sigterm() -> Iterator[None]:
    """Let SIGTERM raise Terminated once; the next one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bpdq", description="Quantize language models to bit-planes (BPDQ).")
    parser.add_argument("--version", action="version", version=f"bpdq {release()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("quantize", help="model -> BPDQ checkpoint")
    for part in PARTS.values():
        add_arguments(p.add_argument_group(part.__doc__), fields(part))
    p.set_defaults(run=_quantize)

    p = commands.add_parser("requantize", help="another size of a model, from what quantize --keep-statistics kept")
    p.add_argument("statistics", metavar="DIR", help="of --keep-statistics; what is not given is as it was then")
    add_arguments(p, [FIELDS["output"]])
    add_arguments(p, [FIELDS[name] for name in OFFERED], with_defaults=False)
    p.set_defaults(run=_requantize)

    p = commands.add_parser("eval", help="perplexity of models and checkpoints, and how close they are to another")
    p.add_argument("model", nargs="+", metavar="MODEL_OR_CHECKPOINT")
    p.add_argument("--text", required=True, metavar="FILE")
    p.add_argument("--windows", type=int, help="use the first N windows (all)")
    add_arguments(p, [FIELDS["seq_len"], FIELDS["special_tokens"]])
    p.add_argument("--reference", metavar="MODEL", help="16-bit model to compare with: KL, top tokens, perplexity")
    p.add_argument("--seed", type=int, default=0, help="of the intervals of KL (%(default)s)")
    p.add_argument("--plot", metavar="FILE", help="draw KL against bits per weight (.png, .svg, .pdf)")
    p.add_argument("--tasks", metavar="TASK,...", help="scores of lm-eval's tasks, in transformers")
    p.add_argument("--task-folder", metavar="DIR", help="of YAML files of tasks that lm-eval does not have")
    p.add_argument("--tasks-limit", type=int, metavar="N", help="the first N documents of each task (all)")
    p.set_defaults(run=_eval, figure=lambda found: draw_kl(found["models"]))

    p = commands.add_parser("inspect", help="layers, bits per weight and bytes of a checkpoint")
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("--verify", action="store_true", help="compare every tensor and file with digests.json first")
    p.add_argument("--plot", metavar="FILE", help="draw the layers' bits and errors too (.png, .svg, .pdf)")
    p.set_defaults(run=_inspect, figure=draw)

    p = commands.add_parser("push", help="upload a checkpoint to the Hugging Face Hub, or go on with an upload")
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("repository", metavar="REPO", help="OWNER/NAME, which is created if need be")
    add_arguments(p, [FIELDS["private"], FIELDS["force"]])
    p.set_defaults(run=_push)

    p = commands.add_parser(
        "plan", help="does a model fit a card, and with how much context; needs its config.json only"
    )
    p.add_argument("model", metavar="MODEL", help="Hugging Face folder, config.json or hub id")
    add_arguments(p, [FIELDS["bits"]])
    p.add_argument("--group-size", type=int, help="32, 64, 128 or 256 (128; 256 with coefficients in 16 bits)")
    p.add_argument("--coefficient-bits", type=int, default=8, help="8 or 16 (%(default)s)")
    add_arguments(p, [FIELDS[name] for name in ("code", "embed_bits", "head_bits")])
    p.add_argument("--gpu-memory", type=float, default=24, metavar="GIB", help="of the card (%(default)s)")
    p.add_argument("--context", type=int, metavar="TOKENS", help="that one request must be able to take (2048)")
    p.add_argument(
        "--language-model-only", action="store_true", help="of a model that sees images the text model alone"
    )
    add_arguments(p, [FIELDS["ignore"]])
    p.add_argument("--probe", action="store_true", help="time this CPU for the hours that quantizing takes")
    p.set_defaults(run=_plan)

    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _quantize(args: argparse.Namespace) -> dict[str, Any] | None:
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers allow TF32, in which the solver goes astray
    if workers.rank():
        return workers.join_torchrun(workers.own_device(args.devices, args.device))
    report = quantize(**{name: value for name, value in vars(args).items() if name in FIELDS})
    return _made(report, args.output, args.push_to_hub)


def _requantize(args: argparse.Namespace) -> dict[str, Any] | None:
    torch.set_float32_matmul_precision("highest")
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    if workers.rank():
        run = other_size(args.statistics, **given)[0].execution
        return workers.join_torchrun(workers.own_device(run.devices, run.device))
    return _made(requantize(args.statistics, **given), args.output, given.get("push_to_hub"))


def _made(report: dict[str, Any], output: str, repository: str | None) -> dict[str, Any]:
    """Print what was made, and where it is."""
    by_kind = defaultdict(list)
    for layer in report["layers"]:
        by_kind[layer["name"].rpartition(".")[2]].append(layer)
    print(f"{'layers':<14}{'count':>6}{'bits/weight':>13}{'mean loss':>12}{'mean rel. error':>17}{'seconds':>9}")
    for kind, layers in by_kind.items():
        loss, error = (sum(layer[key] for layer in layers) / len(layers) for key in ("loss", "relative_error"))
        seconds = sum(layer["seconds"] for layer in layers)
        bpw = mean_bits(layers)
        print(f"{kind:<14}{len(layers):>6}{bpw:>13.3f}{loss:>12.4g}{error:>17.3%}{seconds:>9.1f}")
    peak = report["peak_host_memory_bytes"]
    print(
        f"{output}: {report['bits_per_weight']:.3f} bits per weight of the Linears, {report['seconds']:.0f} s "
        f"({report['cpu_seconds']:.0f} s CPU)" + (f", peak host memory {peak / 1e9:.2f} GB" if peak is not None else "")
    )
    if repository is not None:
        print(f"uploaded to {repository}")
    if found := report.get("evaluation"):
        print(
            f"{found['windows']} held-out windows: perplexity {found['perplexity']:.2f} (original: "
            f"{found['reference_perplexity']:.2f}), KL {found['kl']:.3f}, same top token {found['top1_agreement']:.1%}"
        )
    print(f"next: vllm serve {quote(output)}; bpdq eval {quote(output)} --reference MODEL --text FILE")
    return {**{k: v for k, v in report.items() if k != "layers"}, "output": output}


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    if args.seq_len < 2 or (args.windows is not None and args.windows < 1):
        raise InputError("--seq-len must be at least 2 and --windows at least 1")
    checked(FIELDS["seed"], args.seed)
    if args.tasks_limit is not None and args.tasks_limit < 1:
        raise InputError(f"--tasks-limit {args.tasks_limit}: expected at least 1, or leave it out for all documents")
    if args.plot and args.reference is not None:
        check_plot(args.plot)
    tasks = args.tasks.split(",") if args.tasks else []
    if not tasks and (args.task_folder, args.tasks_limit) != (None, None):
        raise InputError("--task-folder and --tasks-limit are of --tasks: name the tasks, or leave them out")
    if tasks:
        check_tasks(tasks, args.task_folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.reference is not None:
        return _compare(args, tasks, device)
    if len(args.model) > 1 or args.plot:
        raise InputError("several models, and --plot, need --reference: name the 16-bit model that they were made of")
    (name,) = args.model
    check_source(name)
    tokenizer = load_tokenizer(name)
    lead = leading_tokens(tokenizer, args.special_tokens)
    tokens = file_windows(args.text, tokenizer, args.seq_len, args.windows, lead)
    model = load_model(name, run_dtype(device)).to(device)
    check_tokens(model, text_windows(tokens), args.text)
    with runnable(name):
        value = finite(name, f"perplexity in {model.dtype}", perplexity(model, tokens, len(lead)))
    special = tokenizer.convert_ids_to_tokens(lead)
    print(f"perplexity {value:.4f} ({_protocol(len(tokens), args.seq_len, special)})")
    found = {
        "model": name,
        "text": args.text,
        "perplexity": value,
        "windows": len(tokens),
        "seq_len": args.seq_len,
        "special_tokens": special,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if tasks:
        found["tasks"] = in_transformers(model, tokenizer, tasks, args.task_folder, args.tasks_limit)
        for task, score in found["tasks"].items():
            print(f"{task} {score:.4f}")
    return found


def _protocol(windows: int, seq_len: int, special: list[str]) -> str:
    begins = f"each begins with {' '.join(special)}" if special else "no special tokens"
    return f"{windows} windows of {seq_len} tokens, {begins}"


def _compare(args: argparse.Namespace, tasks: list[str], device: torch.device) -> dict[str, Any]:
    options = args.text, args.seq_len, args.windows, args.special_tokens, args.seed, device
    found = {"text": args.text, "seq_len": args.seq_len, **compare_models(args.model, args.reference, *options)}
    for row in found["models"] if tasks else ():
        model, tokenizer = load_model(row["model"], run_dtype(device)).to(device), load_tokenizer(row["model"])
        row["tasks"] = in_transformers(model, tokenizer, tasks, args.task_folder, args.tasks_limit)
        del model
    reference, rows = found["reference"], found["models"]
    width = max(len(row["model"]) for row in (reference, *rows))
    scored = list(rows[0].get("tasks", {}))
    heads = f"{'GB':>9}{'bits/weight':>13}{'perplexity':>12}{'KL, nats':>11}{'95 % interval':>19}{'99th pct':>10}"
    print(f"{'model':<{width}}{heads}{'same top':>10}{''.join(f'  {name}' for name in scored)}")
    print(f"{reference['model']:<{width}}{reference['bytes'] / 1e9:>9.3f}{'':>13}{reference['perplexity']:>12.4f}")
    for row in rows:
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.3f}"
        interval = "" if row["kl_interval"] is None else "{:.4f} to {:.4f}".format(*row["kl_interval"])
        print(
            f"{row['model']:<{width}}{row['bytes'] / 1e9:>9.3f}{bits:>13}{row['perplexity']:>12.4f}{row['kl']:>11.5f}"
            f"{interval:>19}{row['kl_p99']:>10.4f}{row['top1_agreement']:>10.2%}"
            + "".join(f"{row['tasks'][name]:>{len(name) + 2}.4f}" for name in scored)
        )
    print(_protocol(found["windows"], args.seq_len, found["special_tokens"]))
    return found


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    if args.plot:
        check_plot(args.plot)
    verified = manifest.verify(args.checkpoint) if args.verify else None
    found = inspect(args.checkpoint)
    rows = alike(found["layers"])
    width = max((len(row["name"]) for row in rows), default=0)
    heads = f"{'N x K':>16}{'bits':>6}{'code':>9}{'group':>7}{'c bits':>8}{'bits/weight':>13}{'layers':>8}{'MB':>10}"
    print(f"{'layers':<{width}}{heads}  blocks")
    for row in rows:
        shape = f"{row['out_features']} x {row['in_features']}"
        print(
            f"{row['name']:<{width}}{shape:>16}{row['bits']:>6}{row['code']:>9}{row['group_size']:>7}"
            f"{row['coefficient_bits']:>8}{row['bits_per_weight']:>13.3f}{row['count']:>8}{row['bytes'] / 1e6:>10.2f}"
            f"  {row['blocks']}".rstrip()
        )
    print(
        f"{found['architecture']}: {found['quantized_weights'] / 1e6:.1f} M weights in "
        f"{found['quantized_bytes'] / 1e6:.1f} MB of bit-planes, "
        f"{found['bits_per_weight']:.3f} bits per weight of the Linears, "
        f"other tensors {found['other_bytes'] / 1e6:.1f} MB"
        + (f", {found['mtp_bytes'] / 1e6:.1f} MB of them for multi-token prediction" if found["mtp_bytes"] else "")
        + (", scales for an fp8 KV cache" if found["kv_cache_scales"] else "")
    )
    if found["left_in_16_bits"]:
        counts = Counter(name.rpartition(".")[2] for name in found["left_in_16_bits"])
        print("Linears in 16 bits: " + ", ".join(f"{count} x {name}" for name, count in counts.items()))
    if verified is not None:
        print(f"{verified['tensors']} tensors and {verified['files']} other files are as they were written")
        found["verified"] = verified
    return found


def _push(args: argparse.Namespace) -> dict[str, Any]:
    found = hub.push(args.checkpoint, args.repository, args.private, args.force)
    print(f"{found['repository']}: {found['files']} files, {found['bytes'] / 1e6:.1f} MB")
    return found


def _print_token(found: dict[str, Any]) -> None:
    parameters, used = (found[key] / 1e9 for key in ("parameters", "active_parameters"))
    experts = "" if used == parameters else f", {used:.3g} of {parameters:.3g} billion parameters"
    size, rate = found["active_bytes"] / 1e9, found["most_tokens_per_second"]
    print(f"a token reads {size:.3f} GB{experts}: at most {float(f'{rate:.3g}'):g} tokens/s on an RTX 3090")


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    found = plan(**{k: v for k, v in vars(args).items() if k not in ("run", "json")})
    print(f"{found['architecture']}: {found['bits_per_weight']:.4g} bits per quantized weight")
    for label in ("linear", "embedding", "head", "other", "tower", "mtp", "checkpoint"):
        if found[f"{label}_bytes"] or label not in ("tower", "mtp"):
            print(f"  {label:<43}{found[f'{label}_bytes'] / 1e9:>9.3f} GB")
    _print_token(found)
    print(f"card of {args.gpu_memory:g} GiB, one sequence, no CUDA graphs")
    labels = {
        "card_budget_bytes": "what vLLM may use",
        "card_weight_bytes": "weights",
        "card_overhead_bytes": "activations and workspaces",
        "free_bytes": "left for the KV cache",
    }
    for key, label in labels.items():
        print(f"  {label:<43}{found[key] / 2**30:>9.3f} GiB")
    print(f"{'--kv-cache-dtype':<38}{'bytes/token':>12}{'tokens that fit':>17}  needs")
    rows = defaultdict(list)
    for name, needs in found["kv_cache_needs"].items():
        rows[found["kv_bytes_per_token"][name], found["tokens_that_fit"][name], needs].append(name)
    for (size, tokens, needs), names in rows.items():
        print(f"  {', '.join(names):<36}{size:>12}{tokens:>17}  {needs}")
    kept = {kind: found[f"{kind}_bytes_per_sequence"][found["kv_cache_dtype"]] for kind in ("state", "window")}
    if any(kept.values()):
        sizes = " and ".join(f"{size / 1e6:.0f} MB of {kind}s" for kind, size in kept.items() if size)
        print(f"each sequence takes {sizes} besides, with {found['kv_cache_dtype']}")
    host, device = (found[f"quantize_{place}_bytes"] / 1e9 for place in ("host", "device"))
    cpu, gpu = (found[f"quantize_{kind}_seconds"] / 3600 for kind in ("cpu", "gpu"))
    core = "one core of this CPU" if args.probe else "one core of an EPYC"
    print(
        f"to quantize: {cpu:.3g} hours of {core} or, counted, at least {gpu:.3g} "
        f"hours of an RTX 3090, {host:.0f} GB of host memory and {device:.0f} GB of the device's"
    )
    print("assumptions")
    for assumption in found["assumptions"]:
        print(f"  - {assumption}")
    print(f"for {found['context']} tokens\n  {found['serve_command']}")
    if found["fill_bpw"] < MOST_BITS:
        print(f"the most bits that leave room for them: bpdq quantize --target-bpw {found['fill_bpw']:g}")
    return found
