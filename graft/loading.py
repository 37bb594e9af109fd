"""graft.load(folder): a compiled model from what `fast.save(folder)` wrote, without capture and packing.

Everything is checked before anything is used: the files by size and checksum, the program by the checker, and what the
caller has (installed versions, a model, a plan) against what was saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from graft.codegen.cpp.memory import pack
from graft.codegen.lowering import check_backend
from graft.compiled import CompiledModel
from graft.compiler.errors import PlanError, SaveError
from graft.compiler.plan import Plan
from graft.compiler.serial import history_from, program_from
from graft.compiler.serial_graph import take
from graft.compiling import assembled, decoder_of
from graft.runtime.settings import ModelFace
from graft.saving import (
    FORMAT,
    HISTORY,
    MANIFEST,
    PROGRAM,
    SHARED,
    WEIGHTS,
    checksum,
    config_data,
    digest,
    plan_text,
    versions,
)
from graft.stored_weights import rebuild

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNIMPORTANT = frozenset({"architectures", "transformers_version", "_name_or_path"})
"""Entries of a configuration that say where a model comes from, not what it computes."""
STORED_DTYPE = frozenset({"dtype", "torch_dtype"})
"""Entries that a model's folder gives for its files; a model may be loaded in another dtype."""
SHOWN = 5
"""Differences that a message names."""


def load(
    folder: str | Path,
    *,
    model: PreTrainedModel | str | Path | None = None,
    plan: Plan | None = None,
    backend: str = "auto",
) -> CompiledModel:
    """The compiled model that `CompiledModel.save` wrote to `folder`: the same program, weights and results.

    With `model`, its configuration must be the one that was compiled: a transformers model, whose weights are compared
    too, or its folder. With `plan`, it must be that plan. `backend` is as in `compile`; "auto" is the one that was
    saved. Files that the plan's `use` names are run again, and must not have changed.

    Raises SaveError naming what differs, or which file is missing or damaged; PlanError where a component of the plan
    is not to be found; LoweringError if the backend cannot run the program here.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    check_versions(manifest, folder)
    check_backend(backend)
    config = config_from(take(manifest, "config", dict, MANIFEST))
    if model is not None:
        check_config(manifest["config"], model, folder)
    own_plan = read_plan(manifest, plan, folder)
    files = {name: read_json(folder, name, manifest) for name in (PROGRAM, HISTORY)}
    tensors = read_weights(folder, manifest)
    shared = {name: tensors.pop(name).numpy() for name in list(tensors) if name.startswith(SHARED)}
    device = device_of(take(manifest, "device", str, MANIFEST))
    weights, panels = rebuild(take(files[PROGRAM], "parameters", list, PROGRAM), tensors, device)
    if isinstance(model, nn.Module):
        check_weights(model, weights, panels, folder)
    program = program_from(files[PROGRAM], weights)
    if "forward" not in program.functions or program.host is None:
        raise SaveError("a saved program lacks a function or its host program", expected="forward", where=folder)
    program.snapshots = history_from(files[HISTORY], program)
    saved = take(manifest, "backend", str, MANIFEST)
    face = ModelFace(config, GenerationConfig.from_dict(take(manifest, "generation_config", dict, MANIFEST)), device)
    decoder = decoder_of(
        program,
        take(manifest, "vocabulary", int, MANIFEST),
        take(manifest, "max_positions", (int, type(None)), MANIFEST),
        "aten" if backend == "auto" and saved == "aten" else backend,
        panels,
    )
    decoder.shared |= {name.removeprefix(SHARED): table for name, table in shared.items()}
    compiled = assembled(program, own_plan, decoder, face)
    compiled.released_bytes = take(manifest, "released_bytes", int, MANIFEST)
    return compiled


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the folder says of itself."""
    if not (folder / MANIFEST).is_file():
        found = "no such folder" if not folder.is_dir() else f"a folder without {MANIFEST}"
        raise SaveError(
            "there is no compiled model here", expected="a folder that fast.save wrote", found=found, where=folder
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(folder / MANIFEST, "JSON", error) from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise damaged(folder / MANIFEST, "the description of a compiled model", "something else")
    if manifest["format"] != FORMAT:
        raise SaveError(
            "a compiled model was saved in another format",
            expected=f"format {FORMAT}",
            found=f"format {manifest['format']!r:.20}",
            where=folder,
            remedy="compile the model again and save it",
        )
    if manifest.get("checksum") != checksum(manifest):
        raise damaged(folder / MANIFEST, "the checksum that stands in it", "another one")
    return manifest


def damaged(path: Path, expected: object, found: object) -> SaveError:
    """The error for a file that is not as it was written."""
    return SaveError(
        "a file of a saved model is damaged",
        expected=expected,
        found=found,
        where=path,
        remedy="compile the model again and save it",
    )


def check_versions(manifest: dict[str, Any], folder: Path) -> None:
    """Raise SaveError unless the program was saved by what is installed."""
    saved, here = take(manifest, "versions", dict, MANIFEST), versions()
    differ = [name for name in here if saved.get(name) != here[name]]
    if differ:
        raise SaveError(
            "a compiled model was saved by other versions than are installed",
            expected=", ".join(f"{name} {here[name]}" for name in differ),
            found=", ".join(f"{name} {saved.get(name)}" for name in differ),
            where=folder,
            remedy="compile the model again and save it",
        )


def check_config(saved: dict[str, Any], model: PreTrainedModel | str | Path, folder: Path) -> None:
    """Raise SaveError unless the model, or the model in the folder, has the configuration that was saved."""
    ignored = UNIMPORTANT
    if isinstance(model, (str, Path)):
        ignored |= STORED_DTYPE
        try:
            given = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise SaveError(
                "the model to compare with has no configuration", found=str(error).splitlines()[0], where=model
            ) from error
    else:
        given = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or given is None:
            raise SaveError("load() compares with a transformers model or its folder", found=type(model).__name__)
    differ = list(differences(saved, config_data(given), ignored))
    if differ:
        raise SaveError(
            "a compiled model was made from another model",
            expected="the same configuration",
            found="; ".join(differ[:SHOWN]) + (f"; {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""),
            where=folder,
        )


def differences(saved: Any, given: Any, ignored: frozenset[str], path: str = "") -> Any:
    """Texts of what differs between two configurations."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in sorted((saved.keys() | given.keys()) - ignored):
            inner = f"{path}.{key}" if path else key
            yield from differences(saved.get(key), given.get(key), ignored, inner)
    elif saved != given:
        yield f"{path} is {saved!r:.40} in what was saved and {given!r:.40} here"


def check_weights(model: nn.Module, weights: nn.Module, panels: Mapping[str, Tensor], folder: Path) -> None:
    """Raise SaveError unless the model's parameters are those that were saved, bit for bit."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in weights.named_parameters(remove_duplicate=False):
        held = panels.get(name, stored)
        if held.is_meta or name not in own:
            continue  # read by snapshots alone, or made by a pass
        given = own[name].detach()
        with torch.no_grad():
            same = not given.is_meta and given.shape == stored.shape and given.dtype == stored.dtype
            if not same or not same_bits(pack(given) if name in panels else given, held):
                why = " that were given up" if given.is_meta else " with other numbers" if same else ""
                raise SaveError(
                    "a compiled model was made from other weights",
                    expected=f"{stored.dtype} {list(stored.shape)} as they were saved",
                    found=f"{given.dtype} {list(given.shape)}{why}",
                    where=f"{name}, {folder}",
                )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same bytes."""
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right.to(left.device)))
    return torch.equal(left, right)


def read_plan(manifest: dict[str, Any], given: Plan | None, folder: Path) -> Plan:
    """The plan that was saved; raises SaveError where `given` is another, or where a file that it uses has changed."""
    text = take(manifest, "plan", str, MANIFEST)
    for path, saved in take(manifest, "used", dict, MANIFEST).items():
        found = digest(Path(path)) if Path(path).is_file() else None
        if found != saved:
            what = "not the one that was used" if found else "gone"
            raise SaveError(
                f"a file that the plan uses is {what}",
                where=path,
                remedy="bring the file back, or compile the model again and save it",
            )
    plan = Plan.from_toml(text)
    plan.check()
    if given is not None:
        if not isinstance(given, Plan):
            raise PlanError("load() takes a Plan", found=type(given).__name__)
        if plan_text(given) != text:
            raise SaveError(
                "a compiled model was made by another plan",
                expected=given.spec() or "the default plan",
                found=plan.spec() or "the default plan",
                where=folder,
            )
    return plan


def check_file(folder: Path, name: str, manifest: dict[str, Any]) -> tuple[Path, str]:
    """A file that is there with the size that it should have, and the checksum that it should have."""
    entry = take(take(manifest, "files", dict, MANIFEST), name, dict, MANIFEST)
    path, size = folder / name, take(entry, "bytes", int, MANIFEST)
    if not path.is_file():
        raise damaged(path, f"a file of {size} bytes", "no file")
    if path.stat().st_size != size:
        raise damaged(path, f"{size} bytes", f"{path.stat().st_size} bytes")
    return path, take(entry, "sha256", str, MANIFEST)


def read_json(folder: Path, name: str, manifest: dict[str, Any]) -> Any:
    """The data in a JSON file, once its checksum is right."""
    path, expected = check_file(folder, name, manifest)
    try:
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise damaged(path, f"SHA-256 {expected[:16]}...", f"{found[:16]}...")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "JSON", error) from error


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, once their checksum is right. They are copied: a file that changes must not reach them, and
    kernels read memory that begins on a cache line."""
    path, expected = check_file(folder, WEIGHTS, manifest)
    try:
        found = digest(path)
        if found != expected:
            raise damaged(path, f"SHA-256 {expected[:16]}...", f"{found[:16]}...")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise damaged(path, "safetensors", error) from error


def config_from(data: dict[str, Any]) -> Any:
    """A model's configuration; of a kind that transformers does not know, what generate() needs of it."""
    kind = str(data.get("model_type"))
    known: Any = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401 (loads lazily)
    return known.from_dict(data)


def device_of(text: str) -> torch.device:
    """The device that the parameters were on."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SaveError(
            "a compiled model was saved on a device that there is not", expected=text, found=str(error).splitlines()[0]
        ) from error
    return device
