"""Tensors side by side in large pages."""

import gc

import pytest
import torch

from graft.codegen.huge_pages import HUGE, LINE, HugePages, zeros


@pytest.mark.parametrize("size", [1000, 3 * HUGE], ids=["small", "large"])
def test_tensors_lie_side_by_side_on_lines_of_their_own_and_keep_their_memory(size: int) -> None:
    given = [torch.randn(3, 5), torch.randn(size // 8).to(torch.bfloat16), torch.arange(7), torch.empty(0)]
    room = HugePages(sum(one.nbytes for one in given), len(given))
    placed = [room.copy(one) for one in given]
    more = room.zeros((0,), torch.float32)
    del room
    gc.collect()
    assert all(torch.equal(one, other) for one, other in zip(placed, given, strict=True)) and more.numel() == 0
    starts = [one.data_ptr() for one in placed[:3]]
    assert all(start % LINE == 0 for start in starts) and starts == sorted(starts)
    placed[0].fill_(7.0)
    assert torch.equal(placed[1], given[1])


def test_a_large_tensor_begins_with_a_page_and_is_zero() -> None:
    found = zeros((2, HUGE // 4), torch.float32, torch.device("cpu"))
    assert found.data_ptr() % HUGE == 0 and found.is_contiguous() and not found.any()


def test_memory_that_there_is_not_is_an_error() -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        zeros((1 << 62,), torch.uint8, torch.device("cpu"))
