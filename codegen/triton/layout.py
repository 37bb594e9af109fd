"""Where the rows of a call stand, computed on their device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def levels_of(rows: int) -> int:
    """Doublings after which every row has seen all rows above it."""
    return max((rows - 1).bit_length(), 1)


def lay_out(sequences: Tensor, parents: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """int32 [N] by name, of rows as in compiler.program.FLAT; rows of sequence -1 are not there.

    slot: the sequence, 0 for rows that are not there. position: in the row's text, -1 for rows that are not there.
    place: where in its slot the row is written. plain: so many tokens of its text stand at the places of their
    positions; those behind them are rows of this call. above [levels, N]: the row 2**level generations above, or the
    first of its path where there are not so many.
    """
    rows = torch.arange(sequences.shape[0], device=sequences.device)
    there, slot = sequences >= 0, sequences.clamp(min=0)
    begins = torch.ones_like(there)
    begins[1:] = sequences[1:] != sequences[:-1]
    start = torch.where(begins, rows, 0).cummax(0).values
    length = lengths[slot]
    place = length + rows - start
    up, depth = torch.where(parents < 0, rows, parents), (parents >= 0).long()
    above = []
    for _ in range(levels_of(len(rows))):
        above.append(up)
        depth = depth + depth[up]
        up = up[up]
    position = length + depth
    # The first position of the path whose token stands elsewhere: from there on nothing is plain.
    bent = torch.where(place == position, position + len(rows) + 1, position)
    for up in above:
        bent = torch.minimum(bent, bent[up])
    found = {
        "slot": slot,
        "position": torch.where(there, position, -1),
        "place": place,
        "plain": torch.minimum(bent, position + 1),
        "above": torch.stack(above),
    }
    return {name: value.to(torch.int32) for name, value in found.items()}
