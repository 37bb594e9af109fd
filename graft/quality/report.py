"""What was measured, as figures with intervals, as a table, as JSON, and in words."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console

from graft.compiler.notation import bytes_text
from graft.compiler.spec import show
from graft.quality.arms import Candidate
from graft.quality.metrics import Bootstrap, Interval
from graft.report import new_table

WIDTH = 170


@dataclass
class Equal:
    """The references that an arm has to be better than."""

    what: str
    """Bytes of which kind are equal: "allocated", or "read" by a row of an arm that does not take less memory."""
    ratio: float
    """Share of the tokens that the references keep."""
    names: dict[str, str]
    """"recency" and "random" -> the arm."""


@dataclass
class Result:
    """One arm. Arrays are float64 [documents, tokens]."""

    candidate: Candidate
    bytes: Mapping[str, int]
    """Allocated at the end of the context, by what for (KVStore.bytes)."""
    peak: int
    """Allocated at most until then."""
    read: int
    """Bytes that a step of one row behind the context reads of the cache."""
    kl: np.ndarray
    same: np.ndarray
    nll: np.ndarray
    streamed: np.ndarray | None
    """-log p of texts that were compressed on the way; None where that was not measured, or cannot be."""
    passkeys: Mapping[str, list[bool]]
    equal: Equal | None

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.candidate.name

    @property
    def allocated(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Quality:
    """What `measure` returns: results, the full cache's first."""

    results: tuple[Result, ...]
    context: int
    resamples: Bootstrap

    def __getitem__(self, name: str) -> Result:
        return self.by_name[name]

    @cached_property
    def by_name(self) -> dict[str, Result]:
        """The results."""
        return {one.name: one for one in self.results}

    def kl(self, name: str) -> Interval:
        """KL(full || arm) in nats per token."""
        return self.resamples.interval(self[name].kl)

    def verdict(self, one: Result) -> str:
        """How the arm does against recency alone at equal bytes, in words; "" of a reference."""
        if one.equal is None:
            return ""
        recency = self[one.equal.names["recency"]]
        if one.name == recency.name:
            return ""
        gap = self.resamples.interval(recency.kl - one.kl)
        where = f"{recency.name} at equal bytes {one.equal.what}"
        if recency.name == "full":
            return f"worse than the full cache, which is as large ({one.equal.what})"
        if gap.low > 0:
            return f"better than {where}: KL lower by {gap.mean:.3g} [{gap.low:.3g}, {gap.high:.3g}]"
        if gap.high < 0:
            return f"DOES NOT BEAT {where}: KL higher by {-gap.mean:.3g} [{-gap.high:.3g}, {-gap.low:.3g}]"
        return f"not told apart from {where}"

    def to_json(self) -> dict[str, Any]:
        """All figures by arm."""
        return {one.name: self.figures(one) for one in self.results}

    def figures(self, one: Result) -> dict[str, Any]:
        """Of one arm, as JSON."""
        full, interval = self["full"], self.resamples.interval
        found: dict[str, Any] = {
            "kind": one.candidate.kind,
            "spec": show(one.candidate.change) if one.candidate.change else "",
            "bytes": {"allocated": one.allocated, "per_token": round(one.allocated / self.context, 1),
                      "of_full": round(one.allocated / full.allocated, 4), "peak": one.peak,
                      "read_by_a_step": one.read, **one.bytes},
            "kl": interval(one.kl).to_json(),
            "kl_by_document": [float(f"{value:.6g}") for value in one.kl.mean(1)],
            "top_1": interval(one.same).to_json(),
            "nll": interval(one.nll).to_json(),
            "nll_above_full": interval(one.nll - full.nll).to_json(),
            "perplexity": round(math.exp(one.nll.mean()), 4),
        }  # fmt: skip
        if one.streamed is not None and full.streamed is not None:
            found["streaming"] = {
                "perplexity": round(math.exp(one.streamed.mean()), 4),
                "full": round(math.exp(full.streamed.mean()), 4),
            }
        found["passkeys"] = {name: f"{sum(right)}/{len(right)}" for name, right in one.passkeys.items() if right}
        if one.equal is not None:
            found["at_equal_bytes"] = {"of": one.equal.what, "share_of_tokens": round(one.equal.ratio, 4),
                                       **one.equal.names, "verdict": self.verdict(one)}  # fmt: skip
        return found

    def __str__(self) -> str:
        """A table, and below it what does not beat recency."""
        numbers = ("bytes", "of full", "read", "KL [95%]", "top-1", "dNLL", "PPL", "streaming", "asked before", "after")
        title = f"The KV cache behind {self.context} tokens, and what follows compared with the full cache's"
        table = new_table(title, ("arm", *numbers), numbers)
        for one in self.results:
            table.add_row(*self.row(one))
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
        console.print(table)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        words = [f"{one.name}: {self.verdict(one)}" for one in self.results if self.verdict(one)]
        return "\n".join([*(line.rstrip() for line in text.splitlines() if line.strip()), "", *words])

    def row(self, one: Result) -> list[str]:
        """The arm's line of the table."""
        kl, full = self.kl(one.name), self["full"]
        asked = [f"{sum(right)}/{len(right)}" if right else "" for right in one.passkeys.values()]
        return [
            one.name,
            bytes_text(one.allocated),
            f"{one.allocated / full.allocated:.3f}",
            bytes_text(one.read),
            f"{kl.mean:.2g} [{kl.low:.2g}, {kl.high:.2g}]",
            f"{one.same.mean():.3f}",
            f"{(one.nll - full.nll).mean():+.4f}",
            f"{math.exp(one.nll.mean()):.3f}",
            "" if one.streamed is None else f"{math.exp(one.streamed.mean()):.3f}",
            *asked,
        ]
