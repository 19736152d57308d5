"""A stand-in for a GPU: tensors that say they are on another device, while their numbers are here.

As with a GPU, an operation on tensors of both devices is an error (numbers without dimensions apart), and so is
numpy's view of one that is there. Their device is called `meta`, which torch knows everywhere and nothing else here
uses. So what forgets to move a tensor is found without a GPU, and results can be compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor on the stand-in."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        with torch.inference_mode(False):  # an inference tensor could not be a view of a plain one
            tensor: There = Tensor._make_wrapper_subclass(cls, here.shape, **layout, device=DEVICE)
        tensor.here = here
        return tensor

    def tolist(self) -> Any:
        return self.here.tolist()

    def new_tensor(self, *args: Any, **kwargs: Any) -> "There":
        return There(self.here.new_tensor(*args, **kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _OfNumbers(TorchFunctionMode):
    """Tensors of Python's numbers, which are made below all operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])


@contextmanager
def stand_in() -> Iterator[torch.device]:
    """While it is there: the device."""
    with pytest.MonkeyPatch.context() as patch, _OfNumbers(), _Operations():
        fused = optimizer._get_fused_kernels_supported_devices()
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused, DEVICE.type])
        yield DEVICE


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation done here, its result there if it is asked for there, or else its tensors are."""
    inputs = tree_leaves((args, kwargs))
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    is_there = [isinstance(x, There) for x in tensors]
    result_there = is_there[0] if func is torch.ops.aten.copy_.default else any(is_there)
    for device in inputs:
        if isinstance(device, torch.device):
            result_there = device == DEVICE
    if any(is_there) and func not in COPIES:
        left = [tuple(x.shape) for x, there in zip(tensors, is_there, strict=True) if not there and x.ndim]
        assert not left, f"{func}: tensors on two devices, {left} were not moved"
    known = {id(x.here): x for x in tensors if isinstance(x, There)}  # what is changed in place stays what it is
    output = func(*tree_map(brought_here, args), **tree_map(brought_here, kwargs))

    def sent_there(x: Any) -> Any:
        return known.get(id(x), There(x)) if isinstance(x, Tensor) and result_there else x

    return tree_map(sent_there, output)


def brought_here(x: Any) -> Any:
    if isinstance(x, There):
        return x.here
    return torch.device("cpu") if isinstance(x, torch.device) else x
