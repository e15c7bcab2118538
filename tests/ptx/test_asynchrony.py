"""Asynchronous copies, of lanes and in bulk: results, and what must be reported."""

import numpy as np
import pytest

from .interpreter import checked
from .snippets import MBARRIER, WAIT, aligned, buffers, execute, kinds, ordered

LANE_COPY = """  .shared .align 16 .b8 s[1024];
  mov.u32 %r1, s;
  shl.b32 %r2, %t, 4;
  cvt.u64.u32 %d1, %r2;
  add.u64 %d2, %d1, %a0;
  add.u64 %d3, %d1, %a1;
  add.u32 %r2, %r1, %r2;
"""
OUT = "  ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];\n  st.global.v4.b32 [%d3], {%r4, %r5, %r6, %r7};"


@ordered
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_of_lanes(size, options):
    x, y = buffers()
    kind = "cg" if size == 16 else "ca"
    store = (
        f"  cp.async.{kind}.shared.global [%r2], [%d2], {size};\n  cp.async.commit_group;\n  cp.async.wait_group 0;\n"
    )
    word = {4: "b32", 8: "b64", 16: None}[size]
    register = {4: "%r4", 8: "%d4", 16: None}[size]
    out = f"  ld.shared.{word} {register}, [%r2];\n  st.global.{word} [%d3], {register};" if word else OUT
    checked(execute(LANE_COPY + store + out, x, y, options=options))
    got, want = (a.reshape(-1, 4)[:32, : size // 4] for a in (y, x))
    assert np.array_equal(got, want)


def test_copies_that_fill_with_zeros():
    x, y = buffers()
    copy = (
        "  setp.lt.u32 %p1, %t, 7;\n  selp.b32 %r3, 16, 4, %p1;\n  cp.async.cg.shared.global [%r2], [%d2], 16, %r3;\n"
    )
    checked(execute(LANE_COPY + copy + "  cp.async.wait_all;\n" + OUT, x, y))
    want = x.reshape(-1, 4)[:32].copy()
    want[7:, 1:] = 0
    assert np.array_equal(y.reshape(-1, 4)[:32], want)
    assert kinds(LANE_COPY + copy.replace("16, 4,", "16, 0,") + "  cp.async.wait_all;", x[:28], y) == set()


@pytest.mark.parametrize(
    "wait, found",
    [
        ("cp.async.wait_group 0;", set()),
        ("cp.async.wait_group 1;", {"race: under an asynchronous copy", "exit with copies under way"}),
        ("", {"race: under an asynchronous copy", "exit with copies under way"}),
    ],
)
def test_a_read_before_the_copy_has_landed(wait, found):
    x, y = buffers()
    body = f"{LANE_COPY}  cp.async.cg.shared.global [%r2], [%d2], 16;\n  cp.async.commit_group;\n  {wait}\n{OUT}"
    assert kinds(body, x, y) == found


def test_groups_are_waited_for_in_order():
    x, y = buffers(512)
    body = f"""{LANE_COPY}
  cp.async.cg.shared.global [%r2], [%d2], 16;
  cp.async.commit_group;
  cp.async.cg.shared.global [%r2+512], [%d2+512], 16;
  cp.async.commit_group;
  cp.async.wait_group 1;
{OUT}
  cp.async.wait_group 0;"""
    assert kinds(body, x, y) == set()
    assert np.array_equal(y[:128], x[:128])


def test_what_lands_is_known_to_its_thread_alone():
    x, y = buffers()
    body = f"""{LANE_COPY}  cp.async.cg.shared.global [%r2], [%d2], 16;
  cp.async.wait_all;
  MEET
  xor.b32 %r2, %r2, 16;
{OUT}"""
    assert kinds(body.replace("MEET", ""), x, y) == {"race: read after write"}
    assert kinds(body.replace("MEET", "bar.warp.sync 0xffffffff;"), x, y) == set()


def test_misaligned_copies():
    x, y = buffers()
    body = LANE_COPY + "  cp.async.cg.shared.global [%r2], [%d2+4], 16;\n  cp.async.wait_all;"
    assert kinds(body, x, y) == {"misaligned asynchronous copy"}
    body = LANE_COPY + "  cp.async.cg.shared.global [%r2], [%d2+1024], 16;\n  cp.async.wait_all;"
    assert kinds(body, x, y) == {"out of bounds global read"}


@ordered
def test_copies_of_lanes_that_arrive_on_an_mbarrier(options):
    x, y = buffers()
    body = (
        MBARRIER.format(count=32)
        + """  shl.b32 %r2, %t, 4;
  cvt.u64.u32 %d1, %r2;
  add.u64 %d2, %d1, %a0;
  xor.b32 %r4, %r2, 16;
  cvt.u64.u32 %d1, %r4;
  add.u64 %d3, %d1, %a1;
  add.u32 %r2, %r1, %r2;
  cp.async.cg.shared.global [%r2], [%d2], 16;
  cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3];
  xor.b32 %r2, %r2, 16;
{}"""
    )
    checked(execute(body.replace("{}", WAIT.format(0, 0) + OUT), x, y, options=options))
    assert np.array_equal(y[:128], x[:128])
    assert "race: under an asynchronous copy" in kinds(body.replace("{}", OUT), x, y)


# ---- bulk copies ----------------------------------------------------------------------------------------------------
LOAD = """  @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 %d9, [%r3], 1024;
  @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%a0], 1024, [%r3];
"""
USE = "  shl.b32 %r2, %t, 4;\n  cvt.u64.u32 %d1, %r2;\n  add.u64 %d3, %d1, %a1;\n  add.u32 %r2, %r1, %r2;\n" + OUT


@ordered
def test_a_bulk_load(options):
    x, y = buffers()
    body = MBARRIER.format(count=1) + LOAD + WAIT.format(0, 0) + USE
    checked(execute(body, x, y, threads=64, options=options))
    assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "change, found",
    [
        (
            ("fence.mbarrier_init.release.cluster", "add.u32 %r9, %r9, 0"),
            {"mbarrier not fenced for asynchronous copies"},
        ),
        (("fence.mbarrier_init.release.cluster", "fence.proxy.async"), set()),
        ((WAIT.format(0, 0), ""), {"race: under an asynchronous copy", "exit with copies under way"}),
        (("[%r3], 1024;", "[%r3], 1040;"), {"endless polling"}),
        (("[%r3], 1024;", "[%r3], 1008;"), {"endless polling"}),
        (("[%r1], [%a0], 1024", "[%r1+8], [%a0], 1024"), {"misaligned asynchronous copy"}),
        (("[%r1], [%a0], 1024", "[%r1], [%a0+16], 1024"), {"out of bounds global read", "endless polling"}),
        (
            ("[%a0], 1024, [%r3]", "[%a0], 1000, [%r3]"),
            {"size of a bulk copy is not a multiple of 16", "endless polling"},
        ),
    ],
)
def test_faults_of_a_bulk_load(change, found):
    x, y = buffers()
    body = MBARRIER.format(count=1) + LOAD + WAIT.format(0, 0) + USE
    assert change[0] in body
    got = kinds(body.replace(*change), x, y, threads=64)
    assert got >= found and bool(got) == bool(found)


STORE = """  shl.b32 %r2, %t, 4;
  add.u32 %r2, %r1, %r2;
  st.shared.v4.b32 [%r2], {%t, %t, %t, %t};
  fence.proxy.async.shared::cta;
  bar.sync 0;
  @%p1 cp.async.bulk.global.shared::cta.bulk_group [%a1], [%r1], 1024;
  @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.wait_group.read 0;
  bar.sync 0;
  st.shared.v4.b32 [%r2], {%r9, %r9, %r9, %r9};
"""


@ordered
def test_a_bulk_store(options):
    """Once its source has been read it may be overwritten; what was there arrives."""
    x, y = buffers()
    checked(execute(MBARRIER.format(count=1) + STORE, x, y, threads=64, options=options))
    assert np.array_equal(y, np.repeat(np.arange(64), 4))


def test_faults_of_a_bulk_store():
    x, y = buffers()

    def found(old, new):
        body = MBARRIER.format(count=1) + STORE
        assert old in body
        return kinds(body.replace(old, new), x, y, threads=64)

    assert found("  fence.proxy.async.shared::cta;\n", "") == {"race: read after write"}
    assert found("fence.proxy.async.shared::cta", "fence.proxy.async.global") == {"race: read after write"}
    assert found("  bar.sync 0;\n  st.shared.v4.b32 [%r2], {%r9", "  st.shared.v4.b32 [%r2], {%r9") >= {
        "race: write after read"
    }
    unread = {"race: source of an asynchronous copy", "exit with copies under way"}
    assert found("  @%p1 cp.async.bulk.wait_group.read 0;\n", "") == unread
    back = "  @%p1 ld.global.b32 %r8, [%a1];\n"
    assert found("  @%p1 cp.async.bulk.wait_group.read 0;\n", "  @%p1 cp.async.bulk.wait_group.read 0;\n" + back) == {
        "race: under an asynchronous copy"
    }
    assert found("  @%p1 cp.async.bulk.wait_group.read 0;\n", "  @%p1 cp.async.bulk.wait_group 0;\n" + back) == set()


def test_the_fence_may_stand_on_either_side_of_the_barrier():
    x, y = buffers()
    body = MBARRIER.format(count=1) + STORE.replace(
        "  fence.proxy.async.shared::cta;\n  bar.sync 0;\n", "  bar.sync 0;\n  @%p1 fence.proxy.async;\n"
    )
    assert kinds(body, x, y, threads=64) == set()


@ordered
def test_a_ring_of_slots(options):
    """A producer warp fills two slots with bulk loads, a consumer warp empties them: full and empty mbarriers."""
    x, y = aligned(8 * 32, np.uint32), aligned(8 * 32, np.uint32)
    x[:] = np.arange(1, 8 * 32 + 1)
    body = """  .shared .align 8 .b64 bars[4];
  .shared .align 16 .b8 slots[256];
  mov.u32 %r1, slots;
  mov.u32 %r3, bars;
  setp.ne.u32 %p1, %t, 0;
  @%p1 bra ready;
  mbarrier.init.shared::cta.b64 [%r3], 1;
  mbarrier.init.shared::cta.b64 [%r3+8], 1;
  mbarrier.init.shared::cta.b64 [%r3+16], 32;
  mbarrier.init.shared::cta.b64 [%r3+24], 32;
  fence.mbarrier_init.release.cluster;
ready:
  bar.sync 0;
  mov.u32 %r10, 0;
  setp.eq.u32 %p2, %warp, 1;
  @%p2 bra consume;
  setp.ne.u32 %p1, %lane, 0;
  @%p1 bra done;
produce:
  and.b32 %r11, %r10, 1;
  shl.b32 %r12, %r11, 3;
  add.u32 %r12, %r3, %r12;
  shl.b32 %r13, %r11, 7;
  add.u32 %r13, %r1, %r13;
  shr.u32 %r14, %r10, 1;
  and.b32 %r14, %r14, 1;
  xor.b32 %r14, %r14, 1;
empty:
  mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r12+16], %r14;
  @!%p3 bra empty;
  mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r12], 128;
  mul.wide.u32 %d1, %r10, 128;
  add.u64 %d1, %d1, %a0;
  cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r13], [%d1], 128, [%r12];
  add.u32 %r10, %r10, 1;
  setp.lt.u32 %p3, %r10, 8;
  @%p3 bra produce;
  bra.uni done;
consume:
  and.b32 %r11, %r10, 1;
  shl.b32 %r12, %r11, 3;
  add.u32 %r12, %r3, %r12;
  shl.b32 %r13, %r11, 7;
  add.u32 %r13, %r1, %r13;
  shl.b32 %r15, %lane, 2;
  add.u32 %r13, %r13, %r15;
  shr.u32 %r14, %r10, 1;
  and.b32 %r14, %r14, 1;
full:
  mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r12], %r14;
  @!%p3 bra full;
  ld.shared.b32 %r16, [%r13];
  RELEASE
  shl.b32 %r17, %r10, 7;
  add.u32 %r17, %r17, %r15;
  cvt.u64.u32 %d2, %r17;
  add.u64 %d2, %d2, %a1;
  st.global.b32 [%d2], %r16;
  add.u32 %r10, %r10, 1;
  setp.lt.u32 %p3, %r10, 8;
  @%p3 bra consume;
done:"""
    release = "mbarrier.arrive.shared::cta.b64 _, [%r12+16];"
    checked(execute(body.replace("RELEASE", release), x, y, threads=64, options=options))
    assert np.array_equal(x, y)
    early = body.replace("  ld.shared.b32 %r16, [%r13];\n  RELEASE", f"  {release}\n  ld.shared.b32 %r16, [%r13];")
    assert any(k.startswith("race") for k in kinds(early, x, y, threads=64, options=options))


@pytest.mark.parametrize(
    "operation, kind, dtype",
    [
        ("add", "u32", np.uint32),
        ("min", "s32", np.int32),
        ("add.noftz", "bf16", np.uint16),
        ("add", "f32", np.float32),
        ("or", "b32", np.uint32),
    ],
)
def test_bulk_reductions(operation, kind, dtype):
    x = aligned(1024 // np.dtype(dtype).itemsize, dtype)
    y = aligned(x.size, dtype)
    x[:], y[:] = (0x3F80, 0x4000) if kind == "bf16" else (3, 5)
    body = (
        MBARRIER.format(count=1)
        + LOAD
        + WAIT.format(0, 0)
        + f"""
  @%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}.{kind} [%a1], [%r1], 1024;
  @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.wait_group 0;"""
    )
    checked(execute(body, x, y, threads=64))
    want = {"add": 8, "min": 3, "or": 7, "add.noftz": 0x4040}[operation]
    assert (y == want).all()
