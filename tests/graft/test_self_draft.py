"""Drafts from the model itself, on the target's KV: copies with approximations, early exits, a target cut in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import graft
from graft.compiler.canonical import aten
from graft.compiler.canonical import graft as operators
from graft.compiler.drafting import Context, Drafting, DraftTree, Outcome
from graft.compiler.nodes import call_nodes
from graft.runtime.decoder import Decoder, Rows
from graft.runtime.request import slot_of
from graft.runtime.split import split_of
from tests.families import VOCABULARY, build
from tests.graft.test_greedy_families import reference
from tests.runtime.decoding import Recorder, same_cache_as_fresh_prefill, same_rows

FAMILIES = ("llama", "gemma2", "olmo2", "gpt_neox", "qwen3", "gpt2", "phi3", "stablelm_parallel")
IDS = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
OPTIONS: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@dataclass(frozen=True)
class WatchCache(graft.Drafter):
    """Drafts nothing; compares the target's cache with a fresh prefill behind every commit."""

    def open(self, target: Any, policy: graft.TreePolicy) -> Drafting:
        return Watching(target)


@dataclass
class Watching:
    target: Decoder
    compared: ClassVar[int] = 0

    def begin(self, context: Context, prompt_best: object, prompt_hidden: object = None) -> None:
        pass

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        return [DraftTree() for _ in contexts]

    def observe(self, context: Context, outcome: Outcome) -> None:
        assert self.target.length(slot_of(context)) == len(context.tokens) - 1
        assert same_cache_as_fresh_prefill(self.target, slot_of(context), context.tokens)
        if any(name.startswith("deep") for name in self.target.functions):
            fresh = prefilled(self.target, context.tokens[:-1])
            assert same_rows(self.target, self.target.store.tensors, slot_of(context), fresh)
            self.target.close(fresh)
        Watching.compared += 1

    def end(self, context: Context) -> None:
        pass


def prefilled(target: Decoder, tokens: list[int]) -> int:
    """A slot of a split target that holds these tokens, which ran through both parts."""
    slot, split, rows = target.open(), split_of(target), Rows()
    rows.add_chain(slot, tokens, 0)
    split.run_deep(split.layer, rows, split.run_shallow(split.layer, rows))
    target.commit(slot, range(len(tokens)))
    return slot


def compiled(family: str, *drafters: graft.Drafter, nodes: int = 6, **options: Any) -> graft.CompiledModel:
    model = build(family, dtype=torch.float64, eos_token_id=None)
    plan = graft.Plan(
        draft=drafters, tree=graft.Tree(nodes=nodes), controller=graft.FixedBudget(), sample=[range(3, 9)], **options
    )
    return graft.compile(model, plan, backend="aten")


@cache
def texts(family: str) -> list[list[int]]:
    """transformers' own."""
    model = build(family, dtype=torch.float64, eos_token_id=None)
    return [reference(model, prompt)[:12] for prompt in PROMPTS]


@cache
def split_llama() -> graft.CompiledModel:
    return compiled("llama", graft.LayerSkip(2), nodes=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_transformers_and_the_cache_a_fresh_prefills_behind_every_commit(family: str) -> None:
    grouped = graft.SelfDraft(graft.LayerParallel(groups=((1, 2),), kind="layer"))
    fast = compiled(family, grouped, graft.LayerSkip(1), WatchCache())
    before = Watching.compared
    out = fast.generate(IDS, **OPTIONS)
    assert out[:, 5:].tolist() == texts(family)
    assert 0 < fast.stats["accepted"] < fast.stats["drafted"]
    assert Watching.compared > before + 4


def test_layers_below_the_exit_run_once_for_each_token() -> None:
    fast = split_llama()
    counts = split_of(fast.decoder).tokens
    before = dict(counts)
    assert fast.generate(IDS, **OPTIONS)[:, 5:].tolist() == texts("llama")
    ran = {name: counts[name] - before[name] for name in counts}
    # Every step decides the accepted tokens and one more; the prompt decides the first.
    steps = sum(map(len, texts("llama"))) - 2 - fast.stats["accepted"]
    rows = 3 + 5 + steps + fast.stats["drafted"]
    assert fast.stats["drafted"] > 0
    assert ran == {"shallow_2": rows, "deep_2": rows}
    layers = {name: written(fast, name) for name in ("forward", *ran)}
    assert layers == {"forward": [0, 1, 2], "shallow_2": [0, 1], "deep_2": [2]}


def written(fast: graft.CompiledModel, name: str) -> list[int]:
    """The layers of the KV state that a function writes."""
    return [node.args[5] for node in call_nodes(fast.program[name].graph, [operators.kv_append.default])]


def test_the_host_program_calls_both_parts_in_the_place_of_the_target() -> None:
    assert str(split_llama().program.host).splitlines()[3:6] == [
        "        rows = lay_out(requests, trees)",
        "        hidden = shallow_2(rows)",
        "        logits = deep_2(rows, hidden)",
    ]


def test_an_early_token_is_that_of_the_first_layers_under_the_models_own_norm() -> None:
    fast = split_llama()
    held = build("llama", dtype=torch.float64, eos_token_id=None)
    held.model.layers = held.model.layers[:2]
    drafting = graft.LayerSkip(2).open(fast.decoder, graft.Chain())
    slot = prefilled(fast.decoder, [5, 6, 7])
    try:
        (tree,) = drafting.propose([Context([5, 6, 7, 8], 3, {"slot": slot})], [4])
        with torch.no_grad():
            expected = held.generate(
                torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False, pad_token_id=0
            )
        assert tree.tokens == expected[0, 4:].tolist() and tree.parents == [-1, 0, 1, 2]
    finally:
        split_of(fast.decoder).forget(slot)
        fast.decoder.close(slot)


def test_samples_of_an_exit_are_verified_by_leviathan() -> None:
    fast = compiled("llama", graft.LayerSkip(2, sample=True), nodes=3, verifier=graft.Leviathan())
    options = OPTIONS | {"do_sample": True, "temperature": 1.5}
    out = fast.generate(IDS, **options, seed=3)
    assert 0 < fast.stats["accepted"] < fast.stats["drafted"]
    assert torch.equal(fast.generate(IDS, **options, seed=3), out)
    alone = fast.generate(IDS[1:], **(options | {"attention_mask": MASK[1:]}), seed=4)
    assert not torch.equal(alone, out[1:])


def test_an_interrupted_call_leaves_the_model_usable() -> None:
    fast = compiled("llama", graft.SelfDraft(graft.DropBlock((1,))), graft.LayerSkip(1))
    split = split_of(fast.decoder)
    original = split.run_deep
    calls = 0

    def interrupted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    split.run_deep = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fast.generate(IDS, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fast.generate(IDS[1:], **(OPTIONS | {"attention_mask": MASK[1:]}), streamer=Recorder(fail_after=4))
    assert not split.held and len(fast.decoder.store.free) == len(fast.decoder.store.lengths)
    assert fast.generate(IDS, **OPTIONS)[:, 5:].tolist() == texts("llama")


def test_del_chooses_among_exits_and_changes_no_token() -> None:
    fast = compiled("llama", graft.DEL((1, 2), explore=2), nodes=3)
    assert fast.generate(IDS, **OPTIONS)[:, 5:].tolist() == texts("llama")
    counts = split_of(fast.decoder).tokens
    assert counts["shallow_1"] == counts["deep_1"] > 0 and counts["shallow_2"] == counts["deep_2"] > 0
    assert "if exit_1(requests):" in str(fast.program.host)


def test_del_takes_the_exit_and_the_length_with_the_most_tokens_per_second() -> None:
    fast = compiled("llama", graft.DEL((1, 2)), nodes=3)
    drafting: Any = graft.DEL((1, 2)).open(fast.decoder, graft.Chain())
    drafting.rounds = 9
    for layer, accepted, below in ((1, 2.0, 0.1), (2, 9.0, 0.2)):
        drafting.shown[layer].accepted, drafting.shown[layer].decided, drafting.shown[layer].last = accepted, 10.0, 9
        drafting.split.seconds[f"shallow_{layer}"].mean = {1: below}
        drafting.split.seconds[f"deep_{layer}"].mean = {2: 1.0, 4: 1.1}
    # (1 - 0.9^4) / 0.1 tokens for 4 * 0.2 + 1.1 seconds: 1.81 tokens per second; two of the three would be 1.69.
    assert drafting.choose(3, 1) == (2, 3)
    assert drafting.tokens_per_second(2, 3, 1) == pytest.approx(3.439 / 1.9)
    drafting.split.seconds["shallow_2"].mean = {1: 2.0}
    assert drafting.choose(3, 1)[0] == 1


def test_a_draft_model_may_draft_by_an_approximation_of_itself_and_keeps_an_exact_cache() -> None:
    drafts = graft.SelfDraft(graft.LayerParallel(groups=((0, 1, 2),), kind="layer"))
    other = compiled("llama", drafts)
    plan = graft.Plan(draft=[graft.DraftModel(other, function="self_draft")], controller=graft.FixedBudget(4))
    fast = graft.compile(build("gemma2", dtype=torch.float64, eos_token_id=None), plan, backend="aten")
    assert fast.generate(IDS, **OPTIONS)[:, 5:].tolist() == texts("gemma2")
    drafting: Any = graft.DraftModel(other, function="self_draft").open(fast.decoder, graft.Chain())
    context = Context([5, 6, 7, 8], 3)
    drafting.begin(context, None)
    (tree,) = drafting.propose([context], [4])
    text = list(context.tokens)
    assert tree.tokens[0] == best_after(other.decoder, text)
    for node in range(1, 4):
        text.append(tree.tokens[node - 1])
        assert tree.tokens[node] == best_after(other.decoder, text, "self_draft")
    assert same_cache_as_fresh_prefill(other.decoder, drafting.slot(context), context.tokens)
    drafting.end(context)
    assert len(other.decoder.store.free) == len(other.decoder.store.lengths)
    with pytest.raises(graft.PlanError, match=r"no such function(.|\n)*expected: self_draft"):
        graft.DraftModel(other, function="none").open(fast.decoder, graft.Chain())


def best_after(target: Decoder, tokens: list[int], function: str = "") -> int:
    """The best token behind a text: its first four tokens run through the target, the others through the function."""
    slot, rows = target.open(), Rows()
    rows.add_chain(slot, tokens[:4], 0)
    logits = target.forward(rows)
    target.commit(slot, range(4))
    if function:
        drafting, rows = target.functions[function], Rows()
        rows.add_chain(slot, tokens[4:], 4)
        logits = drafting.forward(rows)
        drafting.close(slot)
    target.close(slot)
    return int(logits[-1].argmax())


def adapter_file(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """Random weights for an adapter of the tiny llama, under the paper's names."""
    held = build("llama", seed=7).model.layers[0].self_attn.state_dict()
    tensors = {f"layers.0.self_attn.{name}": tensor.clone() for name, tensor in held.items()}
    generator = torch.Generator().manual_seed(3)
    for name in ("layers.0.input_layernorm.weight", "norm.weight"):
        tensors[name] = 1 + 0.1 * torch.randn(64, generator=generator)
    save_file(tensors, path / "adapter.safetensors")
    return path / "adapter.safetensors", tensors


def kangaroo_reference(tokens: list[int], tensors: dict[str, Tensor], layer: int) -> Tensor:
    """The paper's early logits after every token: unembed(norm(x + attention(norm(x)))), x behind the exit."""
    held = build("llama", dtype=torch.float64, eos_token_id=None)
    base, block = held.model, held.model.layers[2]
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name != "norm.weight":
                block.get_parameter(name.removeprefix("layers.0.")).copy_(tensor)
        base.norm.weight.copy_(tensors["norm.weight"])
        ids = torch.tensor([tokens])
        x = base(ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
        rope = base.rotary_emb(x, torch.arange(len(tokens))[None])
        mask = torch.full((len(tokens),) * 2, float("-inf"), dtype=x.dtype).triu(1)[None, None]
        mixed = block.self_attn(block.input_layernorm(x), position_embeddings=rope, attention_mask=mask)[0]
        return held.lm_head(base.norm(x + mixed))[0]


def test_kangaroo_drafts_with_its_adapter_until_it_is_not_sure(tmp_path: Path) -> None:
    path, tensors = adapter_file(tmp_path)
    fast = compiled("llama", graft.Kangaroo(str(path), layer=1, eta=0.05), WatchCache(), nodes=5)
    assert fast.generate(IDS, **OPTIONS)[:, 5:].tolist() == texts("llama")
    counts = split_of(fast.decoder).tokens
    assert counts["shallow_1"] == counts["deep_1"]
    sure: Any = graft.Kangaroo(str(path), layer=1, eta=0.0).open(fast.decoder, graft.Chain())
    text = [5, 6, 7, 8, 9, 10]
    slot, split = prefilled(fast.decoder, text[:-1]), split_of(fast.decoder)
    try:
        (tree,) = sure.propose([Context(list(text), 5, {"slot": slot})], [4])
        for token, probability in zip(tree.tokens, tree.probabilities, strict=True):
            expected = kangaroo_reference(text, tensors, 1)[-1].softmax(-1)
            assert (token, probability) == (int(expected.argmax()), pytest.approx(float(expected.max()), rel=1e-5))
            text.append(token)
        eta = sorted(tree.probabilities)[1]
        split.forget(slot)
        stopping: Any = graft.Kangaroo(str(path), layer=1, eta=eta).open(fast.decoder, graft.Chain())
        (short,) = stopping.propose([Context(text[:6], 5, {"slot": slot})], [4])
        unsure = next(node for node, one in enumerate(tree.probabilities) if one < eta)
        assert short.tokens == tree.tokens[: unsure + 1]
    finally:
        split.forget(slot)
        fast.decoder.close(slot)


def test_an_adapter_that_does_not_fit_is_refused_with_its_keys(tmp_path: Path) -> None:
    path, tensors = adapter_file(tmp_path)
    del tensors["norm.weight"]
    save_file(tensors | {"extra.bias": torch.zeros(3)}, path)
    with pytest.raises(graft.CheckpointError, match=r"missing: \['norm.weight'\]; surplus: \['extra.bias'\]"):
        compiled("llama", graft.Kangaroo(str(path), layer=1))
    with pytest.raises(graft.CheckpointError, match="a safetensors file"):
        compiled("llama", graft.Kangaroo(str(tmp_path / "none.safetensors"), layer=1))


@dataclass(frozen=True)
class OneKVHead(graft.Pass):
    """Keeps of every token but the first kv head's key and value."""

    def run(self, view: graft.View) -> None:
        for node in call_nodes(view.function.graph, [operators.attention.default]):
            for place in (1, 2):
                with view.function.graph.inserting_before(node):
                    one = graft.new_node(
                        view.function.graph, aten.slice.Tensor, (node.args[place], 1, 0, 1), like=node, by=view.by
                    )
                node.update_arg(place, one)


@dataclass(frozen=True)
class Nothing(graft.Pass):
    """Finds nothing to do."""

    def run(self, view: graft.View) -> None:
        view.miss("everywhere", "it never does")


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ([graft.SelfDraft(graft.EarlyExit(3))], "1 to 2 layers in front of the exit"),
        ([graft.SelfDraft(graft.LayerParallel(groups=((0, 1), (1, 2))))], "none in two groups"),
        ([graft.SelfDraft(OneKVHead())], "must keep of a token what the target keeps"),
        ([graft.SelfDraft(Nothing())], "changes nothing in the draft(.|\n)*it never does"),
        ([graft.LayerSkip(3)], "1 to 2 layers in front of the exit"),
        ([graft.LayerSkip(1), graft.DEL((1, 2))], "split by another drafter already"),
        ([graft.SelfDraft(graft.EarlyExit(1)), graft.SelfDraft(graft.EarlyExit(2))], "want to add"),
    ],
)
def test_what_cannot_draft_is_refused(drafters: list[graft.Drafter], message: str) -> None:
    with pytest.raises(graft.PassError, match=message):
        compiled("llama", *drafters)


def test_options_that_make_no_sense_are_refused_before_anything_runs() -> None:
    for make in (
        graft.SelfDraft,
        lambda: graft.SelfDraft(graft.KVCache(), graft.MergeLinears(), candidates=0),
        lambda: graft.LayerSkip(1, eta=1.0),
        lambda: graft.DEL((1,)),
        lambda: graft.DEL((1, 1)),
    ):
        with pytest.raises(graft.PlanError):
            make()


def test_plans_write_it_down_and_saved_models_draft_as_before(tmp_path: Path) -> None:
    drafters = (graft.SelfDraft(graft.DropBlock((1,)), graft.EarlyExit(2)), graft.LayerSkip(1))
    plan = graft.Plan(draft=drafters)
    assert plan.spec() == "draft=self-draft{changes=drop-block{index=1},early-exit{layer=2}},layer-skip{layer=1}"
    assert graft.Plan.from_spec(plan.spec()) == plan == graft.Plan.from_toml(plan.to_toml())
    assert graft.Plan.from_spec("draft=self-draft{drop-block{1},early-exit{2}},layer-skip{1}") == plan
    fast = compiled("llama", *drafters)
    fast.save(tmp_path / "saved")
    again = graft.load(tmp_path / "saved")
    assert again.generate(IDS, **OPTIONS)[:, 5:].tolist() == texts("llama")
    assert again.stats["drafted"] > 0 and str(again.program.host) == str(fast.program.host)
    assert again.decoder.vocabulary == VOCABULARY


def test_generated_code_shares_what_is_packed_and_drafts_the_same() -> None:
    model = build("llama", eos_token_id=None)
    plain = graft.compile(model)
    grouped = graft.SelfDraft(graft.LayerParallel(groups=((1, 2),)))
    fast = graft.compile(model, graft.Plan(draft=[grouped, graft.LayerSkip(2)], controller=graft.FixedBudget()))
    assert torch.equal(fast.generate(IDS, **OPTIONS), plain.generate(IDS, **OPTIONS))
    assert fast.stats["drafted"] > 0
    packed = {id(one): one.nbytes for executable in fast.executables for one in executable.panels.values()}
    assert sum(packed.values()) == sum(one.nbytes for one in plain.decoder.executable.panels.values())
