"""What one training step keeps, needs and computes, measured without doing it.

The model stands on the meta device, where tensors have shapes and no contents: forward and backward
run in seconds, on any machine, for any timm model and method. Every operation is seen on its way,
so that bytes and FLOPs are counted and not guessed. Not seen is what a GPU kernel takes for itself.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from moa.layers.layer import moa_layers
from trainer.prepare.meter import Meter, storages_of


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One micro-batch on one process: bytes without weights and their gradients, FLOPs per image.

    FLOPs count a multiply-add as two, and matrix products only.
    """

    images: int
    kept: int
    """Bytes that forward keeps for backward."""
    peak: int
    """Largest number of bytes alive at once in forward and backward."""
    evaluation: int
    """The same of an evaluation batch, without a graph."""
    forward: int
    backward: int
    """With what the fused attention computes anew."""
    recomputed: int
    """Of checkpointing's second forward."""
    tokens: int = 0
    """See `forward_only`."""
    operations: int = 0
    """Of forward and backward, those of checkpointing's second forward included; see `computes`."""


def measure(model: nn.Module, micro_batch: int, eval_batch: int) -> Footprint:
    """Runs forward and backward on the device of `model`, and forward of an evaluation batch.

    Gradients of the parameters are dropped as soon as they are there.
    """
    meter, kept = _step(model, micro_batch)
    plain = meter
    if getattr(model, "grad_checkpointing", False):
        model.set_grad_checkpointing(False)  # type: ignore[operator]
        plain, _ = _step(model, micro_batch)
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    evaluation, tokens = forward_only(model, eval_batch)
    return Footprint(
        images=micro_batch,
        kept=kept,
        peak=meter.peak,
        evaluation=evaluation,
        forward=meter.forward // micro_batch,
        backward=plain.backward // micro_batch,
        recomputed=(meter.backward - plain.backward) // micro_batch,
        tokens=tokens,
        operations=meter.operations,
    )


def _step(model: nn.Module, batch: int) -> tuple[Meter, int]:
    """Meter of forward and backward, and the bytes that forward kept."""
    meter, saved, own = Meter(model), {}, storages_of(model)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    images = blank_images(model, batch)
    labels = torch.zeros(batch, dtype=torch.int64, device=images.device)
    with _gradients_dropped(model), fused_attention(), meter:
        moa.set_routing_position(model, moa.RoutingPosition(0, 0, 0))
        meter.note(images)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model(images)
            loss = F.cross_entropy(scores.float(), labels) + moa.aux_loss(model)
        kept = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        meter.forward = meter.flops
        torch.autograd.backward(loss)
    moa.set_routing_position(model, None)
    return meter, kept


def forward_only(model: nn.Module, batch: int) -> tuple[int, int]:
    """Evaluates a batch.

    Returns:
        Largest number of bytes alive at once, and the most tokens of an image that an adapted layer
        sees: pyramids have more in their first blocks, and backbones tell it in different ways, or
        not at all. 0 without adapters.
    """
    meter, images, seen = Meter(model), blank_images(model, batch), [0]

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].numel() // (batch * inputs[0].shape[-1]))

    was_training = model.training
    model.eval()
    with torch.no_grad(), fused_attention(), ExitStack() as hooks, meter:
        for _, layer in moa_layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(note))
        meter.note(images)
        model(images)
    model.train(was_training)
    return meter.peak, max(seen)


def blank_images(model: nn.Module, batch: int) -> Tensor:
    """Black images of the model's size, on its device and in its precision."""
    weight = next(model.parameters())
    size = timm.data.resolve_model_data_config(model)["input_size"]
    return torch.zeros(batch, *size, dtype=weight.dtype, device=weight.device)


@contextmanager
def _gradients_dropped(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter keeps its gradient; the engine's buffers count those."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    with ExitStack() as hooks:
        for p in model.parameters():
            if p.requires_grad:
                hook = p.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
                hooks.enter_context(hook)
        yield


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within the block attention on the meta device is fused, as it is on GPUs and CPUs.

    Meta tensors would otherwise take the path that forms every score, [N, N] per head. The CPU's
    fused kernel keeps what the GPU's keeps: queries, keys, values, result and a sum per row.
    """
    original: Any = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, **rest: Any,
    ) -> Any:  # fmt: skip
        # Fused kernels take [B, heads, N, D]; what else there is, GPUs do not fuse either.
        plain = query.dim() != 4 or attn_mask is not None or rest.get("enable_gqa")
        if query.device.type != "meta" or plain:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, scale=rest.get("scale"))[0]

    functional: Any = F
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
