"""A step as a CUDA graph: one launch from the host, whatever the model does."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from .modes import active_streams
from .streams import all_or_as_before, stateful_modules

_WARM_UP_RUNS = 3
_capturing = threading.Lock()  # torch waits for the device first, which no capture there bears


class GraphedStep:
    """``model.forward_step`` captured once and replayed: the least latency on a GPU.

    Every stream begins anew at the capture. Calling the object copies the tokens into a buffer of
    its own, replays the graph, and returns a buffer of its own, which the next call overwrites. The
    module's state advances as if ``forward_step`` had been called; ``model.reset`` works between
    replays. What replaces tensors rather than write to them ends the graph's use: ``set_state``,
    ``clean_state``, ``to``, another batch size. Weights may be changed in place.

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
        self._captured = [module._ring_position for module in self._stateful]

    def _step(self) -> Tensor:
        output: Tensor = self._model.forward_step(self._tokens)  # type: ignore[operator]
        return output

    def _capture(self) -> Tensor:
        """Run the step, with no stream active so that no state moves, and record it."""
        on_device = torch.cuda.device(self._tokens.device)
        with _capturing, on_device, torch.no_grad(), active_streams(self.active):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP_RUNS):
                        self._step()
            finally:  # what a step that failed wrote to is freed for the current stream
                torch.cuda.current_stream().wait_stream(side)
            # torch's own stream for captures stays on the device of the process's first one. What
            # another thread asks of the device meanwhile, memory say, is no part of this.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                return self._step()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Take one token per stream; the output is overwritten by the next call.

        Args:
            tokens: of the example's shape, dtype and device.

        Raises:
            ValueError: another shape or device.
            TypeError: another dtype, or no tensor.
            RuntimeError: the state was replaced since the capture.
        """
        self._check(tokens)
        for module, position in zip(self._stateful, self._captured, strict=True):
            if module._ring_position is not position:
                raise RuntimeError(
                    "the state was replaced since the capture (by set_state, clean_state or to); "
                    "make a new GraphedStep"
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
