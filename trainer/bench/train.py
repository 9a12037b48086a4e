"""A whole run against its bare step, and against PEFT LoRA in a plain loop over webdataset.

The run is the trainer's own, from loader processes to rows and curves, without evaluations and
checkpoints. Between two of its batches the others take their turn in the same process.
"""

import io
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import webdataset
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from shards import Batch, DomainStream, ShardIndex
from shards.datasets import dataset_spec
from shards.writer import write_shards
from trainer.bench.counting import counted
from trainer.bench.data import DOMAINS, domainbed_chain, make_images
from trainer.bench.step import REFERENCE, Setting, make_step
from trainer.bench.timing import Comparison, Work, in_fresh_process
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.command_line import parse
from trainer.engine import collectives
from trainer.prepare.parts import build
from trainer.process.stopping import Stopping
from trainer.process.world import ALONE
from trainer.train.assembly import train
from trainer.train.resume import Start

T = TypeVar("T")
METHOD = "moa_kron"
RUN, BARE = f"whole run, {METHOD}", f"bare step, {METHOD}, images in memory"
PLAIN = "plain loop, webdataset, PEFT LoRA"
UNTIMED = 4
"""Steps after a pause, in which what loaders made meanwhile is used up."""
COUNTED = 2
NEVER = 10**6
MODES = {
    "eager": {"model.compile": "off", "train.graph": "off"},
    "compiled": {"model.compile": "blocks", "train.graph": "off"},
    "graphed": {"model.compile": "off", "train.graph": "on"},
    "compiled, graphed": {"model.compile": "blocks", "train.graph": "on"},
}


@dataclass(frozen=True)
class Job:
    """What is trained, how long, and from which images.

    Attributes:
        setting: what the bare step shares with the run.
        mode: one of `MODES`.
        rounds: turns of each variant.
        steps: steps of a turn.
        workers: loader processes.
        digits: take the embedded digits in place of JPEGs of 400 to 600 px.
    """

    setting: Setting
    mode: str
    rounds: int
    steps: int
    workers: int
    digits: bool = False

    def __str__(self) -> str:
        """Title of the table."""
        images = "digits" if self.digits else "JPEGs of 400 to 600 px"
        about = str(self.setting).removeprefix("training step, ")
        return f"whole run, {about}, {self.mode}, {images}, loader processes: {self.workers}"


def modes(device: str) -> dict[str, dict[str, str]]:
    """The ways to launch a step that runs have there, with their settings; graphs are for GPUs."""
    on_gpu = device == "cuda"
    return {mode: each for mode, each in MODES.items() if on_gpu or each["train.graph"] == "off"}


def measure(job: Job) -> Comparison:
    """Speed of the run and of the others, and what a step of each waits for.

    `data wait ms` is waiting for loaders, `host ms` what is left of a step without that and without
    waiting for the device, `CPU ms` this process's CPU time; `speed, to ...` are medians over
    rounds of its images/s against the other's in the same round.
    """
    return in_fresh_process(_measure, job)


def settings(job: Job, folder: Path) -> dict[str, Any]:
    """The run's settings by dotted name; one domain is trained on, whose images lie in `folder`."""
    dataset = "digits" if job.digits else "folder"
    domains = dataset_spec(dataset).domains or DOMAINS
    data = {} if job.digits else {"data.root": folder / "shards"}
    return {
        **data, "data.dataset": dataset, "data.held_out": "+".join(domains[1:]),
        "data.workers": job.workers, "data.augment_on": "device",
        "model.backbone": job.setting.backbone, "model.weights": "random",
        "model.grad_checkpointing": str(job.setting.checkpointing).lower(), "moa.method": METHOD,
        "train.precision": "bf16" if job.setting.dtype == torch.bfloat16 else "fp32",
        "train.batch_per_domain": job.setting.batch, "train.eval_batch": job.setting.batch,
        "train.steps": NEVER, "train.eval_every": NEVER, "checkpoint.every": NEVER,
        "eval.mode": "selection", "output_dir": folder / "run", **MODES[job.mode],
    }  # fmt: skip


def _measure(job: Job) -> Comparison:
    if job.setting.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run takes the GPU that it sees
    multiprocessing.set_start_method(None, force=True)  # loader processes as in any program
    # The others' turns are waiting for data to the run, which would warn of it.
    logging.getLogger("trainer").setLevel(logging.ERROR)
    collectives.start(ALONE)
    with tempfile.TemporaryDirectory() as path:
        root = Path(path)
        if not job.digits:
            write_shards(make_images(root / "images"), root / "shards", dataset_spec("folder"))
        parts = build(parse([f"--{k}={v}" for k, v in settings(job, root).items()]), ALONE)
        side = parts.info.data_config["input_size"][1]
        stock = Waited(_stock(parts.index, job, side))
        others: dict[str, tuple[Work, Waited[Any]]] = {
            BARE: (make_step(METHOD, job.setting), Waited(())),
            PLAIN: (make_step(REFERENCE, job.setting, stock), stock),
        }
        turns: Any = _Turns(parts.stream, others, job)
        folder, console = RunFolder(root / "run"), Console(file=io.StringIO())
        try:
            with folder.claimed():
                train(replace(parts, stream=turns), ALONE, folder, Start(), console, Stopping(True))
        except _Measured:
            pass
        collectives.stop()
    return _table(turns, job)


def _stock(index: ShardIndex, job: Job, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as a user of webdataset makes them: Pillow, torchvision's transforms, torch's loader.

    Of all domains, without the order, checksums and balance of ours.
    """
    urls = [str(index.root / shard.file) for shard in index.shards]
    samples = webdataset.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(100)
    images = samples.decode("pil").to_tuple("jpg;png", "cls").map_tuple(domainbed_chain(side), int)
    on_gpu = job.setting.device == "cuda"
    return iter(DataLoader(images, job.setting.batch, num_workers=job.workers, pin_memory=on_gpu))


class _Measured(Exception):
    """Ends the run; everything is known."""


class Waited(Iterator[T], Generic[T]):
    """An iterator that adds up the seconds for which its items were waited for."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items, self.seconds = iter(items), 0.0

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - started


class _Turn(NamedTuple):
    """Seconds of a turn: by the clock, of CPU time, and of waiting for data."""

    wall: float
    cpu: float
    waited: float


class _Turns:
    """Times the run from within its loader, and lets the others take their turn there.

    It stands in for the run's stream and for the loader that this would make.
    """

    worker_init_fn: Any = None  # set by who shields loader processes from signals

    def __init__(
        self, stream: DomainStream, others: Mapping[str, tuple[Work, Waited[Any]]], job: Job
    ) -> None:
        self.stream, self.others, self.job = stream, others, job
        self.spent: dict[str, list[_Turn]] = {name: [] for name in (RUN, *others)}
        self.counts: dict[str, dict[str, float | str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def loader(self, *args: Any, **options: Any) -> "_Turns":
        self.batches = self.stream.loader(*args, **options)
        return self

    def __iter__(self) -> Iterator[Batch]:
        self.batches.worker_init_fn = self.worker_init_fn
        batches = Waited(self.batches)
        script = self._script(batches)
        for batch in batches:
            next(script)
            yield batch

    def _script(self, waited: Waited[Batch]) -> Iterator[None]:
        """What happens whenever the run has taken a batch: nothing, at each `yield`."""
        device = torch.device(self.job.setting.device)
        for _ in range(self.job.rounds):
            yield from [None] * UNTIMED
            with self._timed(RUN, waited):
                yield from [None] * self.job.steps
            for name, (work, own) in self.others.items():
                for _ in range(1 if name == BARE else UNTIMED):
                    work()
                with self._timed(name, own):
                    for _ in range(self.job.steps):
                        work()
        yield from [None] * UNTIMED
        with counted(device, COUNTED) as self.counts[RUN]:
            yield from [None] * COUNTED
        for name, (work, _) in self.others.items():
            with counted(device, COUNTED) as self.counts[name]:
                for _ in range(COUNTED):
                    work()
        raise _Measured

    @contextmanager
    def _timed(self, name: str, waited: Waited[Any]) -> Iterator[None]:
        synchronize = torch.get_device_module(self.job.setting.device).synchronize
        synchronize()
        wall, cpu, seconds = time.perf_counter(), time.process_time(), waited.seconds
        yield
        synchronize()
        self.spent[name].append(
            _Turn(time.perf_counter() - wall, time.process_time() - cpu, waited.seconds - seconds)
        )


def _table(turns: _Turns, job: Job) -> Comparison:
    rows: Comparison = {}
    for name, spent in turns.spent.items():
        wall, cpu, waited = (
            1000 * statistics.median(column) / job.steps for column in zip(*spent, strict=True)
        )
        counts = turns.counts[name]
        rows[name] = {
            "img/s": job.setting.batch / wall * 1000,
            **{
                f"speed, to {what}": statistics.median(
                    b.wall / a.wall for a, b in zip(spent, turns.spent[other], strict=True)
                )
                for what, other in (("bare", BARE), ("PEFT's loop", PLAIN))
            },
            "ms": wall,
            "data wait ms": waited,
            "host ms": wall - waited - float(counts.get("waited ms", 0)),
            "CPU ms": cpu,
            **counts,
        }
    return rows
