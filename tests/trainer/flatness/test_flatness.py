"""Curvature and sharpness against dense matrices and closed forms."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from moa.files.reading import AdapterInfo
from moa.files.saving import save_adapter
from shards import DataConfig, open_shards
from tests.support.moa_fixtures import images, small_config, stir, tiny_vit
from tests.support.shards_server import Server
from trainer.config.model import ModelConfig
from trainer.flatness import __main__ as flatness, measure as measuring
from trainer.flatness.surface import (
    Surface,
    adaptive_sharpness,
    random_direction,
    slice_along,
    top_eigenvalues,
)
from trainer.prepare.backbone import create_backbone

pytestmark = pytest.mark.usefixtures("few_embedded")


def surface_of(method: str, **changes: object) -> Surface:
    model = tiny_vit(depth=2).double()
    moa.inject(model, small_config(method, blocks="last_1", **changes))
    stir(model)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    x = images(6, dtype=torch.float64)
    return Surface(model, [(x[:4], labels[:4]), (x[4:], labels[4:])])


def dense_hessian(surface: Surface) -> Tensor:
    """Of the whole batch at once, by torch's own functional Hessian."""
    names = [n for n, p in surface.model.named_parameters() if p.requires_grad]
    shapes = [p.shape for p in surface.parameters]
    x, y = (torch.cat(parts) for parts in zip(*surface.samples, strict=True))

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(surface.model, values, (x,)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, surface.weights)
    assert isinstance(hessian, Tensor)
    return hessian


@pytest.mark.parametrize("method", ["moa_lora", "moa_kron"])
def test_largest_eigenvalues_are_those_of_the_dense_hessian(method: str) -> None:
    surface = surface_of(method, router_dim=4, ranks=(1, 2))
    hessian = dense_hessian(surface)
    direction = torch.randn(len(surface.weights), dtype=torch.float64)
    torch.testing.assert_close(surface.curvature(direction), hessian @ direction)
    expected = torch.linalg.eigvalsh(hessian).flip(0)[:3].tolist()
    found, products = top_eigenvalues(surface, 3, seed=0, tolerance=1e-10)
    assert found == pytest.approx(expected, rel=1e-7)
    assert products < len(surface.weights)
    assert top_eigenvalues(surface, 3, seed=0, tolerance=1e-10) == (found, products)


class Linear(Surface):
    """A loss that is linear in the weights."""

    def __init__(self, weights: Tensor, slope: Tensor) -> None:
        model = nn.Module()
        model.w = nn.Parameter(weights)
        super().__init__(model, [(slope, torch.zeros(1))])

    def _parts(self, weights: Tensor) -> Iterator[Tensor]:
        for slope, _ in self.samples:
            yield slope @ weights


def test_sharpness_of_a_linear_loss_is_its_closed_form() -> None:
    slope = torch.tensor([3.0, 1.0, 7.0, -4.0], dtype=torch.float64)
    surface = Linear(torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64), slope)
    scaled = slope * surface.weights  # the zero weight cannot move, however steep the loss
    for steps in (2, 5, 10):
        found = adaptive_sharpness(surface, 0.3, steps)
        assert found == pytest.approx(0.3 * float(scaled.norm()), rel=1e-12)


def test_sharpness_is_not_below_random_changes_and_grows_with_the_radius() -> None:
    surface = surface_of("moa_lora")
    found = [adaptive_sharpness(surface, radius) for radius in (0.1, 0.5)]
    assert 0 < found[0] < found[1]
    start, generator = surface.loss(surface.weights), torch.Generator().manual_seed(0)
    for _ in range(50):
        u = torch.randn(len(surface.weights), generator=generator, dtype=torch.float64)
        changed = surface.weights * (1 + 0.5 * u / u.norm())
        assert surface.loss(changed) - start < found[1]


def test_sharpness_does_not_change_where_the_function_does_not() -> None:
    """A LoRA expert's factors, one three times larger, the other three times smaller."""
    before, after = surface_of("lora"), surface_of("lora")
    with torch.no_grad():
        for name, parameter in after.model.named_parameters():
            if name.endswith((".up", ".down")):
                parameter *= 3.0 if name.endswith(".up") else 1 / 3
    after = Surface(after.model, after.samples)
    assert after.loss(after.weights) == pytest.approx(before.loss(before.weights), rel=1e-12)
    sharpness = adaptive_sharpness(before, 0.5)
    assert adaptive_sharpness(after, 0.5) == pytest.approx(sharpness, rel=1e-9)
    eigenvalues = [top_eigenvalues(s, 1, seed=0)[0][0] for s in (before, after)]
    assert abs(eigenvalues[1] / eigenvalues[0] - 1) > 0.05, "the Hessian is not invariant"


def test_directions_have_the_norms_of_the_filters() -> None:
    surface = surface_of("moa_lora")
    direction = random_direction(surface, seed=1)
    parts = direction.split([p.numel() for p in surface.parameters])
    for part, parameter in zip(parts, surface.parameters, strict=True):
        if parameter.dim() < 2:
            assert not part.any()
            continue
        norms = part.view_as(parameter).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, parameter.detach().flatten(1).norm(dim=1))
    assert torch.equal(direction, random_direction(surface, seed=1))
    assert not torch.equal(direction, random_direction(surface, seed=2))
    start = surface.loss(surface.weights)
    losses = slice_along(surface, direction, [-0.5, 0.0, 0.5])
    assert losses[1] == start
    assert len(set(losses)) == 3


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of the embedded backbone, stirred instead of trained."""
    index = open_shards(DataConfig())
    backbone = create_backbone(ModelConfig(), len(index.classes), seed=0)
    config = moa.MoAConfig(method="lora")
    moa.inject(backbone.model, config)
    stir(backbone.model, scale=0.05)
    info = AdapterInfo(backbone.name, backbone.sha256, config, index.classes, backbone.data_config)
    save_adapter(backbone.model, tmp_path / "adapter", info)
    return tmp_path / "adapter"


def test_command_measures_prints_and_draws(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = adapter.parent / "out"
    command = [
        "--adapter", str(adapter), "--domains", "plain", "rotated", "--samples", "2", "--points",
        "3", "--directions", "1", "--steps", "2", "--out", str(out), "--json",
    ]  # fmt: skip
    printed = []
    for more in (["--batch", "4", "--eigenvalues", "1"], ["--batch", "3", "--eigenvalues", "0"]):
        assert flatness.main([*command, *more]) == 0
        printed.append(json.loads(capsys.readouterr().out)["adapters"][str(adapter)])
    assert json.loads((out / "flatness.json").read_text())["adapters"][str(adapter)] == printed[1]
    assert (out / "flatness.png").read_bytes().startswith(b"\x89PNG")
    first, second = printed
    assert first["samples"] == 4
    assert first["eigenvalues"][0] > 0
    for key in ("loss", "sharpness"):
        assert first[key] == pytest.approx(second[key], rel=1e-4), "batches change no result"
    assert first["slices"][0][1] == pytest.approx(first["loss"], rel=1e-6)


def test_wrong_settings_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--adapter", str(tmp_path / "none"), "--samples", "0", "--rho", "nan"]
    assert flatness.main(command) == 2
    error = capsys.readouterr().err
    for word in ("--samples: 0; must be", "--rho: nan; must be"):
        assert word in error
    assert flatness.main(["--adapter", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_unknown_domain_is_named(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flatness.main(["--adapter", str(adapter), "--domains", "plane"]) == 2
    assert (
        "--domains = 'plane': not a domain of digits; legal: plain, inverted"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_output_that_cannot_be_written_is_found_before_the_work(
    name: str, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "measure", None)
    (adapter.parent / "file").write_text("")
    out = adapter.parent / name
    command = ["--adapter", str(adapter), "--samples", "1", "--out", str(out)]
    assert flatness.main(command) == 73
    assert re.search(
        rf"error: --out: cannot write {out} \(.+\); give another folder", capsys.readouterr().err
    )


def test_results_are_printed_although_they_cannot_be_written(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = {"weights": 1234567, "loss": 1.5, "eigenvalues": [2.0], "sharpness": 0.25}
    monkeypatch.setattr(measuring, "measure", lambda *_: found)
    monkeypatch.setattr(flatness, "replace_text", full)
    command = ["--adapter", str(adapter), "--samples", "1", "--out", str(adapter.parent / "out")]
    assert flatness.main(command) == 73
    printed = capsys.readouterr()
    assert "1,234,567" in printed.out
    assert "No space left" in printed.err


def test_data_are_given_as_to_an_evaluation(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A remote set, a list of what to leave out, a domain named twice."""
    index, list_file = open_shards(DataConfig()), tmp_path / "plain.txt"
    list_file.write_text("".join(f"{index.key(0, rank)}\n" for rank in range(index.num_samples(0))))
    command = ["--adapter", str(adapter), "--domains", "plain", "inverted", "plain"]
    with Server(index.root) as server:
        command += ["--data.root", server.url, "--data.exclude_list", str(list_file)]
        assert flatness.main(command) == 2
        assert "data.cache_dir is not set" in capsys.readouterr().err
        command += ["--data.cache_dir", str(tmp_path / "cache"), "--samples", "3"]
        _, samples = measuring.members_and_samples(flatness.parser().parse_args(command))
    assert samples.domains == [1, 1, 1]
