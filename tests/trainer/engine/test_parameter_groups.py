"""Which trainables are the head, and which decay, by their place and not by their names."""

import timm
import torch

from moa import MoAConfig, inject
from trainer.config.optim import OptimConfig
from trainer.engine.parameter_groups import FACTOR, parameter_groups


def test_both_heads_of_a_distilled_model_have_their_own_rate() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
        inject(model, MoAConfig(method="moa_lora"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in trained.items()}
    groups = parameter_groups(model, trained, OptimConfig(head_lr=5, weight_decay=0.1), 1)
    head = {names[id(p)] for group in groups if group[FACTOR] == 5 for p in group["params"]}
    assert head == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    decaying = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {name for name in trained if not name.endswith(("bias", "temperature"))}
    (alone,) = parameter_groups(model, trained, OptimConfig(), 1)
    assert [*alone["params"]] == [*trained.values()]
