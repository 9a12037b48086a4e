"""A trace of some steps by torch's profiler, and a snapshot of the GPU's memory in them."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from trainer.checkpoint.run_folder import RunFolder
from trainer.engine.engine import Engine
from trainer.prepare.ahead import Ahead
from trainer.process.world import World

log = logging.getLogger("trainer")


class Profiling:
    """Traces `steps` of this rank into the run folder's `profile/`.

    What fetches data, forward, backward and update are labelled, by wrappers that are there only
    while a trace is taken: other steps are as they would be without. A profiler that fails is told
    of and leaves the run alone.
    """

    def __init__(
        self, steps: range, folder: RunFolder, world: World, engine: Engine, ahead: Ahead
    ) -> None:
        self.steps, self._run_folder = steps, folder
        self._rank, self._on_gpu = world.rank, engine.device.type == "cuda"
        self._labelled = (
            (ahead, "take", "data"), (ahead, "fetch", "data"), (engine.model, "forward", "forward"),
            (engine, "differentiate", "backward"), (engine, "step", "update"),
        )  # fmt: skip
        self._profile: profile | None = None
        self._failed = False

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Traces the block if it is one of `steps`, and on to the last of them or to `end`."""
        if self._failed or step not in self.steps:
            yield
            return
        with self._harmless():
            if self._profile is None:
                self._begin()
        with self._labels(), record_function(f"ProfilerStep#{step}"):  # TensorBoard's name of it
            yield
        if step + 1 == self.steps.stop:
            self.end()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._profile, self._failed = None, True
            log.warning("train.profile: %s; the run goes on without it", error)

    @contextmanager
    def _labels(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, label in self._labelled:
                own = vars(owner)
                before = partial(own.__setitem__, name, own[name]) if name in own else None
                own[name] = record_function(label)(getattr(owner, name))
                stack.callback(before or partial(own.pop, name))
            yield

    def _begin(self) -> None:
        devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        started = profile(activities=devices, record_shapes=True, profile_memory=True)
        started.start()
        self._profile = started
        if self._on_gpu:
            torch.cuda.memory._record_memory_history()

    def end(self) -> None:
        """Writes what was traced and is not written yet; the next step begins anew."""
        if self._profile is None:
            return
        with self._harmless():
            traced, self._profile = self._profile, None
            traced.stop()
            folder = self._run_folder.path / "profile"
            name = f"rank-{self._rank:05d}"
            tensorboard_trace_handler(str(folder), name, use_gzip=True)(traced)
            if self._on_gpu:
                memory = folder / f"{name}.{time.time_ns()}.memory.pickle"
                torch.cuda.memory._dump_snapshot(str(memory))  # type: ignore[no-untyped-call]
                torch.cuda.memory._record_memory_history(enabled=None)
            log.info("profile: %s", folder)
