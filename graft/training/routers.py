"""Routers of feed-forwards, distilled layer by layer: which blocks of neurons make up for the whole on given text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from graft.calibration.measuring import Progress, changed, given, next_token_loss, shown, tidy
from graft.calibration.stored import fingerprint
from graft.compiler.errors import CheckpointError, PlanError
from graft.compiler.evaluate import Sequences, divergence, logits_of
from graft.compiler.program import Function
from graft.compiler.shapes import attribute
from graft.compiler.trunk import Block, find_trunk
from graft.passes.routed_ffn import RoutedFFN
from graft.passes.routing.config import WEIGHTS, RoutingConfig
from graft.passes.routing.folder import CONFIG
from graft.passes.routing.parts import DenseFeedForward, has_bias, take_apart
from graft.training.features import replace_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_CHOICES = 4096
"""Sets of blocks that are looked at for each token."""
TOGETHER = 1024
"""Tokens whose blocks are computed at once."""


@dataclass(frozen=True)
class RouterOptions:
    """Options of `train_routers`."""

    blocks: int = 4
    """Of each feed-forward, as equal as multiples of 32 neurons can be."""
    top_k: int | None = 2
    """How many of them a token runs; None where `prefixes` says it."""
    prefixes: tuple[int, ...] | None = None
    """The numbers of first blocks among which the router chooses."""
    share: float = 0.5
    """With `prefixes`, the share of neurons that tokens run in the mean."""
    layers: tuple[int, ...] | None = None
    """Which feed-forwards; None for all."""
    epochs: int = 30
    batch: int = 512
    """Tokens of a training step."""
    rate: float = 1e-2
    held_out: float = 0.1
    """Part of the texts that is measured on, and never trained on; one at least."""
    seed: int = 0

    def __post_init__(self) -> None:
        right = self.blocks > 1 and min(self.epochs, self.batch) > 0 and self.rate > 0
        right &= 0 < self.share < 1 and 0 < self.held_out < 1 and (self.top_k is None) is not (self.prefixes is None)
        right &= self.top_k is None or (0 < self.top_k < self.blocks and comb(self.blocks, self.top_k) <= MOST_CHOICES)
        if not right:
            raise PlanError(
                "the options of routers are not right",
                expected="two blocks or more, top_k below their number or prefixes, shares between 0 and 1, and up to "
                f"{MOST_CHOICES} sets of blocks to choose from",
                found=self,
                where="RouterOptions",
            )


def train_routers(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    folder: str | Path,
    options: RouterOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train routers for a model's dense feed-forwards on token ids of some texts and write them to a folder, for
    `graft.RoutedFFN(folder)`.

    For every token the set of blocks is looked for, among those that the options allow, whose sum is nearest to the
    whole feed-forward's result by its squared distance; a linear of what the feed-forward reads then learns to name
    it, by cross entropy (FactorLLM's router, 2408.11855, learns the single blocks of least error, which need not be
    the best set of several). With `prefixes` every neuron that runs has a price, the same for all tokens of a layer,
    at which they run `share` in the mean. The model's own weights are not trained, and every layer learns on the whole
    model's values.

    Returns what is in config.json too: of each layer the error, as a part of the result's square, of the router, of
    the best sets, and of the best set that is the same for all tokens; KL and loss of the routed model; all on texts
    that were not trained on.

    Raises PlanError for fewer than two texts, PassError for feed-forwards of another form, CheckpointError where the
    folder holds something else.
    """
    options, folder, say = options or RouterOptions(), Path(folder).expanduser(), progress or (lambda _: None)
    check_folder(folder)
    sequences = given(texts)
    if len(sequences) < 2:
        raise PlanError("routers are trained on some texts and measured on others", expected="two or more", found=1)
    function = tidy(model)
    parts = [take_apart(block) for block in chosen_blocks(function, options.layers)]
    layers = options.layers or tuple(range(len(parts)))
    config = RoutingConfig(
        int(parts[0].x.meta["val"].shape[-1]), parts[0].intermediate, bounds_of(parts[0].intermediate, options.blocks),
        layers, options.top_k, options.prefixes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    count = min(max(1, round(options.held_out * len(order))), len(order) - 1)
    held, trained = (tuple(sequences[at] for at in part) for part in (order[:count], order[count:]))
    say(f"feed-forwards over {sum(map(len, sequences))} tokens")
    inputs = [read_inputs(function, some, options.layers) for some in (trained, held)]
    tensors, figures = dict[str, Tensor](), dict[str, Any]()
    for place, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        samples = [Sample.of(function, part, config, one[place]) for one in inputs]
        router = Router(config, samples[0], options).train(generator)
        tensors |= {f"{layer}.{name}": tensor for name, tensor in router.folded().items()}
        figures[str(layer)] = router.figures(samples[1])
        say(f"feed-forward {layer}: error {figures[str(layer)]['error']:.3f}")
    about = {"tokens": sum(map(len, trained)), "model": fingerprint(model), **asdict(options)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{WEIGHTS}.part")
    (folder / f"{WEIGHTS}.part").replace(folder / WEIGHTS)
    replace_text(folder / CONFIG, json.dumps(config.to_json()))
    say("the routed model")
    found = {"layers": figures, **measured(function, held, folder)}
    replace_text(folder / CONFIG, json.dumps({**config.to_json(), "figures": found, "training": about}, indent=1))
    return found


def check_folder(folder: Path) -> None:
    """Raise CheckpointError where a folder holds anything but routers."""
    others = {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS} if folder.is_dir() else set()
    if others:
        raise CheckpointError(
            "routers are trained into a folder of their own",
            expected="no folder, an empty one, or one of routers",
            found=", ".join(sorted(others)[:8]),
            where=folder,
        )


def chosen_blocks(function: Function, layers: Sequence[int] | None) -> list[Block]:
    """The feed-forwards that are to be routed."""
    blocks = find_trunk(function.graph).feed_forward
    wanted = range(len(blocks)) if layers is None else layers
    if not wanted or not all(0 <= layer < len(blocks) for layer in wanted):
        raise PlanError("no such feed-forwards", expected=f"0 to {len(blocks) - 1}", found=list(wanted))
    return [blocks[layer] for layer in wanted]


def bounds_of(neurons: int, blocks: int) -> tuple[int, ...]:
    """Equal blocks, but for multiples of 32 neurons where there are enough, else of 2."""
    step = 32 if neurons >= 32 * blocks else 2
    inner = (round(block * neurons / blocks / step) * step for block in range(1, blocks))
    return (0, *inner, neurons)


def read_inputs(function: Function, sequences: Sequences, layers: Sequence[int] | None) -> list[Tensor]:
    """Of each routed feed-forward what it reads, [tokens, width]."""
    own = function.copy()
    nodes = [take_apart(block).x for block in chosen_blocks(own, layers)]
    return shown(own, nodes, sequences)[1]


def measured(function: Function, sequences: Sequences, folder: Path) -> dict[str, float]:
    """KL of the whole model from the routed one, and both losses, over the texts."""
    wanted = logits_of(function, sequences)
    logits = logits_of(changed(function, [RoutedFFN(folder)]), sequences)
    nll = next_token_loss(logits, sequences), next_token_loss(wanted, sequences)
    return {"kl": divergence(wanted, logits), "nll": nll[0], "nll_of_the_whole_model": nll[1]}


@dataclass(frozen=True)
class Sample:
    """One feed-forward over the tokens of texts."""

    x: Tensor
    """float32 [tokens, width]: what it reads."""
    gram: Tensor
    """float32 [tokens, blocks, blocks]: scalar products of what its blocks give."""

    @classmethod
    @torch.no_grad()
    def of(cls, function: Function, part: DenseFeedForward, config: RoutingConfig, x: Tensor) -> Sample:
        """From what it reads."""
        down = attribute(function.weights, part.down.args[1].target).detach()
        grams = []
        for some in x.split(TOGETHER):
            neurons = neurons_of(function, part, some.to(down.device))
            given = [
                linear(neurons[:, start:end], down[:, start:end]).float()
                for start, end in zip(config.bounds, config.bounds[1:], strict=False)
            ]
            blocks = torch.stack(given, 1)
            grams.append((blocks @ blocks.transpose(1, 2)).cpu())
        return cls(x.float(), torch.cat(grams))

    def errors(self, running: Tensor) -> Tensor:
        """float32 [tokens, n]: squared distance from the whole, of n sets [n, blocks] that run, or of one of each token
        [tokens, 1, blocks]."""
        left = 1.0 - running
        return ((left @ self.gram) * left).sum(-1)


def neurons_of(function: Function, part: DenseFeedForward, x: Tensor) -> Tensor:
    """[tokens, intermediate]: what the last product of a feed-forward reads."""
    known: dict[fx.Node, Any] = {}
    for one in part.first:
        operands = [attribute(function.weights, node.target) for node in one.args[1 : 2 + has_bias(one)]]
        known[one] = linear(x, *operands)
    for node in part.inner:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        known[node] = node.target(*args, **kwargs)
    found: Tensor = known[part.down.args[0]]
    return found


class Router:
    """One router in training, over inputs of mean 0 and deviation 1."""

    def __init__(self, config: RoutingConfig, sample: Sample, options: RouterOptions) -> None:
        self.config, self.sample, self.options = config, sample, options
        self.mean, self.deviation = sample.x.mean(0), sample.x.std(0).clamp_min(1e-6)
        self.weight = nn.Parameter(torch.zeros(config.outputs, config.width))
        self.bias = nn.Parameter(torch.zeros(config.outputs))
        if config.prefixes is None:
            chosen = list(combinations(range(config.blocks), config.top_k or 1))
        else:
            chosen = [tuple(range(size)) for size in config.prefixes]
        self.sets = torch.tensor([[float(block in one) for block in range(config.blocks)] for one in chosen])
        sizes = torch.tensor(config.bounds).diff() / config.intermediate
        self.neurons = self.sets @ sizes
        self.price = 0.0 if config.prefixes is None else self.find_price(sample)

    def find_price(self, sample: Sample) -> float:
        """Of all neurons of the feed-forward, in squared distance, at which the best sets have the wanted share."""
        errors, low, high = sample.errors(self.sets), 0.0, float(sample.errors(self.sets[:1] * 0).max()) * 64 + 1e-6
        for _ in range(48):
            middle = (low + high) / 2
            share = float(self.neurons[(errors + middle * self.neurons).argmin(-1)].mean())
            low, high = (middle, high) if share > self.options.share else (low, middle)
        return high

    def best(self, sample: Sample) -> Tensor:
        """int64 [tokens]: the best set of each token."""
        return (sample.errors(self.sets) + self.price * self.neurons).argmin(-1)

    def train(self, generator: torch.Generator) -> Router:
        """All epochs."""
        best = self.best(self.sample)
        prefixed = self.config.prefixes is not None
        wanted = torch.eye(len(self.sets))[best] if prefixed else self.sets[best] / (self.config.top_k or 1)
        x = (self.sample.x - self.mean) / self.deviation
        optimiser = torch.optim.AdamW([self.weight, self.bias], lr=self.options.rate, weight_decay=0.1)
        steps = self.options.epochs * -(-len(x) // self.options.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(self.options.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(self.options.batch):
                optimiser.zero_grad()
                scores = linear(x[rows], self.weight, self.bias).log_softmax(-1)
                (-(wanted[rows] * scores).sum(-1).mean()).backward()
                optimiser.step()
                schedule.step()
        return self

    def folded(self) -> dict[str, Tensor]:
        """Weight and bias over inputs as they are."""
        weight = self.weight.detach() / self.deviation
        return {"weight": weight.contiguous(), "bias": (self.bias.detach() - weight @ self.mean).contiguous()}

    @torch.no_grad()
    def figures(self, sample: Sample) -> dict[str, float]:
        """Errors on a sample, as parts of the square of the whole, and the share of neurons that run."""
        whole = sample.errors(torch.zeros(1, self.config.blocks)).sum()
        folded = self.folded()
        scores = linear(sample.x, folded["weight"], folded["bias"])
        if self.config.prefixes is None:
            running = torch.zeros_like(scores).scatter(-1, scores.topk(self.config.top_k or 1).indices, 1.0)
        else:
            running = self.sets[scores.argmax(-1)]
        constant = sample.errors(self.sets).sum(0) + self.price * self.neurons * len(sample.x)
        same = int(constant.argmin())
        sizes = torch.tensor(self.config.bounds).diff() / self.config.intermediate
        best = self.best(sample)
        found = {
            "error": sample.errors(running[:, None]).sum() / whole,
            "neurons": (running @ sizes).mean(),
            "error_of_best": sample.errors(self.sets[best][:, None]).sum() / whole,
            "neurons_of_best": self.neurons[best].mean(),
            "error_of_one_set": sample.errors(self.sets[same : same + 1]).sum() / whole,
            "neurons_of_one_set": self.neurons[same],
        }
        return {name: round(float(value), 5) for name, value in found.items()}
