"""`Trainer`: the loop from a start step to the last, with evaluation and checkpoints."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

import moa
from moa.state import save_adapter
from shards import Batch
from trainer import checkpoint
from trainer.build import Parts
from trainer.engine import Engine, differentiable_sum, restore_weights, sum_over_ranks
from trainer.errors import TrainingInvalidError
from trainer.evaluation import SPLITS, Evaluator, accuracies
from trainer.monitor import Monitor
from trainer.resume import Start, state_of
from trainer.run_folder import RunFolder, read_rows
from trainer.selection import training_domain_validation, validation_accuracy
from trainer.world import World


class Trainer:
    """Trains one run; its parts are built elsewhere and passed in.

    Args:
        parts: configuration, data and identity of the run.
        world: this process.
        engine: the model under DeepSpeed.
        evaluator: counts correct predictions on all domains.
        folder: the run's files.
        state: counters of a resumed run, from `state_dict`; empty for a new one.
    """

    def __init__(
        self,
        parts: Parts,
        world: World,
        engine: Engine,
        evaluator: Evaluator,
        folder: RunFolder,
        state: Mapping[str, Any],
    ) -> None:
        self.parts, self.config, self.stream = parts, parts.config, parts.stream
        self.world, self.engine, self.evaluator, self.folder = world, engine, evaluator, folder
        self.step = int(state.get("step", 0))
        self.best = float(state.get("best_validation", -1.0))
        self.steps_timed, self.seconds_timed = 0, 0.0

    def train(self, monitor: Monitor | None) -> None:
        """Runs the remaining steps; `monitor` is given on the main rank only."""
        train, last = self.config.train, self.config.train.steps - 1
        batches = iter(
            self.stream.loader(
                self.step, train.steps, self.world.rank, self.world.size,
                workers=self.config.data.workers, accumulation=train.accumulation,
            )
        )  # fmt: skip
        self.engine.module.train()
        warm = False
        while self.step < train.steps:
            step, started = self.step, time.perf_counter()
            row, waited = self.train_step(batches)
            took = time.perf_counter() - started
            self.step = step + 1
            if warm:  # the first step of a start also pays for warming up
                self.steps_timed += 1
                self.seconds_timed += took
            warm = True
            if monitor is not None:
                self.folder.append(self.folder.metrics, row)
                perf = {
                    "img_s": self.stream.global_batch / took,
                    "step_ms": 1000 * took,
                    "data_wait_ms": 1000 * waited,
                }
                monitor.step(row, perf)
                if step % monitor.every == 0 or step == last:
                    monitor.routing(step, moa.routing_stats(self.engine.module))
            if step % train.eval_every == 0 or step == last:
                self.evaluate(step, monitor)
            if self.step % self.config.checkpoint.every == 0 or step == last:
                self.save_checkpoint()

    def images_per_second(self) -> float:
        """Training speed since the start, evaluations left out; 0 before the second step."""
        if not self.steps_timed:
            return 0.0
        return self.steps_timed * self.stream.global_batch / self.seconds_timed

    def train_step(self, batches: Iterator[Batch]) -> tuple[dict[str, Any], float]:
        """One optimizer step.

        Returns:
            The step's `metrics.jsonl` row, and the seconds spent waiting for data.

        Raises:
            TrainingInvalidError: the loss is not finite, or (first step) gradients are missing.
        """
        pieces, waited, sums = self.config.train.accumulation, 0.0, torch.zeros(2)
        sums = sums.to(self.engine.device)
        for _ in range(pieces):
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            if self.step == 0:
                with self.engine.checks_gradients():
                    sums += self._micro_step(batch)
            else:
                sums += self._micro_step(batch)
        moa.update_balance(self.engine.module, sum_over_ranks)
        mean = sum_over_ranks(sums) / (pieces * self.world.size)
        ce, aux = mean.tolist()
        digest, norm = self.stream.batch_digest(self.step), self.engine.grad_norm()
        if not math.isfinite(ce + aux + norm):
            raise TrainingInvalidError(
                f"loss {ce + aux}, gradient norm {norm} at step {self.step} (batch {digest}); "
                "lower --optim.lr or set --optim.clip in a new run"
            )
        row = {
            "step": self.step,
            "loss": ce + aux,
            "ce": ce,
            "aux_loss": aux,
            "lr": self.engine.learning_rate(),
            "grad_norm": norm,
            "batch_digest": digest,
        }
        return row, waited

    def _micro_step(self, batch: Batch) -> torch.Tensor:
        """Forward, backward and (after the last piece) update; [ce, aux] of this rank's piece."""
        engine, train = self.engine, self.config.train
        moa.set_routing_position(
            engine.module,
            moa.RoutingPosition(train.seed, self.step, batch.first_slot),
        )
        scores = engine(batch.images.to(engine.device, engine.dtype))
        ce = F.cross_entropy(scores.float(), batch.labels.to(engine.device))
        aux = moa.aux_loss(engine.module, differentiable_sum)
        engine.backward(ce + aux)
        engine.step()
        return torch.stack([ce.detach(), aux.detach().to(ce.dtype)])

    def evaluate(self, step: int, monitor: Monitor | None) -> None:
        """Evaluates all domains; keeps the adapter if it is the best by source validation."""
        held_out = self.parts.held_out
        row = self._result_row(step, accuracies(self.evaluator(self.engine.module)))
        validation = validation_accuracy(row, held_out)
        if better := validation > self.best:
            self.best = validation
            masters = self.engine.masters()
        if monitor is None:
            return
        self.folder.append(self.folder.results, row)
        selected = training_domain_validation(read_rows(self.folder.results), held_out)
        by_domain = {
            name: {split: row[f"env{i}_{split}_acc"] for split in SPLITS}
            for i, name in enumerate(self.parts.index.domains)
        }
        monitor.evaluation(step, by_domain, selected[f"env{held_out}_in_acc"])
        if better:
            results = {"step": step} | {k: v for k, v in row.items() if k.endswith("_acc")}
            info = replace(self.parts.info, results=results)
            save_adapter(self.engine.module, self.folder.adapter, info, masters)

    def _result_row(self, step: int, accuracy: dict[str, float]) -> dict[str, Any]:
        """A row that DomainBed's own `collect_results` can read."""
        config = self.config
        return {
            "step": step,
            "epoch": max(self.stream.epochs(step).values()),
            **accuracy,
            "moa/images_per_second": self.images_per_second(),
            "args": {
                "dataset": config.data.dataset,
                "algorithm": config.moa.method,
                "test_envs": [self.parts.held_out],
                "trial_seed": config.train.trial_seed,
                "seed": config.train.seed,
                "hparams_seed": 0,
                "holdout_fraction": config.data.holdout_fraction,
                "output_dir": str(self.folder.path),
            },
            "hparams": {
                "lr": config.optim.lr,
                "batch_size": config.train.batch_per_domain,
                "weight_decay": config.optim.weight_decay,
                "backbone": self.parts.info.base_model,
            },
        }

    def save_checkpoint(self) -> None:
        """Writes a checkpoint; a collective."""
        masters, moments = self.engine.masters(), self.engine.moments()
        if self.world.is_main:
            root, keep = self.folder.checkpoints, self.config.checkpoint.keep
            checkpoint.save(root, self.parts.info, masters, moments, self.state_dict(), keep)

    def save_last(self) -> None:
        """Writes the last adapter; a collective."""
        masters = self.engine.masters()
        if self.world.is_main:
            save_adapter(self.engine.module, self.folder.adapter_last, self.parts.info, masters)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and everything that a resumed run must agree with."""
        train, epochs = self.config.train, self.stream.epochs(self.step)
        return {
            "format_version": 1,
            "step": self.step,
            "best_validation": self.best,
            "samples_seen": dict.fromkeys(epochs, self.step * train.batch_per_domain),
            "epochs": epochs,
            "lr": self.config.optim.lr,
            "seeds": {"seed": train.seed, "trial_seed": train.trial_seed},
            "world_size": self.world.size,
            "ep_size": 1,
            "zero_stage": self.parts.ds_json["zero_optimization"]["stage"],
            **state_of(self.parts),
        }


def train(parts: Parts, world: World, folder: RunFolder, start: Start, console: Console) -> None:
    """Brings model and engine to the start, trains to the end, marks the folder as done."""
    resumed = checkpoint.load(start.checkpoint) if start.checkpoint else None
    if resumed is not None:
        restore_weights(parts.model, resumed)
    engine = Engine(parts.model, parts.config.optim, parts.ds_json, world)
    if resumed is not None:
        engine.restore(resumed)
    if world.is_main:
        checkpoint.set_aside_newer(folder.checkpoints, start.step)
        folder.cut_back(start.step)
        folder.describe(parts.config, parts.ds_json)
    config = parts.config
    evaluator = Evaluator(
        index=parts.index,
        data_config=parts.info.data_config,
        trial_seed=config.train.trial_seed,
        holdout_fraction=config.data.holdout_fraction,
        batch_size=config.train.eval_batch,
        workers=config.data.workers,
        world=world,
        device=engine.device,
        dtype=engine.dtype,
        sum_over_ranks=sum_over_ranks,
    )
    trainer = Trainer(parts, world, engine, evaluator, folder, resumed.state if resumed else {})
    if world.is_main:
        with Monitor(config, folder.tensorboard, start.step, console) as monitor:
            trainer.train(monitor)
    else:
        trainer.train(None)
    trainer.save_last()
    if world.is_main:
        folder.done.write_text("done\n")
