"""Puts a run together from its parts, brings it to its start, and trains to the end."""

from dataclasses import replace
from functools import partial

from rich.console import Console

from shards import Decoder
from trainer.checkpoint import checkpoint
from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.run_folder import ZERO_SHOT, RunFolder
from trainer.engine.averaging import SWAD, Averages
from trainer.engine.collectives import sum_over_ranks
from trainer.engine.engine import Engine, restore_weights
from trainer.evaluate.evaluator import Evaluator
from trainer.monitor.monitor import Monitor
from trainer.prepare.parts import Parts
from trainer.process.stopping import Stopping
from trainer.process.watchdog import EVALUATING, Watchdog
from trainer.process.world import World
from trainer.train.best import Best, is_left_out, restored_best, write_best
from trainer.train.loop import Trainer
from trainer.train.resume import Start
from trainer.train.validation import evaluate_zero_shot


def train(
    parts: Parts,
    world: World,
    folder: RunFolder,
    start: Start,
    console: Console,
    stopping: Stopping,
) -> None:
    """Brings model and engine to the start, trains to the end, marks the folder as done.

    Raises:
        Stopped: a signal or the time limit ended it; everything is saved.
        PeerLostError: another rank is gone.
    """
    watch = Watchdog(folder.path, world, parts.config.train.step_deadline, start.step)
    with watch.watching():
        trainer = assemble(parts, world, folder, start, stopping, watch)
        with trainer.engine.closing():
            with trainer.saves:
                if world.is_main:
                    device = trainer.engine.device
                    with Monitor(parts, folder, world, device, start.step, console) as monitor:
                        trainer.train(monitor)
                else:
                    trainer.train(None)
            trainer.validation.save_last(world.is_main)
    if world.is_main:
        replace_text(folder.done, "done\n")


def assemble(
    parts: Parts, world: World, folder: RunFolder, start: Start, stopping: Stopping, watch: Watchdog
) -> Trainer:
    """A trainer that stands where the run starts, in a folder that is cut back to there."""
    config = parts.config
    resumed = checkpoint.load(start.checkpoint) if start.checkpoint else None
    if resumed is not None:
        restore_weights(parts.model, resumed)
    engine = Engine(
        parts.model, config.optim, parts.ds_json, world, config.moa, parts.tokens(world)
    )
    schedule = (config.train.steps, config.train.eval_every)
    if resumed is None:
        state, best, averages = {}, Best(), Averages(config.average, config.train.steps, engine)
    else:
        state = resumed.state | {"changes": resumed.state["changes"] + start.changes}
        # Adam has not seen the steps that were left out; older files do not tell its own count.
        adam_steps = int(state["step"]) - int(state.get("skipped_steps", 0))
        adam_steps = int(state.get("adam_steps", adam_steps))
        engine.write(resumed.masters, resumed.moments, adam_steps)
        best, facts = restored_best(resumed, *schedule), dict(state.get("averages") or {})
        if start.changes:  # what was selected before is of another run
            best, state["evaluation_due"] = Best(), True
            facts.pop(SWAD, None)
        averages = Averages(config.average, config.train.steps, engine, resumed.averages, facts)
    if world.is_main:
        last_again = bool(state.get("evaluation_due")) or is_left_out(start.step - 1, *schedule)
        checkpoint.set_aside_newer(folder.checkpoints, start.step)
        complete = config.eval.mode == "full" or (
            start.step == config.train.steps and not last_again
        )
        if start.changes:
            images = ("data", "train.trial_seed")  # what decides which are evaluated
            others = any(change["setting"].startswith(images) for change in start.changes)
            folder.set_aside(start.step, [ZERO_SHOT] if others else ())
        folder.cut_back(start.step, start.step - last_again, keeps_results=complete)
        write_best(folder.adapter, parts.info, best)
        folder.describe(config, parts.ds_json, state.get("changes", []))

    def pause() -> None:
        watch.note(EVALUATING)
        stopping.pause()

    evaluator = Evaluator(
        index=parts.index, data_config=parts.info.data_config,
        decoder=Decoder(config.data.decode, config.data.truncated, config.data.max_pixels),
        trial_seed=config.train.trial_seed, holdout_fraction=config.data.holdout_fraction,
        batch_size=config.train.eval_batch, workers=config.data.workers,
        max_bad_fraction=config.data.max_bad_fraction, losses=config.average.swad,
        world=world, device=engine.device, dtype=engine.dtype,
        sum_over_ranks=sum_over_ranks, pause=pause,
    )  # fmt: skip
    if start.step == 0 and config.model.head_init == "text":
        # A signal ends it at once, and the same command starts again.
        alive = replace(evaluator, pause=partial(watch.note, EVALUATING))
        evaluate_zero_shot(parts, world, engine, alive, folder)
    return Trainer(parts, world, engine, evaluator, folder, state, best, stopping, watch, averages)
