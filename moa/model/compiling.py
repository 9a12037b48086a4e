"""`compile_blocks`: a vision transformer's blocks under torch's compiler, in training."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from moa.errors import NoMatchingModuleError
from moa.layers.layer import moa_layers

_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Has every block of an injected `model` compiled at its first training forward.

    Blocks of one kind are compiled once. Names of parameters stay as they are. In evaluation the
    blocks run as written, and so do copies of the model.

    Raises `NoMatchingModuleError`: it has no blocks.
    """
    blocks = [module for path, module in model.named_modules() if _BLOCK.fullmatch(path)]
    if not blocks:
        raise NoMatchingModuleError(
            f"{type(model).__name__} has no `blocks.N` to compile; leave model.compile at off"
        )
    for block in blocks:
        block.compile(backend=backend, dynamic=False)  # batches of a run are of one size
        block._compiled_call_impl = _InTraining(block)
    # A kind may need several variants, beyond whose limit it would silently not be compiled.
    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, 2 * len(blocks))


class _InTraining:
    """Calls a block: compiled in training, as written in evaluation."""

    def __init__(self, block: nn.Module) -> None:
        assert block._compiled_call_impl is not None
        self.block, self.compiled = block, block._compiled_call_impl
        self.as_written: Callable[..., Any] = block._call_impl
        self.layers = [layer for _, layer in moa_layers(block)]

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.block.training:
            return self.as_written(*args, **options)
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.compiled_forward())
            return self.compiled(*args, **options)
