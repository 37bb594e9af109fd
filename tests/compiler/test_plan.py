"""Plans: their text forms, and what does not go together."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.compiler.drafting import Drafter, Drafting, DraftKind, Target, TreePolicy
from graft.compiler.errors import PlanError
from graft.compiler.ordering import ordered
from graft.compiler.passing import Pass, View
from graft.compiler.plan import Plan, Tree
from graft.passes.canonicalise import Canonicalise
from graft.passes.dead_code import DeadCode
from graft.passes.drop_block import DropBlock
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears
from graft.runtime.drafters.lookup import Lookup
from graft.runtime.drafters.recycle import Recycle
from graft.runtime.tree_policies import BestFirst, Chain, Fixed
from graft.runtime.verifiers import GreedyWalk, Leviathan, SampleAndMatch


class Idle(Pass):
    """Does nothing."""

    def run(self, view: View) -> None:
        """Nothing."""


class NeedsCache(Idle):
    """Goes behind kv-cache."""

    requires: ClassVar[frozenset[str]] = frozenset({"kv-cache"})


class NeedsBoth(Idle):
    """Cannot run at all."""

    requires: ClassVar[frozenset[str]] = frozenset({"kv-cache", "cache-free"})


class NeedsMiracle(Idle):
    """Requires what nobody provides."""

    requires: ClassVar[frozenset[str]] = frozenset({"cash-free"})


class Left(Idle):
    """Breaks what Right requires."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    breaks: ClassVar[frozenset[str]] = frozenset({"cache-free"})


class Right(Idle):
    """Breaks what Left requires."""

    requires: ClassVar[frozenset[str]] = frozenset({"cache-free"})
    breaks: ClassVar[frozenset[str]] = frozenset({"canonical"})


class Independent(Drafter):
    """Drafts by sampling."""

    kind: ClassVar[DraftKind] = "independent"

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """Never called."""
        raise NotImplementedError


PASSES = st.builds(
    DropBlock, index=st.lists(st.integers(-9, 9)).map(tuple), kind=st.sampled_from(["attention", "feed-forward"])
)
POLICIES = st.sampled_from([None, Chain(), BestFirst(), Fixed(((0,), (1,), (0, 1)))])
PLANS = st.builds(
    Plan,
    target=st.lists(PASSES, max_size=3),
    draft=st.lists(st.sampled_from([Lookup(), Lookup(longest=4), Recycle(k=3)]), max_size=2),
    tree=st.builds(Tree, nodes=st.integers(0, 63), policy=POLICIES),
    verifier=st.sampled_from([None, GreedyWalk(), SampleAndMatch()]),
    sample=st.none() | st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=3), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_a_plan_reads_back_from_toml_and_from_one_line(plan: Plan) -> None:
    assert Plan.from_toml(plan.to_toml()) == plan
    assert Plan.from_spec(plan.spec()) == plan
    plan.check()


def test_the_default_plan_is_empty_text() -> None:
    assert Plan().to_toml() == Plan().spec() == ""
    assert Plan.from_toml("") == Plan.from_spec("") == Plan()


def test_lists_tensors_and_ranges_are_taken_for_tuples() -> None:
    loose: Any = {"target": [DropBlock([1])], "draft": [Lookup()], "sample": [torch.tensor([1, 2]), range(3)]}
    plan = Plan(**loose)
    assert plan == Plan((DropBlock((1,)),), (Lookup(),), sample=((1, 2), (0, 1, 2)))
    assert hash(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": [Lookup()]}, r"plan\.target has the wrong type(.|\n)*expected: a pass"),
        ({"target": DropBlock()}, "plan.target has the wrong type"),
        ({"draft": ["lookup-up"]}, r"no drafter called(.|\n)*expected: lookup"),
        ({"tree": 16}, r"plan\.tree has the wrong type(.|\n)*expected: a tree"),
        ({"tree": Tree(policy=Lookup())}, r"tree\.policy has the wrong type(.|\n)*expected: a tree policy"),
        ({"sample": "some text"}, "plan.sample has the wrong type"),
        ({"sample": [[]]}, "a sample holds no tokens"),
        ({"target": [DropBlock(index=["a"])]}, r"drop-block\.index has the wrong type(.|\n)*'a' \(str\)"),
    ],
)
def test_a_part_of_the_wrong_kind_is_refused_when_the_plan_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(**options)


@pytest.mark.parametrize("nodes", [-1, 64])
def test_the_size_of_a_tree_is_bounded(nodes: int) -> None:
    with pytest.raises(PlanError, match=rf"expected: 0 to 63(.|\n)*found: {nodes}"):
        Tree(nodes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[tarrget]]\nname = 'drop-block'", r"no option 'tarrget'(.|\n)*expected: target(.|\n)*line 1"),
        ("\n[[target]]\nname = 'drop-blok'", r"no pass called(.|\n)*expected: drop-block(.|\n)*line 3"),
        ("[[target]]\nname = 'drop-block'\nindx = [1]", r"no option 'indx'(.|\n)*expected: index(.|\n)*line 3"),
        ("[[target]]\nindex = [1]", "a pass lacks its name"),
        ("[tool.poetry]\nname = 'other'", r"no option 'tool'(.|\n)*line 1"),
        ("\ntarget = = 1", r"not TOML(.|\n)*line 2"),
        ("tree = {nodes = 'many'}", r"tree\.nodes has the wrong type(.|\n)*a whole number"),
        ("use = 'mine.py'", "plan.use has the wrong type"),
    ],
)
def test_a_foreign_or_corrupt_plan_names_the_place_and_the_nearest_right_name(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_toml(file)
    assert str(file) in str(caught.value.where)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_plan_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "plan.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match="a plan cannot be read"):
        Plan.from_toml(str(file))


def test_files_of_your_own_are_used_relative_to_the_plan(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from graft.compiler.passing import Pass\n\nclass PlanFromFile(Pass):\n    def run(self, view): pass\n",
        encoding="utf-8",
    )
    (tmp_path / "plan.toml").write_text("use = ['mine.py']\n[[target]]\nname = 'plan-from-file'\n", encoding="utf-8")
    plan = Plan.from_toml(tmp_path / "plan.toml")
    plan.check()
    assert [one.pass_name() for one in plan.target] == ["plan-from-file"]
    assert Plan.from_toml(plan.to_toml()) == Plan.from_spec(plan.spec()) == plan


def test_a_verifier_that_is_not_lossless_for_a_drafter_is_refused() -> None:
    with pytest.raises(PlanError, match="leviathan is not lossless for drafter lookup") as caught:
        Plan(draft=[Lookup()], verifier=Leviathan()).check()  # type: ignore[arg-type]
    assert "sample-and-match" in str(caught.value.remedy)
    Plan(draft=(Lookup(),), verifier=SampleAndMatch()).check()


def test_a_verifier_for_chains_is_refused_with_a_policy_that_branches() -> None:
    with pytest.raises(PlanError, match="which fixed shapes into trees that branch"):
        Plan(draft=(Independent(),), tree=Tree(policy=Fixed(((0,), (1,)))), verifier=Leviathan()).check()
    Plan(draft=(Independent(),), tree=Tree(policy=Chain()), verifier=Leviathan()).check()


def test_two_passes_that_break_each_other_are_both_named() -> None:
    with pytest.raises(PlanError, match=r"(left and right|right and left) do not go together") as caught:
        Plan(target=(Left(), Right())).check()
    assert "right requires 'cache-free', which left breaks" in str(caught.value.found)
    assert "left requires 'canonical', which right breaks" in str(caught.value.found)


def test_a_fact_that_nothing_provides_is_answered_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"needs-miracle requires 'cash-free'(.|\n)*expected: cache-free"):
        Plan(target=(NeedsMiracle(),)).check()


def test_a_contract_that_does_not_exist_is_refused() -> None:
    class Vague(Idle):
        contract: ClassVar[Any] = "mostly"

    with pytest.raises(PlanError, match="vague declares a contract that there is not"):
        Plan(target=(Vague(),)).check()


def test_a_pass_whose_name_another_class_claims_is_refused() -> None:
    @dataclass(frozen=True)
    class DropBlock(Idle):
        pass

    with pytest.raises(PlanError, match="claim the name 'drop-block'"):
        Plan(target=(DropBlock(),)).check()
    del DropBlock
    gc.collect()


PIPELINE = (Canonicalise(), DeadCode(), KVCache(), MergeLinears(), DeadCode())


def test_an_order_that_fits_is_kept() -> None:
    assert ordered([*PIPELINE, Idle()]) == [*PIPELINE, Idle()]


def test_a_pass_moves_behind_what_provides_its_facts_and_before_what_breaks_them() -> None:
    assert names([Canonicalise(), NeedsCache(), DeadCode(), KVCache()]) == [
        "canonicalise", "dead-code", "kv-cache", "needs-cache",
    ]  # fmt: skip
    assert names([Canonicalise(), KVCache(), DropBlock()]) == ["canonicalise", "drop-block", "kv-cache"]


def test_a_pass_between_two_facts_that_exclude_each_other_is_refused() -> None:
    with pytest.raises(PlanError, match="needs-both") as caught:
        ordered([Canonicalise(), NeedsBoth(), KVCache()])
    assert "kv-cache" in str(caught.value)


def test_a_pass_that_breaks_what_it_requires_cannot_run_twice() -> None:
    with pytest.raises(PlanError, match="kv-cache cannot run twice"):
        ordered([Canonicalise(), KVCache(), KVCache()])


def names(passes: list[Pass]) -> list[str]:
    """Names in the order in which the passes run."""
    return [one.pass_name() for one in ordered(passes)]
