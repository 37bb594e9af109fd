"""What compile() does around capture, passes and lowering."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import graft
from graft import compiling
from tests.families import build


@pytest.mark.parametrize("running", [True, False])
def test_the_search_for_garbage_goes_on_as_before_even_after_a_refusal(
    running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        assert not gc.isenabled()
        raise graft.CaptureError("refused")

    monkeypatch.setattr(compiling, "capture", refuse)
    (gc.enable if running else gc.disable)()
    try:
        with pytest.raises(graft.CaptureError, match="refused"):
            graft.compile(build("llama"))
        assert gc.isenabled() == running
    finally:
        gc.enable()
