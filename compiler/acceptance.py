"""Which acceptance rule keeps the target's distribution for which drafts: one rule, for plans and for generate().

What decides is how siblings were drawn (`Drafter.kind`), whether the policy gives a node several children, and whether
the output is sampled or greedy.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.compiler import registry
from graft.compiler.drafting import Drafter, DraftKind, TreePolicy, Verifier
from graft.compiler.errors import PlanError
from graft.compiler.passing import spec_name


def is_lossy(verifier: Verifier | type[Verifier]) -> bool:
    """Whether the rule changes the output on purpose: it claims to be lossless for nothing."""
    return not verifier.lossless_for and not verifier.lossless_for_greedy


def kinds_of(verifier: Verifier | type[Verifier], sampling: bool | None) -> frozenset[DraftKind]:
    """The draft kinds that a rule is lossless for; `sampling` None: in one of the two modes."""
    if sampling is None:
        return verifier.lossless_for | verifier.lossless_for_greedy
    return verifier.lossless_for if sampling else verifier.lossless_for_greedy


def is_lossless(
    verifier: Verifier | type[Verifier], kind: DraftKind, *, branches: bool, sampling: bool | None = None
) -> bool:
    """Whether the output keeps the target's distribution, or under greedy decoding the target's best tokens, for drafts
    of that kind in trees that branch or in chains."""
    return kind in kinds_of(verifier, sampling) and not (verifier.chains_only and branches)


def joint_kind(drafters: Sequence[Drafter]) -> DraftKind:
    """The kind of a tree that all of them draft together: one's own, deterministic if all are, else mixed."""
    kinds = [drafter.kind for drafter in drafters]
    return kinds[0] if len(kinds) == 1 or set(kinds) == {"deterministic"} else "mixed"


def check_lossless(
    verifier: Verifier, drafters: Sequence[Drafter], policy: TreePolicy | None, *, sampling: bool | None = None
) -> None:
    """The type check of a method: a rule that is not lossy by name must be lossless for every drafter and for their
    joint tree. `sampling` None: the mode is not known yet, one of the two has to do; `policy` None: graft's default,
    whose trees do not branch where drafts are independent.

    Raises PlanError, which names the verifier, the drafter, why they do not go together, and which verifiers would do.
    """
    if is_lossy(verifier) or not drafters:
        return
    tried = [(spec_name(type(drafter).__name__), drafter.kind) for drafter in drafters]
    if len(drafters) > 1:
        tried.append((" with ".join(name for name, _ in tried), joint_kind(drafters)))
    rule = spec_name(type(verifier).__name__)
    for name, kind in tried:
        branches = policy is not None and policy.branches(kind)
        if is_lossless(verifier, kind, branches=branches, sampling=sampling):
            continue
        mode = {None: "", True: " under sampling", False: " under greedy decoding"}[sampling]
        kinds = kinds_of(verifier, sampling)
        others = sorted(
            spec_name(other.__name__)
            for other in registry.components(Verifier)
            if is_lossless(other, kind, branches=branches, sampling=sampling)
        )
        shape = f"{spec_name(type(policy).__name__)} shapes into {'trees that branch' if branches else 'chains'}"
        raise PlanError(
            f"verifier {rule} is not lossless for drafter {name}{mode}",
            expected=f"drafts of kind {', '.join(sorted(kinds)) or 'none'}{', in chains' * verifier.chains_only}",
            found=f"{name} drafts {kind} tokens" + (f", which {shape}" if policy is not None else ""),
            where="plan.verifier and plan.draft",
            remedy=f"use {' or '.join(others)}" if others else "use another drafter",
        )
