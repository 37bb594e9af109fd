"""What passes transform: named functions, the state between their calls, and the host program that calls them."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx, nn

from graft.compiler.errors import GraftError
from graft.compiler.kv.codecs import PAGE
from graft.compiler.kv.layout import Pages
from graft.compiler.shapes import Fakes, derive, storage_bytes

if TYPE_CHECKING:
    from graft.compiler.cost import Cost
    from graft.compiler.diff import Diff
    from graft.compiler.draw import Drawing
    from graft.compiler.explain import Explanation


@dataclass(frozen=True)
class Input:
    """One input of a function: sizes are numbers or the names of symbols (see shapes.EXAMPLE_SIZES)."""

    name: str
    sizes: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class KVState:
    """A KV cache: one tensor [layers, slots, kv heads, capacity, width] in the model's dtype, a token's key, value and
    perhaps the queries of the kv head's group side by side.

    Attention nodes that share kv heads and dims share one state; `layers` counts those nodes, in graph order. With
    `pages` the tensor holds the tail of each text; what lies in front of it is read from `far_inputs`.
    """

    name: str
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    query_dim: int = 0
    """Numbers of the queries that are kept with a token, of all query heads of the group; 0 where none are."""
    scale: float = 0.0
    """What attention multiplies scores with, where queries are kept."""
    pages: Pages | None = None
    """How tokens are kept that are no longer in the tail; None where all of them are."""

    @property
    def width(self) -> int:
        """Numbers that the tensor holds of a token and kv head."""
        return self.key_dim + self.value_dim + self.query_dim

    @property
    def input(self) -> Input:
        """The state as a function's input, which it also returns."""
        return Input(self.name, (self.layers, "S", self.heads, "C", self.width), self.dtype)

    @property
    def far_inputs(self) -> tuple[Input, ...]:
        """What a function only reads of a state with pages: tail tokens of each slot and the first of them that counts
        as such, pages, the number of each page, entries in pages, and with a selection labels and their channels."""
        if self.pages is None:
            return ()
        selection, per_head = self.pages.selection, (self.layers, "S", self.heads)
        found = [
            Input(f"{self.name}_lengths", ("S",), torch.int64),
            Input(f"{self.name}_starts", ("S",), torch.int64),
            Input(f"{self.name}_pages", ("G", self.page_bytes), torch.uint8),
            Input(f"{self.name}_table", (*per_head, "P"), torch.int32),
            Input(f"{self.name}_counts", per_head, torch.int32),
        ]
        if selection is not None:
            found.append(Input(f"{self.name}_labels", ("G", self.label_bytes), torch.uint8))
            found.append(Input(f"{self.name}_channels", (*per_head, selection.width(self.key_dim)), torch.int64))
        return tuple(found)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: 64 entries of one layer and kv head."""
        return self.pages.codec.page_bytes(self.key_dim, self.value_dim, self.dtype) if self.pages else 0

    @property
    def label_bytes(self) -> int:
        """Bytes of a page's labels."""
        selection = self.pages.selection if self.pages else None
        return selection.label_bytes(self.key_dim, self.dtype) if selection else 0

    @property
    def tail_bytes_per_token(self) -> int:
        """Bytes that a token of one sequence takes in the tensor."""
        return self.layers * self.heads * self.width * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sequence takes in this state, once it is far where that makes a difference."""
        if self.pages is None:
            return self.tail_bytes_per_token
        stays = self.tail_bytes_per_token if self.pages.codec.in_place else 0
        page = self.layers * self.heads * (self.page_bytes + self.label_bytes + PAGE_NUMBER) / PAGE
        return stays + page * (self.pages.eviction.ratio if self.pages.eviction else 1)


PAGE_NUMBER = 4
"""Bytes of a page's number in the table."""

DENSE = (Input("tokens", ("B", "L"), torch.int64), Input("positions", ("B", "L"), torch.int64))
"""Inputs as captured: a dense batch of whole sequences. Outputs: logits [B, L, vocabulary], hidden [B, L, width]."""

FLAT = (
    Input("tokens", ("N",), torch.int64),
    Input("positions", ("N",), torch.int64),
    Input("sequences", ("N",), torch.int64),
    Input("parents", ("N",), torch.int64),
    Input("lengths", ("S",), torch.int64),
    Input("wanted", ("R",), torch.int64),
)
"""Inputs of a function on flat ragged rows, followed by its states. For each of N rows: token, logical position, slot,
and index in this call of the row before it (-1: committed or none). For each of S slots: committed tokens. For each
of R results: the row whose logits are wanted. Outputs: logits [R, vocabulary], hidden [N, width], the next states.
A function that drafts has these inputs and then more of its own with a value for each row, such as a hidden state
("N", width) or an earlier token ("N",); what it calls logits and hidden is its own business."""


@dataclass(frozen=True)
class KernelRecord:
    """One kernel that a function was lowered to."""

    name: str
    """Of its code; kernels that are equal but for their operands share it."""
    nodes: tuple[str, ...]
    """The nodes that it computes."""
    cost: Cost
    """Bytes that it has to move, and floating-point operations."""
    reason: str = ""
    """Why ATen runs it, where no kernel of ours does."""
    guard: str = ""
    """The mask that decides whether it runs at all, e.g. "some gt_3" or "not all gt_3"; empty where it always does."""


class StepSeconds(Protocol):
    """Predicted times of a function's calls."""

    def seconds(self, rows: int, context: int) -> float:
        """Seconds of a call over `rows` rows of one sequence with `context` tokens behind them."""


class Lowered(Protocol):
    """What a function shows of the code that runs it (codegen.executable.Executable has more)."""

    @property
    def prediction(self) -> StepSeconds | None:
        """How long calls take on this machine; None where that cannot be predicted."""

    @property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """What it runs, in order."""

    @property
    def source(self) -> str:
        """The code."""


@dataclass
class Function:
    """One fx graph in canonical form with a name and a signature, straight-line but for torch.cond."""

    name: str
    graph: fx.Graph
    weights: nn.Module
    """Holds the parameters that get_attr nodes name; shared by all functions of a program."""
    inputs: tuple[Input, ...]
    states: tuple[KVState, ...] = ()
    draft_vocabulary: str = ""
    """Where the logits are over a choice of the target's tokens: path of the int64 buffer that says which, in order."""
    lowered: Lowered | None = field(default=None, repr=False)
    """The code that runs it, once there is some. A copy, which a pass may change, has none."""
    fakes: Fakes | None = field(default=None, repr=False)
    """What fake values were made with last; a copy goes on with them."""

    @property
    def flat(self) -> bool:
        """Whether it runs on flat ragged rows with KV states, rather than on a dense batch without a cache."""
        return self.inputs[0].sizes == ("N",)

    @property
    def row_inputs(self) -> tuple[Input, ...]:
        """Inputs of a flat function beyond those of FLAT, with a value for each row."""
        return self.inputs[len(FLAT) :]

    @property
    def signature(self) -> tuple[Input, ...]:
        """Everything it is called with, in order: inputs, states, and what it only reads of states with pages."""
        far = (spec for state in self.states for spec in state.far_inputs)
        return (*self.inputs, *(state.input for state in self.states), *far)

    @property
    def kernels(self) -> tuple[KernelRecord, ...]:
        """What it was lowered to, in order; empty before that, and where ATen runs all of it."""
        return self.lowered.kernels if self.lowered else ()

    @property
    def source(self) -> str:
        """The code that runs it; empty before it was lowered."""
        return self.lowered.source if self.lowered else ""

    @property
    def output(self) -> fx.Node:
        """The output node; its arguments are logits, hidden states, then the next states."""
        return self.graph.output_node()

    def placeholder(self, name: str) -> fx.Node:
        """The input node of that name."""
        return next(node for node in self.graph.nodes if node.op == "placeholder" and node.name == name)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; those that were given up for packed ones do not count."""
        held = (parameter.device for parameter in self.weights.parameters() if not parameter.is_meta)
        return next(held, torch.device("cpu"))

    def module(self) -> fx.GraphModule:
        """A module that runs the function with the operators' reference meaning. It owns a copy of the graph: a module
        checks its own graph's parameters against itself, which would refuse those that later passes add."""
        return fx.GraphModule(self.weights, copy.deepcopy(self.graph))

    def run(self, *values: Any) -> Any:
        """What the function gives for values of its signature, node by node with the operators' reference meaning."""
        return fx.Interpreter(self.weights, graph=self.graph).run(*values)

    def fake_inputs(self) -> tuple[dict[str, Any], Fakes]:
        """A fake value for each input and state by name, and what they were made with."""
        fakes = self.fakes
        if fakes is None or not fakes.intact or fakes.device != self.device:
            self.fakes = fakes = Fakes(self.device)
        return {spec.name: fakes.tensor(spec.sizes, spec.dtype) for spec in self.signature}, fakes

    def derive(self) -> None:
        """Derive every node's fake value afresh from the signature."""
        for node, value in derive(self.graph, self.weights, *self.fake_inputs()).items():
            node.meta["val"] = value

    def copy(self) -> Function:
        """The same function over a copied graph; parameters are shared."""
        graph = copy.deepcopy(self.graph)
        return Function(
            self.name, graph, self.weights, self.inputs, self.states, self.draft_vocabulary, fakes=self.fakes
        )

    def __str__(self) -> str:
        """The listing, identical layers folded; compiler.listing.list_function prints it in full."""
        from graft.compiler.listing import list_function

        return list_function(self)

    __repr__ = __str__

    def draw(self, full: bool = False) -> Drawing:
        """The function as graphviz text, and as SVG where the program `dot` is installed."""
        from graft.compiler.draw import draw_function

        return draw_function(self, full=full)

    def to_json(self) -> dict[str, Any]:
        """The function as plain dicts and lists."""
        from graft.compiler.as_json import function_json

        return function_json(self)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    contract: str
    matches: int
    seconds: float
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    """Bytes of the parameters that the program reads, before and after."""
    check: str
    """The outcome of the numeric check, e.g. "max |logit difference| 2.4e-07" or "KL 0.031 nats on ..."."""
    notes: tuple[str, ...] = ()


@dataclass
class Program:
    """Functions by name, the host program, and the history of passes with a snapshot after each."""

    functions: dict[str, Function]
    host: Any = None
    """A compiler.host.Host: the control flow between the functions."""
    records: list[PassRecord] = field(default_factory=list)
    snapshots: MutableMapping[str, Program] = field(default_factory=dict)
    """Pass name -> the program after it; a pass that ran twice has "name", "name#2", ..."""

    def __getitem__(self, name: str) -> Function:
        if name not in self.functions:
            raise GraftError(
                "the program has no such function", found=name, expected=", ".join(self.functions) or "none"
            )
        return self.functions[name]

    def copy(self) -> Program:
        """A copy that a pass may change: functions copied, parameters shared, history left behind."""
        return Program({name: function.copy() for name, function in self.functions.items()}, self.host)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters and constants that the functions read, by name; tied ones appear under each name used."""
        from graft.compiler.shapes import attribute

        return {
            node.target: attribute(function.weights, node.target)
            for function in self.functions.values()
            for node in function.graph.nodes
            if node.op == "get_attr" and node.users
        }

    @property
    def parameter_bytes(self) -> int:
        """Bytes of distinct storage behind `parameters()`."""
        return storage_bytes(self.parameters().values())

    @property
    def node_count(self) -> int:
        """call_function nodes of all functions."""
        return sum(node.op == "call_function" for f in self.functions.values() for node in f.graph.nodes)

    def __str__(self) -> str:
        """The history of passes, the listing of every function, and the host program."""
        from graft.compiler.listing import list_program

        return list_program(self)

    __repr__ = __str__

    def diff(self, before: str, after: str | None = None) -> Diff:
        """What changed between two snapshots ("capture" or names of passes), or since one of them; str() shows it."""
        from graft.compiler.diff import diff_snapshots

        return diff_snapshots(self, before, after)

    def explain(self, name: str, function: str | None = None) -> Explanation:
        """Everything known about a node or a parameter; str() shows it."""
        from graft.compiler.explain import explain_node

        return explain_node(self, name, function)

    def to_json(self) -> dict[str, Any]:
        """The program as plain dicts and lists."""
        from graft.compiler.as_json import program_json

        return program_json(self)
