"""A whole run beside its bare step: who takes which turn, and what is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.bench import __main__ as bench, train as bench_train
from trainer.bench.step import Setting
from trainer.bench.train import BARE, PLAIN, RUN, Job, Waited
from trainer.config.run_config import RunConfig, flat

JOB = Job(Setting("vit_embedded", 2, "cpu", torch.float32), "eager", rounds=2, steps=3, workers=1)


def test_a_run_beside_its_bare_step_and_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here, where everything is imported.
    monkeypatch.setattr(bench_train, "in_fresh_process", lambda work, *args: work(*args))
    target = tmp_path / "figures.json"
    short = ["--rounds", "1", "--steps", "2", "--backbones", "vit_embedded", "--batches", "2"]
    assert bench.main(["--part", "train", "--digits", *short, "--json", str(target)]) == 0
    first, *_ = json.loads(target.read_text()).values()
    assert list(first) == [RUN, BARE, PLAIN]
    for row in first.values():
        assert row["img/s"] == pytest.approx(2000 / row["ms"])
        assert row["host ms"] == pytest.approx(row["ms"] - row["data wait ms"])
    assert first[BARE]["speed, to bare"] == first[PLAIN]["speed, to PEFT's loop"] == 1
    assert first[BARE]["data wait ms"] == 0
    # The engine has one flat tensor; a plain Adam goes through them all.
    assert first[BARE]["operations"] > first[RUN]["operations"] > 300


class Loader:
    """Counts what a run takes."""

    def __init__(self) -> None:
        self.taken = 0

    def loader(self, *_: Any) -> "Loader":
        return self

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> int:
        self.taken += 1
        return self.taken


def test_all_take_turns_in_every_round() -> None:
    """Each with the same steps, after some that are not timed."""
    stream, calls = Loader(), []
    others: Any = {name: (lambda n=name: calls.append(n), Waited(())) for name in (BARE, PLAIN)}
    turns: Any = bench_train._Turns(stream, others, JOB)  # type: ignore[arg-type]
    got: list[int] = []
    with pytest.raises(bench_train._Measured):
        got.extend(turns.loader(0, 10))
    round_ = bench_train.UNTIMED + JOB.steps
    turn = [BARE] * (1 + JOB.steps) + [PLAIN] * round_  # nothing is made for the bare step
    counted = [BARE] * bench_train.COUNTED + [PLAIN] * bench_train.COUNTED
    assert calls == JOB.rounds * turn + counted
    assert got == list(range(1, len(got) + 1))
    steps = JOB.rounds * round_ + bench_train.UNTIMED + bench_train.COUNTED
    assert len(got) == steps == stream.taken - 1
    assert [len(spent) for spent in turns.spent.values()] == [JOB.rounds] * 3
    assert list(turns.counts) == [RUN, BARE, PLAIN]


def test_graphs_are_for_gpus_and_settings_of_runs() -> None:
    assert list(bench_train.modes("cpu")) == ["eager", "compiled"]
    assert list(bench_train.modes("cuda")) == list(bench_train.MODES)
    known = flat(RunConfig()).keys()
    assert all(each.keys() <= known for each in bench_train.MODES.values())
