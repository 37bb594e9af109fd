"""Making a function from nothing, for passes that add one that drafts: inputs, parameters, operators, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graft.compiler.canonical import aten
from graft.compiler.errors import PassError
from graft.compiler.nodes import Origin, Value
from graft.compiler.passing import View
from graft.compiler.program import FLAT, Function, Input, KVState
from graft.compiler.shapes import attribute


class Drafted(nn.Module):
    """Parameters that a pass adds to a program's weights, as submodules and buffers at the paths they are given."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Tensors by dotted path; those of int64 are buffers, the others parameters without gradients."""
        super().__init__()
        for path, tensor in tensors.items():
            *parents, last = path.split(".")
            module: nn.Module = self
            for part in parents:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            if tensor.is_floating_point():
                module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(last, tensor)


def add_parameters(view: View, name: str, tensors: dict[str, Tensor]) -> None:
    """Make the tensors submodule `name` of the weights that the program's functions share.

    Raises PassError where the model has something of that name; what a failed pass left there is replaced.
    """
    weights = view.function.weights
    held = getattr(weights, name, None)
    for function in view.program.functions.values():
        if any(node.op == "get_attr" and node.target.startswith(f"{name}.") for node in function.graph.nodes):
            raise view.taken(f"parameters under {name!r}", function)
    if not name.isidentifier() or (held is not None and not isinstance(held, Drafted)):
        raise PassError(
            f"{view.by} cannot add its parameters",
            expected="a name that is an identifier and that nothing else in the model has",
            found=name,
            remedy="choose another name",
        )
    setattr(weights, name, Drafted(tensors))


def parameter_node(function: Function, path: str, like: fx.Node, by: str) -> fx.Node:
    """The parameter at a path as a node at the graph's insertion point, its fake value of the kind of `like`'s."""
    node = function.graph.get_attr(path)
    tensor = attribute(function.weights, path)
    with like.meta["val"].fake_mode:
        node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    node.meta["origin"] = Origin(path.rpartition(".")[0], "", (by,))
    return node


class Builder:
    """A function on flat rows in the making."""

    def __init__(
        self, view: View, name: str, row_inputs: Sequence[Input] = (), states: Sequence[KVState] = ()
    ) -> None:
        """`row_inputs` are its inputs beyond those of FLAT; parameters are those of the view's function."""
        self.view = view
        inputs = (*FLAT, *row_inputs)
        self.function = Function(name, fx.Graph(), view.function.weights, inputs, tuple(states))
        values, self.fakes = self.function.fake_inputs()
        self.values: dict[str, Value] = {}
        for spec in self.function.signature:
            node = self.function.graph.placeholder(spec.name)
            node.meta["val"] = values[spec.name]
            self.values[spec.name] = Value(node, view.by)

    def __getitem__(self, name: str) -> Value:
        """An input or a state."""
        return self.values[name]

    def parameter(self, path: str) -> Value:
        """The parameter or buffer at a path."""
        if path not in self.values:
            graph = self.function.graph
            inputs = [node for node in graph.nodes if node.op == "placeholder"]
            with graph.inserting_after(inputs[-1]):
                node = graph.get_attr(path)
            node.meta["val"] = self.fakes.parameter(attribute(self.function.weights, path))
            node.meta["origin"] = Origin(path.rpartition(".")[0], "", (self.view.by,))
            self.values[path] = Value(node, self.view.by)
        return self.values[path]

    def has(self, path: str) -> bool:
        """Whether there is a parameter at the path."""
        try:
            attribute(self.function.weights, path)
        except AttributeError:
            return False
        return True

    def linear(self, x: Value, path: str) -> Value:
        """`x` times the transpose of PATH.weight, plus PATH.bias where there is one."""
        bias = [self.parameter(f"{path}.bias")] if self.has(f"{path}.bias") else []
        return x.apply(aten.linear.default, self.parameter(f"{path}.weight"), *bias)

    def embed(self, tokens: str, path: str) -> Value:
        """Rows [N, width] of the table at `path` that the input `tokens` names."""
        return self.parameter(path).apply(aten.embedding.default, self[tokens])

    def wanted(self, x: Value) -> Value:
        """The rows [R, width] of [N, width] whose logits are wanted."""
        return x.apply(aten.index_select.default, 0, self["wanted"])

    def wide(self, logits: Value) -> Value:
        """Logits in float32, or float64 where they are."""
        if logits.dtype in (torch.float32, torch.float64):
            return logits
        return logits.apply(aten._to_copy.default, dtype=torch.float32)

    def finish(self, logits: Value, hidden: Value, *states: Value, draft_vocabulary: str = "") -> Function:
        """Add the function to the view's program: logits [R, v], hidden [N, w], and the last value of each state."""
        outputs: tuple[Any, ...] = tuple(value.node for value in (logits, hidden, *states))
        self.function.graph.output(outputs)
        self.function.draft_vocabulary = draft_vocabulary
        self.function.derive()
        self.view.add(self.function)
        return self.function
