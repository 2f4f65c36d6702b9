"""Sampling on a GPU; see `lorry.kernels.sampling` for what is computed.

Two launches, none of which depends on the rows' parameters:

1. `tiles_kernel`, (tile, row): of each 4096 logits the maximum m, Σ exp((z - m) / T) and Σ exp(z - m); for rows with a
   truncation also the maximum of each 32. The only pass that reads logits from memory: R V elements, its bytes bound.
2. `draw_kernel`, (row): greedy and plain rows find their tile by the stored maxima or sums, and read that one again
   (from L2). Rows with a truncation search thresholds by bisection over the integers that order as floats do, first
   among the 256 blocks of 32 with the largest maxima, at most 8192 values that stay in registers: every value above
   the 256th largest maximum is among them. A draw by falling z is one more such search, for the mass u. Should the
   threshold lie below, the same searches read the whole row, from L2, once for every step: at most 32 (bfloat16: 16)
   for each of top-k, top-p and the draw; that is for flat rows that keep hundreds of tokens, and slow.

Rounding: (z - m) is rounded to float32, so is its product with log2(e)/T, and exp2 is the hardware's. Sums are float32
within a tile, a list or a chunk, in a fixed tree, and float64 over them, as are top_p · mass, u · mass and T ln(min_p).
A sum over fewer values in the same tree is never larger, so that the searches are exact for the sums as rounded, and
equal values share their fate. A row's bits depend on that row alone. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorry.kernels.sampling import SORTED, TINY, Draws, SamplingRows
from lorry.kernels.triton.common import FUSION

TILE = 4096  # logits to a program of the first pass
BLOCK = 32  # logits under one maximum
LISTED = 256  # blocks in the list
CHUNK = 4096  # logits at a time, where the whole row is read

_BLOCK = tl.constexpr(BLOCK)
_SORTED = tl.constexpr(SORTED)
_TINY = tl.constexpr(TINY)
_LOG2E = tl.constexpr(1.4426950408889634)
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _scale(temperature):
    """log2(e) / T; that of T = 1 for greedy rows, which make no use of it."""
    return _LOG2E / tl.where(temperature == 0, 1.0, tl.maximum(temperature, _TINY))


@triton.jit
def _truncated(top_k, top_p, min_p, temperature):
    return ((top_k > 0) | (top_p < 1) | (min_p > 0)) & (temperature != 0)


@triton.jit
def tiles_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, maxima, sums, plain_sums, block_maxima, stride, V, tiles, blocks,
    TILE: tl.constexpr,
):  # fmt: skip
    """maxima, sums, plain_sums: float32 [R, tiles]; block_maxima: float32 [R, blocks]."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tile * (TILE // _BLOCK) + tl.arange(0, TILE // _BLOCK)
    id = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    z = tl.load(logits + row * stride + id, mask=id < V, other=float("-inf")).to(tl.float32)
    block_max = tl.max(z, axis=1)
    tile_max = tl.max(block_max)
    temperature = tl.load(temperatures + row)
    below = z - tl.where(tile_max == float("-inf"), 0.0, tile_max)
    tl.store(maxima + row * tiles + tile, tile_max)
    tl.store(sums + row * tiles + tile, tl.sum(tl.exp2(below * _scale(temperature))))
    tl.store(plain_sums + row * tiles + tile, tl.sum(tl.exp2(below * _LOG2E)))
    if _truncated(tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row), temperature):
        tl.store(block_maxima + row * blocks + block, block_max, mask=block < blocks)


@triton.jit
def _key(z, SHIFT: tl.constexpr):
    """int32 that order as the floats do; SHIFT drops the bits that are 0 in all of them. -0 is 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float of a key."""
    bits = key.to(tl.int32) << SHIFT
    return (bits ^ tl.where(bits < 0, (0x7FFFFFFF >> SHIFT) << SHIFT, 0)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(z, top, scale):
    """exp((z - top) / T); 0 for -inf, which `top` is not."""
    return tl.exp2((z - top) * scale)


@triton.jit
def _chunk(row, start, V, top, scale, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """(ids, keys, weights) [CHUNK] from `start` on; past the vocabulary a key below all others."""
    id = start + tl.arange(0, CHUNK)
    z = tl.load(row + id, mask=id < V, other=float("-inf")).to(tl.float32)
    return id, tl.where(id < V, _key(z, SHIFT), -(2**31)), _weight(z, top, scale)


@triton.jit
def _above(threshold, keys, weights, row, V, top, scale, WHOLE: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    """How many (int32) keys are >= threshold, and their mass (float64): of the list, or of the whole row."""
    if WHOLE:
        count = tl.cast(0, tl.int32)
        mass = tl.cast(0.0, tl.float64)
        for start in range(0, V, CHUNK):
            _ids, key, weight = _chunk(row, start, V, top, scale, CHUNK, SHIFT)
            count += tl.sum((key >= threshold).to(tl.int32))
            mass += tl.sum(tl.where(key >= threshold, weight, 0.0)).to(tl.float64)
        return count, mass
    else:
        return tl.sum((keys >= threshold).to(tl.int32)), tl.sum(tl.where(keys >= threshold, weights, 0.0)).to(
            tl.float64
        )


@triton.jit
def _search(
    low, high, target, keys, weights, row, V, top, scale,
    BY: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest threshold in low .. high - 1 whose count or mass reaches ("mass_over": passes) the target, or low."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        count, mass = _above(middle, keys, weights, row, V, top, scale, WHOLE, CHUNK, SHIFT)
        if BY == "count":
            enough = count >= target
        elif BY == "mass":
            enough = mass >= target
        else:
            enough = mass > target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _nth(hits, ids, nth):
    """The id of hit number `nth`, from 0; _NONE if there are fewer."""
    return tl.min(tl.where(hits & (tl.cumsum(hits.to(tl.int32), 0) == nth + 1), ids, _NONE))


@triton.jit
def _first_above(weights, ids, target):
    """The first id at which the cumulative sum passes the target; if rounding left none, the last that adds; _NONE."""
    cumulative = tl.cumsum(weights.to(tl.float64), 0)
    found = tl.min(tl.where((cumulative > target) & (weights > 0), ids, _NONE))
    last = tl.max(tl.where(weights > 0, ids, -1))
    return tl.where((found == _NONE) & (last >= 0), last, found)


@triton.jit
def _truncated_draw(
    keys, weights, ids, low, row, V, top, scale, total, top_k, top_p, min_p, temperature, u,
    WHOLE: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(token, whether what was at hand sufficed). keys, weights, ids: [C], holding all of the row from key `low` on."""
    top_key = _key(top, SHIFT)
    limit = tl.where((top_k > 0) & (top_k < V), top_k, V)
    at_hand, mass_at_hand = _above(low, keys, weights, row, V, top, scale, WHOLE, CHUNK, SHIFT)
    least = low.to(tl.int64)
    candidates = V
    mass = total
    if limit < V:
        least = _search(low, top_key + 1, limit, keys, weights, row, V, top, scale, "count", WHOLE, CHUNK, SHIFT)
        candidates, mass = _above(least, keys, weights, row, V, top, scale, WHOLE, CHUNK, SHIFT)
    if top_p < 1:
        nucleus = tl.minimum(
            _search(
                low, top_key + 1, top_p * mass, keys, weights, row, V, top, scale, "mass", WHOLE, CHUNK, SHIFT
            ),
            top_key,
        )  # fmt: skip
        least = tl.maximum(least, nucleus)
    likely = low.to(tl.int64)
    if min_p > 0:
        # the least float that is not below max + T ln(min_p), by rounding the difference up and the sum by its key
        bound = tl.maximum(temperature, _TINY).to(tl.float64) * tl.log(min_p)
        likely = _least_likely(low, top, bound, SHIFT)
        least = tl.maximum(least, likely)

    count, mass_left = _above(least, keys, weights, row, V, top, scale, WHOLE, CHUNK, SHIFT)
    falling = (count < _SORTED) & ((top_p >= 1) | (limit == V) | (candidates < _SORTED)) | (V <= _SORTED)
    enough = (
        (at_hand == V)
        | ((limit < V) & (at_hand >= limit))
        | ((limit == V) & (top_p < 1) & (at_hand > 0) & (mass_at_hand >= top_p * mass))
        | ((top_p >= 1) & (likely > low))
    ) & falling
    target = u * mass_left
    token = tl.cast(_NONE, tl.int32)
    if WHOLE | enough:
        if falling:
            drawn = _search(
                least, top_key + 1, target, keys, weights, row, V, top, scale, "mass_over", WHOLE, CHUNK, SHIFT
            )  # fmt: skip
            larger, mass_larger = _above(drawn + 1, keys, weights, row, V, top, scale, WHOLE, CHUNK, SHIFT)
            as_large, _mass = _above(drawn, keys, weights, row, V, top, scale, WHOLE, CHUNK, SHIFT)
            each = tl.maximum(_weight(_value(drawn, SHIFT), top, scale), 1e-38).to(tl.float64)
            nth = tl.minimum((target - mass_larger) / each, (as_large - larger - 1).to(tl.float64))
            nth = tl.maximum(nth, 0.0).to(tl.int32)
            if WHOLE:
                for start in range(0, V, CHUNK):
                    id, key, _weights = _chunk(row, start, V, top, scale, CHUNK, SHIFT)
                    token = tl.minimum(token, _nth(key == drawn, id, nth))
                    nth -= tl.sum((key == drawn).to(tl.int32))
            else:
                token = _nth(keys == drawn, ids, nth)
        elif WHOLE:
            last = tl.cast(0, tl.int32)  # for a target that rounding left beyond all sums
            for start in range(0, V, CHUNK):
                id, key, weight = _chunk(row, start, V, top, scale, CHUNK, SHIFT)
                weight = tl.where(key >= least, weight, 0.0)
                inside = tl.sum(weight).to(tl.float64)
                if (token == _NONE) & (inside > target):
                    token = _first_above(weight, id, target)
                target -= inside
                last = tl.maximum(last, tl.max(tl.where(weight > 0, id, 0)))
            token = tl.where(token == _NONE, last, token)
    return token, enough


@triton.jit
def _least_likely(low, top, bound, SHIFT: tl.constexpr):
    """The least key from `low` on of a z with float32(z - top) >= bound, by bisection."""
    wrong = low.to(tl.int64) - 1
    right = _key(top, SHIFT).to(tl.int64)
    while right - wrong > 1:
        middle = (wrong + right) >> 1
        likely = (_value(middle, SHIFT) - top).to(tl.float64) >= bound
        right = tl.where(likely, middle, right)
        wrong = tl.where(likely, wrong, middle)
    return right


@triton.jit
def _uniform(seed, index, position):
    """float64 in [0, 1), as `sampling.uniforms`."""
    first, second, _, _ = tl.philox(
        seed, position.to(tl.uint32), (position >> 32).to(tl.uint32), index.to(tl.uint32), tl.cast(0, tl.uint32)
    )
    return ((first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)).to(tl.float64) * (2.0**-53)


@triton.jit
def _first_largest(row, tile, top, V, TILE: tl.constexpr):
    """The first id of a tile whose logit is `top`."""
    id = tile * TILE + tl.arange(0, TILE)
    z = tl.load(row + id, mask=id < V, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(z == top, id, _NONE))


@triton.jit
def _inside_tile(row, tile, tile_max, scale, target, V, TILE: tl.constexpr):
    """The first id of a tile at which Σ exp((z - tile_max) / T) passes the target."""
    id = tile * TILE + tl.arange(0, TILE)
    z = tl.load(row + id, mask=id < V, other=float("-inf")).to(tl.float32)
    return _first_above(_weight(z, tile_max, scale), id, target)


@triton.jit
def _list(
    block_maxima, listed, row, V, blocks, top, scale,
    BLOCKS: tl.constexpr, LISTED: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(low, keys, weights, ids): the blocks with the largest maxima, [LISTED * 32], in the order of the ids; no key of
    the row from `low` on is missing. Fewer than LISTED blocks, since equal maxima are taken or left together."""
    block = tl.arange(0, BLOCKS)
    block_max = tl.load(block_maxima + block, mask=block < blocks, other=float("-inf"))
    block_key = tl.where(block < blocks, _key(block_max, SHIFT), -(2**31))
    low = _key(tl.full((), float("-inf"), tl.float32), SHIFT)
    if blocks > LISTED:
        bound = _search(
            low, _key(top, SHIFT) + 1, LISTED, block_key, block_max, row, V, top, scale, "count", False, CHUNK, SHIFT
        )
        low = (bound + 1).to(tl.int32)
    chosen = block_key >= low
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    count = tl.minimum(tl.max(place) + 1, LISTED)
    tl.store(listed + place, block, mask=chosen & (place < LISTED))  # blocks of NaN pass every bound
    tl.debug_barrier()  # the list is read by other threads than wrote it
    which = tl.arange(0, LISTED)
    start = tl.load(listed + which, mask=which < count, other=0)
    id = start[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    inside = (which[:, None] < count) & (id < V)
    z = tl.load(row + id, mask=inside, other=float("-inf")).to(tl.float32)
    keys = tl.reshape(tl.where(inside, _key(z, SHIFT), -(2**31)), (LISTED * _BLOCK,))
    return low, keys, tl.reshape(_weight(z, top, scale), (LISTED * _BLOCK,)), tl.reshape(id, (LISTED * _BLOCK,))


@triton.jit
def draw_kernel(
    tokens, logprobs, logits, raw, temperatures, top_ks, top_ps, min_ps, uniforms, seeds, indices, positions,
    maxima, sums, raw_maxima, raw_sums, block_maxima, listed, stride, raw_stride, V, tiles, blocks,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr, CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """listed: int32 [R, LISTED], scratch; TILES, BLOCKS: powers of two that hold `tiles`, `blocks`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row)
    if uniforms is None:
        u = _uniform(tl.load(seeds + row), tl.load(indices + row), tl.load(positions + row))
    else:
        u = tl.load(uniforms + row)
    scale = _scale(temperature)
    tile = tl.arange(0, TILES)
    tile_max = tl.load(maxima + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    top = tl.max(tile_max)

    token = tl.cast(_NONE, tl.int32)
    if temperature == 0:
        first = tl.minimum(tl.min(tl.where(tile_max == top, tile, _NONE)), tiles - 1)  # NaN equals nothing
        token = _first_largest(logits, first, top, V, TILE)
    else:
        tile_sum = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0) * _weight(tile_max, top, scale)
        cumulative = tl.cumsum(tile_sum.to(tl.float64), 0)
        total = tl.max(cumulative)
        if _truncated(top_k, top_p, min_p, temperature):
            low, keys, weights, ids = _list(
                block_maxima + row * blocks, listed + row * LISTED, logits, V, blocks, top, scale,
                BLOCKS, LISTED, CHUNK, SHIFT,
            )  # fmt: skip
            token, enough = _truncated_draw(
                keys, weights, ids, low, logits, V, top, scale, total, top_k, top_p, min_p, temperature, u,
                False, CHUNK, SHIFT,
            )  # fmt: skip
            if not enough:
                token, enough = _truncated_draw(
                    keys, weights, ids, _key(tl.full((), float("-inf"), tl.float32), SHIFT), logits, V, top, scale,
                    total, top_k, top_p, min_p, temperature, u, True, CHUNK, SHIFT,
                )  # fmt: skip
        else:
            target = u * total
            found = tl.min(tl.where((cumulative > target) & (tile_sum > 0), tile, _NONE))
            found = tl.where(found == _NONE, tl.max(tl.where(tile_sum > 0, tile, 0)), found)
            before = tl.max(tl.where(tile < found, cumulative, 0.0))
            own_max = tl.load(maxima + row * tiles + found)
            unscaled = (target - before) / _weight(own_max, top, scale).to(tl.float64)
            token = _inside_tile(logits, found, own_max, scale, unscaled, V, TILE)

    token = tl.where((top > float("-inf")) & (token < V), token, 0)  # NaN must not become an address
    raw_max = tl.load(raw_maxima + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    raw_sum = tl.load(raw_sums + row * tiles + tile, mask=tile < tiles, other=0.0)
    raw_top = tl.max(raw_max)
    normalizer = tl.log(tl.sum((raw_sum * _weight(raw_max, raw_top, _LOG2E)).to(tl.float64)))
    z = tl.load(raw + row * raw_stride + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, ((z - raw_top).to(tl.float64) - normalizer).to(tl.float32))


def sample(
    logits: Tensor,
    rows: SamplingRows,
    draws: Draws | Tensor,
    raw: Tensor | None = None,
    *,
    tile: int = TILE,
    listed: int = LISTED,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [R] and their log-probabilities float32 [R], as `lorry.kernels.sampling.sample`."""
    count, vocabulary = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count == 0:
        return tokens, logprobs
    raw = logits if raw is None else raw
    tiles, blocks = triton.cdiv(vocabulary, tile), triton.cdiv(vocabulary, BLOCK)
    listed = min(listed, triton.next_power_of_2(blocks))
    block_maxima = torch.empty(count, blocks, dtype=torch.float32, device=logits.device)
    plane = -(-count * tiles // 4) * 4  # aligned for every count of rows: none is compiled for by itself
    tables = []
    for source in (logits,) if raw is logits else (raw, logits):  # logits last: the block maxima that stay are theirs
        statistics = torch.empty(3, plane, dtype=torch.float32, device=logits.device)
        tiles_kernel[tiles, count](
            source, rows.temperature, rows.top_k, rows.top_p, rows.min_p,
            statistics[0], statistics[1], statistics[2], block_maxima,
            source.stride(0), vocabulary, tiles, blocks, TILE=tile, num_warps=4, **FUSION,
        )  # fmt: skip
        tables.append(statistics)
    raws, own = tables[0], tables[-1]
    numbers = (
        (None, draws.seeds, draws.indices, draws.positions) if isinstance(draws, Draws) else (draws, None, None, None)
    )
    draw_kernel[count,](
        tokens, logprobs, logits, raw, rows.temperature, rows.top_k, rows.top_p, rows.min_p,
        *numbers, own[0], own[1], raws[0], raws[2], block_maxima,
        torch.empty(count, listed, dtype=torch.int32, device=logits.device),
        logits.stride(0), raw.stride(0), vocabulary, tiles, blocks,
        TILE=tile, TILES=triton.next_power_of_2(tiles), BLOCKS=triton.next_power_of_2(blocks), LISTED=listed,
        CHUNK=chunk, SHIFT=16 if logits.dtype is torch.bfloat16 else 0, num_warps=8, **FUSION,
    )  # fmt: skip
    return tokens, logprobs
