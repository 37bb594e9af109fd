"""Generated C++ called from several threads and processes, and when it is let go."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import torch
from torch import Tensor

import graft
from graft.codegen.cpp.executable import CppExecutable
from graft.compiler.program import Program
from graft.compiling import decoder_of
from tests.codegen.compiled import compiled, function_of
from tests.codegen.functions import call_of, random_states
from tests.families import build

Step = tuple[list[Tensor], tuple[Tensor, Tensor]]


def steps(count: int) -> list[Step]:
    """Calls with what they have to return."""
    executable = compiled("llama")
    found = []
    for seed in range(count):
        trees = [(seed % 4, range(-1, seed % 5)), ((seed + 1) % 4, (-1, 0, 0, 1))]
        inputs, _ = call_of(trees, [seed, 9, 30, 0], seed)
        found.append((inputs, executable(*inputs, *random_states(function_of("llama"), seed))))
    return found


def run(executable: CppExecutable, wanted: list[Step]) -> bool:
    """Whether the executable returns what is wanted."""
    right = True
    for seed, (inputs, expected) in enumerate(wanted):
        found = executable(*inputs, *random_states(function_of("llama"), seed))
        right = right and all(map(torch.equal, found, expected))
    return right


def test_threads_may_share_an_executable() -> None:
    executable, wanted, results = compiled("llama"), steps(30), []
    workers = [threading.Thread(target=lambda: results.append(run(executable, wanted))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert results == [True, True, True]


def succeeds_in_a_fork(executable: CppExecutable, wanted: list[Step]) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # one that hangs is ended
        right = False
        try:
            right = run(executable, wanted)
        finally:
            os._exit(0 if right else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_has_threads_of_its_own() -> None:
    executable, wanted = compiled("llama"), steps(3)
    assert succeeds_in_a_fork(executable, wanted)
    assert run(executable, wanted)


def test_a_child_forked_in_the_midst_of_a_step_may_still_run_steps() -> None:
    executable, wanted = compiled("llama"), steps(3)
    with executable.team.lock:  # as it is while another thread is in a step
        assert succeeds_in_a_fork(executable, wanted)


def test_its_threads_end_when_it_is_collected() -> None:
    tasks = Path("/proc/self/task")
    steps(1)
    before = len(list(tasks.iterdir()))
    with torch.no_grad():
        executable = CppExecutable(function_of("llama"), threads=3)
    assert len(list(tasks.iterdir())) == before + 2
    assert run(executable, steps(2))
    del executable
    gc.collect()
    assert len(list(tasks.iterdir())) == before


def test_functions_may_share_threads_which_outlive_the_one_that_started_them() -> None:
    tasks = Path("/proc/self/task")
    wanted, before = steps(3), len(list(tasks.iterdir()))
    with torch.no_grad():
        first = CppExecutable(function_of("qwen2"), threads=2)
        second = CppExecutable(function_of("llama"), threads=2, team=first.team)
    assert len(list(tasks.iterdir())) == before + 1
    assert run(second, wanted) and succeeds_in_a_fork(second, wanted)
    del first
    gc.collect()
    assert run(second, wanted)
    del second
    gc.collect()
    assert len(list(tasks.iterdir())) == before


def test_functions_of_one_program_share_threads() -> None:
    copy = function_of("llama").copy()
    copy.name = "other"
    decoder = decoder_of(Program({"forward": function_of("llama"), "other": copy}), 100, None, "cpp")
    other = decoder.functions["other"].executable
    assert isinstance(decoder.executable, CppExecutable) and isinstance(other, CppExecutable)
    assert other.team is decoder.executable.team


def test_a_draft_model_works_with_its_targets_threads_and_goes_on_alone() -> None:
    tasks = Path("/proc/self/task")
    model, ids = build("llama", eos_token_id=None), torch.tensor([[5, 6, 7, 8, 5]])
    plans = [graft.Plan(sample=[range(3, 9)], target=one) for one in ((), (graft.DropBlock((1,), "feed-forward"),))]
    plain, small = (graft.compile(model, plan, backend="cpp") for plan in plans)
    expected = [one.generate(ids, max_new_tokens=12, do_sample=False) for one in (plain, small)]
    gc.collect()
    before = len(list(tasks.iterdir()))
    plan = graft.Plan(draft=[graft.DraftModel(small)], sample=[range(3, 9)], controller=graft.FixedBudget(3))
    fast = graft.compile(model, plan, backend="cpp")
    team = fast.decoder.executable.team  # type: ignore[attr-defined]
    assert small.decoder.executable.team is team  # type: ignore[attr-defined]
    gc.collect()
    assert len(list(tasks.iterdir())) == before  # the target's came, the draft's went
    assert fast.generate(ids, max_new_tokens=12, do_sample=False).equal(expected[0])
    del fast
    gc.collect()
    assert small.generate(ids, max_new_tokens=12, do_sample=False).equal(expected[1])
