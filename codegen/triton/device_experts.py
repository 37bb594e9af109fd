"""What printed kernels call on the device for the experts of a mixture: which slots are multiplied together, and the
choice of a router's largest scores.

A row has several slots, each with an expert. Of the slots of one expert the first, the one CHOSEN slots behind it, and
so on, multiply their own and those that follow; the programs of all others return at once. So a weight is read once
for CHOSEN slots, the number of programs depends on the number of rows alone, and nothing waits for the host. Which
slots share a tile changes no result: every one is a sum of its own.
"""

# ruff: noqa: PLR0124 (NaN is what differs from itself)

from __future__ import annotations

import triton
import triton.language as tl

CHOSEN = tl.constexpr(16)
"""Slots that are multiplied together: the least that the matrix unit takes."""
LOOKED_AT = tl.constexpr(64)
"""Slots whose experts are looked at in one go."""
REACH = tl.constexpr(4096)
"""Slots are looked for among so many, a multiple of LOOKED_AT, lest looking takes longer than multiplying."""


@triton.jit
def expert_of(
    index: tl.tensor,
    sequences: tl.tensor,
    slot: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NAMED: tl.constexpr,
) -> tl.tensor:
    """The experts that slots chose, -1 for none, and for slots from `count` on; index [rows, WIDTH], of which the first
    SLOTS of a row count. Where NAMED, rows of no sequence (-1), which only fill up a bucket, choose none."""
    row = (slot // SLOTS).to(tl.int64)
    expert = tl.load(index + row * WIDTH + slot % SLOTS, mask=slot < count, other=-1)
    there = (expert >= 0) & (expert < EXPERTS)
    if NAMED:
        there = there & (tl.load(sequences + row, mask=slot < count, other=-1) >= 0)
    return tl.where(there, expert, -1)


@triton.jit
def before(
    expert: tl.tensor,
    index: tl.tensor,
    sequences: tl.tensor,
    slot: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NAMED: tl.constexpr,
) -> tl.tensor:
    """How many slots before this one, within its REACH, chose the same expert."""
    found = slot * 0
    for start in range(slot // REACH * REACH, slot, LOOKED_AT):
        at = start + tl.arange(0, LOOKED_AT)
        same = expert_of(index, sequences, at, count, WIDTH, SLOTS, EXPERTS, NAMED) == expert
        found += tl.sum((same & (at < slot)).to(tl.int32), 0)
    return found


@triton.jit
def together(
    expert: tl.tensor,
    index: tl.tensor,
    sequences: tl.tensor,
    slot: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    NAMED: tl.constexpr,
) -> tl.tensor:
    """[CHOSEN] the slot and those behind it, within its REACH, that chose the same expert, in order; -1 where there are
    no more."""
    lane = tl.arange(0, CHOSEN)
    slots = tl.full([CHOSEN], -1, tl.int32)
    held, start = slot * 0, slot
    end = tl.minimum((slot // REACH + 1) * REACH, count)
    while (start < end) & (held < CHOSEN):
        at = start + tl.arange(0, LOOKED_AT)
        same = (expert_of(index, sequences, at, count, WIDTH, SLOTS, EXPERTS, NAMED) == expert) & (at < end)
        rank = held + tl.cumsum(same.to(tl.int32), 0) - 1
        taken = same[None, :] & (rank[None, :] == lane[:, None])
        slots = tl.maximum(slots, tl.max(tl.where(taken, at[None, :], -1), 1))
        held += tl.sum(same.to(tl.int32), 0)
        start += LOOKED_AT
    return slots


@triton.jit
def largest_few(
    x: tl.tensor, WIDTH: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr, FOUND: tl.constexpr
) -> tl.tensor:
    """[FOUND] int32: where the COUNT largest of WIDTH elements stand, largest first, of equals the first; NaN is as
    large as infinity. LANES and FOUND are powers of two, lanes beyond a size hold anything."""
    lane, place = tl.arange(0, LANES), tl.arange(0, FOUND)
    value = tl.load(x + lane, mask=lane < WIDTH, other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    value = tl.where(value != value, float("inf"), value)
    left = lane < WIDTH
    found = tl.zeros([FOUND], tl.int32)
    for number in range(COUNT):
        most = tl.max(tl.where(left, value, float("-inf")), 0)
        at = tl.min(tl.where(left & (value == most), lane, LANES), 0)
        found = tl.where(place == number, at, found)
        left = left & (lane != at)
    return found
