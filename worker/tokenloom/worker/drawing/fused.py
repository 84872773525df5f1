"""Draws in two Triton kernels: one reads the logits once, the other ends each row.

The race of a row that keeps all its tokens needs nothing but the logits, so it
is run where they are read. A row that top_k, top_p or min_p restrict is surveyed
there, and drawn by a program of its own:

    _survey, a program a chunk of a row
      any row           best logit of the chunk, or best of the race, and its token
      restricted row    mass: sum of exp((logit - best) / temperature)
                        tops: the largest of each group of neighbours
    _finish, a program a row
      any row           the best of the chunks' best
      restricted row    1  a bound below all that is kept, by the tops or the mass
                        2  the groups that reach it: few, unless the distribution is flat
                        3  in these, the smallest logit kept, by bisection
                        4  in these, the race

The bisection looks for the largest logit such that the logits from it upwards
have a number (top_k) or a mass (top_p): both shrink as it grows. It runs over
images of logits, integers of their order, several probes a pass. Sums run over
tiles of a fixed size in a fixed order, so a row's token depends on the row alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenloom.worker.drawing.base import MIN_TEMPERATURE, Drawn, DrawTable

_CHUNK = tl.constexpr(4096)
_GROUP = tl.constexpr(128)
"""At most as many tokens are weighed in vain for each of the likeliest ones."""
_TILE_GROUPS = tl.constexpr(64)
"""What a restricted row's program has in registers at once."""
_PROBES = tl.constexpr(8)
_SURVEY_WARPS = 8
_FINISH_WARPS = 16

_ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits that are zero in each number of the type when it is widened to float32."""

_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_INF = tl.constexpr(float("inf"))
# Of SplitMix64.
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


class FusedDrawing:
    """Triton kernels. Nothing here waits for the device, whatever the tensors hold."""

    name = "triton"

    def draw(
        self, logits: Tensor, table: DrawTable, slots: Tensor, ends: Tensor, *, masked: bool
    ) -> Drawn:
        """Returns a token for each row of contiguous [num_rows, vocab_size] logits."""
        num_rows, vocab_size = logits.shape
        num_chunks = triton.cdiv(vocab_size, _CHUNK.value)
        num_groups = num_chunks * (_CHUNK.value // _GROUP.value)
        bests = torch.empty((num_rows, num_chunks), device=logits.device)
        masses = torch.empty_like(bests)  # each by itself: kernels are compiled by alignment
        best_tokens = torch.empty_like(bests, dtype=torch.int32)
        tops = torch.empty((num_rows, num_groups), dtype=logits.dtype, device=logits.device)
        drawn = Drawn(
            tokens=torch.empty(num_rows, dtype=torch.int32, device=logits.device),
            faulty=torch.empty(num_rows, dtype=torch.bool, device=logits.device),
        )
        row = (logits, table.floats, table.ints, slots, ends, vocab_size)
        survey = (bests, best_tokens, masses, tops)
        _survey[(num_chunks, num_rows)](*row, *survey, MASKED=masked, num_warps=_SURVEY_WARPS)
        _finish[(num_rows,)](
            *row,
            *survey,
            torch.empty_like(tops, dtype=torch.int32),
            drawn.tokens,
            drawn.faulty,
            CHUNKS=triton.next_power_of_2(num_chunks),
            ZERO_BITS=_ZERO_BITS[logits.dtype],
            num_warps=_FINISH_WARPS,
        )
        return drawn


@triton.jit
def _survey(
    logits: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    slots: tl.tensor,
    ends: tl.tensor,
    vocab_size: int,
    bests: tl.tensor,
    best_tokens: tl.tensor,
    masses: tl.tensor,
    tops: tl.tensor,
    MASKED: tl.constexpr,
) -> None:
    """The best of a chunk with a fault in it is inf."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    tokens = chunk * _CHUNK + tl.arange(0, _CHUNK)
    inside = tokens < vocab_size
    x = tl.load(logits + row * vocab_size + tokens, mask=inside, other=-_INF).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    temperature, is_random, is_restricted = _load_temperature(floats, ints, slot)
    score = x
    if is_random and not is_restricted:
        key = _load_key(ints, slot, tl.load(ends + row))
        pairs = chunk * (_CHUNK // 2) + tl.arange(0, _CHUNK // 2)
        score = x / temperature - _log_exponentials(key, pairs)
    healthy = x < _INF if MASKED else tl.abs(x) < _INF
    best, at = tl.max(tl.where(inside & ~healthy, _INF, score), 0, return_indices=True)
    place = row * tl.num_programs(0) + chunk
    tl.store(bests + place, best)
    tl.store(best_tokens + place, chunk * _CHUNK + at)
    if is_restricted:
        base = tl.where(best == -_INF, 0.0, best)
        tl.store(masses + place, tl.sum(_weight(x, base, temperature), 0))
        num_groups: tl.constexpr = _CHUNK // _GROUP
        chunk_tops = tl.max(tl.reshape(x, [num_groups, _GROUP]), 1)
        at_tops = tops + place * num_groups + tl.arange(0, num_groups)
        tl.store(at_tops, chunk_tops.to(tops.dtype.element_ty))


@triton.jit
def _finish(
    logits: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    slots: tl.tensor,
    ends: tl.tensor,
    vocab_size: int,
    bests: tl.tensor,
    best_tokens: tl.tensor,
    masses: tl.tensor,
    tops: tl.tensor,
    groups: tl.tensor,
    drawn: tl.tensor,
    faulty: tl.tensor,
    CHUNKS: tl.constexpr,
    ZERO_BITS: tl.constexpr,
) -> None:
    """`groups` is room for the groups to be looked at."""
    row = tl.program_id(0).to(tl.int64)
    num_chunks = tl.cdiv(vocab_size, _CHUNK)
    chunks = tl.arange(0, CHUNKS)
    is_chunk = chunks < num_chunks
    chunk_bests = tl.load(bests + row * num_chunks + chunks, mask=is_chunk, other=-_INF)
    best, at = tl.max(chunk_bests, 0, return_indices=True)
    token = tl.load(best_tokens + row * num_chunks + at)
    slot = tl.load(slots + row).to(tl.int64)
    temperature, _, is_restricted = _load_temperature(floats, ints, slot)
    is_faulty = best == _INF
    if is_restricted and not is_faulty:
        top_p = tl.load(floats + slot * 3 + 1)
        min_p = tl.load(floats + slot * 3 + 2)
        top_k = tl.load(ints + slot * 3)
        chunk_masses = tl.load(masses + row * num_chunks + chunks, mask=is_chunk, other=0.0)
        mass = tl.sum(chunk_masses * _weight(chunk_bests, best, temperature), 0)

        # 1  a bound
        chunk_groups: tl.constexpr = _CHUNK // _GROUP
        num_all = num_chunks * chunk_groups
        every = tl.arange(0, CHUNKS * chunk_groups)
        group_tops = tl.load(tops + row * num_all + every, mask=every < num_all, other=-_INF)
        images = _image(group_tops.to(tl.float32), ZERO_BITS)
        high = _image(best, ZERO_BITS).to(tl.int64) + 1
        if top_k > 0:
            # There are top_k groups that reach it, so there are as many logits.
            low = _bisect_tops(top_k, images, high, ZERO_BITS)
        else:
            # What weighs less is, all together, too little to be kept; half is for rounding.
            floor = tl.maximum(min_p, (1 - top_p) * mass / vocab_size) / 2
            low = _image(best + temperature * tl.log(floor), ZERO_BITS).to(tl.int64) - 1

        # 2  the groups
        reach = (images >= low) & (every < num_all)
        groups += row * num_all
        tl.store(groups + tl.cumsum(reach.to(tl.int32), 0) - 1, every, mask=reach)
        num_groups = tl.sum(reach.to(tl.int32), 0)
        tl.debug_barrier()

        # 3  the smallest logit kept
        source = (logits + row * vocab_size, vocab_size, groups, num_groups, best, temperature)
        if top_k > 0:
            low = _bisect(top_k.to(tl.float32), low, high, source, True, ZERO_BITS)
            mass = tl.max(_weigh(low + tl.zeros([_PROBES], tl.int64), source, False, ZERO_BITS), 0)
        if top_p < 1:
            low = _bisect(top_p * mass, low, high, source, False, ZERO_BITS)

        # 4  the race
        key = _load_key(ints, slot, tl.load(ends + row))
        token = _race(key, low, min_p, source, ZERO_BITS)
    tl.store(drawn + row, tl.where(is_faulty, 0, token))
    tl.store(faulty + row, is_faulty)


@triton.jit
def _load_temperature(
    floats: tl.tensor, ints: tl.tensor, slot: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns a slot's temperature, whether it has one, and whether not all tokens are kept."""
    temperature = tl.load(floats + slot * 3)
    top_p = tl.load(floats + slot * 3 + 1)
    min_p = tl.load(floats + slot * 3 + 2)
    top_k = tl.load(ints + slot * 3)
    is_random = temperature > 0
    is_restricted = is_random & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    return tl.maximum(temperature, _MIN_TEMPERATURE), is_random, is_restricted


@triton.jit
def _mix(values: tl.tensor) -> tl.tensor:
    values = (values ^ (values >> 30)) * _FIRST
    values = (values ^ (values >> 27)) * _SECOND
    return values ^ (values >> 31)


@triton.jit
def _load_key(ints: tl.tensor, slot: tl.tensor, position: tl.tensor) -> tl.tensor:
    """Returns a row's uint64 key."""
    low = tl.load(ints + slot * 3 + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(ints + slot * 3 + 2).to(tl.uint32, bitcast=True).to(tl.uint64)
    return _mix(_mix((high << 32) | low) + position.to(tl.uint64))


@triton.jit
def _log_exponential(bits: tl.tensor) -> tl.tensor:
    """Returns log E by the low halves of uint64 bits."""
    u = (bits.to(tl.uint32).to(tl.float32) + 0.5) * 2.0**-32
    u = tl.minimum(u, 1 - 2.0**-24)
    # E = -log(1 - u), by its series where 1 - u would lose what u says.
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u / 6)))))
    return tl.log(tl.where(u < 0.0625, series, -tl.log(1 - u)))


@triton.jit
def _log_exponentials(key: tl.tensor, pairs: tl.tensor) -> tl.tensor:
    """Returns log E [2 * num_pairs] for the tokens 2 * pair and 2 * pair + 1."""
    bits = _mix(key + (pairs.to(tl.uint64) + 1) * _GOLDEN)
    return tl.interleave(_log_exponential(bits), _log_exponential(bits >> 32))


@triton.jit
def _weight(x: tl.tensor, best: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Returns probabilities as multiples of the likeliest token's."""
    return tl.exp((x - best) / temperature)


@triton.jit
def _image(x: tl.tensor, ZERO_BITS: tl.constexpr) -> tl.tensor:
    """Returns int32 numbers of the same order as x, without gaps between numbers of its type."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> ZERO_BITS


@triton.jit
def _probe(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Returns int64 [PROBES] in low … high, at least one of them between."""
    return low + (high - low) * (tl.arange(0, _PROBES) + 1) // (_PROBES + 1)


@triton.jit
def _narrow(
    low: tl.tensor, high: tl.tensor, probes: tl.tensor, reached: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Returns the part of low … high between probes that reached their target and the others."""
    return (
        tl.max(tl.where(reached, probes, low), 0),
        tl.min(tl.where(reached, high, probes), 0),
    )


@triton.jit
def _bisect_tops(
    target: tl.tensor, images: tl.tensor, high: tl.tensor, ZERO_BITS: tl.constexpr
) -> tl.tensor:
    """Returns the largest image below high that as many of the images reach, or -inf's."""
    low = _image(tl.full([], -_INF, tl.float32), ZERO_BITS).to(tl.int64)
    while high - low > 1:
        probes = _probe(low, high)
        reach = images[None, :] >= probes.to(tl.int32)[:, None]
        low, high = _narrow(low, high, probes, tl.sum(reach.to(tl.int32), 1) >= target)
    return low


@triton.jit
def _bisect(
    target: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    source: tl.tuple,
    COUNT: tl.constexpr,
    ZERO_BITS: tl.constexpr,
) -> tl.tensor:
    """Returns the largest image in low … high - 1 from which upwards the target lies, or low."""
    while high - low > 1:
        probes = _probe(low, high)
        weights = _weigh(probes, source, COUNT, ZERO_BITS)
        low, high = _narrow(low, high, probes, weights >= target)
    return low


@triton.jit
def _weigh(
    probes: tl.tensor, source: tl.tuple, COUNT: tl.constexpr, ZERO_BITS: tl.constexpr
) -> tl.tensor:
    """Returns float32 [PROBES] number or mass of the logits whose images reach each probe."""
    num_groups, best, temperature = source[3], source[4], source[5]
    total = tl.zeros([_PROBES], tl.float32)
    for first in range(0, num_groups, _TILE_GROUPS):
        x = _load_tile(first, source)[0]
        reach = _image(x, ZERO_BITS)[None, :] >= probes.to(tl.int32)[:, None]
        weight = tl.full(x.shape, 1.0, tl.float32) if COUNT else _weight(x, best, temperature)
        total += tl.sum(tl.where(reach, weight[None, :], 0.0), 1)
    return total


@triton.jit
def _race(
    key: tl.tensor, low: tl.tensor, min_p: tl.tensor, source: tl.tuple, ZERO_BITS: tl.constexpr
) -> tl.tensor:
    """Returns the winner among the tokens whose images reach low, and whose weights min_p."""
    groups, num_groups, best, temperature = source[2], source[3], source[4], source[5]
    highest = -_INF
    token = 0
    for first in range(0, num_groups, _TILE_GROUPS):
        x, group = _load_tile(first, source)
        halves: tl.constexpr = _GROUP // 2
        pairs = (group * halves)[:, None] + tl.arange(0, halves)[None, :]
        race = x / temperature - _log_exponentials(key, tl.reshape(pairs, [_TILE_GROUPS * halves]))
        kept = (_image(x, ZERO_BITS) >= low) & (_weight(x, best, temperature) >= min_p)
        tile_highest, at = tl.max(tl.where(kept, race, -_INF), 0, return_indices=True)
        if tile_highest > highest:
            highest = tile_highest
            token = tl.load(groups + first + at // _GROUP) * _GROUP + at % _GROUP
    return token


@triton.jit
def _load_tile(first: int, source: tl.tuple) -> tuple[tl.tensor, tl.tensor]:
    """Returns float32 [TILE_GROUPS * GROUP] logits of groups, and the groups.

    Where there is no token the logit is -inf: it reaches no probe and weighs nothing.
    """
    logits, vocab_size, groups, num_groups = source[0], source[1], source[2], source[3]
    places = first + tl.arange(0, _TILE_GROUPS)
    group = tl.load(groups + places, mask=places < num_groups, other=0)
    tokens = (group * _GROUP)[:, None] + tl.arange(0, _GROUP)[None, :]
    inside = (places < num_groups)[:, None] & (tokens < vocab_size)
    x = tl.load(logits + tokens, mask=inside, other=-_INF).to(tl.float32)
    return tl.reshape(x, [_TILE_GROUPS * _GROUP]), group
