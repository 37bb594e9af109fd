"""A program as plain dicts and lists, for tools: what the listing shows, nothing folded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import SymInt, Tensor, fx

from graft.compiler.cost import CostModel, function_cost
from graft.compiler.layers import Layers, find_layers
from graft.compiler.listing import read_parameters
from graft.compiler.nodes import origin_of
from graft.compiler.notation import Notation, dtype_text
from graft.compiler.program import Function, Input, Program


def program_json(program: Program) -> dict[str, Any]:
    """Functions, the history of passes, names of the snapshots, and the text of the host program."""
    return {
        "functions": {name: function_json(function) for name, function in program.functions.items()},
        "passes": [asdict(record) | {"notes": list(record.notes)} for record in program.records],
        "snapshots": list(program.snapshots),
        "host": None if program.host is None else str(program.host),
        "parameter_bytes": program.parameter_bytes,
    }


def function_json(function: Function) -> dict[str, Any]:
    """Signature, states, parameters, nodes, classes of layers, and cost formulas of a function."""
    layers = find_layers(function)
    return {
        "name": function.name,
        "inputs": [input_json(spec) for spec in function.inputs],
        "states": [
            input_json(state.input) | {"layers": state.layers, "bytes_per_token": state.bytes_per_token}
            for state in function.states
        ],
        "parameters": {
            path: {"shape": list(tensor.shape), "dtype": dtype_text(tensor.dtype), "bytes": tensor.nbytes}
            for path, tensor in read_parameters(function).items()
        },
        "layer_classes": layers.classes,
        "nodes": nodes_json(function, layers),
        "cost": function_cost(function).to_json(),
    }


def input_json(spec: Input) -> dict[str, Any]:
    """One input: sizes are numbers or names."""
    return {"name": spec.name, "shape": list(spec.sizes), "dtype": dtype_text(spec.dtype)}


def nodes_json(function: Function, layers: Layers) -> list[dict[str, Any]]:
    """Every node: name, operator, arguments, value, where it comes from and where it stands."""
    notation, costs = Notation(function), CostModel(function)
    roles = layers.trunk.roles() if layers.trunk else {}
    layer_of = {node: section.layer for section in layers.layers for node in section.nodes}
    return [
        {
            "name": node.name,
            "kind": node.op,
            "op": str(node.target),
            "args": argument_json(node.args, notation),
            "kwargs": argument_json(node.kwargs, notation),
            **value_json(node.meta.get("val"), notation),
            "origin": asdict(origin_of(node)) | {"passes": list(origin_of(node).passes)},
            "role": roles.get(node),
            "layer": layer_of.get(node),
            "cost": costs.node(node).to_json() if node.op == "call_function" else None,
        }
        for node in function.graph.nodes
    ]


def argument_json(value: Any, notation: Notation) -> Any:
    """An argument; a node is {"node": name}, a size its text, what JSON does not know its repr."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [argument_json(element, notation) for element in value]
    if isinstance(value, dict):
        return {key: argument_json(element, notation) for key, element in value.items()}
    if isinstance(value, SymInt):
        return notation.size(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def value_json(value: Any, notation: Notation) -> dict[str, Any]:
    """{"shape", "dtype"} of a tensor, {"values"} for several, {"size"} of a number."""
    if isinstance(value, Tensor):
        shape = [int(size) if isinstance(size, int) else notation.size(size) for size in value.shape]
        return {"shape": shape, "dtype": dtype_text(value.dtype)}
    if isinstance(value, (tuple, list)):
        return {"values": [value_json(element, notation) for element in value]}
    return {} if value is None else {"size": argument_json(value, notation)}
