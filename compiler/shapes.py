"""Fake values: what every node's tensor would look like, with the dynamic sizes symbolic.

Each function has a signature; the sizes of its inputs are symbols, so that a shape is checked for every batch at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graft.compiler.errors import CheckError
from graft.compiler.nodes import evaluate, place_of

EXAMPLE_SIZES = {"B": 3, "L": 7, "N": 11, "S": 5, "R": 9, "C": 13, "G": 17, "P": 4}
"""Concrete sizes behind the symbols, all different so that a mix-up shows: batch, length, rows, slots, wanted rows,
capacity, pages of all, pages of one kv head."""


class Fakes:
    """Fake inputs with named symbolic sizes, all in one FakeTensorMode, and what calls on them were found to give."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        # torch's own cache costs more than it saves where sizes are symbols; equal calls are found in `known`.
        self.mode.cache_enabled = False
        self.symbols: dict[str, torch.SymInt] = {}
        self.known: dict[Any, Any] = {}
        """Call, by target and types of its operands -> its fake value."""
        self.parameters: dict[Any, Tensor] = {}
        """Sizes, strides, dtype and device of a parameter -> its fake twin."""

    @property
    def intact(self) -> bool:
        """Whether every size still is a symbol of its own: an operator may fix one, or take two for equal."""
        sizes = [size.node.expr for size in self.symbols.values()]
        return all(size.is_symbol for size in sizes) and len(set(sizes)) == len(sizes)

    def size(self, name: str) -> torch.SymInt:
        """The symbol of that name; the same one every time."""
        if name not in self.symbols:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            example: Any = self.mode.from_tensor(
                torch.empty(EXAMPLE_SIZES[name]), source=ConstantSource(name), symbolic_context=context
            )
            self.symbols[name] = example.shape[0]
        return self.symbols[name]

    def tensor(self, sizes: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
        """A fake tensor whose sizes are numbers or names of symbols."""
        shape = [self.size(size) if isinstance(size, str) else size for size in sizes]
        with self.mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def parameter(self, tensor: Tensor) -> Tensor:
        """The fake twin of a parameter or buffer, all sizes static; one without storage counts as on the device."""
        form = (tensor.shape, tensor.stride(), tensor.dtype, self.device if tensor.is_meta else tensor.device)
        if form not in self.parameters:
            shape, stride, dtype, device = form
            with self.mode:
                self.parameters[form] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return self.parameters[form]


Values = dict[fx.Node, Any]
"""Node -> its fake value."""


def derive(
    graph: fx.Graph, weights: nn.Module, inputs: dict[str, Any], fakes: Fakes, *, strict: bool = False
) -> Values:
    """Every node's fake value from the fake inputs, by placeholder name; meta["val"] is neither read nor written.

    Equal calls on equal types are derived once with the same `fakes`, so that a model costs little more than one of its
    layers, and what a pass leaves as it was nothing. Raises CheckError for a call whose operands do not fit together,
    and if `strict` for one that fixes a dynamic size.
    """
    values: Values = {}
    known = fakes.known
    keys: dict[int, Any] = {}
    # Without the dispatcher some composite operators read sizes as numbers in torch 2.11.
    with fakes.mode, torch.no_grad(), enable_python_dispatcher():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node.name]
            elif node.op == "get_attr":
                values[node] = fakes.parameter(attribute(weights, node.target))
            elif node.op == "call_function":
                key = (node.target, call_key(node.args, values, keys), call_key(node.kwargs, values, keys))
                if key not in known:
                    known[key] = derive_one(node, values)
                    if strict:
                        refuse_fixed_sizes(node, fakes)
                values[node] = known[key]
    return values


def call_key(argument: Any, values: Values, keys: dict[int, Any]) -> Any:
    """What the type of a call's result depends on: the types of its operands and its constants."""
    if isinstance(argument, fx.Node):
        value = values[argument]
        if id(value) not in keys:
            keys[id(value)] = type_key(value)
        return keys[id(value)]
    if isinstance(argument, (list, tuple)):
        return tuple(call_key(element, values, keys) for element in argument)
    if isinstance(argument, dict):
        return tuple((name, call_key(element, values, keys)) for name, element in argument.items())
    if isinstance(argument, slice):
        return ("slice", *(call_key(part, values, keys) for part in (argument.start, argument.stop, argument.step)))
    return type(argument), argument


def type_key(value: Any) -> Any:
    """The type of a fake value, strides included: whether a reshape is a view depends on them."""
    if isinstance(value, Tensor):
        sizes = (*value.shape, "strides", *value.stride())
        return value.dtype, tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    if isinstance(value, (list, tuple)):
        return tuple(map(type_key, value))
    return ("size", value.node.expr) if isinstance(value, torch.SymInt) else (type(value), value)


def derive_one(node: fx.Node, values: Values) -> Any:
    """The fake value of one call."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    try:
        return evaluate(node.target, args, kwargs)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise CheckError(
            "a node's operands do not fit together", found=f"{type(error).__name__}: {lines[0]}", where=place_of(node)
        ) from error


def refuse_fixed_sizes(node: fx.Node, fakes: Fakes) -> None:
    """An operator's shape rule may only hold for one value of a dynamic size, which then is a number from there on."""
    fixed = [name for name, size in fakes.symbols.items() if size.node.expr.is_number]
    if fixed:
        raise CheckError(
            "an operator fixes a dynamic size",
            expected=f"a shape rule for every {' and '.join(fixed)}",
            found=getattr(node.target, "__name__", node.target),
            where=place_of(node),
        )


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors; one that was given up counts with what it was."""
    # The address of the storage itself: that of its data is 0 for all that have none.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def same_type(left: Any, right: Any) -> bool:
    """Whether two fake values agree in dtype and in rank, and in every size that is static in both."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return isinstance(left, Tensor) == isinstance(right, Tensor)
    if left.dtype != right.dtype or left.dim() != right.dim():
        return False
    pairs = zip(left.shape, right.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
