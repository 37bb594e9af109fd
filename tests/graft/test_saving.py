"""fast.save(folder) and graft.load(folder): the same model afterwards, and nothing else taken for one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import graft
from graft import loading, saving
from tests.families import build

IDS = [[5, 6, 7, 8, 5, 6, 9, 7]]
FILES = (saving.MANIFEST, saving.PROGRAM, saving.HISTORY, saving.WEIGHTS)

SCALE = '''
"""A pass of the user's."""

from dataclasses import dataclass

import graft


@dataclass(frozen=True)
class ScaleSavedFeedForward(graft.Pass):
    """Scale every feed-forward output."""

    factor: float = 1.0

    def run(self, view):
        for block in view.trunk.feed_forward:
            block.output = block.output * self.factor
'''


@dataclass(frozen=True)
class Saved:
    model: PreTrainedModel
    compiled: graft.CompiledModel
    folder: Path


def generated(compiled: graft.CompiledModel) -> tuple[list[int], str]:
    """The new ids, and a digest of the bits of their logits."""
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    out = compiled.generate(torch.tensor(IDS), return_dict_in_generate=True, output_logits=True, **options)
    bits = hashlib.sha256(torch.stack(out.logits).numpy().tobytes()).hexdigest()
    return out.sequences[0].tolist(), bits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model with tied embeddings, through ATen, which is quickly compiled; its users leave the folder as it is."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = build("llama", tie_word_embeddings=True)
    # Through ATen a row's last bits depend on its company, so what is drafted must not depend on how long steps take.
    drafters = [graft.Lookup(), graft.Recycle(seed_vocabulary=20, seed_text=10)]
    plan = graft.Plan(draft=drafters, controller=graft.FixedBudget())
    compiled = graft.compile(model, plan, backend="aten")
    compiled.save(folder)
    return Saved(model, compiled, folder)


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(saved.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The same model as C++, its own parameters given up."""
    folder = tmp_path_factory.mktemp("released") / "model"
    model = build("llama", tie_word_embeddings=True)
    compiled = graft.compile(model, graft.Plan(draft=[graft.Recycle()]), release=True)
    compiled.save(folder)
    return Saved(model, compiled, folder)


@pytest.mark.parametrize(
    ("family", "dtype", "spec"),
    [
        ("llama", torch.float32, ""),
        ("llama", torch.bfloat16, "draft=lookup,recycle"),
        ("qwen2_moe", torch.float32, ""),
        ("llama", torch.float32, "target=drop-block{1},scale-saved-feed-forward{factor=0.9},use="),
    ],
    ids=["float32", "bfloat16 drafted", "experts", "own pass"],
)
def test_a_loaded_model_does_and_shows_what_the_saved_one_did(
    family: str, dtype: torch.dtype, spec: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SCALE)
    plan = graft.Plan.from_spec(f'{spec}"{tmp_path / "mine.py"}"' if spec.endswith("use=") else spec)
    model = build(family, dtype=dtype)
    fast = graft.compile(model, plan)
    fast.save(tmp_path / "saved")
    report = fast.report()
    back = graft.load(tmp_path / "saved", model=model, plan=plan)
    assert back.report() == report
    assert str(back.program) == str(fast.program) and back.program.to_json() == fast.program.to_json()
    assert str(back.program.diff("capture", "kv-cache")) == str(fast.program.diff("capture", "kv-cache"))
    assert str(back.program.explain("linear_1")) == str(fast.program.explain("linear_1"))
    assert back.program["forward"].source == fast.program["forward"].source
    assert back.program["forward"].kernels == fast.program["forward"].kernels
    assert back.plan == plan
    assert generated(back) == generated(fast)


def test_a_fresh_process_generates_the_same_bits(released: Saved) -> None:
    load = f"graft.load({str(released.folder)!r})"
    script = f"import graft; from tests.graft.test_saving import generated; print(generated({load}))"
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).resolve().parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == str(generated(released.compiled))


def test_what_was_released_before_saving_is_not_missed(released: Saved, tmp_path: Path) -> None:
    expected = generated(released.compiled)
    back = graft.load(released.folder)
    assert generated(back) == expected and back.released_bytes == released.compiled.released_bytes > 0
    back.save(tmp_path / "again")
    for name in (saving.WEIGHTS, saving.PROGRAM, saving.HISTORY):
        assert (tmp_path / "again" / name).read_bytes() == (released.folder / name).read_bytes()
    with pytest.raises(graft.SaveError, match="given up"):
        graft.load(released.folder, model=released.model)


def test_packed_weights_can_run_through_aten(released: Saved) -> None:
    through_aten = graft.load(released.folder, backend="aten")
    assert through_aten.decoder.executable.backend == "aten"
    assert generated(through_aten)[0] == generated(released.compiled)[0]


def test_what_drafters_asked_the_model_is_not_asked_again(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    for question in ("best_after", "own_text"):
        monkeypatch.setattr(f"graft.runtime.decoder.Decoder.{question}", None)
    (alone, first), (text, second) = graft.load(saved.folder).decoder.shared.items()
    assert first.shape == (20, 8) and (first == saved.compiled.decoder.shared[alone]).all()
    assert second.shape[1] == 2 + 8 and (second == saved.compiled.decoder.shared[text]).all()


def test_tied_embeddings_are_stored_once(saved: Saved) -> None:
    with safe_open(saved.folder / saving.WEIGHTS, framework="pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert list(shapes.values()).count((131, 64)) == 1
    back = graft.load(saved.folder)
    assert back.program.parameter_bytes == saved.compiled.program.parameter_bytes
    assert generated(back) == generated(saved.compiled)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused(name: str, copied: Path) -> None:
    content = (copied / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:-100], b"", flipped, b"{}" + b" " * (len(content) - 2)):
        (copied / name).write_bytes(damaged)
        with pytest.raises(graft.SaveError, match=r"damaged[^$]*" + name):
            graft.load(copied)
    (copied / name).unlink()
    with pytest.raises(graft.SaveError, match=name):
        graft.load(copied)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(graft.SaveError, match="no such folder"):
        graft.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(graft.SaveError, match="a folder without"):
        graft.load(tmp_path)
    (tmp_path / saving.MANIFEST).write_text('{"format": 1000}')
    with pytest.raises(graft.SaveError, match="another format"):
        graft.load(tmp_path)


def forge(folder: Path, old: str, new: str) -> None:
    """Change the program, and let all checksums agree with it."""
    text = (folder / saving.PROGRAM).read_text()
    assert old in text
    (folder / saving.PROGRAM).write_text(text.replace(old, new, 1))
    manifest = json.loads((folder / saving.MANIFEST).read_text())
    manifest["files"][saving.PROGRAM] = saving.fingerprint(folder / saving.PROGRAM)
    manifest["checksum"] = saving.checksum(manifest)
    (folder / saving.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"aten.linear.default"', '"aten.add_.Tensor"'),
        ('"aten.linear.default"', '"operator.attrgetter"'),
        ('"aten.linear.default"', '"__loader__.load.default"'),
        ('"target": "aten.embedding.default"', '"target": "aten.cumsum.default"'),
        ('"dtype": "int64"', '"dtype": "nn"'),
        ('"sizes": ["N"]', '"sizes": ["M"]'),
        ('{"node": "embedding"}', '{"node": "nothing"}'),
        ('"call": "verify"', '"call": "exec"'),
        ('"call": "verify"', '"call": "a()"'),
        ('"name": "forward"', '"name": 1'),
        ('"layers": 3', '"layers": 2'),
        ('"shape": [131, 64]', '"shape": [64, 131]'),
    ],
)
def test_a_program_that_is_not_well_formed_is_refused(old: str, new: str, copied: Path) -> None:
    forge(copied, old, new)
    with pytest.raises(graft.SaveError):
        graft.load(copied)


def test_another_version_is_refused_by_name(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "versions", lambda: {**saving.versions(), "torch": "99.0"})
    with pytest.raises(graft.SaveError, match=r"expected: torch 99\.0\n  found: torch 2"):
        graft.load(saved.folder)


def test_another_model_is_refused_with_what_differs(saved: Saved, tmp_path: Path) -> None:
    graft.load(saved.folder, model=saved.model)
    saved.model.save_pretrained(tmp_path / "same")
    graft.load(saved.folder, model=tmp_path / "same")
    wider = build("llama", tie_word_embeddings=True, intermediate_size=128)
    with pytest.raises(graft.SaveError, match="intermediate_size is 96 in what was saved and 128 here"):
        graft.load(saved.folder, model=wider)
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(graft.SaveError, match="intermediate_size"):
        graft.load(saved.folder, model=tmp_path / "wider")
    with pytest.raises(graft.SaveError, match=r"other weights[^$]*with other numbers"):
        graft.load(saved.folder, model=build("llama", tie_word_embeddings=True, seed=1))


def test_another_plan_is_refused(saved: Saved) -> None:
    with pytest.raises(graft.SaveError, match=r"expected: draft=recycle\n  found: draft=lookup"):
        graft.load(saved.folder, plan=graft.Plan(draft=[graft.Recycle()]))


def test_a_file_of_the_users_that_changed_is_refused(saved: Saved, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SCALE.replace("ScaleSaved", "ScaleChanged"))
    plan = graft.Plan.from_spec(f'target=scale-changed-feed-forward{{factor=0.9}},use="{file}"')
    graft.CompiledModel(saved.compiled.program, plan, saved.compiled.generator).save(tmp_path / "saved")
    graft.load(tmp_path / "saved")
    file.write_text(file.read_text() + "\n")
    with pytest.raises(graft.SaveError, match="not the one that was used"):
        graft.load(tmp_path / "saved")
    file.unlink()
    with pytest.raises(graft.SaveError, match="gone"):
        graft.load(tmp_path / "saved")


def test_a_plan_that_holds_a_live_object_is_refused_before_anything_is_written(saved: Saved, tmp_path: Path) -> None:
    plan = graft.Plan(draft=[graft.DraftModel(saved.compiled)])
    drafted = graft.CompiledModel(saved.compiled.program, plan, saved.compiled.generator)
    with pytest.raises(graft.PlanError, match="cannot be written down"):
        drafted.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["save_file", "synchronise", "rename"])
def test_an_interrupted_save_leaves_the_old_folder_as_it_was(
    step: str, saved: Saved, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    rename = Path.rename

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def rename_but_last(path: Path, target: Path) -> Path:
        return interrupt() if target == copied and not path.name.endswith(".old") else rename(path, target)

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", rename_but_last)
        else:
            patch.setattr(saving, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            saved.compiled.save(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    saved.compiled.save(copied)
    assert generated(graft.load(copied)) == generated(saved.compiled)


def test_only_what_was_saved_before_is_replaced(saved: Saved, copied: Path, tmp_path: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(graft.SaveError, match=r"notes\.txt"):
        saved.compiled.save(copied)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(graft.SaveError, match="something else"):
        saved.compiled.save(tmp_path / "file")
    assert (copied / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_generation_defaults_are_kept(saved: Saved, tmp_path: Path) -> None:
    fast = graft.load(saved.folder)
    fast.generator.face.generation_config.update(max_new_tokens=5, eos_token_id=[2, 7], repetition_penalty=1.3)
    fast.save(tmp_path / "saved")
    out, back = (one.generate(torch.tensor(IDS)) for one in (fast, graft.load(tmp_path / "saved")))
    assert out.shape[1] <= len(IDS[0]) + 5 and torch.equal(out, back)
