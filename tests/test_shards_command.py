import logging
import subprocess
import sys
from pathlib import Path

import pytest
from shards_fixtures import FOLDER, damage, folder_bytes, make_folder

from shards.writer import main, write_shards

REPOSITORY = Path(__file__).resolve().parents[1]


def test_excluded_images_leave_before_ranks_are_given(tmp_path: Path) -> None:
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
        (("--out", out), 2, "--root is not set"),
        (("--out", out, "--deep"), 2, "--deep: only with --verify"),
        (("--out", out, "--root", str(tmp_path / "no")), 2, "no such folder"),
        (("--out", out, "--verify"), 2, "does not exist; make a shard set with"),
        (("--out", out, "--root", out, "--exclude-list", "no.txt"), 2, "cannot be read"),
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
    assert "57 images, 3 domains, 2 classes, 3 shards, verified" in caplog.text
    assert main(["--root", root, "--out", str(tmp_path / "images" / "art" / "cat" / "x")]) == 2
    (tmp_path / "file").write_text("")
    assert main(["--root", root, "--out", str(tmp_path / "file" / "x")]) == 73
    damage(tmp_path / "out" / "folder-photo-000000.tar", 700)
    caplog.clear()
    assert main(["--out", out, "--verify"]) == 65
    assert "folder-photo-000000.tar: sha256 differs from the index" in caplog.text
    (tmp_path / "out" / "folder-art-000000.tar").unlink()
    assert main(["--out", out, "--verify"]) == 65


def test_deep_check_finds_an_image_that_was_never_readable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = make_folder(tmp_path / "images"), str(tmp_path / "out")
    (root / "art/cat/im000.png").write_bytes(b"<html>404</html>")
    (root / "art/cat/im001.jpg").write_bytes(b"")
    assert main(["--root", str(root), "--out", out]) == 0
    assert "im001.jpg is empty" in caplog.text
    assert main(["--out", out, "--verify"]) == 0
    assert main(["--out", out, "--verify", "--deep"]) == 65
    assert "sample art-0000000: cannot be decoded" in caplog.text
    assert "sample art-0000001: cannot be decoded" in caplog.text


def test_help_is_light(tmp_path: Path) -> None:
    code, said = command("--help")
    assert code == 0
    assert "(default: 1000)" in said
    probe = (
        "import sys, contextlib, io, shards, shards.config, shards.index, shards.split, "
        "shards.digits, shards.writer\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    shards.writer.main(['--help'])\n"
        "print([m for m in ('torch', 'webdataset', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
