"""What surrounds a call: which forward ``module(...)`` means, who advances, who differentiates."""

from __future__ import annotations

import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])
CALL_MODES = ("forward", "forward_steps", "forward_step")


def checked_mode(mode: Any) -> str:
    """The name of a call mode given as name, number, or the tensor that ``continual`` uses for it.

    Raises:
        ValueError: there is no such mode.
    """
    name = mode.lower() if isinstance(mode, str) else mode
    if isinstance(mode, (int, torch.Tensor)) and 0 <= int(mode) < len(CALL_MODES):
        name = CALL_MODES[int(mode)]
    if name not in CALL_MODES:
        raise ValueError(f"call_mode must be one of {', '.join(CALL_MODES)}, but got {mode!r}")
    return str(name)


class call_mode:  # noqa: N801  (a function to its users, as in `continual`)
    """Inside ``with call_mode("forward_step"):``, calling any module makes a step.

    In every thread, as in ``continual``: where several run, set ``module.call_mode`` instead.

    Raises:
        ValueError: there is no such mode.
    """

    current: str | None = None

    def __init__(self, mode: Any) -> None:
        self.mode = checked_mode(mode)
        self._before: list[str | None] = []  # as often as the block is entered

    def __enter__(self) -> None:
        self._before.append(call_mode.current)
        call_mode.current = self.mode

    def __exit__(self, *exc_info: object) -> None:
        call_mode.current = self._before.pop()


def surrounding_mode() -> str | None:
    """The mode of the innermost ``call_mode`` block, ours or that of an imported ``continual``."""
    if call_mode.current is not None or torch.compiler.is_compiling():
        return call_mode.current
    upstream = getattr(sys.modules.get("continual.module"), "call_mode", None)
    if upstream is None or upstream.prev is None:
        return None
    return checked_mode(upstream.cur)


def make_known_upstream(kind: type) -> None:
    """Let an imported ``continual`` take modules of this class for its own, as they are.

    Its own are counted by ``ptflops``, which looks for the very class.
    """
    base = getattr(sys.modules.get("continual.module"), "CoModule", None)
    if isinstance(base, ABCMeta):
        base.register(kind)
    counted = getattr(sys.modules.get("ptflops.pytorch_ops"), "MODULES_MAPPING", None)
    if isinstance(counted, dict):
        counted[kind] = _count_for_ptflops


def _count_for_ptflops(module: Any, args: object, output: object) -> None:
    module.__flops__ += module.flops()


_active: ContextVar[Tensor | None] = ContextVar("continual_mha_active", default=None)
_active_last: Tensor | None = None  # in whichever context came last, for compiled code


@contextmanager
def active_streams(active: Tensor | None) -> Iterator[None]:
    """Inside ``with active_streams(mask):``, steps of any module advance these streams only.

    For models whose inner modules cannot be handed the ``active`` of ``forward_step``;
    ``forward_steps``, which moves all streams, raises a RuntimeError there. Other threads and
    asynchronous tasks see nothing of it, but for compiled modules: ``torch.compile`` cannot read
    what is a thread's own, so that only one at a time may use those inside such a block, which
    begins outside of them.

    Args:
        active: bool ``(N,)`` on the state's device; None for all.
    """
    global _active_last
    before = _active.get()
    _active_last = active
    _active.set(active)
    try:
        yield
    finally:
        _active.set(before)
        _active_last = before


def surrounding_active(compiling: bool) -> Tensor | None:
    """The mask of the innermost ``active_streams`` block, or None, for a call that is compiling."""
    return _active_last if compiling else _active.get()


def has_numbers(x: Tensor) -> bool:
    """Whether there is more than a shape: it is neither fake nor on the device ``meta``."""
    return not (isinstance(x, FakeTensor) or x.is_meta)


def is_opaque(x: Tensor) -> bool:
    """Whether operators on it are to be called by name, and no backend to be asked.

    That is so while ``torch.compile`` traces, which cannot look into them, and where there are no
    numbers for a kernel to compute with.
    """
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


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
