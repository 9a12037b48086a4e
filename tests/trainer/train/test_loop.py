"""What the loop does, and when, in a run within this process."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import moa
from tests.support.trainer_fixtures import arguments, rows
from trainer.checkpoint.run_folder import RunFolder
from trainer.prepare.ahead import Ready
from trainer.train import session
from trainer.train.loop import Trainer
from trainer.train.micro_step import MicroStep


def test_rows_are_written_while_later_steps_are_under_way(
    few: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a step's vote and the next forward a GPU would wait for the file system.

    The blocks are compiled, all in the first step, evaluations and pages notwithstanding.
    """
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    events: list[str] = []
    monkeypatch.setattr(moa, "compile_blocks", partial(moa.compile_blocks, backend="eager"))
    monkeypatch.setenv("MOA_CACHE", str(tmp_path / "cache"))
    forward, vote, append = MicroStep.__call__, Trainer._send, RunFolder.append

    def seen_forward(self: MicroStep, ready: Ready, step: int) -> Any:
        events.append("forward")
        return forward(self, ready, step)

    def seen_vote(self: Trainer, sums: Any) -> Any:
        events.append("vote")
        graphs.append(counters["stats"]["unique_graphs"])
        return vote(self, sums)

    def seen_append(self: RunFolder, path: Path, row: Any) -> None:
        events.append(path.stem)
        append(self, path, row)

    monkeypatch.setattr(MicroStep, "__call__", seen_forward)
    monkeypatch.setattr(Trainer, "_send", seen_vote)
    monkeypatch.setattr(RunFolder, "append", seen_append)
    more = {"train__steps": "4", "train__eval_every": "100", "moa__method": "moa_lora"}
    more["model__compile"] = "blocks"
    output = tmp_path / "run"
    assert session.main(arguments(output, **few, **more)) == 0
    assert events == [
        "forward", "vote", "metrics", "results",  # an evaluation follows
        "forward", "vote",
        "forward", "vote",
        "forward", "metrics", "vote", "metrics", "metrics", "results",
    ]  # fmt: skip
    assert [row["step"] for row in rows(output / "metrics.jsonl")] == [0, 1, 2, 3]
    assert os.environ["NCCL_DEBUG"] == "WARN", "the default of a run"
    assert 1 <= graphs[0] == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    assert f"kept in {tmp_path}/cache/compiled" in (output / "log.txt").read_text()
    origin = json.loads((output / "adapter" / "adapter_config.json").read_text())["origin"]
    assert origin["compiled"] == "blocks"
