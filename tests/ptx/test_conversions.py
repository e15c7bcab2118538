"""cvt in every rounding mode, comparisons, selections, and operations on bits."""

import math
from fractions import Fraction

import numpy as np
import pytest

from .numbers import FORMATS, SPECIALS, bits_of, random_bits, round_to, same_bits, value_of
from .snippets import apply

FLOATS = ("f16", "bf16", "f32", "f64")
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def samples(name, count=600, seed=0):
    """Special values, any bits, and numbers around 1 that a narrower format does not hold."""
    near = bits_of(np.random.default_rng(seed).uniform(-4, 4, 200), name)
    return np.concatenate([SPECIALS[name], random_bits(name, count, seed), near]).astype(SPECIALS[name].dtype)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to, of", [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64")])
def test_narrowing(to, of, mode):
    x = samples(of)
    got = apply(f"cvt.{mode}.{to}.{of}", x, result=FORMATS[to].dtype)
    want = []
    for bits in x:
        v = value_of(bits, of)
        want.append(round_to(Fraction(v), to, mode) if v and math.isfinite(v) else v)
    same_bits(got, bits_of(want, to), to)


def test_ties_of_bfloat16_and_half():
    ties = np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)])
    assert [value_of(b, "bf16") for b in apply("cvt.rn.bf16.f32", ties, result=np.uint16)] == [
        1.0,
        1 + 2**-6,
        1 + 2**-7,
        -1.0,
    ]
    ties = np.float32([2049, 2051, 65519, 65520, 2**-25, 2**-24 * 1.5])
    got = [value_of(b, "f16") for b in apply("cvt.rn.f16.f32", ties, result=np.uint16)]
    assert got == [2048, 2052, 65504, math.inf, 0, 2**-23]


@pytest.mark.parametrize("to, of", [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")])
def test_widening(to, of):
    x = samples(of)
    got = apply(f"cvt.{to}.{of}", x, result=FORMATS[to].dtype)
    same_bits(got, bits_of([value_of(b, of) for b in x], to), to)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs_and_their_modifiers(name):
    a, b = samples("f32", seed=1), samples("f32", seed=2)
    packed = apply(f"cvt.rn.{name}x2.f32", a, b, result=np.uint32)
    high, low = (apply(f"cvt.rn.{name}.f32", x, result=np.uint16) for x in (a, b))
    assert np.array_equal(packed, np.uint32(high) << 16 | low)
    x = np.float32([-2, 3, np.nan, 1e38, -1e38])
    relu = apply(f"cvt.rn.relu.{name}.f32", x, result=np.uint16)
    assert value_of(relu[0], name) == 0 and value_of(relu[1], name) == 3 and relu[2] == 0x7FFF
    largest = float((2 - Fraction(2) ** (1 - FORMATS[name].bits)) * Fraction(2) ** FORMATS[name].highest)
    finite = apply(f"cvt.rn.satfinite.{name}.f32", np.float32([np.inf, -np.inf, 1]), result=np.uint16)
    assert [value_of(v, name) for v in finite] == [largest, -largest, 1]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(
    "mode, function", [("rni", None), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)]
)
@pytest.mark.parametrize("bits", [32, 64])
def test_to_integers(name, mode, function, bits):
    """Clamped to the range; NaN gives 0."""
    x = samples(name)
    for kind, dtype in (("s", SIGNED[bits]), ("u", np.dtype(f"uint{bits}").type)):
        got = apply(f"cvt.{mode}.{kind}{bits}.{name}", x, result=dtype)
        limits = np.iinfo(dtype)
        for v, y in zip(x, got):
            v = value_of(v, name)
            if math.isnan(v):
                want = 0
            elif math.isinf(v):
                want = limits.max if v > 0 else limits.min
            else:
                want = min(
                    max(round(Fraction(v)) if function is None else function(Fraction(v)), limits.min), limits.max
                )
            assert int(y) == want, (v, mode)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["f16", "f32", "f64"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_from_integers(kind, name, mode):
    dtype = np.dtype(f"{'int' if kind[0] == 's' else 'uint'}{kind[1:]}").type
    limits = np.iinfo(dtype)
    edge = np.array([0, 1, 2**24 + 1, 2**24 + 3, 2049, limits.max, limits.min, limits.max - 1], dtype)
    x = np.concatenate([edge, random_bits("f64", 300, 3).astype(np.uint64).view(np.int64).astype(dtype)])
    got = apply(f"cvt.{mode}.{name}.{kind}", x, result=FORMATS[name].dtype)
    want = [round_to(Fraction(int(v)), name, mode) if v else 0.0 for v in x]
    same_bits(got, bits_of(want, name), name)


def test_between_integers():
    x = np.int32([-1, 300, -300, 127, 2**31 - 1, -(2**31), 40000])
    assert apply("cvt.s16.s32", x, result=np.int16).tolist() == x.astype(np.int16).tolist()
    assert apply("cvt.sat.s16.s32", x, result=np.int16).tolist() == np.clip(x, -32768, 32767).tolist()
    assert apply("cvt.sat.u16.s32", x, result=np.uint16).tolist() == np.clip(x, 0, 65535).tolist()
    assert apply("cvt.sat.s8.s32", x, result=np.int32).tolist() == np.clip(x, -128, 127).tolist()
    assert apply("cvt.s64.s32", x, result=np.int64).tolist() == x.tolist()
    assert apply("cvt.u64.u32", x.view(np.uint32), result=np.uint64).tolist() == x.view(np.uint32).tolist()
    assert apply("cvt.s32.s8", x, result=np.int32).tolist() == x.astype(np.int8).tolist()
    assert apply("cvt.sat.s32.u64", np.uint64([2**63, 5]), result=np.int32).tolist() == [2**31 - 1, 5]


def test_rounding_to_an_integral_float():
    x = np.float32([0.5, 1.5, -0.5, -1.7, 2.2, np.nan, np.inf])
    for mode, want in (("rni", np.rint(x)), ("rzi", np.trunc(x)), ("rmi", np.floor(x)), ("rpi", np.ceil(x))):
        got = apply(f"cvt.{mode}.f32.f32", x, result=np.float32)
        assert np.array_equal(got, want, equal_nan=True) and np.array_equal(np.signbit(got[:5]), np.signbit(want[:5]))
    assert apply("cvt.sat.f32.f32", x, result=np.float32).tolist() == [0.5, 1, 0, 0, 1, 0, 1]


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b and a == a and b == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def compared(opcode, a, b, tail=""):
    """1 where the first predicate is set, 2 where the second is."""
    size = a.itemsize
    register = {2: "h", 4: "r", 8: "d"}[size]
    line = f"setp.{opcode} %p1|%p2, %{register}1, %{register}2{tail};"
    line += "\n  selp.b32 %r50, 2, 0, %p2;\n  selp.b32 %r0, 1, 0, %p1;\n  or.b32 %r0, %r0, %r50;\n  // @"
    return apply(line, a, b, result=np.uint32)


@pytest.mark.parametrize("name", FLOATS)
def test_comparisons_with_nan(name):
    special = SPECIALS[name]
    a, b = (x.ravel().copy() for x in np.meshgrid(special, special))
    values = [(value_of(x, name), value_of(y, name)) for x, y in zip(a, b)]
    for operator, function in COMPARISONS.items():
        want = [function(x, y) for x, y in values]
        assert compared(f"{operator}.{name}", a, b).tolist() == [1 if w else 2 for w in want]
        loose = [w or x != x or y != y for w, (x, y) in zip(want, values)]
        assert compared(f"{operator}u.{name}", a, b).tolist() == [1 if w else 2 for w in loose]
    unordered = [x != x or y != y for x, y in values]
    assert compared(f"nan.{name}", a, b).tolist() == [1 if u else 2 for u in unordered]
    assert compared(f"num.{name}", a, b).tolist() == [2 if u else 1 for u in unordered]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_comparisons_of_integers(bits):
    for kind in ("s", "u"):
        dtype = np.dtype(f"{'int' if kind == 's' else 'uint'}{bits}").type
        edge = np.array([0, 1, np.iinfo(dtype).max, np.iinfo(dtype).min, np.iinfo(dtype).max - 1], dtype)
        a, b = (x.ravel().copy() for x in np.meshgrid(edge, edge))
        for operator, function in COMPARISONS.items():
            want = [1 if function(x, y) else 2 for x, y in zip(a, b)]
            assert compared(f"{operator}.{kind}{bits}", a, b).tolist() == want
    a, b = np.uint32([1, 2**31]), np.uint32([2, 1])
    assert compared("lo.u32", a, b).tolist() == [1, 2] and compared("hi.u32", a, b).tolist() == [2, 1]


def test_combined_predicates():
    a, b = np.int32([1, 1, 2, 2]), np.int32([1, 2, 1, 2])
    equal = [True, False, False, True]
    for operator, function in (
        ("and", lambda x, y: x and y),
        ("or", lambda x, y: x or y),
        ("xor", lambda x, y: x != y),
    ):
        for negated in ("", "!"):
            body = f"setp.gt.s32 %p3, %r1, 1;\n  setp.eq.{operator}.s32 %p1|%p2, %r1, %r2, {negated}%p3;"
            body += "\n  selp.b32 %r50, 2, 0, %p2;\n  selp.b32 %r0, 1, 0, %p1;\n  or.b32 %r0, %r0, %r50;\n  // @"
            third = [(x > 1) != bool(negated) for x in a]
            want = [function(e, t) + 2 * function(not e, t) for e, t in zip(equal, third)]
            assert apply(body, a, b, result=np.uint32).tolist() == want


def test_set_slct_testp():
    a, b = np.float32([1, 2, np.nan]), np.float32([1, 1, 1])
    assert apply("set.eq.u32.f32", a, b, result=np.uint32).tolist() == [2**32 - 1, 0, 0]
    assert apply("set.gtu.f32.f32", a, b, result=np.float32).tolist() == [0, 1, 1]
    picked = apply("slct.s32.s32", np.int32([1, 1, 1]), np.int32([2, 2, 2]), np.int32([0, -1, 5]), result=np.int32)
    assert picked.tolist() == [1, 2, 1]
    x = np.float32([1, np.inf, np.nan, 2**-130])
    for what, want in (
        ("finite", [1, 0, 0, 1]),
        ("infinite", [0, 1, 0, 0]),
        ("notanumber", [0, 0, 1, 0]),
        ("normal", [1, 0, 0, 0]),
        ("subnormal", [0, 0, 0, 1]),
    ):
        body = f"testp.{what}.f32 %p1, %r1;\n  selp.b32 %r0, 1, 0, %p1;\n  // @"
        assert apply(body, x, result=np.uint32).tolist() == want


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_are_clamped(bits):
    width = np.dtype(f"uint{bits}").type
    x = random_bits({16: "f16", 32: "f32", 64: "f64"}[bits], 60, 1)
    count = np.tile(np.uint32([0, 1, bits - 1, bits, bits + 1, 2**32 - 1]), 10)
    pairs = [(int(v), int(c)) for v, c in zip(x, count)]
    signed = [v - (1 << bits) if v >> (bits - 1) else v for v, _ in pairs]
    got = apply(f"shl.b{bits}", x, count, result=width)
    assert [int(v) for v in got] == [(v << min(c, bits)) % (1 << bits) for v, c in pairs]
    got = apply(f"shr.u{bits}", x, count, result=width)
    assert [int(v) for v in got] == [v >> min(c, bits) for v, c in pairs]
    got = apply(f"shr.s{bits}", x, count, result=width)
    assert [int(v) for v in got] == [(s >> min(c, bits)) % (1 << bits) for s, (_, c) in zip(signed, pairs)]


def test_funnel_shifts():
    a, b = random_bits("f32", 40, 1), random_bits("f32", 40, 2)
    count = np.tile(np.uint32([0, 7, 31, 32, 33]), 8)
    for mode, limit in (("wrap", lambda c: c & 31), ("clamp", lambda c: min(c, 32))):
        both = [(int(y) << 32 | int(x), limit(int(c))) for x, y, c in zip(a, b, count)]
        left = apply(f"shf.l.{mode}.b32", a, b, count, result=np.uint32)
        assert left.tolist() == [(v << c) >> 32 & 0xFFFFFFFF for v, c in both]
        right = apply(f"shf.r.{mode}.b32", a, b, count, result=np.uint32)
        assert right.tolist() == [v >> c & 0xFFFFFFFF for v, c in both]


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits):
    dtype = np.dtype(f"uint{bits}").type
    a, b = (random_bits(f"f{bits}", 100, i) for i in (1, 2))
    position = np.tile(np.uint32([0, 5, bits - 1, bits, 200]), 20)
    length = np.repeat(np.uint32([0, 1, 8, bits, 255]), 20)
    rows = [tuple(map(int, row)) for row in zip(a, b, position, length)]
    got = apply(f"bfe.u{bits}", a, position, length, result=dtype)
    assert [int(v) for v in got] == [(x >> p) & ((1 << n) - 1) if p < bits else 0 for x, _, p, n in rows]
    got = apply(f"bfe.s{bits}", a, position, length, result=dtype)
    for (x, _, p, n), y in zip(rows, got):
        signed = x - (1 << bits) if x >> (bits - 1) else x
        field = signed >> p
        if n < bits:
            field &= (1 << n) - 1
            field -= (1 << n) if n and field >> (n - 1) else 0
        assert int(y) == field % (1 << bits), (x, p, n)
    got = apply(f"bfi.b{bits}", a, b, position, length, result=dtype)
    for (x, y, p, n), r in zip(rows, got):
        mask = (((1 << n) - 1) << p) & ((1 << bits) - 1)
        assert int(r) == (y & ~mask) | (x << p & mask)


def test_permutation_of_bytes():
    a, b = random_bits("f32", 64, 1), random_bits("f32", 64, 2)
    selector = random_bits("f16", 64, 3).astype(np.uint32)

    def permuted(x, y, s):
        data = (int(y) << 32 | int(x)).to_bytes(8, "little")
        out = []
        for i in range(4):
            n = s >> 4 * i & 15
            out.append((255 if data[n & 7] & 128 else 0) if n & 8 else data[n & 7])
        return int.from_bytes(bytes(out), "little")

    got = apply("prmt.b32", a, b, selector, result=np.uint32)
    assert got.tolist() == [permuted(x, y, int(s)) for x, y, s in zip(a, b, selector)]
    modes = {
        "f4e": [0x3210, 0x4321, 0x5432, 0x6543],
        "b4e": [0x5670, 0x6701, 0x7012, 0x0123],
        "rc8": [0x0000, 0x1111, 0x2222, 0x3333],
        "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
        "ecr": [0x0000, 0x1110, 0x2210, 0x3210],
        "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
    }
    for mode, table in modes.items():
        got = apply(f"prmt.b32.{mode}", a, b, selector, result=np.uint32)
        assert got.tolist() == [permuted(x, y, table[int(s) & 3]) for x, y, s in zip(a, b, selector)], mode


def test_logic_and_counts():
    a, b, c = (random_bits("f32", 100, i) for i in range(3))
    for table in (0x80, 0xFE, 0x96, 0x1B, 0xE8, 0):
        got = apply("lop3.b32", a, b, c, hex(table), result=np.uint32)
        for x, y, z, r in zip(a, b, c, got):
            bits = [table >> ((int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | int(z) >> i & 1) & 1 for i in range(32)]
            assert int(r) == sum(bit << i for i, bit in enumerate(bits))
    assert np.array_equal(apply("and.b32", a, b, result=np.uint32), a & b)
    assert np.array_equal(apply("or.b32", a, b, result=np.uint32), a | b)
    assert np.array_equal(apply("xor.b32", a, b, result=np.uint32), a ^ b)
    assert np.array_equal(apply("not.b32", a, result=np.uint32), ~a)
    assert apply("cnot.b32", np.uint32([0, 7]), result=np.uint32).tolist() == [1, 0]
    for bits, x in ((32, a), (64, random_bits("f64", 100, 4))):
        zero = np.zeros(1, x.dtype)
        x = np.concatenate([x, zero])
        assert apply(f"popc.b{bits}", x, result=np.uint32).tolist() == [bin(int(v)).count("1") for v in x]
        assert apply(f"clz.b{bits}", x, result=np.uint32).tolist() == [bits - int(v).bit_length() for v in x]
        reverse = [int(f"{int(v):0{bits}b}"[::-1], 2) for v in x]
        assert [int(v) for v in apply(f"brev.b{bits}", x, result=x.dtype)] == reverse
        highest = [int(v).bit_length() - 1 & 0xFFFFFFFF for v in x]
        assert apply(f"bfind.u{bits}", x, result=np.uint32).tolist() == highest
    assert apply("bfind.s32", np.int32([-1, -256, 5]), result=np.uint32).tolist() == [2**32 - 1, 7, 2]
    assert apply("copysign.f32", np.float32([-1, 1]), np.float32([3, -4]), result=np.float32).tolist() == [-3, 4]


def test_vectors_of_registers():
    x = random_bits("f64", 32, 1)
    body = (
        "mov.b64 {%r1, %r2}, %d1;\n  mov.b32 {%h1, %h2}, %r2;\n"
        "  mov.b32 %r3, {%h2, %h1};\n  mov.b64 %d0, {%r3, %r1};\n  // @"
    )
    got = apply(body, x, result=np.uint64)
    for v, y in zip(x, got):
        low, high = int(v) & 0xFFFFFFFF, int(v) >> 32
        assert int(y) == (high >> 16 | (high & 0xFFFF) << 16) | low << 32
