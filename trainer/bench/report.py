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
    if missing := train.MODES.keys() - train.modes(job.setting.device).keys():
        yield {"left out without a GPU": {mode: {} for mode in sorted(missing)}}
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
    yield {"each in its best mode": _best(done, _settings(job, sizes))}
    if late:
        yield {f"left out after {MINUTES:g} minutes": {title: {} for title in late}}
    if failed:
        raise RuntimeError("could not be measured:\n" + "\n".join(failed))


def _settings(job: train.Job, sizes: Mapping[str, Sequence[int]]) -> list[Setting]:
    """Of all sizes, in no mode yet."""
    alone = replace(job.setting, alone=True, methods=(REFERENCE, train.METHOD))
    return [replace(alone, backbone=name, batch=n) for name, row in sizes.items() for n in row]


def _plan(
    job: train.Job, sizes: Mapping[str, Sequence[int]], done: Mapping[str, Comparison]
) -> Plan:
    """In order of value: smallest batches, whole runs, the engine, larger batches.

    What must be compiled first comes later.
    """
    settings = _settings(job, sizes)
    first = [setting for setting in settings if setting.batch == sizes[setting.backbone][0]]
    largest = settings[-1]  # the engine's cost grows with the backbone
    modes = sorted(train.modes(job.setting.device), key=lambda mode: "compiled" in mode)
    quick = [mode for mode in modes if "compiled" not in mode]

    def steps(chosen: Sequence[Setting], *modes: str) -> Plan:
        for mode in modes:
            for setting in (each.in_mode(mode) for each in chosen):
                yield str(setting), partial(step.measure, setting, job.rounds)

    yield from steps(first, *quick)
    for mode in modes:
        for setting in first:
            run = replace(job, setting=setting.in_mode(mode), mode=mode)
            yield str(run), partial(train.measure, run)
    yield from steps([largest], "eager")
    title = f"engine against bare step, {largest.backbone}, batch {largest.batch}"
    yield title, partial(_engine, largest, job.rounds, done)
    yield from steps(first, *modes[len(quick) :])
    later = [setting for setting in settings if setting not in first]
    yield from steps([setting for setting in later if setting != largest], "eager")
    yield from steps(later, *modes[1:])


def _best(done: Mapping[str, Comparison], settings: Sequence[Setting]) -> Comparison:
    """Of each size PEFT LoRA and `moa_kron` in the fastest of their modes that were measured."""
    rows: Comparison = {}
    for setting in settings:
        row: dict[str, float | str] = {}
        for method in (REFERENCE, train.METHOD):
            tables = ((mode, done.get(str(setting.in_mode(mode)), {})) for mode in train.MODES)
            times = {mode: table[method]["ms"] for mode, table in tables if method in table}
            known = {mode: ms for mode, ms in times.items() if not isinstance(ms, str)}
            if known:
                mode = min(known, key=lambda mode: known[mode])
                word = method.split()[0]
                row |= {f"{word} ms": known[mode], f"{word} mode": mode}
        if len(row) == 4:
            peft, _, own, _ = row.values()
            row["ratio"] = float(own) / float(peft)
        rows[f"{setting.backbone}, batch {setting.batch}"] = row
    return rows


def _engine(setting: Setting, rounds: int, done: Mapping[str, Comparison]) -> Comparison:
    """`moa_kron` through the engine, ZeRO-2, beside the bare step measured before."""
    precision = "bf16" if setting.dtype == torch.bfloat16 else "fp32"
    case = engine.Case(setting.backbone, setting.batch, precision, setting.checkpointing)
    bare = done[str(setting)][train.METHOD]["ms"]
    *_, tables = engine.measure((case,), rounds)
    ((name, row),) = next(iter(tables.values())).items()
    return {"bare step": {"ms": bare}, name: {"ratio": float(row["ms"]) / float(bare), **row}}
