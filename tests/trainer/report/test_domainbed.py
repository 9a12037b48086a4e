"""Run folders in DomainBed's sweep format, against its aggregation written anew.

The `domainbed` package is not published in a form that could be installed here, so the reference
below follows the description of its format and rules: numpy throughout, and no code of ours.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.stream.split import seed_hash
from tests.support.report_fixtures import evaluation, write_run
from trainer.config.command_line import parse
from trainer.config.hparams import drawn
from trainer.config.run_config import flat
from trainer.prepare.parts import build
from trainer.process.world import World
from trainer.report.__main__ import main
from trainer.sweep.grid import Grid
from trainer.train.result_row import result_row

Key = tuple[str, str, int, int]


def load(sweep: Path) -> dict[Key, list[dict[str, Any]]]:
    """Rows by (dataset, algorithm, target, trial); a row with two targets counts for both."""
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for folder in sorted(sweep.iterdir()):
        with (folder / "results.jsonl").open() as file:
            for line in file:
                row = json.loads(line[:-1])  # every line ends in a newline
                args = row["args"]
                for target in args["test_envs"]:
                    key = (args["dataset"], args["algorithm"], target, args["trial_seed"])
                    groups[key].append(row)
    return groups


def pick(rows: list[dict[str, Any]], target: int, rule: str) -> tuple[float, float] | None:
    """(validation, test) accuracy of one set of hyper-parameters."""
    single = [r for r in rows if r["args"]["test_envs"] == [target]]
    envs = [e for e in range(100) if f"env{e}_out_acc" in rows[0]]
    others = [e for e in envs if e != target]
    if rule == "oracle":
        last = max(single, key=lambda r: r["step"])
        return last[f"env{target}_out_acc"], last[f"env{target}_in_acc"]
    table = []
    for step in sorted({r["step"] for r in single}):
        (row,) = (r for r in single if r["step"] == step)
        if rule == "training_domain_validation":
            votes = [row[f"env{e}_out_acc"] for e in others]
        else:
            at_step = [r for r in rows if r["step"] == step and len(r["args"]["test_envs"]) == 2]
            votes = [
                r[f"env{e}_in_acc"] for e in others for r in at_step if e in r["args"]["test_envs"]
            ]
        if len(votes) == len(others):
            table.append((np.mean(votes), row[f"env{target}_in_acc"]))
    if not table:
        return None
    return table[int(np.argmax([validation for validation, _ in table]))]


def collect(sweep: Path, rule: str) -> dict[tuple[str, str, int], dict[int, float]]:
    """Per (dataset, algorithm, target) the reported accuracy of every trial."""
    found: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for (dataset, algorithm, target, trial), rows in load(sweep).items():
        picked = []
        for number in sorted({r["args"]["hparams_seed"] for r in rows}):
            of_number = [r for r in rows if r["args"]["hparams_seed"] == number]
            if (result := pick(of_number, target, rule)) is not None:
                picked.append(result)
        if picked:
            best = max(validation for validation, _ in picked)
            # Ascending order, read from its end: of equal settings the last one.
            found[dataset, algorithm, target][trial] = [t for v, t in picked if v == best][-1]
    return found


def sweep_seed(
    dataset: str, algorithm: str, held_out: tuple[int, ...], hparams: int, trial: int
) -> int:
    """The `seed` that DomainBed's sweep gives a run."""
    text = str((dataset, algorithm, list(held_out), hparams, trial))
    return int(hashlib.md5(text.encode()).hexdigest(), 16) % 2**31


def test_seeds_of_a_sweep() -> None:
    assert sweep_seed("DomainNet", "ERM", (0,), 0, 0) == 1219415915, "from its documentation"
    assert seed_hash("DomainNet", "ERM", [0], 0, 0) == 1219415915


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 datasets x 2 methods x 3 trials x 2 hyper-parameters, with all pairs held out, too."""
    folder, random = tmp_path_factory.mktemp("domainbed") / "sweep", np.random.default_rng(0)
    number = 0
    targets = [(e,) for e in range(4)] + [(a, b) for a in range(4) for b in range(a + 1, 4)]
    for dataset in ("PACS", "VLCS"):
        for method in ("ERM", "moa_kron"):
            for trial in range(3):
                for hparams in range(2):
                    for held_out in targets:
                        rows = [
                            # One decimal: ties between steps and between settings abound.
                            evaluation(s, *random.integers(0, 11, (4, 2)) / 10.0)
                            for s in (0, 300, 600)
                        ]
                        write_run(
                            folder / f"{number:04d}", rows, dataset=dataset, method=method,
                            held_out=held_out, trial_seed=trial, hparams_seed=hparams, ours=False,
                            seed=sweep_seed(dataset, method, held_out, hparams, trial),
                        )  # fmt: skip
                        number += 1
    return folder


@pytest.mark.parametrize("rule", ["training_domain_validation", "oracle", "leave_one_domain_out"])
def test_report_and_domainbed_agree(
    sweep: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep), "--tune", f"--selection={rule}", "--format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = collect(sweep, rule)
    by_name = {table["name"].removesuffix(f"-{rule}"): table for table in report["tables"]}
    for dataset in ("PACS", "VLCS"):
        for row in by_name[dataset.lower()]["rows"]:
            means = []
            for target in range(4):
                trials = np.array(list(expected[dataset, row["label"], target].values()))
                cell = row["cells"][target]
                assert cell["repetitions"] == len(trials) == 3
                assert cell["mean"] == pytest.approx(trials.mean(), abs=1e-12)
                assert cell["error"] == pytest.approx(trials.std() / np.sqrt(3), abs=1e-12)
                means.append(trials.mean())
            assert row["cells"][4]["mean"] == pytest.approx(np.mean(means), abs=1e-12)
    averages = by_name["averages"]["rows"]
    for row in averages:
        means = []
        for place, dataset in enumerate(("PACS", "VLCS")):
            trials = np.mean(
                [[expected[dataset, row["label"], e][t] for t in range(3)] for e in range(4)], 0
            )
            assert row["cells"][place]["mean"] == pytest.approx(trials.mean(), abs=1e-12)
            assert row["cells"][place]["error"] == pytest.approx(trials.std() / 3**0.5, abs=1e-12)
            means.append(trials.mean())
        assert row["cells"][2]["mean"] == pytest.approx(np.mean(means), abs=1e-12)
    assert len(averages) == 2


@pytest.mark.parametrize("rule", ["training_domain_validation", "oracle"])
def test_random_search_of_ours(
    rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 methods x 3 held-out domains x 4 sets of hyper-parameters, as a sweep leaves them."""
    accuracies = np.random.default_rng(1).integers(0, 11, (4, 2, 3, 2, 3, 2)) / 10.0
    hparams = (0, 1, 2, 5)
    grid = Grid(("lora", "moa_kron"), ("plain", "inverted", "outline"), (0,), None, hparams)
    for run in grid.runs():
        config = parse(run.flags(tmp_path))
        settings = flat(config)
        target, number = grid.held_out.index(run.held_out), hparams.index(run.hparams_seed)
        values = accuracies[number, grid.methods.index(run.method), target]
        write_run(
            tmp_path / run.name, [evaluation(step, *values[at]) for at, step in enumerate((0, 50))],
            method=run.method, held_out=(target,), domains=grid.held_out,
            hparams_seed=run.hparams_seed,
            settings={name: settings[name] for name in drawn(1, "digits", run.method, "erm")},
        )  # fmt: skip
    assert main([str(tmp_path), "--tune", f"--selection={rule}", "--format=json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = collect(tmp_path, rule)
    (table,) = report["tables"]
    for row in table["rows"]:
        means = [expected["digits", row["label"], target][0] for target in range(3)]
        assert [cell["mean"] for cell in row["cells"]] == pytest.approx([*means, np.mean(means)])
    assert [row["label"] for row in table["rows"]] == [*grid.methods]
    assert main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "they differ in hparams_seed (0, 1)" in told
    assert "--tune lets the selection rule choose" in told


def test_a_sweep_is_compared_with_our_runs(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our repetition of seed and trial seed t stands beside DomainBed's trial t."""
    for trial in range(3):
        rows = [evaluation(0, *[(0.5, 0.5)] * 4)]
        write_run(tmp_path / f"{trial}", rows, dataset="pacs", held_out=(0,), seed=trial,
                  trial_seed=trial)  # fmt: skip
    flags = ["--tune", "--compare=lora", "--format=json"]
    assert main([str(sweep), str(tmp_path), *flags]) == 0
    (comparisons,) = json.loads(capsys.readouterr().out)["comparisons"].values()
    assert {(c["method"], c["pairs"]) for c in comparisons} == {("ERM", 3), ("moa_kron", 3)}
    assert main([str(sweep)]) == 2, "two settings claim every cell"
    assert "are the same method, held-out domain and seeds" in capsys.readouterr().err


def test_our_rows_have_all_that_domainbed_reads(tmp_path: Path) -> None:
    flags = ["--moa.method=linear", "--train.trial_seed=4", "--hparams_seed=7"]
    parts = build(parse(flags), World(0, 1, 0, 1))
    origin = parts.info.origin
    assert origin is not None
    columns = {
        f"env{e}_{split}_acc": 0.1 * e + 0.01 * (split == "in")
        for e in range(6)
        for split in ("in", "out")
    }
    folder = tmp_path / "sweep" / "run"
    folder.mkdir(parents=True)
    row = result_row(parts, folder, 10, columns)
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n")
    found = collect(tmp_path / "sweep", "training_domain_validation")
    assert found == {("digits", "linear", 5): {4: columns["env5_in_acc"]}}
    assert {"dataset", "algorithm", "test_envs", "trial_seed", "seed", "hparams_seed",
            "holdout_fraction", "output_dir"} <= set(row["args"])  # fmt: skip
    assert (row["args"]["hparams_seed"], row["hparams"]["lr"]) == (7, parts.config.optim.lr)
    assert row["moa/domains"][5] == "rotated"
    assert "moa/dataset" not in row
    own = replace(parts, info=replace(parts.info, origin=replace(origin, dataset_name="mine")))
    assert result_row(own, folder, 10, columns) == {**row, "moa/dataset": "mine"}
    own = replace(parts, info=replace(parts.info, origin=replace(origin, group_by="p.")))
    assert result_row(own, folder, 10, columns) == {**row, "moa/group_by": "p."}
    # DomainBed's tables skip every dataset whose name is not one of its class names.
    for ours, theirs in zip(
        ("pacs", "vlcs", "officehome", "terraincognita", "domainnet"),
        ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet"),
        strict=True,
    ):
        data = replace(parts.config.data, dataset=ours)
        named = replace(parts, config=replace(parts.config, data=data))
        assert result_row(named, folder, 0, columns)["args"]["dataset"] == theirs
