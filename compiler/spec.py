"""Components as text and as plain data, both ways, by the types of their fields.

A component (pass, drafter, tree policy, verifier, controller) is a frozen dataclass; its fields are its options. As
text it is `skip-ffn{similarity=0.98,layers=1,2}`, with the options that are not at their default; components nest:
`self-draft{passes=early-exit{layer=12},layer-parallel{group=4}}`. Values in front of the first `=` fill the first
options in order, so `early-exit{12}` is the same as `early-exit{layer=12}`. As plain data it is a dict with its name
under "name" and its options beside it, which is what TOML holds.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from graft.compiler import registry
from graft.compiler.errors import PlanError
from graft.compiler.passing import spec_name
from graft.compiler.spec_text import POSITIONAL, Items, read_arguments, scalar_text

NAME = "name"
"""The key of a component's name in plain data; so no option can be called that."""


def show(component: Any) -> str:
    """The component as text: its name, and in braces the options that are not at their default."""
    arguments = show_arguments(component)
    name = spec_name(type(component).__name__) if is_named(type(component)) else ""
    return f"{name}{{{arguments}}}" if arguments or not name else name


def show_arguments(component: Any) -> str:
    """The options that are not at their default, as text."""
    values = ((field.name, getattr(component, field.name)) for field in changed_fields(component))
    return ",".join(f"{name}={show_value(value, top=True)}" for name, value in values)


def show_value(value: Any, top: bool = False) -> str:
    """One value; the elements of a tuple stand bare behind their option's name and in parentheses elsewhere."""
    if dataclasses.is_dataclass(value):
        return show(value)
    if isinstance(value, (tuple, list)):
        elements = ",".join(show_value(element) for element in value)
        return elements if top else f"({elements})"
    return scalar_text(writable(value))


def parse(text: str, base: type) -> Any:
    """The component of kind `base` that the text describes. Raises PlanError."""
    (items,) = read_arguments(f"component={text}").values()
    return conform(items, base, repr(text))


def parse_arguments(text: str, cls: type) -> Any:
    """The dataclass `cls` with the options that the text gives. Raises PlanError."""
    return build(cls, read_arguments(text), spec_name(cls.__name__))


def to_plain(value: Any) -> Any:
    """A component as a dict, a tuple as a list; scalars as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = {NAME: spec_name(type(value).__name__)} if is_named(type(value)) else {}
        return name | {field.name: to_plain(getattr(value, field.name)) for field in changed_fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(element) for element in value]
    return str(value) if isinstance(value, Path) else writable(value)


def writable(value: Any) -> Any:
    """The value, if it can be written down. Raises PlanError for an object that lives in this process alone."""
    if value is None or isinstance(value, (bool, int, float, str, dict)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise PlanError(
        "a plan that holds an object of this process cannot be written down",
        expected="text, numbers and components",
        found=type(value).__name__,
        remedy="keep such a plan as Python",
    )


def conformed(component: Any) -> Any:
    """The component with every option brought to its declared type: a list to a tuple, an int to a float.

    Raises PlanError naming the option, what was expected and what was found.
    """
    cls = type(component)
    registry.check_class(cls)
    name, values = spec_name(cls.__name__), {}
    for field, kind in options(cls):
        value = getattr(component, field.name)
        new = conform(value, kind, f"{name}.{field.name}")
        if new is not value:
            values[field.name] = new
    return dataclasses.replace(component, **values) if values else component


def build(cls: type, given: dict[str, Any], where: str) -> Any:
    """The dataclass `cls` from its options as plain data."""
    known = {field.name: kind for field, kind in options(cls)}
    given = dict(given)
    positional = given.pop(POSITIONAL, Items())
    given |= place(positional, known, given, where)
    for name in given:
        if name not in known:
            raise PlanError(
                f"{where} has no option {name!r}",
                expected=registry.nearest(name, known) if known else "no options",
                found=name,
                where=where,
            )
    missing = [field.name for field, _ in options(cls) if is_required(field) and field.name not in given]
    if missing:
        raise PlanError(f"{where} lacks an option", expected=", ".join(missing), where=where)
    return cls(**{name: conform(value, known[name], f"{where}.{name}") for name, value in given.items()})


def place(positional: Items, known: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    """The values that stand in front of the first `=`, under the names of the first options."""
    if not positional:
        return {}
    if known and is_tuple(next(iter(known.values()))):
        placed: dict[str, Any] = {next(iter(known)): positional}
    else:
        placed = dict(zip(known, positional, strict=False))
    if not any(value is positional for value in placed.values()) and len(positional) > len(known):
        raise PlanError(
            f"{where} has too many values", expected=f"at most {len(known)}", found=len(positional), where=where
        )
    twice = sorted(placed.keys() & given.keys())
    if twice:
        raise PlanError(f"{where} is given an option twice", found=", ".join(twice), where=where)
    return placed


def options(cls: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    """The fields of a component with their resolved types."""
    try:
        kinds = typing.get_type_hints(cls)
    except NameError as error:
        raise PlanError(
            "the type of an option is not known where its class is defined",
            found=str(error),
            where=registry.owner(cls),
            remedy="import it at the top of the module, not under TYPE_CHECKING",
        ) from error
    for field in dataclasses.fields(cls):
        if field.name == NAME and is_named(cls):
            raise PlanError(
                f"an option cannot be called {NAME!r}", where=registry.owner(cls), remedy="choose another name"
            )
        if field.init:
            yield field, kinds[field.name]


def conform(value: Any, kind: Any, where: str) -> Any:
    """The value as `kind`, a type annotation; raises PlanError with expected and found."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return first_fitting(value, arguments, kind, where)
    if is_tuple(kind):
        return conform_tuple(value, arguments, kind, where)
    if isinstance(value, Items):
        if len(value) != 1:
            raise wrong(kind, f"{len(value)} values", where)
        return conform(value[0], kind, where)
    if kind is Any:
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise PlanError(
            f"{where} has no such choice",
            expected=registry.nearest(str(value), map(str, arguments)),
            found=value,
            where=where,
        )
    if kind is None or kind is type(None):
        if value is None or value == {}:  # TOML has no null
            return None
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind in (bool, int, str):
        if type(value) is kind:
            return value
    elif kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return conform_component(value, kind, where)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise wrong(kind, value, where)


def conform_component(value: Any, kind: type, where: str) -> Any:
    """A component from itself, from its name, or from a dict of its options."""
    if isinstance(value, kind):
        return conformed(value)
    if isinstance(value, str) and is_named(kind):
        value = {NAME: value}
    if not isinstance(value, dict) or any(not isinstance(key, str) for key in value):
        raise wrong(kind, value, where)
    given, cls = dict(value), kind
    if is_named(kind):
        name = given.pop(NAME, None)
        if not isinstance(name, str):
            raise PlanError(f"a {registry.kind_name(kind)} lacks its name", expected=f"{NAME} = ...", where=where)
        cls = registry.find(kind, name)
    return build(cls, given, spec_name(cls.__name__))


def conform_tuple(value: Any, arguments: tuple, kind: Any, where: str) -> tuple:
    """A tuple, element by element; a lone list in the place of the elements may be the tuple itself."""
    if not isinstance(value, (list, tuple)):
        raise wrong(kind, value, where)
    variadic = len(arguments) == 2 and arguments[1] is Ellipsis
    kinds = [arguments[0]] * len(value) if variadic else list(arguments)
    try:
        if len(kinds) != len(value):
            raise wrong(kind, f"{len(value)} values", where)
        return tuple(conform(element, one, where) for element, one in zip(value, kinds, strict=True))
    except PlanError:
        if isinstance(value, Items) and len(value) == 1 and isinstance(value[0], list):
            return conform_tuple(list(value[0]), arguments, kind, where)
        raise


def first_fitting(value: Any, kinds: tuple, kind: Any, where: str) -> Any:
    """The value as the first type of a union that takes it. Else the error of its one type besides None."""
    errors: list[PlanError] = []
    for one in sorted(kinds, key=lambda one: one is not type(None)):
        try:
            return conform(value, one, where)
        except PlanError as error:
            errors.append(error)
    raise errors[-1] if len(errors) == 2 and type(None) in kinds else wrong(kind, value, where)


def wrong(kind: Any, value: Any, where: str) -> PlanError:
    """The error for a value of another type."""
    value = list(value) if isinstance(value, Items) else value
    found = value if isinstance(value, str) and value.endswith("values") else f"{value!r} ({type(value).__name__})"
    return PlanError(f"{where} has the wrong type", expected=type_text(kind), found=found, where=where)


def type_text(kind: Any) -> str:
    """A type as messages write it."""
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    if kind in plain:
        return plain[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_text, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list, each element {type_text(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(type_text, arguments))}"
    return f"a {registry.kind_name(kind)}" if isinstance(kind, type) and dataclasses.is_dataclass(kind) else str(kind)


def is_named(cls: type) -> bool:
    """Whether the class stands for one of several by its name, rather than being the only one of its kind."""
    return issubclass(cls, tuple(registry.BASES))


def is_tuple(kind: Any) -> bool:
    """Whether the annotation is a tuple type."""
    return get_origin(kind) is tuple


def is_required(field: dataclasses.Field) -> bool:
    """Whether the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def changed_fields(component: Any) -> Iterator[dataclasses.Field]:
    """The fields that are not at their default."""
    for field, _ in options(type(component)):
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        value = getattr(component, field.name)
        if is_required(field) or type(value) is not type(default) or value != default:
            yield field
