"""The device of this process, chosen in one place, and how exactly it multiplies."""

import os

import torch

from trainer.process.world import World


def device_of(world: World) -> torch.device:
    """The device this process computes on; processes beyond the devices they see share them."""
    if torch.cuda.is_available():
        return torch.device("cuda", world.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def use_device(world: World) -> torch.device:
    """Makes `device_of` the current device, for DeepSpeed as well, and fp32 products IEEE's.

    DeepSpeed takes LOCAL_RANK for the device's number, which a launcher that shows each process one
    device of its own does not mean. TF32 is cuDNN's default, and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    would round the routers' exact products, in bf16 runs, too.
    """
    device = device_of(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(world.local_rank if device.index is None else device.index)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def tf32() -> dict[str, bool]:
    """Whether fp32 products may be rounded to TF32, by library."""
    cublas, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return {"cublas": cublas, "cudnn": cudnn}
