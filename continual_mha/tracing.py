"""Who looks into a call (compilers, transforms, autograd), and what kind of tensors it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Where a FlopCounterMode is from: not asked for the class, for torch's imports Triton.
_FLOP_COUNTERS = ("torch.utils.flop_counter", "ptflops.aten_engine")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def has_numbers(x: Tensor) -> bool:
    """Whether there is more than a shape: it is neither fake nor on the device ``meta``."""
    return not (isinstance(x, FakeTensor) or x.is_meta)


def is_opaque(x: Tensor) -> bool:
    """Whether operators on it are to be called by name, and no backend to be asked.

    That is so while ``torch.compile`` traces, which cannot look into them, and where there are no
    numbers for a kernel to compute with.
    """
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def is_fixed(size: int) -> bool:
    """Whether what is compiled, if anything is, is for this size alone."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def constant_while_compiling(function: _Function) -> _Function:
    """As ``torch.compiler.assume_constant_result``, which imports all of the compiler for that."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_compiling
def is_exporting() -> bool:
    """Whether ``torch.export`` traces.

    Asked while it traces: some versions of the compiler take torch's function to be true always.
    """
    return torch.compiler.is_exporting()


# Private to torch: where one is not there, operators are taken as they are found.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_tracing_state = getattr(torch._C, "_get_tracing_state", lambda: None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)


def is_transformed() -> bool:
    """Whether ``torch.func`` transforms, forward mode differentiates, or ``torch.jit`` traces.

    They look into every operator and know no formula for those of this package: ``grad`` refuses
    them, ``vmap`` runs a step once for every sample on one and the same state, and forward mode,
    which goes on where gradients are disabled, too, takes what they return for constant. A trace
    may go to where this package is not.
    """
    transformed = forward_ad._current_level >= 0 or _transforms_are_active()
    return transformed or _tracing_state() is not None


def is_watched() -> bool:
    """Whether a ``TorchDispatchMode`` sees the operators that run."""
    return bool(_dispatch_modes())


@constant_while_compiling
def is_counted() -> bool:
    """Whether ``torch.utils.flop_counter``, or ``ptflops`` by such a mode, counts, which knows
    PyTorch's own operators alone.

    ``torch.compile`` does not trace where it does.
    """
    if not is_watched():
        return False
    return any(type(x).__module__ in _FLOP_COUNTERS for x in _get_current_dispatch_mode_stack())


def makes_program() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` makes a program of what is called.

    It keeps what was written to buffers that were there before, and no others.
    """
    return _tracing_state() is not None or is_exporting()


@constant_while_compiling
def makes_onnx() -> bool:
    """Whether that program goes to ONNX, which keeps nothing from one run to the next."""
    return torch.onnx.is_in_onnx_export()


def is_plain(x: Tensor) -> bool:
    """Whether its elements lie in memory by strides: neither sparse, nor nested, nor MKLDNN's."""
    return x.layout is torch.strided and not x.is_nested


def how_stored(x: Tensor) -> str:
    """What a tensor is called that ``is_plain`` says no to."""
    return "a nested one" if x.is_nested else f"one of {x.layout}"


def needs_gradient(arguments: Iterable[object]) -> bool:
    """Whether autograd follows a function of these arguments, tensors among them."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments
    )


def is_batched(x: Tensor | None) -> bool:
    """Whether it stands for many gradients at once, as with ``is_grads_batched`` of ``grad``.

    Only operators that return new tensors take such a one.
    """
    return x is not None and bool(_is_batched(x))
