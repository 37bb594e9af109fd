"""What compiling and generating came to, as text: passes, predicted cost of a step, and what generate() measured."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from graft.codegen.skips import SkipCount
from graft.compiler.cost import Workload, function_cost
from graft.compiler.notation import bytes_text, count_text
from graft.compiler.program import Function, KernelRecord, PassRecord
from graft.compiler.spec import show

if TYPE_CHECKING:
    from graft.quality.losses import Estimate
    from graft.quality.metrics import Interval

WIDTH = 120
ROWS = (1, 8, 16, 64)
"""Rows of the steps whose cost is predicted."""
DRAFTED = 8
"""Rows of a call that drafts whose cost is predicted beside that of one."""
CONTEXT = 1024
"""Tokens of context at which it is."""


def render_report(
    records: Sequence[PassRecord],
    stats: Mapping[str, Any] | None = None,
    *,
    function: Function | None = None,
    drafting: Sequence[Function] = (),
    skips: Mapping[str, Sequence[SkipCount]] | None = None,
    invariant: bool | None = None,
    memory: Mapping[str, int] | None = None,
    estimate: Estimate | None = None,
    width: int = WIDTH,
) -> str:
    """The report as plain text of at most `width` columns.

    `records` are the program's; `function` is the one whose steps are priced, `drafting` are those that draft.
    `skips` are the guards of each function, of which those without any are left out. `estimate` is what the target's
    compression of the KV cache is expected to lose.
    `stats` is what CompiledModel.stats holds: numbers by name, seconds under names that end in "_seconds", and under
    "drafters" numbers by name for each drafter. A list is one value for each request and is left out.
    """
    tables = [passes_table(records)] if records else []
    if estimate is not None:
        tables.append(losses_table(estimate))
    if function is not None:
        tables.append(cost_table(function))
        if function.kernels:
            tables.append(kernels_table(function.kernels))
    if drafting:
        tables.append(drafting_table(drafting))
    if invariant is not None:
        tables.append(execution_table(invariant, memory or {}))
    if stats:
        tables.append(stats_table(stats))
        if stats.get("drafters"):
            tables.append(drafters_table(stats["drafters"]))
    if counted := {name: guards for name, guards in (skips or {}).items() if guards and guards[0].calls}:
        tables.append(skips_table(counted))
    console = Console(file=io.StringIO(), width=width, color_system=None, emoji=False, markup=False)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def new_table(title: str, columns: Iterable[str], numbers: Iterable[str] = ()) -> Table:
    """A table with its title at the left; columns of numbers are aligned at the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="")
    right = set(numbers)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def passes_table(records: Sequence[PassRecord]) -> Table:
    """What each pass did; a pass's notes stand below it."""
    numbers = ("matches", "nodes", "parameters", "ms")
    table = new_table("Passes", ("pass", "contract", *numbers, "check"), numbers)
    samples = {sample for _, on, sample in (record.check.rpartition(", on ") for record in records) if on}
    shared = f", on {samples.pop()}" if len(samples) == 1 else ""
    if shared:
        table.caption, table.caption_justify, table.caption_style = f"checked{shared[1:]}", "left", ""
    for record in records:
        table.add_row(
            record.name,
            record.contract,
            str(record.matches),
            change(str(record.nodes_before), str(record.nodes_after)),
            change(bytes_text(record.bytes_before), bytes_text(record.bytes_after)),
            f"{record.seconds * 1000:.0f}",
            "\n".join([record.check.removesuffix(shared), *record.notes]).strip(),
        )
    total = sum(record.seconds for record in records)
    table.add_section()
    first, last = records[0], records[-1]
    nodes = change(str(first.nodes_before), str(last.nodes_after))
    size = change(bytes_text(first.bytes_before), bytes_text(last.bytes_after))
    table.add_row("all", "", "", nodes, size, f"{total * 1000:.0f}", "")
    return table


def change(before: str, after: str) -> str:
    """`before -> after`, or one of them where they are the same."""
    return after if before == after else f"{before} -> {after}"


def losses_table(estimate: Estimate) -> Table:
    """What compressing the KV cache is expected to cost: KL of each mechanism alone, their sum, what was measured."""
    numbers = ("KL", "95%")
    table = new_table("Compressed KV cache, KL to the full one in nats per token", ("what", *numbers), numbers)
    for part, alone in estimate.parts:
        table.add_row(show(part), *interval_text(alone))
    table.add_section()
    table.add_row("estimated, the sum", *interval_text(estimate.total))
    table.add_row("measured", *interval_text(estimate.measured))
    table.caption, table.caption_justify, table.caption_style = estimate.where, "left", ""
    return table


def interval_text(found: Interval | None) -> tuple[str, str]:
    """A mean and its interval; a dash where there is none."""
    return ("-", "") if found is None else (f"{found.mean:.2g}", f"{found.low:.2g} to {found.high:.2g}")


def cost_table(function: Function) -> Table:
    """Predicted cost of one call of the function, by rows."""
    cost = function_cost(function)
    prediction = function.lowered.prediction if function.lowered else None
    timed = ("predicted ms",) if prediction else ()
    numbers = ("rows", "FLOPs", "weights", "KV", "unfused activations", "FLOPs per byte", *timed)
    title = f"One call of {function.name}, predicted at {CONTEXT} tokens of context"
    table = new_table(title, numbers, numbers)
    for rows in ROWS:
        work = cost.at(Workload(rows=rows, wanted=rows, context=CONTEXT, length=rows))
        necessary = work.weights + work.kv
        table.add_row(
            str(rows),
            count_text(work.flops),
            bytes_text(work.weights),
            bytes_text(work.kv),
            bytes_text(work.activations),
            f"{work.flops / necessary:.1f}" if necessary else "",
            *([f"{prediction.seconds(rows, CONTEXT) * 1000:.1f}"] if prediction else []),
        )
    return table


def drafting_table(functions: Sequence[Function]) -> Table:
    """The functions that draft: what one call of one row comes to, and the predicted time of one and of eight rows."""
    numbers = ("kernels", "FLOPs", "weights", "KV", "ms, 1 row", f"ms, {DRAFTED} rows")
    table = new_table(f"Functions that draft, at {CONTEXT} tokens of context", ("function", *numbers), numbers)
    for function in functions:
        work = function_cost(function).at(Workload(rows=1, wanted=1, context=CONTEXT, length=1))
        prediction = function.lowered.prediction if function.lowered else None
        times = [prediction.seconds(rows, CONTEXT) if prediction else None for rows in (1, DRAFTED)]
        table.add_row(
            function.name,
            str(len(function.kernels)),
            count_text(work.flops),
            bytes_text(work.weights),
            bytes_text(work.kv),
            *("" if seconds is None else f"{seconds * 1000:.2f}" for seconds in times),
        )
    return table


def kernels_table(kernels: Sequence[KernelRecord]) -> Table:
    """The kernels by their code, with what all calls of one come to in a step of one row; ATen's with the reason."""
    numbers = ("calls", "FLOPs", "bytes")
    table = new_table("Kernels, at one row", ("kernel", *numbers, "nodes of the first"), numbers)
    groups: dict[tuple[str, str], list[KernelRecord]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name, kernel.reason), []).append(kernel)
    work = Workload(rows=1, wanted=1, context=CONTEXT, length=1)
    for (name, reason), group in groups.items():
        costs = [kernel.cost.at(work) for kernel in group]
        nodes = ", ".join(group[0].nodes)
        table.add_row(
            name,
            str(len(group)),
            count_text(sum(cost.flops for cost in costs)),
            bytes_text(sum(cost.bytes for cost in costs)),
            f"{nodes}\nthrough ATen, row by row: {reason}" if reason else nodes,
        )
    return table


def execution_table(invariant: bool, memory: Mapping[str, int]) -> Table:
    """Whether results depend on company, and what is held in memory."""
    table = new_table("Execution", ("", "value"))
    table.add_row("a row's result", "the same bits in any company" if invariant else "its last bits depend on company")
    for name, size in memory.items():
        table.add_row(name, bytes_text(size))
    return table


def skips_table(skips: Mapping[str, Sequence[SkipCount]]) -> Table:
    """What choices of rows came to in the latest generate(), its prompt among the calls: the share of all pairs of a
    row and a guarded region in which the row went past it, the share of pairs of a call and a region in which all rows
    did, and what a call read of the guarded weights."""
    numbers = ("guarded regions", "calls", "rows past", "regions skipped whole", "weights a call")
    table = new_table("Skipping, the latest call of generate()", ("function", *numbers), numbers)
    for name, guards in skips.items():
        rows, past, calls, whole = (
            sum(one.regions * getattr(one, field) for one in guards)
            for field in ("rows", "skipped_rows", "calls", "skipped_calls")
        )
        of = sum(one.weights for one in guards)
        read = sum(one.weights * (1 - one.skipped_calls / one.calls) for one in guards if one.calls)
        table.add_row(
            name,
            str(sum(one.regions for one in guards)),
            str(guards[0].calls),
            f"{past / max(rows, 1):.1%}",
            f"{whole / max(calls, 1):.1%}",
            f"{bytes_text(read)} of {bytes_text(of)}",
        )
    return table


def stats_table(stats: Mapping[str, Any]) -> Table:
    """What generate() measured last: first what is derived, then the numbers as they are."""
    table = new_table("Generation, the latest call", ("", "value"), ("value",))
    for name, value in {**derived(stats), **stats}.items():
        if isinstance(value, (int, float, str)):
            table.add_row(name.removesuffix("_seconds").replace("_", " "), value_text(name, value))
    return table


def derived(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Rates that the measured numbers give."""
    found: dict[str, Any] = {}
    tokens, seconds = stats.get("new_tokens"), stats.get("decode_seconds")
    if tokens and seconds and "tokens_per_second" not in stats:
        found["tokens_per_second"] = tokens / seconds
    if stats.get("drafted") and "acceptance" not in stats:
        found["acceptance"] = stats.get("accepted", 0) / stats["drafted"]
    return found


def value_text(name: str, value: float | str) -> str:
    """A number with its unit."""
    if isinstance(value, (bool, str)):
        return str(value)
    if name.endswith("_seconds"):
        return f"{value:.3f} s" if value >= 1 else f"{value * 1000:.1f} ms"
    if name.endswith("_bytes"):
        return bytes_text(value)
    if name == "acceptance" or name.endswith("_rate"):
        return f"{value:.1%}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def drafters_table(drafters: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each drafter contributed."""
    columns = list(dict.fromkeys(name for numbers in drafters.values() for name in numbers))
    table = new_table("Drafters", ("drafter", *(name.replace("_", " ") for name in columns)))
    for drafter, numbers in drafters.items():
        table.add_row(drafter, *(value_text(name, numbers[name]) if name in numbers else "" for name in columns))
    return table
