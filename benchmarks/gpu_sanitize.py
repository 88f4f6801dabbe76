"""Part of the GPU check: one small case of each kernel under compute-sanitizer, memcheck and racecheck.

python -m benchmarks.gpu_sanitize --json sanitize.json
"""

import os
import shutil
import subprocess
import sys

import torch

from benchmarks.gpu_part import Parser, finish, new_report, save
from benchmarks.random_planes import random_experts, random_layer
from bpdq_kernels import Activation, embedding, linear, moe, prepare, prepare_experts, stored_linear
from bpdq_kernels.dispatch import DENSE_TOKENS, DENSE_TOKENS_ELSEWHERE
from bpdq_kernels.format import Scheme
from bpdq_kernels.tiled_linear import machine

TOOLS = ("memcheck", "racecheck")
SECONDS = 25  # of a tool


def run_cases() -> None:
    """Each kernel once, on sizes that leave ragged ends, each result in memory of its own."""
    N, K, group, inner = 200, 328, 64, 48
    arch = machine(torch.device("cuda"))[1]
    bias = torch.randn(N, device="cuda").bfloat16()
    for coefficient_bits in (16, 8):
        B, c, s = random_layer(N, K, Scheme(2, group, coefficient_bits), torch.Generator("cuda"))
        prepared = prepare(B, c, group, K, torch.bfloat16, "cuda", s)
        for tokens in (1, 3, 16, 20, 64, 70, DENSE_TOKENS.get(arch, DENSE_TOKENS_ELSEWHERE)):
            linear(torch.randn(tokens, K, device="cuda").bfloat16(), prepared, bias)
        stored_linear(torch.randn(3, K, device="cuda").bfloat16(), B, c, group, bias, s)
        embedding(torch.tensor([0, N - 1, 7], device="cuda"), prepared, torch.bfloat16)
        up, down = (
            prepare_experts(
                random_experts(5, n, k, Scheme(2, group, coefficient_bits), torch.Generator("cuda")),
                *(group, k, torch.bfloat16, "cuda"),
            )
            for n, k in ((2 * inner, K), (K, inner))
        )
        for tokens in (1, 30, 200):
            x, ids = torch.randn(tokens, K, device="cuda").bfloat16(), torch.randint(-1, 5, (tokens, 2), device="cuda")
            moe(x, torch.rand(tokens, 2, device="cuda"), ids, up, down, Activation("silu"))
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """Run both tools; returns the exit status."""
    parser = Parser("gpu_sanitize", __doc__)
    parser.add_argument("--cases", action="store_true", help="only run the kernels, as the tools do")
    args = parser.parse_args(argv)
    if args.cases:
        run_cases()
        return 0
    if not shutil.which("compute-sanitizer"):
        parser.exit(3, "gpu_sanitize: compute-sanitizer is not installed here\n")
    report = new_report(args)
    run_cases()  # compiles
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is its allocation's
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.gpu_sanitize", "--cases"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as e:
            status, output = None, (e.stdout or b"").decode()
        report[tool] = {"exit_status": status, "output": output.splitlines()[-20:]}
        print(f"{tool}: {(output.splitlines() or ['no output'])[-1]}")
        if status != 0:
            report["failures"].append(f"{tool}: exit status {status}")
        save(report, args.json)
    return finish(report, args.json)


if __name__ == "__main__":
    sys.exit(main())
