"""ZeRO-3: spreads a model over the ranks, module by module, from the main rank's copy.

Only the main rank holds the whole model, on its CPU; the others hold its outline on the meta device
and at no time more than one module's own tensors beside their partitions.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from moa.layers.layer import moa_layers


def partition(model: nn.Module, ds_json: dict[str, Any], device: torch.device) -> None:
    """Makes every parameter a ZeRO-3 one; values come from rank 0.

    Args:
        model: rank 0's with its values, the others' on the meta device.
        ds_json: complete DeepSpeed configuration, stage 3.
        device: where parameters are gathered.
    """
    dtype = torch.bfloat16 if ds_json["bf16"]["enabled"] else torch.float32
    for module in model.modules():
        own = nn.Module()
        if any(t.is_meta for t in module.parameters(recurse=False)) or any(
            t.is_meta for t in module.buffers(recurse=False)
        ):
            module.to_empty(device="cpu", recurse=False)
        for name, parameter in module.named_parameters(recurse=False):
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)
                own.register_parameter(name, parameter)
        if len(own._parameters):
            deepspeed.zero.Init(module=own, config_dict_or_path=ds_json)
        for name, buffer in module.named_buffers(recurse=False):
            value = buffer.to(device, dtype if buffer.is_floating_point() else buffer.dtype)
            dist.broadcast(value, 0)
            setattr(module, name, value)
    for _, layer in moa_layers(model):
        if layer.config.kronecker:  # the model's rule, used inside the layer's forward
            for parameter in layer.rule.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)
