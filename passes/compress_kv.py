"""Keep far tokens of a KV state in pages: encoded, given up, or read in part.

before:
    kv_1 = kv_append(kv, k, v, sequences, lengths, 0)
    o = kv_attend(kv_1, q, sequences, positions, parents, lengths, 0, 0.25)
    return o, kv_1
after (compress-kv{codec=affine}):
    kv_1 = kv_append(kv, k, v, sequences, kv_lengths, 0)
    o = kv_attend_pages(kv_1, q, sequences, parents, kv_lengths, kv_starts, kv_pages, kv_table, kv_counts, None, None,
                        0, 16, 0.25, 0.0, None, "affine", "")
    return o, kv_1
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

from graft.compiler.errors import PassError
from graft.compiler.kv.codecs import IN_PLACE, Codec
from graft.compiler.kv.eviction import Eviction
from graft.compiler.kv.layout import Pages
from graft.compiler.kv.paging import add_pages, split_windows, windowed_layers
from graft.compiler.kv.selection import Selection
from graft.compiler.nodes import sort_nodes
from graft.compiler.passing import Contract, Pass, View, approximate
from graft.compiler.pipeline import PassWarning
from graft.compiler.program import Function, KVState
from graft.compiler.spec import show

TARGET = "forward"
"""Name of the target's function."""


@dataclass(frozen=True)
class CompressKV(Pass):
    """The KV cache of full attention, compressed by a codec, an eviction policy, a selection, or several of them.

    Tokens that are far, in front of a cut that moves every `every` tokens, are read from pages; `recent` tokens or more
    stay dense behind it (compiler/kv/layout.py). Attention with a sliding window is left as it is: what it reads is
    bounded already. On the target the output changes, and is the same however it is decoded; on a draft (`SelfDraft`)
    it never does.
    """

    codec: Codec = IN_PLACE
    """How far tokens are stored; in place: not at all, for a selection among them."""
    eviction: Eviction | None = None
    """Which of them are given up."""
    selection: Selection | None = None
    """Which of them a row reads."""
    recent: int = 64
    every: int = 64
    prompt: Literal["streamed", "dense"] = "streamed"
    """Whether the cut moves in the prompt, too, or first at its end."""

    contract: ClassVar[Contract] = approximate
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def __post_init__(self) -> None:
        self.pages  # noqa: B018  (refuses what does not go together)

    @property
    def pages(self) -> Pages:
        """The layout. Raises PlanError for options that do not go together."""
        return Pages(self.codec, self.eviction, self.selection, self.recent, self.every, self.prompt)

    def run(self, view: View) -> None:
        if self.eviction is not None and TARGET in view.side:
            text = "gives tokens up: perplexity may hardly show it, yet what a text asks for later can be gone"
            warnings.warn(f"{show(self)} {text}", PassWarning, stacklevel=2)
        for function in view.functions:
            states = [fitting for state in function.states if (fitting := fits(function, state, view))]
            for state in add_pages(function, states, self.pages):
                view.note(f"{state.name}: {state.bytes_per_token:.0f} bytes per far token")
                view.match(2 * state.layers)
            sort_nodes(function.graph)
            function.derive()


def fits(function: Function, state: KVState, view: View) -> KVState | None:
    """The state, or the part of it whose layers have no sliding window; None where all of them have one."""
    if state.pages is not None:
        raise PassError(
            f"the state {state.name} is compressed already",
            found=show(state.pages.codec),
            where=f"function {function.name}",
            remedy="give one compress-kv all of codec, eviction and selection",
        )
    layers, windowed = windowed_layers(function, state)
    if windowed:
        view.miss(state.name, f"{len(windowed)} of {len(layers)} attentions have a sliding window")
    if len(windowed) == len(layers):
        return None
    if windowed and len(layers) < state.layers:
        raise PassError(
            "a draft that lacks layers cannot share a cache that is compressed for some layers alone",
            expected=f"all {state.layers} layers of the state {state.name}",
            found=f"{len(layers)}",
            where=f"function {function.name}",
            remedy="draft with all attentions, or leave compress-kv out",
        )
    return split_windows(function, state, windowed) if windowed else state
