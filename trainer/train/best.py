"""The best adapter so far by source validation, as checkpoints carry it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moa.files.atomic_folder import replaced_folder
from moa.files.reading import AdapterInfo
from moa.files.saving import write_adapter
from trainer.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Candidate:
    """An adapter that was evaluated after `step`.

    Attributes:
        validation: mean accuracy on the sources' `out` splits.
        results: figures for its model card.
        tensors: fp32 values by name; empty on all ranks but the main one.
    """

    step: int
    validation: float
    results: Mapping[str, float]
    tensors: Mapping[str, Tensor]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's state says of it."""
        return {"step": self.step, "validation": self.validation, "results": dict(self.results)}


@dataclass
class Best:
    """The best evaluation, and whether a longer run would have made it.

    A run also evaluates after its last step, which a longer run may not do. So the best of the
    `regular` evaluations, at every `eval_every`-th step, is kept beside a `closing` one that beats
    it: the longer run goes on from the former.
    """

    regular: Candidate | None = None
    closing: Candidate | None = None

    @property
    def current(self) -> Candidate | None:
        """The best of all."""
        return self.closing or self.regular

    def is_beaten_by(self, validation: float) -> bool:
        """Whether an evaluation is better than all before; the first of equals stays."""
        return self.current is None or validation > self.current.validation

    def put(self, candidate: Candidate, eval_every: int) -> None:
        """Notes a better candidate."""
        if candidate.step % eval_every:
            self.closing = candidate
        else:
            self.regular, self.closing = candidate, None

    def state(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return {
            "best": self.regular and self.regular.facts(),
            "closing_best": self.closing and self.closing.facts(),
        }

    def tensors_beside(self, step: int) -> Mapping[str, Tensor] | None:
        """What a checkpoint of `step` completed steps must store on top of its own tensors."""
        if self.regular is None or self.regular.step == step - 1:
            return None
        return self.regular.tensors


def restored_best(checkpoint: Checkpoint, steps: int, eval_every: int) -> Best:
    """The best that an uninterrupted run of `steps` steps would know at the checkpoint."""
    facts, closing = checkpoint.state["best"], checkpoint.state["closing_best"]
    tensors = checkpoint.masters if checkpoint.best is None else checkpoint.best
    best = Best(facts and Candidate(**facts, tensors=_copied(tensors)))
    if closing is not None and not is_left_out(closing["step"], steps, eval_every):
        best.put(Candidate(**closing, tensors=_copied(checkpoint.masters)), eval_every)
    return best


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was read lies in files that a later save deletes; this is in memory."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_best(folder: Path, info: AdapterInfo, best: Best) -> None:
    """Makes an adapter folder the best so far; removes it where there is none."""
    candidate = best.current
    if candidate is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with replaced_folder(folder) as temporary:
        write_adapter(temporary, candidate.tensors, replace(info, results=candidate.results))


def is_left_out(step: int, steps: int, eval_every: int) -> bool:
    """Whether a run of `steps` steps does not evaluate after `step`."""
    return step % eval_every != 0 and step != steps - 1
