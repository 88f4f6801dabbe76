"""The PTX emulator: memory, control flow, and the faults it has to find."""

import numpy as np
import pytest

from tests.ptx import PtxError, Report, launch
from tests.ptx_snippets import RNG, assembled, kernel_text, random_bits

ptxas = pytest.fixture(scope="module", autouse=True)(assembled)


# --- memory -----------------------------------------------------------------------------------------------------


def run(
    body: str, *buffers: np.ndarray, threads: int = 32, shared: int = 0, grid: tuple = (1,), **options: bool
) -> Report:
    """`body` with registers %r0.., %q0.. (64 bits), predicates %p0.. and %s, the address of shared memory."""
    declarations = ".reg .b32 %r<8>; .reg .b64 %q<4>; .reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %s;"
    text = kernel_text(f"mov.b32 %s, smem;\n{body}", len(buffers), declarations)
    return launch(text, grid, threads, list(buffers), shared, **options)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_vectors_are_loaded_and_stored(width: int, count: int):
    if width * count > 16:
        width, count = 4, 4
    source, result = RNG.integers(0, 256, (64 * width * count), np.uint8), np.zeros(64 * width * count, np.uint8)
    size = width * count
    vector = "" if count == 1 else f".v{count}"
    names = ", ".join(f"%v{i}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    body = f"""
    .reg .b{8 * max(width, 2)} %v<4>;
    mad.wide.u32 %q0, %t, {size}, %a0; mad.lo.u32 %r0, %t, {size}, %s;
    ld.global.nc.L1::evict_last{vector}.b{8 * width} {names}, [%q0];
    st.shared{vector}.b{8 * width} [%r0], {names};
    ld.shared{vector}.b{8 * width} {names}, [%r0];
    mad.wide.u32 %q0, %t, {size}, %a1;
    st.global.cs{vector}.b{8 * width} [%q0+0], {names};"""
    run(
        body.replace(".nc.L1::evict_last", ".L1::evict_last" if width == 1 else ".nc"),
        source,
        result,
        threads=64,
        shared=64 * size,
    )
    np.testing.assert_array_equal(result, source)


def test_narrow_loads_extend_to_the_register():
    result = np.zeros(64, "u4")
    body = """mad.wide.u32 %q0, %t, 8, %a1; ld.global.s8 %r0, [%a0+1]; ld.global.u8 %r1, [%a0+1];
    st.global.v2.u32 [%q0], {%r0, %r1};"""
    run(body, np.array([0, 0x80], np.uint8), result)
    assert result[:2].tolist() == [0xFFFFFF80, 0x80]


def test_atomics_add_up_in_lane_order():
    total, order = np.array([100], "u4"), np.zeros(64, "u4")
    body = """atom.global.gpu.acq_rel.add.u32 %r0, [%a0], %t; mad.wide.u32 %q0, %t, 4, %a1; st.global.u32 [%q0], %r0;"""
    run(body, total, order, threads=64)
    assert total[0] == 100 + 63 * 32
    assert order.tolist() == [100 + i * (i - 1) // 2 for i in range(64)]


def test_other_atomics():
    words, kept = np.array([5, 5, 5, 5, 0, 0], "u4"), np.array([1.5, 0], "f4")
    body = """
    atom.global.max.s32 %r0, [%a0], %t; red.global.min.u32 [%a0+4], %t;
    atom.global.cas.b32 %r0, [%a0+8], 5, %t; atom.global.exch.b32 %r0, [%a0+12], %t;
    st.shared.u32 [%s], 1; bar.sync 0; atom.shared.add.u32 %r1, [%s], 2; bar.sync 0; ld.shared.u32 %r1, [%s];
    st.global.u32 [%a0+16], %r1;
    red.global.add.f32 [%a1], 0f3F000000;"""
    run(body, words, kept, threads=64, shared=16)
    assert words.tolist() == [63, 0, 0, 63, 1 + 2 * 64, 0]
    assert kept[0] == 1.5 + 32


COPY = """
mad.wide.u32 %q0, %t, 16, %a0; mad.lo.u32 %r0, %t, 16, %s; mad.wide.u32 %q1, %t, 4, %a1;
mov.u32 %r1, 16; setp.gt.u32 %p0, %t, 15; @%p0 mov.u32 %r1, 0;
cp.async.cg.shared.global [%r0], [%q0], 16, %r1;
cp.async.commit_group;
cp.async.ca.shared.global [%r0+512], [%q0], 4, 4;
cp.async.commit_group;
"""


def test_async_copies_are_visible_after_their_group_was_waited_for():
    source, result = random_bits(32, 128), np.zeros(32, "u4")
    run(
        COPY + "cp.async.wait_group 1; ld.shared.u32 %r2, [%r0]; st.global.u32 [%q1], %r2;", source, result, shared=1024
    )
    assert result[:16].tolist() == source[:64:4].tolist()
    assert not result[16:].any(), "the copies of 0 bytes fill with zeros"
    run(
        COPY + "cp.async.wait_all; ld.shared.u32 %r2, [%r0+512]; st.global.u32 [%q1], %r2;", source, result, shared=1024
    )
    assert result.tolist() == source[::4].tolist()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;", "cp.async.wait_group 2;"])
def test_reading_an_async_copy_too_early_is_found(wait: str):
    body = COPY + wait + "ld.shared.u32 %r2, [%r0+512];"
    with pytest.raises(
        PtxError, match=r"ld\.shared\.u32 %r2, \[%r0\+512\]: reads what cp\.async has not been waited for"
    ):
        run(body, random_bits(32, 128), np.zeros(32, "u4"), shared=1024)
    report = run(body, random_bits(32, 128), np.zeros(32, "u4"), shared=1024, strict=False)
    assert sum(report.races.values()) == 1


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("elements", "offset"), [(31, 0), (64, 33 * 4), (64, -4), (0, 0)])
@pytest.mark.parametrize("access", ["ld.global.u32 %r0, [%q0{}];", "st.global.u32 [%q0{}], %t;"])
def test_accesses_out_of_bounds_are_found(elements: int, offset: int, access: str):
    body = "mad.wide.u32 %q0, %t, 4, %a1;" + access.format(f"+{offset}" if offset else "")
    buffers = np.zeros(256, "u4"), np.zeros(elements, "u4"), np.zeros(256, "u4")
    lane = 31 if offset >= 0 and elements else 0
    where = (
        f"line .*: {access[:9]}.*lane {lane} accesses offset {4 * lane + offset} of buffer 1, which has {4 * elements}"
    )
    with pytest.raises(PtxError, match=where):
        run(body, *buffers)
    assert sum(run(body, *buffers, strict=False).out_of_bounds.values()) == 1


def test_a_predicate_that_keeps_lanes_in_bounds_is_honoured():
    result = np.zeros(20, "u4")
    body = "mad.wide.u32 %q0, %t, 4, %a0; setp.lt.u32 %p0, %t, 20; @%p0 st.global.u32 [%q0], %t;"
    run(body, result)
    assert result.tolist() == list(range(20))
    with pytest.raises(PtxError, match="lane 20 accesses offset 80"):
        run(body.replace("@%p0", "@!%p0"), result)


def test_null_and_foreign_pointers_are_found():
    for body in (
        "mov.b64 %q0, 4; ld.global.u32 %r0, [%q0];",
        "mov.b64 %q0, 0; ld.global.u32 %r0, [%q0];",
        "shl.b64 %q0, %a0, 8; ld.global.u32 %r0, [%q0];",
    ):
        with pytest.raises(PtxError, match="unmapped address"):
            run(body, np.zeros(4, "u4"))


def test_misaligned_vectors_are_found():
    with pytest.raises(PtxError, match="global address is not aligned to 16 bytes"):
        run("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a0+8];", np.zeros(64, "u4"))
    with pytest.raises(PtxError, match="shared address is not aligned to 8 bytes"):
        run("st.shared.v2.u32 [%s+4], {%t, %t};", shared=64)


def test_shared_memory_has_an_end():
    run("st.shared.u32 [%s+60], %t;", shared=64)
    with pytest.raises(PtxError, match="shared address 64 is outside of 64 bytes"):
        run("st.shared.u32 [%s+64], %t;", shared=64)


def test_uninitialised_shared_memory_is_found_in_every_cta():
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, 0; @%p0 st.shared.u16 [%s+2], 1;
    ld.shared.u16 %h0, [%s+2]; {}"""
    run(body.format(""), shared=4)
    with pytest.raises(PtxError, match="reads uninitialised shared memory"):
        run(body.format("ld.shared.u32 %r0, [%s];"), shared=4)
    with pytest.raises(PtxError, match=r"ld\.shared\.u16.*reads uninitialised shared memory"):
        run(body.format(""), shared=4, grid=(2,))


def test_races_between_warps_are_found_and_barriers_order_them():
    body = """mad.lo.u32 %r0, %t, 4, %s; xor.b32 %r1, %t, {}; mad.lo.u32 %r1, %r1, 4, %s;
    st.shared.u32 [%r0], %t; {} ld.shared.u32 %r2, [%r1]; {} st.shared.u32 [%r0], %t;"""
    run(body.format(32, "bar.sync 0;", "bar.sync 0;"), threads=64, shared=256)
    run(body.format(31, "", ""), threads=64, shared=256)
    with pytest.raises(PtxError, match="reads what another warp wrote since the last barrier"):
        run(body.format(32, "", "bar.sync 0;"), threads=64, shared=256)
    with pytest.raises(PtxError, match="overwrites what another warp read since the last barrier"):
        run(body.format(32, "bar.sync 0;", ""), threads=64, shared=256)


@pytest.mark.parametrize(
    ("stride", "access", "extra"),
    [
        (4, "ld.shared.u32 %r1, [%r0];", 0),
        (8, "ld.shared.u32 %r1, [%r0];", 1),
        (128, "ld.shared.u32 %r1, [%r0];", 31),
        (0, "ld.shared.u32 %r1, [%r0];", 0),
        (132, "ld.shared.u32 %r1, [%r0];", 0),
        (2, "ld.shared.u16 %h0, [%r0];", 0),
        (8, "ld.shared.v2.u32 {%r1, %r2}, [%r0];", 0),
        (16, "ld.shared.v2.u32 {%r1, %r2}, [%r0];", 2),
        (16, "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r0];", 0),
        (128, "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r0];", 28),
        (128, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];", 28),
        (128, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r0];", 7),
        (144, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];", 0),
    ],
)
def test_bank_conflicts_are_counted(stride: int, access: str, extra: int):
    fill = """mov.u32 %r5, 0; mad.lo.u32 %r0, %t, 4, %s;
    fill: st.shared.u32 [%r0], %t; add.u32 %r0, %r0, 128; add.u32 %r5, %r5, 1; setp.lt.u32 %p0, %r5, 40; @%p0 bra fill;
    """
    report = run(f"{fill} mad.lo.u32 %r0, %t, {stride}, %s; {access}", shared=40 * 128)
    assert sum(report.bank_conflicts.values()) == extra
    assert all(access.split()[0] in text for text in report.bank_conflicts)
    assert report.instructions["st.shared.u32"] == 40
    assert report.instructions[access.split()[0]] == 1


def test_lanes_that_do_not_access_cause_no_bank_conflicts():
    body = "mad.lo.u32 %r0, %t, 128, %s; setp.lt.u32 %p0, %t, {}; @%p0 st.shared.u32 [%r0+124], %t;"
    for lanes in (1, 2, 5):
        assert sum(run(body.format(lanes), shared=4096).bank_conflicts.values()) == lanes - 1


NOT_EMULATED = [
    "wgmma.fence.sync.aligned;",
    "frobnicate.b32 %r0, %r1;",
    "sqrt.rz.f32 %r0, %r1;",
    "add.s32 %r0, %q1, %r0;",
    "cvt.f32.e4m3 %r0, %r1;",
    "ld.global.frob.u32 %r0, [%q0];",
    "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r0}, {%r0}, {%r0}, {%r0};",
]


@pytest.mark.parametrize("instruction", NOT_EMULATED)
def test_instructions_that_are_not_emulated_are_named(instruction: str):
    text = kernel_text("membar.cta;", 0, ".reg .b32 %r<4>; .reg .b64 %q<4>;")
    with pytest.raises(PtxError) as caught:
        launch(text.replace("membar.cta;", instruction), (1,), 32, [])
    assert instruction[:-1] in str(caught.value)
    launch(text, (1,), 32, [])


# --- control flow -----------------------------------------------------------------------------------------------


def test_lanes_part_meet_and_wait_for_each_other():
    body = """
    mov.u32 %r0, 0; mov.u32 %r1, %t; and.b32 %r7, %t, 1; setp.eq.u32 %p1, %r7, 1; @%p1 bra odd;
    loop: setp.eq.u32 %p0, %r1, 0; @%p0 bra done; sub.u32 %r1, %r1, 1; add.u32 %r0, %r0, 3; bra loop;
    done: bar.sync 0;
    shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
    mad.wide.u32 %q0, %t, 4, %a0; st.global.u32 [%q0], %r2;
    ret;
    odd: add.u32 %r0, %t, 1000; bra.uni done;"""
    result = np.zeros(64, "u4")
    run(body, result, threads=64)
    assert result.tolist() == [1001 + t if t % 2 == 0 else 3 * (t - 1) for t in range(64)]


def test_lanes_that_meet_go_on_together():
    body = """and.b32 %r0, %t, 1; setp.eq.u32 %p0, %r0, 1; @%p0 bra meet; add.u32 %r0, %r0, 1;
    meet: xor.b32 %r0, %r0, 1;"""
    report = run(body)
    assert report.instructions["add.u32"] == report.instructions["xor.b32"] == 1


def test_whole_warps_may_skip_collective_instructions():
    body = """setp.ge.u32 %p0, %t, 32; @%p0 bra skip; redux.sync.add.s32 %r0, %t, -1; st.global.u32 [%a0], %r0; skip:"""
    result = np.zeros(1, "u4")
    run(body, result, threads=64)
    assert result[0] == sum(range(32))


def test_lanes_named_by_a_mask_suffice():
    body = """mov.u32 %r0, 0; setp.ge.u32 %p0, %t, 16; @%p0 bra skip; redux.sync.add.s32 %r0, %t, 0xffff;
    skip: mad.wide.u32 %q0, %t, 4, %a0; st.global.u32 [%q0], %r0;"""
    result = np.zeros(32, "u4")
    run(body, result)
    assert result.tolist() == [120] * 16 + [0] * 16


@pytest.mark.parametrize("guard", ["@%p0 bra skip;", "@%p0 ret;"])
def test_collective_instructions_without_some_lanes_are_found(guard: str):
    body = f"setp.eq.u32 %p0, %t, 7; {guard} shfl.sync.idx.b32 %r0, %t, 0, 31, -1; skip: add.u32 %r0, %r0, 1;"
    with pytest.raises(PtxError, match=r"shfl\.sync\.idx.*: without all lanes of the warp"):
        run(body)
    assert sum(run(body, strict=False).partial_warps.values()) == 1


def test_a_barrier_that_some_threads_never_reach_is_found():
    with pytest.raises(PtxError, match=r"bar\.sync 0: some threads never arrive"):
        run("setp.lt.u32 %p0, %t, 32; @%p0 bra other; bar.sync 0; bra end; other: bar.sync 0; end:", threads=64)


def test_threads_that_have_ended_are_not_waited_for():
    result = np.zeros(64, "u4")
    body = "setp.lt.u32 %p0, %t, 32; @%p0 ret; bar.sync 0; mad.wide.u32 %q0, %t, 4, %a0; st.global.u32 [%q0], %t;"
    run(body, result, threads=64)
    assert result.tolist() == [0] * 32 + list(range(32, 64))


def test_endless_loops_end():
    text = kernel_text("loop: bra loop;", 0)
    with pytest.raises(PtxError, match="an endless loop"):
        launch(text, (1,), 32, [], max_instructions=1000)


def test_every_cta_runs_with_its_own_index():
    result = np.zeros((4, 3, 2), "u4")
    body = """mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.x;
    mov.u32 %r4, %nctaid.y; mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
    mad.wide.u32 %q0, %r5, 4, %a0; shl.b32 %r1, %r1, 4; shl.b32 %r2, %r2, 8; or.b32 %r0, %r0, %r1; or.b32 %r0, %r0, %r2;
    setp.eq.u32 %p0, %t, 0; @%p0 red.global.add.u32 [%q0], %r0;"""
    run(body, result, grid=(2, 3, 4))
    assert result.tolist() == [[[x + 16 * y + 256 * z for x in range(2)] for y in range(3)] for z in range(4)]


def test_arguments_are_typed_by_their_parameters():
    text = """.version 7.8\n.target sm_86\n.address_size 64
    .visible .entry k(.param .u64 .ptr .global .align 1 a, .param .u32 n, .param .f32 x, .param .u64 hidden) {
    .reg .b64 %q<3>; .reg .b32 %r<2>;
    ld.param.u64 %q0, [a]; ld.param.s32 %q1, [n]; ld.param.f32 %r0, [x]; ld.param.u64 %q2, [hidden];
    st.global.v2.u64 [%q0], {%q1, %q2}; st.global.f32 [%q0+16], %r0; ret; }"""
    result = np.zeros(3, "u8")
    launch(text, (1,), 32, [result, -5, 1.5])
    assert result[0].view("i8") == -5
    assert result[1] == 0
    assert result[2:].view("f4")[0] == 1.5
    with pytest.raises(PtxError, match="1 arguments for 4 parameters"):
        launch(text, (1,), 32, [result])
    with pytest.raises(PtxError, match="contiguous"):
        launch(text, (1,), 32, [np.zeros((4, 4))[:, :2], -5, 1.5])
