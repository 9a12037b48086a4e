"""SWAD: the dense average of all weights within the valley of the validation loss.

After Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima" (NeurIPS 2021), Algorithm 1:
the average is over the weights after every step, and the validation loss decides from which step to
which. Evaluations cut the steps into segments: segment i is what follows evaluation i - 1, up to
evaluation i, whose loss is E_i. The average begins with the first segment s whose E_s is the
smallest of itself and the next n_converge - 1 losses. These losses' mean, times tolerance_ratio,
is the level of the valley. The average ends before the first n_tolerance losses in a row that are
all above the level; as long as there are none it goes on to the last step. A run without such an s
averages all its steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def lerp(values: Sequence[Tensor], ends: Sequence[Tensor], share: Tensor) -> None:
    """Moves values by a share of the way to their ends, in place and without a look at it."""
    for value, end in zip(values, ends, strict=True):  # one of each parameter group
        value.lerp_(end.detach(), share.to(value))


@dataclass
class Mean:
    """The running mean of `count` lists of tensors; None before the first.

    `more` counts on the device what came since `count`.
    """

    count: int = 0
    values: list[Tensor] | None = None
    more: Tensor | None = None

    def add(self, tensors: Sequence[Tensor], applied: Tensor) -> None:
        """Takes one more list into the mean if `applied`, without waiting for the device."""
        if self.values is None:
            self.values = [tensor.detach().clone() for tensor in tensors]
        more = applied.double()
        self.more = more if self.more is None else self.more + more
        lerp(self.values, tensors, more / (self.more + self.count).clamp(min=1))

    def read(self) -> "Mean":
        """The same with all in `count`."""
        count = self.count if self.more is None else self.count + int(self.more)
        return Mean(count, self.values if count else None)

    @torch.no_grad()
    def __add__(self, other: "Mean") -> "Mean":
        if self.values is None or other.values is None:
            return self if other.values is None else other
        total = self.count + other.count
        values = torch._foreach_lerp(self.values, other.values, other.count / total)
        return Mean(total, list(values))


@dataclass(frozen=True)
class Swad:
    """The average so far; small whatever the number of segments.

    Attributes:
        n_converge: losses by which the valley's start is recognised.
        n_tolerance: losses in a row above the level that end it; at least `n_converge`.
        tolerance_ratio: the level as a multiple of the losses' mean at the start.
        losses: E_0, E_1 ... up to the end of the valley.
        start: the segment s; None as long as no valley has begun.
        end: the last segment of the average; None as long as the valley goes on.
        level: what the losses are held against once the valley has begun.
        kept: what certainly is in the average: before the valley begins, in that of a run without.
        waiting: whole segments that may begin the valley, or follow it.
        open: the segment that no evaluation has closed yet.
    """

    n_converge: int = 3
    n_tolerance: int = 6
    tolerance_ratio: float = 1.3
    losses: tuple[float, ...] = ()
    start: int | None = None
    end: int | None = None
    level: float = inf
    kept: Mean = field(default_factory=Mean)
    waiting: tuple[Mean, ...] = ()
    open: Mean = field(default_factory=Mean)

    def add(self, weights: Sequence[Tensor], applied: Tensor) -> None:
        """Notes the weights after a step that was `applied`."""
        if self.end is None:
            self.open.add(weights, applied)

    def mean(self) -> Mean:
        """The average of a run that ends here."""
        return sum((*self.waiting, self.open.read()), start=self.kept)

    def closed(self, loss: float) -> "Swad":
        """What follows from an evaluation with this validation loss; this one stays as it was."""
        if self.end is not None:
            return self
        losses = (*self.losses, loss if isfinite(loss) else inf)
        now = replace(self, losses=losses, waiting=(*self.waiting, self.open.read()), open=Mean())
        return now._within() if self.start is not None else now._before()

    def _before(self) -> "Swad":
        """Begins the valley if the last losses tell so."""
        window = self.losses[-self.n_converge :]
        if len(window) == self.n_converge and window[0] == min(window) < inf:
            level = self.tolerance_ratio * sum(window) / self.n_converge
            start = len(self.losses) - self.n_converge
            begun = replace(self, start=start, level=level, kept=Mean())
            return begun._settled(begun._above())
        return self._settled(self.n_converge - 1)

    def _within(self) -> "Swad":
        """Ends the valley if losses above the level have lasted."""
        above = self._above()
        if above < self.n_tolerance:
            return self._settled(above)
        end = len(self.losses) - 1 - self.n_tolerance
        return replace(self._settled(above), end=end, waiting=())

    def _above(self) -> int:
        """How many losses at the end are above the level."""
        return len(list(takewhile(lambda loss: loss > self.level, reversed(self.losses))))

    def _settled(self, waiting: int) -> "Swad":
        """With all but the last `waiting` whole segments in what is kept."""
        number = max(0, len(self.waiting) - waiting)
        kept = sum(self.waiting[:number], start=self.kept)
        return replace(self, kept=kept, waiting=self.waiting[number:])

    def facts(self) -> dict[str, Any]:
        """All but the settings and the tensors, for JSON."""
        return {
            "losses": [loss if isfinite(loss) else None for loss in self.losses],
            "start": self.start,
            "end": self.end,
            "level": self.level if self.start is not None else None,
            "counts": {name: mean.count for name, mean in self.means().items()},
        }

    def means(self) -> dict[str, Mean]:
        """Its parts, by name."""
        waiting = {f"waiting{number}": mean for number, mean in enumerate(self.waiting)}
        return {"kept": self.kept, "open": self.open.read(), **waiting}

    def restored(self, facts: dict[str, Any], values: Mapping[str, list[Tensor] | None]) -> "Swad":
        """With these settings, and what `facts` and `means` told."""
        means = {name: Mean(n, values.get(name)) for name, n in facts["counts"].items()}
        return replace(
            self,
            losses=tuple(inf if loss is None else loss for loss in facts["losses"]),
            start=facts["start"],
            end=facts["end"],
            level=inf if facts["level"] is None else facts["level"],
            kept=means.pop("kept"),
            open=means.pop("open"),
            waiting=tuple(means.values()),
        )
