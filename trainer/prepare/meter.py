"""Bytes, FLOPs and operations of what runs, counted operation by operation."""

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    # Some releases of torch count the attention of GPUs but not that of CPUs, which is the same.
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _aten._scaled_dot_product_flash_attention
    ],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    **flop_registry,
}
"""FLOPs of an operation from its arguments, as torch counts them."""
_COMPUTES_NOTHING = ("empty", "new_empty", "_unsafe_view", "promote_types")


@cache
def computes(func: Any) -> bool:
    """Whether an operation launches something: views and allocations do not."""
    return not (func.is_view or func.overloadpacket.__name__.startswith(_COMPUTES_NOTHING))


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """Counts, while active, live bytes of tensors that are not the model's, FLOPs and operations.

    Whoever runs forward and backward sets `forward` to the FLOPs of the one in between. On the meta
    device an operation is asked once for the shapes it gives to the same arguments, since asking
    takes most of the time and the blocks of a transformer are alike.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.flops = self.forward = self.operations = 0
        self._live, self._known = 0, storages_of(model)
        self._answers: dict[Any, tuple[int, Any]] = {}
        self._seen: dict[int, weakref.ref[Any]] = {}

    @property
    def backward(self) -> int:
        """FLOPs since forward was over."""
        return self.flops - self.forward

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += computes(func)
        key = _question(func, args, kwargs)
        if key in self._answers:
            flops, fresh = self._answers[key]
            result = fresh()
        else:
            result, flops = func(*args, **kwargs), 0
            if (count := FLOPS.get(func._overloadpacket)) is not None:
                flops = count(*args, **kwargs, out_val=result)
            if key is not None and (fresh := _repeated(result, args)):
                self._answers[key] = flops, fresh
        self.flops += flops
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.note(value)
        return result

    def note(self, tensor: Tensor) -> None:
        """Counts the storage of `tensor` until it is freed; views of one storage count once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self._known:
            return

        def freed(_: Any) -> None:
            del self._seen[key]
            self._live -= size

        self._seen[key] = weakref.ref(storage, freed)
        self._live += size
        self.peak = max(self.peak, self._live)


def _question(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All that the shapes of a result depend on; None if it is more than shapes, or cannot be told.

    Operations that write into an argument, or whose result may be a view of one, are not asked for.
    """
    if not _makes_new(func):
        return None
    try:
        key = (func, _described(args), _described(tuple(kwargs.items())))
        hash(key)
    except TypeError:
        return None
    return key


@cache
def _makes_new(func: Any) -> bool:
    schema = func._schema
    return not any(part.alias_info for part in (*schema.arguments, *schema.returns))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            raise TypeError("has contents")
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value  # 1, 1.0 and True are equal, and give results of different types


def _repeated(result: Any, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    """Makes such a result again; None unless it is tensors in storages of their own."""
    parts = result if isinstance(result, tuple) else (result,)
    known = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
    makers = []
    for part in parts:
        if not isinstance(part, Tensor) or part.device.type != "meta":
            return None
        shape, stride, dtype = part.shape, part.stride(), part.dtype
        make = partial(torch.empty_strided, shape, stride, dtype=dtype, device="meta")
        storage = part.untyped_storage()
        if storage._cdata in known or storage.nbytes() != make().untyped_storage().nbytes():
            return None
        known.add(storage._cdata)
        makers.append(make)
    return (lambda: tuple(m() for m in makers)) if isinstance(result, tuple) else makers[0]


def storages_of(model: nn.Module) -> set[int]:
    """Identities of the storages of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage()._cdata for tensor in tensors}
