"""Reports over run folders written by hand: tables, refusals, tests, formats and pictures."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from shards.read.index import Subset
from shards.writer import write_shards
from tests.support.report_fixtures import evaluation, write_run
from tests.support.shards_fixtures import FOLDER, make_folder, make_set
from trainer.prepare.provenance import data_hash, split_hash
from trainer.report.__main__ import main
from trainer.report.plots import _bars, save_plots
from trainer.report.significance import holm, sign_flip_p
from trainer.report.tables import Cell, ResultTable, average, cell_of, mean_and_error

DOMAINS = ("plain", "inverted", "outline")
Capture = pytest.CaptureFixture[str]


def flat_run(folder: Path, accuracy: float, held_out: int = 0, **facts: Any) -> Path:
    """A run whose only evaluation has that accuracy on the domain held out."""
    row = [(0.5, 0.5)] * 3
    row[held_out] = (accuracy, 0.0)
    facts = {"domains": DOMAINS} | facts
    return write_run(folder, [evaluation(0, *row)], held_out=(held_out,), **facts)


def outcome(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output without the spaces that fill up columns, and errors."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, re.sub(" +", " ", captured.out), captured.err


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two methods on two of three domains with two repetitions, and one more method with holes."""
    folder = tmp_path / "runs"
    table = {
        "lora": {0: (0.5, 0.6), 1: (0.7, 0.9)},
        "moa_kron": {0: (0.7, 0.7), 1: (0.75, 0.80)},
        "full": {0: (0.25,)},
    }
    for method, by_domain in table.items():
        for env, values in by_domain.items():
            for seed, value in enumerate(values):
                flat_run(folder / f"{method}-{env}-{seed}", value, env, method=method,
                         seed=seed, trial_seed=seed)  # fmt: skip
    return folder


def test_mean_and_error_are_domainbeds() -> None:
    mean, error = mean_and_error([0.5, 0.7, 0.9])
    assert mean == pytest.approx(0.7)
    assert error == pytest.approx(np.std([0.5, 0.7, 0.9]) / np.sqrt(3)), "population deviation"


def test_averages_use_unrounded_means_and_say_when_repetitions_differ() -> None:
    one, other = cell_of({(0, 0): 0.1004, (1, 1): 0.1004}), cell_of({(0, 0): 0.2, (1, 1): 0.3})
    mean = average([one, other])
    assert mean.mean == pytest.approx((0.1004 + 0.25) / 2)
    assert mean.error == pytest.approx(np.std([0.1502, 0.2002]) / np.sqrt(2))
    uneven = average([one, cell_of({(0, 0): 0.2})])
    assert uneven.mean == pytest.approx((0.1004 + 0.2) / 2)
    assert uneven.error is None
    assert average([one, Cell()]).mean is None


def test_tables_show_best_missing_and_partial_cells(runs: Path, capsys: Capture) -> None:
    for domain in (0, 1):  # the third domain is held out by nobody
        flat_run(runs / f"unfinished-{domain}", 0.9, domain, method="bias", done=False)
    code, out, err = outcome(capsys, runs, "--format=markdown")
    assert code == 0
    assert "| held out | plain | inverted | outline | mean |" in out
    assert "| `lora` | 55.0 ± 3.5 | **80.0 ± 7.1** | - | - |" in out
    assert "| `moa_kron` | **70.0 ± 0.0** | 77.5 ± 1.8 | - | - |" in out
    assert "| `full` | 25.0 (1 of 2) | - | - | - |" in out
    assert "| `bias` | - (1 unfinished) | - (1 unfinished) | - | - |" in out
    assert err.count("not finished: evaluated after step 0 of 201") == 2
    assert err.count("not counted") == 2


def test_text_marks_the_best_without_colours(runs: Path, capsys: Capture) -> None:
    code, out, _ = outcome(capsys, runs)
    assert code == 0
    assert "70.0 ± 0.0 *" in out
    assert "\x1b[" not in out


def test_latex_escapes_and_has_as_many_cells_as_columns(runs: Path, capsys: Capture) -> None:
    code, out, _ = outcome(capsys, runs, "--format=latex", "--compare=lora")
    assert code == 0
    assert r"moa\_kron & \textbf{70.0 $\pm$ 0.0} & 77.5 $\pm$ 1.8 & - & - \\" in out
    assert not re.search(r"(?<!\\)[_%#]", out.replace("tab:", "")), "unescaped"
    for body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", out, re.DOTALL):
        columns, rows = body
        for row in re.findall(r"^.*\\\\$", rows, re.MULTILINE):
            assert row.count("&") == len(columns) - 1
    assert out.count(r"\begin{table}") == out.count(r"\end{table}") == 2
    assert out.count("{") == out.count("}")
    for rule in ("toprule", "midrule", "bottomrule"):
        assert out.count(f"\\{rule}") == 2


def test_several_datasets_get_a_table_each_and_their_average(
    tmp_path: Path, capsys: Capture
) -> None:
    for dataset, shift in (("digits", 0.0), ("folder", 0.2)):
        for env, seed in itertools.product(range(3), range(2)):
            flat_run(tmp_path / f"{dataset}{env}{seed}", 0.3 + shift + 0.1 * seed + 0.03 * env,
                     env, dataset=dataset, seed=seed, trial_seed=seed)  # fmt: skip
    code, out, _ = outcome(capsys, *sorted(tmp_path.iterdir()), "--format=markdown")
    assert code == 0
    assert "digits: held-out accuracy" in out
    assert "folder: held-out accuracy" in out
    # Trials have means 0.33 and 0.43, and 0.2 more: 38 and 58, deviation 5 over sqrt 2.
    assert "| held out | digits | folder | mean |" in out
    assert "| `lora` | 38.0 ± 3.5 | 58.0 ± 3.5 | 48.0 |" in out


def test_runs_on_different_images_or_splits_are_refused_by_name(
    tmp_path: Path, capsys: Capture
) -> None:
    hashes = {"moa/data_hash": "d1", "moa/split_hash": "s1"}
    first = flat_run(tmp_path / "first", 0.5, **hashes)
    other_trial = hashes | {"moa/split_hash": "s2"}
    flat_run(tmp_path / "repeated", 0.5, trial_seed=1, **other_trial)
    code, _, err = outcome(capsys, tmp_path)
    assert (code, err) == (0, ""), "another trial seed has another split"
    grouped = {**other_trial, "moa/split_hash": "s3", "moa/group_by": "p[0-9]"}
    flat_run(tmp_path / "grouped", 0.5, 1, trial_seed=2, **grouped)
    code, out, err = outcome(capsys, tmp_path)
    assert (code, out) == (2, ""), "of no trial that another run has"
    assert "digits: runs with and without groups cannot share a table: DomainBed's split in " in err
    assert f"; groups of 'p[0-9]' in {tmp_path / 'grouped'}\n" in err
    shutil.rmtree(tmp_path / "grouped")
    second = flat_run(tmp_path / "second", 0.5, 1, **other_trial)
    code, out, err = outcome(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert "digits, trial seed 0: runs with different splits" in err
    assert f"s1 in {first}; s2 in {second}" in err
    flat_run(tmp_path / "third", 0.5, 2, **hashes | {"moa/data_hash": "d2"})
    assert "digits: runs with different images" in outcome(capsys, tmp_path)[2]
    told = outcome(capsys, first, tmp_path / "third")[2]
    assert f"d1 in {first}; d2 in {tmp_path / 'third'}\n" in told
    assert "report them apart, or, if these are different sets, name them: --name d2=NAME; " in told
    for wrong in ("d2", "d2=a b", "d2=PACS", "d9=digits-2"):
        code, _, err = outcome(capsys, first, tmp_path / "third", "--name", wrong)
        assert (code, err.count(f"--name {wrong}: ")) == (2, 1)
    code, out, _ = outcome(capsys, first, tmp_path / "third", "--name", "d2=digits-2")
    assert code == 0
    assert "digits: held-out accuracy" in out
    assert "digits-2: held-out accuracy" in out
    flat_run(tmp_path / "fourth", 0.5, **hashes | {"moa/data_hash": "d3", "moa/dataset": "own"})
    code, out, _ = outcome(capsys, first, tmp_path / "fourth")
    assert (code, "own: held-out accuracy" in out) == (0, True), "as the run itself tells"
    flat_run(tmp_path / "older", 0.5, 2, method="bias")
    assert outcome(capsys, first, tmp_path / "older")[0] == 0
    assert "not compared, in" in outcome(capsys, first, tmp_path / "older")[2]


def test_two_runs_for_one_cell_need_by_or_tune(tmp_path: Path, capsys: Capture) -> None:
    rows = {
        0.001: [evaluation(0, (0.4, 0), (0.5, 0.6), (0.5, 0.6))],
        0.002: [evaluation(0, (0.3, 0), (0.5, 0.7), (0.5, 0.7))],
    }
    for lr, evaluations in rows.items():
        write_run(tmp_path / str(lr), evaluations, domains=DOMAINS, settings={"optim.lr": lr})
    code, _, err = outcome(capsys, tmp_path)
    assert code == 2
    assert f"{tmp_path / '0.001'} and {tmp_path / '0.002'}" in err
    assert "optim.lr (0.001, 0.002): --by optim.lr" in err
    code, out, err = outcome(capsys, tmp_path, "--by=optim.lr", "--format=markdown")
    assert (code, "note: data" in err, "differ" in err) == (0, True, False)
    assert "| `lora lr=0.001` | **40.0** |" in out
    assert "| `lora lr=0.002` | 30.0 |" in out
    both = outcome(capsys, tmp_path, "--by=objective.name,optim.lr", "--format=markdown")
    assert "| `lora objective=erm lr=0.002` | 30.0 |" in both[1]
    code, out, _ = outcome(capsys, tmp_path, "--tune", "--format=markdown")
    assert (code, "| `lora` | 30.0 |" in out) == (0, True), "chosen by validation, not by target"
    code, _, err = outcome(capsys, tmp_path, "--by=optim.lrr")
    assert (code, "--by optim.lrr" in err) == (2, True)
    write_run(tmp_path / "copy", rows[0.001], domains=DOMAINS, settings={"optim.lr": 0.001})
    assert "their settings are the same" in outcome(capsys, tmp_path, "--by=optim.lr")[2]


def test_row_of_unequal_settings_is_pointed_out(tmp_path: Path, capsys: Capture) -> None:
    flat_run(tmp_path / "short", 0.5, 0, settings={"train.steps": 50})
    flat_run(tmp_path / "long", 0.5, 1, settings={"data.workers": 2})
    code, _, err = outcome(capsys, tmp_path)
    assert code == 0
    assert "note: digits, lora: runs differ in train.steps (201, 50)" in err
    assert "workers" not in err


def test_rules_need_their_runs(tmp_path: Path, capsys: Capture) -> None:
    votes = {0: (0.9, 0.1), 1: (0.2, 0.8), 2: (0.3, 0.6)}
    for env, accuracies in votes.items():
        rows = []
        for step, accuracy in zip((0, 50), accuracies, strict=True):
            row = [(0.5, 0.5)] * 3
            row[env] = (accuracy, 0.5)
            rows.append(evaluation(step, *row))
        write_run(tmp_path / f"run{env}", rows, held_out=(env,), domains=DOMAINS)
    code, out, _ = outcome(capsys, tmp_path, "--selection=oracle", "--format=json")
    assert code == 0
    report = json.loads(out)
    assert [run["accuracy"] for run in report["runs"]["oracle"]] == [0.1, 0.8, 0.6]
    assert [table["name"] for table in report["tables"]] == ["digits-oracle"]
    code, out, err = outcome(capsys, tmp_path, "--selection=leave_one_domain_out")
    assert (code, "3 runs lack the companions" in err) == (0, True)
    assert "--data.held_out A+B" in err
    for pair, steps in {(0, 1): (0.8, 0.2), (0, 2): (0.5, 0.3), (1, 2): (0.1, 0.6)}.items():
        rows = []
        for step, accuracy in zip((0, 50), steps, strict=True):
            rows.append(evaluation(step, *(((accuracy, 0.5) if e in pair else (0.5, 0.5))
                                           for e in range(3))))  # fmt: skip
        write_run(tmp_path / f"pair{pair}", rows, held_out=pair, domains=DOMAINS)
    code, out, _ = outcome(capsys, tmp_path, "--selection=leave_one_domain_out", "--format=json")
    assert code == 0
    # Of 0: 1 and 2 vote, 0.8 + 0.5 against 0.2 + 0.3; of 1: 0.8 + 0.1 against 0.2 + 0.6; of 2:
    # 0.5 + 0.1 against 0.3 + 0.6.
    runs_found = json.loads(out)["runs"]["leave_one_domain_out"]
    assert [run["step"] for run in runs_found] == [0, 0, 50]
    config = tmp_path / "run0" / "config.yaml"  # as if it had evaluated all domains twice only
    config.write_text(config.read_text().replace("mode: full", "mode: selection"))
    code, _, err = outcome(capsys, tmp_path, "--selection=leave_one_domain_out")
    assert (code, err.count("all of them with eval.mode full")) == (0, 1)
    code, _, err = outcome(capsys, tmp_path, "--selection=best")
    assert (code, "legal are training_domain_validation, oracle" in err) == (2, True)


def test_averaged_weights_and_zero_shot_are_rows(tmp_path: Path, capsys: Capture) -> None:
    def columns(kind: str, target: float, source: float) -> dict[str, float]:
        row = evaluation(0, (target, 0), (source, source), (source, source))
        return {f"moa/{kind}/{key}": value for key, value in row.items() if key != "step"}

    rows = [
        evaluation(0, (0.2, 0), (0.5, 0.5), (0.5, 0.5)),
        evaluation(50, (0.3, 0), (0.9, 0.9), (0.9, 0.9)) | columns("ema", 0.6, 0.9),
        evaluation(90, (0.4, 0), (0.6, 0.6), (0.6, 0.6)) | columns("ema", 0.7, 0.8),
    ]
    folder = write_run(tmp_path / "run", rows, domains=DOMAINS)
    before = evaluation(0, (0.1, 0), (0.9, 0.9), (0.9, 0.9))
    (folder / "zero_shot.json").write_text(json.dumps(before))
    flags = ["--weights=last,ema,zero_shot", "--format=markdown"]
    code, out, _ = outcome(capsys, tmp_path, *flags)
    assert code == 0
    assert "| `lora` | 30.0 |" in out
    assert "| `lora ema` | **70.0** |" in out, "as it stands at the end, which is saved"
    assert "| `lora zero_shot` | 10.0 |" in out
    code, _, err = outcome(capsys, tmp_path, "--weights=swad")
    assert (code, "moa/swad/env0_in_acc" in err) == (2, True)


def test_class_means_are_a_metric_and_a_rule_of_their_own(tmp_path: Path, capsys: Capture) -> None:
    """The step that is best by accuracy is not the one that is best by class means."""

    def row(step: int, source: float, mean: float, target: float) -> dict[str, Any]:
        accuracies = evaluation(step, (target, 0.5), (source, source), (source, source))
        shares = {0: target - 0.2, 1: mean, 2: mean}
        return accuracies | {
            f"moa/env{env}_{split}_class_mean": share
            for env, share in shares.items()
            for split in ("in", "out")
        }

    folder = write_run(tmp_path / "run", [row(0, 0.9, 0.4, 0.6), row(5, 0.8, 0.7, 0.5)],
                       domains=DOMAINS)  # fmt: skip
    flags = ["--format=markdown", "--metric=accuracy,class_mean"]
    code, out, _ = outcome(capsys, tmp_path, *flags)
    assert (code, out.count("| `lora` | 60.0 |"), out.count("| `lora` | 40.0 |")) == (0, 1, 1)
    assert "digits: held-out class mean %, mean ± standard error" in out
    code, out, _ = outcome(capsys, tmp_path, *flags, "--selection=class_mean_validation")
    assert (code, out.count("| `lora` | 50.0 |"), out.count("| `lora` | 30.0 |")) == (0, 1, 1)
    flat_run(tmp_path / "older", 0.5, 1)
    code, out, err = outcome(capsys, tmp_path, *flags, "--selection=class_mean_validation")
    assert (code, "| `lora` | 50.0 | - |" in out) == (0, True)
    assert f"1 runs, such as {tmp_path / 'older'}, lack the class means" in err
    code, out, err = outcome(capsys, tmp_path, *flags)
    assert (code, "| `lora` | 60.0 | 50.0 |" in out, "| `lora` | 40.0 | - |" in out) == (
        0, True, True,
    )  # fmt: skip
    assert (
        f"--metric class_mean: 1 runs of an older release or of DomainBed, such as {tmp_path}"
        in err
    )
    code, _, err = outcome(capsys, tmp_path, "--metric=f1")
    assert (code, "--metric f1: unknown; legal are accuracy, class_mean" in err) == (2, True)
    later(folder, '"moa/env1_out_class_mean": 0.4 -> "moa/env1_out_class_mean": "high"')
    assert "left out" in outcome(capsys, tmp_path)[2]


def truncate(folder: Path) -> None:
    path = folder / "results.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "env0_in')


def unfinish(folder: Path) -> None:
    (folder / "done").unlink()


def empty_results(folder: Path) -> None:
    (folder / "results.jsonl").write_text("")


def no_arguments(folder: Path) -> None:
    (folder / "results.jsonl").write_text('{"step": 0, "env0_in_acc": 1.0}\n')


def strange_target(folder: Path) -> None:
    path = folder / "results.jsonl"
    path.write_text(path.read_text().replace('"test_envs": [0]', '"test_envs": [7]'))


def later(folder: Path, change: str) -> None:
    """Adds an evaluation that differs from the first by what `change` replaces."""
    path = folder / "results.jsonl"
    old, new = change.split(" -> ")
    line = path.read_text()
    assert old in line
    path.write_text(line + line.replace(old, new))


def without_columns(folder: Path) -> None:
    later(folder, "env1_out_acc -> env7_out_acc")


def not_a_number(folder: Path) -> None:
    later(folder, '"env1_in_acc": 0.5 -> "env1_in_acc": NaN')


def a_word(folder: Path) -> None:
    later(folder, '"env1_in_acc": 0.5 -> "env1_in_acc": "0.5"')


def long_name(folder: Path) -> None:
    path = folder / "results.jsonl"
    path.write_text(path.read_text().replace("plain", "p" * 201))


def no_row(folder: Path) -> None:
    path = folder / "results.jsonl"
    path.write_text(path.read_text() + "[]\n")


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, ["left out", "results.jsonl: line 2 is not JSON", "remove it"]),
        (unfinish, ["not counted", "not finished: evaluated after step 0"]),
        (empty_results, ["left out", "no evaluation yet (results.jsonl is empty)"]),
        (no_arguments, ["left out", "its results cannot be read (KeyError('args'))"]),
        (strange_target, ["left out", "test_envs [7] of 3 domains"]),
        (without_columns, ["left out", "row 2: env1_out_acc is missing"]),
        (not_a_number, ["left out", "row 2: env1_in_acc is nan"]),
        (a_word, ["left out", "row 2: env1_in_acc is 0.5"]),
        (long_name, ["left out", "a name of 201 letters, pppp"]),
        (no_row, ["left out", "its results cannot be read"]),
        (empty_folder, ["neither a run folder (no config.yaml, no results.jsonl)"]),
    ],
)
def test_bad_folders_are_named_and_the_rest_is_reported(
    harm: Callable[[Path], None], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    bad, good = flat_run(tmp_path / "bad", 0.5), flat_run(tmp_path / "good", 0.5, 1)
    harm(bad)
    code, _, err = outcome(capsys, bad)
    assert code == 2
    assert "error: there is no finished run to report" in err
    for word in [str(bad), *words]:
        assert word in err
    code, out, err = outcome(capsys, bad, good, "--format=markdown")
    assert code == 0
    assert "| `lora` | - | 50.0 |" in out or "| `lora` | - (1 unfinished) | 50.0 |" in out
    for word in [str(bad), *words]:
        assert word in err


def test_torn_line_of_a_running_run_is_no_damage(tmp_path: Path, capsys: Capture) -> None:
    folder = flat_run(tmp_path / "run", 0.5, done=False)
    truncate(folder)
    code, _, err = outcome(capsys, folder, tmp_path / "nothing")
    assert code == 2
    assert "not counted" in err
    assert f"{tmp_path / 'nothing'}: no such folder" in err


def brute_force(differences: list[float]) -> float:
    """The share of all sign patterns whose sum is at least as far from zero."""
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in signs]
    observed = abs(sum(differences))
    return sum(total >= observed - 1e-12 for total in sums) / len(sums)


def test_sign_flips_are_counted_exactly() -> None:
    random = np.random.default_rng(1)
    for count in (2, 3, 5, 9, 12):
        differences = [float(d) for d in random.normal(0.5, 1, count).round(2)]
        assert sign_flip_p(differences) == pytest.approx(brute_force(differences))
    assert sign_flip_p([0.1] * 6) == pytest.approx(2 / 64), "nothing smaller with six pairs"
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p([0.3]) == 1
    assert 0 < sign_flip_p([0.1] * 40) < 1e-4, "random patterns beyond 2^18"
    # Worked by hand: 3 * 0.01, 2 * 0.04 and not less than before, 1 * 0.05 likewise.
    assert holm([0.04, 0.01, 0.05]) == pytest.approx([0.08, 0.03, 0.08])
    assert holm([0.9, 0.8]) == [1, 1]


def test_comparisons_pair_equal_domains_and_seeds(runs: Path, capsys: Capture) -> None:
    code, out, _ = outcome(capsys, runs, "--compare=lora", "--format=json")
    assert code == 0
    comparisons = json.loads(out)["comparisons"]["training_domain_validation"]
    kron, full = sorted(comparisons, key=lambda c: c["method"], reverse=True)
    differences = [0.2, 0.1, 0.05, -0.1]
    assert (kron["method"], kron["baseline"], kron["pairs"]) == ("moa_kron", "lora", 4)
    assert kron["difference"] == pytest.approx(np.mean(differences))
    assert kron["better"] == 3
    assert kron["p_pairs"] == pytest.approx(brute_force(differences))
    assert kron["p_domains"] == pytest.approx(brute_force([0.3, -0.05]))
    assert kron["p_adjusted"] == pytest.approx(min(1, 2 * kron["p_pairs"]))
    assert (full["pairs"], full["p_pairs"]) == (1, 1)
    code, out, _ = outcome(capsys, runs, "--compare=all")
    assert (code, out.count("moa_kron") >= 3) == (0, True)
    code, _, err = outcome(capsys, runs, "--compare=lroa")
    assert (code, "legal are all, lora, moa_kron, full" in err or "legal are all" in err) == (
        2, True,
    )  # fmt: skip


def test_pictures_show_the_table(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "pictures"
    code, _, err = outcome(capsys, runs, "--plots", folder)
    assert code == 0
    assert str(folder / "digits.png") in err.replace("\n", "")
    with Image.open(folder / "digits.png") as picture:
        assert picture.size[0] > 500
        assert len(set(picture.convert("RGB").getdata())) > 20
    text = (folder / "digits.svg").read_text()
    for word in ("lora", "moa_kron", "full", *DOMAINS, "mean", "held-out accuracy %"):
        assert word in text
    assert outcome(capsys, runs, "--plots", folder)[0] == 0
    assert (folder / "digits.svg").read_text() == text, "the same numbers, the same file"
    cells = (cell_of({(0, 0): 0.4}), cell_of({(0, 0): 0.4}))
    save_plots([ResultTable("$_$", "odd", ("cash$_$up", "mean"), {"a$^$": cells})], folder)
    assert {"cash$_$up", "a$^$"} <= set(re.findall("[^<>]+", (folder / "odd.svg").read_text()))
    (tmp_path / "file").write_text("")
    code, _, err = outcome(capsys, runs, "--plots", tmp_path / "file")
    assert (code, "cannot write" in err) == (73, True)


def test_bars_have_the_heights_and_errors_of_the_cells() -> None:
    cells = (cell_of({(0, 0): 0.4, (1, 1): 0.6}), Cell(), cell_of({(0, 0): 0.3}))
    table = ResultTable("title", "name", ("a", "b", "mean"), {"lora": cells})
    axes = mpl.figure.Figure().subplots()
    _bars(axes, table)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([50, 30])
    (segments,) = (c.get_segments() for c in axes.collections)
    low, high = segments[0][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * np.std([0.4, 0.6]) / np.sqrt(2))
    assert axes.get_ylim()[0] == 0


def test_hashes_tell_images_and_splits_but_not_packing(tmp_path: Path) -> None:
    index = make_set(tmp_path)
    packed = write_shards(tmp_path / "images", tmp_path / "other", FOLDER, shard_size=3)
    assert packed.sha256 != index.sha256
    assert data_hash(packed) == data_hash(index)
    make_folder(tmp_path / "more", per_class=10)
    more = write_shards(tmp_path / "more", tmp_path / "third", FOLDER)
    assert data_hash(more) != data_hash(index)
    same = split_hash(index, 0, 0.2)
    assert split_hash(packed, 0, 0.2) == same
    assert len({same, split_hash(index, 1, 0.2), split_hash(index, 0, 0.3)}) == 3
    kept = tuple(np.arange(index.num_samples(e)) > 0 for e in range(3))
    index.subset = Subset(kept, "0")
    assert split_hash(index, 0, 0.2) != same


def test_base_weights_are_compared(tmp_path: Path, capsys: Capture) -> None:
    for env, digest in enumerate(("aaaa", "bbbb")):
        flat_run(tmp_path / f"run{env}", 0.5, env, **{"moa/base_hash": digest * 16})
    code, _, err = outcome(capsys, tmp_path)
    assert code == 0
    assert "note: digits, lora: runs differ in model.base_hash (aaaaaaaaaaaa, bbbbbbbbbbbb)" in err
    code, out, err = outcome(capsys, tmp_path, "--by=model.base_hash", "--format=markdown")
    assert (code, "runs differ" in err) == (0, False)
    assert "| `lora base_hash=aaaaaaaaaaaa` | **50.0** |" in out


def test_a_comparison_without_pairs_says_so(tmp_path: Path, capsys: Capture) -> None:
    flat_run(tmp_path / "one", 0.5, 0)
    flat_run(tmp_path / "other", 0.5, 1, method="linear")
    code, _, err = outcome(capsys, tmp_path, "--compare=lora")
    assert code == 0
    assert "no two rows have a finished run of the same dataset, held-out domain and seeds" in err
