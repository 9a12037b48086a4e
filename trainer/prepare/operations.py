"""Operations of torch as they are dispatched: which compute, and what shapes they give on meta."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_COMPUTES_NOTHING = ("empty", "new_empty", "_unsafe_view", "promote_types")


@cache
def computes(func: Any) -> bool:
    """Whether an operation launches something: views and allocations do not."""
    return not (func.is_view or func.overloadpacket.__name__.startswith(_COMPUTES_NOTHING))


def question(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def repeated(result: Any, args: tuple[Any, ...]) -> Callable[[], Any] | None:
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
