"""Predictions of unlabelled images: those of `trainer.evaluate`, in every form of file."""

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from torch import nn

import moa
from moa.files.reading import read_adapter
from shards import Decoder, ShardIndex, eval_transform
from tests.support import warm
from tests.support.docs_blocks import ROOT
from tests.support.shards_fixtures import damage, few_digits, image_bytes
from tests.support.trainer_fixtures import environment
from trainer.config.command_line import parse
from trainer.evaluate import __main__ as evaluate
from trainer.evaluate.combine import average
from trainer.evaluate.members import base_of
from trainer.evaluate.predictions import Predictions, collect
from trainer.predict import Prediction, predict
from trainer.predict.__main__ import _told, main
from trainer.predict.images import Images
from trainer.predict.output import WRITERS, read_parts, save
from trainer.prepare.parts import build
from trainer.process.errors import ConfigError, OutputError
from trainer.process.world import ALONE


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardIndex]:
    """Three images of each digit and style, as files in `images` and as shards in `digits`."""
    index = few_digits(tmp_path_factory.mktemp("few"), per_class=3)
    (index.root.parent / "images" / "notes.txt").write_text("no image by its name")
    yield index
    index.close()


@pytest.fixture(scope="module")
def adapters(digits: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Adapters with a router of one choice and of two, and one without, far from their starts."""
    made, root = [], tmp_path_factory.mktemp("adapters")
    for seed, flags in enumerate((["--moa.top_k=1"], ["--moa.top_k=2"], ["--moa.method=lora"])):
        flags += [f"--train.seed={seed}", f"--data.root={digits.root}"]
        parts = build(parse(flags), ALONE)
        torch.manual_seed(seed)
        tensors = moa.adapter_state_dict(parts.model)
        moved = {n: t + 0.05 * torch.randn(t.shape).to(t.dtype) for n, t in tensors.items()}
        moa.save_adapter(parts.model, root / f"a{seed}", parts.info, moved)
        made.append(str(root / f"a{seed}"))
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(rows: list[Prediction]) -> list[list[float]]:
    return [list(row.probabilities) for row in rows]


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_shards_give_what_the_evaluation_sees(
    kind: Any, digits: ShardIndex, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as a batch is a domain here as there."""
    seen: list[list[Predictions]] = []

    def noting(*given: Any) -> list[Predictions]:
        seen.append(collect(*given))
        return seen[-1]

    monkeypatch.setattr("trainer.evaluate.job.collect", noting)
    flags = [f"--data.root={digits.root}", "--split=all", "--batch=30", "--json"]
    assert evaluate.main(["--adapter", *adapters, *flags]) == 0
    together = [average(members, kind).logits for members in seen]
    for sources, scores in ((adapters, together), (adapters[:1], [m[0].logits for m in seen])):
        rows = list(predict(str(digits.root), sources, top_k=99, average=kind, batch=30))
        best, order = torch.cat(scores).double().softmax(1).sort(1, descending=True)
        assert numbers(rows) == best.tolist()
        assert [[int(name) for name in row.classes] for row in rows] == order.tolist()
        assert [rows[0].image, rows[-1].image] == [digits.key(0, 0), digits.key(5, 29)]


def test_two_processes_write_what_one_does(
    digits: ShardIndex, adapters: list[str], tmp_path: Path
) -> None:
    """Files of a folder, an ensemble of which not all members route, batches that do not fit."""
    images, out = digits.root.parent / "images", tmp_path / "new" / "out.jsonl"
    expected = list(predict(images, adapters, top_k=3, routes=True, workers=1))
    command = ("--adapter", *adapters, "--images", str(images), "--out", str(out), "--routes")
    more = ("--top_k=3", "--batch=7")
    ran = warm.run(
        "-m", "trainer.predict", *command, *more, processes=2, env=environment(), timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    assert (
        f"{out}: 180 of 180 images predicted; files that are no images by their names: 1\n"
        in ran.stdout
    )
    assert os.listdir(out.parent) == ["out.jsonl"], "no part is left"
    for row, one in zip(lines(out), expected, strict=True):
        assert (row["image"], row["classes"], row["problem"]) == (one.image, one.classes, "")
        assert row["probabilities"] == pytest.approx(one.probabilities, rel=1e-4)
        assert row["routes"].keys() == {"a0", "a1", "a2"}
    stored = {row.probabilities[0]: row for row in predict(digits.root, adapters, top_k=1)}
    assert sorted(stored) == pytest.approx(sorted(row.probabilities[0] for row in expected))


def test_routes_are_those_of_the_layers(digits: ShardIndex, adapters: list[str]) -> None:
    path = str(next((digits.root.parent / "images").glob("plain/3/*")))
    job = predict([path], adapters, routes=True)
    (row,), (again,) = list(job), predict(path, adapters, routes=True)
    assert [row] == [again] == list(job)
    model = base_of(job.members[1], None).model
    moa.load_adapter(model, adapters[1])
    image = eval_transform(job.members[1].info.data_config)(Decoder()(Path(path).read_bytes())[0])
    with moa.recorded_routes(model.eval()) as gates, torch.no_grad():
        model(image[None])
    assert row.routes is not None
    assert row.routes["a1"].keys() == gates.keys()
    assert row.routes["a2"] == {}, "it has no router"
    for layer, found in gates.items():
        assert row.routes["a1"][layer] == found[0].topk(2).indices.tolist()
        assert len(row.routes["a0"][layer]) == len(found[0])
        assert all(isinstance(expert, int) for expert in row.routes["a0"][layer])


def test_bad_images_are_listed_and_every_form_tells_the_same(
    digits: ShardIndex, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A web page, a cut file, a pipe, one that is missing; names that want to be obeyed."""
    monkeypatch.chdir(tmp_path)
    good = next((digits.root.parent / "images").glob("plain/3/*")).read_bytes()
    photo = image_bytes(0, "JPEG", (200, 200))
    names = ["=1+1.png", "b\x1b[2J\udcff.png", "'c.png", "cut.jpg", "page.png", "pipe", "gone.png"]
    for name, content in zip(names, [good, good, good, photo[:-900], b"<html>"], strict=False):
        Path(name).write_bytes(content)
    os.mkfifo("pipe")
    Path("list").write_text("\n".join(names), errors="surrogateescape")
    command = ["--adapter", adapters[0], "--images", "list", "--top_k=2", "--routes"]
    for ending in (".csv", ".jsonl", ".parquet"):
        assert main([*command, "--out", f"out{ending}"]) == 0
    printed = capsys.readouterr()
    assert "out.csv: 4 of 7 images predicted, 4 with a problem" in printed.out
    assert "warning: gone.png: No such file or directory\n" in printed.err
    told = lines(Path("out.jsonl"))
    assert [row["image"] for row in told] == names
    incomplete = "incomplete, used as far as it goes"
    assert [row["problem"] for row in told[:4]] == ["", "", "", incomplete]
    assert [row["classes"] for row in told[4:]] == [[], [], []]
    assert "no regular file" in told[5]["problem"]
    with open("out.csv", encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    shown = ["'=1+1.png", "b\\x1b[2J\\udcff.png", "''c.png", *names[3:]]
    assert [row["image"] for row in table] == shown
    kept = pyarrow.parquet.read_table("out.parquet").to_pylist()
    assert [row["image"] for row in kept] == [names[0], "b\x1b[2J\\udcff.png", *names[2:]]
    for one, other, row in zip(told, kept, table, strict=True):
        assert (other["classes"], other["probabilities"]) == (one["classes"], one["probabilities"])
        assert [row["class_1"], row["class_2"]] == (one["classes"] or ["", ""])
        assert row["probability_2"] == (str(one["probabilities"][1]) if one["classes"] else "")
        assert json.loads(row["routes"]) == one["routes"] == json.loads(other["routes"] or "null")


def test_a_damaged_sample_is_listed(
    digits: ShardIndex, adapters: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(digits.root, tmp_path / "set")
    row = digits.table(2)[4]
    damage(copy / digits.shards[int(row["shard"])].file, int(row["offset"]) + 50)
    bad = [row for row in predict(copy, adapters[0]) if row.problem]
    assert [(row.image, row.classes) for row in bad] == [(digits.key(2, 4), [])]
    assert "is damaged" in bad[0].problem


@pytest.mark.parametrize("ending", WRITERS)
def test_names_of_classes_start_no_formula(ending: str, tmp_path: Path) -> None:
    row = Prediction("a.png", ["=cmd|' /C calc'!A0", "-1\n"], [0.5, 0.25])
    save([row], tmp_path / f"out{ending}", 2, False)
    if ending == ".csv":
        text = (tmp_path / "out.csv").read_text()
        assert text.endswith('\n"a.png","\'=cmd|\' /C calc\'!A0",0.5,"\'-1\\n",0.25,""\n')
    elif ending == ".jsonl":
        assert lines(tmp_path / "out.jsonl")[0]["classes"] == row.classes
    else:
        table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
        assert table["classes"].to_pylist() == [row.classes]
        assert "routes" not in table.column_names


def other_classes(folder: str, into: Path) -> Path:
    info, tensors = read_adapter(Path(folder))
    moa.save_adapter(nn.Module(), into, replace(info, classes=tuple("0123456798")), tensors)
    return into


def wrong_list(folder: Path) -> Path:
    (folder / "wrong").write_text("nowhere.png\n")
    return folder / "wrong"


REFUSALS: dict[str, tuple[Any, int, str]] = {
    "no image": (lambda a, t: [a, "--images", t], 2, r"names no image; those of a folder end in"),
    "no place": (lambda a, t: [a, "--images", t / "no"], 2, r"cannot be read \(No such file"),
    "no text": (lambda a, t: [a, "--images", sys.executable], 2, "not plain text"),
    "wrong list": (lambda a, t: [a, "--images", wrong_list(t)], 65, "none of 1 .*nowhere.png: No"),
    "ending": (lambda a, t: [a, "--out", t / "out.xls"], 2, r"legal are .csv, .jsonl, .parquet"),
    "there": (lambda a, t: [a, "--out", t / "there.csv"], 73, "is there already; delete it"),
    "folder": (lambda a, t: [a, "--out", t / "there.csv" / "a.csv"], 73, "give another folder"),
    "classes": (lambda a, t: [a, other_classes(a, t / "b")], 2, "class 8, not '8'"),
    "top_k": (lambda a, t: [a, "--top_k", 0, "--batch", 0], 2, "top_k 0.*\n.*batch 0: must be 1"),
    "decoder": (lambda a, t: [a, "--data.max_pixels", 0], 2, "max_pixels = 0: must be 1"),
    "remote": (lambda a, t: [a, "--images", "https://localhost/s"], 2, "cache_dir is not set"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_words(
    case: str, digits: ShardIndex, adapters: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "there.csv").write_text("precious")
    arguments, code, message = REFUSALS[case]
    usual = ["--images", str(digits.root), "--out", str(tmp_path / "out.csv"), "--adapter"]
    assert main([*usual, *map(str, arguments(adapters[0], tmp_path))]) == code
    printed = capsys.readouterr().err
    assert re.search(f"^error: .*{message}", printed, re.M), printed
    assert (tmp_path / "there.csv").read_text() == "precious"
    assert not list(tmp_path.glob("*out*")), "nothing half done is left"


def test_routes_need_a_router_and_parquet_its_package(
    digits: ShardIndex, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    usual = ["--adapter", adapters[2], "--images", str(digits.root), "--out"]
    assert main([*usual, str(tmp_path / "a.csv"), "--routes"]) == 2
    assert capsys.readouterr().err == "error: --routes: lora routes no tokens; leave it out\n"
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main([*usual, str(tmp_path / "a.parquet")]) == 2
    assert "needs pyarrow; pip install 'moa-trainer[parquet]'" in capsys.readouterr().err
    assert main([*usual, str(tmp_path / "a.csv")]) == 0, "both remedies work"


def test_the_python_of_the_page_runs(
    digits: ShardIndex, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("outputs/demo").mkdir(parents=True)
    Path("outputs/demo/adapter").symlink_to(adapters[0])
    Path("my_images").symlink_to(digits.root.parent / "images")
    page = (ROOT / "docs/predict.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 180


def test_processes_that_do_not_see_the_same_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 images instead of 2: the processes found different"):
        list(_told([Prediction("a", ["0"], [1.0])], Images(["a", "b"]), tmp_path))
    with pytest.raises(OutputError, match=r"rank-00000.jsonl is not here; give a folder that all"):
        list(read_parts(tmp_path / "out.csv", 1))
