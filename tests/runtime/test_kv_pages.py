"""Pages of a KV cache: what is kept at which position, and that nothing but the text's own positions decides it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import graft
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.kv_pages import FarTokens
from tests.families import build

PROMPT = torch.randint(3, 131, (200,), generator=torch.Generator().manual_seed(1)).tolist()
HALF = graft.CompressKV(graft.DensePages(), graft.H2O(ratio=0.5))
ONCE = graft.CompressKV(graft.Affine(8, 8), graft.SnapKV(ratio=0.8), prompt="dense")
FOUR = graft.CompressKV(graft.Affine())
SPARSE = graft.CompressKV(graft.KeyChannels(0.5), selection=graft.PageMeans(ratio=0.25, least=16, dense_layers=1))
SINGLE = graft.CompressKV(selection=graft.DoubleSparsity(ratio=0.25, least=16, dense_layers=1))
GREEDY: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tiny(**options: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    return build("llama", max_position_embeddings=512, **sizes, **options)


@cache
def compiled(*target: graft.Pass, draft: tuple[graft.Drafter, ...] = ()) -> graft.CompiledModel:
    controller = graft.FixedBudget() if draft else None
    plan = graft.Plan(target=target, draft=draft, tree=graft.Tree(nodes=7), controller=controller)
    return graft.compile(tiny(), plan)


def fed(decoder: Decoder, tokens: list[int], step: int, prompt: int = 0) -> int:
    """A slot that holds the tokens, fed at most `step` at a time."""
    slot, done = decoder.open(prompt), 0
    while done < len(tokens):
        some = tokens[done : done + min(step, decoder.room(slot) or step)]
        rows = Rows()
        rows.add_chain(slot, some, done)
        decoder.forward(rows)
        decoder.commit(slot, range(len(some)))
        done += len(some)
    return slot


def contents(decoder: Decoder, slot: int) -> list[Tensor]:
    """Everything that is stored of the slot."""
    store = decoder.store
    (far,) = store.far.values()
    counts, table = far.counts[:, slot], far.table[:, slot]
    used = torch.arange(table.shape[-1]) * 64 < counts[..., None]
    ((tail, base),) = store.tails(store.states, slot)
    found = [counts, far.pages[table[used].long()], far.labels[table[used].long()], far.channels[:, slot]]
    return [one.clone() for one in (*found, tail[:, :, : store.lengths[slot] - base])]


@pytest.mark.parametrize("one", [HALF, ONCE, FOUR, SPARSE, SINGLE], ids=["h2o", "snapkv", "int4", "think", "sparse"])
def test_what_is_stored_depends_on_the_text_alone(one: graft.CompressKV) -> None:
    decoder, prompt = compiled(one).decoder, 150 if one.prompt == "dense" else 0
    slots = [fed(decoder, PROMPT, step, prompt) for step in (512, 7)]
    first, second = (contents(decoder, slot) for slot in slots)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert int(first[0].max()) > 0
    for slot in slots:
        decoder.close(slot)
    (far,) = decoder.store.far.values()
    assert sorted(far.free) == list(range(len(far.pages))), "closing gives every page back"


@pytest.mark.parametrize("one", [HALF, ONCE, FOUR, SPARSE, SINGLE], ids=["h2o", "snapkv", "int4", "think", "sparse"])
def test_drafting_for_a_compressed_target_changes_no_token(one: graft.CompressKV) -> None:
    ids = torch.tensor([[0] * 63 + PROMPT[:120], PROMPT[:183]])
    mask = (ids != 0).long()
    expected = compiled(one).generate(ids, attention_mask=mask, **GREEDY)
    drafted = compiled(one, draft=(graft.Lookup(), graft.Recycle()))
    assert torch.equal(drafted.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert drafted.stats["accepted"] > 0
    alone = compiled(one).generate(ids[:1, 63:], **GREEDY)
    assert torch.equal(alone[0], expected[0, 63:])


@pytest.mark.parametrize(
    "one",
    [FOUR, graft.CompressKV(graft.DensePages(), graft.StreamingLLM(tokens=80)),
     graft.CompressKV(selection=graft.PageMeans(ratio=0.25, least=16, dense_layers=0))],
    ids=["int4", "streaming", "triforce"],
)  # fmt: skip
def test_a_draft_may_read_compressed_what_the_target_reads_as_it_is(one: graft.CompressKV) -> None:
    ids = torch.tensor([PROMPT[:183]])
    expected = compiled().generate(ids, **GREEDY)
    fast = compiled(draft=(graft.SelfDraft(one),))
    for _ in range(2):  # a slot that is used again has none of the first text's pages
        assert torch.equal(fast.generate(ids, **GREEDY), expected)
    assert fast.stats["accepted"] > 10
    overlay = fast.decoder.functions["self_draft"].store
    assert overlay.nbytes > 0 and "kv" not in fast.decoder.store.far


def test_a_draft_of_the_draft_takes_fewer_calls_for_the_same_drafts() -> None:
    """TriForce's hierarchy: lookup drafts for the draft that reads a part of the cache, which drafts for the target."""
    ids, found = torch.tensor([PROMPT]), []
    for below in (None, graft.Lookup()):
        draft = graft.SelfDraft(graft.CompressKV(selection=graft.PageMeans(ratio=0.25, least=16)), below=below)
        tree = graft.Tree(nodes=7, policy=graft.Chain())
        plan = graft.Plan(draft=[draft], tree=tree, controller=graft.FixedBudget())
        assert graft.Plan.from_toml(plan.to_toml()) == plan
        fast, calls = graft.compile(tiny(), plan), list[Rows]()
        function = fast.decoder.functions["self_draft"]

        def counted(rows: Rows, forward: Any = function.forward, calls: list[Rows] = calls) -> Tensor:
            calls.append(rows)
            return forward(rows)

        function.forward = counted  # type: ignore[method-assign, assignment]
        assert torch.equal(fast.generate(ids, **GREEDY), compiled().generate(ids, **GREEDY))
        found.append((fast.stats["accepted"], fast.stats["drafted"], len(calls)))
    plain, guided = found
    assert plain[:2] == guided[:2] and guided[2] < plain[2]


def test_a_draft_on_a_dense_cache_cannot_read_queries() -> None:
    with pytest.raises(graft.StateError, match="finds none there"):
        compiled(draft=(graft.SelfDraft(graft.CompressKV(graft.KeyChannels(0.5))),))


def test_a_draft_on_a_compressed_target_reads_its_pages() -> None:
    ids = torch.tensor([PROMPT[:183]])
    fast = compiled(FOUR, draft=(graft.SelfDraft(graft.DropBlock((1,))),))
    assert torch.equal(fast.generate(ids, **GREEDY), compiled(FOUR).generate(ids, **GREEDY))
    assert fast.stats["accepted"] > 0


@pytest.mark.filterwarnings("default")
def test_a_target_that_evicts_warns_and_a_draft_does_not(recwarn: pytest.WarningsRecorder) -> None:
    evicts = graft.CompressKV(graft.DensePages(), graft.StreamingLLM(tokens=80))
    graft.compile(tiny(), graft.Plan(draft=[graft.SelfDraft(evicts)]))
    assert not [one for one in recwarn if issubclass(one.category, graft.PassWarning)]
    with pytest.warns(graft.PassWarning, match="gives tokens up"):
        graft.compile(tiny(), graft.Plan(target=[evicts]))


def test_h2o_keeps_what_transformers_attention_weights_add_up_to() -> None:
    one = graft.CompressKV(graft.DensePages(), graft.H2O(ratio=0.5, latest=0.25), prompt="dense")
    made, model = compiled(one), tiny(attn_implementation="eager")
    slot = fed(made.decoder, PROMPT, 512, prompt=200)
    with torch.no_grad():
        weights = model(torch.tensor([PROMPT]), output_attentions=True).attentions
    (far,) = made.decoder.store.far.values()
    # 100 tokens of 200 may stay; the tail starts at 128 and has 72 of them. Of the others 4 are sinks and 7 the latest.
    assert far.cuts[slot] == 128 and far.counts[:, slot].eq(28).all()
    positions = far.kept[slot].positions[..., :28]
    for layer, found in enumerate(weights):
        mass = found[0].unflatten(0, (3, 2)).mean(1).sum(1)[:, :128]
        for head in range(3):
            best = {*range(4), *range(121, 128), *(4 + mass[head, 4:121].topk(17).indices).tolist()}
            assert set(positions[layer, head].tolist()) == best
    made.decoder.close(slot)


def test_labels_are_of_channels_that_are_large_and_tell_tokens_apart() -> None:
    states = compiled(SINGLE).decoder.store.states
    far = FarTokens(states[0], torch.device("cpu"))
    far.resize(2)
    keys = torch.randn(3, 3, 128, 16, generator=torch.Generator().manual_seed(3))
    size, spread = torch.rand(2, 3, 3, 1, 16, generator=torch.Generator().manual_seed(4))
    keys = 4 * size + spread * keys
    keys[..., 5] = 100.0  # every token's, so it says nothing of one
    far.calibrate(1, torch.cat([keys, keys], dim=-1))
    worth = torch.from_numpy(np.abs(keys.numpy()).mean(2) * keys.double().numpy().std(2))
    assert far.channels[:, 1].tolist() == worth.argsort(-1, descending=True)[..., :4].sort(-1).values.tolist()
    assert not (far.channels[:, 1] == 5).any() and not far.channels[:, 0].any()


def test_heads_with_larger_scores_keep_more_and_none_less_than_its_floor() -> None:
    one = graft.CompressKV(graft.DensePages(), graft.H2O(ratio=0.5, latest=0.0, heads="adaptive", floor=0.5))
    decoder = compiled(one).decoder
    slot = fed(decoder, PROMPT, 64)
    (far,) = decoder.store.far.values()
    counts = far.counts[:, slot]
    budget = one.pages.eviction.budget(192, far.cuts[slot]) if one.pages.eviction else 0
    assert counts.sum(1).eq(3 * budget).all() and int(counts.min()) >= budget // 2
    assert counts.unique().numel() > 1
    decoder.close(slot)


def test_a_cache_without_memory_says_so_before_anything_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = compiled(FOUR).decoder
    slot = fed(decoder, PROMPT[:120], 64)
    rows = Rows()
    rows.add_chain(slot, PROMPT[120:128], 120)
    (far,) = decoder.store.far.values()
    free = far.take(len(far.free))

    def fail(self: FarTokens, held: Tensor, count: int) -> Tensor:
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(FarTokens, "grown", fail)
        with pytest.raises(graft.StateError, match="no memory for pages"):
            decoder.forward(rows)
    before = contents(decoder, slot)
    decoder.forward(rows)
    decoder.commit(slot, range(8))
    assert decoder.length(slot) == 128 and int(before[0].max()) < int(contents(decoder, slot)[0].max())
    decoder.close(slot)
    far.free += free


def test_rows_and_cuts_stay_on_their_sides() -> None:
    decoder = compiled(FOUR).decoder
    slot = fed(decoder, PROMPT[:130], 64)
    rows = Rows()
    rows.add_chain(slot, PROMPT[130:], 130)
    assert decoder.room(slot) == 62 < len(rows)
    decoder.forward(rows)
    with pytest.raises(graft.StateError, match="beyond the position at which the cut moves"):
        decoder.commit(slot, range(len(rows)))
    decoder.rollback(slot)
    with pytest.raises(graft.StateError, match="cannot be cut to that length"):
        decoder.truncate(slot, 60)
    decoder.close(slot)


def test_what_does_not_go_together_is_refused_before_anything_runs() -> None:
    for options, match in (
        ({}, "change nothing"),
        ({"eviction": graft.H2O()}, "stays in place cannot be evicted"),
        ({"codec": graft.DensePages(), "eviction": graft.SnapKV()}, "looks at a whole prompt"),
        ({"codec": graft.Affine(), "eviction": graft.H2O(heads="adaptive")}, "keep different numbers"),
        ({"codec": graft.Affine(), "every": 100}, "triggers that there are not"),
    ):
        with pytest.raises(graft.PlanError, match=match):
            graft.CompressKV(**options)  # type: ignore[arg-type]


def test_a_draft_model_may_have_a_compressed_cache_of_its_own() -> None:
    ids = torch.tensor([PROMPT[:150]])
    fast = compiled(draft=(graft.DraftModel(compiled(FOUR)),))
    assert torch.equal(fast.generate(ids, **GREEDY), compiled().generate(ids, **GREEDY))
    assert fast.stats["accepted"] > 20


def test_a_compressed_model_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    ids = torch.tensor([PROMPT[:150]])
    made = compiled(SPARSE)
    made.save(tmp_path / "model")
    held = graft.load(tmp_path / "model")
    assert held.program["forward"].states == made.program["forward"].states
    assert torch.equal(held.generate(ids, **GREEDY), made.generate(ids, **GREEDY))
