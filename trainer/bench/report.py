"""What one call shows of a GPU: steps by size and mode, whole runs, the engine."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from trainer.bench import engine, step, train
from trainer.bench.step import REFERENCE, Setting
from trainer.bench.timing import Comparison

SIZES = {"vit_embedded": (2, 4)}
"""What a CPU takes, to see that all of it runs."""
GPU_SIZES = {"vit_large_patch14_clip_224": (20, 64, 160), "vit_gigantic_patch14_clip_224": (10, 64)}
"""Images per GPU, ascending; the first are those of DomainBed's 160 on 8 and on 16 GPUs."""
MINUTES = 3.0
"""After which no table is begun."""
Tables = dict[str, Comparison]
Plan = Iterator[tuple[str, Callable[[], Comparison]]]


def measure(job: train.Job, sizes: Mapping[str, Sequence[int]]) -> Iterator[Tables]:
    """Yields table by table; none is begun after `MINUTES`, and those left out are named at last.

    Each is of PEFT LoRA and `moa_kron`; backbone, batch and mode of `job` are filled in.

    Raises `RuntimeError`: names the tables that could not be measured, after all others.
    """
    started, late, failed = time.monotonic(), [], []
    device = torch.device(job.setting.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    tflops = step.matmul_flops(device, job.setting.dtype) / 1e12  # which MFU is against
    day = time.strftime("%Y-%m-%d")
    yield {"machine": {name: {"torch": torch.__version__, "day": day, "TFLOP/s": tflops}}}
    done: Tables = {}
    for title, work in _plan(job, sizes, done):
        if time.monotonic() - started > 60 * MINUTES:
            late.append(title)
            continue
        try:
            done[title] = work()
        except Exception as error:  # the others are worth having all the same
            failed.append(f"{title}: {type(error).__name__}: {error}")
        else:
            yield {title: done[title]}
    if late:
        yield {f"left out after {MINUTES:g} minutes": {title: {} for title in late}}
    if failed:
        raise RuntimeError("could not be measured:\n" + "\n".join(failed))


def _plan(
    job: train.Job, sizes: Mapping[str, Sequence[int]], done: Mapping[str, Comparison]
) -> Plan:
    """In order of value: smallest batches, whole runs, the engine, larger batches, compiled."""
    alone = replace(job.setting, alone=True, methods=(REFERENCE, train.METHOD))
    settings = [replace(alone, backbone=name, batch=n) for name, row in sizes.items() for n in row]
    first = [setting for setting in settings if setting.batch == sizes[setting.backbone][0]]
    largest = settings[-1]  # the engine's cost grows with the backbone
    later = sorted(set(settings) - {*first, largest}, key=settings.index)

    def steps(*chosen: Setting) -> Plan:
        for setting in chosen:
            yield str(setting), partial(step.measure, setting, job.rounds)

    yield from steps(*first)
    for mode in train.modes():
        for setting in first:
            run = replace(job, setting=replace(setting, compiled="compiled" in mode), mode=mode)
            yield str(run), partial(train.measure, run)
    yield from steps(largest)
    title = f"engine against bare step, {largest.backbone}, batch {largest.batch}"
    yield title, partial(_engine, largest, job.rounds, done)
    yield from steps(*later, *(replace(s, compiled=True) for s in (*first, *later, largest)))


def _engine(setting: Setting, rounds: int, done: Mapping[str, Comparison]) -> Comparison:
    """`moa_kron` through the engine, ZeRO-2, beside the bare step measured before."""
    precision = "bf16" if setting.dtype == torch.bfloat16 else "fp32"
    case = engine.Case(setting.backbone, setting.batch, precision, setting.checkpointing)
    bare = done[str(setting)][train.METHOD]["ms"]
    *_, tables = engine.measure((case,), rounds)
    ((name, row),) = next(iter(tables.values())).items()
    return {"bare step": {"ms": bare}, name: {"ratio": float(row["ms"]) / float(bare), **row}}
