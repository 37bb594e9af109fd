"""What compressions of the KV cache lose, measured once, kept, and added up for plans that combine them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.calibration.stored import fingerprint, read, shape, write
from graft.compiler.errors import CheckpointError, PlanError
from graft.compiler.kv.codecs import DENSE, IN_PLACE, KeyChannels
from graft.compiler.plan import Plan
from graft.compiler.spec import show
from graft.passes.compress_kv import CompressKV
from graft.quality.arms import split
from graft.quality.metrics import Interval
from graft.quality.report import Quality

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

STORED = "compress-kv"
"""Kind of the file."""


@dataclass(frozen=True)
class Estimate:
    """What a compression is expected to lose: KL to the full cache in nats per token, each with its 95% interval."""

    parts: tuple[tuple[CompressKV, Interval | None], ...]
    """Its mechanisms, each alone; None where that was not measured. What loses nothing is left out."""
    measured: Interval | None
    """The compression itself, where that was."""
    where: str
    """On which text, behind how much of it."""

    @property
    def total(self) -> Interval | None:
        """The sum of the parts, and of the ends of their intervals; None where one of them is not known.

        That losses add up is a rule of thumb, not a law (docs/measuring-quality.md has how far it held on SmolLM2).
        """
        known = [one for _, one in self.parts if one is not None]
        if len(known) < len(self.parts):
            return None
        return Interval(*(sum(getattr(one, name) for one in known) for name in ("mean", "low", "high")))


@dataclass(frozen=True)
class Losses:
    """KL of compressions of one model, on one text, at one length of context: JSON that says of what it is."""

    about: Mapping[str, Any]
    """The text and its hash, sizes, the dtype, and what else the plans do."""
    kl: Mapping[str, Interval]
    """By the compression with all its options."""
    model: Mapping[str, Any]
    """Which model it is of (calibration.stored.fingerprint)."""

    @classmethod
    def of(cls, quality: Quality, plan: Plan, model: PreTrainedModel, about: Mapping[str, Any]) -> Losses:
        """What was measured; `plan` is one of those that were, whose other passes all of them share."""
        found = {
            repr(one.candidate.change): quality.kl(one.name) for one in quality.results if one.candidate.change
        }
        dtype = str(model.dtype).removeprefix("torch.")
        return cls({**about, "dtype": dtype, "passes": others(plan)}, found, fingerprint(model))

    def beside(self, other: Losses) -> Losses:
        """Both together, its own figures where both have one. Raises PlanError for another model or text."""
        mine, theirs = {**self.model, **self.about}, {**other.model, **other.about}
        differ = [name for name in mine if mine[name] != theirs.get(name)]
        if differ:
            raise PlanError(
                "losses of other measurements cannot stand beside each other",
                expected=", ".join(f"{name} {theirs.get(name)}" for name in differ),
                found=", ".join(f"{name} {mine[name]}" for name in differ),
                remedy="another file",
            )
        return replace(self, kl={**other.kl, **self.kl})

    def estimate(self, plan: Plan | CompressKV, config: PretrainedConfig | None = None) -> Estimate:
        """What the plan's compression is expected to lose. Raises PlanError for a plan without one, for one whose
        other passes on the target are not those that all of this was measured with, and for a config of another
        model."""
        whole = Plan(target=(plan,)) if isinstance(plan, CompressKV) else plan
        change = split(whole)[1]
        if config is not None and shape(config).items() - self.model.items():
            raise PlanError("losses are of another model", expected=shape(config), found=dict(self.model))
        if others(whole) != self.about["passes"]:
            raise PlanError(
                "what compressing costs was measured beside other passes",
                expected=", ".join(self.about["passes"]) or "no other pass on the target",
                found=", ".join(others(whole)) or "no other pass",
                remedy="measure this plan: python -m graft quality MODEL --plan FILE --parts --save FILE",
            )
        known, measured = tuple((one, self.kl.get(repr(one))) for one in parts(change)), self.kl.get(repr(change))
        where = "measured behind {context} tokens of {text}, in {dtype}".format(**self.about)
        return Estimate(known, measured, where)

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises CheckpointError where that cannot be done."""
        kl = {name: one.to_json() for name, one in self.kl.items()}
        write(path, STORED, self.model, {"about": dict(self.about), "kl": kl})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Losses:
        """What `save` wrote. Raises CheckpointError for a file that is damaged or something else, and, given a model,
        for one of another model."""
        known, data = read(path, STORED, model)
        try:
            kl = {name: Interval(**one) for name, one in data["kl"].items()}
            if not all(math.isfinite(value) for one in data["kl"].values() for value in one.values()):
                raise ValueError("a figure that is not finite")
            return cls({**data["about"], "passes": list(data["about"]["passes"])}, kl, known)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "losses cannot be read", expected="KL with intervals", found=repr(error), where=path
            ) from error


def others(plan: Plan) -> list[str]:
    """The plan's passes on the target but for its compression."""
    return [show(one) for one in split(plan)[0].target]


def parts(change: CompressKV) -> list[CompressKV]:
    """The mechanisms of a compression, each alone under the same triggers; those that lose nothing are left out."""
    codec = change.codec
    codecs = [replace(codec, inner=DENSE), codec.inner] if isinstance(codec, KeyChannels) else [codec]
    found = [replace(change, codec=one, eviction=None, selection=None) for one in codecs if not one.exact]
    if change.eviction is not None:
        found.append(replace(change, codec=DENSE, selection=None))
    if change.selection is not None:
        found.append(replace(change, codec=IN_PLACE, eviction=None))
    return found
