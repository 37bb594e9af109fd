"""A program as plain data that JSON holds, and back: functions, the host program, the history of passes.

Parameters are not in it: a function is read over a module that holds them, or stand-ins without storage, at the same
paths. What is read is derived and checked like what a pass leaves; data that is not right raises SaveError, and
nothing of it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.compiler.checker import check, derived_values
from graft.compiler.errors import CheckError, GraftError, SaveError
from graft.compiler.host import PRIMITIVES, Call, Host, If, Statement, While
from graft.compiler.kv.layout import Pages
from graft.compiler.program import Function, Input, KVState, PassRecord, Program
from graft.compiler.serial_graph import graph_data, graph_from, take, texts
from graft.compiler.shapes import EXAMPLE_SIZES, attribute
from graft.compiler.spec import parse_arguments, show_arguments

NUMBERS = ("layers", "heads", "key_dim", "value_dim")
"""Fields of a KV state that are numbers."""

DEEPEST_HOST = 32
"""Loops and branches that the host program may have inside each other."""


class Snapshots(MutableMapping[str, Program]):
    """Programs by name that are made when they are first asked for: reading them all takes longer than the program."""

    def __init__(self, makers: dict[str, Callable[[], Program]]) -> None:
        self.makers = makers
        self.made: dict[str, Program] = {}

    def __getitem__(self, name: str) -> Program:
        if name not in self.made:
            self.made[name] = self.makers[name]()
        return self.made[name]

    def __setitem__(self, name: str, program: Program) -> None:
        self.makers[name] = lambda: program
        self.made[name] = program

    def __delitem__(self, name: str) -> None:
        del self.makers[name]
        self.made.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def program_data(program: Program) -> dict[str, Any]:
    """The program without its snapshots. Raises SaveError for what cannot be written down."""
    return {
        "functions": [function_data(function) for function in program.functions.values()],
        "host": None if program.host is None else host_data(program.host),
        "passes": [dataclasses.asdict(record) | {"notes": list(record.notes)} for record in program.records],
    }


def program_from(data: Any, weights: nn.Module) -> Program:
    """The program that `program_data` gave, derived and checked."""
    functions = [function_read(one, weights) for one in take(data, "functions", list, "program")]
    program = Program({function.name: function for function in functions})
    program.host = host_from(data.get("host"), program)
    program.records = [record_from(one) for one in take(data, "passes", list, "program")]
    derived = {}
    for function in functions:
        with reading(function.name):
            derived[function.name] = derived_values(function)
        for node, value in derived[function.name][0].items():
            node.meta["val"] = value
    try:
        check(program, derived=derived)
    except CheckError as error:
        raise SaveError(
            f"a saved program is not well formed: {error.problem}",
            expected=error.expected,
            found=error.found,
            where=error.where,
        ) from error
    return program


def history_data(program: Program) -> dict[str, Any]:
    """The program's snapshots. Functions that several of them share are written once, those of the program not at
    all: a number is a place in "functions", a name one of the program's."""
    numbers: dict[int, Any] = {id(function): name for name, function in program.functions.items()}
    functions: list[Any] = []
    snapshots: dict[str, Any] = {}
    for name, snapshot in program.snapshots.items():
        for function in snapshot.functions.values():
            if id(function) not in numbers:
                numbers[id(function)] = len(functions)
                functions.append(function_data(function))
        found = {key: numbers[id(function)] for key, function in snapshot.functions.items()}
        snapshots[name] = {"functions": found, "host": None if snapshot.host is None else host_data(snapshot.host)}
    return {"functions": functions, "snapshots": snapshots}


def history_from(data: Any, program: Program) -> Snapshots:
    """The snapshots that `history_data` gave, each read when it is asked for; `program` is the one they belong to."""
    weights = next(iter(program.functions.values())).weights
    functions, now = take(data, "functions", list, "history"), dict(program.functions)
    known: dict[int, Function] = {}

    def one(number: Any, where: str) -> Function:
        if isinstance(number, str) and number in now:
            return now[number]
        if not isinstance(number, int) or not 0 <= number < len(functions):
            raise SaveError("a snapshot names a function that there is not", found=number, where=where)
        if number not in known:
            known[number] = function_from(functions[number], weights)
        return known[number]

    def maker(name: str, snapshot: Any) -> Callable[[], Program]:
        where = f"snapshot {name}"
        found = take(snapshot, "functions", dict, where)

        def make() -> Program:
            made = Program({key: one(number, where) for key, number in found.items()})
            made.host = host_from(snapshot.get("host"), None)
            return made

        return make

    return Snapshots({name: maker(name, one) for name, one in take(data, "snapshots", dict, "history").items()})


def function_data(function: Function) -> dict[str, Any]:
    """One function."""
    return {
        "name": function.name,
        "inputs": [{"name": i.name, "sizes": list(i.sizes), "dtype": dtype_name(i.dtype)} for i in function.inputs],
        "states": [state_data(state) for state in function.states],
        "draft_vocabulary": function.draft_vocabulary,
        "nodes": graph_data(function.graph),
    }


def state_data(state: KVState) -> dict[str, Any]:
    """One KV state."""
    numbers = {key: getattr(state, key) for key in (*NUMBERS, "query_dim")}
    pages = show_arguments(state.pages) if state.pages else None
    return {"name": state.name, **numbers, "dtype": dtype_name(state.dtype), "scale": state.scale, "pages": pages}


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """What deriving a function raises is the fault of its data."""
    try:
        yield
    except Exception as error:
        found = error.found if isinstance(error, GraftError) else f"{type(error).__name__}: {error!s:.200}"
        problem = f": {error.problem}" if isinstance(error, GraftError) else ""
        raise SaveError(
            f"a saved function is not well formed{problem}", found=found, where=f"function {name}"
        ) from error


def function_from(data: Any, weights: nn.Module) -> Function:
    """One function over these parameters, derived but not checked: what was captured is not in canonical form yet."""
    function = function_read(data, weights)
    with reading(function.name):
        function.derive()
    return function


def function_read(data: Any, weights: nn.Module) -> Function:
    """One function, without values."""
    name = take(data, "name", str, "function")
    where = f"function {name}"
    inputs = tuple(input_from(one, where) for one in take(data, "inputs", list, where))
    states = tuple(state_from(one, where) for one in take(data, "states", list, where))
    graph = graph_from(take(data, "nodes", list, where), where)
    chosen = take(data, "draft_vocabulary", str, where)
    if chosen:
        check_chosen(weights, chosen, where)
    return Function(name, graph, weights, inputs, states, chosen)


def check_chosen(weights: nn.Module, path: str, where: str) -> None:
    """Raise SaveError unless there is an int64 vector at the path."""
    try:
        found = attribute(weights, path)
    except AttributeError as error:
        raise SaveError("a draft vocabulary is missing", found=path, where=where) from error
    if not isinstance(found, Tensor) or found.dtype != torch.int64 or found.dim() != 1:
        raise SaveError("a draft vocabulary is no list of tokens", expected="int64 [v]", found=path, where=where)


def input_from(data: Any, where: str) -> Input:
    """One input."""
    name, sizes = take(data, "name", str, where), take(data, "sizes", list, where)
    if not all(size in EXAMPLE_SIZES if isinstance(size, str) else type(size) is int and size > 0 for size in sizes):
        raise SaveError(
            "an input has sizes that there are not",
            expected=f"numbers, or {', '.join(EXAMPLE_SIZES)}",
            found=sizes,
            where=f"{where}, input {name}",
        )
    return Input(name, tuple(sizes), dtype_from(take(data, "dtype", str, where), where))


def state_from(data: Any, where: str) -> KVState:
    """One KV state."""
    numbers = {key: take(data, key, int, where) for key in NUMBERS}
    if min(numbers.values()) < 1:
        raise SaveError("a KV state has sizes that there are not", expected="at least 1", found=numbers, where=where)
    dtype = dtype_from(take(data, "dtype", str, where), where)
    numbers["query_dim"], pages = take(data, "query_dim", int, where), data.get("pages")
    scale = take(data, "scale", float, where)
    layout = parse_arguments(pages, Pages) if isinstance(pages, str) else None
    return KVState(take(data, "name", str, where), **numbers, dtype=dtype, scale=scale, pages=layout)


def record_from(data: Any) -> PassRecord:
    """What a pass did."""
    where = f"pass {take(data, 'name', str, 'history of passes')}"
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
    plain = [field for field in dataclasses.fields(PassRecord) if field.name != "notes"]
    values = {field.name: take(data, field.name, kinds[str(field.type)], where) for field in plain}
    return PassRecord(**values, notes=texts(take(data, "notes", list, where), where))


def host_data(host: Host) -> dict[str, Any]:
    """The host program."""
    return {"name": host.name, "parameters": list(host.parameters), "body": body_data(host.body)}


def body_data(body: tuple[Statement, ...]) -> list[dict[str, Any]]:
    """Some of its statements."""
    found: list[dict[str, Any]] = []
    for statement in body:
        match statement:
            case Call():
                found.append(call_data(statement))
            case While(condition, inner):
                found.append({"while": call_data(condition), "body": body_data(inner)})
            case If(condition, inner, orelse):
                found.append({"if": call_data(condition), "body": body_data(inner), "else": body_data(orelse)})
    return found


def call_data(call: Call) -> dict[str, Any]:
    """One call."""
    return {"call": call.function, "arguments": list(call.arguments), "outputs": list(call.outputs)}


def host_from(data: Any, program: Program | None) -> Host | None:
    """The host program, checked against the functions of `program` where one is given."""
    if data is None:
        return None
    where = "host program"
    parameters = texts(take(data, "parameters", list, where), where)
    host = Host(body_from(take(data, "body", list, where)), take(data, "name", str, where), parameters)
    if program is not None:
        try:
            host.check(program.functions, PRIMITIVES)
        except CheckError as error:
            raise SaveError(
                f"a saved host program is not right: {error.problem}", found=error.found, where=where
            ) from error
    return host


def body_from(data: list[Any], depth: int = 0) -> tuple[Statement, ...]:
    """Statements."""
    where = "host program"
    if depth > DEEPEST_HOST:
        raise SaveError("a saved host program is nested too deep", expected=f"at most {DEEPEST_HOST}", where=where)
    found: list[Statement] = []
    for one in data:
        if isinstance(one, dict) and "while" in one:
            found.append(While(call_from(one["while"]), body_from(take(one, "body", list, where), depth + 1)))
        elif isinstance(one, dict) and "if" in one:
            bodies = (body_from(take(one, key, list, where), depth + 1) for key in ("body", "else"))
            found.append(If(call_from(one["if"]), *bodies))
        else:
            found.append(call_from(one))
    return tuple(found)


def call_from(data: Any) -> Call:
    """One call."""
    where = "host program"
    lists = (texts(take(data, key, list, where), where) for key in ("arguments", "outputs"))
    return Call(take(data, "call", str, where), *lists)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_from(name: str, where: str) -> torch.dtype:
    """The dtype of that name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise SaveError("there is no such dtype", found=name, where=where)
    return found
