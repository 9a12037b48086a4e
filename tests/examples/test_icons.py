"""The builder of `examples/icons` on themes of a few drawings, and the backbone made of others."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from shards.read.index import ShardIndex
from tests.support.docs_blocks import ROOT
from trainer.config.command_line import parse
from trainer.config.run_config import ModelConfig
from trainer.prepare.backbone import create_backbone

FOLDER = ROOT / "examples" / "icons"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules that `python examples/icons/...` sees beside itself."""
    names = ("drawings", "build", "pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def draw(path: Path, colour: str, size: str = 'width="16" height="16"', box: int = 16) -> None:
    """A square with a margin, as SVG or as PNG of 48 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        page = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
        page.paste(Image.new("RGBA", (30, 30), colour), (9, 9))
        page.save(path)
    else:
        square = f'<rect x="3" y="3" width="10" height="{box - 6}" fill="{colour}"/>'
        form = f'xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 16 {box}"'
        path.write_text(f"<svg {form}>{square}</svg>")


@pytest.fixture(scope="module")
def themes(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("themes")
    for number, theme in enumerate(scripts["build"].DOMAINS.values()):
        draw(root / theme / "64x64" / "folder.svg", f"#ff00{number:02}")
        draw(root / theme / "48x48" / "go-up.png", f"#00ff{number:02}")
        if number:
            draw(root / theme / "scalable" / "user.svg", f"#8800{number:02}")
    first = root / "Papirus"
    draw(first / "16x16" / "folder.svg", "blue")  # its 64 px are taken
    draw(first / "64x64" / "folder-copy.svg", "#ff0000")
    (first / "64x64" / "folder-alias.svg").symlink_to("folder.svg")
    draw(first / "scalable" / "home.svg", "grey", 'width="32" height="64"', box=32)
    (first / "scalable" / "user-home.svg").symlink_to("home.svg")  # of no class of its own
    (first / "scalable" / "user-house.svg").symlink_to("home.svg")
    draw(first / "scalable" / "google.svg", "red")  # no `go`
    draw(first / "scalable" / "go-white.svg", "#f0f0f0")
    (first / "scalable" / "go-wrong.svg").write_text("<svg")
    (first / "scalable" / "go-none.svg").symlink_to("nowhere.svg")
    (first / "scalable" / "go-away.svg").symlink_to(root / "mate" / "64x64" / "folder.svg")
    for theme in ("breeze", "mate"):
        draw(root / theme / "scalable" / "folder-red.svg", "#ff0000")  # papirus has it
    for number, theme in enumerate(scripts["pretrain"].OTHERS):
        draw(root / theme / "scalable" / "folder.svg", f"#0000{number + 10}")
        draw(root / theme / "scalable" / "camera.svg", f"#0a0a{number + 10}" if number else "red")
        if number < 4:
            (root / theme / "scalable" / "camera-folder.svg").symlink_to("folder.svg")
            draw(root / theme / "scalable" / "phone.svg", f"#0b0b{number + 10}")
        if number < 3:
            draw(root / theme / "scalable" / "clock.svg", f"#0c0c{number + 10}")
    draw(root / scripts["pretrain"].OTHERS[0] / "scalable" / "camera.svg", "#ff0000")  # in papirus
    return root


def test_drawings_become_pictures_of_their_classes_once(
    scripts: dict[str, ModuleType], themes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scripts["build"].collect(themes, scripts["build"].DOMAINS, most=60)
    names = {f"{domain}/{kind}/{name}" for domain, kind, name in found.pictures}
    three = ("folder/folder", "go/go-up", "user/user")
    usual = {f"{domain}/{name}" for domain in scripts["build"].DOMAINS for name in three}
    usual = usual - {"papirus/folder/folder", "papirus/user/user"} | {"papirus/user/user-home"}
    copies = {"papirus/folder/folder", "papirus/folder/folder-copy"}
    assert names - copies == usual
    assert len(names & copies) == 1
    assert found.left_out == {
        "pixels as in the same theme": 1,
        "pixels as in another theme": 2,
        "nothing to be seen": 1,
        "not readable": 1,
    }
    home = np.asarray(found.pictures["papirus", "user", "user-home"])
    assert home.shape == (64, 64, 3)
    grey = (home == (128, 128, 128)).all(-1)
    assert (home[~grey] == 255).all(), "on white"
    assert grey.any(1).sum() == 52, "64 px high"
    assert np.flatnonzero(grey.any(0)).tolist() == list(range(22, 42)), "and centred"
    few = scripts["build"].collect(themes, scripts["build"].DOMAINS, most=0)
    assert not few.pictures
    assert few.seen == found.seen

    assert scripts["build"].main(["--themes", str(themes), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {row[0]: row[1:] for line in lines if (row := line.replace("|", " ").split())}
    assert rows["folder"] == ["1", "1", "1", "1", "1", "1", "6"]
    assert rows["view"] == ["0", "0", "0", "0", "0", "0", "0"]
    assert rows["all"] == ["3", "3", "3", "3", "3", "3", "18"]
    index = ShardIndex.load(tmp_path / "shards")
    assert (index.name, index.classes) == ("icons", ("folder", "go", "user"))
    assert index.domains == tuple(sorted(scripts["build"].DOMAINS))
    with pytest.raises(SystemExit):
        scripts["build"].main(["--themes", str(themes), "--out", str(tmp_path)])
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scripts["build"].main(["--themes", str(tmp_path), "--out", str(tmp_path / "new")])
    assert "apt-get install --no-install-recommends papirus-icon" in capsys.readouterr().err


def test_the_backbone_sees_no_name_and_no_picture_of_the_set(
    scripts: dict[str, ModuleType], themes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain = scripts["pretrain"]
    seen = scripts["build"].collect(themes, scripts["build"].DOMAINS, most=0).seen
    bank = pretrain.bank(themes, seen)
    assert bank.names == ["camera", "phone"]
    assert bank.labels.bincount().tolist() == [len(pretrain.OTHERS) - 1, 4]
    shown = [scripts["drawings"].on_background(Image.fromarray(np.asarray(p.permute(1, 2, 0))))
             for p in bank.pictures]  # fmt: skip
    assert not {scripts["drawings"].fingerprint(image) for image in shown} & set(seen)
    expected = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 127.5 - 1
    assert (pretrain.plain(bank.pictures) - expected).abs().max() <= 1 / 127.5
    varied = pretrain.varied(bank.pictures, torch.Generator().manual_seed(0))
    assert varied.shape == expected.shape
    assert varied.abs().max() < 1 + 1e-5
    assert len(varied.flatten(1).unique(dim=0)) == len(varied)

    monkeypatch.setattr(pretrain, "BATCH", 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert pretrain.main([f"--themes={themes}", f"--out={tmp_path}", "--steps=2"]) == 0
    recipe = parse([f"--recipe={FOLDER / 'icons.yaml'}", "--data.root=x"]).model
    weights = tmp_path / Path(recipe.weights).name
    config = ModelConfig(
        backbone=recipe.backbone, weights=str(weights), image_size=recipe.image_size,
        patch_size=recipe.patch_size,
    )  # fmt: skip
    made = create_backbone(config, num_classes=20, seed=0)
    assert made.data_config["input_size"] == (3, 64, 64)
    assert made.model(torch.zeros(1, 3, 64, 64)).shape == (1, 20)
