"""Which instruction set is chosen, on machines that these tests make up."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from graft.codegen.cpp import isa
from graft.codegen.cpp.isa import ISAS, choose, detect, runnable
from graft.compiler.errors import LoweringError

AVX2 = "fpu sse4_2 avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_ISA", raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *processors: str) -> None:
    """Put a file in place of /proc/cpuinfo with these features, by processor."""
    listed = [f"processor\t: {i}\nflags\t\t: {flags}\nbugs\t\t: avx512f\n" for i, flags in enumerate(processors)]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("\n".join(listed))
    monkeypatch.setattr(isa, "CPUINFO", cpuinfo)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (f"{AVX512} avx512_bf16", "avx512_bf16"),
        (AVX512, "avx512"),
        (AVX512.replace("avx512vl", ""), "avx2"),
        (f"{AVX2} avx512_bf16", "avx2"),
        (AVX2.replace("fma", ""), "portable"),
        ("", "portable"),
    ],
)
def test_the_best_level_with_all_of_its_features_is_detected(
    flags: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, tmp_path, flags)
    assert detect() is ISAS[name]
    assert choose(None) is ISAS[name]


def test_a_feature_counts_where_every_processor_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, tmp_path, AVX512, AVX2)
    assert [one.name for one in runnable()] == ["avx2", "portable"]


def test_a_machine_that_does_not_say_is_portable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isa, "CPUINFO", tmp_path / "none")
    assert detect().name == "portable"
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    monkeypatch.setattr(isa, "CPUINFO", tmp_path / "arm")
    assert detect().name == "portable"


def test_a_name_goes_before_the_environment_and_that_before_detection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, tmp_path, AVX512)
    monkeypatch.setenv("GRAFT_ISA", "avx2")
    assert choose(None).name == "avx2"
    assert choose("portable").name == "portable"
    monkeypatch.setenv("GRAFT_ISA", "")
    assert choose(None).name == "avx512"


@pytest.mark.parametrize(
    ("name", "problem"), [("avx3", "no instruction set"), ("avx512_bf16", "cannot run avx512_bf16")]
)
def test_a_wrong_choice_is_answered_with_what_can_be_run(
    name: str, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, tmp_path, AVX512)
    with pytest.raises(LoweringError, match=problem) as named:
        choose(name)
    assert named.value.expected == "one of avx512, avx2, portable"
    monkeypatch.setenv("GRAFT_ISA", name)
    with pytest.raises(LoweringError, match=problem) as set_outside:
        choose(None)
    assert "GRAFT_ISA" in str(set_outside.value.where)


def test_levels_go_from_the_most_capable_to_the_one_that_runs_anywhere() -> None:
    assert list(ISAS) == ["avx512_bf16", "avx512", "avx2", "portable"]
    features = [one.features for one in ISAS.values()]
    assert all(more > less for more, less in pairwise(features))
    assert not features[-1]
    assert "avx512_bf16" in features[0]
