"""A pytest plugin that runs tests as on a GPU, as far as tensors of two devices do not mix.

`-p separate_devices --backends triton`. All memory is the CPU's, but every tensor knows where it
would lie, and plain PyTorch stands in for the kernels. What PyTorch makes out of sight, as in a
backward pass, may lie anywhere.
"""

from __future__ import annotations

from collections import ChainMap

import pytest
import torch
import torch.distributed.tensor  # which must see the true class of generators
from pretended_cuda import DEVICE, PretendedCuda, on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from continual_mha import backends, inputs, reference

# Of tensors of two devices.
MAY_MIX = (
    "copy_", "to", "type", "set_data", "view_as", "type_as", "expand_as", "__deepcopy__",
    "_has_compatible_shallow_copy_type",
)  # fmt: skip
INDEXING = ("__getitem__", "__setitem__", "index_put_", "index_put")


def _storage(x):
    try:
        return x.untyped_storage()  # the same object for all that share the memory
    except (RuntimeError, NotImplementedError):  # a sparse tensor, say, has none
        return None


def place(x):
    """ "cuda" or "cpu"; None for a tensor that may be anywhere."""
    return getattr(_storage(x), "place", None)


def put(x, where):
    """The tensor, which lies there from now on."""
    storage = _storage(x)
    if storage is not None and not x.is_meta:
        storage.place = where
    return x


def _asked(name, args, kwargs):
    """Where a call wants its result, if it says so."""
    if name in ("cpu", "cuda"):
        return name
    for x in (kwargs.get("device"), *(args[1:2] if name == "to" else ())):
        if isinstance(x, (str, int, torch.device)):
            return torch.device(x).type
        if isinstance(x, torch.Tensor):
            return place(x)
    return None


class Separate(TorchFunctionMode):
    """Tensors of different devices refuse each other."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.device or name in ("_parse_to", "__set__"):
            return func(*args, **kwargs)
        if name == "__get__":
            return self._property(func, *args)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        asked, known = _asked(name, args, kwargs), {place(x) for x in given}
        self._check(name, args, given, kwargs.get("generator"), asked)
        func = torch.Tensor.cpu if name == "cuda" else func
        out = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        where = asked or ("cuda" if "cuda" in known else None if None in known else "cpu")

        def placed(x):
            if not isinstance(x, torch.Tensor):
                return x
            if asked is not None and place(x) not in (None, asked):
                x = x.detach().clone().requires_grad_(x.requires_grad) if x.is_leaf else x.clone()
            return x if place(x) else put(x, where)

        return tree_map(placed, out)

    def _property(self, func, x):
        name = func.__self__.__name__
        if name == "device" and place(x) != "cpu" and not x.is_meta:
            return DEVICE
        if name in ("is_cuda", "is_cpu"):
            return (place(x) != "cpu") == (name == "is_cuda")
        return func(x)

    def _check(self, name, args, given, generator, asked):
        if generator is not None and generator.there != (asked == "cuda"):
            raise RuntimeError(f"Expected a '{asked}' device type for generator")
        if name in ("numpy", "__array__", "to_mkldnn") and place(given[0]) == "cuda":
            raise TypeError(f"can't take {name} of a tensor on cuda:0")
        if name in INDEXING:
            index = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)]
            mixed = place(args[0]) == "cpu" and any(place(x) == "cuda" for x in index)
        else:  # a number on the CPU may join, and what is empty
            places = {place(x) for x in given if (x.dim() or place(x) == "cuda") and x.numel()}
            mixed = places >= {"cpu", "cuda"} and name not in MAY_MIX
        if mixed:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name}")


_patch = pytest.MonkeyPatch()
PretendedCuda().stand_in(_patch)


def pytest_collection():
    """Backends of a GPU load, and run plain PyTorch."""
    load, plain = backends._load, ChainMap(vars(reference), vars(inputs))

    def pretended(name):
        loaded = load(name)
        if name not in ("triton", "cuda") or isinstance(loaded, str):
            return loaded
        return backends._Operators(plain, loaded.why_not)

    _patch.setattr(backends, "_load", pretended)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    with Separate():
        return (yield)
