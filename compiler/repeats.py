"""Layers that are alike are traced once: capture takes about as long for eighty as for two.

While a model is exported, the first layer of each kind runs between two markers, and each later one stands in the graph
as a single node. `unrolled` then puts the first one's nodes in its place, over its own parameters. Layers are of one
kind where nothing that their code can see tells them apart: class, modules, sizes of parameters, and every attribute
but the layer's index are equal, and the arguments of their calls are. That nothing but attention looks at the index is
made sure of while the first one runs. Whatever does not fit raises NotAlike, and the model is traced whole.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from graft.compiler.interface import INDEX, LayerIndex, MaskRequest, NotAlike, layer_index
from graft.compiler.nodes import named_arguments, origin_of, stored_node


@torch.library.custom_op("graft::layer_boundary", mutates_args=())
def layer_boundary(values: Sequence[Tensor], place: int) -> list[Tensor]:
    """Marks what goes into the layer at `place`, the first of its kind, and later what comes out of it."""
    return [value.clone() for value in values]


@torch.library.custom_op("graft::repeated_layer", mutates_args=())
def repeated_layer(values: Sequence[Tensor], like: Sequence[Tensor], first: int, place: int) -> list[Tensor]:
    """The layer at `place`, alike to the one at `first`: what goes into it, and what came out of that one, whose sizes
    and dtypes its results have. It has no meaning of its own: it is unrolled before anything runs."""
    raise NotImplementedError("graft::repeated_layer stands for nodes that are not there yet")


@layer_boundary.register_fake
def _(values: Sequence[Tensor], place: int) -> list[Tensor]:
    return [torch.empty_like(value) for value in values]


@repeated_layer.register_fake
def _(values: Sequence[Tensor], like: Sequence[Tensor], first: int, place: int) -> list[Tensor]:
    return [torch.empty_like(value) for value in like]


BOUNDARY, REPEATED = torch.ops.graft.layer_boundary.default, torch.ops.graft.repeated_layer.default
HANDLE = "_graft_kind"


@dataclass
class Call:
    """How the first layer of a kind was called, and what it returned."""

    place: int
    names: list[str]
    """Those of the keyword arguments."""
    values: list[object]
    """All arguments, flattened."""
    structure: TreeSpec
    """What `values` are unflattened to."""
    results: list[Tensor]
    spec: TreeSpec
    """What `results` are unflattened to."""


@dataclass
class Kind:
    """Layers that are alike, and the call of the first that was traced."""

    layers: list[nn.Module]
    call: Call | None = None


class OneOfAKind:
    """What stands in front of a layer's class while its model is exported."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer between markers, or one node for it, or the layer itself where it is called in another way."""
        kind, place = vars(self)[HANDLE]
        values, structure = tree_flatten((args, tuple(kwargs.values())), is_leaf=lambda value: type(value) is not tuple)
        run = super().forward  # type: ignore[misc]
        if None in described(values):
            return run(*args, **kwargs)
        tensors = [value for value in values if isinstance(value, Tensor)]
        if kind.call is None:
            marked = iter(torch.ops.graft.layer_boundary(tensors, place))
            inside = [next(marked) if isinstance(value, Tensor) else value for value in values]
            args, named = tree_unflatten(inside, structure)
            before = held_by(self)
            results, spec = tree_flatten(run(*args, **dict(zip(kwargs, named, strict=True))))
            if held_by(self) != before:
                raise NotAlike("a layer leaves something behind in its modules")
            if not all(isinstance(result, Tensor) for result in results):
                raise NotAlike("a layer returns what is no tensor")
            results = torch.ops.graft.layer_boundary(results, place)
            kind.call = Call(place, [*kwargs], values, structure, results, spec)
            return tree_unflatten(results, spec)
        call = kind.call
        # Sizes are compared as they are known now: the first layer may have found two of them to be the same.
        if (call.names, call.structure, described(call.values)) != ([*kwargs], structure, described(values)):
            return run(*args, **kwargs)
        return tree_unflatten(torch.ops.graft.repeated_layer(tensors, call.results, call.place, place), call.spec)


def held_by(layer: Any) -> list[dict[str, int]]:
    """Which objects the attributes of the layer's modules are."""
    return [{name: id(value) for name, value in vars(module).items()} for module in layer.modules()]


def described(values: Sequence[object]) -> list[tuple | None]:
    """What a layer's code can see of its arguments, the tensors' values aside; None where that is not known."""
    return [described_argument(value) for value in values]


def described_argument(value: object) -> tuple | None:
    """One of `described`."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype, value.device, [str(size) for size in value.shape]
    if isinstance(value, MaskRequest):
        return "mask", value.window
    return (type(value), value) if value is None or type(value) in (bool, int, float, str) else None


class Repeats:
    """Layers of a model that are alike. `paths[place]` is the module path of the layer at `place` among all of them."""

    def __init__(self, model: nn.Module, kinds: Sequence[Kind]) -> None:
        self.model, self.kinds = model, kinds
        paths = {id(module): path for path, module in model.named_modules()}
        self.paths = [paths[id(layer)] for kind in kinds for layer in kind.layers]

    @contextlib.contextmanager
    def traced_once(self) -> Iterator[None]:
        """Let the layers of each kind but the first be one node, for the block's duration."""
        layers = [(layer, kind, type(layer)) for kind in self.kinds for layer in kind.layers]
        parts = [part for layer, _, _ in layers for part in layer.modules() if has_index(part)]
        indices = [getattr(part, INDEX) for part in parts]
        try:
            for place, (layer, kind, own) in enumerate(layers):
                vars(layer)[HANDLE] = kind, place
                layer.__class__ = type(own.__name__, (OneOfAKind, own), {"__module__": own.__module__})
            for part, index in zip(parts, indices, strict=True):
                setattr(part, INDEX, LayerIndex(index))
            yield
        finally:
            for layer, _, own in layers:
                layer.__class__ = own
                vars(layer).pop(HANDLE, None)
            for part, index in zip(parts, indices, strict=True):
                setattr(part, INDEX, index)

    def unrolled(self, graph: fx.Graph) -> fx.Graph:
        """A copy without markers, in which every layer has nodes of its own. Nodes have "val" and "origin"."""
        return Unrolling(self).copy(graph)


def has_index(module: nn.Module) -> bool:
    """Whether the module knows which layer it belongs to."""
    return type(vars(module).get(INDEX)) is int


def find_kinds(model: nn.Module) -> list[Kind]:
    """The layers in the model's outermost lists, those that are alike together; layers without a like are left out."""
    modules = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners = Counter(id(tensor) for _, tensor in tensors)
    kinds: list[Kind] = []
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in lists:
        if any(path.startswith(f"{other}.") for other, _ in lists):
            continue
        for layer in module:
            shared = any(modules[id(part)] > 1 for part in layer.modules())
            if shared or any(owners[id(tensor)] > 1 for tensor in (*layer.parameters(), *layer.buffers())):
                continue
            for kind in kinds:
                if alike(kind.layers[0], layer):
                    kind.layers.append(layer)
                    break
            else:
                kinds.append(Kind([layer]))
    return [kind for kind in kinds if len(kind.layers) > 1]


def alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether code that runs in both sees the same, the values of parameters and buffers and the index aside."""
    parts, others = dict(a.named_modules()), dict(b.named_modules())
    if parts.keys() != others.keys() or any(type(part) is not type(others[path]) for path, part in parts.items()):
        return False
    held, other = dict([*a.named_parameters(), *a.named_buffers()]), dict([*b.named_parameters(), *b.named_buffers()])
    if held.keys() != other.keys() or any(not same_form(tensor, other[path]) for path, tensor in held.items()):
        return False
    return all(equal(attributes(part), attributes(others[path])) for path, part in parts.items())


def same_form(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ in their values at most."""
    return type(a) is type(b) and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides tensors and modules, hooks included; of the index whether there is one."""
    elsewhere = {"_parameters", "_buffers", "_modules"}
    held = {name: value for name, value in vars(module).items() if name not in elsewhere}
    return held | ({INDEX: None} if has_index(module) else {})


def equal(a: Any, b: Any) -> bool:
    """Whether two attributes are the same object, or plain data that is the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, partial):
        return equal((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    return isinstance(a, (bool, int, float, str, set, frozenset, torch.dtype, torch.device)) and bool(a == b)


class Unrolling:
    """One copy of a graph, each repeated layer with the nodes of the first one of its kind."""

    def __init__(self, repeats: Repeats) -> None:
        self.repeats = repeats
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        """Node -> its copy; of a node that makes several values all of theirs."""
        self.held: dict[str, fx.Node] = {}
        """Name of a parameter -> its copy's node; export has one for each, read or not, in front of everything."""
        self.entries: dict[int, int] = {}
        self.bodies: dict[int, tuple[list[fx.Node], list[fx.Node]]] = {}
        """Place -> what the first layer of a kind does, and what comes out."""

    def copy(self, graph: fx.Graph) -> fx.Graph:
        """The whole copy."""
        nodes = list(graph.nodes)
        for place, node in enumerate(nodes):
            if node.target is BOUNDARY:
                self.copies[node] = [self.copies[value] for value in node.args[0]]
                if (layer := node.args[1]) in self.entries:
                    self.bodies[layer] = nodes[self.entries[layer] : place], node.args[0]
                else:
                    self.entries[layer] = place
            elif node.target is REPEATED:
                self.copies[node] = self.layer(node)
            else:
                self.copies[node] = self.copied(node, self.copies)
        return self.graph

    def copied(self, node: fx.Node, copies: dict[fx.Node, Any], old: str = "", new: str = "") -> fx.Node:
        """A node over the copies of its operands, in the layer whose path is `new` instead of `old`."""
        if node.target is operator.getitem and isinstance(copies[node.args[0]], list):
            return copies[node.args[0]][node.args[1]]  # one of the values at a marker, which has a node already
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        # Calls are numbered anew, in the order in which they stand now.
        name = re.sub(r"_\d+$", "", node.name) if node.op == "call_function" else node.name
        copy = stored_node(self.graph, node.op, name, node.target, args, kwargs)
        copy.meta = dict(node.meta)
        if new:
            origin = origin_of(node)
            copy.meta["origin"] = replace(origin, module=moved(origin.module, old, new))
            self.renumber(copy)
        if node.op == "get_attr":
            self.held[node.target] = copy
        return copy

    def layer(self, node: fx.Node) -> list[fx.Node]:
        """The results of one repeated layer, behind nodes of its own."""
        values, _, first, place = node.args
        body, results = self.bodies[first]
        old, new = (f"{self.repeats.paths[layer]}." for layer in (first, place))
        copies: dict[fx.Node, Any] = {body[0]: [self.copies[value] for value in values]}
        for inner in body[1:]:
            for operand in inner.all_input_nodes:
                if operand not in copies:
                    copies[operand] = self.outside(operand, old, new)
            copies[inner] = self.copied(inner, copies, old, new)
        return [copies[result] for result in results]

    def outside(self, operand: fx.Node, old: str, new: str) -> Any:
        """What a layer reads in the place of what the first of its kind reads: its own parameter, or the same value."""
        if operand.op == "get_attr" and operand.target.startswith(old):
            return self.held[new + operand.target.removeprefix(old)]
        return self.copies[operand]

    def renumber(self, node: fx.Node) -> None:
        """Give attention the index of the layer that it is in now."""
        if node.target is torch.ops.graft.attention.default:
            index = layer_index(self.repeats.model.get_submodule(origin_of(node).module))
            arguments = named_arguments(node) | {"layer": index}
            node.args, node.kwargs = tuple(arguments[known.name] for known in node.target._schema.arguments), {}


def moved(path: str, old: str, new: str) -> str:
    """A module's path in one layer as in the other; both layers' paths end in a dot."""
    inside = f"{path}."
    return (new + inside.removeprefix(old)).removesuffix(".") if inside.startswith(old) else path
