"""What is trained on the stream behind a layer: Kangaroo's adapter, and classifiers that say when to exit.

Both read the layers below as the captured graph has them, and run its parts with gradients: the adapter's equations
are those of the target's own block, whatever the family, over parameters of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import cross_entropy, linear, silu

from graft.compiled import CompiledModel
from graft.compiler.canonical import ATTENTION, aten
from graft.compiler.ops import causal_attention
from graft.compiler.program import Function
from graft.compiler.shapes import attribute
from graft.compiler.trunk import Trunk, find_trunk
from graft.passes.acceptance_head import ACCEPTANCE_FORMAT, ACCEPTANCE_WEIGHTS, EPS, acceptance_shapes
from graft.passes.early_exit import check_exit
from graft.passes.exit_adapter import ADAPTER_FORMAT, ADAPTER_WEIGHTS, adapter_parts
from graft.passes.exit_classifier import CLASSIFIER_FORMAT, CLASSIFIER_WEIGHTS
from graft.training.features import Sample
from graft.training.lines import OwnParameters, TrainedLine
from graft.training.options import TrainOptions
from graft.training.steps import Figures
from graft.training.trainees import tables

DENSE = "common-subexpression"
"""The pass behind which the target has no cache yet."""
NARROW = (torch.bfloat16, torch.float16)


class Part(fx.Interpreter):
    """A part of the dense target, with gradients: own parameters in the place of some, float32 throughout."""

    def __init__(self, function: Function, own: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(function.module())
        self.own = own or {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter, wide."""
        value = self.own[target] if target in self.own else super().get_attr(target, args, kwargs)
        return value.float() if value.dtype in NARROW else value

    def run_node(self, node: fx.Node) -> Any:
        """A node; attention as what it means, since the operator itself has no gradient."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.target in ATTENTION:
            return causal_attention(*args, **kwargs)
        if node.target is aten._to_copy.default and kwargs.get("dtype") in NARROW:
            return args[0]
        return super().run_node(node)


def dense(compiled: CompiledModel, layer: int) -> tuple[Function, Trunk]:
    """A copy of the target without a cache. Raises PassError for an exit that there is not."""
    function = compiled.program.snapshots[DENSE]["forward"].copy()
    trunk = find_trunk(function.graph)
    check_exit(trunk, layer, "train-heads")
    return function, trunk


class Exit:
    """The stream behind the first layers."""

    def __init__(self, compiled: CompiledModel, layer: int) -> None:
        below, trunk = dense(compiled, layer)
        ending(below, trunk.layers[layer][0].stream)
        self.below, self.device = below.module(), compiled.decoder.device

    def stream(self, tokens: Sequence[int]) -> Tensor:
        """[length, width] of one sequence, in the model's dtype."""
        ids = torch.tensor([list(tokens)], device=self.device)
        with torch.no_grad():
            found: Tensor = self.below(ids, torch.arange(len(tokens), device=self.device)[None])
        return found[0]


def ending(function: Function, node: fx.Node) -> None:
    """Let the function return a node alone."""
    function.output.args = (node,)
    function.graph.eliminate_dead_code()


def beginning(function: Function, stream: fx.Node, result: fx.Node) -> Function:
    """Let the function take the stream [1, length, width] as a third input, and return a node behind it."""
    graph = function.graph
    with graph.inserting_after([node for node in graph.nodes if node.op == "placeholder"][-1]):
        given = graph.placeholder("stream")
    stream.replace_all_uses_with(given)
    ending(function, result)
    return function


def run_part(part: Part, stream: Tensor) -> Tensor:
    """[length, width] of a stream [length, width]."""
    positions = torch.arange(len(stream), device=stream.device)[None]
    found: Tensor = part.run(positions, positions, stream.float()[None])
    return found[0]


class ExitGuess:
    """What the final norm and the unembedding make of the stream at an exit."""

    def __init__(self, compiled: CompiledModel, layer: int) -> None:
        matrix = tables(compiled)[1]
        self.unembedding, self.dtype = matrix.float(), matrix.dtype
        function, trunk = dense(compiled, layer)
        stream = trunk.layers[layer][0].stream
        for block in reversed([block for one in trunk.layers[layer:] for block in one]):
            block.drop()
        self.part = Part(beginning(function, stream, trunk.hidden))

    @torch.no_grad()
    def normed(self, batch: Sequence[Sample]) -> Tensor:
        """[tokens, width]: the final norm."""
        return torch.cat([run_part(self.part, one.hidden.to(self.unembedding.device)) for one in batch])

    @torch.no_grad()
    def right(self, batch: Sequence[Sample], normed: Tensor | None = None) -> Tensor:
        """bool [tokens]: whether the best token here is the target's."""
        early = linear(self.normed(batch) if normed is None else normed, self.unembedding).argmax(-1)
        return early == torch.cat([one.labels[:, 0] for one in batch]).to(early.device)


class TrainedAdapter:
    """Kangaroo's adapter (2404.18911): the cross entropy of its guesses with the target's distribution.

    It starts as the block behind the exit and the final norm, where the paper starts at random [M].
    """

    file = ADAPTER_WEIGHTS

    def __init__(self, compiled: CompiledModel, options: TrainOptions) -> None:
        function, trunk = dense(compiled, options.layer)
        stream = trunk.layers[options.layer][0].stream
        _, names = adapter_parts(trunk, options.layer)
        read = {node.target: name for node, name in names.items()}
        self.network = OwnParameters({name: attribute(function.weights, at) for at, name in read.items()})
        self.network.to(compiled.decoder.device)
        own = {at: self.network[name] for at, name in read.items()}
        self.part = Part(beginning(function, stream, trunk.hidden), own)
        matrix = tables(compiled)[1]
        self.options, self.dtype, self.unembedding = options, matrix.dtype, matrix.float()

    def logits(self, batch: Sequence[Sample]) -> Tensor:
        """[tokens, vocabulary]: what the adapter says behind every token of some sequences."""
        device = self.unembedding.device
        return linear(torch.cat([run_part(self.part, one.hidden.to(device)) for one in batch]), self.unembedding)

    def losses(self, batch: Sequence[Sample]) -> list[Tensor]:
        """See `Trainee.losses`."""
        device = self.unembedding.device
        labels = torch.cat([one.labels for one in batch]).to(device)
        shares = torch.cat([one.shares for one in batch]).to(device)
        scores = self.logits(batch).log_softmax(-1).gather(1, labels)
        return [-(shares * scores).sum() / shares.sum()]

    @torch.no_grad()
    def measure(self, held: Iterable[Sequence[Sample]]) -> Figures:
        """See `Trainee.measure`; a chain drafts as many tokens as `TrainOptions.heads` says."""
        loss, hits = 0.0, list[Tensor]()
        for batch in held:
            loss += float(self.losses(batch)[0]) * sum(len(one.tokens) for one in batch)
            for one in batch:
                hits.append(self.logits([one]).argmax(-1).cpu() == one.labels[:, 0])
        count = max(sum(map(len, hits)), 1)
        right = sum(int(one.sum()) for one in hits)
        found = {"places": count, "loss": loss / count, "top_1": round(right / count, 4)}
        return found | {"tokens_per_step": 1 + chain_length(hits, self.options.heads)}

    def finished(self, best: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Trainee.finished`."""
        tensors = {name: tensor.to("cpu", self.dtype).contiguous() for name, tensor in best.items()}
        return {"format": ADAPTER_FORMAT, "layer": self.options.layer}, tensors


def chain_length(hits: Sequence[Tensor], most: int) -> float:
    """How many guesses in a row are right, `most` at most, on average over the places that have so many behind them."""
    runs = []
    for one in hits:
        windows = one.float().unfold(0, most, 1) if len(one) >= most else torch.empty(0, most)
        runs.append(windows.cumprod(1).sum(1))
    return float(torch.cat(runs).mean()) if runs and sum(map(len, runs)) else 0.0


class TrainedAcceptance:
    """SpecDec++'s acceptance head (2405.19715) for an exit: whether the target would choose what the exit drafts.

    Cross entropy over the two classes, a rejected token counting `REJECTED` times as the paper has it. The paper mixes
    tokens of draft and target into the text; the text here is the target's own, of which every place is asked about.
    """

    file = ACCEPTANCE_WEIGHTS
    REJECTED = 6.0

    def __init__(self, compiled: CompiledModel, options: TrainOptions) -> None:
        self.exit, self.options = ExitGuess(compiled, options.layer), options
        width, device = self.exit.unembedding.shape[1], self.exit.unembedding.device
        shapes = acceptance_shapes(options.layers, width)
        # Blocks that start at zero pass the stream on.
        self.network = OwnParameters({name: torch.zeros(shape) for name, shape in shapes.items()}).to(device)

    def answers(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """[tokens, 2], and whether the token was right."""
        x = torch.cat([one.hidden for one in batch]).to(self.exit.unembedding.device).float()
        x = x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        for block in range(self.options.layers):
            at = f"model.{block}.linear"
            x = x + silu(linear(x, self.network[f"{at}.weight"], self.network[f"{at}.bias"]))
        at = f"model.{self.options.layers}"
        return linear(x, self.network[f"{at}.weight"], self.network[f"{at}.bias"]), self.exit.right(batch)

    def losses(self, batch: Sequence[Sample]) -> list[Tensor]:
        """See `Trainee.losses`."""
        found, right = self.answers(batch)
        return [cross_entropy(found, right.long(), torch.tensor([self.REJECTED, 1.0], device=found.device))]

    @torch.no_grad()
    def measure(self, held: Iterable[Sequence[Sample]]) -> Figures:
        """See `Trainee.measure`: how often a drafted token is right, and how often the head says which it is."""
        loss, said, right = 0.0, list[Tensor](), list[Tensor]()
        for batch in held:
            loss += float(self.losses(batch)[0]) * sum(len(one.tokens) for one in batch)
            for one in batch:
                scores, truth = self.answers([one])
                said.append((scores.argmax(-1) == 1).cpu())
                right.append(truth.cpu())
        count = max(sum(map(len, right)), 1)
        agreed = sum(int((one == truth).sum()) for one, truth in zip(said, right, strict=True))
        return {
            "places": count,
            "loss": loss / count,
            "right_at_exit": round(sum(int(one.sum()) for one in right) / count, 4),
            "judged_rightly": round(agreed / count, 4),
            "tokens_per_step": 1 + chain_length(right, self.options.heads),
        }

    def finished(self, best: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Trainee.finished`."""
        tensors = {name: tensor.to("cpu", self.exit.dtype).contiguous() for name, tensor in best.items()}
        about = {"layer": self.options.layer, "num_layers": self.options.layers}
        return {"format": ACCEPTANCE_FORMAT, **about}, tensors


class TrainedClassifier(TrainedLine):
    """An exit classifier (CALM, 2207.07061): whether the best token at the exit is the target's best one.

    A line over the final norm of the stream, and binary cross entropy; the paper trains one for all layers together
    [M], here a layer has one of its own.
    """

    file = CLASSIFIER_WEIGHTS
    names = ("right_at_exit", "exits")

    def __init__(self, compiled: CompiledModel, options: TrainOptions) -> None:
        super().__init__(compiled, options)
        self.exit = ExitGuess(compiled, options.layer)

    def rows(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """See `TrainedLine.rows`: the norm at the exit, and whether it was right to exit."""
        normed = self.exit.normed(batch)
        return normed, self.exit.right(batch, normed)

    def tokens_per_step(self, said: Tensor) -> float:
        """An exit saves layers, and gives no more tokens."""
        return 1.0

    def finished(self, best: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Trainee.finished`."""
        return {"format": CLASSIFIER_FORMAT, "layer": self.options.layer}, self.tensors(best)
