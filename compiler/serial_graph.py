"""A graph as plain data that JSON holds, and back.

A node is a dict of its name, op, target, arguments and origin. Arguments are JSON's own values where it has them; the
others are a dict with one key that says what they are: {"node": "linear_3"}, {"dtype": "float32"}, {"slice": [0, 2,
null]}. Values (shapes and dtypes) are not written: whoever reads a graph derives them afresh.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graft.compiler import ops  # noqa: F401  (defines torch.ops.graft)
from graft.compiler.errors import SaveError
from graft.compiler.kv import attention  # noqa: F401  (defines graft::kv_attend_pages)
from graft.compiler.nodes import PYTHON_ARITHMETIC, Origin, place_of, stored_node

OPS = ("placeholder", "get_attr", "call_function", "output")
"""Kinds of nodes that functions have."""

CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
"""Kinds of arguments that are named attributes of torch."""

DEEPEST = 16
"""Lists that an argument may have inside each other."""


def take(data: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """The value under a key of saved data. Raises SaveError where it is missing or of another type."""
    if not isinstance(data, dict) or key not in data:
        raise SaveError("saved data lacks an entry", expected=key, found=type(data).__name__, where=where)
    value = data[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(one.__name__ for one in kinds)
        raise SaveError(
            "saved data has the wrong type", expected=names, found=f"{value!r:.60}", where=f"{where}, {key}"
        )
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of strings as a tuple."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise SaveError(
            "saved data has the wrong type", expected="a list of texts", found=f"{value!r:.60}", where=where
        )
    return tuple(value)


def graph_data(graph: fx.Graph) -> list[dict[str, Any]]:
    """The graph's nodes, in order. Raises SaveError for a node that cannot be written down."""
    return [node_data(node) for node in graph.nodes]


def graph_from(data: list[Any], where: str) -> fx.Graph:
    """The graph that `graph_data` gave, without fake values. Raises SaveError for what is no such data."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for one in data:
        name = take(one, "name", str, where)
        place = f"{where}, node {name}"
        op, target = take(one, "op", str, place), take(one, "target", str, place)
        if op not in OPS:
            raise SaveError("a saved node is of a kind that functions do not have", found=op, where=place)
        args, kwargs = argument_from(take(one, "args", list, place), nodes, place), one.get("kwargs", {})
        if not isinstance(kwargs, dict):
            raise SaveError("saved data has the wrong type", expected="dict", found=f"{kwargs!r:.60}", where=place)
        kwargs = {key: argument_from(value, nodes, place) for key, value in kwargs.items()}
        called = target_from(target, place) if op == "call_function" else target
        node = nodes[name] = stored_node(graph, op, name, called, tuple(args), kwargs)
        if node.name != name:
            raise SaveError("a saved node cannot have its name", expected=name, found=node.name, where=place)
        if "module" in one:
            passes = texts(take(one, "passes", list, place), place)
            node.meta["origin"] = Origin(take(one, "module", str, place), take(one, "source", str, place), passes)
    return graph


def node_data(node: fx.Node) -> dict[str, Any]:
    """One node."""
    if node.op not in OPS:
        raise unwritable(node, node.op)
    found = {
        "name": node.name,
        "op": node.op,
        "target": target_text(node) if node.op == "call_function" else str(node.target),
        "args": [argument_data(argument, node) for argument in node.args],
    }
    if node.kwargs:
        found["kwargs"] = {name: argument_data(argument, node) for name, argument in node.kwargs.items()}
    if "origin" in node.meta:
        origin = node.meta["origin"]
        found |= {"module": origin.module, "source": origin.source, "passes": list(origin.passes)}
    return found


def target_text(node: fx.Node) -> str:
    """`aten.linear.default`, or `operator.mul`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in PYTHON_ARITHMETIC:
        return f"operator.{target.__name__}"
    raise unwritable(node, target)


def target_from(text: str, where: str) -> Callable[..., Any]:
    """The operator of that name. Raises SaveError where there is none in this process."""
    namespace, _, rest = text.partition(".")
    if namespace == "operator":
        found = getattr(operator, rest, None) if rest.isidentifier() else None
        if found in PYTHON_ARITHMETIC:
            return found
    name, _, overload = rest.partition(".")
    if all(part.isidentifier() and not part.startswith("__") for part in (namespace, overload)) and name.isidentifier():
        found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise SaveError(
        "a saved program calls an operator that there is not",
        found=text,
        where=where,
        remedy="import the package that defines the operator before loading",
    )


def argument_data(value: Any, node: fx.Node) -> Any:
    """One argument."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [argument_data(element, node) for element in value]
    if isinstance(value, tuple):
        return {"tuple": [argument_data(element, node) for element in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: argument_data(element, node) for key, element in value.items()}}
    if isinstance(value, slice):
        return {"slice": [argument_data(part, node) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, kind in CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise unwritable(node, value)


def argument_from(data: Any, nodes: dict[str, fx.Node], where: str, depth: int = 0) -> Any:
    """The argument that `argument_data` gave."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if depth > DEEPEST:
        raise SaveError("a saved argument is nested too deep", expected=f"at most {DEEPEST} lists", where=where)
    if isinstance(data, list):
        return [argument_from(element, nodes, where, depth + 1) for element in data]
    kind, value = next(iter(data.items())) if isinstance(data, dict) and len(data) == 1 else ("", data)
    if kind in ("tuple", "slice") and isinstance(value, list):
        elements = [argument_from(element, nodes, where, depth + 1) for element in value]
        if kind == "tuple":
            return tuple(elements)
        if len(elements) == 3:
            return slice(*elements)
    if kind == "dict" and isinstance(value, dict):
        return {key: argument_from(element, nodes, where, depth + 1) for key, element in value.items()}
    if kind == "node" and isinstance(value, str) and value in nodes:
        return nodes[value]
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind in CONSTANTS and isinstance(value, str):
        found = getattr(torch, value, None)
        if isinstance(found, CONSTANTS[kind]):
            return found
    if kind == "device" and isinstance(value, str):
        try:
            return torch.device(value)
        except RuntimeError:
            pass  # as unreadable as any other
    raise SaveError("a saved argument cannot be read", found=f"{data!r:.60}", where=where)


def unwritable(node: fx.Node, found: object) -> SaveError:
    """The error for what the format has no form for."""
    return SaveError(
        "a node cannot be written down",
        expected="calls of operators on nodes, numbers, texts, dtypes, devices, slices, and lists of these",
        found=f"{found!r:.80}",
        where=place_of(node),
    )
