"""The trainer with a fault built in: `stopping_worker.py FAULT ARGUMENT...`."""

import hashlib
import json
import os
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402  (needs the repaired path, as in run.py)
import torch.distributed as dist  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from trainer.engine.engine import Engine  # noqa: E402
from trainer.evaluate.evaluator import Evaluator  # noqa: E402
from trainer.process.ending import leave  # noqa: E402
from trainer.process.stopping import Stopping  # noqa: E402
from trainer.train import loop, session  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
FAULTS: dict[int, float] = {2: float("inf"), 4: float("nan")}
"""Step -> what rank 1 gets as its loss; an infinite one has a finite gradient."""


def signal_in_evaluation() -> None:
    """Rank 1 gets a signal at its third pause; the others learn of it from the votes."""
    original, calls = Stopping.pause, 0

    def pause(self: Stopping) -> None:
        nonlocal calls
        calls += 1
        if RANK == 1 and calls == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self)

    Stopping.pause = pause  # type: ignore[method-assign]


def losses_not_finite() -> None:
    """Rank 1's loss goes wrong in some steps; each rank notes its state before and after a step."""
    loss, train_step, hashes = F.cross_entropy, loop.Trainer.train_step, []
    calls = 0

    def cross_entropy(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(*args, **kwargs) + (FAULTS.get(calls - 1, 0.0) if RANK == 1 else 0.0)

    def state(trainer: loop.Trainer) -> str:
        engine, digest = trainer.engine, hashlib.sha256()
        held = {**engine.masters(), **engine.moments(), **engine.module.state_dict()}
        for name, tensor in sorted(held.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def noted(self: loop.Trainer, batches: Any) -> Any:
        before = state(self) if self.step else ""
        result = train_step(self, batches)
        hashes.append([before, state(self)])
        (self.folder.path / f"states-{RANK}.json").write_text(json.dumps(hashes))
        return result

    F.cross_entropy = cross_entropy  # type: ignore[assignment]
    loop.Trainer.train_step = noted  # type: ignore[method-assign]


def signal_at_the_very_end() -> None:
    """Rank 1 gets a signal when all is trained and the selected adapter's row is complete."""
    original, calls = Evaluator.__call__, 0

    def call(self: Evaluator, model: Any, cells: Any = None) -> Any:
        nonlocal calls
        calls += 1  # only the two evaluations at the end ask for no losses
        if RANK == 1 and calls == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, model, cells)

    Evaluator.__call__ = call  # type: ignore[method-assign]


def watch_the_end() -> None:
    """Notes what of model and engine is left when the group goes, and which it is."""
    made, build, destroy = [], Engine.__init__, dist.destroy_process_group

    def noted(self: Engine, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        build(self, model, *args, **kwargs)
        made.extend(weakref.ref(part) for part in (model, self, self.ds))

    def gone() -> None:
        left = [type(part()).__name__ for part in made if part() is not None]
        kept = f"{left or 'nothing'} of {len(made)} left"
        sys.stderr.write(f"rank {RANK} leaves the group, with {kept}\n")
        destroy()

    Engine.__init__ = noted  # type: ignore[method-assign]
    dist.destroy_process_group = gone


FAULT = {
    "evaluation": signal_in_evaluation,
    "nonfinite": losses_not_finite,
    "closing": signal_at_the_very_end,
    "none": lambda: None,
}

if __name__ == "__main__":
    watch_the_end()
    FAULT[sys.argv[1]]()
    leave(session.main(sys.argv[2:]))
