"""fast.save(folder): a compiled model as JSON and safetensors.

    graft.json            what it is: versions, the model's configuration, the plan, size and checksum of the files
    program.json          functions, host program, history of passes, parameters
    history.json          the program after each pass, for diffs and explanations
    weights.safetensors   parameters, packed where that is the form they are read in; tables of drafters that took a run
                          of the model to make

The compiled library is not among them: it is built from the program, or found in the cache of this machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from graft.codegen.release import replaced
from graft.compiler.errors import SaveError
from graft.compiler.plan import Plan
from graft.compiler.serial import history_data, program_data
from graft.stored_weights import collect

if TYPE_CHECKING:
    from graft.compiled import CompiledModel

FORMAT = 2
"""Of the files, packed parameters included; another one is not read."""
MANIFEST, PROGRAM, HISTORY, WEIGHTS = "graft.json", "program.json", "history.json", "weights.safetensors"
SHARED = "shared by drafters: "
"""In front of the names of drafters' tables (compiler.drafting.Target.shared) among the tensors."""
PACKAGE = "graft-lm"


def save(compiled: CompiledModel, folder: str | Path) -> None:
    """Write a compiled model to a folder; see CompiledModel.save."""
    folder = Path(folder).expanduser().resolve()
    check_replaceable(folder)
    with compiled.generator.lock:
        entries, tensors = collect(compiled.program, replaced(compiled.executables))
        tensors |= {
            f"{SHARED}{key}": torch.from_numpy(value)
            for key, value in compiled.decoder.shared.items()
            if isinstance(value, np.ndarray)
        }
        program = program_data(compiled.program) | {"parameters": entries}
        manifest, history = describe(compiled), history_data(compiled.program)
        texts = {PROGRAM: as_text(program), HISTORY: as_text(history)}
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            manifest["files"] = {name: fingerprint(temporary / name) for name in (*texts, WEIGHTS)}
            manifest["checksum"] = checksum(manifest)
            (temporary / MANIFEST).write_text(as_text(manifest, indent=2), encoding="utf-8")
            synchronise(temporary)
            put_in_place(temporary, folder)
        except OSError as error:
            raise SaveError("a compiled model cannot be written", found=error, where=folder) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def describe(compiled: CompiledModel) -> dict[str, Any]:
    """What the manifest says, but for the files."""
    face, decoder = compiled.generator.face, compiled.decoder
    return {
        "format": FORMAT,
        "versions": versions(),
        "config": config_data(face.config),
        "generation_config": face.generation_config.to_dict(),
        "vocabulary": decoder.vocabulary,
        "max_positions": decoder.max_positions,
        "plan": plan_text(compiled.plan),
        "used": {path: digest(Path(path)) for path in resolved(compiled.plan).use},
        "backend": decoder.executable.backend,
        "device": str(decoder.device),
        "released_bytes": compiled.released_bytes,
    }


def versions() -> dict[str, str]:
    """Of what decides how a program is read and what it computes."""
    try:
        own = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"graft": own, "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def config_data(config: Any) -> dict[str, Any]:
    """A model's configuration as it reads back from JSON."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def resolved(plan: Plan) -> Plan:
    """The plan with absolute paths to the user's files."""
    return dataclasses.replace(plan, use=tuple(str(Path(path).expanduser().resolve()) for path in plan.use))


def plan_text(plan: Plan) -> str:
    """The plan as TOML. Raises PlanError where it holds what cannot be written down."""
    return resolved(plan).to_toml()


def as_text(data: Any, indent: int | None = None) -> str:
    """JSON, which knows neither infinity nor objects."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SaveError(
            "a compiled model cannot be written down",
            expected="text and numbers in the model's configuration and generation_config",
            found=error,
        ) from error


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its checksum."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_replaceable(folder: Path) -> None:
    """Raise SaveError unless there is nothing at the folder's place, or what was saved before."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    strange = sorted(names - {MANIFEST, PROGRAM, HISTORY, WEIGHTS})
    if strange or (names and MANIFEST not in names):
        raise SaveError(
            "a compiled model cannot be saved over something else",
            expected="no folder, an empty one, or one with a saved model and nothing more",
            found=", ".join(strange or sorted(names))[:200],
            where=folder,
            remedy="choose another folder",
        )


def synchronise(folder: Path) -> None:
    """Let the files reach the disk, so that a crash behind the renaming cannot leave empty ones."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the finished folder to its place; what stood there comes back where that fails."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f"{temporary.name}.old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
