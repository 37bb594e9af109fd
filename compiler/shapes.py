"""Fake values: what every node's tensor would look like, with the dynamic sizes symbolic.

Each function has a signature; the sizes of its inputs are symbols, so that a shape is checked for every batch at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graft.compiler.errors import CheckError
from graft.compiler.nodes import evaluate, origin_of

EXAMPLE_SIZES = {"B": 3, "L": 7, "N": 11, "S": 5, "R": 9, "C": 13}
"""Concrete sizes behind the symbols, all different so that a mix-up shows: batch, length, rows, slots, wanted rows,
capacity."""


class Fakes:
    """Fake inputs with named symbolic sizes, all in one FakeTensorMode."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.symbols: dict[str, torch.SymInt] = {}
        self.static: dict[int, Tensor] = {}

    def size(self, name: str) -> torch.SymInt:
        """The symbol of that name; the same one every time."""
        if name not in self.symbols:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            example: Any = self.mode.from_tensor(
                torch.empty(EXAMPLE_SIZES[name]), source=ConstantSource(name), symbolic_context=context
            )
            self.symbols[name] = example.shape[0]
        return self.symbols[name]

    def tensor(self, sizes: tuple[int | str, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A fake tensor whose sizes are numbers or names of symbols."""
        shape = [self.size(size) if isinstance(size, str) else size for size in sizes]
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=device)

    def parameter(self, tensor: Tensor) -> Tensor:
        """The fake twin of a parameter or buffer, all sizes static."""
        if id(tensor) not in self.static:
            self.static[id(tensor)] = self.mode.from_tensor(tensor, static_shapes=True)
        return self.static[id(tensor)]


def derive(graph: fx.Graph, weights: nn.Module, inputs: dict[str, Any], fakes: Fakes) -> None:
    """Fill every node's meta["val"] afresh from the fake inputs, by placeholder name."""
    with fakes.mode:
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = inputs[node.name]
            elif node.op == "get_attr":
                node.meta["val"] = fakes.parameter(attribute(weights, node.target))
            elif node.op == "call_function":
                try:
                    node.meta["val"] = evaluate(node.target, node.args, node.kwargs)
                except Exception as error:
                    raise CheckError(
                        "a node's shape cannot be derived",
                        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                        where=f"{node.format_node()} ({origin_of(node).module or 'no module'})",
                    ) from error


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def same_type(left: Any, right: Any) -> bool:
    """Whether two fake values agree in dtype and in rank, and in every size that is static in both."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return isinstance(left, Tensor) == isinstance(right, Tensor)
    if left.dtype != right.dtype or left.dim() != right.dim():
        return False
    pairs = zip(left.shape, right.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
