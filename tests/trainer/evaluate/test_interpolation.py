"""Adapters between the start of their training and its end, and the choice among them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import moa
from moa.files.reading import read_adapter
from tests.trainer.evaluate.test_evaluate import make
from trainer.config.model import ModelConfig
from trainer.evaluate.__main__ import main
from trainer.evaluate.combine import models_on
from trainer.evaluate.interpolation import interpolated, start_of
from trainer.evaluate.members import Member, read_members
from trainer.export.__main__ import main as export
from trainer.prepare.backbone import create_backbone

pytestmark = pytest.mark.usefixtures("few_embedded")


@cache
def fresh(head: Literal["linear", "cosine"]) -> nn.Module:
    """The base as a run of seed 5 begins with it."""
    return create_backbone(ModelConfig(head=head), 10, 5).model.eval()


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("method", ["lora", "kadaptation", "moa_lora", "moa_kron", "bias", "full"])
def test_0_is_the_fresh_model_and_1_the_adapter(
    method: str, head: Literal["linear", "cosine"], tmp_path: Path
) -> None:
    flags = [f"--moa.method={method}", f"--model.head={head}"]
    shared = ["--moa.shared_rank=2"] if method.startswith("moa") else []
    folder = make(tmp_path / "adapter", 5, *flags, *shared)
    (member,) = read_members([str(folder)])
    start = start_of(member, None, None).model
    ends = [interpolated(member, start, alpha) for alpha in (0.0, 1.0)]
    assert ends[1].tensors is member.tensors
    images = torch.randn(3, 3, 32, 32)
    models = models_on(start, [*ends, interpolated(member, start, 0.5)]).eval()
    at_0, at_1, half = (model(images) for model in models)
    assert torch.equal(at_0, fresh(head)(images))
    assert not torch.allclose(half, at_0)
    assert not torch.allclose(half, at_1)


def test_half_of_a_merged_lora_is_the_mean_of_the_weights(tmp_path: Path) -> None:
    (member,) = read_members([str(make(tmp_path / "adapter", 0, "--moa.method=lora"))])
    start = start_of(member, None, None).model
    half, whole = models_on(start, [interpolated(member, start, alpha) for alpha in (0.5, 1.0)])
    moa.merge(half)
    moa.merge(whole)
    ends = whole.state_dict()
    for name, value in half.state_dict().items():
        mean = (start.state_dict()[name].double() + ends[name].double()) / 2
        assert torch.allclose(value.double(), mean, rtol=0, atol=1e-7), name


def test_what_scales_nothing_stays(tmp_path: Path) -> None:
    """Routers, rules, temperatures and counters, whatever the alpha; the record multiplies."""
    flags = ["--moa.method=moa_kron", "--moa.router=cosine", "--moa.balance=bias"]
    (member,) = read_members([str(make(tmp_path / "adapter", 0, *flags))])
    start = start_of(member, None, None).model
    half = interpolated(member, start, 0.5)
    moved = {n for n, t in half.tensors.items() if not torch.equal(t, member.tensors[n])}
    layers = "blocks.0.attn.qkv."
    assert {n.removeprefix(layers) for n in moved if n.startswith(layers)} == {
        "bias", *(f"experts.{e}.left" for e in range(4)),
    }  # fmt: skip
    assert {n for n in moved if not n.startswith("blocks.")} == {"head.weight", "head.bias"}
    assert {"kron_rule.left", f"{layers}router.balance_steps"} <= half.tensors.keys() - moved
    quarter = interpolated(half, start, 0.5)
    assert quarter.info.origin is not None
    assert quarter.info.origin.alpha == 0.25


def saved(folder: Path) -> tuple[float, Member]:
    (member,) = read_members([str(folder)])
    assert member.info.origin is not None
    return member.info.origin.alpha, member


def test_alpha_is_chosen_by_the_sources_and_carried_by_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "adapter", 1, "--moa.method=moa_lora")
    out, chosen = tmp_path / "out", tmp_path / "chosen"
    flags = ["--adapter", str(folder), "--split", "out", "--alpha", "1,0.5,0"]
    flags += ["--domains", "plain", "inverted", "rotated"]
    assert main([*flags, "--json", "--output", str(out), "--save", str(chosen)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["moa/result"] for row in found] == ["alpha 1", "alpha 0.5", "alpha 0"]
    for row in found:
        assert row["env5_out_acc"] >= 0, "rotated, which is held out, and has no vote"
        sources = (row["env0_out_acc"], row["env1_out_acc"])
        assert row["moa/validation"] == pytest.approx(sum(sources) / 2)
    best = max(found, key=lambda row: row["moa/validation"])
    alpha, member = saved(chosen)
    assert best["moa/result"] == f"alpha {alpha:g}"
    assert member.info.results == {k: v for k, v in best.items() if k.endswith("_acc")}
    told = json.loads((out / "evaluation.json").read_text())
    assert told["asked"] == best["moa/result"]
    assert f"**{best['moa/result']}**" in (out / "tables.md").read_text()
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    half = tmp_path / "half"
    assert export(["--adapter", str(folder), "--alpha", "0.5", "--out", str(half)]) == 0
    (given,) = read_members([str(folder)])
    start = start_of(given, None, None).model
    for place, at in ((chosen, alpha), (half, 0.5)):
        expected, found_there = interpolated(given, start, at).tensors, saved(place)[1].tensors
        assert all(torch.equal(tensor, found_there[name]) for name, tensor in expected.items())
    assert "end (1), at 0.5." in (half / "README.md").read_text()
    assert not saved(half)[1].info.results, "the figures of the run are those at 1"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha=0,1"], "one adapter lies at one alpha; trainer.evaluate --alpha 0,1 chooses"),
        (["--alpha=2"], "'2' is no number from 0"),
        (["--model.text_model=ViT-B-16:openai"], "only with --alpha"),
        (["--alpha=0.5"], "is no origin on record, so the seed by which its head started is not"),
    ],
)
def test_export_refuses_in_a_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "adapter", 0, "--moa.method=linear")
    info, tensors = read_adapter(folder)
    moa.save_adapter(nn.Module(), folder, replace(info, origin=None), tensors)
    assert export(["--adapter", str(folder), "--out", str(tmp_path / "out"), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
