"""torch.compile for the blocks of a backbone, in training only.

Blocks of one kind run the same code, which is compiled once for all of them: seconds, where the
whole model would take minutes.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from trainer.errors import ConfigError


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Has every transformer block compiled at its first training step.

    Args:
        model: a timm model, or something around one; blocks are the children of what is called
            `blocks` in it. Parameters and their names stay as they are.
        backend: of torch.compile.

    Raises:
        ConfigError: there is no block.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise ConfigError(
            "model.compile: this backbone has no blocks to compile; leave the setting out"
        )
    for block in blocks:
        block.compile(backend=backend)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            yield from module.children()


def as_written() -> AbstractContextManager[object]:
    """Within the block nothing is compiled, so that numbers are those of any other evaluation."""
    # Loading the compiler takes a second, which only who has compiled something has paid already.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
