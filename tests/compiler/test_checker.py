"""Every rule of the checker is broken by one edit of a sound program, and caught with the right message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from graft.compiler import shapes
from graft.compiler.canonical import aten, graft
from graft.compiler.capture import capture
from graft.compiler.checker import check
from graft.compiler.errors import CheckError
from graft.compiler.nodes import call_nodes, new_node
from graft.compiler.passing import View
from graft.compiler.program import DENSE, Function, Program
from graft.compiler.shapes import derive_one
from graft.passes.canonicalise import Canonicalise
from tests.families import build
from tests.programs import TIDY, program_of


def dense() -> Function:
    """A sound function on dense batches; its stream is [B, L, 64]."""
    return program_of("llama", TIDY)["forward"].copy()


def flat() -> Function:
    """A sound function on rows with a KV state of 3 layers."""
    return program_of("llama")["forward"].copy()


def checked(function: Function) -> CheckError:
    """The error that the function is refused with."""
    with pytest.raises(CheckError) as caught:
        check(Program({"forward": function}), "after the edit")
    assert "after the edit, function forward" in str(caught.value.where)
    return caught.value


def stream(function: Function) -> fx.Node:
    """The residual stream behind the first block: [B, L, 64], or [1, N, 64]."""
    return next(node for node in call_nodes(function.graph, [aten.add.Tensor]) if node.meta["val"].shape[-1] == 64)


def insert(function: Function, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call behind the first block, with metadata."""
    after = stream(function)
    for argument in torch.utils._pytree.tree_leaves(args):
        after = max(after, argument) if isinstance(argument, fx.Node) else after
    with function.graph.inserting_after(after):
        return new_node(function.graph, target, args, kwargs, like=stream(function))


@pytest.mark.parametrize("function", [dense, flat])
def test_a_sound_program_passes(function: Callable[[], Function]) -> None:
    check(Program({"forward": function()}))


def test_the_checker_leaves_the_program_as_it_was() -> None:
    function = flat()
    values = {node.name: node.meta.get("val") for node in function.graph.nodes}
    check(Program({"forward": function}))
    assert all(node.meta.get("val") is values[node.name] for node in function.graph.nodes)


def test_a_use_in_front_of_the_definition_is_caught() -> None:
    function = dense()
    node = stream(function)
    next(iter(function.graph.nodes)).append(node)
    assert checked(function).problem == "the graph is not well formed"


def test_a_node_that_is_no_plain_call_is_caught() -> None:
    function = dense()
    with function.graph.inserting_after(stream(function)):
        function.graph.call_method("relu", (stream(function),))
    assert checked(function).found == "call_method"


def test_inputs_in_another_order_are_caught() -> None:
    function = flat()
    function.placeholder("positions").append(function.placeholder("tokens"))
    error = checked(function)
    assert (str(error.expected)[:17], str(error.found)[:17]) == ("tokens, positions", "positions, tokens")


def test_a_parameter_that_does_not_exist_is_caught() -> None:
    function = dense()
    node = next(node for node in function.graph.nodes if node.op == "get_attr")
    node.target = "model.nowhere"
    assert checked(function).found == "model.nowhere"


@pytest.mark.parametrize("key", ["val", "origin"])
def test_missing_metadata_is_caught_with_the_helper_named(key: str) -> None:
    function = dense()
    del stream(function).meta[key]
    error = checked(function)
    assert (error.expected, error.problem) == (f'meta["{key}"]', "a node lacks metadata")
    assert "new_node" in str(error.remedy)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (aten.clone.default, "not in canonical form"),
        (aten.relu_.default, "may write its arguments"),
        (torch.sigmoid, "is not an operator"),
    ],
)
def test_an_operator_that_functions_may_not_have_is_caught(target: Any, problem: str) -> None:
    function = dense()
    insert(function, target, stream(function))
    assert problem in checked(function).problem


def test_a_recorded_type_that_is_not_the_derived_one_is_caught() -> None:
    function = dense()
    node = stream(function)
    node.meta["val"] = node.meta["val"].to(torch.float64)
    error = checked(function)
    assert error.problem == "a node's recorded value is not what its operands make"
    assert ("float32" in str(error.expected), "float64" in str(error.found)) == (True, True)


def test_operands_that_do_not_fit_together_are_caught_with_module_and_line() -> None:
    function = dense()
    down = next(node for node in call_nodes(function.graph, [aten.linear.default]) if "down" in str(node.args[1]))
    up = next(node for node in call_nodes(function.graph, [aten.linear.default]) if "up" in str(node.args[1]))
    down.update_arg(1, up.args[1])
    error = checked(function)
    assert error.problem == "a node's operands do not fit together"
    assert "in model.layers.0.mlp.down_proj (modeling_llama.py:" in str(error.where)


def test_an_operator_that_fixes_a_dynamic_size_is_caught() -> None:
    function = dense()
    x = stream(function)
    insert(function, aten.expand.default, x, [3, 7, 64])
    error = checked(function)
    assert (error.problem, error.expected) == ("an operator fixes a dynamic size", "a shape rule for every B and L")


def test_a_dynamic_size_that_a_derivation_fixed_is_dynamic_in_the_next() -> None:
    function = dense()
    x = stream(function)
    insert(function, aten.expand.default, x, [3, 7, 64])
    function.derive()
    assert checked(function).problem == "an operator fixes a dynamic size"


def test_what_a_copy_has_in_common_with_its_original_is_not_derived_again(monkeypatch: pytest.MonkeyPatch) -> None:
    function = dense()
    function.derive()
    copy = function.copy()
    insert(copy, aten.sin.default, stream(copy))
    derived: list[fx.Node] = []
    monkeypatch.setattr(shapes, "derive_one", lambda node, values: derived.append(node) or derive_one(node, values))
    copy.derive()
    assert [node.target for node in derived] == [aten.sin.default]


@pytest.mark.parametrize(
    ("index", "change", "problem"),
    [
        (3, lambda ranges: [*ranges[:-1], 1000], "rows that a parameter does not have"),
        (3, lambda ranges: [5, 5, *ranges[2:]], "rows that a parameter does not have"),
        (3, lambda ranges: ranges[:-2], "lists that do not fit together"),
        (1, lambda weights: weights[:-1], "lists that do not fit together"),
    ],
)
def test_ranges_of_rows_that_make_no_sense_are_caught(index: int, change: Callable[[list], list], problem: str) -> None:
    function = flat()
    node = call_nodes(function.graph, [graft.linear_rows.default])[0]
    node.update_arg(index, change(list(node.args[index])))
    assert problem in checked(function).problem


def test_a_merged_weight_that_is_computed_is_caught() -> None:
    function = flat()
    node = call_nodes(function.graph, [graft.linear_rows.default])[0]
    first, *rest = node.args[1]
    with function.graph.inserting_before(node):
        doubled = new_node(function.graph, aten.mul.Tensor, (first, 2.0), like=node)
    node.update_arg(1, [doubled, *rest])
    assert checked(function).problem == "linear_rows reads a weight that is computed"


@pytest.mark.parametrize(
    ("place", "target", "args", "problem"),
    [
        (0, aten.slice.Tensor, (-1, 0, 8), "does not fit together"),
        (1, aten.mul.Tensor, (2.0,), "experts that are computed"),
        (2, aten.slice.Tensor, (-1, 0, 1), "does not fit together"),
        (2, aten.add.Tensor, (0.5,), "does not fit together"),
    ],
    ids=["inputs", "experts", "slots", "index"],
)
def test_experts_that_do_not_fit_their_slots_are_caught(place: int, target: Any, args: tuple, problem: str) -> None:
    function = program_of("mixtral", num_hidden_layers=1)["forward"].copy()
    _, node = call_nodes(function.graph, [graft.expert_linear.default])
    with function.graph.inserting_before(node):
        changed = new_node(function.graph, target, (node.args[place], *args), like=node)
    node.update_arg(place, changed)
    assert problem in checked(function).problem


MIXING: dict[str, tuple[Any, tuple]] = {
    "softmax.int along dim 1": (aten.softmax.int, (1,)),
    "cumsum along dim 1": (aten.cumsum.default, (-2,)),
    "mean along dim 0": (aten.mean.dim, ([0, 2],)),
    "sum loses the dim of size B, L": (aten.sum.default, ()),
    "argmax along dim 0": (aten.argmax.default, ()),
    "amax along dim 1": (aten.amax.default, ([1],)),
    "topk along dim 1": (aten.topk.default, (1, 1)),
    "sort along dim 1": (aten.sort.default, (1,)),
    "roll along dim 1": (aten.roll.default, ([1], [1])),
    "flip along dim 1": (aten.flip.default, ([1],)),
    "std along dim 1": (aten.std.correction, ([1],)),
    "select along dim 1": (aten.select.int, (1, 0)),
    "slice along dim 1": (aten.slice.Tensor, (1, 1)),
    "reshape takes elements": (aten.reshape.default, ()),
}


@pytest.mark.parametrize("found", MIXING)
def test_an_operator_along_the_tokens_is_caught(found: str) -> None:
    function = dense()
    target, arguments = MIXING[found]
    if target is aten.reshape.default:
        arguments = ([-1, 64, length(function, stream(function))],)
    node = insert(function, target, stream(function), *arguments)
    error = checked(function)
    assert error.problem == "a value is combined across tokens outside attention"
    assert str(error.found).startswith(found.replace("softmax.int", "softmax"))
    assert node.name in str(error.where) and "model.layers.0" in str(error.where)


def test_padding_between_the_tokens_is_caught() -> None:
    function = dense()
    node = insert(function, aten.constant_pad_nd.default, stream(function), [0, 0, 1, 0])
    assert f"%{node.name} " in str(checked(function).where)


def turned(function: Function, x: fx.Node) -> fx.Node:
    """[B, 64, L]."""
    return insert(function, aten.transpose.int, x, 1, 2)


def length(function: Function, x: fx.Node) -> fx.Node:
    """L."""
    return insert(function, aten.sym_size.int, x, 1)


def test_joining_and_multiplying_along_the_tokens_is_caught() -> None:
    for plant, found in (
        (lambda f, x: insert(f, aten.cat.default, [x, x], 1), "cat along dim 1, of size L"),
        (
            lambda f, x: insert(f, aten.matmul.default, insert(f, aten.transpose.int, x, 1, 2), x),
            "matmul sums over dim 2",
        ),
        (lambda f, x: insert(f, aten.bmm.default, insert(f, aten.transpose.int, x, 1, 2), x), "bmm sums over dim 2"),
        (lambda f, x: insert(f, aten.index.Tensor, x, [None, f.placeholder("positions")]), "index along dim 1"),
        (
            lambda f, x: insert(f, aten.arange.default, insert(f, aten.sym_size.int, x, 1)),
            "arange counts rows, up to L",
        ),
    ):
        function = dense()
        plant(function, stream(function))
        error = checked(function)
        assert (error.problem[:29], str(error.found)[: len(found)]) == ("a value is combined across to", found)


def test_on_rows_a_choice_among_them_is_caught_unless_they_are_the_wanted_ones() -> None:
    function = flat()
    insert(function, aten.index_select.default, stream(function), 1, function.placeholder("positions"))
    assert checked(function).found == "index_select along dim 1, of size N"


def test_a_model_that_convolves_over_tokens_is_refused_by_module() -> None:
    captured = capture(build("lfm2", layer_types=["conv", "full_attention", "conv"]))
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    Canonicalise().run(View(program, "canonicalise"))
    with pytest.raises(CheckError, match=r"conv1d along dim 2, of size L(.|\n)*in model\.layers\.0\.conv"):
        check(program)


def writes(function: Function) -> list[fx.Node]:
    """The appends, in layer order."""
    return call_nodes(function.graph, [graft.kv_append.default])


def reads(function: Function) -> list[fx.Node]:
    """The attention nodes, in layer order."""
    return call_nodes(function.graph, [graft.kv_attend.default])


def return_first_write(function: Function) -> None:
    *others, _ = function.output.args[0]
    function.output.args = ((*others, writes(function)[0]),)


def copy_state(function: Function) -> None:
    insert(function, aten.mul.Tensor, writes(function)[0], 1.5)


def widen(function: Function) -> None:
    node = writes(function)[0]
    with function.graph.inserting_before(node):
        wide = new_node(function.graph, aten.cat.default, ([node.args[1]] * 2, -1), like=node)
    node.update_arg(1, wide)


def use_positions(function: Function) -> None:
    writes(function)[0].update_arg(3, function.placeholder("positions"))


STATE_EDITS: dict[str, Callable[[Function], None]] = {
    "has two writers of one value": lambda f: writes(f)[1].update_arg(0, writes(f)[1].args[0].args[0]),
    "is read after it is written again": lambda f: reads(f)[1].update_arg(0, writes(f)[0]),
    "is returned before its last write": return_first_write,
    "is touched by another operator": copy_state,
    "has no such layer": lambda f: writes(f)[2].update_arg(5, 3),
    "has a layer that is written twice": lambda f: writes(f)[1].update_arg(5, 0),
    "is read where nothing is written": lambda f: reads(f)[0].update_arg(6, 2),
    "is used with rows of another call": use_positions,
    "is written with other sizes": widen,
}


@pytest.mark.parametrize("problem", STATE_EDITS)
def test_a_broken_rule_of_states_is_caught(problem: str) -> None:
    function = flat()
    STATE_EDITS[problem](function)
    assert checked(function).problem == f"state kv {problem}"


def test_outputs_with_other_rows_are_caught() -> None:
    function = flat()
    logits, hidden, state = function.output.args[0]
    function.output.args = ((hidden, hidden, state),)
    error = checked(function)
    assert (error.problem, error.expected) == ("the logits have the wrong type", "floating point [R, ...]")
    function.output.args = ((logits, hidden),)
    assert checked(function).problem == "the outputs are not the signature's"
