"""What the writer and the preview say of a set before anybody trains on it."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from shards.preview.__main__ import main
from shards.read.index import ShardIndex
from shards.writer import main as write
from tests.support.shards_fixtures import image_bytes, make_folder

HOSTILE = "x<script>alert(1)</script>&$x_1$".replace("/", "\N{DIVISION SLASH}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A set with a hostile name, few images of a class, and one picture five times."""
    folder = tmp_path_factory.mktemp("preview")
    root = make_folder(folder / "images", ("art", "photo", HOSTILE), ("cat", "dög"), per_class=12)
    for path in sorted((root / "photo" / "dög").iterdir())[3:]:
        path.unlink()
    with Image.open(io.BytesIO(image_bytes(77, size=(6, 5)))) as image:
        for number, side in enumerate((60, 90, 120, 150)):
            image.resize((side, side), 3).save(root / "art" / "cat" / f"im009_{number}.png")
        image.resize((80, 70), 3).save(root / "photo" / "cat" / "im009_same.jpg", quality=90)
    (root / "art" / "dög" / "im000.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("shards.writer.log.info", lambda *a: said.append(a[0] % a[1:]))
        patch.setattr(
            "shards.writer.log.warning", lambda *a: said.append("warning: " + a[0] % a[1:])
        )
        argv = ["--root", str(root), "--out", str(folder / "set"), "--jobs=1"]
        assert write(argv) == 0
    return folder / "set", "\n".join(said)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_writer_tells_what_it_wrote(made: tuple[Path, str]) -> None:
    folder, said = made
    assert re.search(r"^cat +16 +14 +14 +44$", said, re.M)
    assert re.search(r"^all +28 +17 +26 +71$", said, re.M)
    assert (
        "warning: domain 'photo': 1 of 2 classes have less than 5 images (fewer than 5, or 1/10 of "
        "the median): 'dög' 3" in said
    )
    assert (
        "warning: 5 images look alike; groups of them: 1, on both sides of the split of trial seed "
        "0: 1, in several domains: 1 (such as art-00000" in said
    )
    assert f"`python -m shards.preview --root {folder}` lists them" in said


def test_the_page_shows_the_set(
    made: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert main(["--root", str(made[0]), "--out", str(tmp_path / "out"), "--jobs=1"]) == 0
    assert caplog.messages[-1].startswith("folder: 71 images, 3 domains, 2 classes; open ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.html", "look_alikes.csv", "sheet.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        width, height = sheet.size
        assert width > 3 * 3 * 64
        assert 2 * 64 < height < 300
        assert (220, 120, 120) in {color for _, color in sheet.convert("RGB").getcolors(10**6)}
    text = (tmp_path / "out" / "index.html").read_text()
    tags = Tags(text).found
    assert "script" not in [tag for tag, _ in tags]
    assert "&lt;script&gt;alert(1)" in text
    links = [a.get("src") or a.get("href") or "" for _, a in tags if {"src", "href"} & a.keys()]
    assert len(links) == 1 + 5
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert (
        "<td>PNG 15, JPEG 12</td><td>20 x 16</td><td>20 x 16</td><td>150 x 150</td><td>1</td>"
        in text
    )
    assert "<h3>5 images, on both sides of the split, in several domains</h3>" in text
    rows = list(csv.DictReader((tmp_path / "out" / "look_alikes.csv").open()))
    index = ShardIndex.load(made[0])
    places = [row["key"] for row in rows]
    assert places == [*(index.key(0, place) for place in range(10, 14)), index.key(1, 10)]
    assert {row["split"] for row in rows} == {"in", "out"}
    assert [row["width"] for row in rows] == ["60", "90", "120", "150", "80"]


def test_a_remote_set_and_a_quick_look(made: tuple[Path, str], tmp_path: Path) -> None:
    root, cache = made[0].as_uri(), f"--cache_dir={tmp_path / 'cache'}"
    whole, quick = tmp_path / "whole", tmp_path / "quick"
    assert main(["--root", root, "--out", str(whole), cache, "--jobs=1"]) == 0
    assert main(["--root", root, "--out", str(quick), cache, "--quick"]) == 0
    assert (whole / "sheet.png").read_bytes() == (quick / "sheet.png").read_bytes()
    assert "look alike" in (whole / "index.html").read_text()
    assert "look alike" not in (quick / "index.html").read_text()
    assert (quick / "look_alikes.csv").read_text() == "group,key,split,format,width,height\n"


def test_without_a_root_it_shows_the_embedded_data(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "out"), "--quick"]) == 0
    assert "<h1>digits</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_bad_input_takes_one_line(
    made: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (("--root", str(tmp_path)), 2, "holds no index.json; make a shard set with"),
        (("--root", str(made[0].parent)), 2, "no index.json but other folders, as an image folder"),
        (("--root", str(made[0]), "--out", str(tmp_path / "file" / "x")), 73, "cannot be written"),
        (("--root", made[0].as_uri()), 2, "data.cache_dir is not set"),
        (("--jobs", "0"), 2, "--jobs 0: must be 1 or more"),
    ]
    for argv, code, said in cases:
        caplog.clear()
        assert main(list(argv)) == code
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert said in line
    with pytest.raises(SystemExit, match="2"):
        main(["--roott", "x"])
