"""Averages of the trained weights beside the last ones: EMA, SWAD, Beta and uniform.

All live on what the optimizer lives on, its flat fp32 masters: each rank averages the share it
owns, whatever the ZeRO stage and the placement of experts, and the frozen base is never copied.
Counters that no gradient moves (`balance_steps`) are not averaged; an average goes with those of
the moment.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config.averages import AVERAGES, AverageConfig
from trainer.engine.engine import Engine
from trainer.engine.swad import Mean, Swad, lerp

EMA, SWAD, BETA, UNIFORM = AVERAGES


class Ema:
    """An exponential moving average of flat tensors, each in its own dtype.

    With the decay of timm's `ModelEmaV3`: after `count` updates the average is `weights`; the very
    first takes the weights as they are.
    """

    def __init__(self, weights: Sequence[Tensor], config: AverageConfig, count: int = 0) -> None:
        self.values = [weight.detach().clone() for weight in weights]
        self.decay, self.warms_up = config.ema_decay, config.ema_warmup
        self.count = torch.tensor(count, dtype=torch.float64, device=self.values[0].device)

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], _step: int, applied: Tensor) -> None:
        """Notes the weights after a step; nothing happens where `applied` is false."""
        self.count += applied
        before = (self.count - 1).clamp(min=0)
        decay = torch.full_like(before, self.decay)
        if self.warms_up:
            decay = decay.minimum(1 - (1 + before) ** (-2 / 3))
        share = (1 - decay * (before > 0)) * applied
        lerp(self.values, weights, share)

    def fact(self) -> int:
        """For a checkpoint's state: the updates so far."""
        return int(self.count)


class BetaAverage:
    """The mean over weights 0 (before the first step) to `steps`, by a density.

    CLIPood's Beta moving average: weights t count as Beta(beta, beta) has it at
    (t + 0.5) / (steps + 1) (arXiv 2302.00864). A step that was left out counts as well: with the
    weights that it left as they were.
    """

    def __init__(self, weights: Sequence[Tensor], beta: float, steps: int) -> None:
        self.values = [weight.detach().clone() for weight in weights]
        place = (np.arange(steps + 1) + 0.5) / (steps + 1)
        density = (place * (1 - place)) ** (beta - 1)
        self.shares = density / np.cumsum(density)

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int, _applied: Tensor) -> None:
        """Notes the weights after a step."""
        torch._foreach_lerp_(self.values, list(weights), float(self.shares[step + 1]))

    def fact(self) -> int:
        """Nothing that a checkpoint would have to know."""
        return 0


class UniformAverage:
    """The mean over the weights after every step from `start` on that was applied."""

    def __init__(self, start: int, mean: Mean) -> None:
        self.start, self.mean = start, mean

    @property
    def values(self) -> list[Tensor] | None:
        """The mean; None before the first."""
        return self.mean.read().values

    def update(self, weights: Sequence[Tensor], step: int, applied: Tensor) -> None:
        """Notes the weights after a step."""
        if step >= self.start:
            self.mean.add(weights, applied)

    def fact(self) -> int:
        """For a checkpoint's state: how many they are."""
        return self.mean.read().count


class Averages:
    """The averages that a run of `steps` steps keeps; empty if `config` asks for none.

    `engine` stands at the start of the run, or at a checkpoint that gives `tensors` and `facts`; a
    checkpoint without them starts averages anew.
    """

    def __init__(
        self,
        config: AverageConfig,
        steps: int,
        engine: Engine,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.kept: dict[str, Ema | BetaAverage | UniformAverage] = {}
        self.swad: Swad | None = None
        tensors, facts = tensors or {}, facts or {}
        if config.ema:
            values = self._shares(tensors, EMA) or engine.flat_masters()
            self.kept[EMA] = Ema(values, config, facts.get(EMA, 0))
        if config.beta:
            values = self._shares(tensors, BETA) or engine.flat_masters()
            self.kept[BETA] = BetaAverage(values, config.beta, steps)
        if config.uniform is not None:
            mean = Mean(facts.get(UNIFORM, 0), self._shares(tensors, UNIFORM))
            self.kept[UNIFORM] = UniformAverage(config.uniform, mean)
        if config.swad:
            self.swad = Swad(
                config.swad_n_converge, config.swad_n_tolerance, config.swad_tolerance_ratio
            )
            if SWAD in facts:
                counts = facts[SWAD]["counts"]
                shares = {n: self._shares(tensors, f"{SWAD}.{n}") for n in counts}
                self.swad = self.swad.restored(facts[SWAD], shares)

    def _shares(self, tensors: Mapping[str, Tensor], part: str) -> list[Tensor] | None:
        start = f"{part}|"
        whole = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        return self.engine.shares_of(whole) if whole else None

    def update(self, step: int, applied: Tensor) -> None:
        """Notes the weights after a step that was `applied`; nothing waits for the device."""
        for average in self.kept.values():
            average.update(self.engine.flat_masters(), step, applied)
        if self.swad is not None:
            self.swad.add(self.engine.flat_masters(), applied)

    def after(self, loss: float, regular: bool) -> "Averages":
        """What an evaluation with this validation loss makes of them; these stay as they were.

        Unless it is `regular`, one that a longer run makes as well, the valley goes on as if it had
        not been.
        """
        result = copy(self)
        if self.swad is not None and regular:
            result.swad = self.swad.closed(loss)
        return result

    def whole(self) -> dict[str, dict[str, Tensor]]:
        """Each average by its name, as fp32 values of all trainables; a collective."""
        parts = {name: average.values for name, average in self.kept.items()}
        if self.swad is not None:
            parts[SWAD] = self.swad.mean().values
        return {name: self.engine.whole(values) for name, values in parts.items() if values}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: `part|name` -> fp32 value; a collective."""
        means = self.swad.means() if self.swad is not None else {}
        parts = {name: average.values for name, average in self.kept.items()}
        parts |= {f"{SWAD}.{name}": mean.values for name, mean in means.items()}
        return {
            f"{part}|{name}": tensor
            for part, values in parts.items()
            if values
            for name, tensor in self.engine.whole(values).items()
        }

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        found: dict[str, Any] = {name: average.fact() for name, average in self.kept.items()}
        return found if self.swad is None else found | {SWAD: self.swad.facts()}
