"""Arithmetic of the interpreter against exact rational arithmetic and numpy."""

import math
from fractions import Fraction

import numpy as np
import pytest

from .interpreter import Options
from .numbers import FORMATS, SPECIALS, bits_of, random_bits, round_to, same_bits, value_of
from .snippets import apply

MODES = ("rn", "rz", "rm", "rp")
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def pairs(name, count=400, seed=0):
    """Bits of two operands: random ones of like and unlike size, and all pairs of special values."""
    special = SPECIALS[name]
    a, b = np.meshgrid(special, special)
    random = [random_bits(name, count, seed + i) for i in range(2)]
    near = random[0] ^ np.array(1 << (FORMATS[name].bits - 3), random[0].dtype)
    columns = (a.ravel(), random[0], random[0]), (b.ravel(), random[1], near)
    return tuple(np.concatenate(c)[:1024].astype(special.dtype) for c in columns)


def exact(operation, a, b):
    """The exact result of finite operands as a fraction, or None where IEEE special cases decide."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return None
    x, y = Fraction(a), Fraction(b)
    if operation == "div":
        return x / y if y else None
    return {"add": x + y, "sub": x - y, "mul": x * y}[operation]


def expected(operation, name, a, b, mode):
    result = exact(operation, a, b)
    if result:
        return round_to(result, name, mode)
    with np.errstate(all="ignore"):
        functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
        y = float(functions[operation](np.float64(a), np.float64(b)))
    opposite = operation in ("add", "sub") and result == 0 and mode == "rm"
    if opposite and not (a == 0 and b == 0 and math.copysign(1, y) == 1 and not _cancels(operation, a, b)):
        return -0.0
    return y


def _cancels(operation, a, b):
    b = -b if operation == "sub" else b
    return math.copysign(1, a) != math.copysign(1, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("name", ["f32", "f64"])
def test_rounded_once(operation, name, mode):
    a, b = pairs(name)
    got = apply(f"{operation}.{mode}.{name}", a, b, result=a.dtype)
    want = [expected(operation, name, value_of(x, name), value_of(y, name), mode) for x, y in zip(a, b)]
    same_bits(got, bits_of(want, name), name)


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_precision(operation, name):
    a, b = pairs(name)
    got = apply(f"{operation}.rn.{name}", a, b, result=a.dtype)
    want = [expected(operation, name, value_of(x, name), value_of(y, name), "rn") for x, y in zip(a, b)]
    same_bits(got, bits_of(want, name), name)
    pair = np.uint32(a) | np.uint32(b) << 16
    doubled = apply(f"{operation}.rn.{name}x2", pair, pair[::-1].copy(), result=np.uint32)
    low = apply(f"{operation}.rn.{name}", a, a[::-1].copy(), result=a.dtype)
    high = apply(f"{operation}.rn.{name}", b, b[::-1].copy(), result=a.dtype)
    assert np.array_equal(doubled, np.uint32(low) | np.uint32(high) << 16)


@pytest.mark.parametrize(
    "name, mode", [*((f, m) for f in ("f32", "f64") for m in MODES), ("f16", "rn"), ("bf16", "rn")]
)
def test_fma_rounds_once(name, mode):
    """c is close to -a * b in half of the cases, so that a rounded product would show."""
    a, b = (x[-400:] for x in pairs(name, seed=3))
    products = [value_of(x, name) * value_of(y, name) for x, y in zip(a, b)]
    with np.errstate(all="ignore"):
        near = bits_of([-p if math.isfinite(p) else 1.0 for p in products], name)
    c = np.where(np.arange(a.size) % 2 == 0, near, random_bits(name, a.size, 9)).astype(a.dtype)
    got = apply(f"fma.{mode}.{name}", a, b, c, result=a.dtype)
    for i, (x, y, z) in enumerate(zip(a, b, c)):
        x, y, z = (value_of(v, name) for v in (x, y, z))
        if not all(map(math.isfinite, (x, y, z))):
            continue
        result = Fraction(x) * Fraction(y) + Fraction(z)
        if result:
            same_bits(got[i : i + 1], bits_of([round_to(result, name, mode)], name), name)
        else:
            assert value_of(got[i], name) == 0


def test_packed_singles():
    a, b, c = (random_bits("f64", 200, i) for i in range(3))
    got = apply("fma.rn.f32x2", a, b, c, result=np.uint64)
    for half in (0, 32):
        parts = [np.uint32(x >> np.uint64(half) & np.uint64(0xFFFFFFFF)) for x in (a, b, c, got)]
        one = apply("fma.rn.f32", *parts[:3], result=np.uint32)
        assert np.array_equal(one, parts[3])


def test_subnormals_are_flushed_only_where_told():
    tiny = np.float32([2**-130, -(2**-130), 2**-126, 1.0]).view(np.uint32)
    one = np.float32([1.0] * 4).view(np.uint32)
    kept = apply("mul.rn.f32", tiny, one, result=np.float32)
    flushed = apply("mul.rn.ftz.f32", tiny, one, result=np.float32)
    assert kept.tolist() == [2**-130, -(2**-130), 2**-126, 1.0]
    assert flushed.tolist() == [0.0, -0.0, 2**-126, 1.0] and np.signbit(flushed[1])
    result = apply("mul.rn.ftz.f32", np.float32([2**-100]), np.float32([2**-40]), result=np.float32)
    assert result[0] == 0


def test_saturation():
    x = np.float32([-2, 0.25, 3, np.nan, np.inf])
    zero = np.zeros(5, np.float32)
    assert apply("add.sat.f32", x, zero, result=np.float32).tolist() == [0, 0.25, 1, 0, 1]
    a = np.int32([2**31 - 1, -(2**31), 5])
    assert apply("add.sat.s32", a, np.int32([1, -1, 2]), result=np.int32).tolist() == [2**31 - 1, -(2**31), 7]


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_minimum_and_maximum(name):
    nan, dtype = bits_of([math.nan], name)[0], SPECIALS[name].dtype
    a = bits_of([1.0, -0.0, 0.0, math.nan, 2.0, math.nan, -math.inf], name)
    b = bits_of([2.0, 0.0, -0.0, 3.0, math.nan, math.nan, math.inf], name)
    low = bits_of([1.0, -0.0, -0.0, 3.0, 2.0, math.nan, -math.inf], name)
    high = bits_of([2.0, 0.0, 0.0, 3.0, 2.0, math.nan, math.inf], name)
    assert np.array_equal(apply(f"min.{name}", a, b, result=dtype), low)
    assert np.array_equal(apply(f"max.{name}", a, b, result=dtype), high)
    if name == "f64":
        return
    got = apply(f"min.NaN.{name}", a, b, result=dtype)
    assert (got[3:6] == nan).all() and np.array_equal(np.delete(got, [3, 4, 5]), np.delete(low, [3, 4, 5]))


def test_three_operands():
    a, b, c = (np.float32(x) for x in ([1, 5, np.nan], [2, 4, np.nan], [3, 9, 7]))
    assert apply("max.f32", a, b, c, result=np.float32).tolist() == [3, 9, 7]
    assert np.isnan(apply("min.NaN.f32", a, b, c, result=np.float32)[2])


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_signs(name):
    x = SPECIALS[name]
    sign = x.dtype.type(1 << (8 * x.itemsize - 1))
    assert np.array_equal(apply(f"neg.{name}", x, result=x.dtype), x ^ sign)
    assert np.array_equal(apply(f"abs.{name}", x, result=x.dtype), x & ~sign)


@pytest.mark.parametrize("mode", MODES)
def test_square_root_and_reciprocal(mode):
    for name in ("f32", "f64"):
        x = np.abs(random_bits(name, 200, 5).view({"f32": np.float32, "f64": np.float64}[name]))
        x = x[np.isfinite(x) & (x > 0)].view(SPECIALS[name].dtype)
        inverse = apply(f"rcp.{mode}.{name}", x, result=x.dtype)
        want = bits_of([round_to(1 / Fraction(value_of(v, name)), name, mode) for v in x], name)
        same_bits(inverse, want, name)
        root = apply(f"sqrt.{mode}.{name}", x, result=x.dtype)
        for v, r in zip(x, root):
            v, r = Fraction(value_of(v, name)), Fraction(value_of(r, name))
            _check_root(v, r, name, mode)


def _check_root(x, root, name, mode):
    """The neighbours of a correctly rounded root bracket x."""
    step = Fraction(2) ** (math.frexp(float(root))[1] - FORMATS[name].bits)
    below, above = (root - step / 2) ** 2, (root + step / 2) ** 2
    if mode == "rn":
        assert below <= x <= above
    elif mode == "rp":
        assert (root - step) ** 2 < x <= root**2
    else:
        assert root**2 <= x < (root + step) ** 2


#: Opcode, its exact function, operands, and the largest error: relative, or absolute where it is so documented.
APPROXIMATE = [
    ("rcp.approx.ftz.f32", lambda x: 1 / x, (0.01, 100), 2**-23, True),
    ("sqrt.approx.ftz.f32", np.sqrt, (1e-6, 1e6), 2**-23 + 2**-24, True),
    ("rsqrt.approx.ftz.f32", lambda x: x**-0.5, (1e-6, 1e6), 2**-22.9 + 2**-24, True),
    ("ex2.approx.ftz.f32", np.exp2, (-60, 60), 2 * 2**-23 + 2**-24, True),
    ("lg2.approx.ftz.f32", np.log2, (2, 1e6), 2**-22 + 2**-24, True),
    ("lg2.approx.ftz.f32", np.log2, (0.51, 1.99), 2**-22, False),
    ("sin.approx.f32", np.sin, (-3, 3), 2**-20.5, False),
    ("cos.approx.f32", np.cos, (-3, 3), 2**-20.5, False),
    ("tanh.approx.f32", np.tanh, (-3, 3), 2**-11, True),
]


@pytest.mark.parametrize(
    "opcode, function, bounds, most, relative", APPROXIMATE, ids=[f"{x[0]}-{x[2]}" for x in APPROXIMATE]
)
def test_approximations_within_their_bounds(opcode, function, bounds, most, relative):
    x = np.random.default_rng(0).uniform(*bounds, 1024).astype(np.float32)
    exactly = function(x.astype(np.float64))
    nearest = apply(opcode, x, result=np.float32)
    assert np.array_equal(nearest, exactly.astype(np.float32))
    runs = [apply(opcode, x, result=np.float32, options=Options(perturb=True, seed=s)) for s in (1, 2)]
    for got in runs:
        error = np.abs(got - exactly) / (np.abs(exactly) if relative else 1)
        assert error.max() <= most * 1.0001
        assert error.max() > most / 4  # it does go to the limits
    assert not np.array_equal(*runs)


@pytest.mark.parametrize("opcode", ["div.approx.f32", "div.full.f32"])
def test_approximate_division(opcode):
    generator = np.random.default_rng(1)
    a, b = (generator.uniform(0.1, 1000, 1024).astype(np.float32) for _ in range(2))
    got = apply(opcode, a, b, result=np.float32)
    assert np.array_equal(got, a * (np.float32(1) / b))  # rounded twice, as documented
    exactly = a.astype(np.float64) / b
    perturbed = apply(opcode, a, b, result=np.float32, options=Options(perturb=True, seed=1))
    steps = np.abs(perturbed - exactly) / np.spacing(exactly.astype(np.float32))
    assert 1 < steps.max() <= 2  # in units of the last place
    n = np.float32([41, 47, 3])
    assert apply(opcode, n, n, result=np.float32).tolist() == [np.float32(0.99999994), np.float32(0.99999994), 1]


def test_approximate_division_at_the_ends_of_the_range():
    a, b = np.float32([1.0, 2.0, np.inf, 1.0]), np.float32([2**127, 0.0, 2**127, np.inf])
    got = apply("div.approx.f32", a, b, result=np.float32)
    assert got[:2].tolist() == [0.0, np.inf] and np.isnan(got[2]) and got[3] == 0
    assert apply("div.full.f32", a[:1], b[:1], result=np.float32)[0] == np.float32(2**-127)


def test_exact_points_of_approximations():
    perturbed = Options(perturb=True, seed=3)
    x = np.float32([0.0] * 64)
    assert np.unique(apply("rcp.approx.f32", x + 3, result=np.float32, options=perturbed)).size == 1  # equal operands
    assert (apply("ex2.approx.f32", x, result=np.float32, options=perturbed) == 1).all()
    assert (apply("lg2.approx.f32", x + 1, result=np.float32, options=perturbed) == 0).all()
    got = apply("ex2.approx.ftz.f32", np.float32([-np.inf, np.inf, np.nan, -130]), result=np.float32)
    assert got[:2].tolist() == [0, np.inf] and np.isnan(got[2]) and got[3] == 0


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("kind", ["s", "u"])
def test_integers(kind, bits):
    dtype = np.dtype(f"{'int' if kind == 's' else 'uint'}{bits}").type
    raw = random_bits({16: "f16", 32: "f32", 64: "f64"}[bits], 300, 7).view(dtype)
    edge = np.array([0, 1, np.iinfo(dtype).max, np.iinfo(dtype).min, 3], dtype)
    a, b = np.concatenate([raw, np.repeat(edge, 5)]), np.concatenate([raw[::-1], np.tile(edge, 5)])
    lists = [[int(v) for v in x] for x in (a, b)]
    modulus = 1 << bits

    def check(opcode, function, result=dtype, third=()):
        got = [int(v) % (1 << (8 * np.dtype(result).itemsize)) for v in apply(opcode, a, b, *third, result=result)]
        want = [function(x, y) % (1 << (8 * np.dtype(result).itemsize)) for x, y in zip(*lists)]
        assert got == want, opcode

    name = f"{kind}{bits}"
    check(f"add.{name}", lambda x, y: x + y)
    check(f"sub.{name}", lambda x, y: x - y)
    check(f"mul.lo.{name}", lambda x, y: x * y)
    check(f"mul.hi.{name}", lambda x, y: x * y >> bits)
    check(f"mad.lo.{name}", lambda x, y: x * y + x, third=(a,))
    check(f"mad.hi.{name}", lambda x, y: (x * y >> bits) + x, third=(a,))
    check(f"min.{name}", min)
    check(f"max.{name}", max)
    if bits < 64:
        wide = np.dtype(f"{'int' if kind == 's' else 'uint'}{2 * bits}").type
        check(f"mul.wide.{name}", lambda x, y: x * y, wide)
        check(f"mad.wide.{name}", lambda x, y: x * y + x, wide, (a.astype(wide),))
    nonzero = b != 0
    a, b = a[nonzero], b[nonzero]
    lists = [[int(v) for v in x] for x in (a, b)]
    check(f"div.{name}", lambda x, y: (abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1))
    check(f"rem.{name}", lambda x, y: (abs(x) % abs(y)) * (-1 if x < 0 else 1))
    if kind == "s":
        assert [int(v) % modulus for v in apply(f"abs.{name}", a, result=dtype)] == [abs(x) % modulus for x in lists[0]]
        assert [int(v) % modulus for v in apply(f"neg.{name}", a, result=dtype)] == [-x % modulus for x in lists[0]]


def test_small_products():
    a, b, c = (random_bits("f32", 200, i) for i in range(3))
    low = lambda x: [int(v) & 0xFFFFFF for v in x]  # noqa: E731
    got = apply("mul24.lo.u32", a, b, result=np.uint32)
    assert got.tolist() == [x * y & 0xFFFFFFFF for x, y in zip(low(a), low(b))]
    got = apply("sad.u32", a, b, c, result=np.uint32)
    assert got.tolist() == [(abs(int(x) - int(y)) + int(z)) & 0xFFFFFFFF for x, y, z in zip(a, b, c)]
    got = apply("dp4a.u32.u32", a, b, c, result=np.uint32)
    for x, y, z, r in zip(a, b, c, got):
        total = int(z) + sum((int(x) >> s & 255) * (int(y) >> s & 255) for s in (0, 8, 16, 24))
        assert int(r) == total & 0xFFFFFFFF


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_sums_of_mixed_precision(half):
    a = random_bits(half, 200, 1)
    b = random_bits("f32", 200, 2)
    wide = np.array([value_of(x, half) for x in a], np.float32).view(np.uint32)
    assert np.array_equal(
        apply(f"add.rn.f32.{half}", a, b, result=np.uint32), apply("add.rn.f32", wide, b, result=np.uint32)
    )
    assert np.array_equal(
        apply(f"fma.rn.f32.{half}", a, a, b, result=np.uint32), apply("fma.rn.f32", wide, wide, b, result=np.uint32)
    )
