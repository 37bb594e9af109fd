"""What printed kernels call on the device to choose among far entries (compiler/kv/selection.py).

The scores of all units are kept in memory, as integers in the floats' order, and a search over their bits finds the
least of the best ones, as many as are wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graft.codegen.triton.device import KEYS

LOOKED_AT = tl.constexpr(256)
"""Scores that are counted in one go."""


@triton.jit
def best_units(
    queries: tl.tensor,
    labels: tl.tensor,
    channels: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    scores: tl.tensor,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    KEY: tl.constexpr,
    CHOICE: tl.constexpr,
) -> tl.tensor:
    """Score the units of `count` far entries, the best of the HEADS queries counting; what the score of a chosen unit
    is at least, and how many of those with just that score are chosen.

    CHOICE is the tokens of a unit; the numbers of a label, and lanes for them; whether they are those of `channels`,
    and whether they are bounds; how many units are chosen at least; the share of them that is, times 2^40; and how many
    in front are whatever their labels say.
    """
    SIZE: tl.constexpr = CHOICE[0]
    UNITS: tl.constexpr = KEYS // SIZE
    WIDTH: tl.constexpr = CHOICE[1]
    inner, unit = tl.arange(0, CHOICE[2]), tl.arange(0, UNITS)
    real = inner < WIDTH
    channel = inner % KEY
    if CHOICE[3]:
        channel = tl.load(channels + inner, mask=real, other=0).to(tl.int32)
    for start in range(0, count, KEYS):
        page = labels + tl.load(table + start // KEYS).to(tl.int64) * (WIDTH * UNITS)
        at = page + inner[:, None] * UNITS + unit[None, :]
        label = tl.load(at, mask=tl.broadcast_to(real[:, None], [CHOICE[2], UNITS]), other=0.0).to(tl.float32)
        best = tl.full([UNITS], float("-inf"), tl.float32)
        for head in range(HEADS):
            query = tl.load(queries + head * STRIDE + channel, mask=real, other=0.0).to(tl.float32)
            if CHOICE[4]:
                query = tl.where(inner < KEY, tl.maximum(query, 0.0), tl.minimum(query, 0.0))
            best = tl.maximum(best, tl.sum(query[:, None] * label, 0))
        bits = (best + 0.0).to(tl.int32, bitcast=True)
        number = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        tl.store(scores + start // SIZE + unit, tl.where(start // SIZE + unit < CHOICE[7], 0x7FFFFFFF, number))
    tl.debug_barrier()
    there = (count + SIZE - 1) // SIZE
    share = (((there.to(tl.int64) * CHOICE[6]) >> 20) + 0xFFFFF) >> 20
    wanted = tl.minimum(there, tl.maximum(share.to(tl.int32), CHOICE[5]))
    found = count.to(tl.int64) * 0
    for step in range(32):
        trial = found | (tl.full([], 1, tl.int64) << (31 - step))
        if reaching(scores, there, trial) >= wanted:
            found = trial
    return found, wanted - reaching(scores, there, found + 1)


@triton.jit
def reaching(scores: tl.tensor, there: tl.tensor, least: tl.tensor) -> tl.tensor:
    """How many of so many scores are `least` or more, counted from the smallest float on."""
    total = there * 0
    for start in range(0, there, LOOKED_AT):
        at = start + tl.arange(0, LOOKED_AT)
        score = tl.load(scores + at, mask=at < there, other=0).to(tl.int64) + 2147483648
        total += tl.sum(((at < there) & (score >= least)).to(tl.int32), 0)
    return total


@triton.jit
def chosen(
    scores: tl.tensor, entry: tl.tensor, count: tl.tensor, bar: tl.tensor, ties: tl.tensor, CHOICE: tl.constexpr
) -> tl.tensor:
    """Which of some consecutive entries are read, and how many units of the least score are left to choose."""
    inside = entry < count
    score = tl.load(scores + entry // CHOICE[0], mask=inside, other=0).to(tl.int64) + 2147483648
    equal = inside & (score == bar)
    rank = tl.cumsum((equal & (entry % CHOICE[0] == 0)).to(tl.int32), 0)
    return inside & ((score > bar) | (equal & (rank <= ties))), ties - tl.max(rank, 0)
