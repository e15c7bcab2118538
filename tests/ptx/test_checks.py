"""Every check of the interpreter: a kernel that provokes its report, and the like that gives none."""

import numpy as np
import pytest

from .interpreter import Module, Options, PtxError
from .snippets import aligned, execute, source

FULL = "0xffffffff"
SLOT = "  .shared .align 16 .b8 s[1024];\n  mov.u32 %r1, s;\n  shl.b32 %r2, %t, 2;\n  add.u32 %r2, %r1, %r2;\n"
WHERE = "  mul.wide.u32 %d1, %t, 4;\n  add.u64 %d1, %d1, %a0;\n"


def kinds(body, *arrays, **options):
    arrays = arrays or (aligned(256, np.uint32),)
    return execute(body, *arrays, **options).kinds()


#: What is found, the snippet that provokes it, one that does not, and how both are launched.
CASES = {
    "read past the end": (
        {"out of bounds global read"},
        WHERE + "  ld.global.b32 %r1, [%d1+900];",
        WHERE + "  ld.global.b32 %r1, [%d1+896];",
        {},
    ),
    "write before the start": (
        {"out of bounds global write"},
        WHERE + "  st.global.b32 [%d1+-4], %t;",
        WHERE + "  st.global.b32 [%d1], %t;",
        {},
    ),
    "misaligned vector": (
        {"misaligned global read"},
        "  ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0+8];",
        "  ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0+16];",
        {},
    ),
    "misaligned store": (
        {"misaligned global write"},
        "  setp.eq.u32 %p1, %t, 0;\n  @%p1 st.global.b32 [%a0+2], %t;",
        "  setp.eq.u32 %p1, %t, 0;\n  @%p1 st.global.b16 [%a0+2], %h1;",
        {},
    ),
    "shared out of bounds": (
        {"out of bounds shared write"},
        SLOT + "  st.shared.b32 [%r2+900], %t;",
        SLOT + "  st.shared.b32 [%r2+896], %t;",
        {},
    ),
    "dynamic shared out of bounds": (
        {"out of bounds shared write"},
        "  mov.u32 %r1, dynamic;\n  shl.b32 %r2, %t, 2;\n  add.u32 %r1, %r1, %r2;\n  st.shared.b32 [%r1+4], %t;",
        "  mov.u32 %r1, dynamic;\n  shl.b32 %r2, %t, 2;\n  add.u32 %r1, %r1, %r2;\n  st.shared.b32 [%r1], %t;",
        {"shared": 128, "declarations": ".extern .shared .align 16 .b8 dynamic[];"},
    ),
    "misaligned shared": (
        {"misaligned shared write"},
        SLOT + "  st.shared.b64 [%r1+4], %d1;",
        SLOT + "  st.shared.b64 [%r1+8], %a0;",
        {},
    ),
    "local out of bounds": (
        {"out of bounds local write"},
        "  .local .align 4 .b8 own[16];\n  mov.u64 %d1, own;\n  st.local.b32 [%d1+16], %t;",
        "  .local .align 4 .b8 own[16];\n  mov.u64 %d1, own;\n  st.local.b32 [%d1+12], %t;",
        {},
    ),
    "parameter out of bounds": (
        {"out of bounds parameter read"},
        "  ld.param.u64 %d1, [p0+8];",
        "  ld.param.u32 %r1, [p0+4];",
        {},
    ),
    "uninitialised shared": (
        {"uninitialised shared read"},
        SLOT + "  st.shared.b32 [%r2], %t;\n  bar.sync 0;\n  ld.shared.b32 %r3, [%r2+128];",
        SLOT + "  st.shared.b32 [%r2], %t;\n  bar.sync 0;\n  ld.shared.b32 %r3, [%r2];",
        {},
    ),
    "lanes without a barrier": (
        {"race: read after write"},
        SLOT + "  st.shared.b32 [%r2], %t;\n  xor.b32 %r3, %r2, 4;\n  ld.shared.b32 %r4, [%r3];",
        SLOT
        + f"  st.shared.b32 [%r2], %t;\n  bar.warp.sync {FULL};\n  xor.b32 %r3, %r2, 4;\n  ld.shared.b32 %r4, [%r3];",
        {},
    ),
    "warps without a barrier": (
        {"race: read after write", "race: write after read", "uninitialised shared read"},
        SLOT
        + f"  st.shared.b32 [%r2], %t;\n  bar.warp.sync {FULL};\n  xor.b32 %r3, %r2, 128;\n  ld.shared.b32 %r4, [%r3];",
        SLOT + "  st.shared.b32 [%r2], %t;\n  bar.sync 0;\n  xor.b32 %r3, %r2, 128;\n  ld.shared.b32 %r4, [%r3];",
        {"threads": 64},
    ),
    "write after read": (
        {"race: write after read", "race: read after write"},
        SLOT + "  st.shared.b32 [%r2], %t;\n  bar.sync 0;\n  xor.b32 %r3, %r2, 128;\n"
        "  ld.shared.b32 %r4, [%r3];\n  st.shared.b32 [%r2], 77;",
        SLOT + "  st.shared.b32 [%r2], %t;\n  bar.sync 0;\n  xor.b32 %r3, %r2, 128;\n"
        "  ld.shared.b32 %r4, [%r3];\n  bar.sync 0;\n  st.shared.b32 [%r2], 77;",
        {"threads": 64},
    ),
    "write after several readers": (
        {"race: write after read", "race: read after write"},
        SLOT + "  setp.eq.u32 %p1, %t, 0;\n  @%p1 st.shared.b32 [%r1], 1;\n  bar.sync 0;\n"
        "  ld.shared.b32 %r4, [%r1];\n  setp.eq.u32 %p1, %t, 96;\n"
        "  @%p1 st.shared.b32 [%r1], 2;",
        SLOT + "  setp.eq.u32 %p1, %t, 0;\n  @%p1 st.shared.b32 [%r1], 1;\n  bar.sync 0;\n"
        "  ld.shared.b32 %r4, [%r1];\n  bar.sync 0;\n  setp.eq.u32 %p1, %t, 96;\n"
        "  @%p1 st.shared.b32 [%r1], 2;",
        {"threads": 128},
    ),
    "write after write of two warps": (
        {"race: write after write"},
        SLOT + "  and.b32 %r3, %r2, 127;\n  add.u32 %r3, %r3, %r1;\n  and.b32 %r3, %r3, -128;\n"
        "  st.shared.b32 [%r1], %warp;",
        SLOT + "  setp.eq.u32 %p1, %warp, 0;\n  @%p1 st.shared.b32 [%r1], %warp;\n"
        "  bar.sync 0;\n  @!%p1 st.shared.b32 [%r1], %warp;",
        {"threads": 64},
    ),
    "lanes of one store": (
        {"write conflict: lanes store different values"},
        "  st.global.b32 [%a0], %lane;",
        "  st.global.b32 [%a0], 3;",
        {},
    ),
    "lanes of one store to shared memory": (
        {"write conflict: lanes store different values"},
        SLOT + "  shr.u32 %r3, %t, 1;\n  shl.b32 %r3, %r3, 2;\n  add.u32 %r3, %r3, %r1;\n  st.shared.b32 [%r3], %t;",
        SLOT + "  shr.u32 %r3, %t, 1;\n  shl.b32 %r4, %r3, 2;\n  add.u32 %r4, %r4, %r1;\n  st.shared.b32 [%r4], %r3;",
        {},
    ),
    "blocks without order": (
        {"race: write after write"},
        WHERE + "  add.u32 %r1, %block, 5;\n  st.global.b32 [%d1], %r1;",
        WHERE + "  mul.wide.u32 %d2, %block, 128;\n  add.u64 %d1, %d1, %d2;\n  st.global.b32 [%d1], %block;",
        {"blocks": 2},
    ),
    "blocks through an atomic without a fence": (
        {"race: read after write"},
        WHERE.replace("%t,", "%block,") + "  st.global.b32 [%d1], 9;\n  atom.global.add.u32 %r1, [%a0+512], 1;\n"
        "  setp.ne.u32 %p1, %r1, 1;\n  @%p1 ret;\n  ld.global.b32 %r2, [%a0];\n"
        "  ld.global.b32 %r2, [%a0+4];",
        WHERE.replace("%t,", "%block,") + "  st.global.b32 [%d1], 9;\n  fence.acq_rel.gpu;\n"
        "  atom.global.add.u32 %r1, [%a0+512], 1;\n  fence.acq_rel.gpu;\n"
        "  setp.ne.u32 %p1, %r1, 1;\n  @%p1 ret;\n  ld.global.b32 %r2, [%a0];\n"
        "  ld.global.b32 %r2, [%a0+4];",
        {"blocks": 2, "threads": 1},
    ),
    "blocks through a release and an acquire": (
        {"race: read after write"},
        WHERE.replace("%t,", "%block,") + "  st.global.b32 [%d1], 9;\n"
        "  atom.relaxed.gpu.global.add.u32 %r1, [%a0+512], 1;\n"
        "  setp.ne.u32 %p1, %r1, 1;\n  @%p1 ret;\n  ld.global.b32 %r2, [%a0];\n"
        "  ld.global.b32 %r2, [%a0+4];",
        WHERE.replace("%t,", "%block,") + "  st.global.b32 [%d1], 9;\n"
        "  atom.acq_rel.gpu.global.add.u32 %r1, [%a0+512], 1;\n"
        "  setp.ne.u32 %p1, %r1, 1;\n  @%p1 ret;\n  ld.global.b32 %r2, [%a0];\n"
        "  ld.global.b32 %r2, [%a0+4];",
        {"blocks": 2, "threads": 1},
    ),
    "plain store beside atomics": (
        {"race: write after write"},
        "  setp.eq.u32 %p1, %warp, 0;\n  @%p1 st.global.b32 [%a0], 4;\n  @!%p1 red.global.add.u32 [%a0], 1;",
        "  setp.eq.u32 %p1, %warp, 0;\n  @%p1 st.global.b32 [%a0], 4;\n  bar.sync 0;\n"
        "  @!%p1 red.global.add.u32 [%a0], 1;",
        {"threads": 64},
    ),
    "non-coherent read of fresh values": (
        {"non-coherent read of what this launch writes"},
        WHERE + "  st.global.b32 [%d1], %t;\n  ld.global.nc.b32 %r1, [%d1];",
        WHERE + "  st.global.b32 [%d1], %t;\n  ld.global.b32 %r1, [%d1];",
        {},
    ),
    "barrier that some lanes never reach": (
        {"deadlock: lanes of a warp wait for others of it"},
        f"  setp.lt.u32 %p1, %lane, 5;\n  @%p1 bra on;\n  bar.warp.sync {FULL};\n"
        f"  bra.uni done;\non:\n  bar.warp.sync {FULL};\ndone:",
        f"  setp.lt.u32 %p1, %lane, 5;\n  @%p1 bra on;\n  add.u32 %r1, %r1, 1;\non:\n  bar.warp.sync {FULL};",
        {},
    ),
    "barrier that one warp leaves out": (
        {"deadlock"},
        "  setp.eq.u32 %p1, %warp, 1;\n  @%p1 bra on;\n  bar.sync 0;\n  bra.uni done;\non:\n  bar.sync 1;\ndone:",
        "  setp.eq.u32 %p1, %warp, 1;\n  @%p1 bra on;\n  add.u32 %r1, %r1, 1;\non:\n  bar.sync 0;",
        {"threads": 64},
    ),
    "barrier with too few threads": (
        {"deadlock"},
        "  setp.eq.u32 %p1, %warp, 1;\n  @%p1 ret;\n  bar.sync 1, 64;",
        "  setp.eq.u32 %p1, %warp, 1;\n  @%p1 bra on;\n  bar.sync 1, 64;\n  ret;\non:\n  bar.arrive 1, 64;",
        {"threads": 64},
    ),
    "polling of what nobody changes": (
        {"endless polling"},
        "again:\n  ld.volatile.global.u32 %r1, [%a0];\n  setp.eq.u32 %p1, %r1, 0;\n  @%p1 bra again;",
        "  setp.eq.u32 %p2, %warp, 1;\n  @%p2 bra set;\nagain:\n"
        "  ld.volatile.global.u32 %r1, [%a0];\n  setp.eq.u32 %p1, %r1, 0;\n"
        "  @%p1 bra again;\n  ret;\nset:\n  st.volatile.global.u32 [%a0], 1;",
        {"threads": 64},
    ),
    "endless loop": (
        {"endless loop: the limit of instructions is reached"},
        "  mov.u32 %r1, 0;\nagain:\n  add.u32 %r1, %r1, 1;\n  setp.ne.u32 %p1, %r1, 0;\n  @%p1 bra again;",
        "  mov.u32 %r1, 0;\nagain:\n  add.u32 %r1, %r1, 1;\n  setp.ne.u32 %p1, %r1, 100;\n  @%p1 bra again;",
        {"options": Options(most_steps=100_000)},
    ),
    "shuffle from a lane that is away": (
        {"shfl reads a lane that does not take part"},
        "  setp.lt.u32 %p1, %lane, 8;\n  @%p1 shfl.sync.idx.b32 %r1, %t, 9, 0x1f, 0xff;",
        "  setp.lt.u32 %p1, %lane, 8;\n  @%p1 shfl.sync.idx.b32 %r1, %t, 7, 0x1f, 0xff;",
        {},
    ),
    "lane outside its member mask": (
        {"lane is not in its own member mask"},
        "  vote.sync.ballot.b32 %r1, %p1, 0xfffffffe;",
        f"  setp.eq.u32 %p1, %t, 0;\n  vote.sync.ballot.b32 %r1, %p1, {FULL};",
        {},
    ),
    "member that has exited": (
        {"member mask names a lane that has exited"},
        f"  setp.eq.u32 %p1, %t, 3;\n  @%p1 ret;\n  bar.warp.sync {FULL};",
        "  setp.eq.u32 %p1, %t, 3;\n  @%p1 ret;\n  bar.warp.sync 0xfffffff7;",
        {},
    ),
    "division by zero": (
        {"integer division by zero"},
        "  div.u32 %r1, 7, %t;",
        "  add.u32 %r2, %t, 1;\n  div.u32 %r1, 7, %r2;",
        {},
    ),
    "uniform branch": (
        {"bra.uni diverges"},
        "  setp.eq.u32 %p1, %t, 3;\n  @%p1 bra.uni on;\non:",
        "  setp.lt.u32 %p1, %t, 64;\n  @%p1 bra.uni on;\non:",
        {},
    ),
    "trap": ({"trap"}, "  trap;", "  setp.gt.u32 %p1, %t, 99;\n  @%p1 trap;", {}),
    "cvta of another space": (
        {"cvta of an address elsewhere"},
        "  cvta.to.shared.u64 %d1, %a0;",
        SLOT + "  cvt.u64.u32 %d1, %r1;\n  cvta.shared.u64 %d1, %d1;\n  cvta.to.shared.u64 %d1, %d1;",
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name):
    found, provokes, _, options = CASES[name]
    assert kinds(provokes, **options) == found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_else_is_found(name, seed):
    _, _, silent, options = CASES[name]
    limit = options.get("options", Options()).most_steps
    ordered = Options(seed=seed, quantum=5 * seed, most_steps=limit)
    assert kinds(silent, **{**options, "options": ordered}) == set()


@pytest.mark.parametrize("seed", range(6))
def test_races_are_found_in_any_order(seed):
    _, provokes, _, options = CASES["warps without a barrier"]
    found = kinds(provokes, **options, options=Options(seed=seed, quantum=seed))
    assert found and all(k.startswith("race") or k == "uninitialised shared read" for k in found)


def test_uninitialised_global_memory():
    """The allocator's pattern: any part of a vector counts, a single byte only where its word is untouched."""
    body = "  ld.global.v2.b32 {%r1, %r2}, [%a0];\n  ld.global.u8 %r3, [%a0+4];"
    x = np.full(8, 0xFFA5, np.uint16)
    poisoned = Options(poisoned=True)
    assert kinds(body, x, options=poisoned) == {"uninitialised global read"}
    x[:2] = 1
    result = execute(body, x, options=poisoned)
    assert [f.text.split()[0] for f in result.findings] == ["ld.global.v2.b32", "ld.global.u8"]
    x[2:4] = 0xA5
    assert kinds(body, x, options=poisoned) == set()
    x[:] = 0xFFA5
    assert kinds(body, x) == set()  # of memory that is not the allocator's nothing is known


def test_a_report_names_both_sides_of_a_race():
    _, provokes, _, options = CASES["warps without a barrier"]
    findings = execute(provokes, np.zeros(1, np.uint32), **options).findings
    (finding,) = (f for f in findings if f.kind == "race: read after write")
    assert finding.text.startswith("ld.shared.b32") and finding.other["text"].startswith("st.shared.b32")
    assert "block (0,0,0) thread 32" in finding.what and finding.count == 32
    assert "the other at" in str(finding)


def test_the_source_line_of_a_report():
    body = ".loc 1 33 5\n  ld.global.b32 %r1, [%a0+4096];"
    text = source(body, 1).replace(".address_size 64", '.address_size 64\n.file 1 "kernels.py"')
    x = np.zeros(4, np.uint32)
    module = Module(text)
    result = module.launch("k", (1,), (1,), x.ctypes.data.to_bytes(8, "little"), [(x.ctypes.data, x.ctypes.data + 16)])
    assert (result.findings[0].file, result.findings[0].line) == ("kernels.py", 33)


def test_which_lane_wins_can_be_turned_round():
    x = np.zeros(1, np.uint32)
    execute("  st.global.b32 [%a0], %lane;", x)
    assert x[0] == 31
    execute("  st.global.b32 [%a0], %lane;", x, options=Options(reversed=True))
    assert x[0] == 0


def test_what_cannot_be_run():
    with pytest.raises(PtxError, match="no such register or symbol: %q"):
        Module(source("  add.u32 %r1, %q, 1;", 0))
    with pytest.raises(PtxError, match="no such label: nowhere"):
        Module(source("  bra nowhere;", 0))
    for line in (
        "wgmma.fence.sync.aligned;",
        "add.cc.u32 %r1, %r2, %r3;",
        "mma.sync.aligned.m16n8k8.row.col.f32 %r1, %r2;",
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%a0], [%r2];",
    ):
        module = Module(source("  " + line, 1))
        assert len(module.entries["k"]["unsupported"]) == 1, line
    module = Module(source("  add.cc.u32 %r1, %r2, %r3;", 0))
    found = module.launch("k", (1,), (32,), b"", []).kinds()
    assert found == {"unsupported: modifier .cc"}
    with pytest.raises(PtxError, match="8 bytes of parameters, got 4"):
        Module(source("", 1)).launch("k", (1,), (32,), bytes(4), [])
