"""The host program: the control flow between a program's functions, as data that prints as the Python that runs.

    def generate(requests):
        while active(requests):
            trees = draft(requests)
            rows = lay_out(requests, trees)
            logits = forward(rows)
            outcomes = verify(requests, logits, trees)
            commit(requests, outcomes)

`Host.load` compiles exactly the text that `print(host)` shows; there is no second loop.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.compiler.errors import CheckError

INDENT = "    "

PRIMITIVES: dict[str, str] = {
    "active": "active(requests) -> bool: whether a request is unfinished",
    "draft": "draft(requests) -> trees: a draft tree for every request that is past its prompt",
    "lay_out": "lay_out(requests[, trees]) -> rows: the next prompt chunks, and root and tree of the other requests",
    "verify": "verify(requests, logits[, trees[, scores]]) -> outcomes: each request's accepted path, the token behind",
    "commit": "commit(requests, outcomes): keep what was accepted in text and KV cache; close what is finished",
}
"""What the runtime provides beside the program's functions, each with its meaning."""


SCORES = "scores"
"""Name of what a function says of rows for verification."""


@dataclass(frozen=True)
class Call:
    """`outputs = function(arguments)`; all are names."""

    function: str
    arguments: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        call = f"{self.function}({', '.join(self.arguments)})"
        return f"{', '.join(self.outputs)} = {call}" if self.outputs else call


@dataclass(frozen=True)
class While:
    """Run the body as long as the call returns something true."""

    condition: Call
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class If:
    """Run one of two bodies, as the call returns something true or not."""

    condition: Call
    body: tuple[Statement, ...]
    orelse: tuple[Statement, ...] = ()


Statement = Call | While | If


@dataclass(frozen=True)
class Host:
    """One function of statements; immutable, so that programs share it."""

    body: tuple[Statement, ...]
    name: str = "generate"
    parameters: tuple[str, ...] = ("requests",)

    def __str__(self) -> str:
        lines = [f"def {self.name}({', '.join(self.parameters)}):", *print_body(self.body, 1)]
        return "\n".join(lines) + "\n"

    @property
    def calls(self) -> list[str]:
        """The names that are called, in order of first appearance."""
        return list(dict.fromkeys(call.function for call in all_calls(self.body)))

    @property
    def scoring(self) -> str | None:
        """The function that scores rows for verification (`scored_host`), if there is one."""
        return next((call.function for call in all_calls(self.body) if call.outputs == (SCORES,)), None)

    def check(self, functions: Collection[str], primitives: Collection[str] = PRIMITIVES) -> None:
        """Raise CheckError unless every name is a name, every call has a target and every argument a value."""
        for word in (self.name, *self.parameters):
            check_name(word, self.name)
        known = {*functions, *primitives, *exit_questions(functions).values()}
        for call in all_calls(self.body):
            for word in (call.function, *call.arguments, *call.outputs):
                check_name(word, str(call))
            if call.function not in known:
                raise CheckError(
                    "the host program calls what does not exist",
                    expected=f"a function of the program ({', '.join(functions) or 'none'}) "
                    f"or a primitive ({', '.join(primitives)})",
                    found=call.function,
                    where=str(call),
                )
            if shadowed := known.intersection(call.outputs):
                raise CheckError("the host program assigns to a function", found=", ".join(shadowed), where=str(call))
        check_defined(self.body, frozenset(self.parameters))

    def load(self, namespace: Mapping[str, Callable[..., Any]]) -> Callable[..., None]:
        """The printed text as a function that calls what the namespace holds; checks it first."""
        self.check(namespace, ())
        scope: dict[str, Any] = {"__builtins__": {}, **namespace}
        exec(compile(str(self), f"<host program {self.name}>", "exec"), scope)
        loaded: Callable[..., None] = scope[self.name]
        return loaded


def plain_host() -> Host:
    """One token per step and request."""
    step = (
        Call("lay_out", ("requests",), ("rows",)),
        Call("forward", ("rows",), ("logits",)),
        Call("verify", ("requests", "logits"), ("outcomes",)),
        Call("commit", ("requests", "outcomes")),
    )
    return Host((While(Call("active", ("requests",)), step),))


def speculative_host() -> Host:
    """One draft tree per step and request, verified by one call of the target."""
    step = (
        Call("draft", ("requests",), ("trees",)),
        Call("lay_out", ("requests", "trees"), ("rows",)),
        Call("forward", ("rows",), ("logits",)),
        Call("verify", ("requests", "logits", "trees"), ("outcomes",)),
        Call("commit", ("requests", "outcomes")),
    )
    return Host((While(Call("active", ("requests",)), step),))


def split_host(layers: Sequence[int]) -> Host:
    """As `speculative_host`, the target cut in two behind one of these layers: a step runs the layers below for the
    rows that the draft has not run, then the layers above for all rows. With several layers the draft says which."""
    below = [
        (Call(f"shallow_{layer}", ("rows",), ("hidden",)), Call(f"deep_{layer}", ("rows", "hidden"), ("logits",)))
        for layer in layers
    ]
    chosen: tuple[Statement, ...] = below[-1]
    for layer, calls in reversed(list(zip(layers[:-1], below, strict=False))):
        chosen = (If(Call(f"exit_{layer}", ("requests",)), calls, chosen),)
    step = (
        Call("draft", ("requests",), ("trees",)),
        Call("lay_out", ("requests", "trees"), ("rows",)),
        *chosen,
        Call("verify", ("requests", "logits", "trees"), ("outcomes",)),
        Call("commit", ("requests", "outcomes")),
    )
    return Host((While(Call("active", ("requests",)), step),))


def scored_host(host: Host, function: str) -> Host:
    """The host program with `scores = function(rows)` in front of verification, which reads them."""

    def scored(body: tuple[Statement, ...]) -> Iterator[Statement]:
        for statement in body:
            match statement:
                case Call("verify", arguments, outputs):
                    yield Call(function, ("rows",), (SCORES,))
                    yield Call("verify", (*arguments, SCORES), outputs)
                case While(condition, inner):
                    yield While(condition, tuple(scored(inner)))
                case If(condition, inner, orelse):
                    yield If(condition, tuple(scored(inner)), tuple(scored(orelse)))
                case _:
                    yield statement

    return Host(tuple(scored(host.body)), host.name, host.parameters)


def exit_questions(functions: Collection[str]) -> dict[int, str]:
    """Layer -> the primitive that tells whether the draft left there, for every exit that the functions have."""
    layers = [name.removeprefix("shallow_") for name in functions if name.startswith("shallow_")]
    return {int(layer): f"exit_{layer}" for layer in layers if layer.isdecimal()}


def print_body(body: tuple[Statement, ...], depth: int) -> Iterator[str]:
    """The lines of some statements."""
    indent = INDENT * depth
    if not body:
        yield f"{indent}pass"
    for statement in body:
        match statement:
            case Call():
                yield f"{indent}{statement}"
            case While(condition, inner):
                yield f"{indent}while {condition}:"
                yield from print_body(inner, depth + 1)
            case If(condition, inner, orelse):
                yield f"{indent}if {condition}:"
                yield from print_body(inner, depth + 1)
                if orelse:
                    yield f"{indent}else:"
                    yield from print_body(orelse, depth + 1)


def all_calls(body: tuple[Statement, ...]) -> Iterator[Call]:
    """Every call, in the order of the text."""
    for statement in body:
        match statement:
            case Call():
                yield statement
            case While(condition, inner):
                yield condition
                yield from all_calls(inner)
            case If(condition, inner, orelse):
                yield condition
                yield from all_calls(inner)
                yield from all_calls(orelse)


def check_name(word: str, where: str) -> None:
    """Raise CheckError unless it is a name; the text is executed, so nothing else may reach it."""
    if not word.isidentifier() or keyword.iskeyword(word) or word.startswith("__"):
        raise CheckError("the host program holds only names", expected="a Python identifier", found=word, where=where)


def check_defined(body: tuple[Statement, ...], defined: frozenset[str]) -> frozenset[str]:
    """The names that surely hold a value after `body`; raises CheckError where a call reads one that may not."""
    for statement in body:
        call = statement if isinstance(statement, Call) else statement.condition
        if missing := [name for name in call.arguments if name not in defined]:
            raise CheckError(
                "the host program reads a name before it has a value",
                expected=", ".join(sorted(defined)) or "none",
                found=", ".join(missing),
                where=str(call),
            )
        if call.outputs and not isinstance(statement, Call):
            raise CheckError("a condition assigns nothing", found=str(call), where="host program")
        match statement:
            case Call(outputs=outputs):
                defined |= frozenset(outputs)
            case While(_, inner):
                check_defined(inner, defined)
            case If(_, inner, orelse):
                defined |= check_defined(inner, defined) & check_defined(orelse, defined)
    return defined
