"""What a plan may name, with the options: passes, drafters, tree policies, verifiers, controllers, and
how a KV cache is kept."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from graft.compiler import registry, spec
from graft.compiler.passing import Pass, spec_name

HOMES = ("graft.compiler.kv", "graft.passes", "graft.runtime")
"""Packages in which graft's own components live."""

WIDTH = 120


def load_all() -> None:
    """Import every module in which graft defines components, so that their classes exist."""
    for home in HOMES:
        package = importlib.import_module(home)
        for module in pkgutil.walk_packages(package.__path__, f"{home}."):
            importlib.import_module(module.name)


def describe(files: Iterable[str | Path] = ()) -> dict[str, list[dict[str, Any]]]:
    """Kind -> its components: name, one line of documentation, options; those of the user's files too.

    Raises PlanError where a file cannot be read or defines nothing.
    """
    load_all()
    for file in files:
        registry.load_file(file)
    return {kind: sorted(map(entry, registry.components(base)), key=by_name) for base, kind in registry.BASES.items()}


def by_name(component: dict[str, Any]) -> str:
    """What components are sorted by."""
    return component["name"]


def entry(cls: type) -> dict[str, Any]:
    """One component."""
    documentation = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    found: dict[str, Any] = {
        "name": spec_name(cls.__name__),
        "documentation": documentation,
        "options": [option(field, kind) for field, kind in spec.options(cls)],
        "class": f"{cls.__module__}.{cls.__qualname__}",
    }
    return found | ({"contract": cls.contract} if issubclass(cls, Pass) else {})


def option(field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    """One option: name, type, and default where it has one."""
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    shown = {} if default is dataclasses.MISSING else {"default": spec.show_value(default)}
    return {"name": field.name, "type": spec.type_text(kind), **shown}


def describe_text(kinds: dict[str, list[dict[str, Any]]], width: int = WIDTH) -> str:
    """The same as a table for each kind."""
    console = Console(file=io.StringIO(), width=width, color_system=None, emoji=False, markup=False)
    for kind, components in kinds.items():
        table = Table(title=kind, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("name", "options", "what it does"):
            table.add_column(column, overflow="fold")
        for component in components:
            options = [
                f"{one['name']}={one['default']}" if "default" in one else f"{one['name']}: {one['type']}"
                for one in component["options"]
            ]
            contract = f" ({component['contract']})" if "contract" in component else ""
            table.add_row(component["name"] + contract, ", ".join(options), component["documentation"])
        if components:
            console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
