"""Steps whose loss or gradient is not finite: found alike on all ranks, left out or the end.

No such step reaches a parameter: a rank whose loss is not finite makes its gradient so
(`poisoned`), the gradients' reduction carries that to every rank, and the engine leaves out a step
whose gradient norm is not finite. That costs no collective of its own, and is told afterwards.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.stream.batches import rank_range
from shards.stream.stream import DomainStream
from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.run_folder import RunFolder
from trainer.process.errors import TrainingInvalidError
from trainer.process.world import World

log = logging.getLogger(__name__)


def poisoned(loss: Tensor) -> Tensor:
    """`loss` itself; if it is not finite, one whose gradient is not finite either.

    An infinite loss may well have a finite gradient. The factor is exactly 1 otherwise, so that
    it changes no bit.
    """
    one = torch.ones_like(loss)
    return loss * torch.where(loss.detach().isfinite(), one, one * math.nan)


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


class NonfiniteSteps:
    """Counts steps that were left out, up to what `train.skip_nonfinite` allows.

    Each leaves the sample keys of its batch in `nonfinite-step-N.json` in the run folder. `skipped`
    of the `allowed` steps were left out before this start.
    """

    def __init__(
        self, stream: DomainStream, folder: RunFolder, world: World, allowed: int, skipped: int
    ) -> None:
        self.stream, self.folder, self.world = stream, folder, world
        self.allowed, self.skipped = allowed, skipped

    def note(self, step: int, losses: Sequence[float], norm: float) -> None:
        """Tells by every rank's loss and the gradient's norm if the engine left the step out.

        Raises `TrainingInvalidError`: it is one too many; on all ranks alike.
        """
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if not ranks and math.isfinite(norm):
            return
        if ranks:
            where = ", ".join(f"rank {rank} ({losses[rank]})" for rank in ranks)
            what = f"step {step}: loss not finite on {where}"
        else:
            what = f"step {step}: gradient not finite (norm {norm}), the loss is on all ranks"
        path = self.folder.path / f"nonfinite-step-{step}.json"
        if self.world.is_main:
            self._dump(path, step, losses, norm)
        if self.skipped >= self.allowed:
            raise TrainingInvalidError(
                f"{what}; the batch's sample keys are in {path}. {self.skipped} such steps were "
                f"left out, train.skip_nonfinite = {self.allowed} allows no more: raise it to "
                "leave out this step, or lower --optim.lr or set --optim.clip in a new run"
            )
        self.skipped += 1
        if self.world.is_main:
            log.warning(
                "%s; left out, %d of %d that train.skip_nonfinite allows; sample keys in %s",
                what, self.skipped, self.allowed, path,
            )  # fmt: skip

    def columns(self) -> dict[str, int]:
        """The count as a column of a row, once there is something to count."""
        return {"skipped_steps": self.skipped} if self.skipped else {}

    def _dump(self, path: Path, step: int, losses: Sequence[float], norm: float) -> None:
        """Writes what each rank had, so that the step can be looked into."""
        keys, ranks = self.stream.keys(step), []
        for rank, loss in enumerate(losses):
            own = [keys[place] for place in rank_range(len(keys), rank, self.world.size)]
            finite = math.isfinite(loss)
            ranks.append({"rank": rank, "loss": str(loss), "finite": finite, "keys": own})
        content = {
            "step": step,
            "batch_digest": self.stream.batch_digest(step),
            "gradient_norm": str(norm),  # JSON knows no infinity
            "ranks": ranks,
        }
        replace_text(path, json.dumps(content, indent=1) + "\n")
