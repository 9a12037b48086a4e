"""The cosine head: its formula, what of it trains, and that adapters bring it along."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from moa.files.hub import CARD_FILE, CONFIG_FILE
from moa.files.reading import AdapterInfo
from moa.layers.head import FIRST_SCALE, CosineHead
from moa.model.heads import fit_head
from tests.support.moa_fixtures import (
    DIM,
    assert_untouched,
    images,
    seal,
    small_config,
    snapshot,
    stir,
    tiny_vit,
)

KINDS: dict[str, dict[str, Any]] = {
    "random": {"kind": "cosine", "space": None, "frozen": False},
    "text": {"kind": "cosine", "space": 5, "frozen": False},
    "frozen": {"kind": "cosine", "space": 5, "frozen": True},
}
OF_HEAD = {"random": {"head.classes"}, "text": {"head.weight", "head.bias"}, "frozen": set()}


def with_head(kind: str, method: str = "lora") -> nn.Module:
    """An injected model far from its start, what its head keeps included."""
    model = tiny_vit()
    fit_head(model, 4, KINDS[kind])
    moa.inject(model, small_config(method))
    stir(model)
    head = model.get_classifier()
    torch.manual_seed(7)
    for buffer in head.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 1)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_those_of_the_formula(kind: str) -> None:
    torch.manual_seed(3)
    settings = {key: KINDS[kind][key] for key in ("space", "frozen")}
    head = CosineHead(6, 4, **settings)
    assert float(head.scale) == pytest.approx(FIRST_SCALE)
    for tensor in head.state_dict(keep_vars=True).values():
        tensor.data.copy_(torch.rand(tensor.shape) + 0.5)
    head.double()
    f = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    x = f if head.weight is None else f @ head.weight.T + head.bias
    wanted = torch.stack([head.scale * F.cosine_similarity(x, t, dim=1) for t in head.classes], 1)
    assert torch.allclose(head(f), wanted, rtol=0, atol=1e-12)
    weights = torch.randn(5, 4, dtype=torch.float64)
    moved = [f, *head.parameters()]
    for ours, theirs in zip(
        *(torch.autograd.grad((s * weights).sum(), moved) for s in (head(f), wanted)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_rounded_features_give_exact_scores_under_autocast() -> None:
    torch.manual_seed(3)
    head, f = CosineHead(6, 4, 5), torch.randn(8, 6).bfloat16()
    head.weight.data.normal_()  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(f)
    assert scores.dtype == torch.float32
    wanted = head.double()(f.double())
    assert torch.allclose(scores.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "lora", "moa_kron"])
def test_an_adapter_brings_its_head_along(kind: str, method: str, tmp_path: Path) -> None:
    model, fresh = with_head(kind, method), tiny_vit()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("head.")}
    assert trained == OF_HEAD[kind]
    base = moa.base_hash(fresh)
    names = tuple("abcd")
    moa.save_adapter(model, tmp_path, AdapterInfo("none", base, small_config(method), names, {}))
    assert "4 classes; cosine head; ranks" in (tmp_path / CARD_FILE).read_text()
    assert moa.load_adapter(fresh, tmp_path).head == KINDS[kind]
    assert isinstance(fresh.get_classifier(), CosineHead)
    assert fresh.num_classes == 4
    assert torch.equal(fresh.eval()(images(3)), model(images(3)))
    trains = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_base_in_low_precision_keeps_what_does_not_train_exact(tmp_path: Path) -> None:
    model, fresh = with_head("text"), tiny_vit().bfloat16()
    info = AdapterInfo("none", moa.base_hash(fresh), small_config("lora"), tuple("abcd"), {})
    moa.save_adapter(model, tmp_path, info)
    moa.load_adapter(fresh, tmp_path)
    kept, own = (m.get_classifier().state_dict() for m in (fresh, model))
    assert torch.equal(kept["classes"], own["classes"])
    assert kept["weight"].dtype == torch.bfloat16


def test_heads_give_way_to_each_other(tmp_path: Path) -> None:
    plain, config = tiny_vit(), small_config("lora")
    info = AdapterInfo("none", moa.base_hash(plain), config, tuple("abc"), {})
    moa.inject(plain, config)
    moa.save_adapter(plain, tmp_path, info)
    model = tiny_vit()
    fit_head(model, 3, KINDS["frozen"])
    assert moa.base_hash(model) == info.base_sha256, "no head is part of the base"
    moa.load_adapter(model, tmp_path)
    assert torch.equal(model.eval()(images(2)), plain.eval()(images(2)))


def test_merged_models_keep_it_and_peft_has_no_form_for_it(tmp_path: Path) -> None:
    model = with_head("text")
    wanted = model(images(3))
    with pytest.raises(moa.MoAConfigError, match=r"has a cosine head \(model\.head\), for which"):
        moa.export_peft(model, tmp_path / "peft", "none")
    assert not (tmp_path / "peft").exists()
    moa.merge(model)
    assert torch.allclose(model(images(3)), wanted, rtol=1e-4, atol=1e-5)


def change(**changes: Any) -> dict[str, Any]:
    return KINDS["text"] | changes


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (change(kind="angular"), "head: kind 'angular'; legal is 'cosine'"),
        (change(space=0), "head: space 0; must be null or 1 to 65536"),
        (change(space=True), "head: space True; must be"),
        (change(space=None, frozen=True), "head: frozen True; legal is"),
        (change(frozen="no"), "head: frozen 'no'; legal is"),
        ({"kind": "cosine"}, "head: frozen None; legal is"),
        ({}, "missing head.weight|head.weight is|unexpected head.classes"),
        (change(space=6), r"head.weight is \(5, 16\), the model has \(6, 16\)"),
        (KINDS["random"], "unexpected head.weight"),
    ],
)
def test_heads_that_cannot_be_are_refused_in_a_line(
    head: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, fresh = with_head("text"), tiny_vit()
    info = AdapterInfo("none", moa.base_hash(fresh), small_config("lora"), tuple("abcd"), {})
    moa.save_adapter(model, tmp_path, info)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    seal(tmp_path, config | {"head": head})
    before = snapshot(fresh)
    with pytest.raises(moa.AdapterError, match=words) as caught:
        moa.load_adapter(fresh, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert_untouched(fresh, before)


def test_a_distilled_model_has_no_place_for_it() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=DIM,
        num_heads=2, num_classes=3,
    )  # fmt: skip
    with pytest.raises(moa.MoAConfigError, match=r"model\.head: .* two classifiers.* use linear"):
        fit_head(model, 3, KINDS["text"])


def test_similarity_is_between_classes() -> None:
    torch.manual_seed(3)
    head, labels = CosineHead(6, 4, 5), torch.tensor([2, 0, 2])
    head.scale.fill_(10)
    found: Tensor = head.similarity(labels)
    wanted = [[10 * F.cosine_similarity(head.classes[y], t, dim=0) for t in head.classes]
              for y in labels]  # fmt: skip
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-5)
