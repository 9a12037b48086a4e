"""Files that an older commit wrote (tests/golden): set, adapter and checkpoint are read as ever."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from shards import ShardIndex
from shards.write.verify import verify_shards
from tests.support import warm
from tests.support.trainer_fixtures import ROOT, environment, launch, rows

WRITTEN = ROOT / "tests" / "golden" / "commit_f9881d5"
COMMAND = json.loads((WRITTEN / "run/adapter/adapter_config.json").read_text())["origin"]["command"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old files, and the old run continued by today's code with the command of its card."""
    folder = tmp_path_factory.mktemp("older")
    shutil.copytree(WRITTEN, folder, dirs_exist_ok=True)
    words = shlex.split(COMMAND)[2:]
    paths = {"run": str(folder / "run"), "set": str(folder / "set")}
    result = launch(*(paths.get(word, word) for word in words), "--resume=must")
    assert result.returncode == 0, result.stderr
    assert "step-00000004" in result.stdout + result.stderr
    return folder


def test_shard_set_is_whole() -> None:
    index = ShardIndex.load(WRITTEN / "set")
    assert (index.domains, index.classes) == (("art", "clipart", "photo"), ("cat", "dog"))
    assert verify_shards(index, deep=True).problems == []


def test_run_goes_on_as_it_would_have(folder: Path) -> None:
    expected, found = rows(WRITTEN / "run/metrics.jsonl"), rows(folder / "run/metrics.jsonl")
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in expected]
    for name in ("loss", "ce", "grad_norm"):
        # Rounding differs between kinds of processors.
        values = [[row[name] for row in table] for table in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=2e-3)


def test_adapter_is_evaluated_as_when_it_was_written() -> None:
    words = ["--adapter=run/adapter-last", "--data.dataset=folder", "--data.root=set", "--json"]
    result = warm.run("-m", "trainer.evaluate", *words, env=environment(), cwd=WRITTEN)
    assert result.returncode == 0, result.stderr
    found, last = json.loads(result.stdout), rows(WRITTEN / "run/results.jsonl")[-1]
    accuracies = {name: value for name, value in last.items() if name.endswith("_acc")}
    assert len(accuracies) == 6
    assert {name: found[name] for name in accuracies} == accuracies
