"""The prepared measurement of a GPU: its order, its end, and what fails in it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.bench import report
from trainer.bench.__main__ import _show
from trainer.bench.step import REFERENCE, Setting
from trainer.bench.train import METHOD, Job

JOB = Job(Setting("", 0, "cpu", torch.bfloat16), "eager", rounds=1, steps=1, workers=1)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """The settings of steps that were measured; whole runs fail."""
    found: list[Setting] = []

    def steps(setting: Setting, _: int) -> Any:
        found.append(setting)
        return {
            REFERENCE: {"ms": 2.0 - 0.5 * setting.compiled},
            METHOD: {"ms": "out of memory" if setting.compiled else 4.0 - setting.graphed},
        }

    def broken(job: Job) -> Any:
        raise ValueError(f"no {job.setting.backbone}")

    def through(cases: Any, _: int) -> Any:
        yield {"steps": {str(cases[0]): {"ms": 5.0}}}

    monkeypatch.setattr(report.step, "matmul_flops", lambda *_: 1e12)
    monkeypatch.setattr(report.step, "measure", steps)
    monkeypatch.setattr(report.train, "measure", broken)
    monkeypatch.setattr(report.engine, "measure", through)
    return found


def test_the_rest_is_measured_although_a_part_fails(
    measured: list[Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[report.Tables] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    job = replace(JOB, setting=replace(JOB.setting, device="cuda"))
    with pytest.raises(RuntimeError, match=r"\nwhole run, vit_large.*\nwhole run, vit_gigantic"):
        found.extend(report.measure(job, report.GPU_SIZES))
    tables = {title: rows for each in found for title, rows in each.items()}
    large, giant = report.GPU_SIZES
    sizes = [(large, 20), (giant, 10), (giant, 64), (large, 64), (large, 160)]
    done = [(each.backbone, each.batch, each.graphed, each.compiled) for each in measured]
    assert done[:4] == [(*size, graphed, False) for graphed in (False, True) for size in sizes[:2]]
    modes = [(False, False), (True, False), (False, True), (True, True)]
    assert sorted(done) == sorted((*size, *mode) for size in sizes for mode in modes)
    assert all(each.methods == (REFERENCE, METHOD) and each.alone for each in measured)
    (against,) = (rows for title, rows in tables.items() if title.startswith("engine"))
    assert [row.get("ratio") for row in against.values()] == [None, 5 / 4]
    best = tables["each in its best mode"]
    assert len(best) == len(sizes)
    wanted = {
        "PEFT ms": 1.5,
        "PEFT mode": "compiled",
        "moa_kron ms": 3.0,
        "moa_kron mode": "graphed",
    }
    assert all(row == wanted | {"ratio": 2.0} for row in best.values())


def test_nothing_is_begun_when_the_time_is_over(
    measured: list[Setting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "MINUTES", -1.0)
    found = list(report.measure(JOB, report.GPU_SIZES))
    for tables in found:
        _show(tables)
    shown = capsys.readouterr().out
    assert "compiled, graphed" in shown
    assert "vit_large_patch14_clip_224, batch 160" in shown
    first, without, best, last = found
    assert measured == []
    assert list(first) == ["machine"]
    assert list(without["left out without a GPU"]) == ["compiled, graphed", "graphed"]
    assert not any(best["each in its best mode"].values())
    ((title, left),) = last.items()
    assert title.startswith("left out")
    assert len(left) == 2 * 5 + 2 * 2 + 1, "steps, whole runs, the engine"
