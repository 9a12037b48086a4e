"""The margin against its formula, value and gradient, and that none costs nothing."""

import timm
import torch
from torch.nn import functional as F

from moa.model.heads import fit_head
from trainer.train.margin import margin_of


def test_it_is_the_formula_of_the_paper() -> None:
    model = timm.create_model("vit_embedded", num_classes=6)
    fit_head(model, 6, {"kind": "cosine", "space": 5, "frozen": False})
    torch.manual_seed(1)
    head = model.head.double()
    head.weight.data.normal_()
    head.scale.fill_(30.0)
    f = torch.randn(8, 128, dtype=torch.float64, requires_grad=True)
    labels, strength = torch.tensor([0, 5, 2, 2, 1, 4, 3, 0]), 0.3
    ours = F.cross_entropy(margin_of(model, strength)(head(f), labels), labels)
    total = f.new_zeros(())
    for row, y in zip(f @ head.weight.T + head.bias, labels, strict=True):
        t_y = head.classes[y]
        scores = torch.stack([
            head.scale * (F.cosine_similarity(row, t, dim=0)
                          - strength * F.cosine_similarity(t_y, t, dim=0))
            for t in head.classes
        ])  # fmt: skip
        total = total - scores.log_softmax(0)[y] / len(labels)
    moved = [f, head.weight, head.bias]
    for given, wanted in zip(
        (ours, *torch.autograd.grad(ours, moved)), (total, *torch.autograd.grad(total, moved)),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(given, wanted, rtol=0, atol=1e-10)
    plain = F.cross_entropy(head(f), labels)
    assert ours > plain + 1e-3, "the right class has to win by more"


def test_without_a_strength_scores_are_left_alone() -> None:
    scores = torch.randn(2, 3)
    assert margin_of(torch.nn.Identity(), 0.0)(scores, torch.tensor([0, 1])) is scores
