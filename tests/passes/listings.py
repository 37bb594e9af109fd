"""The before/after listings in the docstrings of passes, turned into graphs and back.

A listing is Python: operators are called by their ATen or graft name, and each call makes a node. What a pass turns
the first listing into is compared with the second as expressions, so that neither the names of nodes nor the order of
independent ones matters.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from graft.compiler import ops  # noqa: F401  (defines torch.ops.graft)
from graft.compiler.nodes import Origin
from graft.compiler.passing import Pass, View
from graft.compiler.program import DENSE, Function, Input, Program

aten = torch.ops.aten

OPERATORS: dict[str, Any] = {
    "_assert_tensor_metadata": aten._assert_tensor_metadata.default,
    "_to_copy": aten._to_copy.default,
    "add": aten.add.Tensor,
    "amax": aten.amax.default,
    "addmm": aten.addmm.default,
    "bmm": aten.bmm.default,
    "cat": aten.cat.default,
    "clamp": aten.clamp.default,
    "clone": aten.clone.default,
    "cos": aten.cos.default,
    "embedding": aten.embedding.default,
    "exp": aten.exp.default,
    "expert_linear": torch.ops.graft.expert_linear.default,
    "ge": aten.ge.Scalar,
    "getitem": operator.getitem,
    "gt": aten.gt.Scalar,
    "index": aten.index.Tensor,
    "index_select": aten.index_select.default,
    "linear": aten.linear.default,
    "linear_rows": torch.ops.graft.linear_rows.default,
    "lt": aten.lt.Scalar,
    "masked_fill": aten.masked_fill.Scalar,
    "mean": aten.mean.dim,
    "mul": aten.mul.Tensor,
    "ne": aten.ne.Scalar,
    "reciprocal": aten.reciprocal.default,
    "relu": aten.relu.default,
    "repeat_interleave": aten.repeat_interleave.self_int,
    "reshape": aten.reshape.default,
    "rsqrt": aten.rsqrt.default,
    "sigmoid": aten.sigmoid.default,
    "silu": aten.silu.default,
    "slice": aten.slice.Tensor,
    "squeeze": aten.squeeze.dim,
    "softmax": aten.softmax.int,
    "split_with_sizes": aten.split_with_sizes.default,
    "sub": aten.sub.Tensor,
    "sum": aten.sum.dim_IntList,
    "topk": aten.topk.default,
    "unsqueeze": aten.unsqueeze.default,
    "view": aten.view.default,
}


class Weights(nn.Module):
    """Parameters by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {"unread": (1,), **shapes}.items():  # a function's device is its first parameter's
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Sheet(dict):
    """Names of a listing -> nodes; operators make nodes, parameters and inputs are there from the start."""

    def __init__(self, inputs: tuple[Input, ...], weights: dict[str, tuple[int, ...]]) -> None:
        super().__init__(float32=torch.float32)
        self.graph, self.weights, self.inputs = fx.Graph(), Weights(weights), inputs
        self.update({spec.name: self.graph.placeholder(spec.name) for spec in inputs})
        self.update({name: self.graph.get_attr(name) for name in weights})
        self.update({name: self.operator(target) for name, target in OPERATORS.items()})

    def operator(self, target: Any) -> Callable[..., Any]:
        """What a call in a listing does."""

        def call(*args: Any, **kwargs: Any) -> Any:
            node = self.graph.call_function(target, args, kwargs)
            if target is not aten.split_with_sizes.default:
                return node
            return tuple(self.graph.call_function(operator.getitem, (node, index)) for index in range(len(args[1])))

        return call

    def run(self, listing: str) -> Any:
        """Execute the listing; what it returns, else None."""
        tree = ast.parse(listing)
        last = tree.body[-1]
        if isinstance(last, ast.Return):
            tree.body[-1] = ast.copy_location(ast.Assign([ast.Name("result", ast.Store())], last.value), last)
        exec(compile(ast.fix_missing_locations(tree), "listing", "exec"), {}, self)
        return self.get("result")

    def function(self, *outputs: fx.Node) -> Function:
        """The function that returns these nodes, with values and provenance filled in."""
        self.graph.output(tuple(outputs))
        function = Function("forward", self.graph, self.weights, self.inputs)
        function.derive()
        for node in self.graph.nodes:
            node.meta["origin"] = Origin("model", "listing:1")
        return function


def listings(module: ModuleType) -> tuple[str, str]:
    """The listing before and the listing after, from the module's docstring."""
    found = re.search(r"\nbefore:\n(.*?)\nafter[^\n]*:\n(.*)", inspect.getdoc(module) or "", re.S)
    assert found, f"{module.__name__} shows no listing"
    return textwrap.dedent(found[1]), textwrap.dedent(found[2])


def expression(value: Any) -> str:
    """A node as a nested call, down to inputs and parameters."""
    if isinstance(value, fx.Node):
        if value.op in {"placeholder", "get_attr"}:
            return str(value.target)
        arguments = [*map(expression, value.args), *(f"{k}={expression(v)}" for k, v in value.kwargs.items())]
        return f"{value.target}({', '.join(arguments)})"
    return f"[{', '.join(map(expression, value))}]" if isinstance(value, (list, tuple)) else repr(value)


def first_call(function: Function, name: str) -> fx.Node:
    """The first call of one of graft's operators."""
    return next(node for node in function.graph.nodes if f"graft.{name}." in str(node.target))


def outputs(function: Function) -> list[str]:
    """The function's outputs as expressions."""
    return [expression(node) for node in function.output.args[0]]


def calls(function: Function) -> int:
    """How many calls the function makes."""
    return sum(node.op == "call_function" for node in function.graph.nodes)


def transform(function: Function, one: Pass) -> View:
    """Run the pass on the function, in place."""
    view = View(Program({"forward": function}), one.pass_name())
    one.run(view)
    return view


def run(function: Function) -> list[Tensor]:
    """The function's outputs on fixed tokens and positions, [2, 4]."""
    assert function.inputs == DENSE
    tokens = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    with torch.no_grad():
        return list(function.copy().module()(tokens, torch.arange(4).expand(2, 4).contiguous()))
