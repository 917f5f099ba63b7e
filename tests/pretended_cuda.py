"""A CUDA device made of the CPU, so that code for GPUs runs where there is none.

Tensors lie on the CPU and say that they are on `cuda:0`; whoever asks for memory there gets it from
the CPU. A graph is captured as the operations that PyTorch dispatches, and replayed by running them
again on the same tensors. What capture forbids on a GPU fails here too: reading a tensor's value,
and waiting for the device. What a captured call returns is poisoned with NaN until the first
replay, for a GPU would not have computed it yet.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
_base = torch._C.TensorBase
_DIVISIONS = (torch.div, torch.Tensor.div, torch.Tensor.__truediv__)
_WAITS_FOR_DEVICE = ("_local_scalar_dense", "nonzero", "masked_select")


def on_cpu(x):
    """Devices as PyTorch can serve them here."""
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


class _Generator(torch.Generator):
    """One of the CPU's that knows where it was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.there = torch.device(device).type == "cuda"
        return made


class _Memory(TorchFunctionMode):
    """Whoever asks for memory on the device gets the CPU's; only its generators draw there.

    Where one divides by a number, it multiplies with the inverse, as a GPU does.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:  # a name, and no memory yet
            return func(*args, **kwargs)
        device, generator = kwargs.get("device"), kwargs.get("generator")
        there = generator is not None and on_cpu(device) is not device
        if there and not getattr(generator, "there", False):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if func in _DIVISIONS and isinstance(args[1], (int, float)):
            func, args = torch.mul, (args[0], 1 / args[1])
        args = tuple(on_cpu(x) for x in args)
        kwargs = {name: on_cpu(x) for name, x in kwargs.items()}
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


@contextmanager
def _below_autograd():
    """A device knows nothing of gradients, nor of tensors that only inference may write to."""
    with torch.inference_mode(), torch._C._AutoDispatchBelowAutograd():
        yield


class Graph:
    """The operations of a capture, in order; a stand-in for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations = []
        self.replays = 0

    def replay(self):
        assert self.operations, "replayed before the capture ended"
        self.replays += 1
        with _below_autograd():
            for func, args, kwargs, outputs in self.operations:
                for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    """Writes down what is dispatched, and runs it."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in _WAITS_FOR_DEVICE:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.graph.operations.append((func, args, kwargs, tree_leaves(out)))
        return out

    def poison(self):
        """NaN in whatever the capture made and did not get."""
        given, made = set(), {}
        for _, args, kwargs, outputs in self.graph.operations:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            given |= {_memory(x) for x in tensors} - made.keys()
            for x in outputs:
                if isinstance(x, torch.Tensor) and _memory(x) not in given:
                    made.setdefault(_memory(x), []).append(x)
        with _below_autograd():
            for x in (x for tensors in made.values() for x in tensors):
                if x.is_floating_point():
                    x.fill_(float("nan"))


def _memory(x):
    return x.untyped_storage().data_ptr()


class _Stream:
    cuda_stream = 1

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


_DEFAULT_STREAM = _Stream()


class PretendedCuda:
    """What stands in for `torch.cuda`.

    Attributes:
        graphs: those that were captured.
        log: "record" for each event and "synchronize" for each wait; tests may add to it.
        clock: seconds, read when an event is recorded.
    """

    def __init__(self):
        self.graphs = []
        self.log = []
        self.clock = time.perf_counter
        self.capturing = False

    def synchronize(self, device=None):
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing: synchronize")
        self.log.append("synchronize")

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert not self.capturing
        self.capturing = True
        capture = _Capture(graph)
        try:
            with capture:
                yield
        finally:
            self.capturing = False
        capture.poison()
        self.graphs.append(graph)

    def event(self):
        device = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream=None):
                device.log.append("record")
                self.at = device.clock()

            def elapsed_time(self, end):
                assert device.log[-1] == "synchronize", "the device was not waited for"
                return 1e3 * (end.at - self.at)

        return Event

    def stand_in(self, patch):
        """Patch ``torch.cuda``, and the class of generators."""
        properties = SimpleNamespace(
            name="Pretended GPU", major=9, minor=0, multi_processor_count=132,
            L2_cache_size=1 << 16, shared_memory_per_block_optin=227 << 10,
        )  # fmt: skip
        for name, value in {
            "is_available": lambda: True,
            "synchronize": self.synchronize,
            "current_stream": lambda device=None: _DEFAULT_STREAM,
            "Stream": _Stream,
            "set_stream": lambda stream: None,
            "stream": lambda stream: _Memory(),  # on whatever thread asks for memory there
            "device": lambda device: nullcontext(),
            "Event": self.event(),
            "CUDAGraph": Graph,
            "graph": self.graph,
            "is_current_stream_capturing": lambda: self.capturing,
            "current_device": lambda: 0,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (9, 0),
            "mem_get_info": lambda device=None: (1 << 32, 1 << 32),
            "empty_cache": lambda: None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)

    @contextmanager
    def in_place(self):
        """PyTorch with this device."""

        def device_of(x):
            real = _base.device.__get__(x)
            return DEVICE if real.type == "cpu" else real

        with pytest.MonkeyPatch.context() as patch:
            self.stand_in(patch)
            patch.setattr(torch.Tensor, "device", property(device_of), raising=False)
            patch.setattr(torch.Tensor, "is_cuda", property(lambda x: True), raising=False)
            with _Memory():
                yield self
