"""Where threads meet: mbarriers, clusters, barriers of a block, memory; results, and what must be reported."""

import numpy as np
import pytest

from .interpreter import Options, checked
from .snippets import MBARRIER, WAIT, aligned, buffers, execute, kinds, ordered


@ordered
def test_phases_of_arrivals(options):
    """Warps hand a value round: what is written before an arrival is read after the wait, in three phases."""
    y = aligned(64, np.uint32)
    body = (
        MBARRIER.format(count=64)
        + "  shl.b32 %r2, %t, 2;\n  add.u32 %r2, %r1, %r2;\n  xor.b32 %r4, %r2, 128;\n  mov.u32 %r5, %t;\n"
    )
    for phase in range(3):
        body += f"  st.shared.b32 [%r2+{256 * phase}], %r5;\n  mbarrier.arrive.shared::cta.b64 %d9, [%r3];\n"
        body += WAIT.format(phase, phase & 1) + f"  ld.shared.b32 %r5, [%r4+{256 * phase}];\n  add.u32 %r5, %r5, 100;\n"
    body += "  mul.wide.u32 %d1, %t, 4;\n  add.u64 %d1, %d1, %a0;\n  st.global.b32 [%d1], %r5;"
    checked(execute(body, y, threads=64, options=options))
    assert y.tolist() == [(t ^ 32) + 300 for t in range(64)]


def test_states_and_counts_of_an_mbarrier():
    y = aligned(64, np.uint32)
    body = (
        MBARRIER.format(count=33)
        + """  mbarrier.arrive.shared::cta.b64 %d9, [%r3];
  mbarrier.test_wait.shared::cta.b64 %p2, [%r3], %d9;
  selp.b32 %r4, 1, 0, %p2;
  mbarrier.pending_count.b64 %r5, %d9;
  bar.warp.sync 0xffffffff;
  @%p1 mbarrier.arrive_drop.shared::cta.b64 %d8, [%r3];
  bar.warp.sync 0xffffffff;
  mbarrier.test_wait.shared::cta.b64 %p2, [%r3], %d9;
  selp.b32 %r6, 2, 0, %p2;
  or.b32 %r4, %r4, %r6;
  mbarrier.arrive.shared::cta.b64 %d9, [%r3];
  mbarrier.test_wait.shared::cta.b64 %p2, [%r3], %d9;
  selp.b32 %r6, 4, 0, %p2;
  or.b32 %r4, %r4, %r6;
  mul.wide.u32 %d1, %t, 8;
  add.u64 %d1, %d1, %a0;
  st.global.v2.b32 [%d1], {%r4, %r5};"""
    )
    checked(execute(body, y))
    # 33 are expected and 32 come: incomplete; the drop completes the phase, and 32 are enough for the next.
    assert y[::2].tolist() == [2 + 4] * 32 and y[1::2].tolist() == [33 - t for t in range(32)]


@pytest.mark.parametrize(
    "body, found",
    [
        (MBARRIER.format(count=1) + "  mbarrier.arrive.shared::cta.b64 %d9, [%r3];", set()),
        (
            MBARRIER.format(count=64) + "  mbarrier.arrive.shared::cta.b64 %d9, [%r3], 3;",
            {"more arrivals than the mbarrier expects"},
        ),
        (MBARRIER.format(count=64) + "  mbarrier.arrive.shared::cta.b64 %d9, [%r3+8];", {"no mbarrier there"}),
        (MBARRIER.format(count=0), {"count of an mbarrier"}),
        (MBARRIER.format(count=64) + "  ld.shared.b64 %d9, [%r3];", {"plain access to an mbarrier"}),
        (MBARRIER.format(count=64) + "  @%p1 mbarrier.init.shared::cta.b64 [%r3], 5;", {"mbarrier initialised twice"}),
        (
            MBARRIER.format(count=64) + "  @%p1 mbarrier.inval.shared::cta.b64 [%r3];\n  bar.sync 0;\n"
            "  @%p1 st.shared.b64 [%r3], %a0;",
            set(),
        ),
        (
            MBARRIER.format(count=64).replace("  bar.sync 0;\n", "") + "  mbarrier.arrive.shared::cta.b64 %d9, [%r3];",
            {"race: mbarrier used before its initialisation is known"},
        ),
        (
            MBARRIER.format(count=64) + "  mbarrier.arrive.shared::cta.b64 %d9, [%r3];\n" + WAIT.format(0, 0),
            {"endless polling"},
        ),
        (
            MBARRIER.format(count=32) + "  mbarrier.arrive.shared::cta.b64 %d9, [%r3];\n"
            "  mbarrier.test_wait.shared::cta.b64 %p2, [%r3], 7;",
            {"state of an mbarrier's phase long past"},
        ),
        (
            MBARRIER.format(count=64) + "  @%p1 mbarrier.expect_tx.shared::cta.b64 [%r3], 1048576;",
            {"bytes of an mbarrier out of range"},
        ),
    ],
)
def test_misuse_of_an_mbarrier(body, found):
    assert kinds(body, aligned(64, np.uint32)) == found


# ---- clusters -------------------------------------------------------------------------------------------------------
CLUSTER_SYNC = "  barrier.cluster.arrive.release.aligned;\n  barrier.cluster.wait.acquire.aligned;\n"
REMOTE = """  .shared .align 16 .b8 s[256];
  mov.u32 %r1, s;
  shl.b32 %r2, %t, 2;
  add.u32 %r2, %r1, %r2;
  mov.u32 %r3, %cluster_ctarank;
  xor.b32 %r4, %r3, 1;
  mad.lo.u32 %r5, %r3, 1000, %t;
  st.shared.b32 [%r2], %r5;
{before}  mapa.shared::cluster.u32 %r6, %r2, %r4;
  ld.shared::cluster.b32 %r7, [%r6];
{after}  mad.lo.u32 %r8, %block, 32, %t;
  mul.wide.u32 %d1, %r8, 4;
  add.u64 %d1, %d1, %a0;
  st.global.b32 [%d1], %r7;"""


@ordered
def test_distributed_shared_memory(options):
    y = aligned(128, np.uint32)
    body = REMOTE.format(before=CLUSTER_SYNC, after=CLUSTER_SYNC)
    checked(execute(body, y, blocks=4, cluster=2, options=options))
    assert y.reshape(4, 32).tolist() == [[1000 * (b % 2 ^ 1) + t for t in range(32)] for b in range(4)]
    generic = body.replace(
        "mapa.shared::cluster.u32 %r6, %r2, %r4;\n  ld.shared::cluster.b32 %r7, [%r6];",
        "cvt.u64.u32 %d5, %r2;\n  cvta.shared.u64 %d5, %d5;\n  mapa.u64 %d6, %d5, %r4;\n"
        "  ld.b32 %r7, [%d6];\n"
        "  getctarank.u32 %r9, %d6;\n  setp.ne.u32 %p1, %r9, %r4;\n  @%p1 trap;",
    )
    y[:] = 0
    checked(execute(generic, y, blocks=4, cluster=2, options=options))
    assert y.reshape(4, 32)[0].tolist() == [1000 + t for t in range(32)]


def test_faults_in_a_cluster():
    y = aligned(128, np.uint32)
    without = kinds(REMOTE.format(before="", after=CLUSTER_SYNC), y, blocks=2, cluster=2)
    assert "race: write after read" in without or "race: read after write" in without
    relaxed = CLUSTER_SYNC.replace("release", "relaxed")
    assert "race: read after write" in kinds(REMOTE.format(before=relaxed, after=CLUSTER_SYNC), y, blocks=2, cluster=2)
    exited = REMOTE.format(before=CLUSTER_SYNC + "  setp.eq.u32 %p1, %r3, 1;\n  @%p1 ret;\n", after="")
    orders = [Options(seed=s) for s in range(8)]
    found = [kinds(exited, y, blocks=2, cluster=2, options=o) for o in orders]
    assert {"shared memory of a block that has exited"} in found
    beyond = REMOTE.format(before=CLUSTER_SYNC, after=CLUSTER_SYNC).replace(
        "xor.b32 %r4, %r3, 1", "add.u32 %r4, %r3, 2"
    )
    assert kinds(beyond, y, blocks=2, cluster=2) >= {"mapa beyond the cluster"}
    assert kinds("  barrier.cluster.wait.aligned;", y, blocks=2, cluster=2) == {"cluster wait without arrive"}
    twice = "  barrier.cluster.arrive.aligned;\n" * 2 + "  barrier.cluster.wait.aligned;"
    assert "cluster arrive twice" in kinds(twice, y, blocks=2, cluster=2)
    left = "  setp.eq.u32 %p1, %block, 1;\n  @%p1 bra on;\n" + CLUSTER_SYNC + "on:\n" + "  bar.sync 0;\n"
    assert kinds(left, y, blocks=2, cluster=2) == set()  # who has exited is not waited for
    assert kinds("", y, blocks=3, cluster=2) == {"grid of parts of clusters"}


SEND = (
    """  .shared .align 8 .b64 full;
  .shared .align 16 .b8 s[256];
  mov.u32 %r1, s;
  mov.u32 %r3, full;
  mov.u32 %r10, %cluster_ctarank;
  xor.b32 %r11, %r10, 1;
  setp.eq.u32 %p1, %t, 0;
  @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
  @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 128;
  @%p1 fence.mbarrier_init.release.cluster;
"""
    + CLUSTER_SYNC
    + """  shl.b32 %r2, %t, 2;
  add.u32 %r2, %r1, %r2;
  mapa.shared::cluster.u32 %r12, %r2, %r11;
  mapa.shared::cluster.u32 %r13, %r3, %r11;
  mad.lo.u32 %r5, %r10, 1000, %t;
  st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r12], %r5, [%r13];
"""
    + WAIT.format(0, 0)
    + """  ld.shared.b32 %r7, [%r2];
  mad.lo.u32 %r8, %block, 32, %t;
  mul.wide.u32 %d1, %r8, 4;
  add.u64 %d1, %d1, %a0;
  st.global.b32 [%d1], %r7;
"""
)


@ordered
def test_async_stores_to_a_peer(options):
    y = aligned(64, np.uint32)
    checked(execute(SEND + CLUSTER_SYNC, y, blocks=2, cluster=2, options=options))
    assert y.reshape(2, 32).tolist() == [[1000 * (b ^ 1) + t for t in range(32)] for b in range(2)]
    early = SEND.replace(WAIT.format(0, 0), "") + CLUSTER_SYNC + WAIT.format(0, 0)
    found = kinds(early, y, blocks=2, cluster=2, options=options)
    assert found and all(k.startswith("race") or k == "uninitialised shared read" for k in found)


def test_async_reductions_at_a_peer():
    y = aligned(64, np.uint32)
    body = SEND.replace("mapa.shared::cluster.u32 %r12, %r2, %r11", "mapa.shared::cluster.u32 %r12, %r1, %r11")
    body = body.replace(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r12], %r5",
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r12], %t",
    )
    body = body.replace("  @%p1 mbarrier.init", "  @%p1 st.shared.b32 [%r1], 0;\n  @%p1 mbarrier.init", 1)
    body = body.replace("ld.shared.b32 %r7, [%r2]", "ld.shared.b32 %r7, [%r1]")
    checked(execute(body + CLUSTER_SYNC, y, blocks=2, cluster=2))
    assert (y == sum(range(32))).all()


def test_multicast():
    x, y = buffers(128)
    body = (
        SEND[: SEND.index("  shl.b32 %r2")]
        + """  setp.eq.u32 %p2, %r10, 0;
  and.pred %p2, %p2, %p1;
  @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
    [%r1], [%a1], 128, [%r3], %h1;
  shl.b32 %r2, %t, 2;
  add.u32 %r2, %r1, %r2;
"""
        + SEND[SEND.index("wait0:") :]
        + CLUSTER_SYNC
    )
    body = body.replace("  setp.eq.u32 %p1, %t, 0;", "  mov.b16 %h1, 3;\n  setp.eq.u32 %p1, %t, 0;")
    checked(execute(body, y, x, blocks=2, cluster=2))
    assert np.array_equal(y[:64].reshape(2, 32), np.stack([x[:32]] * 2))


# ---- barriers of a block --------------------------------------------------------------------------------------------
@ordered
def test_named_barriers_and_arrivals(options):
    """A warp arrives and goes on, another waits for what it has written."""
    y = aligned(32, np.uint32)
    body = """  .shared .align 16 .b8 s[128];
  mov.u32 %r1, s;
  shl.b32 %r2, %lane, 2;
  add.u32 %r2, %r1, %r2;
  setp.eq.u32 %p1, %warp, 1;
  @%p1 bra waits;
  st.shared.b32 [%r2], %t;
  bar.arrive 3, 64;
  bra.uni done;
waits:
  bar.sync 3, 64;
  ld.shared.b32 %r3, [%r2];
  mul.wide.u32 %d1, %lane, 4;
  add.u64 %d1, %d1, %a0;
  st.global.b32 [%d1], %r3;
done:"""
    checked(execute(body, y, threads=64, options=options))
    assert y.tolist() == list(range(32))
    assert "race: read after write" in kinds(body.replace("bar.sync 3, 64", "bar.sync 3, 32"), y, threads=64) | kinds(
        body.replace("bar.sync 3, 64;", ""), y, threads=64
    )


@ordered
def test_reductions_of_a_block(options):
    y = aligned(128 * 3, np.uint32)
    body = """  setp.lt.u32 %p1, %t, 40;
  barrier.cta.red.popc.aligned.u32 %r1, 0, %p1;
  barrier.cta.red.and.aligned.pred %p2, 0, %p1;
  barrier.cta.red.or.aligned.pred %p3, 0, !%p1;
  selp.b32 %r2, 1, 0, %p2;
  selp.b32 %r3, 1, 0, %p3;
  mul.wide.u32 %d1, %t, 12;
  add.u64 %d1, %d1, %a0;
  st.global.b32 [%d1], %r1;
  st.global.b32 [%d1+4], %r2;
  st.global.b32 [%d1+8], %r3;"""
    checked(execute(body, y, threads=128, options=options))
    assert y.reshape(-1, 3).tolist() == [[40, 0, 1]] * 128


@ordered
def test_a_cooperative_grid_meets_in_memory(options):
    """Each block adds to a counter and waits for all: then it reads what the last block has written."""
    y = aligned(64, np.uint32)
    body = """  setp.ne.u32 %p1, %t, 0;
  mul.wide.u32 %d1, %block, 4;
  add.u64 %d1, %d1, %a0;
  add.u32 %r1, %block, 7;
  @%p1 bra joined;
  st.global.b32 [%d1+64], %r1;
  membar.gl;
  red.global.add.u32 [%a0], 1;
again:
  ld.volatile.global.u32 %r2, [%a0];
  setp.lt.u32 %p2, %r2, 4;
  @%p2 bra again;
  membar.gl;
joined:
  bar.sync 0;
  ld.global.b32 %r3, [%a0+76];
  @!%p1 st.global.b32 [%d1+128], %r3;"""
    checked(execute(body, y, blocks=4, cooperative=True, options=options))
    assert y[32:36].tolist() == [10] * 4
    y[:] = 0
    assert "race: read after write" in kinds(
        body.replace("membar.gl;", ""), y, blocks=4, cooperative=True, options=options
    )
