"""Loads, stores, atomics, and what the lanes of a warp do together."""

import numpy as np
import pytest

from .interpreter import Options, checked
from .numbers import bits_of, random_bits
from .snippets import aligned, execute

FULL = "0xffffffff"


def lanes(body, *inputs, count=1, declarations="", threads=32, **options):
    """Runs a snippet that leaves results in %r0 ... ; returns an array for each."""
    outputs = [np.zeros(threads, np.uint32) for _ in range(count)]
    lines = [body, "  mul.wide.u32 %d31, %t, 4;"]
    for i in range(count):
        lines += [f"  add.u64 %d30, %d31, %a{len(inputs) + i};", f"  st.global.u32 [%d30], %r{i};"]
    checked(execute("\n".join(lines), *inputs, *outputs, declarations=declarations, threads=threads, **options))
    return outputs[0] if count == 1 else outputs


def shuffled(mode, b, c, lane, width=32):
    segment = c >> 8 & 31
    clamp, least = c & 31, lane & segment
    most = least | (clamp & ~segment)
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
    inside = j >= most if mode == "up" else j <= most
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("b", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("c", [0x1F, 0x181F, 0x1C1F, 0x1007, 0x0000])
def test_shuffles_and_their_predicates(mode, b, c):
    c = c & ~31 if mode == "up" and c & 31 == 31 else c
    body = (
        f"  mad.lo.u32 %r5, %lane, 7, 3;\n"
        f"  shfl.sync.{mode}.b32 %r0|%p1, %r5, {b}, {c}, {FULL};\n"
        f"  selp.b32 %r1, 1, 0, %p1;"
    )
    value, inside = lanes(body, count=2)
    for lane in range(32):
        source, valid = shuffled(mode, b, c, lane)
        assert value[lane] == 7 * source + 3 and inside[lane] == valid


def test_votes():
    body = f"""  setp.gt.u32 %p1, %lane, 20;
  vote.sync.ballot.b32 %r0, %p1, {FULL};
  vote.sync.ballot.b32 %r1, !%p1, {FULL};
  vote.sync.any.pred %p2, %p1, {FULL};
  vote.sync.all.pred %p3, %p1, {FULL};
  vote.sync.uni.pred %p4, %p1, {FULL};
  selp.b32 %r2, 1, 0, %p2;
  selp.b32 %r3, 1, 0, %p3;
  selp.b32 %r4, 1, 0, %p4;"""
    yes, no, some, every, same = lanes(body, count=5)
    high = sum(1 << i for i in range(21, 32))
    assert (yes == high).all() and (no == (~high & 0xFFFFFFFF)).all()
    assert some.all() and not every.any() and not same.any()


def test_votes_of_some_lanes():
    body = """  mov.u32 %r0, 0;
  and.b32 %r5, %lane, 1;
  setp.eq.u32 %p1, %r5, 1;
  setp.gt.u32 %p2, %lane, 3;
  @%p1 vote.sync.ballot.b32 %r0, %p2, 0xaaaaaaaa;"""
    got = lanes(body)
    assert (got[1::2] == 0xAAAAAAA0).all() and (got[::2] == 0).all()


def test_matches_and_election():
    body = f"""  and.b32 %r5, %lane, 3;
  match.any.sync.b32 %r0, %r5, {FULL};
  match.all.sync.b32 %r1|%p1, %r5, {FULL};
  mov.u32 %r6, 9;
  match.all.sync.b32 %r2|%p2, %r6, {FULL};
  elect.sync %r3|%p3, {FULL};
  selp.b32 %r4, 1, 0, %p3;
  activemask.b32 %r5;"""
    some, none, every, leader, elected, active = lanes(body, count=6)
    assert some.tolist() == [0x11111111 << (i & 3) for i in range(32)]
    assert not none.any() and (every == 0xFFFFFFFF).all()
    assert (leader == 0).all() and elected.tolist() == [1] + [0] * 31 and (active == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    "operation, function",
    [
        ("add", np.add),
        ("and", np.bitwise_and),
        ("or", np.bitwise_or),
        ("xor", np.bitwise_xor),
        ("min", np.minimum),
        ("max", np.maximum),
    ],
)
def test_reductions_of_a_warp(operation, function):
    x = random_bits("f32", 32, 1)
    load = "  mul.wide.u32 %d1, %t, 4;\n  add.u64 %d1, %d1, %a0;\n  ld.global.b32 %r5, [%d1];\n"
    kinds = {"add": ("u32",), "min": ("u32", "s32"), "max": ("u32", "s32")}.get(operation, ("b32",))
    for kind in kinds:
        values = x.view(np.int32) if kind == "s32" else x
        want = np.uint32(function.reduce(values).astype(np.int64) & 0xFFFFFFFF)
        assert (lanes(f"{load}  redux.sync.{operation}.{kind} %r0, %r5, {FULL};", x) == want).all()


def test_reductions_of_floats():
    x = np.float32([*range(-5, 26), np.nan])
    load = "  mul.wide.u32 %d1, %t, 4;\n  add.u64 %d1, %d1, %a0;\n  ld.global.b32 %r5, [%d1];\n"
    body = f"{load}  redux.sync.max.f32 %r0, %r5, {FULL};\n  redux.sync.min.NaN.f32 %r1, %r5, {FULL};"
    most, least = lanes(body, x, count=2)
    assert (most.view(np.float32) == 25).all() and np.isnan(least.view(np.float32)).all()


@pytest.mark.parametrize("vector, kind, size", [("v2", "b32", 4), ("v4", "b32", 4), ("v2", "b64", 8), ("v4", "b16", 2)])
def test_vectors(vector, kind, size):
    n = int(vector[1])
    x = np.random.default_rng(0).integers(0, 255, 32 * n * size, np.uint8)
    out = np.zeros_like(x)
    register = {2: "h", 4: "r", 8: "d"}[size]
    values = "{" + ", ".join(f"%{register}{i}" for i in range(n)) + "}"
    body = f"""  mul.wide.u32 %d30, %t, {n * size};
  add.u64 %d29, %d30, %a0;
  add.u64 %d28, %d30, %a1;
  ld.global.{vector}.{kind} {values}, [%d29];
  st.global.{vector}.{kind} [%d28], {values};"""
    checked(execute(body, x, out))
    assert np.array_equal(x, out)


def test_bytes_and_extension():
    x = np.int8([-1, 5, -128, 127] * 8)
    body = "  cvt.u64.u32 %d1, %t;\n  add.u64 %d1, %d1, %a0;\n  ld.global.s8 %r0, [%d1];\n  ld.global.u8 %r1, [%d1];"
    signed, unsigned = lanes(body, x, count=2)
    assert signed.view(np.int32).tolist() == x.tolist() and unsigned.tolist() == x.view(np.uint8).tolist()


@pytest.mark.parametrize(
    "operation, kind, start, values, want",
    [
        ("add", "u32", 5, np.arange(32), 5 + sum(range(32))),
        ("min", "s32", 3, np.arange(32) - 9, -9 & 0xFFFFFFFF),
        ("max", "u32", 3, np.arange(32), 31),
        ("and", "b32", 0xFFFF, np.arange(32) | 0xF0, 0xF0),
        ("or", "b32", 0, 1 << np.arange(32), 0xFFFFFFFF),
        ("xor", "b32", 0, np.arange(32), 0),
        ("inc", "u32", 0, np.full(32, 4), 32 % 5),
        ("dec", "u32", 2, np.full(32, 4), (2 - 32) % 5),
    ],
)
@pytest.mark.parametrize("opcode", ["atom", "red"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(opcode, operation, kind, start, values, want, space):
    values = (values & 0xFFFFFFFF).astype(np.uint32)
    cell, old = np.array([start], np.uint32), np.zeros(32, np.uint32)
    result = "%r0, " if opcode == "atom" else ""
    where = "%a0" if space == "global" else "cell"
    into = "  ld.global.u32 %r9, [%a0];\n  setp.eq.u32 %p1, %t, 0;\n  @%p1 st.shared.u32 [cell], %r9;\n  bar.sync 0;"
    out = "  bar.sync 0;\n  ld.shared.u32 %r9, [cell];\n  @%p1 st.global.u32 [%a0], %r9;"
    body = f"""  mov.u32 %r0, 0;
  mul.wide.u32 %d1, %t, 4;
  add.u64 %d2, %d1, %a1;
  ld.global.u32 %r1, [%d2];
{into if space == "shared" else ""}
  {opcode}.{space}.{operation}.{kind} {result}[{where}], %r1;
{out if space == "shared" else ""}
  add.u64 %d2, %d1, %a2;
  st.global.u32 [%d2], %r0;"""
    body = f"  .shared .align 4 .u32 cell;\n{body}"
    checked(execute(body, cell, values, old))
    assert cell[0] == want
    if opcode == "atom" and operation == "add":
        assert old.tolist() == [start + sum(range(i)) for i in range(32)]


def test_exchange_and_compare():
    cell, old = np.uint32([7]), np.zeros(32, np.uint32)
    body = (
        "  mul.wide.u32 %d1, %t, 4;\n  add.u64 %d1, %d1, %a1;\n"
        "  atom.global.{0} %r0, [%a0], {1};\n  st.global.u32 [%d1], %r0;"
    )
    checked(execute(body.format("exch.b32", "%t"), cell, old))
    assert cell[0] == 31 and old.tolist() == [7, *range(31)]
    cell[0] = 5
    body = "  add.u32 %r2, %t, 1;\n" + body.format("cas.b32", "%t, %r2")
    checked(execute(body, cell, old))
    assert cell[0] == 32 and old.tolist() == [5] * 6 + [*range(6, 32)]


@pytest.mark.parametrize("name", ["f32", "f64", "f16", "bf16"])
def test_atomic_sums_of_floats(name):
    values = bits_of([float(i % 4) for i in range(32)], name)  # every partial sum is exact
    cell = bits_of([1.0], name)
    register, noftz = {4: "r", 8: "d", 2: "h"}[values.itemsize], ".noftz" if values.itemsize == 2 else ""
    body = f"""  mul.wide.u32 %d30, %t, {values.itemsize};
  add.u64 %d30, %d30, %a1;
  ld.global.b{8 * values.itemsize} %{register}1, [%d30];
  red.global.add{noftz}.{name} [%a0], %{register}1;"""
    checked(execute(body, cell, values))
    assert np.array_equal(cell, bits_of([1.0 + 8 * 6], name))


def test_vector_atomics():
    cell, values = np.float32([1, 2]), np.float32([3, 4])
    body = "  ld.global.v2.b32 {%r1, %r2}, [%a1];\n  red.global.v2.f32.add [%a0], {%r1, %r2};"
    checked(execute(body, cell, values))
    assert cell.tolist() == [1 + 32 * 3, 2 + 32 * 4]


def test_matrix_moves():
    """ldmatrix gives lane l elements (l / 4, 2 (l % 4)) and the next; .trans those of the transpose."""
    x, out = np.arange(256, dtype=np.uint16), np.zeros(256, np.uint16)
    body = """  .shared .align 16 .b8 tile[512];
  mov.u32 %r1, tile;
  shl.b32 %r2, %t, 4;
  cvt.u64.u32 %d1, %r2;
  add.u64 %d2, %d1, %a0;
  ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d2];
  add.u32 %r2, %r1, %r2;
  st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
  bar.warp.sync 0xffffffff;
  ldmatrix.sync.aligned.m8n8.x4{0}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r2];
  bar.warp.sync 0xffffffff;
  stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {{%r10, %r11, %r12, %r13}};
  bar.warp.sync 0xffffffff;
  ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2];
  add.u64 %d2, %d1, %a1;
  st.global.v4.b32 [%d2], {{%r3, %r4, %r5, %r6}};"""
    for transposed in ("", ".trans"):
        checked(execute(body.format(transposed), x, out))
        tiles = x.reshape(4, 8, 8)
        want = tiles.transpose(0, 2, 1) if transposed else tiles
        assert np.array_equal(out.reshape(4, 8, 8), want)


def test_special_registers():
    names = ["%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%laneid", "%warpid", "%lanemask_lt", "%lanemask_ge"]
    body = "\n".join(f"  mov.u32 %r{i}, {name};" for i, name in enumerate(names))
    got = lanes(body, count=len(names), threads=64)
    thread = np.arange(64)
    lane = thread % 32
    below = (1 << lane) - 1
    want = [thread, np.full(64, 64), 0 * thread, 0 * thread + 1, lane, thread // 32, below, ~below & 0xFFFFFFFF]
    for g, w in zip(got, want):
        assert g.tolist() == w.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_divergent_lanes_meet_again(seed):
    """Each lane runs a loop of its own length, then all exchange what they counted."""
    body = f"""  mov.u32 %r1, 0;
again:
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, %lane;
  @%p1 bra again;
  shfl.sync.bfly.b32 %r0, %r1, 1, 0x1f, {FULL};"""
    got = lanes(body, options=Options(seed=seed, quantum=seed * 3))
    assert got.tolist() == [max(1, lane ^ 1) for lane in range(32)]


def test_counters():
    x = aligned(32 * 8, np.uint32)
    body = "  shl.b32 %r1, %t, {0};\n  cvt.u64.u32 %d1, %r1;\n  add.u64 %d1, %d1, %a0;\n  ld.global.b32 %r0, [%d1];"
    for shift, sectors in ((2, 4), (5, 32)):
        result = checked(execute(body.format(shift), x, options=Options(count=True)))
        (load,) = [i for i in result.instructions if "ld.global" in i["text"]]
        assert (load["executed"], load["bytes"], load["sectors"], load["dense_sectors"]) == (1, 128, sectors, 4)
    body = (
        "  .shared .align 4 .b8 s[4096];\n  mov.u32 %r1, s;\n  shl.b32 %r2, %t, {0};\n"
        "  add.u32 %r1, %r1, %r2;\n  st.shared.b32 [%r1], %t;"
    )
    for shift, waves in ((2, 1), (3, 2), (7, 32)):
        result = checked(execute(body.format(shift), x, options=Options(count=True)))
        (store,) = [i for i in result.instructions if "st.shared" in i["text"]]
        assert (store["waves"], store["dense_waves"]) == (waves, 1)
