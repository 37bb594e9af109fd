"""A program's parameters for a file, each stored once, and back: packed where no other form is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graft.codegen.huge_pages import HugePages
from graft.compiler.errors import SaveError
from graft.compiler.program import Function, Program
from graft.compiler.serial import dtype_from, dtype_name
from graft.compiler.serial_graph import take
from graft.compiler.shapes import attribute

WHERE = "parameters"


def collect(program: Program, replaced: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A description of every parameter that the program or one of its snapshots reads, and the tensors to store.

    `replaced` are the parameters that the functions need packed alone (codegen.release.replaced), by name. What
    snapshots alone read is described, not stored: it is needed for listings and never run. Raises SaveError for a
    parameter that was given up and is needed.
    """
    current = {name for function in program.functions.values() for name in reads(function)}
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    first: dict[tuple, str] = {}
    storages: set[int] = set()
    found = everything(program)
    tied: dict[tuple, set[str]] = {}
    for name in current:
        tied.setdefault(identity(found[name]), set()).add(name)
    for name, tensor in found.items():
        entry: dict[str, Any] = {"name": name, "parameter": isinstance(tensor, nn.Parameter)}
        entries.append(entry)
        same = first.setdefault(identity(tensor), name)
        if same != name:
            entry["same_as"] = same
            continue
        entry |= {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
        ties = tied.get(identity(tensor))
        if not ties:
            continue
        packed = next((replaced[one] for one in ties & replaced.keys()), None)
        if packed is not None:
            tensors[name], entry["form"] = packed, "panels"
            continue
        if tensor.is_meta:
            raise SaveError(
                "a parameter that the program needs was given up", where=name, remedy="compile without release"
            )
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)
        if order != list(range(tensor.dim())):
            entry["order"] = order
        stored = tensor.detach().permute(order).contiguous()
        # Two names in a safetensors file share no memory.
        place = stored.untyped_storage()._cdata
        tensors[name], entry["form"] = stored.clone() if place in storages else stored, "plain"
        storages.add(place)
    return entries, tensors


def everything(program: Program) -> dict[str, Tensor]:
    """The tensors that the program and its snapshots read, by name."""
    functions = [*program.functions.values()]
    functions += [function for snapshot in program.snapshots.values() for function in snapshot.functions.values()]
    found: dict[str, Tensor] = {}
    for function in functions:
        for name in reads(function):
            tensor = found.setdefault(name, attribute(function.weights, name))
            if not isinstance(tensor, Tensor):
                raise SaveError(
                    "a program holds what is no tensor",
                    expected="parameters and constants",
                    found=type(tensor).__name__,
                    where=f"function {function.name}, {name}",
                )
    return found


def reads(function: Function) -> Iterator[str]:
    """Names of what the function reads."""
    yield from (node.target for node in function.graph.nodes if node.op == "get_attr")
    if function.draft_vocabulary:
        yield function.draft_vocabulary


def identity(tensor: Tensor) -> tuple:
    """Equal for tensors that are the same numbers in the same place."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def rebuild(
    entries: list[Any], tensors: dict[str, Tensor], device: torch.device
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module that holds the parameters at their paths, those that are packed or not stored without storage; and the
    packed ones by name, taken out of `tensors` into large pages. Raises SaveError where descriptions and tensors do not
    fit together."""
    module, panels = nn.Module(), dict[str, Tensor]()
    packed = [entry["name"] for entry in entries if is_packed(entry) and entry.get("name") in tensors]
    room = HugePages(sum(tensors[name].nbytes for name in packed), len(packed))
    made: dict[str, Tensor] = {}
    for entry in entries:
        name = take(entry, "name", str, WHERE)
        if "same_as" in entry:
            first = take(entry, "same_as", str, name)
            if first not in made:
                raise SaveError("a parameter is tied to one that there is not", found=first, where=name)
            made[name] = made[first]
            if first in panels:
                panels[name] = panels[first]
        else:
            made[name] = rebuilt(entry, name, tensors, device)
            if is_packed(entry):
                panels[name] = room.copy(stored(name, tensors))
                del tensors[name]
        place(module, name, made[name], take(entry, "parameter", bool, name))
    return module, panels


def is_packed(entry: Any) -> bool:
    """Whether an entry of the description is of a parameter that is stored as panels."""
    return isinstance(entry, dict) and entry.get("form") == "panels"


def rebuilt(entry: Any, name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """One parameter: as it was stored, or without storage."""
    shape, dtype = take(entry, "shape", list, name), dtype_from(take(entry, "dtype", str, name), name)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise SaveError("a parameter has sizes that there are not", found=shape, where=name)
    if entry.get("form") != "plain":
        found = torch.empty(shape, dtype=dtype, device="meta")
    else:
        order = entry.get("order", list(range(len(shape))))
        if not isinstance(order, list) or sorted(order) != list(range(len(shape))):
            raise SaveError("saved data has the wrong type", expected="an order of dims", found=order, where=name)
        found = stored(name, tensors).to(device)
        if found.dim() != len(shape):
            raise SaveError("a stored tensor has the wrong rank", expected=len(shape), found=found.dim(), where=name)
        found = found.permute([order.index(dim) for dim in range(len(shape))])
        if list(found.shape) != shape or found.dtype != dtype:
            raise SaveError(
                "a stored tensor is not what the program reads",
                expected=f"{dtype} {shape}",
                found=f"{found.dtype} {list(found.shape)}",
                where=name,
            )
    return nn.Parameter(found, requires_grad=False) if take(entry, "parameter", bool, name) else found


def stored(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor of that name."""
    if name not in tensors:
        raise SaveError("a parameter is missing from the file of weights", found=f"{len(tensors)} tensors", where=name)
    return tensors[name]


def place(module: nn.Module, path: str, tensor: Tensor, parameter: bool) -> None:
    """Put a tensor at a dotted path, making the modules in between."""
    *parents, last = path.split(".")
    try:
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if parameter:
            module.register_parameter(last, tensor)  # type: ignore[arg-type]
        else:
            module.register_buffer(last, tensor)
    except (KeyError, AttributeError, TypeError) as error:
        raise SaveError("a parameter cannot stand at its path", found=error, where=path) from error
