"""What a function costs: sympy formulas for FLOPs and bytes, per node and per call.

Sizes are those of the signature (N rows, R wanted rows; B and L before there is a KV state), and three that a call
has besides: T, committed and new tokens that a row attends to; Q, sequences in the call. Conventions:

- A matrix product [M, K] x [K, N] is 2*M*K*N FLOPs; a bias is M*N more.
- Attention of M rows over T tokens is 2*M*T*(key dim + value dim)*heads, in a sliding window of W tokens with
  min(T, W) in T's place. Without a KV state it is counted dense, as computed: T = L. The softmax is not counted.
- Every other operator is one FLOP for each element that it makes, or that it reduces; a view is free, a gather too.
- Weights are read once per call, however many nodes and rows read them. Of a gathered table only what is gathered.
- Experts: no more matrices are read than rows' slots choose, and no more than there are.
- KV: the keys and values of T tokens are read once for each of Q sequences, those of N rows are written once.
- Activations are what every node reads and writes, were each run by itself; fusion saves most of them, so they are an
  upper bound. Views move nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import sympy
from torch import Tensor, fx

from graft.compiler.canonical import ATTENTION, aten, graft, node_class
from graft.compiler.kv.attention import codec_of, selection_of
from graft.compiler.kv.codecs import PAGE
from graft.compiler.nodes import named_arguments
from graft.compiler.notation import Notation, size_symbol
from graft.compiler.program import Function
from graft.compiler.shapes import attribute

ZERO = sympy.Integer(0)
CONTEXT, SEQUENCES = size_symbol("T"), size_symbol("Q")
"""Tokens a row attends to; sequences in the call."""

FREE = frozenset({"view", "size", "gather", "state"})
"""Classes of operators that compute nothing."""

PRODUCTS = frozenset({aten.bmm.default, aten.mm.default, aten.matmul.default, aten.baddbmm.default})
"""Matrix products whose right-hand side is no parameter."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a call."""

    rows: int = 1
    """N: tokens run."""
    context: int = 1024
    """T: tokens that a row attends to, itself included."""
    wanted: int = 1
    """R: rows whose logits are wanted."""
    sequences: int = 1
    """Q: sequences that the rows belong to."""
    batch: int = 1
    """B: sequences of a dense batch."""
    length: int = 1024
    """L: tokens of each."""

    def text(self, symbols: Iterable[sympy.Symbol]) -> str:
        """The sizes that the symbols stand for, in words."""
        words = {"N": "rows", "T": "context", "R": "wanted", "Q": "sequences", "B": "sequences", "L": "length"}
        shown = {str(symbol) for symbol in symbols}
        return ", ".join(f"{s}={size} ({words[str(s)]})" for s, size in self.values().items() if str(s) in shown)

    def values(self) -> dict[sympy.Symbol, int]:
        """Symbol -> size."""
        sizes = {"N": self.rows, "R": self.wanted, "B": self.batch, "L": self.length}
        own = {CONTEXT: self.context, SEQUENCES: self.sequences}
        return {size_symbol(name): size for name, size in sizes.items()} | own


@dataclass(frozen=True)
class Estimate:
    """A cost in numbers: floating-point operations and bytes."""

    products: float
    elementwise: float
    weights: float
    activations: float
    kv: float

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.products + self.elementwise

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.weights + self.activations + self.kv


@dataclass(frozen=True)
class Cost:
    """A cost as formulas: floating-point operations and bytes."""

    products: sympy.Expr = ZERO
    """FLOPs of matrix products and attention."""
    elementwise: sympy.Expr = ZERO
    """FLOPs of everything else."""
    weights: sympy.Expr = ZERO
    """Bytes of parameters read."""
    activations: sympy.Expr = ZERO
    """Bytes of intermediate values read and written."""
    kv: sympy.Expr = ZERO
    """Bytes of keys and values read and written."""

    @property
    def flops(self) -> sympy.Expr:
        """All floating-point operations."""
        return tidy(self.products + self.elementwise)

    @property
    def bytes(self) -> sympy.Expr:
        """All bytes."""
        return tidy(self.weights + self.activations + self.kv)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def symbols(self) -> set[sympy.Symbol]:
        """The sizes that the cost depends on."""
        return set().union(*(getattr(self, part.name).free_symbols for part in fields(self)))

    def at(self, workload: Workload) -> Estimate:
        """The formulas' values for a call of these sizes."""
        values = workload.values()
        return Estimate(*(float(getattr(self, part.name).subs(values)) for part in fields(self)))

    def to_json(self) -> dict[str, str]:
        """The formulas as text."""
        parts = {part.name: str(tidy(getattr(self, part.name))) for part in fields(self)}
        return {"flops": str(self.flops), "bytes": str(self.bytes), **parts}


def tidy(formula: sympy.Expr) -> sympy.Expr:
    """The formula as a sum of products."""
    return sympy.expand(formula)


class CostModel:
    """Costs of the nodes of one function."""

    def __init__(self, function: Function) -> None:
        self.function, self.notation = function, Notation(function)
        self.known: dict[Any, Cost] = {}

    def node(self, node: fx.Node) -> Cost:
        """What one node costs. Parameters and inputs cost nothing."""
        if node.op != "call_function" or not tensors(node.meta.get("val")):
            return Cost()
        key = (node.target, str(node.args[6:]), *(self.signature(value) for value in (node, *node.all_input_nodes)))
        if key not in self.known:
            self.known[key] = self.compute(node)
        return self.known[key]

    def signature(self, node: fx.Node) -> str:
        """What a node's cost depends on in an operand."""
        return f"{node.op == 'get_attr'} {self.notation.node_type(node)}"

    def compute(self, node: fx.Node) -> Cost:
        """The cost by the operator's class."""
        kind = node_class(node.target)
        if kind in {"view", "size"}:
            return Cost()
        if node.target in ATTENTION:
            return self.attention(node)
        if node.target is graft.kv_append.default:
            return Cost(kv=self.bytes(node.args[1:3]), activations=self.bytes(node.args[1:3]))
        if kind == "gather":
            return self.gather(node)
        made, read = self.elements(node), [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
        moved = self.bytes([node]) + self.bytes(read)
        weights = self.bytes([operand for operand in node.all_input_nodes if operand.op == "get_attr"])
        if kind == "matmul" or node.target in PRODUCTS:
            inner = self.sizes(node.args[1] if node.target is aten.baddbmm.default else node.args[0])[-1]
            if node.target is graft.linear_rows.default:
                inner, weights = self.linear_rows(node)
            if node.target is graft.expert_linear.default:
                weights *= sympy.Min(1, self.elements(node.args[2]) / self.sizes(node.args[1])[0])
            bias = made if has_bias(node) else ZERO
            return Cost(products=2 * made * inner, elementwise=bias, weights=weights, activations=moved)
        work = made if kind != "reduction" else self.elements(node.args[0])
        return Cost(elementwise=work, weights=weights, activations=moved)

    def linear_rows(self, node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
        """(inner dim, bytes) of the rows and columns of parameters that are read."""
        _, parameters, biases, ranges, _, columns = (*node.args, None, None)[:6]
        inner = self.sizes(parameters[0])[-1] if columns is None else sympy.Integer(columns[1] - columns[0])
        rows = [end - start for start, end in zip(ranges[::2], ranges[1::2], strict=True)]
        size = parameters[0].meta["val"].dtype.itemsize
        return inner, size * (inner * sum(rows) + (sum(rows) if biases else 0))

    def attention(self, node: fx.Node) -> Cost:
        """Attention with a KV state, or without one over a dense batch."""
        if node.target is graft.attention.default:
            query, key, value = (self.sizes(operand) for operand in node.args[:3])
            work = 2 * query[0] * query[1] * query[2] * key[2] * (key[3] + value[3])
            return Cost(products=work, activations=self.bytes([node, *node.args[:3]]))
        state, query, value = (self.sizes(operand) for operand in (*node.args[:2], node))
        given = named_arguments(node)
        window = given.get("window", 0)
        context = sympy.Min(CONTEXT, window) if window else CONTEXT
        row = state[2] * (query[3] + value[3]) * node.args[0].meta["val"].dtype.itemsize
        if node.target is graft.kv_attend_pages.default:
            row = state[2] * far_bytes(given, int(query[3]), int(value[3]))
        return Cost(
            products=2 * query[2] * query[1] * context * (query[3] + value[3]),
            kv=SEQUENCES * context * row,
            activations=self.bytes([node, node.args[1]]),
        )

    def gather(self, node: fx.Node) -> Cost:
        """Rows of a table: of a parameter they are weights, of anything else activations."""
        moved = self.bytes([node])
        if node.args[0].op == "get_attr":
            # Rows may want the same experts, and no more is read than there is; a vocabulary is larger than any call.
            bound = node.target is aten.index.Tensor
            weights = sympy.Min(moved, self.bytes(node.args[:1])) if bound else moved
            return Cost(weights=weights, activations=moved)
        return Cost(activations=2 * moved)

    def sizes(self, node: fx.Node) -> list[Any]:
        """Sizes of the node's value as sympy expressions."""
        return [sympy.sympify(self.notation.expression(size)) for size in node.meta["val"].shape]

    def elements(self, node: fx.Node) -> sympy.Expr:
        """Elements of the node's tensors."""
        found = [ZERO]
        for tensor in tensors(node.meta.get("val")):
            found.append(sympy.prod([sympy.sympify(self.notation.expression(size)) for size in tensor.shape]))
        return sympy.Add(*found)

    def bytes(self, nodes: Iterable[fx.Node]) -> sympy.Expr:
        """Bytes of the nodes' tensors."""
        total = [ZERO]
        for node in nodes:
            for tensor in tensors(node.meta.get("val")):
                sizes = [sympy.sympify(self.notation.expression(size)) for size in tensor.shape]
                total.append(sympy.prod(sizes) * tensor.dtype.itemsize)
        return sympy.Add(*total)


def has_bias(node: fx.Node) -> bool:
    """Whether a matmul adds a bias."""
    if node.target is aten.baddbmm.default:
        return True
    if node.target is graft.expert_linear.default:
        return len(node.args) > 3 and node.args[3] is not None
    return len(node.args) > 2 and bool(node.args[2]) and node.target not in PRODUCTS


def far_bytes(given: dict[str, Any], key_dim: int, value_dim: int) -> sympy.Expr:
    """Bytes that attention over pages reads of a far token and kv head: its share of what is chosen, and its label."""
    dtype, codec = given["kv"].meta["val"].dtype, codec_of(given["codec"])
    entry = codec.page_bytes(key_dim, value_dim, dtype) if not codec.in_place else 0
    entry = entry or PAGE * (key_dim + value_dim) * dtype.itemsize
    selection = selection_of(given["selection"]) if given["selection"] else None
    if selection is None or given["layer"] < selection.dense_layers:
        return sympy.Rational(entry, PAGE)
    label = selection.label_bytes(key_dim, dtype)
    return sympy.nsimplify(selection.ratio) * sympy.Rational(entry, PAGE) + sympy.Rational(label, PAGE)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a node's value."""
    if isinstance(value, (tuple, list)):
        return [tensor for element in value for tensor in tensors(element)]
    return [value] if isinstance(value, Tensor) else []


def node_cost(function: Function, node: fx.Node) -> Cost:
    """What one node of the function costs."""
    return CostModel(function).node(node)


def function_cost(function: Function) -> Cost:
    """What one call of the function costs; a parameter that several nodes read whole is read once."""
    model = CostModel(function)
    counts: dict[Cost, int] = {}
    for node in function.graph.nodes:
        cost = model.node(node)
        counts[cost] = counts.get(cost, 0) + 1
    totals = {
        part.name: sympy.Add(*(count * getattr(cost, part.name) for cost, count in counts.items()))
        for part in fields(Cost)
        if part.name != "weights"
    }
    return Cost(**totals, weights=weights_read(function, model))


def weights_read(function: Function, model: CostModel) -> sympy.Expr:
    """Bytes of distinct storage that nodes read whole, and what gathers and chosen experts read of the rest."""
    whole: dict[int, int] = {}
    gathers = [ZERO]
    for node in function.graph.nodes:
        if node.target is graft.expert_linear.default:
            gathers.append(model.node(node).weights)
            continue
        if node.op == "call_function" and node_class(node.target) == "gather":
            gathers.append(model.node(node).weights)
            parameters = [operand for operand in node.all_input_nodes[1:] if operand.op == "get_attr"]
        else:
            parameters = [operand for operand in node.all_input_nodes if operand.op == "get_attr"]
        for operand in parameters:
            tensor = attribute(function.weights, operand.target)
            if isinstance(tensor, Tensor):
                whole[tensor.data_ptr() or id(tensor)] = tensor.nbytes  # released parameters have no place
    return sympy.Add(*gathers, sum(whole.values()))
