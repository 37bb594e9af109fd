"""Far tokens of one KV state: pages and their numbers, and what happens when a sequence's cut moves.

Nothing here is read or written while a function runs that is not an input of it; pages change between calls alone, when
a text has reached a trigger, and only tokens that are committed ever get there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.codegen.huge_pages import zeros
from graft.compiler.errors import StateError
from graft.compiler.kv.codecs import PAGE, Content
from graft.compiler.kv.eviction import Cached
from graft.compiler.program import KVState

QUERIED = 64
"""So many of the latest tokens' queries are shown to codecs."""


@dataclass
class Kept:
    """What an eviction policy has to know of a sequence's tokens, far ones first: [layers, kv heads, n]."""

    length: int
    """Tokens of the text at the trigger."""
    positions: Tensor
    scores: Tensor
    valid: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.positions.nbytes + self.scores.nbytes + self.valid.nbytes


class FarTokens:
    """Pages of all slots. `cuts` says where each slot's far tokens end."""

    def __init__(self, state: KVState, device: torch.device) -> None:
        assert state.pages is not None
        self.state, self.layout, self.device = state, state.pages, device
        self.pages = torch.zeros(0, state.page_bytes, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(0, state.label_bytes, dtype=torch.uint8, device=device)
        self.table = torch.zeros(state.layers, 0, state.heads, 1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(state.layers, 0, state.heads, dtype=torch.int32, device=device)
        selection = state.pages.selection
        width = selection.width(state.key_dim) if selection else 0
        self.channels = torch.zeros(state.layers, 0, state.heads, width, dtype=torch.int64, device=device)
        self.cuts: list[int] = []
        self.free: list[int] = []
        """Numbers of pages that nobody has."""
        self.kept: dict[int, Kept] = {}
        """Slot -> what its eviction policy has to know."""

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes allocated, used or not, by what they are for."""
        return {
            "pages": self.pages.nbytes,
            "labels": self.labels.nbytes + self.channels.nbytes,
            "tables": self.table.nbytes + self.counts.nbytes,
            "eviction": sum(one.nbytes for one in self.kept.values()),
        }

    def inputs(self) -> list[Tensor]:
        """What a function reads of it: KVState.far_inputs from the pages on."""
        found = [self.pages, self.table, self.counts]
        return [*found, self.labels, self.channels] if self.layout.selection else found

    def resize(self, slots: int) -> None:
        """Make room for more slots."""
        more = slots - len(self.cuts)
        self.cuts += [0] * more
        for name in ("table", "counts", "channels"):
            old: Tensor = getattr(self, name)
            shape = (old.shape[0], more, *old.shape[2:])
            setattr(self, name, torch.cat([old, old.new_zeros(shape)], dim=1))

    def forget(self, slot: int) -> None:
        """Give back the slot's pages."""
        if self.cuts[slot]:
            self.release(slot)
        self.cuts[slot] = 0
        self.kept.pop(slot, None)

    def release(self, slot: int) -> None:
        """The slot's pages are nobody's."""
        counts, table = self.counts[:, slot], self.table[:, slot]
        used = torch.arange(table.shape[-1], device=self.device) * PAGE < counts[..., None]
        self.free += table[used].tolist()
        counts.zero_()

    def reserve(self, slot: int, length: int) -> None:
        """Make room for what the slot's cut leaves behind at the trigger `length`. Raises StateError if memory runs
        out; then nothing has changed."""
        state, moved = self.state, self.layout.cut(length) - self.cuts[slot]
        if moved <= 0:
            return
        self.widen(-(-int(self.counts[:, slot].max()) // PAGE) + moved // PAGE)
        missing = self.needed(slot, length, moved) - len(self.free)
        if missing <= 0:
            return
        total = len(self.pages) + max(missing, len(self.pages) // 8)
        try:
            grown = [self.grown(self.pages, total), self.grown(self.labels, total)]
        except (RuntimeError, MemoryError) as error:
            raise StateError(
                "no memory for pages of the KV cache",
                expected=f"{total * (state.page_bytes + state.label_bytes)} bytes",
                found=str(error).splitlines()[0],
                where=f"slot {slot}",
                remedy="fewer sequences at once, or a shorter context",
            ) from error
        self.free += range(len(self.pages), total)
        self.pages, self.labels = grown

    def needed(self, slot: int, length: int, moved: int) -> int:
        """Pages that the slot needs at the trigger `length`, where its cut moves by so many tokens, besides those it
        has."""
        heads, layers, eviction = self.state.heads, self.state.layers, self.layout.eviction
        if eviction is None or (eviction.once and self.cuts[slot]):
            return moved // PAGE * heads * layers
        far = int(self.counts[:, slot].max())
        budget = eviction.budget(length, self.layout.cut(length))
        if not self.layout.codec.exact:
            return min(moved, max(0, budget - far)) // PAGE * heads * layers
        # What is kept is written anew, into the pages it had and more.
        each = -(-budget // PAGE) * heads if eviction.heads == "same" else -(-budget * heads // PAGE) + heads
        return each * layers - int((-(-self.counts[:, slot] // PAGE)).sum())

    def grown(self, held: Tensor, count: int) -> Tensor:
        """The pages, and empty ones behind them."""
        new = zeros((count, held.shape[1]), torch.uint8, self.device)
        new[: len(held)] = held
        return new

    def widen(self, pages: int) -> None:
        """Make room in the table for so many pages of a kv head."""
        if pages > self.table.shape[-1]:
            more = max(2 * self.table.shape[-1], pages) - self.table.shape[-1]
            self.table = torch.cat([self.table, self.table.new_zeros(*self.table.shape[:-1], more)], dim=-1)

    def take(self, count: int) -> list[int]:
        """Pages for somebody."""
        assert count <= len(self.free), "reserve() comes first"
        taken, self.free = self.free[len(self.free) - count :], self.free[: len(self.free) - count]
        return taken

    def advance(self, slot: int, tail: Tensor, base: int, length: int) -> None:
        """Move the slot's cut to where it belongs at the trigger `length`.

        `tail` [layers, kv heads, tokens, width] holds the slot's tokens from position `base` on, all committed.
        """
        cut = self.layout.cut(length)
        if cut <= self.cuts[slot]:
            return
        self.reserve(slot, length)
        tail, base = tail[:, :, self.cuts[slot] - base :], self.cuts[slot]
        eviction = self.layout.eviction
        if self.layout.selection and self.layout.selection.calibrates and not self.cuts[slot]:
            self.calibrate(slot, tail)
        if eviction is None or (eviction.once and self.cuts[slot]):
            self.add(slot, tail[:, :, : cut - base], self.latest_queries(tail))
        else:
            self.evict(slot, tail, base, length, cut)
        self.cuts[slot] = cut

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows [..., width]."""
        state = self.state
        return rows[..., : state.key_dim], rows[..., state.key_dim : state.key_dim + state.value_dim]

    def latest_queries(self, tail: Tensor) -> Tensor | None:
        """[layers, kv heads, n, key dim], where queries are kept."""
        state = self.state
        if not state.query_dim:
            return None
        queries = tail[:, :, -QUERIED:, state.key_dim + state.value_dim :]
        return queries.unflatten(-1, (-1, state.key_dim)).flatten(2, 3)

    def calibrate(self, slot: int, tail: Tensor) -> None:
        """Choose the channels that labels are made of (DoubleSparsity)."""
        keys = self.parts(tail)[0].float()
        worth = keys.abs().mean(2) * keys.std(2, correction=0)
        chosen = worth.topk(self.channels.shape[-1], dim=-1).indices
        self.channels[:, slot] = chosen.sort(-1).values

    def add(self, slot: int, rows: Tensor, queries: Tensor | None) -> None:
        """Store whole pages of rows [layers, kv heads, n * 64, width] behind the slot's pages."""
        pages = rows.shape[2] // PAGE
        if not pages:
            return
        first = int(self.counts[0, slot, 0]) // PAGE
        numbers = torch.tensor(self.take(pages * rows.shape[0] * rows.shape[1]), dtype=torch.int32, device=self.device)
        numbers = numbers.view(rows.shape[0], rows.shape[1], pages)
        channels = self.channels[:, slot, :, None, :].expand(*numbers.shape, -1)
        around = queries.unsqueeze(2) if queries is not None else None
        self.write(numbers, rows.unflatten(2, (pages, PAGE)), channels, around)
        self.table[:, slot, :, first : first + pages] = numbers
        self.counts[:, slot] += pages * PAGE

    def write(self, numbers: Tensor, rows: Tensor, channels: Tensor, queries: Tensor | None) -> None:
        """Encode pages of rows [..., 64, width] and their labels under these numbers [...]."""
        keys, values = self.parts(rows)
        places = numbers.long()
        self.pages[places] = self.layout.codec.encode(Content(keys, values, queries))
        selection = self.layout.selection
        if selection is not None:
            labels = selection.labels(keys, channels).to(self.state.dtype)
            self.labels[places] = labels.transpose(-1, -2).contiguous().flatten(-2).view(torch.uint8)

    def evict(self, slot: int, tail: Tensor, base: int, length: int, cut: int) -> None:
        """Score everything, keep what the budget allows in front of the cut, and store it."""
        eviction, codec = self.layout.eviction, self.layout.codec
        assert eviction is not None
        kept, far = self.known(slot, tail, base, length), int(self.counts[:, slot].max())
        newest = kept.positions >= self.cuts[slot]
        candidates = kept.valid & (kept.positions < cut) & (newest | codec.exact)
        budget = eviction.budget(length, cut)
        if not codec.exact:
            budget = max(0, budget - far) // PAGE * PAGE
        stays, rows = torch.zeros_like(candidates), []
        queries, query_positions = self.queries_since(tail, length - kept.length, length)
        kept.length = length
        for layer in range(self.state.layers):
            stored = self.stored(slot, layer, far)
            both = torch.cat([stored, tail[layer, ..., : stored.shape[-1]].float()], dim=1)
            keys, values = self.parts(both)
            cached = Cached(
                keys, values, kept.positions[layer], kept.valid[layer], kept.scores[layer],
                queries[layer], query_positions, self.state.scale,
            )  # fmt: skip
            kept.scores[layer] = eviction.score(cached)
            stays[layer] = eviction.keep(kept.scores[layer], candidates[layer], kept.positions[layer], budget)
            rows.append(both.to(self.state.dtype))
        self.store(slot, torch.stack(rows), stays, self.latest_queries(tail))
        rest = stays | (kept.valid & ((kept.positions >= cut) | ~candidates & (kept.positions < self.cuts[slot])))
        if not eviction.once:
            self.kept[slot] = compacted(kept, rest)

    def known(self, slot: int, tail: Tensor, base: int, length: int) -> Kept:
        """What is known of all tokens in pages and tail; tokens that came since have a score of 0."""
        state, held = self.state, self.kept.get(slot)
        shape = (state.layers, state.heads, length - base)
        positions = torch.arange(base, length, device=self.device).expand(shape)
        if held is None:
            zeros = torch.zeros(shape, device=self.device)
            return Kept(0, positions.clone(), zeros, torch.ones(shape, dtype=torch.bool, device=self.device))
        far = int(self.counts[:, slot].max())
        inside = torch.arange(far, device=self.device) < self.counts[:, slot][..., None]
        front = compacted(held, held.valid & (held.positions < self.cuts[slot]))
        behind = compacted(held, held.valid & (held.positions >= self.cuts[slot]))
        scores = torch.zeros(shape, device=self.device)
        scores[..., : behind.scores.shape[-1]] = behind.scores
        return Kept(
            held.length,
            torch.cat([front.positions[..., :far], positions], dim=-1),
            torch.cat([front.scores[..., :far], scores], dim=-1),
            torch.cat([inside, torch.ones(shape, dtype=torch.bool, device=self.device)], dim=-1),
        )

    def queries_since(self, tail: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
        """[layers, kv heads, group, w, key dim] float, and positions int64 [w]: of the latest `count` tokens."""
        state = self.state
        if not state.query_dim:
            return tail.new_zeros(state.layers, state.heads, 1, 0, state.key_dim), torch.zeros(0, dtype=torch.int64)
        last = tail[:, :, -count:, state.key_dim + state.value_dim :]
        queries = last.unflatten(-1, (-1, state.key_dim)).transpose(2, 3).float()
        return queries, torch.arange(length - last.shape[2], length, device=self.device)

    def stored(self, slot: int, layer: int, count: int) -> Tensor:
        """float [kv heads, count, key dim + value dim] of the slot's far entries in one layer."""
        state, pages = self.state, -(-count // PAGE)
        if not pages:
            return torch.zeros(state.heads, 0, state.key_dim + state.value_dim, device=self.device)
        found = self.pages[self.table[layer, slot, :, :pages].long()]
        both = self.layout.codec.decode(found, state.key_dim, state.value_dim, state.dtype)
        return torch.cat(both, dim=-1).flatten(1, 2)[:, :count].float()

    def store(self, slot: int, rows: Tensor, stays: Tensor, queries: Tensor | None) -> None:
        """Keep of rows float [layers, kv heads, n, width] those that stay: in the place of the slot's pages where
        entries can be moved, else behind them."""
        exact, counts = self.layout.codec.exact, stays.sum(-1)
        if exact:
            self.release(slot)
        most = int(counts.max())
        pages = -(-most // PAGE)
        order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., : pages * PAGE]
        chosen = rows.gather(2, order[..., None].expand(*order.shape, rows.shape[-1])).to(self.state.dtype)
        missing = pages * PAGE - chosen.shape[2]
        if missing:
            chosen = torch.cat([chosen, chosen.new_zeros(*chosen.shape[:2], missing, chosen.shape[-1])], dim=2)
        if not exact:
            self.add(slot, chosen, queries)
            return
        used = torch.arange(pages, device=self.device) * PAGE < counts[..., None]
        numbers = torch.tensor(self.take(int(used.sum())), dtype=torch.int32, device=self.device)
        channels = self.channels[:, slot, :, None, :].expand(*used.shape, -1)
        self.write(numbers, chosen.unflatten(2, (pages, PAGE))[used], channels[used], None)
        self.table[:, slot, :, :pages][used] = numbers
        self.counts[:, slot] = counts.to(torch.int32)


def compacted(kept: Kept, stays: Tensor) -> Kept:
    """Only what stays, each head's in front of the places that others need."""
    most = int(stays.sum(-1).max())
    order = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return Kept(kept.length, *(one.gather(-1, order) for one in (kept.positions, kept.scores, stays)))
