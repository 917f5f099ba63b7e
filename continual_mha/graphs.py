"""A step as a CUDA graph: one launch from the host, whatever the model does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .modes import active_streams
from .streams import all_or_as_before, stateful_modules
from .tracing import is_plain

_WARM_UP_RUNS = 3
_capturing = threading.Lock()  # torch first waits for the device, which breaks other captures


def _parts_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any, int | None]]:
    """Each part of a stateful module: the namespace that holds it, its name, itself, and for a
    weight its address, which may become another behind the parameter."""
    for owner in module.modules():
        for parts in (owner._modules, owner._buffers, owner._parameters):
            for name, part in parts.items():
                if part is not None:
                    weight = parts is owner._parameters and is_plain(part)  # type: ignore[arg-type]
                    yield parts, name, part, part.data_ptr() if weight else None  # type: ignore


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """A graph must not read copies of weights that are freed where autocast ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class GraphedStep:
    """``model.forward_step`` captured once and replayed: the least latency on a GPU.

    Every stream begins anew at the capture. Calling the object copies the tokens into a buffer of
    its own, replays the graph, and returns a buffer of its own, which the next call overwrites. The
    module's state advances as if ``forward_step`` had been called; ``model.reset`` works between
    replays. What replaces tensors rather than write to them ends the graph's use: ``set_state``,
    ``clean_state``, ``to``, another batch size. Weights may be changed in place. Where modules that
    keep no streams get others, as from ``load_state_dict(assign=True)``, it goes on with the old.

    Args:
        model: a module on a CUDA device, built of modules with this package's state, whose
            ``forward_step`` takes one tensor ``(N, ...)`` and returns one.
        example: a tensor of the shape, dtype and device of the tokens of one step.

    Attributes:
        active: bool ``(N,)``, all True; write to it between replays to pause streams.

    Raises:
        TypeError: ``example`` is not a tensor, or the model has no ``forward_step``.
        ValueError: ``example`` is not on a CUDA device or has no axes, or the model keeps no
            streams. After these and all others the streams are where they were.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        if not isinstance(example, Tensor):
            raise TypeError(f"example must be a tensor of tokens, but got {type(example).__name__}")
        if example.device.type != "cuda":
            raise ValueError(f"CUDA graphs need tokens on a CUDA device, not on {example.device}")
        if example.dim() == 0:
            raise ValueError("example must be tokens of shape (N, ...), but has no axes")
        if not callable(getattr(model, "forward_step", None)):
            raise TypeError(f"{type(model).__name__} has no forward_step to capture")
        self._stateful = list(stateful_modules(model).values())
        self._model = model
        self._graph = torch.cuda.CUDAGraph()
        # what inference mode makes could be written to in inference mode only
        with all_or_as_before(self._stateful), torch.inference_mode(False):
            self._tokens = torch.zeros_like(example)
            self.active = torch.zeros(len(example), dtype=torch.bool, device=example.device)
            for module in self._stateful:
                module.start_streams(len(example))
            self._output = self._capture()
            self.active.fill_(True)
            # All that the graph reads stays where it is, as long as the graph does.
            self._memory = [x.detach() for x in (*model.parameters(), *model.buffers())]
            # Of the stateful modules it is asked in each call whether it is still theirs.
            self._captured = [part for module in self._stateful for part in _parts_of(module)]

    def _step(self) -> Tensor:
        output: Tensor = self._model.forward_step(self._tokens)  # type: ignore[operator]
        return output

    def _capture(self) -> Tensor:
        """Run the step, with no stream active so that no state moves, and record it."""
        on_device = torch.cuda.device(self._tokens.device)
        taken = active_streams(self.active)
        with _capturing, on_device, torch.no_grad(), taken, _without_autocast_cache():
            before = torch.cuda.current_stream()
            # Of this device, on which torch's own for captures need not be. Not one for both: what
            # libraries keep for a stream, as workspaces, is to come from the graph's memory.
            side, capturing = torch.cuda.Stream(), torch.cuda.Stream()
            side.wait_stream(before)
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP_RUNS):
                        self._step()
            finally:  # what a step that failed wrote to is freed for the current stream
                before.wait_stream(side)
            # What another thread asks of the device meanwhile, memory say, is no part of this.
            how: Any = {"stream": capturing, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(self._graph, **how):
                    return self._step()
            finally:  # where a capture stays that CUDA ends
                torch.cuda.set_stream(before)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Take one token per stream; the output is overwritten by the next call.

        Args:
            tokens: of the example's shape, dtype and device.

        Raises:
            ValueError: another shape or device.
            TypeError: another dtype, or no tensor.
            RuntimeError: the state or a weight beside it was replaced since the capture.
        """
        self._check(tokens)
        for parts, name, part, at in self._captured:
            if parts[name] is not part or (at is not None and part.data_ptr() != at):
                raise RuntimeError(
                    "the state or a weight was replaced since the capture (by set_state, "
                    "clean_state or to); make a new GraphedStep"
                )
        self._tokens.copy_(tokens.detach())
        self._graph.replay()
        return self._output

    def _check(self, tokens: object) -> None:
        """Raise what a call with these tokens must raise."""
        expected, convert = self._tokens, "convert them, or make a new GraphedStep of an example"
        if not isinstance(tokens, Tensor):
            raise TypeError(f"the graph takes a tensor, but got {type(tokens).__name__}")
        if tokens.shape != expected.shape:
            shapes = f"{tuple(expected.shape)}, but got {tuple(tokens.shape)}"
            raise ValueError(f"the graph takes tokens of shape {shapes}; {convert} of that shape")
        if tokens.dtype != expected.dtype:
            dtypes = f"{expected.dtype}, but got {tokens.dtype}"
            raise TypeError(f"the graph takes tokens of {dtypes}; {convert} of that dtype")
        if tokens.device != expected.device:
            devices = f"{expected.device}, but got some on {tokens.device}"
            raise ValueError(f"the graph takes tokens on {devices}; {convert} there")
