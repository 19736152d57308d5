"""Counting what work takes: floating-point operations, and the memory that is held at once.

Operations are those of matrix products, convolutions and attention, a multiplication and an addition each, as torch
counts them: attention counts every query with every key, those that a mask hides too.
"""

import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Torch's counter with attention on CPUs, which its own table leaves out: `.get_total_flops()` after `with`."""
    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most bytes that tensors made during `step` hold at any time of it, what single kernels use inside apart."""
    with _Held() as held:
        step()
    return held.peak


def matmul_seconds(rows: int, inner: int, outer: int, threads: int) -> dict[str, float]:
    """What a matrix product of this machine takes in float32 and in bfloat16, the best of several tries in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best: dict[str, float] = {}
    try:
        for attempt in range(6):
            for name in ("float32", "bfloat16"):
                dtype = getattr(torch, name)
                a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, outer, dtype=dtype)
                began = time.perf_counter()
                a @ b
                if attempt:  # the first one warms up
                    best[name] = min(best.get(name, math.inf), time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return best


class _Held(TorchDispatchMode):
    """Sees every tensor that an operation makes, backward included, and when its memory is given back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}  # storages that are alive, by identity

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self.seen:  # neither a view nor in place
                    self.now += storage.nbytes()
                    self.seen[storage._cdata] = weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _freed(self, key: int, count: int) -> None:
        self.now -= count
        del self.seen[key]
