"""Averages of the trained weights beside the last ones: EMA and SWAD.

Both live on what the optimizer lives on, its flat fp32 masters: each rank averages the share it
owns, whatever the ZeRO stage and the placement of experts, and the frozen base is never copied.
Counters that no gradient moves (`balance_steps`) are not averaged; an average goes with those of
the moment.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from trainer.config.averages import AverageConfig
from trainer.engine.engine import Engine
from trainer.engine.swad import Swad, lerp

EMA, SWAD = "ema", "swad"


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
    def update(self, weights: Sequence[Tensor], applied: Tensor) -> None:
        """Notes the weights after a step; nothing happens where `applied` is false."""
        self.count += applied
        before = (self.count - 1).clamp(min=0)
        decay = torch.full_like(before, self.decay)
        if self.warms_up:
            decay = decay.minimum(1 - (1 + before) ** (-2 / 3))
        share = (1 - decay * (before > 0)) * applied
        lerp(self.values, weights, share)


class Averages:
    """The averages that a run keeps; empty if `config` asks for none.

    `engine` stands at the start of the run, or at a checkpoint that gives `tensors` and `facts`; a
    checkpoint without them starts averages anew.
    """

    def __init__(
        self,
        config: AverageConfig,
        engine: Engine,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.ema: Ema | None = None
        self.swad: Swad | None = None
        tensors, facts = tensors or {}, facts or {}
        if config.ema:
            values = self._shares(tensors, EMA) or engine.flat_masters()
            self.ema = Ema(values, config, facts.get(EMA, 0))
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

    def update(self, applied: Tensor) -> None:
        """Notes the weights after a step that was `applied`; nothing waits for the device."""
        if self.ema is not None:
            self.ema.update(self.engine.flat_masters(), applied)
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
        result = {}
        if self.ema is not None:
            result[EMA] = self.engine.whole(self.ema.values)
        if self.swad is not None and (values := self.swad.mean().values):
            result[SWAD] = self.engine.whole(values)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: `part|name` -> fp32 value; a collective."""
        means = self.swad.means() if self.swad is not None else {}
        parts = {EMA: self.ema.values} if self.ema is not None else {}
        parts |= {f"{SWAD}.{name}": mean.values for name, mean in means.items() if mean.values}
        return {
            f"{part}|{name}": tensor
            for part, values in parts.items()
            for name, tensor in self.engine.whole(values).items()
        }

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        found = {EMA: self.ema and int(self.ema.count), SWAD: self.swad and self.swad.facts()}
        return {name: fact for name, fact in found.items() if fact is not None}
