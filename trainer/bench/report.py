"""What one call shows of a GPU: steps by size and mode, whole runs, the engine."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from trainer.bench import engine, step, train
from trainer.bench.step import REFERENCE, Setting
from trainer.bench.timing import Comparison

SIZES = {"vit_large_patch14_clip_224": (20, 64, 160), "vit_gigantic_patch14_clip_224": (10, 64)}
"""Images per GPU, ascending; the first are those of DomainBed's 160 on 8 and on 16 GPUs."""
Tables = dict[str, Comparison]


def measure(job: train.Job, sizes: Mapping[str, Sequence[int]], minutes: float) -> Iterator[Tables]:
    """Yields table by table; none is begun after `minutes`, and those left out are named at last.

    Each table is of PEFT LoRA and `moa_kron`; backbone, batch and mode of `job` are filled in.

    Raises `RuntimeError`: names the tables that could not be measured, after all others.
    """
    started, late, failed = time.monotonic(), [], []
    yield {"machine": machine(job.setting)}
    done: Tables = {}
    for title, work in _plan(job, sizes, done):
        if time.monotonic() - started > 60 * minutes:
            late.append(title)
            continue
        try:
            done[title] = work()
        except Exception as error:  # the others are worth having all the same
            failed.append(f"{title}: {type(error).__name__}: {error}")
            continue
        yield {title: done[title]}
    if late:
        yield {f"left out, begun after {minutes:g} minutes": {title: {} for title in late}}
    if failed:
        raise RuntimeError("could not be measured:\n" + "\n".join(failed))


def machine(setting: Setting) -> Comparison:
    """What the figures are of, and the matrix product that MFU is against."""
    device = torch.device(setting.device)
    on_gpu = device.type == "cuda"
    return {
        torch.cuda.get_device_name() if on_gpu else "CPU": {
            "torch": torch.__version__,
            "day": time.strftime("%Y-%m-%d"),
            "product, TFLOP/s": step.matmul_flops(device, setting.dtype) / 1e12,
        }
    }


def _plan(
    job: train.Job, sizes: Mapping[str, Sequence[int]], done: Tables
) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Titles and works: the protocol's sizes, whole runs, the engine, larger sizes, compiled."""
    alone = replace(job.setting, alone=True, methods=(REFERENCE, train.METHOD))
    settings = [replace(alone, backbone=name, batch=n) for name, row in sizes.items() for n in row]
    first = [setting for setting in settings if setting.batch == sizes[setting.backbone][0]]
    largest = settings[-1]  # the engine's cost grows with the backbone
    rest = [setting for setting in settings if setting not in (*first, largest)]

    def steps(these: Sequence[Setting]) -> Iterator[tuple[str, Callable[[], Comparison]]]:
        for setting in these:
            yield str(setting), partial(step.measure, setting, job.rounds)

    yield from steps(first)
    for mode in train.modes():
        for setting in first:
            run = replace(job, setting=replace(setting, compiled="compiled" in mode), mode=mode)
            yield str(run), partial(train.measure, run)
    if largest not in first:
        yield from steps([largest])
    yield (
        f"engine against bare step, {largest.backbone}, batch {largest.batch}",
        partial(_engine, largest, job.rounds, done),
    )
    yield from steps(rest)
    yield from steps([replace(s, compiled=True) for s in (*first, *rest, largest)])


def _engine(setting: Setting, rounds: int, done: Mapping[str, Comparison]) -> Comparison:
    """`moa_kron` through the engine, ZeRO-2, beside the bare step measured before."""
    precision = "bf16" if setting.dtype == torch.bfloat16 else "fp32"
    case = engine.Case(setting.backbone, setting.batch, precision, setting.checkpointing)
    bare = done[str(setting)][train.METHOD]["ms"]
    *_, tables = engine.measure((case,), rounds)
    ((name, row),) = next(iter(tables.values())).items()
    through = row["ms"]
    if isinstance(bare, str) or isinstance(through, str):
        return {"bare step": {"ms": bare}, name: {"ms": through}}
    return {"bare step": {"ms": bare, "ratio": 1.0}, name: {**row, "ratio": through / bare}}
