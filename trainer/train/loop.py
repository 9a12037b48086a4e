"""`Trainer`: the loop from a start step to the last, with evaluation and checkpoints."""

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from shards import Batch
from trainer.checkpoint import checkpoint
from trainer.checkpoint.run_folder import SPEED, RunFolder
from trainer.checkpoint.save_queue import SaveQueue
from trainer.engine.averaging import Averages
from trainer.engine.collectives import add_up, from_main, sum_numbers, sum_over_ranks
from trainer.engine.engine import Engine
from trainer.evaluate.evaluator import Evaluator
from trainer.monitor.monitor import Monitor
from trainer.prepare.ahead import Ahead
from trainer.prepare.parts import Parts
from trainer.process.stopping import REASONS, EvaluationBrokenOff, Stopped, Stopping, shielded
from trainer.process.watchdog import COMPUTING, EVALUATING, LOADING, SAVING, Watchdog
from trainer.process.world import World
from trainer.train.bad_images import BadImages
from trainer.train.behind import BEHIND, Behind
from trainer.train.best import Best, is_left_out
from trainer.train.nonfinite import NonfiniteSteps
from trainer.train.objective_step import make_step
from trainer.train.profiling import Profiling
from trainer.train.resume import state_of
from trainer.train.rows import Rows
from trainer.train.validation import Validation


class Trainer:
    """Trains one run; its parts are built elsewhere and passed in.

    `state`, `best` and `averages` are those of a resumed run, and by default of one that starts
    here. By default nothing stops the run, and nobody watches where this rank is.
    """

    def __init__(
        self,
        parts: Parts,
        world: World,
        engine: Engine,
        evaluator: Evaluator,
        folder: RunFolder,
        state: Mapping[str, Any],
        best: Best | None = None,
        stopping: Stopping | None = None,
        watch: Watchdog | None = None,
        averages: Averages | None = None,
    ) -> None:
        self.parts, self.config, self.stream = parts, parts.config, parts.stream
        self.world, self.engine, self.folder = world, engine, folder
        self.step = int(state.get("step", 0))
        self.best, self.changes = best or Best(), list(state.get("changes", []))
        averages = averages or Averages(self.config.average, self.config.train.steps, engine)
        self.validation = Validation(parts, engine, evaluator, folder, self.best, averages)
        self.ahead = Ahead(engine.device, engine.dtype, parts.info.data_config)
        self.saves = SaveQueue(self.config.checkpoint.background)
        limit = self.config.data.max_bad_fraction
        self.bad_images = BadImages(self.stream, limit, state.get("bad_images", {}))
        allowed, skipped = self.config.train.skip_nonfinite, int(state.get("skipped_steps", 0))
        self.nonfinite = NonfiniteSteps(self.stream, folder, world, allowed, skipped)
        self.stopping = stopping or Stopping(world.is_main)
        self.watch = watch or Watchdog(Path(), world, deadline=0)
        due = bool(state.get("evaluation_due"))
        self.evaluation_due = due and self._evaluates_after(self.step - 1)
        self.first_step = self.saved_step = self.step
        self.images_timed, self.seconds_timed, self.rate = 0, 0.0, 0.0
        self.behind = Behind()
        ranks = torch.arange(world.size, device=engine.device)[:, None]
        self._others = ranks != world.rank
        self.rows = Rows(folder)
        self.micro_step = make_step(parts, engine, state.get("objective", {}))
        steps = self.config.train.profiled
        self.profiling = Profiling(steps, folder, world, engine, self.ahead)

    def train(self, monitor: Monitor | None) -> None:
        """Runs the remaining steps; `monitor` is given on the main rank only.

        Raises `Stopped`: a signal or the time limit ended it; everything is saved.
        """
        train, last = self.config.train, self.config.train.steps - 1
        batches = shielded(
            self.stream.loader(
                self.step, train.steps, self.world.rank, self.world.size,
                workers=self.config.data.workers, accumulation=train.accumulation,
                pin_memory=self.engine.device.type == "cuda",
            )
        )  # fmt: skip
        self.rows = Rows(self.folder, monitor)
        self.stopping.begin(partial(sum_numbers, device=self.engine.device))
        self.stopping.agree_on_signals()
        self.evaluate_or_stop(self.step - 1, monitor)  # an evaluation that a stop broke off
        self.engine.module.train()
        try:
            self._steps(batches, monitor)
        finally:
            self.profiling.end()
            self.behind.read()
            self.rows.write()
        self.watch.note(EVALUATING)
        try:
            self.validation.close(last, monitor)
        except EvaluationBrokenOff:
            self._stop()

    def _steps(self, batches: Iterator[Batch], monitor: Monitor | None) -> None:
        train = self.config.train
        while self.step < train.steps:
            step, started = self.step, time.perf_counter()
            self.evaluation_due = self._evaluates_after(step)
            saves = (step + 1) % self.config.checkpoint.every == 0 or step + 1 == train.steps
            with self.profiling.around(step), self.stopping.timed("step"):
                waited = self.train_step(batches)
                self.step = step + 1
                if self.evaluation_due or saves or self.stopping.reason:
                    self.behind.read()
            took = 0.0 if step in self.profiling.steps else time.perf_counter() - started
            if took and step > self.first_step:  # the first of a start also pays for warming up
                self.images_timed += self.stream.global_batch
                self.seconds_timed += took
            self.rows.tell(step, self.stream.global_batch, took, waited, self.engine.module)
            self.saves.check()
            self.evaluate_or_stop(step, monitor)
            if saves:
                self.save_checkpoint()

    def _evaluates_after(self, step: int) -> bool:
        train = self.config.train
        return not is_left_out(step, train.steps, train.eval_every)

    def evaluate_or_stop(self, step: int, monitor: Monitor | None) -> None:
        """Evaluates after `step` if that is due; leaves the run if all ranks agreed to.

        If they do so amid the evaluation, nothing of it is kept and it stays due.
        """
        if self.evaluation_due and not self.stopping.reason:
            self.rows.write()
            self.profiling.end()  # of an evaluation a trace would be huge
            # The speed of training since the start, evaluations left out.
            speed = {SPEED: self.images_timed / self.seconds_timed} if self.images_timed else {}
            self.watch.note(EVALUATING)
            with suppress(EvaluationBrokenOff), self.stopping.timed("evaluation"):
                self.validation.evaluate(step, monitor, {**speed, **self.bad_images.columns()})
                self.evaluation_due = False
        if self.stopping.reason and (self.evaluation_due or self.step < self.config.train.steps):
            self._stop()

    def _stop(self) -> NoReturn:
        """Saves what is not saved yet and leaves, on all ranks at the same time."""
        if self.saved_step != self.step:
            self.save_checkpoint()
        self.saves.wait()
        kept = self.folder.checkpoints / f"step-{self.step:08d}"
        # A rank that left before the main one has saved would make the launcher end that one.
        raise Stopped(from_main(self.stopping.farewell(self.step, kept)))

    def train_step(self, batches: Iterator[Batch]) -> float:
        """One optimizer step; the seconds spent waiting for data. Its row is known later.

        Raises:
            TrainingInvalidError: `BEHIND` steps ago, one step too many was not finite; or now, in
                the first step, gradients are missing.
            DamagedDataError: too many images had been replaced by then.
        """
        waited, losses = 0.0, []
        self.rate = self.config.optim.rate(self.step, self.config.train.steps)
        self.engine.set_rate(self.rate)
        for last in [False] * (self.config.train.accumulation - 1) + [True]:
            self.watch.note(LOADING, self.step)
            started = time.perf_counter()
            ready = self.ahead.take(batches)
            waited += time.perf_counter() - started
            self.bad_images.note(ready.batch.bad)
            self.watch.note(COMPUTING)
            checks = self.step == 0 and last  # an objective may wait for all of a step's
            with self.engine.checks_gradients() if checks else nullcontext():
                found = self.micro_step(ready, self.step)
            losses += [] if found is None else [found]
            self.watch.note(LOADING)
            started = time.perf_counter()
            self.ahead.fetch(batches)  # a device is computing meanwhile
            waited += time.perf_counter() - started
            self.watch.note(COMPUTING)
        self.behind.read(leave=BEHIND - 1)
        self.rows.write()
        self._send(losses[0] if len(losses) == 1 else torch.stack(losses).mean(0))
        applied = self.engine.applied()
        self.micro_step.adapted.update_balance(lambda load: sum_over_ranks(load) * applied)
        self.validation.averages.update(self.step, applied)
        return waited

    def _send(self, losses: torch.Tensor) -> None:
        """Sends what the ranks found out in a step, in one vector and one collective.

        Every rank's own numbers of the step, votes on stopping, counts of bad images; and the norm.
        """
        evaluates = self._evaluates_after(self.step)
        votes = self.stopping.votes_in_step(evaluates, BEHIND)
        counted = torch.tensor([*votes, *self.bad_images.of_step()])
        counted = counted.to(losses.device, non_blocking=True)
        own = losses.masked_fill(self._others, 0.0)  # [ranks, columns], also if not finite
        total = add_up(torch.cat([own.flatten(), counted]))
        known = {"step": self.step, "lr": self.rate}
        norm = self.engine.grad_norm().view(1)
        self.behind.send(torch.cat([total, norm]), partial(self._learn, known))

    def _learn(self, known: dict[str, Any], numbers: list[float]) -> None:
        """Acts on what `_send` has sent, on all ranks alike, and makes the row of it."""
        ranks, step, columns = self.world.size, known["step"], self.micro_step.columns
        size = len(columns) * ranks
        rest, norm = numbers[size:-1], numbers[-1]
        by_column = [numbers[place : size : len(columns)] for place in range(len(columns))]
        means = {n: sum(own) / ranks for n, own in zip(columns, by_column, strict=True)}
        ce, aux = means.pop("ce"), means.pop("aux_loss")
        losses = [own_ce + own_aux for own_ce, own_aux in zip(*by_column[:2], strict=True)]
        self.stopping.decide(rest[: len(REASONS)])
        self.bad_images.end_step(step, rest[len(REASONS) :])
        self.nonfinite.note(step, losses, norm)
        # Only the main rank writes rows down.
        digest = {"batch_digest": self.stream.batch_digest(step)} if self.world.is_main else {}
        self.rows.known.append({
            "step": step,
            "loss": means.pop("objective", ce) + aux,
            "ce": ce,
            "aux_loss": aux,
            **means,
            "lr": known["lr"],
            "grad_norm": norm,
            **digest,
            **self.nonfinite.columns(),
            **self.bad_images.columns(),
        })  # fmt: skip

    def save_checkpoint(self) -> None:
        """Writes a checkpoint; a collective."""
        self.watch.note(SAVING)
        self.behind.read()
        self.rows.write()
        with self.stopping.timed("save"):
            masters, moments = self.engine.masters(), self.engine.moments()
            averages = self.validation.averages.tensors()
            if self.world.is_main:
                self.folder.sync_rows()
                save = partial(
                    checkpoint.save, self.folder.checkpoints, self.parts.info, masters, moments,
                    self.state_dict(), self.config.checkpoint.keep,
                    best=self.best.tensors_beside(self.step), averages=averages,
                )  # fmt: skip
                self.saves.put(self.stopping.timed("write")(save))  # perhaps in another thread
        self.saved_step = self.step

    def state_dict(self) -> dict[str, Any]:
        """Counters, and everything that a resumed run must agree with."""
        train, epochs = self.config.train, self.stream.epochs(self.step)
        return {
            "step": self.step,
            **self.best.state(),
            "samples_seen": dict.fromkeys(epochs, self.step * train.batch_per_domain),
            "epochs": epochs,
            "bad_images": self.bad_images.state(),
            "evaluation_due": self.evaluation_due,
            "skipped_steps": self.nonfinite.skipped,
            "lr": self.config.optim.lr,
            "seeds": {"seed": train.seed, "trial_seed": train.trial_seed},
            "world_size": self.world.size,
            "ep_size": self.config.moa.ep_size,
            "zero_stage": self.parts.ds_json["zero_optimization"]["stage"],
            "averages": self.validation.averages.facts(),
            "objective": self.micro_step.facts(),
            "adam_steps": self.engine.adam_steps(),
            "changes": self.changes,
            **state_of(self.parts),
        }
