"""The page of a report: what is on it, and that nothing in a run folder gets out of its place."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.report_fixtures import evaluation, write_run
from trainer.report.__main__ import main
from trainer.report.details import (
    MOST_PIXELS,
    POINTS,
    WIDTH,
    confusion,
    curve,
    environment,
    routing,
)
from trainer.report.runs import read_run

EVIL = "<script>alert('1')<img src=x onerror=alert(2)>\"'&\x1b"
DOMAINS = ("plain", EVIL, "out\ud800\nline")
HASHES = {"moa/data_hash": "d" * 16, "moa/split_hash": "s" * 16, "moa/base_hash": "b" * 64}


class Page(HTMLParser):
    """The tags with their attributes, all text, and the text by the section it is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "section":
            self.sections[self.tags[-1][1]["id"]] = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.sections:
            self.sections[list(self.sections)[-1]] += data

    def pictures(self) -> dict[str, Image.Image]:
        """By their descriptions."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                start, _, data = attributes["src"].partition(",")
                assert start == "data:image/png;base64"
                found[attributes["alt"]] = Image.open(io.BytesIO(base64.b64decode(data)))
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, one of them a whole run, one hostile, one with damaged files; and no run."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (name, method) in enumerate((("whole", "lora"), (f"a{EVIL}", EVIL),
                                             ("damaged", "full"))):  # fmt: skip
        rows = [
            evaluation(step, *((0.3 + step / 20 - number / 10, 0.5),) * 3)
            | {
                f"moa/env{env}_{split}_class_mean": 0.125
                for env in range(3)
                for split in ("in", "out")
            }
            for step in (0, 5)
        ]
        path = write_run(
            folder / name, rows, method=method, domains=DOMAINS, held_out=(1,), **HASHES
        )
        steps = [json.dumps({"step": step, "loss": 3 - step / 10}) + "\n" for step in range(10)]
        (path / "metrics.jsonl").write_text("".join(steps))
        command = ["trainer/run.py", "--moa.method", method, "--data.root=s3://KEY:SECRET@host/x"]
        facts = {"command": command, "git_commit": "c" * 40}
        (path / "environment.json").write_text(json.dumps(facts))
        Image.new("RGB", (1500, 600), "red").save(path / "routing.png")
        (path / "evaluation").mkdir()
        matrix = {"in": {"confusion": [[5, 1], [0, 4]]}, "out": {"confusion": [[2, 0], [1, 0]]}}
        content = {"classes": ["cat", EVIL], "results": {"adapter": {EVIL: matrix}}}
        (path / "evaluation/evaluation.json").write_text(json.dumps(content))
    for file in ("metrics.jsonl", "environment.json", "routing.png", "evaluation/evaluation.json"):
        (folder / "damaged" / file).write_bytes(b'\x89PNG\r\n\x1a\n{"step": "x"}\n[[[[\n')
    (folder / "nothing").mkdir()
    (folder / "nothing/results.jsonl").write_text("")
    return folder


def test_the_page_has_all_sections_and_loads_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    flags = ["--format=html", f"--out={out}", "--metric=accuracy,class_mean", "--compare=lora"]
    assert main([str(runs), *flags]) == 0
    assert f"page: {out}" in capsys.readouterr().err
    text = out.read_bytes().decode("ascii")
    page = Page(text)
    assert list(page.sections) == [
        "results", "comparisons", "curves", "confusion", "routing", "runs", "notes"
    ]  # fmt: skip
    assert "3 finished runs of 3" in page.text
    assert "held-out accuracy %" in page.sections["results"]
    assert "held-out class mean %" in page.sections["results"]
    assert page.sections["comparisons"].count("two-sided sign-flip tests") == 2
    for digest in ("d" * 12, "s" * 12, "b" * 12, "c" * 12):
        assert digest in page.sections["runs"]
    assert "python trainer/run.py --moa.method lora" in page.sections["runs"]
    assert "no evaluation yet (results.jsonl is empty)" in page.sections["notes"]
    assert "SECRET" not in page.text

    assert (
        "<script>alert('1')<img src=x onerror=alert(2)>\"'&\N{REPLACEMENT CHARACTER}" in page.text
    )
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "base",
        "form",
    }
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
        assert tag == "img" or "src" not in attributes
    assert not re.search(r"url\(|@import|https?:", re.sub('src="data:[^"]*"', "", text))
    assert "default-src 'none'" in text
    pictures = page.pictures()
    kinds = [alt.split()[0] for alt in pictures]
    assert kinds == ["bars", "bars", "curves", "confusion", EVIL.split()[0], "lora,"]
    assert pictures["lora, " + EVIL[:-1] + "\ufffd held out, whole"].size == (WIDTH, WIDTH * 2 // 5)

    assert main([str(runs), *flags[:1], *flags[2:]]) == 0
    assert capsys.readouterr().out == text, "without --out on standard output, and the same"


def test_what_cannot_be_written_is_said(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for flags, code, words in (
        (["--out=x.html"], 2, "--out: only --format html writes a file"),
        (["--out=.", "--format=html"], 2, "--out .: is a folder; give a file"),
        ([f"--out={tmp_path}/file/x.html", "--format=html"], 73, "--out: cannot write"),
    ):
        assert main([str(runs), *flags]) == code
        assert words in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == ""


def test_curves_are_thinned_and_their_values_true(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for steps in (1, 2, POINTS // 2, 1000):
        path.write_text("".join(f'{{"step": {s}, "loss": {s}.5}}\n' for s in range(steps)))
        found = curve(path, lambda row: row["loss"])
        assert all(value == step + 0.5 for step, value in found)
        shown = [step for step, _ in found]
        if steps <= POINTS // 2:
            assert shown == list(range(steps))
        else:
            assert len(found) == POINTS
            assert (shown[0], max(np.diff(shown)) <= 2 * steps / POINTS) == (0, True)
            assert shown[-1] > steps * (1 - 2 / POINTS)
    path.write_text('{"step": 0, "loss": NaN}\n\n[]\n{"step": 1}\n{"step": 2, "loss": 7}\n{"step')
    assert curve(path, lambda row: row["loss"]) == [(2, 7.0)]
    assert curve(None, lambda row: row["loss"]) == []


def test_links_bombs_and_odd_shapes_are_left_out(runs: Path, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [evaluation(0, (0.5, 0.5))], domains=("plain",)))
    for name in ("environment.json", "routing.png", "evaluation/evaluation.json"):
        target = run.folder / name
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(runs / "whole" / name)
    assert environment(run.folder) == ("", ""), "not what a link leads to elsewhere"
    assert routing(run) is None
    assert confusion(run) is None
    for name in ("routing.png", "evaluation/evaluation.json"):
        (run.folder / name).unlink()
    side = int(MOST_PIXELS**0.5) + 2
    Image.new("1", (side, side)).save(run.folder / "routing.png")
    assert routing(run) is None
    for matrix in ([[1, 2]], [[1.5, 0], [0, 1]], [[1, -1], [0, 1]], "x", [[1, 2], [3]], None):
        content = {
            "classes": ["a", "b"], "results": {"x": {"plain": {"in": {"confusion": matrix}}}},
        }  # fmt: skip
        (run.folder / "evaluation/evaluation.json").write_text(json.dumps(content))
        assert confusion(run) is None
