"""Which code runs a function, and what is said where it is not the code that was wanted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import graft
from graft import compiling
from graft.codegen import release
from graft.codegen.lowering import LoweringWarning
from tests.families import build

PLAN = graft.Plan(sample=[range(3, 9)])


def test_an_unknown_backend_is_refused_before_anything_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "capture", lambda model: pytest.fail("captured"))
    with pytest.raises(graft.LoweringError, match="expected: auto, cpp, triton, aten\n  found: cuda"):
        graft.compile(build("llama"), PLAN, backend="cuda")


def test_a_release_that_gives_nothing_back_says_so_and_leaves_the_model_usable() -> None:
    model = build("llama")
    with pytest.warns(LoweringWarning, match="nothing was released"):
        fast = graft.compile(model, PLAN, backend="aten", release=True)
    assert fast.released_bytes == 0
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_released_parameters_are_gone_and_the_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = build("llama"), torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    parameters, left = [weakref.ref(parameter) for parameter in model.parameters()], []

    def trim() -> None:
        """Memory is handed back here, so nothing may hold what was released any longer."""
        gc.collect()
        left.extend(one() for one in parameters if one() is not None)

    monkeypatch.setattr(release, "trim", trim)
    fast = graft.compile(model, PLAN, backend="cpp", release=True)
    assert fast.released_bytes > 0 and any(parameter.is_meta for parameter in model.parameters())
    assert all(any(one is parameter for parameter in model.parameters()) for one in left)
    assert fast.generate(prompt, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
