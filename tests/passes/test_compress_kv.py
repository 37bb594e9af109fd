"""compress-kv: the listing in its docstring, and what it refuses."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from torch import fx

import graft
from graft.compiler.program import Function
from graft.passes import compress_kv
from graft.passes.kv_cache import KVCache
from tests.families import build
from tests.passes.listings import first_call, listings, transform
from tests.programs import TIDY, program_of


def paged(one: graft.CompressKV, family: str = "llama", **overrides: Any) -> tuple[Function, graft.View]:
    function = program_of(family, TIDY, **overrides)["forward"].copy()
    transform(function, KVCache())
    return function, transform(function, one)


def test_the_docstring_shows_what_it_does() -> None:
    listing = listings(compress_kv)[1]
    function, _ = paged(graft.CompressKV(graft.Affine()))
    nodes = {name: first_call(function, name) for name in ("kv_append", "kv_attend_pages")}
    append, attend = nodes.values()
    names = {append.args[1]: "k", append.args[2]: "v", attend.args[1]: "q", append: "kv_1"}
    for name, node in nodes.items():
        call = ast.parse(re.search(rf"{name}\([^()]*\)", listing)[0], mode="eval").body  # type: ignore[index]
        assert isinstance(call, ast.Call)
        shown = [one.id if isinstance(one, ast.Name) else ast.literal_eval(one) for one in call.args]
        found = [names.get(value, value.name) if isinstance(value, fx.Node) else value for value in node.args]
        assert shown == found
    assert [spec.name for spec in function.signature[-5:]] == [
        "kv_lengths", "kv_starts", "kv_pages", "kv_table", "kv_counts"
    ]  # fmt: skip


def test_queries_are_kept_where_something_reads_them() -> None:
    function, _ = paged(graft.CompressKV(graft.KeyChannels(0.5)))
    (state,) = function.states
    assert state.query_dim == 2 * state.key_dim and state.width == 4 * state.key_dim
    (plain,) = paged(graft.CompressKV(graft.Affine()))[0].states
    assert plain.query_dim == 0


def test_attention_with_a_window_is_left_as_it_is() -> None:
    function, view = paged(graft.CompressKV(graft.Affine()), "mistral")
    assert view.matches == 0 and "sliding window" in view.misses[0]
    assert all(state.pages is None for state in function.states)


def test_a_state_is_compressed_once() -> None:
    function, _ = paged(graft.CompressKV(graft.Affine()))
    with pytest.raises(graft.PassError, match="compressed already"):
        transform(function, graft.CompressKV(graft.Affine(8, 8)))


def test_layers_without_a_window_are_compressed_beside_those_with_one() -> None:
    model = build("gemma2", max_position_embeddings=512)
    windows = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert {True, False} == set(windows)
    plan = graft.Plan(target=[graft.CompressKV(graft.Affine(8, 8))])
    fast = graft.compile(model, plan)
    dense, paged = fast.program["forward"].states
    assert (dense.layers, paged.layers) == (sum(windows), len(windows) - sum(windows))
    assert dense.pages is None and paged.pages is not None
    ids = torch.randint(3, 131, (1, 200), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # Eight bits are near enough to nothing lost for a model of this size.
    assert torch.equal(fast.generate(ids, **options), graft.compile(model).generate(ids, **options))
    drafts = (graft.Lookup(), graft.SelfDraft(graft.DropBlock((1,), "feed-forward")))
    drafted = graft.compile(model, graft.Plan(target=plan.target, draft=drafts, tree=graft.Tree(nodes=6)))
    assert torch.equal(drafted.generate(ids, **options), fast.generate(ids, **options))
