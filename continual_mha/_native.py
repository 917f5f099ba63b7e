"""The native libraries: plain shared objects on LibTorch's stable ABI, loaded when first asked for.

Their operators are declared in ``ops.py``; a library registers the implementations for its device.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import devices
from .operands import RepeatedStep, is_shared
from .tracing import constant_while_compiling

_FOLDER = Path(__file__).parent / "lib"
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RUNS_ON: set[int] = set()  # devices that the CUDA library has code for
_CPU_STEPS = ("ring_step_", "ring_steps_")
_CPU_INPUT_STEPS = ("input_step_", "input_steps_")
# Where the query is among the arguments, before key and value.
_QUERY_OF_SHARED = {
    "attend_shared": 0,
    "attend_shared_full": 0,
    "attend_shared_backward": 2,
    "attend_shared_full_backward": 4,
    "attend_shared_query_backward": 4,
}
_QUERY_OF_WINDOW = {"attend_window": 0, "attend_window_backward": 2}
# Where things are among the arguments of a step, over keys and values and over inputs. Biases are
# what follows the in-projection's weights, with one matrix in it.
_BIASES = slice(6, 11)
_K_RING = 11
_Q_RING = 13
_DROPOUT = 17
_SCALES = slice(19, 21)
_INPUT_BIASES = slice(2, 7)
_X_RING = 7
_INPUT_DROPOUT = 13
_X_SCALE = slice(15, 16)
# Of ``attend_shared`` on GPUs: the heads of a block, and shared memory that every block takes.
_TILE_HEADS = 8
_TILE_BYTES = 8256


def library_path(kind: str) -> Path:
    """Where the library ``kind``, "cpu" or "cuda", lies if it was built."""
    return _FOLDER / f"continual_mha_{kind}.so"


@cache
def load(kind: str) -> str | None:
    """Load the library ``kind``; None, or why it is not there."""
    path = library_path(kind)
    if not path.exists():
        return f"the native library for {kind!r} was not built (pip install --verbose says why)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native library for {kind!r} does not load: {error}"
    return None


def why_not_cpu(name: str, *args: Any) -> str | None:
    """Why the CPU library cannot run the operator ``name`` with these arguments; None if it can."""
    query = args[0]
    if not query.is_cpu:
        return "a tensor is not on the CPU"
    if query.dtype not in _CPU_DTYPES:
        return f"no kernel for {query.dtype}"
    if name in _CPU_STEPS:
        return _why_not_biases(args[_BIASES]) or _why_not_step(args)
    if name in _CPU_INPUT_STEPS:
        return _why_not_biases(args[_INPUT_BIASES]) or _why_not_input_step(args)
    if name == "single_query":
        return _why_not_biases(args[_BIASES]) or _why_not_tile(*args[:4])
    if name in _QUERY_OF_SHARED:
        first = _QUERY_OF_SHARED[name]
        return _why_not_tile(*args[first : first + 3])
    if name in _QUERY_OF_WINDOW:
        first = _QUERY_OF_WINDOW[name]
        return _why_not_window(*args[first : first + 5])
    if name == "product_":
        return _why_not_product(args)
    return f"no kernel for {name}"


def why_not_cuda(name: str, *args: Any) -> str | None:
    """Why the CUDA library cannot run the operator ``name`` with these arguments, or None."""
    if not args[0].is_cuda:
        return "a tensor is not on a CUDA device"
    device = args[0].device
    if reason := devices.why_unfit(device) or _why_no_code(device):
        return reason
    if name == "ring_step_":
        return _why_not_cuda_step(args)
    if name in ("attend_shared", "attend_shared_backward"):
        backward = name == "attend_shared_backward"
        query, key, value, mask, sink = args[2:7] if backward else args[:5]
        return _why_not_cuda_shared(query, key, value, mask, sink, backward)
    if name == "attend_shared_query_backward":
        plain = plain_backward(args)
        if plain is None:
            return "dropout and the gradient of returned weights are not covered"
        return why_not_cuda("attend_shared_backward", *plain)
    return f"no kernel for {name}"


def plain_backward(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Of arguments of ``attend_shared_full_backward`` those that ``attend_shared_backward`` takes.

    None where it does not do: with dropout or a gradient of returned weights.
    """
    grad_average, seed = args[3], args[9]
    if grad_average is not None or seed is not None:
        return None
    return (*args[:2], *args[4:9], *args[10:12])


def query_backward(
    functions: Mapping[str, Callable[..., Any]], *args: Any
) -> tuple[Tensor, Tensor]:
    """``attend_shared_query_backward`` by the function that computes all gradients."""
    plain = plain_backward(args)
    assert plain is not None
    d_query, _, _, d_sink = functions["attend_shared_backward"](*plain)
    return d_query, d_sink


def _why_not_cuda_step(args: tuple[Any, ...]) -> str | None:
    weights, rings = args[3:_K_RING], args[_K_RING : _K_RING + 3]
    held = [x for x in (*weights, *rings) if x is not None]
    query, head_dim = args[0], rings[0].shape[3]
    if any(scale is not None for scale in args[_SCALES]):
        return "the rings are quantised"
    if query.dtype not in _CUDA_DTYPES:
        return f"no kernel for {query.dtype}"
    if any(x.dtype != query.dtype for x in (*args[1:3], *held)):
        return "tokens, weights and rings differ in dtype"
    if args[_DROPOUT] > 0.0:
        return "dropout is not covered"
    if head_dim > 256 or head_dim * query.element_size() % 16:
        return f"head_dim {head_dim} is over 256 or no multiple of 16 bytes"
    if not all(x.is_contiguous() for x in held) or any(x.data_ptr() % 16 for x in rings[:2]):
        return "a weight or a ring is not contiguous, or a ring not aligned to 16 bytes"
    if rings[2].shape[1] == 1 or max(rings[0].shape[0], rings[0].shape[2]) >= 1 << 30:
        return "the rings have a size that no module makes"
    return None


def _why_not_cuda_shared(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    backward: bool,
) -> str | None:
    value = key if value is None else value
    if query.dtype not in _CUDA_DTYPES or not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype, or there is no kernel for it"
    if any(x is not None and x.dtype not in (torch.float32, query.dtype) for x in (mask, sink)):
        return "mask or sink is neither fp32 nor of the query's dtype"
    if mask is not None and mask.dim() != 3:
        return "the mask has not three axes"
    if 0 in (*query.shape[1:], *value.shape[1:]):
        return "there is nothing to attend to"
    features = [query.shape[2], value.shape[2]] if backward else [query.shape[2]]
    device: Any = torch.cuda.get_device_properties(query.device)
    if shared_bytes(features, query.element_size()) > device.shared_memory_per_block_optin:
        return "the queries do not fit into shared memory"
    return None


def shared_bytes(features: list[int], itemsize: int) -> int:
    """Shared memory of ``attend_shared``, as ``attend_shared_bytes`` in csrc/cuda counts it.

    It holds a query, and in the backward a gradient, of each of a block's heads.
    """
    padded = sum(-(-width // 8) * 8 for width in features)
    return _TILE_HEADS * padded * itemsize + _TILE_BYTES


WHY_NOT = {"cpu": why_not_cpu, "cuda": why_not_cuda}


def _why_not_biases(weights: tuple[Tensor | None, ...]) -> str | None:
    """As the kernels copy matrices that are not contiguous, but no vectors."""
    in_bias, _, *others = weights
    if any(x is not None and not x.is_contiguous() for x in (in_bias, *others)):
        return "a bias is not contiguous"
    return None


def _why_not_step(args: tuple[Any, ...]) -> str | None:
    query = args[0]
    if args[_DROPOUT] > 0.0:
        return "dropout is not covered"
    quantised = any(scale is not None for scale in args[_SCALES])
    if quantised and query.dtype == torch.float64:
        return f"the rings are quantised, and the tokens {query.dtype}"
    ring = args[_Q_RING] if quantised else args[_K_RING]
    if not query.dtype == ring.dtype == args[3].dtype:
        return "tokens, weights and rings differ in dtype"
    return None


def _why_not_input_step(args: tuple[Any, ...]) -> str | None:
    query, weight, x_ring = args[0], args[1], args[_X_RING]
    if args[_INPUT_DROPOUT] > 0.0:
        return "dropout is not covered"
    quantised = any(scale is not None for scale in args[_X_SCALE])
    if quantised and query.dtype == torch.float64:
        return f"the ring is quantised, and the tokens {query.dtype}"
    if not query.dtype == weight.dtype == (query if quantised else x_ring).dtype:
        return "tokens, weights and ring differ in dtype"
    return None


def _why_not_tile(query: Tensor, key: Tensor, *others: Tensor | None) -> str | None:
    if any(x is not None and x.dtype != query.dtype for x in (key, *others)):
        return "query, key, value and weights differ in dtype"
    if key.shape[1] == 0:
        return "there is nothing to attend to"
    return None


def _why_not_window(query: Tensor, *others: Tensor) -> str | None:
    """Of query, key and value of a clip, and the rings of keys and values before it."""
    if any(x.dtype != query.dtype for x in others):
        return "query, key, value and rings differ in dtype"
    return None


def _why_not_product(operands: tuple[Tensor | None, ...]) -> str | None:
    """Of tokens and all weights that they are multiplied with, vectors among them as biases."""
    given = [x for x in operands if x is not None]
    if any(x.dtype != given[0].dtype for x in given):
        return "tokens and weights differ in dtype"
    if any(x.dim() == 1 and not x.is_contiguous() for x in given):
        return "a bias is not contiguous"
    return None


@constant_while_compiling
def _why_no_code(device: torch.device) -> str | None:
    """Why the CUDA library, which is loaded, does not run on this device; None if it does."""
    if not torch.cuda.is_initialized():
        return None
    return _why_no_code_on(torch.cuda.current_device() if device.index is None else device.index)


def _why_no_code_on(index: int) -> str | None:
    if index in _RUNS_ON:
        return None
    why_not = ctypes.CDLL(str(library_path("cuda"))).continual_mha_cuda_why_not
    why_not.restype = ctypes.c_char_p
    reason: bytes = why_not(index)
    if not reason:
        _RUNS_ON.add(index)
        return None
    return f"the native library does not run there ({reason.decode()})"


@cache
def _cpu_functions() -> ctypes.CDLL:
    functions = ctypes.CDLL(str(library_path("cpu")))
    functions.continual_mha_cpu_isa.restype = ctypes.c_char_p
    functions.continual_mha_cpu_use_isa.restype = ctypes.c_bool
    functions.continual_mha_cpu_unbind.argtypes = [ctypes.c_int64]
    return functions


@cache
def cpu_function(name: str) -> Callable[..., Any]:
    """An operator of the CPU library alone, which is loaded, without a call in Python around it."""
    operator = getattr(torch.ops.continual_mha, f"cpu_{name}").default
    function: Callable[..., Any] = getattr(operator, "_op", operator)
    return function


def bind_cpu_step(name: str, anew: RepeatedStep, *args: Any) -> RepeatedStep | None:
    """The step ``name`` of a token and a mask; the library holds the other ``args`` while it lives.

    It has no need of ``anew``: the library checks what it holds in every call. None where query,
    key and value are not one token, or where a weight is a view whose sign is yet to be changed: of
    that the library would hold a copy, and not see it change.
    """
    if name == "ring_step_" and not is_shared(args[:3]):
        return None
    if any(isinstance(x, Tensor) and x.is_neg() for x in args):
        return None
    bound: int = getattr(torch.ops.continual_mha, f"cpu_bind_{name}")(*args)
    run = partial(cpu_function("bound_step_"), bound)
    weakref.finalize(run, _cpu_functions().continual_mha_cpu_unbind, bound).atexit = False
    return run


def cpu_isa() -> str:
    """The CPU kernels' instruction set: "amx", "avx512_bf16", "avx512", "avx2" or "baseline"."""
    name: bytes = _cpu_functions().continual_mha_cpu_isa()
    return name.decode()


def use_cpu_isa(name: str) -> bool:
    """Run the kernels of another instruction set from now on; False if this machine lacks it."""
    return bool(_cpu_functions().continual_mha_cpu_use_isa(name.encode()))
