"""How many tokens of an image an adapted layer sees, whatever the backbone."""

from typing import Any

import torch
from torch import nn

from moa.layers.layer import MoALinear, moa_layers
from trainer.prepare.footprint import blank_images, fused_attention


@torch.no_grad()
def tokens_per_image(model: nn.Module) -> int:
    """The most that any layer sees: pyramids have more in their first blocks; 0 without adapters.

    Counted in a forward of one image: backbones tell it in different ways, or not at all.

    Args:
        model: injected; on the meta device the forward costs next to nothing.
    """
    seen = [0]

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, MoALinear)
        seen.append(inputs[0].numel() // layer.in_features)

    hooks = [layer.register_forward_pre_hook(note) for _, layer in moa_layers(model)]
    was_training = model.training
    model.eval()
    with fused_attention():
        model(blank_images(model, 1))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return max(seen)
