"""The kernel benchmark's static model counts what the machine executes, and real kernels stay within their budgets."""

import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import expert_static, kernel_bench, kernel_static, kernel_timing, sass, shapes
from benchmarks.kernel_static import Variant, compile_kernel
from benchmarks.random_planes import random_layer
from benchmarks.shapes import EXPERTS, MODELS, Experts, Layer, Model
from bpdq_kernels import dispatch, layout, reference
from bpdq_kernels.dispatch import Gemm, Gemv

RTX_3090 = sass.MACHINES["sm_86"]
LISTING = """
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x00000a0000017a02 */
                                                                                /* 0x000fc40000000f00 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;                      /* 0x0000000402047981 */
        /*0020*/                   SHFL.BFLY PT, R8, R4, 0x1, 0x1f ;            /* 0x0c201f0004087f89 */
        /*0030*/                   LOP3.LUT R9, R4, 0x10001, RZ, 0xc0, !PT ;    /* 0x0001000104097812 */
        /*0040*/                   HFMA2.BF16_V2 R9, R9, R5.H0_H0, R6 ;         /* 0x2000000509097231 */
        /*0050*/              @!P0 BRA 0x30 ;                                   /* 0xffffffd000008947 */
        /*0060*/                   HMMA.16816.F32.BF16 R12, R8, R4, R12 ;       /* 0x00000004080c723c */
        /*0070*/                   HMMA.16816.F16 R12, R8, R4, R12 ;            /* 0x00000004080c723c */
        /*0080*/                   BMMA.168128.AND.POPC R56, R24.reuse.ROW, R7.COL, RZ ;  /* 0x0000 */
        /*0090*/                   REDUX.SUM.S32 UR5, R70 ;                     /* 0x00000000460573c4 */
        /*00a0*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;                  /* 0x0000000104047890 */
        /*00b0*/                   FFMA R3, R3, R3, R3 ;                        /* 0x0000000303037223 */
        /*00c0*/               @P1 BRA 0x10 ;                                   /* 0xfffffff000001947 */
        /*00d0*/              @!P0 BRA 0xf0 ;                                   /* 0x0000001000008947 */
        /*00e0*/                   STG.E [R2.64], R3 ;                          /* 0x0000000302007986 */
        /*00f0*/                   EXIT ;                                       /* 0x000000000000794d */
        /*0100*/                   BRA 0x100;                                   /* 0xfffffff000007947 */
        /*0110*/                   NOP;                                         /* 0x0000000000007918 */
"""


def kernel(
    planes: int, group: int, config: Gemv | Gemm, coefficient_bits: int = 16, trellis: bool = False
) -> kernel_static.Kernel:
    variant = Variant(planes, group, config, coefficient_bits=coefficient_bits, trellis=trellis)
    return compile_kernel(variant, "sm_86")


def test_longest_backward_branch_is_the_main_loop_and_every_instruction_has_its_pipe():
    code = sass.read_listing(LISTING)
    assert sass.loops(sass.parse(LISTING)) == [(0x10, 0xC0), (0x30, 0x50)]
    assert (code.registers, code.spills, code.loop) == (40, 0, 0)
    pipes = {"ldg": 1, "shfl": 1, "alu": 1, "fmah": 1, "hmma32": 1, "hmma16": 1, "bmma": 1, "redux": 1, "fp32": 1}
    assert code.trip == pipes | {"issue": 12}
    assert code.once == {"alu": 1, "ldg": 1, "issue": 5}
    assert code.dequantization == 2  # LOP3, HFMA2


def test_spills_are_counted_and_code_without_a_loop_is_one_trip():
    code = sass.read_listing(
        "REG:8 \n /*0000*/ STL [R1], R2 ; /* 0x0 */\n /*0010*/ @P0 LDL.64 R2, [R1] ;\n /*0020*/ EXIT ;"
    )
    assert (code.spills, code.loop, code.trip["issue"], code.once["issue"]) == (2, None, 3, 0)


def test_a_subroutine_is_told_from_a_jump_by_its_return():
    jump = "REG:8 \n /*0000*/ @P1 CALL.REL.NOINC 0x20 ;\n /*0010*/ BRA 0x0 ;\n /*0020*/ EXIT ;"
    assert sass.read_listing(jump).subroutines == 0
    assert sass.read_listing(jump + "\n /*0030*/ RET.REL.NODEC R32 0x0 ;").subroutines == 1
    assert sass.read_listing(jump + "\n /*0030*/ BPT.TRAP 0x1 ;\n /*0040*/ RET.REL.NODEC R2 0x0 ;").subroutines == 0


def test_pipe_times_follow_from_counts_by_hand(monkeypatch):
    variant = Variant(2, 128, Gemm(8, tiles=2, warps=8, split=8))
    made = kernel_static.Kernel(variant, b"", sass.read_listing(LISTING), 0, 1)
    # 8 warps x 2 tiles x 2048 weights of 2.375 bits at 936.2 / (82 x 1.695) bytes per clock
    dram_clocks = 8 * 2 * 2048 * 2.375 / 8 / 6.7358
    times = kernel_static.over_dram(made, RTX_3090)
    expected = {"issue": 8 * 12 / 4, "hmma32": 8 * 8, "bmma": 8 * 2, "shfl": 8, "alu": 8 / 2, "ldg": 16, "lds": 0}
    assert {pipe: times[pipe] * dram_clocks for pipe in expected} == pytest.approx(expected, rel=1e-4)
    assert kernel_static.instructions_per_weight(made) == 12 * 32 / 4096
    assert kernel_static.kernel_row(made, RTX_3090)["over_dram"]["bmma_at_half_rate"] == 2 * times["bmma"]
    monkeypatch.setattr(kernel_static, "compile_kernel", lambda *_: made)
    row = kernel_static.layer_row(Layer("o", 3584, 3584), 8, 2, 128, RTX_3090, "bf16")
    # 224 blocks: 3 on the busiest SM, 8 warps, 4 trips of an HMMA of 8 clocks; 16 outputs per warp as launched
    assert (row["ctas"], row["pipe"], row["trips"]) == (224, "hmma32", 4)
    assert row["pipe_us"] == pytest.approx(3 * 8 * 4 * 8 / 1695)
    assert row["predicted_us"] == row["dram_us"] == pytest.approx(3584 * 3584 * 2.375 / 8 / 936.2e3, rel=0.01)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "ctas"),
    [
        (134, 1024, 8, 1),  # 4352 registers a warp, 3 in a quarter of the SM
        (75, 1024, 8, 3),  # 2560 registers a warp, 6 in a quarter
        (40, 0, 8, 6),  # 48 warps
        (24, 0, 1, 16),  # 16 blocks
        (32, 32768, 4, 3),  # 33 KB with the system's 1 KB
        (255, 0, 16, 0),
    ],
)
def test_occupancy_is_what_registers_shared_memory_and_limits_allow(registers, shared, warps, ctas):
    assert sass.ctas_per_sm(registers, shared, warps, RTX_3090) == ctas


@pytest.mark.parametrize("machine", sass.MACHINES.values(), ids=lambda machine: machine.arch)
def test_a_machines_rates_name_the_same_pipes(machine):
    assert machine.rates.keys() == RTX_3090.rates.keys()


@pytest.mark.parametrize("model", MODELS)
def test_one_token_keeps_all_multiprocessors_of_an_rtx_3090_busy(model):
    for layer in (*MODELS[model].layers, MODELS[model].head):
        row = kernel_static.layer_row(layer, 1, 2, 128, RTX_3090, "bf16")
        assert row["missed"] == []
        assert row["ctas"] >= 82
        assert row["idle"] <= 0.15
        assert row["bytes_in_flight"] >= 7000
        assert row["predicted_us"] == row["dram_us"], "not bound by memory"


@pytest.mark.parametrize(
    ("planes", "group", "config"),
    [
        (2, 128, Gemv(tiles=1, warps=8)),
        (2, 128, Gemv(tiles=4, warps=4)),
        (3, 128, Gemv(tiles=2, warps=8)),
        (4, 128, Gemv(tiles=2, warps=4)),
        (4, 32, Gemv(tiles=1, warps=4)),
        (2, 128, Gemm(8, tiles=1, warps=8, split=8)),
        (3, 128, Gemm(8, tiles=2, warps=8, split=8)),
        (2, 64, Gemm(8, tiles=2, warps=8, split=8)),
        (2, 256, Gemm(8, tiles=2, warps=8, split=8)),
        (2, 128, Gemm(16, tiles=1, warps=8, split=8)),
        (2, 128, Gemm(64, tiles=2, warps=4, split=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("coefficient_bits", [16, 8])
def test_kernel_stays_within_its_budget_on_an_rtx_3090(planes, group, config, coefficient_bits):
    compiled = kernel(planes, group, config, coefficient_bits)
    assert kernel_static.missed(compiled, RTX_3090) == []
    assert compiled.ctas >= 1
    tensor_cores = "bmma" if compiled.variant.tokens == 1 else "hmma32"
    assert compiled.code.trip[tensor_cores] > 0


@pytest.mark.parametrize(
    ("planes", "group", "config"),
    [
        (2, 128, Gemv(tiles=2, warps=8)),
        (2, 64, Gemv(tiles=1, warps=8)),
        (3, 128, Gemv(tiles=1, warps=8)),
        (2, 128, Gemm(8, tiles=2, warps=4, split=4)),
        (3, 128, Gemm(8, tiles=1, warps=8, split=8)),
        (2, 128, Gemm(64, tiles=2, warps=4, split=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("coefficient_bits", [16, 8])
def test_kernel_of_a_trellis_stays_within_its_budget_on_an_rtx_3090(planes, group, config, coefficient_bits):
    assert kernel_static.missed(kernel(planes, group, config, coefficient_bits, trellis=True), RTX_3090) == []


def test_a_trellis_has_the_bytes_of_its_tiles():
    layer = Layer("odd", 200, 416)
    for group, width in itertools.product((32, 128), (8, 16)):
        B = torch.zeros(layout.plane_shape(416, 200, 2), dtype=torch.int32)
        c = torch.zeros(layout.coefficient_shape(416, 200, 2, group, trellis=True))
        c, s = (c.to(torch.int8), torch.zeros(c.shape[1:])) if width == 8 else (c, None)
        tiles = layout.to_tiles(B, c, group, torch.float16, s)
        variant = Variant(2, group, Gemv(1, 8), coefficient_bits=width, trellis=True)
        assert variant.tiled_bytes(layer) == sum(tensor.nbytes for tensor in tiles if tensor is not None)


@pytest.mark.parametrize(
    ("config", "matrix"), [(Gemv(2, 4), "gate_up"), (Gemv(4, 2), "down"), (Gemm(8, 2, 4, 2), "gate_up")], ids=str
)
def test_experts_stay_within_the_budget_of_one_layer(config, matrix):
    compiled = compile_kernel(Variant(2, 128, config, matrix=matrix), "sm_86")
    assert kernel_static.missed(compiled, RTX_3090) == []
    assert max(kernel_static.over_dram(compiled, RTX_3090).values()) <= 0.75


@pytest.mark.parametrize("model", EXPERTS)
def test_one_tokens_experts_keep_all_multiprocessors_of_an_rtx_3090_busy(model):
    rows = expert_static.rows(model, 1, 2, 128, RTX_3090, "bf16", 16)
    assert [row["missed"] for row in rows] == [[], []]
    experts = EXPERTS[model]
    weights = 3 * experts.chosen * experts.inner * experts.hidden
    assert sum(row["packed_bytes"] for row in rows) == pytest.approx(weights * 2.375 / 8, rel=0.02)
    assert all(row["pipe_us"] <= 0.75 * row["dram_us"] for row in rows)


def test_the_tokens_of_an_expert_fill_blocks_on_average():
    experts = shapes.Experts("pairs", count=2, chosen=1, hidden=64, inner=64)
    both = dispatch.Experts(Gemm(8, 2, 4, 2), Gemm(8, 2, 4, 2), is_sorted=True, is_fused=True)
    # 9 tokens: all for one in 2 of 512 cases, which are 2 blocks; 8 and 1 in 18, which are 2; two blocks else
    assert expert_static.blocks(experts, 9, both) == pytest.approx(2)
    assert expert_static.blocks(experts, 2, both) == pytest.approx(1.5)
    assert expert_static.blocks(experts, 9, both._replace(is_sorted=False)) == 9


def test_a_kernel_over_its_budget_is_flagged():
    trip = sass.Counter({"issue": 4000, "hmma32": 64, "alu": 1900})
    made = kernel_static.Kernel(
        Variant(2, 128, Gemm(8, 2, 8, 8)), b"", sass.Code(99, 3, 0, trip, sass.Counter(), 700, 0), 0, 1
    )
    flags = kernel_static.missed(made, RTX_3090)
    assert flags[0] == "3 spills"
    assert {flag.split()[0] for flag in flags[1:]} == {"issue", "alu", "hmma32"}
    prefill = made._replace(variant=Variant(2, 128, Gemm(64, 2, 4, 1)))
    assert [flag.split("%")[1] for flag in kernel_static.missed(prefill, RTX_3090)[1:]] == [
        " of HMMA",
        " of HMMA",
        " of issue slots",
    ]
    assert kernel_static.missed(made, sass.MACHINES["sm_80"]) == ["3 spills"]


def test_static_run_covers_the_dispatch_table_and_every_plane_count_and_group_size():
    variants = kernel_static.variants(list(MODELS), [1, 2, 8, 16, 32, 64, 512], 2, 128, RTX_3090)
    eight = kernel_static.variants(list(MODELS), [1, 2, 8, 16, 32, 64, 512], 2, 128, RTX_3090, coefficient_bits=8)
    assert {variant._replace(coefficient_bits=16) for variant in eight if variant.planes < 4} <= {*variants}
    assert len(eight) == len(variants)
    assert not {variant.name for variant in variants} & {variant.name for variant in eight}
    assert len(variants) == len(set(variants)) == len({variant.name for variant in variants})
    assert {(v.planes, v.group, v.tokens) for v in variants} >= {
        (k, g, m) for k in (1, 2, 3, 4) for g in (32, 64, 128, 256) for m in (1, 8, 16, 64)
    }
    for model in MODELS.values():
        for layer in (*model.layers, model.head):
            for tokens in (1, 8, 16, 32, 64, 512):
                assert Variant(2, 128, kernel_static.config_for(tokens, layer, 2, 128, 82, 86)) in variants


def test_emitted_cubins_are_described_well_enough_to_count_them_again(tmp_path):
    kernels = [kernel(2, 128, Gemv(4, 8)), kernel(2, 128, Gemm(64, 2, 4, 1))]
    kernel_static.emit(kernels, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest == [
        {"name": "gemv-k2-g128-m1-t4-w8-s8", "m": 1, "k": 2, "group_size": 128, "block_n": 64}
        | {"weights_per_trip": 65536, "num_warps": 8, "bits_per_weight": 2.375, "loop": 0},
        {"name": "gemm-k2-g128-m64-t2-w4-s1", "m": 64, "k": 2, "group_size": 128, "block_n": 128}
        | {"weights_per_trip": 16384, "num_warps": 4, "bits_per_weight": 2.375, "loop": 0},
    ]
    for entry, made in zip(manifest, kernels, strict=True):
        cubin = (tmp_path / "out" / f"{entry['name']}.cubin").read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert sass.read_cubin(cubin) == made.code


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--static", "sm_86", "--model", "gpt-5,qwen2.5-7b"], "--model: unknown 'gpt-5', choose from qwen2.5-7b,"),
        (["--static", "sm_75"], "--static: unknown 'sm_75', choose from sm_86,"),
        (["--static", "sm_86", "--bits", "5"], "--bits must be 1 to 4"),
        (["--static", "sm_86", "--bits", "4", "--code", "trellis"], "--bits must be 1 to 3 with a trellis"),
        (["--static", "sm_86", "--code", "tcq"], "--code must be planes or trellis"),
        (["--static", "sm_86", "--bits", "two"], "--bits: invalid int value: 'two'"),
        (["--static", "sm_86", "--group-size", "100"], "--group-size must be one of"),
        (["--static", "sm_86", "--coefficient-bits", "4"], "--coefficient-bits must be 8 or 16"),
        (["--static", "sm_86", "--tokens", "1,,8"], "--tokens must be numbers of at least 1"),
        (["--static", "sm_86", "--dtype", "float32"], "--dtype must be bfloat16 or float16"),
        (["--static", "sm_86", "--json", "/no/such/folder/k.json"], "--json and --plot: no such folder"),
        (["--emit", "out"], "--emit needs --static"),
        ([], "no CUDA GPU here: --static sm_86 predicts"),
    ],
)
def test_wrong_options_are_refused_in_one_line(argv, reason, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_info:
        kernel_bench.main(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_static_run_prints_tables_and_writes_json_and_plot(tmp_path, capsys, monkeypatch):
    code = sass.read_listing(LISTING)
    monkeypatch.setattr(
        kernel_static, "compile_kernel", lambda variant, arch: kernel_static.Kernel(variant, b"", code, 1024, 2)
    )
    argv = ["--static", "sm_89", "--tokens", "1,8", "--dtype", "float16"]
    argv += ["--model", "qwen2.5-7b,qwen2.5-72b,qwen3-30b-a3b"]
    argv += ["--json", str(tmp_path / "k.json"), "--plot", str(tmp_path / "k.png"), "--emit", str(tmp_path / "out")]
    assert kernel_bench.main(argv) == 0
    out = capsys.readouterr().out
    assert "Static model of the RTX 4090 (sm_89)" in out
    assert "nothing was run on a GPU" in out
    report = json.loads((tmp_path / "k.json").read_text())
    assert len(report["layers"]) == 2 * 5 * 2 + 2 * 2
    assert [(row["model"], row["planes"]) for row in report["models"]][:3] == [("qwen2.5-7b", k) for k in (2, 3, 4)]
    for row in report["layers"] + report["kernels"]:
        assert f"| {row.get('kernel', row.get('name'))} |" in out
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    axes = kernel_bench.plot_static(report).axes[0]
    assert "Static prediction" in axes.get_title()
    assert "not measured" in axes.get_title()
    assert axes.get_xlabel()
    assert axes.get_ylabel() == "tokens/s, one sequence"


def test_static_run_of_a_trellis_counts_one_plane_more_than_it_reads(tmp_path, capsys, monkeypatch):
    code = sass.read_listing(LISTING)
    monkeypatch.setattr(
        kernel_static, "compile_kernel", lambda variant, arch: kernel_static.Kernel(variant, b"", code, 1024, 2)
    )
    argv = ["--static", "sm_86", "--tokens", "1,8", "--code", "trellis", "--model", "qwen2.5-7b,qwen3-30b-a3b"]
    assert kernel_bench.main([*argv, "--json", str(tmp_path / "k.json")]) == 0
    assert "gemm-k2-trellis-g128-m8-t2-w4-s4" in capsys.readouterr().out
    report = json.loads((tmp_path / "k.json").read_text())
    assert [row["planes"] for row in report["models"]] == [2, 3]
    row = report["layers"][0]
    outputs, inputs = row["layer"]["out_features"], row["layer"]["in_features"]
    assert row["packed_bytes"] == outputs * (inputs * (2 + 4 * 16 / 128) / 8 + 4)


def test_72b_bytes_are_those_of_its_layers(monkeypatch):
    made = kernel_static.Kernel(Variant(2, 256, Gemv(4, 8)), b"", sass.read_listing(LISTING), 0, 1)
    monkeypatch.setattr(kernel_static, "compile_kernel", lambda *_: made)
    row = kernel_static.model_row("qwen2.5-72b", 2, 256, RTX_3090, "bf16")
    assert row["bytes_in_memory"] == pytest.approx(19.20e9 + 4.98e9, rel=2e-3)
    assert row["roofline_tokens_per_s"] == pytest.approx(936.2e9 / (19.20e9 + 2.49e9), rel=2e-3)


TINY = Model(3, (Layer("qkv", 96, 256), Layer("o", 130, 200)), Layer("head", 300, 128))
SETTINGS = kernel_timing.Settings(2, 64, (1, 5), torch.bfloat16, "cpu", 82, 86, l2_bytes=4096)


def one_call_each(contenders):
    """A timer that runs every call once and reports a microsecond per contender, in order."""
    for calls in contenders.values():
        for call in calls:
            call()
    return {name: (i + 1) * 1e-6 for i, name in enumerate(contenders)}


def test_every_layer_and_batch_is_timed_against_matmul_with_weights_too_many_for_the_cache(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    seen = []

    def timer(contenders):
        seen.append({name: len(calls) for name, calls in contenders.items()})
        return one_call_each(contenders)

    rows = list(kernel_timing.time_models(["tiny"], SETTINGS, 4e9, 1e9, timer))
    assert [(row["layer"]["name"], row["tokens"]) for row in rows] == [
        (name, m) for name in ("qkv", "o", "head") for m in (1, 5)
    ]
    first = rows[0]
    assert first["packed_bytes"] == 96 * 256 * 2 // 8 + 96 * 4 * 3 * 2
    assert (first["us"], first["matmul_us"]) == (1, 2)
    assert first["bytes_per_s"] == first["packed_bytes"] / 1e-6
    assert first["of_matmul_rate"] == pytest.approx(2 * 96 * 256 / 1e-6 / 1e9)
    assert first["of_copy_bandwidth"] == pytest.approx(first["bytes_per_s"] / 4e9)
    for row, counts in zip(rows, seen, strict=True):
        assert (counts["bpdq"] - 1) * row["packed_bytes"] >= 8 * 4096
    assert kernel_timing.decoder_ms(rows, "tiny", 5, "matmul_us") == pytest.approx(3 * (2 + 2) / 1e3)
    assert "| tiny qkv 96x256 | 1 | 1.0 | 2.0 | 2.00 |" in kernel_bench.timed_table(rows)
    report = {"settings": {"model": ["tiny"], "tokens": [5, 1], "bits": 2, "group_size": 64}}
    figure = kernel_bench.plot_timed(report | {"rows": rows, "device": "X"})
    assert [line.get_label() for line in figure.axes[0].lines] == ["bit-planes", "torch.matmul, 16 bits"]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 5]


@pytest.mark.parametrize("coefficient_bits", [8, 16])
def test_a_layers_experts_are_timed_and_their_outputs_checked(monkeypatch, coefficient_bits):
    monkeypatch.setitem(EXPERTS, "tiny", Experts("tiny experts", count=20, chosen=2, hidden=256, inner=64))
    settings = SETTINGS._replace(coefficient_bits=coefficient_bits)
    rows = list(kernel_timing.time_models(["tiny"], settings, 4e9, 1e9, one_call_each))
    assert [(row["layer"]["name"], row["tokens"]) for row in rows] == [("experts", 1), ("experts", 5)]
    scheme = settings.scheme
    expert = scheme.stored_bytes(128, 256) + scheme.stored_bytes(256, 64)
    extra = 2 * 3 * (128 + 256) if coefficient_bits == 8 else 0  # scales are fp32 here
    assert rows[0]["packed_bytes"] == 2 * (expert + extra)  # a token's
    assert 2 < rows[1]["packed_bytes"] / (expert + extra) < 10
    assert rows[0]["of_matmul_rate"] == pytest.approx(2 * 2 * 3 * 64 * 256 / 1e-6 / 1e9)
    assert "| tiny experts 64x256 | 5 | 1.0 | 2.0 | 2.00 |" in kernel_bench.timed_table(rows)
    report = {"settings": {"model": ["tiny"], "tokens": [5, 1], "bits": 2, "group_size": 64}}
    axes = kernel_bench.plot_timed(report | {"rows": rows, "device": "X"}).axes[0]
    assert axes.get_ylabel() == "experts of one layer, ms"
    monkeypatch.setattr(kernel_timing, "moe", lambda x, *_: torch.zeros_like(x))
    with pytest.raises(kernel_timing.WrongResultError, match=r"tiny experts, 1 tokens, experts-gemv-.* off by 1 of"):
        list(kernel_timing.time_experts("tiny", settings, one_call_each))


def test_outputs_of_8_bit_coefficients_are_checked_against_their_scales():
    settings = SETTINGS._replace(coefficient_bits=8)
    layer = random_layer(96, 256, settings.scheme, torch.Generator())
    x = torch.randn(5, 256)
    y = x @ reference.dequantize(layer.B, layer.c, 64, 256, layer.s).T
    kernel_timing.check_outputs(y, x, layer, settings, "right")
    with pytest.raises(kernel_timing.WrongResultError, match="wrong: the outputs are off"):
        kernel_timing.check_outputs(2 * y, x, layer, settings, "wrong")


def test_time_of_a_kernel_with_wrong_outputs_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_timing, "linear", lambda x, prepared: torch.zeros(len(x), prepared.out_features))
    with pytest.raises(kernel_timing.WrongResultError, match=r"tiny o, 1 tokens, gemv-k2-g64-m1-.* off by 1 of"):
        list(kernel_timing.time_layer("tiny", TINY.layers[1], SETTINGS, one_call_each))


def test_copy_bandwidth_counts_reads_and_writes():
    assert kernel_timing.copy_bandwidth("cpu", one_call_each, size=1000) == pytest.approx(2e9)


def test_graphs_are_replayed_in_turns_and_a_calls_median_is_reported(monkeypatch):
    """Against a stand-in for torch.cuda, whose clock runs 1 ms per call that a replayed graph holds."""
    clock, replays, calls = [0.0], [], {"a": [], "b": []}

    class Graph:
        def __init__(self):
            self.name, self.calls = "ab"[len(graphs)], 0
            graphs.append(self)

        def replay(self):
            replays.append(self.name)
            clock[0] += self.calls * (100 if len(replays) <= 2 else 1)  # the first round is slow

    class Capture(nullcontext):
        def __exit__(self, *_):
            self.enter_result.calls = len(calls[self.enter_result.name]) - copies[self.enter_result.name]

    class Event(SimpleNamespace):
        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    graphs, copies = [], {"a": 3, "b": 40}
    cuda = SimpleNamespace(CUDAGraph=Graph, graph=Capture, Event=Event, synchronize=lambda: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    contenders = {name: [lambda i=i, n=name: calls[n].append(i) for i in range(copies[name])] for name in "ab"}
    seconds = kernel_timing.graph_timer(contenders)
    assert seconds == pytest.approx({"a": 1e-3, "b": 1e-3})
    assert replays == ["a", "b"] * (kernel_timing.ROUNDS + 1)
    assert calls["a"] == [0, 1, 2] * 8, "one warm-up of each, then whole rounds of 20 calls and more"
    assert calls["b"] == [*range(40)] * 2
