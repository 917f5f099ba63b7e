"""Which backend runs an operator, why, and the environment variables.

``triton`` serves CUDA tensors, ``cuda`` those cases that Triton does not cover or machines without
it; ``cpu`` is the native path for CPU tensors; ``torch`` is plain PyTorch, and runs everywhere.
"""

from __future__ import annotations

import importlib
import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from . import _native, inputs, reference
from .precision import autocast_dtype, current_autocast_dtype
from .surroundings import Block, Surrounding
from .tracing import (
    constant_while_compiling,
    is_counted,
    is_exporting,
    is_opaque,
    is_transformed,
    is_watched,
)

NAMES = ("triton", "cuda", "cpu", "torch")
_BY_DEVICE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}
# Where among the arguments of an operator `batch_invariant` is.
_BATCH_INVARIANT = {
    "ring_step_": slice(21, 22),
    "ring_steps_": slice(21, 22),
    "input_step_": slice(16, 17),
    "input_steps_": slice(16, 17),
}
# Backends that cannot be that: they multiply by a library, or divide work by the number of streams.
_ROUNDS_BY_BATCH = ("cuda", "torch")
# Types of most arguments, known at a glance not to compute in a way of their own.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float})
_WEIGHT, _STRIDED = torch.nn.Parameter, torch.strided  # every call asks for them
_PLAIN_PYTORCH: Mapping[str, Any] = ChainMap(vars(reference), vars(inputs))
EXPORTED = "an exported program may go to where this package is not"
_AUTOCAST = "autocast is on, and the kernels run in one dtype"
_COUNTED = "FlopCounterMode knows only what PyTorch's own operators cost"


def _read_environment() -> str | None:
    """``CONTINUAL_MHA_BACKEND``: the backend to force, or None."""
    name = os.environ.get("CONTINUAL_MHA_BACKEND") or "auto"
    try:
        return None if name == "auto" else _checked(name)
    except ValueError as error:
        raise ValueError(f"CONTINUAL_MHA_BACKEND: {error}") from None


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(
            f"there is no backend {name!r}; choose one of {', '.join(NAMES)}, or 'auto'"
        )
    return name


_forced: Surrounding[str | None] = Surrounding("backend", _read_environment())


class use_backend(Block[str | None]):  # noqa: N801  (a function to its users)
    """Run every attention in the ``with`` block on the backend ``name``; ``auto`` is no force.

    A forced backend that cannot run a call raises a RuntimeError that says why. That is so in
    training, too, where products with weights are PyTorch's in all but ``cpu``: ``triton`` has
    kernels for the gradients of all three forwards, ``cpu`` but for dropout in ``forward_step``
    beside extra slots or queries that wait, ``cuda`` for that of ``forward`` without returned
    weights and dropout. Attention of all queries, as with ``single_output_forward=False``, and
    weights that are not averaged over the heads have ``torch`` only. A backward goes by what
    surrounded its forward, on whatever thread it runs. Other threads and asynchronous tasks see
    nothing of it. Nor do they where compiled modules run; but while ``torch.compile`` traces a
    call, only one thread at a time may be inside such a block.

    Raises:
        ValueError: there is no backend of that name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(_forced, None if name == "auto" else _checked(name))


def run_forcing(name: str | None, function: Callable[..., Any], *args: Any) -> Any:
    """A function as where ``forced`` was this, on whatever thread."""
    return _forced.run_with(name, function, *args)


class _Operators(NamedTuple):
    """The functions of one backend by operator name, and its reasons to decline a call."""

    functions: Mapping[str, Callable[..., Any]]
    why_not: Callable[..., str | None]


@cache
def _load(backend: str) -> _Operators | str:
    """The backend, or the reason why this machine cannot have it."""
    if backend == "torch":
        return _Operators(_PLAIN_PYTORCH, lambda name, *args: None)
    if backend == "triton":
        return _load_triton()
    missing = _native.load(backend)
    functions = _NativeFunctions(backend + "_")
    if backend == "cpu":
        for name in ("ring_step_", "input_step_"):
            functions["bind_" + name] = partial(_native.bind_cpu_step, name)
    if backend == "cuda":
        functions["attend_shared_query_backward"] = partial(_native.query_backward, functions)
    return missing or _Operators(functions, _native.WHY_NOT[backend])


def _load_triton() -> _Operators | str:
    try:
        kernels = importlib.import_module(".triton_kernels", __package__)
    except Exception as error:  # one too old lacks names, others fail in the middle
        return f"Triton does not import: {type(error).__name__}: {error}"
    return _Operators(vars(kernels), kernels.why_not)


class _NativeFunctions(dict[str, Callable[..., Any]]):
    """The operators of a native library by the name they stand in for."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def __missing__(self, name: str) -> Callable[..., Any]:
        packet = getattr(torch.ops.continual_mha, self._prefix + name)
        self[name] = packet.default
        return self[name]


def available() -> tuple[str, ...]:
    """The backends that load on this machine, the preferred first."""
    return tuple(name for name in NAMES if isinstance(_load(name), _Operators))


def why_missing(backend: str) -> str | None:
    """Why ``backend`` does not load on this machine; None if it does."""
    loaded = _load(backend)
    return loaded if isinstance(loaded, str) else None


def _computes_itself(x: object) -> bool:
    """Whether it may have no numbers in memory of its own, as quantised and sharded weights."""
    plain = torch.Tensor.__torch_dispatch__
    return isinstance(x, torch.Tensor) and type(x).__torch_dispatch__ is not plain


def _asks_for_invariance(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call says that a stream's bits must not depend on the number of streams."""
    return name in _BATCH_INVARIANT and any(args[_BATCH_INVARIANT[name]])


def why_not(backend: str, name: str, args: tuple[Any, ...]) -> str | None:
    """Why ``backend`` cannot run the operator ``name`` with these arguments; None if it can."""
    loaded = _load(backend)
    if isinstance(loaded, str):
        return loaded
    invariant = _asks_for_invariance(name, args)
    if backend != "torch" and (reason := _why_torch(args[0].device.type, invariant)):
        return reason
    if backend != "torch":
        if not _PLAIN.issuperset(map(type, args)) and any(map(_computes_itself, args)):
            return "a tensor is of a class that computes in its own way"
        if any(x.layout is not _STRIDED for x in args if type(x) is _WEIGHT):
            return "a weight is sparse"
    if backend in _ROUNDS_BY_BATCH and invariant:
        return "its rounding depends on the number of streams"
    return loaded.why_not(name, *args)


def _why_torch(device_type: str, invariant: bool = False) -> str | None:
    """Why only plain PyTorch may run now, or None. To be counted is no reason where it cannot."""
    if autocast_dtype(device_type):
        return _AUTOCAST
    return _COUNTED if not invariant and is_counted() and forced() is None else None


def why_not_later(backend: str, name: str, args: tuple[Any, ...]) -> str | None:
    """``why_not``; where only the running operator can ask that, why the backend does not load."""
    return _why_missing_here(backend) if is_opaque(args[0]) else why_not(backend, name, args)


def why_plain(query: torch.Tensor) -> str | None:
    """Why no fused operator may serve in training or in ``forward``, whatever the backend."""
    if reason := _why_torch(query.device.type):
        return reason
    if is_exporting():
        return EXPORTED
    return "torch.func or torch.jit looks into its operators" if is_transformed() else None


def why_not_triton(name: str, *args: Any) -> str | None:
    """Why Triton does not run an operator; None also where only the running operator can ask."""
    return None if is_opaque(args[0]) else why_not("triton", name, args)


@constant_while_compiling
def _why_missing_here(backend: str) -> str | None:
    return why_missing(backend)


def leave_to_pytorch(name: str, reason: str) -> None:
    """Say that plain PyTorch will do what the operator ``name`` does, and for what ``reason``.

    Raises:
        RuntimeError: another backend is forced.
    """
    asked = forced()
    if asked not in (None, "torch"):
        raise RuntimeError(f"no backend can run {name}; {asked}: {reason}")


def reasons_to_leave(query: torch.Tensor, reason: str) -> list[str]:
    """As ``reasons``, of a call that ``leave_to_pytorch`` leaves for this reason."""
    first, asked = order(query.device.type)[0], forced()
    lines = [] if first == "torch" else [f"{first}: {reason}"]
    return lines if asked not in (None, "torch") else [*lines, "torch: runs it"]


def has_kernel(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a backend other than plain PyTorch runs the operator ``name`` on ``args``."""
    kernels = (backend for backend in order(args[0].device.type) if backend != "torch")
    return any(why_not(backend, name, args) is None for backend in kernels)


def order(device_type: str) -> tuple[str, ...]:
    """The backends to ask for tensors on such a device, the preferred first."""
    name = forced()
    return (name,) if name else _BY_DEVICE.get(device_type, ("torch",))


def forced() -> str | None:
    """The backend that ``use_backend`` or the environment forces, or None."""
    return _forced.last if torch.compiler.is_compiling() else _forced.get()


def same_surroundings(device_type: str) -> Callable[[], bool]:
    """A function that says whether all that decides how an operator runs on such a device, besides
    its arguments, is as it is now. Where a ``TorchDispatchMode`` watches it says no: to that a
    repeated call shows few operators."""
    name, autocast = _forced.get(), autocast_dtype(device_type)
    inference, transformed = torch.is_inference_mode_enabled(), is_transformed()
    watched = is_watched()
    casts = torch.amp.is_autocast_available(device_type)  # cannot change, and costs to ask

    def unchanged() -> bool:
        return (
            _forced.get() == name
            and torch.is_inference_mode_enabled() is inference
            and is_transformed() is transformed
            and not (watched or is_watched())
            and (not casts or current_autocast_dtype(device_type) is autocast)
        )

    return unchanged


def run(name: str, args: tuple[Any, ...]) -> Any:
    """Run the operator ``name``: by that name where it is opaque, else directly.

    An exported program holds plain PyTorch instead, unless that cannot be ``batch_invariant``, and
    so does a compiled one where autocast surrounds the call, for it does not when that runs.

    Raises:
        RuntimeError: a backend was forced that cannot run it, or none can.
    """
    if is_opaque(args[0]):
        casts, invariant = autocast_dtype(args[0].device.type), _asks_for_invariance(name, args)
        if casts and invariant:
            raise RuntimeError(f"no backend can run {name} as batch_invariant asks: {_AUTOCAST}")
        if casts or (is_exporting() and not invariant):
            leave_to_pytorch(name, _AUTOCAST if casts else EXPORTED)
            return _PLAIN_PYTORCH[name](*args)
        return getattr(torch.ops.continual_mha, name)(*args)
    return choose(name, args)(*args)


def run_directly(name: str, *args: Any) -> Any:
    """Run the operator ``name``, but never by that name.

    Raises:
        RuntimeError: a backend was forced that cannot run it.
    """
    return choose(name, args)(*args)


def run_on(backend: str, name: str, *args: Any) -> Any:
    """Run the operator ``name`` on one backend.

    Raises:
        RuntimeError: it cannot run it.
    """
    reason = why_not(backend, name, args)
    if reason is not None:
        raise RuntimeError(f"{backend} cannot run {name}: {reason}")
    loaded = _load(backend)
    assert isinstance(loaded, _Operators)
    return loaded.functions[name](*args)


def choose(name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs the operator ``name`` on ``args``.

    Raises:
        RuntimeError: a backend was forced that cannot run it.
    """
    return _chosen(name, args)[name]


def choose_again(
    name: str, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """``choose`` for steps that repeat one with ``args``, and the backend's binder of what stays.

    The binder, None where a backend has none, takes a ``RepeatedStep`` that decides anew, to fall
    back on, and ``args``. It returns a ``RepeatedStep``, or None where it cannot bind these.

    Raises:
        RuntimeError: a backend was forced that cannot run it.
    """
    functions = _chosen(name, args)
    return functions[name], functions.get("bind_" + name)


def _chosen(name: str, args: tuple[Any, ...]) -> Mapping[str, Callable[..., Any]]:
    """The functions of the backend that runs the operator."""
    for backend in order(args[0].device.type):
        if why_not(backend, name, args) is None:
            loaded = _load(backend)
            assert isinstance(loaded, _Operators)
            return loaded.functions
    raise RuntimeError(f"no backend can run {name}; " + "; ".join(reasons(name, args)))


def reasons(name: str, args: tuple[Any, ...]) -> list[str]:
    """A line for each backend that is asked for this call: that it runs it, or why not."""
    lines = []
    for backend in order(args[0].device.type):
        reason = why_not(backend, name, args)
        lines.append(f"{backend}: {reason or 'runs it'}")
        if reason is None:
            break
    return lines
