"""Number formats in exact rational arithmetic: what the interpreter's results are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Format(NamedTuple):
    bits: int  # of precision
    lowest: int  # exponent of the smallest normal number
    highest: int  # exponent of the largest number
    dtype: type  # of the bits


FORMATS = {
    "f16": Format(11, -14, 15, np.uint16),
    "bf16": Format(8, -126, 127, np.uint16),
    "f32": Format(24, -126, 127, np.uint32),
    "f64": Format(53, -1022, 1023, np.uint64),
}
_CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}


def round_to(x: Fraction, name: str, mode: str) -> float:
    """A nonzero fraction rounded to a format: rn, rna (ties away), rz, rm or rp."""
    f = FORMATS[name]
    size, sign = abs(x), 1.0 if x > 0 else -1.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent += size >= Fraction(2) ** (exponent + 1)
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, f.lowest) - (f.bits - 1))
    below = math.floor(x / unit)
    rest = x / unit - below
    if mode == "rn":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1)
    elif mode == "rna":
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0)
    else:
        up = rest > 0 and (mode == "rp" or (mode == "rz" and x < 0))
    y = (below + up) * unit
    most = (2 - Fraction(2) ** (1 - f.bits)) * Fraction(2) ** f.highest
    if abs(y) > most:
        stays = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        return (float(most) if stays else math.inf) * sign
    return abs(float(y)) * sign


def bits_of(values: Iterable[float], name: str) -> np.ndarray:
    """The bits of numbers, rounded to nearest where the format does not hold them; NaN is the canonical one."""
    return np.array([_bits(float(x), name) for x in values], FORMATS[name].dtype)


def _bits(x: float, name: str) -> int:
    f = FORMATS[name]
    if math.isnan(x):
        return _CANONICAL_NAN[name]
    if math.isfinite(x) and x != 0:
        x = round_to(Fraction(x), name, "rn")
    width = 8 * np.dtype(f.dtype).itemsize
    sign = (math.copysign(1, x) < 0) << (width - 1)
    size = abs(x)
    if size == 0:
        return sign
    if math.isinf(size):
        return sign | (2 * f.highest + 1) << (f.bits - 1)
    exponent = math.frexp(size)[1] - 1
    if exponent < f.lowest:
        return sign | int(Fraction(size) / Fraction(2) ** (f.lowest - f.bits + 1))
    fraction = int(Fraction(size) / Fraction(2) ** (exponent - f.bits + 1)) - (1 << (f.bits - 1))
    return sign | (exponent + f.highest) << (f.bits - 1) | fraction


def value_of(bits: int, name: str) -> float:
    """The number that these bits are."""
    f, bits = FORMATS[name], int(bits)
    width = 8 * np.dtype(f.dtype).itemsize
    sign = -1.0 if bits >> (width - 1) else 1.0
    exponent = bits >> (f.bits - 1) & (2 * f.highest + 1)
    fraction = bits & ((1 << (f.bits - 1)) - 1)
    if exponent == 2 * f.highest + 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, f.lowest - f.bits + 1)
    return sign * math.ldexp(fraction + (1 << (f.bits - 1)), exponent - f.highest - f.bits + 1)


def random_bits(name: str, count: int, seed: int) -> np.ndarray:
    """Any bits, so numbers of every size, a few of them infinite or NaN."""
    dtype = FORMATS[name].dtype
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, count, dtype, endpoint=True)


def same_bits(got: np.ndarray, want: np.ndarray, name: str) -> None:
    """Equal in every bit; says which differ first."""
    bad = np.flatnonzero(got != want)
    text = [f"{i}: got {value_of(got[i], name)!r}, want {value_of(want[i], name)!r}" for i in bad[:3]]
    assert bad.size == 0, f"{bad.size} differ; {'; '.join(text)}"


def _specials(name: str) -> np.ndarray:
    f = FORMATS[name]
    smallest, normal = math.ldexp(1, f.lowest - f.bits + 1), math.ldexp(1, f.lowest)
    largest = float((2 - Fraction(2) ** (1 - f.bits)) * Fraction(2) ** f.highest)
    positive = [0.0, smallest, normal - smallest, normal, 0.5, 1.0, 1.5, 3.0, largest, math.inf]
    return bits_of([*positive, *(-x for x in positive), math.nan], name)


#: Zeros, subnormals, ends of the range, infinities and a NaN of each format.
SPECIALS = {name: _specials(name) for name in FORMATS}
