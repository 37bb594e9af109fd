"""The grammar of one-line specs: text to plain data, before any type is known.

arguments = [ argument { "," argument } ]
argument  = option "=" [ value ] | value      a value without a name goes on with the option before it
value     = word | string | "(" [ value { "," value } ] ")" | [ word ] "{" arguments "}"
"""

from __future__ import annotations

import json
import re
from typing import Any

from graft.compiler.errors import PlanError

POSITIONAL = ""
"""The key of the values that stand in front of the first option."""

DEEPEST = 32
"""Braces and parentheses that may be open at once."""

TOKEN = re.compile(r'\s*(?:(?P<word>[^\s,=(){}"]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[,=(){}])|(?P<end>$))')
INT = re.compile(r"[+-]?[0-9]+")
FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+|inf|nan)")
CONSTANTS = {"true": True, "false": False, "none": None}


class Items(list):
    """Values separated by commas behind an option: one value, or the elements of a tuple; its type decides."""


def read_arguments(text: str) -> dict[str, Any]:
    """Option -> Items of plain values (bool, int, float, str, None, list, and dict for a component)."""
    reader = Reader(text)
    found = reader.arguments(depth=0)
    reader.take("end")
    return found


def scalar(word: str) -> Any:
    """A bare word's value."""
    if word in CONSTANTS:
        return CONSTANTS[word]
    if INT.fullmatch(word):
        return int(word)
    return float(word) if FLOAT.fullmatch(word) else word


def scalar_text(value: Any) -> str:
    """The text that reads back as the value; strings are quoted where a bare word would mean something else."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value)
    match = TOKEN.fullmatch(text)
    bare = match is not None and match["word"] == text and text.isprintable() and isinstance(scalar(text), str)
    return text if bare else json.dumps(text)


class Reader:
    """A recursive descent over the tokens."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def peek(self) -> tuple[str, str, int]:
        """Kind, text and end of the next token."""
        match = TOKEN.match(self.text, self.at)
        if match is None:
            raise self.error("a string that ends, or a word")
        kind = str(match.lastgroup)
        return kind, match[kind], match.end()

    def take(self, *wanted: str) -> str:
        """Step over the next token, which must be one of these kinds or marks."""
        kind, text, end = self.peek()
        if kind not in wanted and text not in wanted:
            raise self.error(" or ".join(wanted))
        self.at = end
        return text

    def next_is(self, mark: str) -> bool:
        """Whether the next token is that mark."""
        kind, text, _ = self.peek()
        return kind == "mark" and text == mark

    def arguments(self, depth: int) -> dict[str, Any]:
        """Everything up to a closing brace or the end."""
        found: dict[str, Any] = {}
        current = Items()
        while self.peek()[0] != "end" and not self.next_is("}"):
            option = self.option()
            if option is not None:
                if option in found:
                    raise self.error(f"each option once, but {option!r} is there twice")
                current = found[option] = Items()
                if self.next_is(",") or self.next_is("}") or self.peek()[0] == "end":
                    self.separate()
                    continue
            elif not found:
                found[POSITIONAL] = current
            current.append(self.value(depth))
            self.separate()
        return found

    def option(self) -> str | None:
        """The name in front of an `=`, both stepped over; None where a value comes."""
        kind, text, end = self.peek()
        before = self.at
        if kind == "word":
            self.at = end
            if self.next_is("="):
                self.take("=")
                return text
            self.at = before
        return None

    def separate(self) -> None:
        """A comma with something behind it, or the end of the arguments."""
        if self.next_is(","):
            self.take(",")
            kind, _, _ = self.peek()
            if kind == "end" or self.next_is("}"):
                raise self.error("a value after the comma")
        elif not self.next_is("}"):
            self.check_end()

    def check_end(self) -> None:
        if self.peek()[0] != "end":
            raise self.error(", or }")

    def value(self, depth: int) -> Any:
        """One value."""
        if depth > DEEPEST:
            raise self.error(f"at most {DEEPEST} braces and parentheses open at once")
        if self.next_is("("):
            return self.group(depth)
        if self.next_is("{"):
            return self.braces(depth)
        kind, text, _ = self.peek()
        self.take("word", "string")
        if kind == "string":
            try:
                return json.loads(text)
            except json.JSONDecodeError as error:
                raise self.error(f"a string with JSON's escapes ({error.msg})") from error
        return {"name": text} | self.braces(depth) if self.next_is("{") else scalar(text)

    def braces(self, depth: int) -> dict[str, Any]:
        """Arguments in braces."""
        self.take("{")
        found = self.arguments(depth + 1)
        self.take("}")
        return found

    def group(self, depth: int) -> list[Any]:
        """Values in parentheses."""
        self.take("(")
        found: list[Any] = []
        while not self.next_is(")"):
            found.append(self.value(depth + 1))
            if not self.next_is(")"):
                self.take(",")
        self.take(")")
        return found

    def error(self, expected: str) -> PlanError:
        """What was expected where the reader stands."""
        start = len(self.text) - len(self.text[self.at :].lstrip())
        found = self.text[start : start + 20] or "the end"
        return PlanError(
            "a spec cannot be read", expected=expected, found=found, where=f"character {start + 1} of {self.text!r}"
        )
