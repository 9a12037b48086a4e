"""A whole step under an objective that is a function of the global batch, or with SAM.

The micro-batches of a step are kept until the last one is here. Where there are several, an
objective that is no mean over images takes two passes: scores and features of all of them without a
graph, by which the objective and its gradient with respect to them are known; then forward and
backward of each, with its part of that gradient. Noise follows from positions, so that the second
forward repeats the first.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import moa
from moa.model.injection import classifier
from trainer.engine.collectives import differentiable_sum, gathered
from trainer.engine.engine import Engine
from trainer.engine.sam import Sam
from trainer.objectives.mixup import draw_ring, mixed
from trainer.objectives.objective import Outcome, Seen, State, objective_of
from trainer.prepare.ahead import Ready
from trainer.prepare.parts import Parts
from trainer.train.micro_step import MicroStep
from trainer.train.nonfinite import poisoned


def make_step(parts: Parts, engine: Engine, facts: Mapping[str, list[float]]) -> MicroStep:
    """What computes the steps of a run; `facts` as `MicroStep.facts` gave them to a checkpoint."""
    settings = parts.config.objective
    if settings.name == "erm" and not settings.sam:
        return MicroStep(parts, engine)
    return ObjectiveStep(parts, engine, facts)


class _Piece(NamedTuple):
    """A micro-batch of b images."""

    images: Tensor
    labels: Tensor
    first: int
    """slot of the first image"""
    other_labels: Tensor | None = None
    """of the images that are mixed in"""
    share: Tensor | None = None
    """[b], of the own image"""


class ObjectiveStep(MicroStep):
    """Forward and backward of all micro-batches of a step, and the update.

    `facts` are those of a checkpoint; where they fit another objective or other domains, its state
    begins anew.
    """

    def __init__(self, parts: Parts, engine: Engine, facts: Mapping[str, list[float]]) -> None:
        super().__init__(parts, engine)
        self.config, train = parts.config.objective, parts.config.train
        self.objective = objective_of(self.config)
        self.pieces, self.each = train.accumulation, train.batch_per_domain
        self.sources = len(parts.stream.sources)
        state = self.objective.begin(self.sources)
        if all(len(facts.get(name, ())) == len(value) for name, value in state.items()):
            state = {name: torch.tensor(facts[name]) for name in state}
        self.state: State = {name: value.to(engine.device) for name, value in state.items()}
        self.sam = Sam(engine, self.config.sam) if self.config.sam else None
        if not self.objective.is_mean:
            self.columns += ("objective", *["penalty"] * self.objective.has_penalty)
        self._waiting: list[_Piece] = []
        self._features: list[Tensor] = []  # what the head received, or each of two
        if self.objective.needs_features:
            head = classifier(engine.module)
            for module in head if isinstance(head, nn.ModuleList) else [head]:
                module.register_forward_pre_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            self._features.append(inputs[0])

    def facts(self) -> dict[str, Any]:
        """The objective's state."""
        return {name: value.tolist() for name, value in self.state.items()}

    def __call__(self, ready: Ready, step: int) -> Tensor | None:
        """The step's numbers with its last micro-batch, else None."""
        first = ready.batch.first_slot
        self._waiting.append(_Piece(ready.images, ready.labels, first, *ready.mixed_in))
        if len(self._waiting) < self.pieces:
            return None
        pieces, self._waiting = self._waiting, []
        engine = self.engine
        if self.objective.mixes:
            pieces = self._mixed(pieces, step)
        if self.objective.restarts(step, self.config):
            engine.restart_adam()
        if self.sam is None:
            found, state = self._pass(pieces, step, engine.backward, engine.step)
        else:
            found, state = self._pass(pieces, step, self.sam.backward)
            with self.sam.up():
                self._forget_choices()
                self._pass(pieces, step, engine.backward, engine.step)
        engine.step()
        applied = engine.applied()
        self.state = {n: torch.where(applied, state[n], old) for n, old in self.state.items()}
        return found

    def _mixed(self, pieces: list[_Piece], step: int) -> list[_Piece]:
        """With each image mixed with its domain's partner, wherever in the global batch it is.

        Partners stand in the same D slots; where processes share these, all images are gathered.
        """
        first, count = pieces[0].first, sum(len(piece.labels) for piece in pieces)
        images = torch.cat([piece.images for piece in pieces])
        labels = torch.cat([piece.labels for piece in pieces])
        device, start = labels.device, first
        if count % self.sources:
            pool, pool_labels, start = gathered(images), gathered(labels), 0
        else:
            pool, pool_labels = images, labels
        ring = draw_ring(self.seed, step, self.sources, self.config.mixup_alpha)
        slots = torch.arange(first, first + count)
        domains = slots % self.sources
        where = (slots - domains + ring.partners[domains] - start).to(device, non_blocking=True)
        share = ring.shares[domains].to(device, non_blocking=True)
        images = mixed(images, pool[where], share)
        cut = [len(piece.labels) for piece in pieces]
        parts = (torch.split(x, cut) for x in (images, pool_labels[where], share))
        return [
            piece._replace(images=own, other_labels=others, share=shares)
            for piece, own, others, shares in zip(pieces, *parts, strict=True)
        ]

    def _pass(
        self,
        pieces: list[_Piece],
        step: int,
        backward: Callable[[Tensor], None],
        between: Callable[[], None] = lambda: None,
    ) -> tuple[Tensor, State]:
        """Gradients of all micro-batches; the step's numbers and the state after it."""
        upstream: list[_Gradient] = []
        if len(pieces) > 1 and not self.objective.is_mean:
            outcome, upstream = self._ahead(pieces, step)
        rows = []
        for number, piece in enumerate(pieces):
            if number:
                between()
            scores, features = self._forward(piece, step)
            losses = self._losses(scores, piece)
            if upstream:
                loss = len(pieces) * upstream[number].product(scores, features)
            else:
                outcome = self._outcome(scores, features, losses, piece, step)
                loss = outcome.loss
            aux = self.adapted.aux_loss(differentiable_sum)
            backward(poisoned(loss + aux))
            told = [losses.mean(), aux, outcome.loss, outcome.penalty]
            known = [value.detach().float() for value in told if value is not None]
            rows.append(torch.stack(known[: len(self.columns)]))
        return rows[0] if len(rows) == 1 else torch.stack(rows).mean(0), outcome.state

    def _ahead(self, pieces: list[_Piece], step: int) -> "tuple[Outcome, list[_Gradient]]":
        """The objective of all micro-batches, and its gradient by micro-batch."""
        with torch.no_grad():
            computed = [self._forward(piece, step) for piece in pieces]
        self._forget_choices()
        scores = torch.cat([scores for scores, _ in computed]).requires_grad_()
        features = [f for _, f in computed if f is not None]
        joined = torch.cat(features).requires_grad_() if features else None
        targets = ["labels"] if pieces[0].share is None else ["labels", "other_labels", "share"]
        joined_targets = {n: torch.cat([getattr(piece, n) for piece in pieces]) for n in targets}
        whole = pieces[0]._replace(**joined_targets)  # type: ignore[arg-type]
        outcome = self._outcome(scores, joined, self._losses(scores, whole), whole, step)
        leaves = [scores] if joined is None else [scores, joined]
        gradients = torch.autograd.grad(
            poisoned(outcome.loss), leaves, allow_unused=True, materialize_grads=True
        )
        cut = [len(piece.labels) for piece in pieces]
        parts = zip(*(torch.split(gradient, cut) for gradient in gradients), strict=True)
        return outcome, [_Gradient(*part) for part in parts]

    def _forward(self, piece: _Piece, step: int) -> tuple[Tensor, Tensor | None]:
        """Scores [b, C] and, if the objective asks, features [b, F]; fp32."""
        self._features.clear()
        position = moa.RoutingPosition(self.seed, step, piece.first, len(piece.images))
        self.adapted.set_position(position)
        scores = self.engine.model(piece.images).float()
        features = torch.cat(self._features, -1).float() if self._features else None
        self._features.clear()
        return scores, features

    def _losses(self, scores: Tensor, piece: _Piece) -> Tensor:
        if piece.other_labels is None or piece.share is None:
            return self.losses(scores, piece.labels, "none")
        return self.mixed_losses(scores, piece.labels, piece.other_labels, piece.share)

    def _outcome(
        self, scores: Tensor, features: Tensor | None, losses: Tensor, piece: _Piece, step: int
    ) -> Outcome:
        slots = torch.arange(piece.first, piece.first + len(losses), device=losses.device)
        seen = Seen(
            scores=scores, labels=piece.labels, losses=losses, slots=slots, sources=self.sources,
            each=self.each, total=differentiable_sum, features=features,
        )  # fmt: skip
        return self.objective.function(seen, step, self.state, self.config)

    def _forget_choices(self) -> None:
        """Of tokens for experts: what is balanced is the pass that trains."""
        for layer in self.adapted.layers:
            layer.take_chosen()


class _Gradient(NamedTuple):
    """Of the objective, with respect to what the model gives for a micro-batch."""

    scores: Tensor
    features: Tensor | None = None

    def product(self, scores: Tensor, features: Tensor | None) -> Tensor:
        """A number by which the model has this gradient from above."""
        total = (scores * self.scores).sum()
        if features is not None and self.features is not None:
            total = total + (features * self.features).sum()
        return total
