"""Device code shared by all passes: the level table, tiles of rows by positions, and their addresses.

A pass covers all levels of a pyramid in one launch: axis 1 of the grid is the level. The parameters of the levels are
in a small table on the device, filled by `fill_table` from its own arguments: nothing is copied from the host, a
captured graph replays it, and the other kernels have short argument lists (a launch costs the host about 0.2 us per
argument).

A row is one (n, c), row = n*C + c. A tile is [ROWS, POSITIONS] of one tensor. ORDER says along which axis lanes read
neighbouring addresses: 0 positions (NCHW), 1 channels (channels_last). A tensor's MODE has bit 0 set when its stride
along that axis is 1 and bit 1 when h and w collapse into one stride; any other strides are read in place as well, only
slower. VEC elements, a power of two, divide all offsets of a level that is flagged as aligned. `x // VEC * VEC` does
not change such a stride or size, and tells the compiler so. UNIT_VEC does the same for the statistics of the
neighbouring channels of a channels_last tile.
"""

import triton
import triton.language as tl

# Fields of a level in the table; the strides (n, c, h, w) of student, teacher and gradient follow from STRIDES on.
STUDENT, TEACHER, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
N_FIELD, C_FIELD, H_FIELD, W_FIELD = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
ROW0, CHANNEL0, PART0, ALIGNED = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)
STRIDES = tl.constexpr(12)
LEVEL_FIELDS = tl.constexpr(24)
FIELDS_PER_LEVEL = 24
LEVELS_PER_FILL = 4
_HALF = tl.constexpr(32)  # two numbers are packed into one argument

_FILL_ARGUMENTS = [f"{name}{i}" for i in range(LEVELS_PER_FILL) for name in ("s", "t", "g", "nc", "hw", "rk", "part")]


@triton.jit
def _fill_strides(out, channels_last, C, H, W):
    one = tl.full((), 1, tl.int64)
    tl.store(out, C * H * W)
    tl.store(out + 1, tl.where(channels_last, one, H * W))
    tl.store(out + 2, tl.where(channels_last, W * C, W))
    tl.store(out + 3, tl.where(channels_last, C, one))


@triton.jit
def _fill_level(table, level, levels, s, t, g, nc, hw, rk, part):
    if level < levels:
        out = table + level * LEVEL_FIELDS
        nc, hw, rk, part = nc.to(tl.int64), hw.to(tl.int64), rk.to(tl.int64), part.to(tl.int64)
        N, H, row0 = nc >> _HALF, hw >> _HALF, rk >> _HALF
        C, W, channel0 = nc - (N << _HALF), hw - (H << _HALF), rk - (row0 << _HALF)
        tl.store(out + STUDENT, s.to(tl.int64))
        tl.store(out + TEACHER, t.to(tl.int64))
        tl.store(out + GRADIENT, g.to(tl.int64))
        tl.store(out + N_FIELD, N)
        tl.store(out + C_FIELD, C)
        tl.store(out + H_FIELD, H)
        tl.store(out + W_FIELD, W)
        tl.store(out + ROW0, row0)
        tl.store(out + CHANNEL0, channel0)
        tl.store(out + PART0, part >> 4)
        tl.store(out + ALIGNED, part & 1)
        _fill_strides(out + STRIDES, ((part >> 1) & 1) != 0, C, H, W)
        _fill_strides(out + STRIDES + 4, ((part >> 2) & 1) != 0, C, H, W)
        _fill_strides(out + STRIDES + 8, ((part >> 3) & 1) != 0, C, H, W)


@triton.jit(do_not_specialize=["first", "levels", *_FILL_ARGUMENTS])
def fill_table(
    table, first: tl.int64, levels: tl.int64,
    s0: tl.int64, t0: tl.int64, g0: tl.int64, nc0: tl.int64, hw0: tl.int64, rk0: tl.int64, part0: tl.int64,
    s1: tl.int64, t1: tl.int64, g1: tl.int64, nc1: tl.int64, hw1: tl.int64, rk1: tl.int64, part1: tl.int64,
    s2: tl.int64, t2: tl.int64, g2: tl.int64, nc2: tl.int64, hw2: tl.int64, rk2: tl.int64, part2: tl.int64,
    s3: tl.int64, t3: tl.int64, g3: tl.int64, nc3: tl.int64, hw3: tl.int64, rk3: tl.int64, part3: tl.int64,
):  # fmt: skip
    """Writes up to four levels: addresses, packed sizes and offsets, and the strides of the plain memory formats."""
    _fill_level(table, first, levels, s0, t0, g0, nc0, hw0, rk0, part0)
    _fill_level(table, first + 1, levels, s1, t1, g1, nc1, hw1, rk1, part1)
    _fill_level(table, first + 2, levels, s2, t2, g2, nc2, hw2, rk2, part2)
    _fill_level(table, first + 3, levels, s3, t3, g3, nc3, hw3, rk3, part3)


@triton.jit(do_not_specialize=["slot", "n", "c", "h", "w"])
def fill_strides(table, slot: tl.int64, n: tl.int64, c: tl.int64, h: tl.int64, w: tl.int64):
    """Writes the strides of one tensor that is neither plain NCHW nor plain channels_last."""
    out = table + slot
    tl.store(out, n.to(tl.int64))
    tl.store(out + 1, c.to(tl.int64))
    tl.store(out + 2, h.to(tl.int64))
    tl.store(out + 3, w.to(tl.int64))


@triton.jit
def as_double(bits):
    """A double passed as an integer: Triton passes Python floats in single precision."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def exp_scale(k):
    """The factor of x in the argument of `exp_scaled`: exp_scaled(x * exp_scale(k)) is e^(k x)."""
    if k.dtype == tl.float64:
        return k
    else:
        return k * 1.4426950408889634


@triton.jit
def exp_scaled(x):
    # 2^x is one instruction in single precision; in double precision libdevice has e^x.
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def difference(a, x, b, y):
    """a x - b y with both products rounded, so that it is 0 where they are equal; a fused one leaves its error."""
    return tl.fma(a, x, 0.0) - tl.fma(b, y, 0.0)


@triton.jit
def level_sizes(level):
    return (
        tl.load(level + N_FIELD).to(tl.int32),
        tl.load(level + C_FIELD).to(tl.int32),
        tl.load(level + H_FIELD) * tl.load(level + W_FIELD),
    )


@triton.jit
def tile_rows(unit, N, C, P, chunk, ORDER: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr,
              POSITIONS: tl.constexpr):  # fmt: skip
    """Program -> image and channel of its rows, which of them exist, its split and the positions of that split.

    Neighbouring programs read neighbouring memory: splits of a row in NCHW, channels of a position in channels_last.
    A program past the level's last one gets no positions.
    """
    chunk = chunk.to(tl.int64) // POSITIONS * POSITIONS
    splits = tl.cdiv(P, chunk).to(tl.int32)
    lane = tl.arange(0, ROWS)
    if ORDER == 0:
        split = unit % splits
        row = (unit // splits) * ROWS + lane
        n = row // C
        c = row % C
        exists = row < N * C
        inside = (unit // splits) * ROWS < N * C
    else:
        blocks = tl.cdiv(C, ROWS)
        split = (unit // blocks) % splits
        image = unit // blocks // splits
        n = tl.zeros([ROWS], tl.int32) + image
        c = (unit % blocks) * ROWS + lane
        exists = (c < C // VEC * VEC) & (n < N)
        inside = image < N
    start = split * chunk
    stop = tl.where(inside, tl.minimum(start + chunk, P), start)
    return n, c, exists, split, start, stop


@triton.jit
def unit_index(first, c, UNIT_VEC: tl.constexpr):
    """[ROWS, 1] index first + c of a row or channel in the statistics; UNIT_VEC divides first."""
    return tl.expand_dims(first // UNIT_VEC * UNIT_VEC + c, 1)


@triton.jit
def _typed(address, TYPE: tl.constexpr):
    # Spelt out: Triton 3.0 cannot make a pointer type from a dtype that is a parameter.
    if TYPE == tl.float16:
        return address.to(tl.pointer_type(tl.float16))
    elif TYPE == tl.bfloat16:
        return address.to(tl.pointer_type(tl.bfloat16))
    elif TYPE == tl.float32:
        return address.to(tl.pointer_type(tl.float32))
    else:
        return address.to(tl.pointer_type(tl.float64))


@triton.jit
def row_pointers(level, WHICH: tl.constexpr, n, c, TYPE: tl.constexpr, ORDER: tl.constexpr, MODE: tl.constexpr,
                 VEC: tl.constexpr):  # fmt: skip
    """[ROWS, 1] pointers to position 0 of each row."""
    strides = level + STRIDES + 4 * WHICH
    stride_n, stride_c = tl.load(strides), tl.load(strides + 1)
    base = _typed(tl.load(level + WHICH), TYPE)
    if MODE % 2 == 1:
        if ORDER == 0:
            offset = (n * stride_n + c * stride_c) // VEC * VEC
        else:
            offset = n * stride_n // VEC * VEC + c
        bytes_: tl.constexpr = VEC * base.dtype.element_ty.primitive_bitwidth // 8
        rows = base + tl.expand_dims(offset, 1)
        return tl.multiple_of(rows, (bytes_ if bytes_ < 16 else 16, bytes_ if bytes_ < 16 else 16))
    else:
        return base + tl.expand_dims(n * stride_n + c * stride_c, 1)


@triton.jit
def position_strides(level, WHICH: tl.constexpr, ORDER: tl.constexpr, MODE: tl.constexpr, VEC: tl.constexpr):
    strides = level + STRIDES + 4 * WHICH
    stride_h, stride_w = tl.load(strides + 2), tl.load(strides + 3)
    # If W is 1, only h varies, and a collapsed position is h.
    stride_w = tl.where(tl.load(level + W_FIELD) == 1, stride_h, stride_w)
    if ORDER == 1 and MODE % 2 == 1:
        stride_h, stride_w = stride_h // VEC * VEC, stride_w // VEC * VEC
    return stride_h, stride_w


@triton.jit
def _tile_pointers(rows, p0, p, W, stride_h, stride_w, ORDER: tl.constexpr, MODE: tl.constexpr,
                   POSITIONS: tl.constexpr):  # fmt: skip
    """[ROWS, POSITIONS] pointers to positions p = p0.. of each row; the part common to the tile is added first."""
    if ORDER == 0 and MODE == 3:
        return (rows + p0) + tl.expand_dims(tl.arange(0, POSITIONS), 0)
    elif MODE >= 2:
        return rows + tl.expand_dims(p.to(tl.int64) * stride_w, 0)
    else:
        h = p // W.to(p.dtype)
        w = p - h * W.to(p.dtype)
        return rows + tl.expand_dims(h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w, 0)


@triton.jit
def load_tile(rows, p0, p, mask, W, stride_h, stride_w, ORDER: tl.constexpr, MODE: tl.constexpr,
              POSITIONS: tl.constexpr, ACC: tl.constexpr, other):  # fmt: skip
    pointers = _tile_pointers(rows, p0, p, W, stride_h, stride_w, ORDER, MODE, POSITIONS)
    return tl.load(pointers, mask=mask, other=other).to(ACC)


@triton.jit
def store_tile(rows, p0, p, mask, W, stride_h, stride_w, ORDER: tl.constexpr, MODE: tl.constexpr,
               POSITIONS: tl.constexpr, value, TYPE: tl.constexpr):  # fmt: skip
    if TYPE == tl.bfloat16:  # not every architecture converts double precision directly
        value = value.to(tl.float32)
    pointers = _tile_pointers(rows, p0, p, W, stride_h, stride_w, ORDER, MODE, POSITIONS)
    tl.store(pointers, value.to(TYPE), mask=mask)


@triton.jit
def positions(p0, end, ORDER: tl.constexpr, VEC: tl.constexpr, POSITIONS: tl.constexpr):
    """Positions p0.. of a tile and which of them lie before end, in the width of the loop's counter."""
    if ORDER == 0:
        end = end // VEC * VEC
    p = p0 + tl.arange(0, POSITIONS)
    return p, tl.expand_dims(p < end, 0)


@triton.jit
def bounds(start, stop, WIDE: tl.constexpr):
    """The limits of a loop over positions, in the width of its counter."""
    if WIDE:
        return start, stop
    else:
        return start.to(tl.int32), stop.to(tl.int32)


@triton.jit
def lane_counts(start, stop, POSITIONS: tl.constexpr):
    """[1, POSITIONS]: how many positions each lane of a tile has visited after a loop from start to stop."""
    left = stop - start - tl.arange(0, POSITIONS).to(tl.int64)
    return tl.expand_dims(tl.maximum((left + POSITIONS - 1) // POSITIONS, 0), 0)
