"""Sharing adapters: folders, PEFT, and a hub that speaks the real client's protocol."""

import errno
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import moa
from moa.files.reading import read_adapter
from moa.files.saving import write_adapter
from tests.support.hub_server import TOKEN, running_hub
from tests.support.trainer_fixtures import ROOT, environment
from trainer.checkpoint import checkpoint
from trainer.config.command_line import parse
from trainer.export.__main__ import main
from trainer.prepare.parts import build
from trainer.process.world import World

pytestmark = pytest.mark.usefixtures("few_embedded")
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
LOAD = """
import sys, timm, torch, moa, trainer.prepare.vit_embedded
for name in sys.argv[1:]:
    model = timm.create_model("vit_embedded.glyphs", pretrained=True, num_classes=10)
    try:
        info = moa.load_adapter(model, name)
    except moa.MissingAdapterError as error:
        print("missing:", error)
    else:
        total = sum(t.double().sum() for t in moa.adapter_state_dict(model).values())
        print("loaded", info.origin.held_out, f"{float(total):.9f}")
"""


def adapter(folder: Path, method: str) -> Path:
    parts = build(parse([f"--moa.method={method}"]), World(0, 1, 0, 1))
    torch.manual_seed(1)
    tensors = moa.adapter_state_dict(parts.model)
    moved = {n: t + 0.05 * torch.randn(t.shape) for n, t in tensors.items()}
    moa.save_adapter(parts.model, folder, parts.info, moved)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("mixture") / "adapter", "moa_kron")


def process(*command: str, hub: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that knows of no hub but the test's."""
    extra = {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
        env=environment(**extra), timeout=200, check=False,
    )  # fmt: skip


def test_pushed_adapter_is_loaded_by_name(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, tensors = read_adapter(mixture)
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert main(["--adapter", str(mixture), "--push", "lab/moa"]) == 0
        assert '"hf-hub:lab/moa"' in capsys.readouterr().out
        files = hub.repositories["lab/moa"]
        assert sorted(f for f in files if f != ".gitattributes") == FILES
        assert files[FILES[2]] == (mixture / FILES[2]).read_bytes()
        assert ModelCard(files["README.md"].decode()).data.library_name == "moa-trainer"
        names = ["hf-hub:lab/moa", "hf-hub:lab/none", "hf-hub:a/b/c"]
        loaded = process("-c", LOAD, *names, hub=hub.address, cache=tmp_path)
    total = float(sum(t.double().sum() for t in tensors.values()))
    first, second, third = loaded.stdout.splitlines()
    assert first == f"loaded rotated {total:.9f}", loaded.stderr
    assert second.startswith("missing: hf-hub:lab/none: no such repository"), second
    assert third.startswith("missing: hf-hub:a/b/c: not a name"), third


def test_hub_that_is_not_there_is_told_in_words(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    assert main(["--adapter", str(mixture), "--push", "lab/moa"]) == 73
    assert "cannot be reached" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_not_the_hubs_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/home/me/.cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", read_only)
    with pytest.raises(moa.MissingAdapterError, match=r"Read-only.*/home/me.*set HF_HOME"):
        read_adapter("hf-hub:lab/moa")


@pytest.mark.parametrize(
    "root", ["pipe:TOKEN=S3CRET cat /set/{}", "https://me:S3CRET@host/set?sig=S3CRET"]
)
def test_what_gives_access_to_the_data_is_not_shared(
    root: str, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even of an adapter whose release wrote the whole command down."""
    info, tensors = read_adapter(mixture)
    assert info.origin is not None
    command = shlex.join(["python", "trainer/run.py", f"--data.root={root}", "--optim.lr=0.1"])
    old = replace(info, origin=replace(info.origin, command=command))
    folder = tmp_path / "old"
    folder.mkdir()
    write_adapter(folder, tensors, old)
    assert main(["--adapter", str(folder), "--push", "lab/moa", "--out", str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err
    assert "--push: the command that trained" in told
    assert not (tmp_path / "x").exists(), "found out before anything is done"
    (flag,) = re.findall("give (--out) FOLDER", told)
    assert main(["--adapter", str(folder), flag, str(tmp_path / "out")]) == 0
    for file in (tmp_path / "out").iterdir():
        assert b"S3CRET" not in file.read_bytes(), file
    shared = read_adapter(tmp_path / "out")[0]
    assert shared.origin is not None
    assert shared.origin.command.endswith(" --optim.lr=0.1")
    assert "..." in shared.origin.command
    assert "S3CRET" not in told


def test_out_folder_holds_the_adapter_alone(mixture: Path, tmp_path: Path) -> None:
    info, tensors = read_adapter(mixture)
    whole = checkpoint.save(tmp_path / "run", info, tensors, {}, {"step": 1}, keep=1)
    out = tmp_path / "out"
    assert main(["--adapter", str(whole), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert read_adapter(out)[0] == info
    assert main(["--adapter", str(mixture), "--out", str(out)]) == 0  # an adapter is replaced


def test_peft_export_computes_the_same(tmp_path: Path) -> None:
    import peft

    folder = adapter(tmp_path / "lora", "lora")
    assert main(["--adapter", str(folder), "--peft", str(tmp_path / "peft")]) == 0
    ours, base = (
        timm.create_model("vit_embedded.glyphs", pretrained=True, num_classes=10) for _ in range(2)
    )
    moa.load_adapter(ours, folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours.eval()(images), rtol=1e-4, atol=1e-4)


def test_current_folder_is_not_replaced(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It would leave the shell in a folder that is gone."""
    here = shutil.copytree(mixture, tmp_path / "adapter")
    monkeypatch.chdir(here)
    assert main(["--adapter", str(mixture), "--out", "."]) == 73
    assert "--out: . is the current folder, or holds it" in capsys.readouterr().err
    assert Path.cwd() == here
    assert sorted(path.name for path in here.iterdir()) == FILES


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "nothing to do"),
        (["--private", "--out", "x"], 2, "only with --push"),
        (["--push", "no spaces"], 2, "organisation/name"),
        (["--out", "work"], 73, "--out: work is no adapter and would be replaced"),
        (["--peft", "work"], 73, "--peft: work is no adapter and would be replaced"),
        (["--peft", "never-made"], 2, "cannot be exported"),
    ],
)
def test_bad_export_is_refused(
    flags: list[str], code: int, message: str, mixture: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    assert main(["--adapter", str(mixture), *flags]) == code
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.rglob("*")] == ["work", "thesis.tex"]
