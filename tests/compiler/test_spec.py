"""Components as text and as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.compiler import spec
from graft.compiler.errors import PlanError
from graft.compiler.passing import Pass, View, spec_name
from graft.compiler.spec_text import read_arguments, scalar, scalar_text


@dataclass(frozen=True)
class SpecLeaf(Pass):
    """A pass inside another."""

    depth: int = 0

    def run(self, view: View) -> None:
        """Nothing."""


@dataclass(frozen=True)
class SpecEverything(Pass):
    """One option of every type that options may have."""

    whole: int = 3
    real: float = 0.5
    flag: bool = False
    text: str = "plain"
    choice: Literal["first", "second", "true"] = "first"
    many: tuple[int, ...] = ()
    pair: tuple[float, str] = (1.0, "a")
    paths: tuple[tuple[int, ...], ...] = ()
    maybe: float | None = 1.0
    either: int | tuple[int, ...] = 0
    inner: Pass | None = None
    inners: tuple[Pass, ...] = ()

    def run(self, view: View) -> None:
        """Nothing."""


@dataclass(frozen=True)
class SpecRequired(Pass):
    """An option without a default."""

    weights: str

    def run(self, view: View) -> None:
        """Nothing."""


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
REAL = st.floats(allow_nan=False)
LEAF = st.builds(SpecLeaf, depth=st.integers())
WHOLES = st.lists(st.integers(), max_size=3).map(tuple)


def everything(inner: st.SearchStrategy[Pass]) -> st.SearchStrategy[Pass]:
    """SpecEverything with any value in each option; components inside it are drawn from `inner`."""
    return st.builds(
        SpecEverything,
        whole=st.integers(),
        real=REAL,
        flag=st.booleans(),
        text=TEXT | st.sampled_from(["1", "true", "none", "inf", "1e5", "a=b", "(x)", "", "lookup{}"]),
        choice=st.sampled_from(["first", "second", "true"]),
        many=WHOLES,
        pair=st.tuples(REAL, TEXT),
        paths=st.lists(WHOLES, max_size=3).map(tuple),
        maybe=st.none() | REAL,
        either=st.integers(),
        inner=st.none() | inner,
        inners=st.lists(inner, max_size=2).map(tuple),
    )


ANY = everything(LEAF | everything(LEAF))
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(ANY)
def test_every_component_reads_back_from_its_text(component: Pass) -> None:
    assert spec.parse(spec.show(component), Pass) == component


@QUICK
@given(ANY)
def test_every_component_reads_back_from_plain_data(component: Pass) -> None:
    assert spec.conform(spec.to_plain(component), Pass, "component") == component


@QUICK
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_with_an_error_of_ours(text: str) -> None:
    try:
        spec.parse(text, Pass)
    except PlanError as error:
        assert error.problem


@given(st.none() | st.booleans() | st.integers() | REAL | TEXT)
def test_a_scalar_reads_back_from_its_text(value: object) -> None:
    if isinstance(value, str) and scalar_text(value) != value:
        assert read_arguments(f"a={scalar_text(value)}") == {"a": [value]}
    else:
        assert scalar(scalar_text(value)) == value


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("SkipFFN", "skip-ffn"),
        ("KVCache", "kv-cache"),
        ("H2O", "h2o"),
        ("Top2Heads", "top2-heads"),
        ("plain", "plain"),
    ],
)
def test_the_name_comes_from_the_class(class_name: str, name: str) -> None:
    assert spec_name(class_name) == name


def test_options_at_their_default_are_not_written() -> None:
    assert spec.show(SpecEverything()) == "spec-everything"
    assert spec.show(SpecEverything(many=(1, 2), flag=True)) == "spec-everything{flag=true,many=1,2}"


def test_nested_components_are_written_by_name() -> None:
    text = "spec-everything{inner=spec-leaf,inners=spec-leaf{depth=1},spec-leaf{depth=2}}"
    component = SpecEverything(inner=SpecLeaf(), inners=(SpecLeaf(1), SpecLeaf(2)))
    assert spec.show(component) == text
    assert spec.parse(text, Pass) == component


def test_values_in_front_fill_the_first_options() -> None:
    assert spec.parse("spec-leaf{12}", Pass) == SpecLeaf(12)
    assert spec.parse("spec-everything{1, 2.5, many=4 , 5}", Pass) == SpecEverything(whole=1, real=2.5, many=(4, 5))


def test_a_lone_value_makes_a_tuple_and_parentheses_are_allowed_around_one() -> None:
    assert spec.parse("spec-everything{many=7}", Pass) == SpecEverything(many=(7,))
    assert spec.parse("spec-everything{many=(7,8)}", Pass) == SpecEverything(many=(7, 8))
    assert spec.parse("spec-everything{either=(7,8)}", Pass) == SpecEverything(either=(7, 8))


def test_lists_and_whole_numbers_are_brought_to_the_declared_type() -> None:
    given_loosely: Any = SpecEverything(real=2, many=[1, 2], paths=[[1], []])  # type: ignore[arg-type]
    component = spec.conformed(given_loosely)
    assert component == SpecEverything(real=2.0, many=(1, 2), paths=((1,), ()))
    assert type(component.real) is float


@pytest.mark.parametrize(
    ("text", "problem", "expected", "found"),
    [
        ("spec-leef", "no pass called 'spec-leef'", "spec-leaf", "spec-leef"),
        ("spec-leaf{deph=1}", "has no option 'deph'", "depth", "deph"),
        ("spec-leaf{depth=deep}", "spec-leaf.depth has the wrong type", "a whole number", "'deep' (str)"),
        ("spec-leaf{depth=1.5}", "wrong type", "a whole number", "1.5 (float)"),
        ("spec-leaf{depth=true}", "wrong type", "a whole number", "True (bool)"),
        ("spec-leaf{depth=1,2}", "wrong type", "a whole number", "2 values"),
        ("spec-leaf{1,2}", "too many values", "at most 1", "2"),
        ("spec-leaf{1,depth=2}", "an option twice", "None", "depth"),
        ("spec-leaf{depth=1,depth=2}", "cannot be read", "'depth' is there twice", "2"),
        ("spec-everything{choice=frist}", "no such choice", "first", "frist"),
        ("spec-everything{flag=yes}", "wrong type", "true or false", "'yes' (str)"),
        ("spec-everything{many=1,b}", "wrong type", "a whole number", "'b' (str)"),
        ("spec-everything{pair=1.0}", "wrong type", "a list of 2: a number, text", "1 values"),
        ("spec-everything{inner=3}", "wrong type", "a pass", "3 (int)"),
        ("spec-required", "lacks an option", "weights", "None"),
        ("spec-leaf{depth=1", "cannot be read", "}", "the end"),
        ("spec-leaf}", "cannot be read", "end", "}"),
        ('spec-leaf{depth="1', "cannot be read", "a string that ends", '"1'),
        ("spec-leaf{depth=1,}", "cannot be read", "a value after the comma", "}"),
        ("(" * 100, "cannot be read", "at most 32", "("),
    ],
)
def test_a_wrong_spec_says_what_was_expected_and_found(text: str, problem: str, expected: str, found: str) -> None:
    with pytest.raises(PlanError) as caught:
        spec.parse(text, Pass)
    assert problem in caught.value.problem
    assert expected in str(caught.value.expected)
    assert found in str(caught.value.found)


def test_an_option_of_the_wrong_type_in_python_is_refused_like_one_in_text() -> None:
    with pytest.raises(PlanError, match=r"spec-leaf\.depth has the wrong type(.|\n)*'deep' \(str\)"):
        spec.conformed(SpecLeaf("deep"))  # type: ignore[arg-type]


def test_an_option_cannot_take_the_key_of_the_name() -> None:
    @dataclass(frozen=True)
    class SpecNamed(SpecLeaf):
        name: str = ""

    with pytest.raises(PlanError, match="an option cannot be called 'name'"):
        spec.to_plain(SpecNamed())
