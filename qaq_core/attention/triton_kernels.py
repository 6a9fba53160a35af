"""Decode attention in Triton's language; `triton.TritonAttention` calls it and says what it is given.

    packed_split   scores and weighted values of some packed tokens, softmax unfinished       (stage one)
    merge          the exact tokens, and what all splits of packed tokens found, made one     (stage two)
    observe        the statistic, from the scores that both left behind

A row's place is its rank among rows of its width. No index is kept for it: a program counts the tags before its
split, at most a block's, and goes on counting tile by tile. Query heads of a group, and the dims of a head, are
padded to powers of two; what pads counts as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(16)  # query heads of a tile: as many as `tl.dot` needs, whatever the model has
NIBBLE = tl.constexpr(16)  # values that a tag's nibble may have; `packing.WIDTHS` has fewer
HALF = tl.constexpr(13)  # index of half precision in `packing.WIDTHS`
MAX = tl.constexpr(1)  # the statistic that is a maximum; the other is a mean square

# What is known of a sequence, each an int64; addresses in bytes, strides in elements.
FIELDS = tl.constexpr(25)
SINKS, EXACT, PACKED, FIRST, START, SPLITS = (tl.constexpr(i) for i in range(6))
KEYS, KEYS_STRIDE, VALUES, VALUES_STRIDE = (tl.constexpr(i) for i in range(6, 10))
TAGS, TAGS_STRIDE, POOLS, BLOCKS = (tl.constexpr(i) for i in range(10, 14))
KEY_META, KEY_SCALE, KEY_OFFSET, KEY_STRIDE = (tl.constexpr(i) for i in range(14, 18))
VALUE_META, VALUE_SCALE, VALUE_OFFSET, VALUE_STRIDE = (tl.constexpr(i) for i in range(18, 22))
SCORES, SEEN, STATISTIC = (tl.constexpr(i) for i in range(22, 25))


@triton.jit
def _places(index, live, held):
    """Ranks [tokens] among rows of equal width, and how many rows of each width [NIBBLE] there are then.

    Args:
        index: widths of a tile's tokens; those that are not `live` do not count.
        held: rows of each width before the tile.
    """
    mine = ((index[:, None] == tl.arange(0, NIBBLE)[None, :]) & live[:, None]).to(tl.int32)
    before = tl.cumsum(mine, 0) - mine + held[None, :]
    return tl.sum(mine * before, 1), held + tl.sum(mine, 0)


@triton.jit
def _rows(
    pool, meta, scale, offset, index, place, live, at, widths, depth, units, levels, scales,
    OCTETS: tl.constexpr, FIRST_OCTETS: tl.constexpr, PARTS: tl.constexpr, BY_META: tl.constexpr,
    HAS_OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Packed rows as numbers, float32 [TILE, 8 * OCTETS].

    Args:
        pool: addresses of the head's first row of each width.
        meta, scale, offset: addresses of meta bytes, or of float32 scales [.., PARTS] and offsets.
        index, place, live: of each token its width, its row's place, and whether there is one.
        at: which of those is a token's.
        widths: bytes of a row of each width. depth: most planes that an octet has at each width.
        units: [OCTETS, 8], the place in a row of each plane of each octet.
        levels: [9, 256] by number of planes and code, a code's missing planes being 0.
        scales: [256, PARTS] by meta byte.
    """
    octet, dim = tl.arange(0, OCTETS), tl.arange(0, 8)
    size = tl.load(widths + index)
    address = tl.load(pool + index, mask=live, other=0) + place.to(tl.int64) * size
    half = live & (index == HALF)
    coded = tl.where(live & (index < HALF), size, 0)
    row = address.to(tl.pointer_type(tl.uint8))
    code = tl.zeros([TILE, OCTETS, 8], tl.int32)
    planes = tl.zeros([TILE, OCTETS], tl.int32)
    for plane in range(tl.max(tl.load(depth + index))):
        unit = tl.load(units + octet * 8 + plane)
        held = unit[None, :] < coded[:, None]
        byte = tl.load(row[:, None] + unit[None, :], mask=held, other=0).to(tl.int32)
        code += (byte[:, :, None] >> dim[None, None, :] & 1) << (7 - plane)
        planes += held.to(tl.int32)
    level = tl.load(levels + planes[:, :, None] * 256 + code)
    whole = (octet[:, None] * 8 + dim[None, :])[None, :, :]
    real = half[:, None, None] & (whole * 2 < tl.load(widths + HALF))
    level += tl.load(address.to(tl.pointer_type(tl.float16))[:, None, None] + whole, mask=real, other=0.0)
    if BY_META:
        code_of_scale = tl.load(meta.to(tl.pointer_type(tl.uint8)) + at, mask=live, other=0).to(tl.int32)
        mine = scales + code_of_scale * PARTS
    else:
        mine = scale.to(tl.pointer_type(tl.float32)) + at * PARTS
    first = tl.load(mine, mask=live, other=0.0)
    other = tl.load(mine + PARTS - 1, mask=live, other=0.0)
    level *= tl.where(octet[None, :] < FIRST_OCTETS, first[:, None], other[:, None])[:, :, None]
    if HAS_OFFSET:
        shift = tl.load(offset.to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)
        level += shift[:, None, None]
    return tl.reshape(level, [TILE, OCTETS * 8])


@triton.jit
def _nothing(DIMS: tl.constexpr):
    """The running softmax of no tokens, see `_fold`."""
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    return peak, tl.zeros([GROUP], tl.float32), tl.zeros([GROUP, DIMS], tl.float32)


@triton.jit
def _fold(scores, values, peak, mass, summed):
    """The running softmax with one more tile: scores [GROUP, tokens], values [tokens, dims].

    `mass` and `summed` are of exp(score - peak); a peak of -inf has seen nothing.
    """
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp(scores - base[:, None])
    keep = tl.exp(peak - base)
    summed = summed * keep[:, None] + tl.dot(weight, values, input_precision="ieee")
    return higher, mass * keep + tl.sum(weight, 1), summed


@triton.jit
def packed_split(
    sequences, query, transformed, mean, angles, widths, depth, units, levels, scales, peaks, masses, sums,
    batch, heads, group, dim, splits, block_tokens, per_block,
    HALF_DIM: tl.constexpr, OCTETS: tl.constexpr, FIRST_OCTETS: tl.constexpr, PARTS: tl.constexpr,
    BY_META: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_MEAN: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (split, head, sequence): SPLIT tokens of a block, TILE at a time.

    Args:
        query, transformed: float32 [heads * group, batch, dim], scaled, plain and as it meets packed keys.
        mean: float32 [batch, heads, dim], the keys' mean before RoPE, if there is one.
        angles: float32 [positions, dim], cosines and sines from position 0.
        depth, units: of keys, then of values; for the others see `_rows`.
        peaks, masses, sums: out, [batch, heads, splits, GROUP] and [.., GROUP, 8 * OCTETS]; see `_fold`.
    """
    split, head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = sequences + number * FIELDS
    packed, sinks = tl.load(one + PACKED).to(tl.int32), tl.load(one + SINKS).to(tl.int32)
    first_seen = tl.load(one + FIRST).to(tl.int32) - sinks
    block = split // per_block
    block_begin = block * block_tokens
    begin = block_begin + (split % per_block) * SPLIT
    end = min(begin + SPLIT, min(block_begin + block_tokens, packed))
    begin = max(begin, first_seen)

    g, d, i = tl.arange(0, GROUP), tl.arange(0, OCTETS * 8), tl.arange(0, HALF_DIM)
    row = ((head * group + g) * batch + number) * dim
    mine = g < group
    asked = tl.load(transformed + row[:, None] + d[None, :], mask=mine[:, None] & (d < dim)[None, :], other=0.0)
    pair, part = mine[:, None] & (i < dim // 2)[None, :], i < dim // 2
    if HAS_MEAN:  # q·RoPE(mean, t) = cosine·cos + sine·sin
        q1 = tl.load(query + row[:, None] + i[None, :], mask=pair, other=0.0)
        q2 = tl.load(query + row[:, None] + dim // 2 + i[None, :], mask=pair, other=0.0)
        m1 = tl.load(mean + (number * heads + head) * dim + i, mask=part, other=0.0)[None, :]
        m2 = tl.load(mean + (number * heads + head) * dim + dim // 2 + i, mask=part, other=0.0)[None, :]
        cosine, sine = q1 * m1 + q2 * m2, q2 * m1 - q1 * m2
        near = angles + tl.arange(0, TILE)[:, None] * dim + i[None, :]
        near_cos = tl.trans(tl.load(near, mask=part[None, :], other=0.0))
        near_sin = tl.trans(tl.load(near + dim // 2, mask=part[None, :], other=0.0))

    tags = tl.load(one + TAGS).to(tl.pointer_type(tl.uint8)) + head * tl.load(one + TAGS_STRIDE)
    held_keys, held_values = tl.zeros([NIBBLE], tl.int32), tl.zeros([NIBBLE], tl.int32)
    for before in range(block_begin, begin, TILE):
        token = before + tl.arange(0, TILE)
        live = (token < begin) & (token < end)
        tag = tl.load(tags + token, mask=live, other=0).to(tl.int32)
        _, held_keys = _places(tag & 15, live, held_keys)
        _, held_values = _places(tag >> 4, live, held_values)

    pools = tl.load(one + POOLS).to(tl.pointer_type(tl.int64))
    pools += (head * tl.load(one + BLOCKS) + block) * 2 * NIBBLE
    at_key, at_value = head * tl.load(one + KEY_STRIDE), head * tl.load(one + VALUE_STRIDE)
    key_meta, key_scale, key_offset = tl.load(one + KEY_META), tl.load(one + KEY_SCALE), tl.load(one + KEY_OFFSET)
    value_meta, value_scale = tl.load(one + VALUE_META), tl.load(one + VALUE_SCALE)
    value_offset = tl.load(one + VALUE_OFFSET)
    length = tl.load(one + EXACT) + packed
    watched = tl.load(one + SEEN) != 0
    scores_out = tl.load(one + SCORES).to(tl.pointer_type(tl.float32)) + (head * group + g)[:, None] * length + sinks
    peak, mass, summed = _nothing(OCTETS * 8)
    for first in range(begin, end, TILE):
        token = first + tl.arange(0, TILE)
        live = token < end
        tag = tl.load(tags + token, mask=live, other=0).to(tl.int32)
        place, held_keys = _places(tag & 15, live, held_keys)
        keys = _rows(
            pools, key_meta, key_scale, key_offset, tag & 15, place, live, at_key + token, widths, depth, units,
            levels, scales, OCTETS, FIRST_OCTETS, PARTS, BY_META, HAS_OFFSET, TILE,
        )  # fmt: skip
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee")
        if HAS_MEAN:
            far = angles + (tl.load(one + START).to(tl.int32) + first) * dim + i
            cos = tl.load(far, mask=part, other=0.0)[None, :]
            sin = tl.load(far + dim // 2, mask=part, other=0.0)[None, :]
            scores += tl.dot(cosine * cos + sine * sin, near_cos, input_precision="ieee")
            scores += tl.dot(sine * cos - cosine * sin, near_sin, input_precision="ieee")
        scores = tl.where(live[None, :], scores, float("-inf"))
        if watched:
            tl.store(scores_out + token[None, :], scores, mask=mine[:, None] & live[None, :])
        place, held_values = _places(tag >> 4, live, held_values)
        values = _rows(
            pools + NIBBLE, value_meta, value_scale, value_offset, tag >> 4, place, live, at_value + token, widths,
            depth + NIBBLE, units + OCTETS * 8, levels, scales, OCTETS, FIRST_OCTETS, PARTS, BY_META, HAS_OFFSET,
            TILE,
        )  # fmt: skip
        peak, mass, summed = _fold(scores, values, peak, mass, summed)
    out = ((number * heads + head) * splits + split) * GROUP + g
    tl.store(peaks + out, peak)
    tl.store(masses + out, mass)
    tl.store(sums + out[:, None] * OCTETS * 8 + d[None, :], summed)


@triton.jit
def merge(
    sequences, query, peaks, masses, sums, out_exact, out_packed, out_mass, norms,
    batch, heads, group, dim, splits,
    OCTETS: tl.constexpr, EXACT_TYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence): the exact tokens, and the splits of the packed ones.

    Args:
        peaks, masses, sums: of the splits.
        out_exact, out_packed: out, [heads * group, batch, dim], weighted values, the packed ones not transformed back.
        out_mass: out, [heads * group, batch], total weight of the packed tokens.
        norms: out, [heads * group, batch, 2]; a weight is exp(score - the first) / the second.
    """
    head, number = tl.program_id(0), tl.program_id(1)
    one = sequences + number * FIELDS
    g, d = tl.arange(0, GROUP), tl.arange(0, OCTETS * 8)
    mine = g < group
    peak, mass, summed = _nothing(OCTETS * 8)
    for split in range(tl.load(one + SPLITS).to(tl.int32)):
        at = ((number * heads + head) * splits + split) * GROUP + g
        its_peak = tl.load(peaks + at)
        higher = tl.maximum(peak, its_peak)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        keep, share = tl.exp(peak - base), tl.exp(its_peak - base)
        mass = mass * keep + tl.load(masses + at) * share
        its_sums = tl.load(sums + at[:, None] * OCTETS * 8 + d[None, :])
        summed = summed * keep[:, None] + its_sums * share[:, None]
        peak = higher

    sinks, exact = tl.load(one + SINKS).to(tl.int32), tl.load(one + EXACT).to(tl.int32)
    packed, first_seen = tl.load(one + PACKED).to(tl.int32), tl.load(one + FIRST).to(tl.int32)
    row, length = (head * group + g) * batch + number, exact + packed
    inside = mine[:, None] & (d < dim)[None, :]
    asked = tl.load(query + row[:, None] * dim + d[None, :], mask=inside, other=0.0)
    keys = tl.load(one + KEYS).to(tl.pointer_type(EXACT_TYPE)) + head * tl.load(one + KEYS_STRIDE)
    values = tl.load(one + VALUES).to(tl.pointer_type(EXACT_TYPE)) + head * tl.load(one + VALUES_STRIDE)
    watched = tl.load(one + SEEN) != 0
    scores_out = tl.load(one + SCORES).to(tl.pointer_type(tl.float32)) + (head * group + g)[:, None] * length
    exact_peak, exact_mass, exact_sums = _nothing(OCTETS * 8)
    for first in range(0, exact, TILE):
        token = first + tl.arange(0, TILE)
        position = tl.where(token < sinks, token, token + packed)
        live = (token < exact) & (position >= first_seen)
        place = token[:, None] * dim + d[None, :]
        there = live[:, None] & (d < dim)[None, :]
        key = tl.load(keys + place, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(live[None, :], tl.dot(asked, tl.trans(key), input_precision="ieee"), float("-inf"))
        if watched:
            tl.store(scores_out + position[None, :], scores, mask=mine[:, None] & live[None, :])
        value = tl.load(values + place, mask=there, other=0.0).to(tl.float32)
        exact_peak, exact_mass, exact_sums = _fold(scores, value, exact_peak, exact_mass, exact_sums)

    top = tl.maximum(peak, exact_peak)
    share, exact_share = tl.exp(peak - top), tl.exp(exact_peak - top)
    total = mass * share + exact_mass * exact_share
    place = row[:, None] * dim + d[None, :]
    tl.store(out_exact + place, exact_sums * (exact_share / total)[:, None], mask=inside)
    tl.store(out_packed + place, summed * (share / total)[:, None], mask=inside)
    tl.store(out_mass + row, mass * share / total, mask=mine)
    tl.store(norms + row * 2, top, mask=mine)
    tl.store(norms + row * 2 + 1, total, mask=mine)


@triton.jit
def observe(sequences, norms, batch, group, TILE: tl.constexpr):
    """Program (tile, head, sequence): the statistic of TILE tokens, where one is asked for."""
    head, number = tl.program_id(1), tl.program_id(2)
    one = sequences + number * FIELDS
    length = tl.load(one + EXACT) + tl.load(one + PACKED)
    position, g = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, GROUP)
    seen = tl.load(one + SEEN).to(tl.pointer_type(tl.float32)) + head * length
    if (tl.load(one + SEEN) != 0) & (tl.program_id(0) * TILE < length):
        row = (head * group + g) * batch + number
        mine = g < group
        peak = tl.load(norms + row * 2, mask=mine, other=0.0)
        total = tl.load(norms + row * 2 + 1, mask=mine, other=1.0)
        scores = tl.load(one + SCORES).to(tl.pointer_type(tl.float32)) + (head * group + g)[:, None] * length
        inside = (position >= tl.load(one + FIRST)) & (position < length)
        score = tl.load(scores + position[None, :], mask=mine[:, None] & inside[None, :], other=float("-inf"))
        p = tl.exp(score - peak[:, None]) / total[:, None]
        if tl.load(one + STATISTIC) == MAX:
            reduction = tl.max(p, 0) + 0.0 * tl.sum(p, 0)  # a NaN shows in the sum
        else:
            reduction = tl.sum(p * p, 0) / group
        tl.store(seen + position, reduction, mask=position < length)
