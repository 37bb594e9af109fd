"""The order in which passes run, from the facts they require, provide and break."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import networkx as nx

from graft.compiler.errors import PlanError
from graft.compiler.passing import Pass
from graft.compiler.registry import nearest


def ordered(passes: Sequence[Pass], facts: Collection[str] = ()) -> list[Pass]:
    """The passes in an order in which each finds what it requires; the given order where that is one.

    Else the order nearest to it that the declared facts allow, a pass standing behind the first one that provides what
    it requires and before every other one that breaks it. `facts` hold at the start. Raises PlanError naming the
    passes that do not go together and why.
    """
    if not any(failures(passes, facts)):
        return list(passes)
    constraints = nx.DiGraph()
    constraints.add_nodes_from(range(len(passes)))
    for index, one in enumerate(passes):
        for fact in sorted(one.requires):
            add_constraints(constraints, passes, index, fact, facts)
    try:
        order = [passes[index] for index in nx.lexicographical_topological_sort(constraints)]
    except nx.NetworkXUnfeasible:
        raise conflict(constraints, passes) from None
    for one, fact in failures(order, facts):
        raise PlanError(
            f"{one.pass_name()} requires {fact!r}, which does not hold where it can run",
            found=" -> ".join(other.pass_name() for other in order),
        )
    return order


def failures(passes: Sequence[Pass], facts: Collection[str]) -> Iterator[tuple[Pass, str]]:
    """(pass, fact) of every requirement that does not hold when the passes run in this order."""
    holding = set(facts)
    for one in passes:
        yield from ((one, fact) for fact in sorted(one.requires - holding))
        holding = holding - one.breaks | one.provides


def add_constraints(
    constraints: nx.DiGraph, passes: Sequence[Pass], index: int, fact: str, facts: Collection[str]
) -> None:
    """What must come before and after the pass at `index`, because it requires `fact`."""
    name = passes[index].pass_name()
    if fact not in facts:
        provider = next((i for i, one in enumerate(passes) if fact in one.provides and i != index), None)
        if provider is None:
            known = set(facts).union(*(one.provides for one in passes))
            raise PlanError(
                f"{name} requires {fact!r}, which no pass of the plan provides",
                expected=nearest(fact, known),
                found=fact,
                where=f"{type(passes[index]).__name__}.requires",
                remedy="add a pass that provides it",
            )
        reason = f"{name} requires {fact!r}, which {passes[provider].pass_name()} provides"
        constraints.add_edge(provider, index, reason=reason)
    for other, one in enumerate(passes):
        if fact in one.breaks and other != index:
            constraints.add_edge(index, other, reason=f"{name} requires {fact!r}, which {one.pass_name()} breaks")


def conflict(constraints: nx.DiGraph, passes: Sequence[Pass]) -> PlanError:
    """The error for requirements that go round in a circle."""
    cycle = [edge[:2] for edge in nx.find_cycle(constraints)]
    names = list(dict.fromkeys(passes[before].pass_name() for before, _ in cycle))
    reasons = dict.fromkeys(constraints.edges[edge]["reason"] for edge in cycle)
    if len(names) == 1:
        return PlanError(f"{names[0]} cannot run twice", found="; ".join(reasons), remedy="leave one of them out")
    return PlanError(
        f"{' and '.join(names)} do not go together",
        expected="an order in which each finds what it requires",
        found="; ".join(reasons),
        remedy=f"leave out {' or '.join(names)}",
    )
