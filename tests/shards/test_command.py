import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shards.config import DataConfig
from shards.datasets import DATASETS
from shards.errors import DamagedDataError, make_command, verify_command
from shards.opening import open_shards
from shards.read import naming
from shards.read.index import ShardIndex
from shards.writer import _byte_count, main, parser, write_shards
from tests.support.shards_fixtures import (
    FOLDER,
    damage,
    domain_folders,
    folder_bytes,
    image_bytes,
    make_folder,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def test_excluded_images_leave_before_places_are_given(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    (tmp_path / "list.txt").write_text("art/cat/im000.png\n\n./photo/dog/im003.jpg\nno/such.png\n")
    argv = ["--root", str(root), "--out", str(tmp_path / "out")]
    assert main([*argv, "--exclude-list", str(tmp_path / "list.txt")]) == 0
    (root / "art/cat/im000.png").unlink()
    (root / "photo/dog/im003.jpg").unlink()
    write_shards(root, tmp_path / "deleted", FOLDER)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "deleted")


def command(*argv: str) -> tuple[int, str]:
    """Run the command line in a process of its own; the code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "shards.writer", *argv],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_command_line_errors_take_one_line(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "file").write_text("")
    cases = [
        (("--root", "x"), 2, "--out"),
        (("--out", out, "--rooot", "x"), 2, "did you mean '--root'?"),
        (("--out", out, "--shard-size", "many"), 2, "invalid int value: 'many'"),
        (("--out", out, "--dataset", "digit"), 2, "did you mean 'digits'?"),
        (("--out", out, "--dataset", "parqet"), 2, "did you mean 'parquet'?"),
        (("--out", out), 2, "--root is not set"),
        (("--out", out, "--deep"), 2, "--deep: only with --verify"),
        (("--out", out, "--root", str(tmp_path / "no")), 2, "no such folder"),
        (("--out", out, "--verify"), 2, "does not exist; make a shard set with"),
        (("--out", out, "--root", out, "--exclude-list", "no.txt"), 2, "cannot be read"),
        (("--out", out, "--jobs", "0"), 2, "--jobs 0: must be 1 or more"),
        (("--out", out, "--shard-bytes", "big"), 2, "'big' is not a number of bytes such as 512M"),
    ]
    for argv, code, text in cases:
        found, said = command(*argv)
        assert (found, text in said, said.count("error:")) == (code, True, 1), (argv, said)
        assert "Traceback" not in said
        assert len([line for line in said.splitlines() if "error:" in line]) == 1


def test_command_line_converts_and_verifies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = str(make_folder(tmp_path / "images")), str(tmp_path / "out")
    with caplog.at_level(logging.INFO):
        assert main(["--root", root, "--out", out, "--verify", "--deep"]) == 0
    assert "57 images, 3 domains (art, photo, sketch), 2 classes, 3 shards, verified" in caplog.text
    assert main(["--root", root, "--out", str(tmp_path / "images" / "art" / "cat" / "x")]) == 2
    (tmp_path / "file").write_text("")
    assert main(["--root", root, "--out", str(tmp_path / "file" / "x")]) == 73
    damage(tmp_path / "out" / "folder-photo-000000.tar", 700)
    caplog.clear()
    assert main(["--out", out, "--verify"]) == 65
    assert "folder-photo-000000.tar: sha256 differs from the index" in caplog.text
    (tmp_path / "out" / "folder-art-000000.tar").unlink()
    assert main(["--out", out, "--verify"]) == 65


def test_a_set_has_a_name_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, out = str(make_folder(tmp_path / "images", per_class=2)), tmp_path / "out"
    plain = write_shards(Path(root), tmp_path / "plain", FOLDER)
    wrote = ["--root", root, "--out", str(out), "--jobs=1"]
    for name in ("", "two words", "a/b", "-x", "PACS", "n" * 65):
        assert main([*wrote, f"--name={name}"]) == 2
        assert f"--name {name}: " in caplog.text
    assert not out.exists()
    with caplog.at_level(logging.INFO):
        assert main([*wrote, "--name=birds", "--verify"]) == 0
    assert caplog.messages[-1].startswith(f"{out} (birds): 15 images, ")
    for name, before in folder_bytes(plain.root).items():
        assert ((out / name).read_bytes() == before) == (name != "index.json")
    index = open_shards(DataConfig(dataset="folder", root=str(out)))
    assert (index.dataset, index.name, index.sha256) == ("folder", "birds", plain.sha256)
    assert main(wrote) == 0
    assert ShardIndex.load(out).name == "birds", "the same command without a name leaves it"
    assert main(["--out", str(out), "--name", "other-birds"]) == 0
    assert ShardIndex.load(out).name == "other-birds"
    assert main(["--out", str(tmp_path / "none"), "--name", "other-birds"]) == 2
    assert main(["--dataset", "pacs", "--out", str(out), "--name", "x"]) == 2
    content = (out / "index.json").read_text()
    altered = content.replace("other-birds", "other-bords")
    (out / "index.json").write_text(altered)
    with pytest.raises(DamagedDataError, match="its 'name' were changed after it was written"):
        ShardIndex.load(out)
    hostile = naming.named(json.loads(content), "../../x")
    (out / "index.json").write_bytes(naming.index_bytes(hostile))
    with pytest.raises(DamagedDataError, match=r"its name '../../x' must be up to 64 ASCII"):
        ShardIndex.load(out)


def test_the_documentation_agrees_with_the_program() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if line.startswith("python -m shards.writer")]
    found = [parser().parse_args(shlex.split(line)[3:]).dataset for line in commands]
    assert found == ["domainnet"] * 2 + [None] * 2 + ["parquet", "pacs", "csv", "csv", "webdataset"]
    for spec in DATASETS.values():
        if spec.folder is not None and spec.domains is not None:
            row = f"| `{spec.name}` | `{spec.folder}` | {', '.join(spec.domains)} |"
            assert f"{row} {spec.num_classes} |" in lines


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = parser().parse_args(["--root=~/images", "--out=~/set", "--exclude-list=~/list"])
    assert [args.root, args.out, args.exclude_list] == [
        Path("/home/me/images"), Path("/home/me/set"), Path("/home/me/list"),
    ]  # fmt: skip


def test_flags_are_spelt_with_underscores_or_dashes() -> None:
    new = "--out=a-b --exclude_list c-d --shard_size 3 --shard_bytes=2K"
    args = parser().parse_args(new.split())
    old = new.replace("_l", "-l").replace("_s", "-s").replace("_b", "-b")
    assert "--exclude-list c-d --shard-size 3 --shard-bytes=2K" in old
    assert parser().parse_args(old.split()) == args
    assert (str(args.out), str(args.exclude_list)) == ("a-b", "c-d")
    assert (args.shard_size, args.shard_bytes) == (3, 2048)
    assert "--shard_size N" in parser().format_help()
    assert "--shard-size" not in parser().format_help()


def test_commands_in_messages_run_as_printed() -> None:
    commands = [
        make_command("pacs"), make_command("folder", Path("my images"), Path("my set")),
        make_command("digits", out="NEW_SET"), verify_command(), verify_command("it's", deep=False),
    ]  # fmt: skip
    parsed = [parser().parse_args(shlex.split(text.strip("`"))[3:]) for text in commands]
    assert [str(args.out) for args in parsed] == ["SET", "my set", "NEW_SET", "SET", "it's"]
    assert [args.root and str(args.root) for args in parsed[:3]] == [
        "IMAGE_FOLDER", "my images", None,
    ]  # fmt: skip
    assert [(args.verify, args.deep) for args in parsed[3:]] == [(True, True), (True, False)]
    for path in (REPOSITORY / "shards").rglob("*.py"):
        elsewhere = re.findall(r"`python -m shards\.writer --", path.read_text(encoding="utf-8"))
        assert not elsewhere or path.name == "errors.py", path


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("3k", 3072), ("512M", 2**29), ("2G", 2**31), ("1T", 2**40), (" 7 ", 7)],
)
def test_sizes_in_bytes(text: str, count: int) -> None:
    assert _byte_count(text) == count


def test_domainnet_with_its_duplicates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The real list with other images is refused; any other list is only remarked upon."""
    spec = DATASETS["domainnet"]
    assert spec.domains is not None
    assert spec.duplicates is not None
    root = domain_folders(tmp_path / "domain_net", spec)
    lines = [
        f"{domain}/class 000/{number}.jpg"
        for domain, count in zip(spec.domains, spec.duplicates, strict=True)
        for number in range(10, 10 + count)
    ]
    lines[0] = "clipart/class 000/0.jpg"
    (root / "clipart/class 000/1.jpg").write_bytes(b"not a duplicate")
    exclude, out = tmp_path / "domain_net_duplicates.txt", tmp_path / "out"
    exclude.write_text("\n".join(lines) + "\n")
    argv = ["--dataset", "domainnet", "--root", str(tmp_path), "--out", str(out), "--jobs", "1"]
    with caplog.at_level(logging.INFO):
        assert main([*argv, "--exclude-list", str(exclude)]) == 2
    assert "1 images left out" in caplog.text
    assert "9430 of 9431 entries name no image (clipart/class 000/100.jpg, " in caplog.text
    assert "domainnet has other numbers of images: clipart 345 instead of 48129" in caplog.text
    assert not out.exists()
    exclude.write_text("\n".join(lines[:-1]) + "\n")
    caplog.clear()
    assert main([*argv, "--exclude-list", str(exclude), "--verify"]) == 0
    assert "clipart 345 instead of 48129" in caplog.text
    index = open_shards(DataConfig(dataset="domainnet", root=str(out)))
    assert [index.num_samples(env) for env in range(6)] == [345, 346, 347, 348, 349, 350]
    assert index.read(0, 0).image == b"not a duplicate"


def test_deep_check_finds_an_image_that_was_never_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = make_folder(tmp_path / "images"), str(tmp_path / "out")
    (root / "art/cat/im000.png").write_bytes(b"<html>404</html>")
    (root / "art/cat/im001.jpg").write_bytes(b"")
    assert main(["--root", str(root), "--out", out]) == 0
    assert "im001.jpg is empty" in caplog.text
    assert main(["--out", out, "--verify"]) == 0
    assert "cannot be used" not in caplog.text
    assert main(["--out", out, "--verify", "--deep"]) == 65
    first = "sample art-0000000 (art/cat/im000.png): cannot be decoded (of no known format)"
    assert first in caplog.text
    assert "sample art-0000001 (art/cat/im001.jpg): cannot be decoded" in caplog.text
    assert caplog.messages[-1] == "2 of 57 images cannot be used as they are"


def test_lines_begin_with_how_grave_they_are_and_the_last_gives_the_domains(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", domains=("it's", "Real World", "art"), per_class=5)
    image = image_bytes(1, "JPEG", size=(200, 200))
    (root / "Real World" / "cat" / "im001.jpg").write_bytes(image[: len(image) // 2])
    argv = ["--root", str(root), "--out", str(tmp_path / "out"), "--verify", "--deep", "--jobs=1"]
    code, said = command(*argv)
    grave = ("warning: ", "error: ")
    table, lines = said.split("looking at: ")
    assert code == 0
    assert table.splitlines()[-4:] == [
        "class      Real World    art    it's    all",
        "cat                 6      7       5     18",
        "dog                 5      5       5     15",
        "all                11     12      10     33",
    ]
    warnings = [line for line in lines.splitlines() if line.startswith(grave)]
    assert warnings[0].startswith(f"warning: {tmp_path}/out/folder-Real_World-000000.tar: sample ")
    assert "Real_World-0000001 (Real World/cat/im001.jpg): the image is incomplete" in warnings[0]
    assert warnings[1:] == ["warning: 1 of 33 images cannot be used as they are"]
    closing = lines.splitlines()[-1]
    assert "33 images, 3 domains ('Real World', art, 'it'\"'\"'s'), 2 classes, " in closing
    (root / "art" / "cat" / "im000.png").write_bytes(b"")
    code, said = command(*argv[:3], str(tmp_path / "other"), *argv[4:], "--quick")
    assert "looking at" not in said
    lines = [line for line in said.splitlines() if line.startswith(grave)]
    assert code == 65
    assert lines[0] == f"warning: {root}/art/cat/im000.png is empty; " + lines[0].partition("; ")[2]
    assert "sample art-0000000 (art/cat/im000.png): cannot be decoded (" in lines[-2]
    assert lines[-2].startswith("error: ")
    assert lines[-1] == "warning: 2 of 33 images cannot be used as they are"


def test_help_is_light(tmp_path: Path) -> None:
    code, said = command("--help")
    assert code == 0
    assert "(default: 1000)" in said
    probe = (
        "import sys, contextlib, io, shards, shards.config, shards.read.index, "
        "shards.stream.split, shards.embedded.digits, shards.writer\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    shards.writer.main(['--help'])\n"
        "print([m for m in ('torch', 'webdataset', 'sklearn', 'PIL', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
