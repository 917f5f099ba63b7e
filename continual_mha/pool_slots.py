"""The slots of a pool: rows of one batch, or whole states for models that step streams singly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import storage
from .graphs import GraphedStep
from .modes import active_streams
from .streams import StatefulStreams, all_or_as_before, stateful_modules


class Slots(Protocol):
    """The states of a pool's streams by slot, and the model that steps them."""

    @property
    def modules(self) -> Mapping[str, Any]:
        """Those of the model that keep states, by name."""

    def begin(self, slot: int) -> None:
        """Let a stream begin in a slot, as one that has seen nothing."""

    def put(self, slot: int, states: Mapping[str, Any]) -> None:
        """Let a stream go on in a slot from what ``get`` returned, or change nothing."""

    def get(self, slot: int) -> dict[str, Any]:
        """Copies of a slot's states on the CPU, by the names of the model's modules."""

    def mark(self) -> Any:
        """What ``return_to`` needs to undo the next step."""

    def return_to(self, mark: Any) -> None:
        """Undo what happened since ``mark``: nothing, or one step, whole or in part."""

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """One step with these tokens by slot; the outputs by slot of those that have one."""


class Batched:
    """Slots that are rows of one batch, for models whose modules all keep streams apart."""

    def __init__(self, model: nn.Module, example: Tensor, graph: bool) -> None:
        self._model = model
        self.modules = stateful_modules(model)
        self._tokens = example
        self._run: Callable[[Tensor], Tensor | None]
        if graph:
            graphed = GraphedStep(model, example)
            self._run, self._active = graphed, graphed.active
        else:
            with all_or_as_before(list(self.modules.values())):
                for module in self.modules.values():
                    module.start_streams(example.shape[0])
            self._run = model.forward_step  # type: ignore[assignment]
            self._active = torch.zeros(example.shape[0], dtype=torch.bool, device=example.device)

    def begin(self, slot: int) -> None:
        mask = torch.zeros_like(self._active)
        mask[slot] = True
        for module in self.modules.values():
            module.reset(mask)
        self._tokens[slot].zero_()

    def put(self, slot: int, states: Mapping[str, Any]) -> None:
        storage.import_stream(self._model, slot, states)

    def get(self, slot: int) -> dict[str, Any]:
        return storage.export_stream(self._model, slot)

    def mark(self) -> list[Any]:
        return [module.mark() for module in self.modules.values()]

    def return_to(self, mark: list[Any]) -> None:
        for module, before in zip(self.modules.values(), mark, strict=True):
            module.return_to(before)

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        alone = active_streams(self._active)
        try:
            return self._step(tokens, alone)
        except BaseException:
            alone.leave()
            raise

    def _step(self, tokens: Mapping[int, Tensor], alone: active_streams) -> dict[int, Tensor]:
        slots = _sent(torch.tensor(list(tokens)), self._tokens.device)
        with torch.no_grad(), alone:
            self._tokens.index_copy_(0, slots, _stacked(tokens.values(), self._tokens.device))
            self._active.zero_().index_fill_(0, slots, True)
            out = self._run(self._tokens)
            if out is None:
                return {}
            _check_rows(out, len(self._tokens))
            return dict(zip(tokens, out.index_select(0, slots).unbind(), strict=True))


def _check_rows(out: object, rows: int) -> None:
    """Raise a TypeError if a model's output is not one tensor of so many rows."""
    if not isinstance(out, Tensor) or out.shape[:1] != (rows,):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(
            f"the model's forward_step must return None or one tensor of shape ({rows}, ...), "
            f"but returned {given}"
        )


def _stacked(tokens: Iterable[Tensor], device: torch.device) -> Tensor:
    """Tokens as one tensor on ``device``, in one transfer if they are all in one place."""
    tokens = list(tokens)
    if len({token.device for token in tokens}) > 1:
        tokens = [token.to(device) for token in tokens]
    return _sent(torch.stack(tokens), device)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor made for this on ``device``, without waiting for a GPU to have read it."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class OneByOne:
    """Slots that each hold a whole state, for models with modules that know only one clock."""

    def __init__(self, model: nn.Module, foreign: list[str], device: torch.device) -> None:
        ours = [name for name, m in model.named_modules() if isinstance(m, StatefulStreams)]
        self._model: Any = model
        self._device = device
        self.modules: dict[str, Any] = {n: model.get_submodule(n) for n in [*ours, *foreign]}
        self._states: dict[int, dict[str, Any]] = {}

    def begin(self, slot: int) -> None:
        self._states[slot] = dict.fromkeys(self.modules)

    def put(self, slot: int, states: Mapping[str, Any]) -> None:
        storage.check_names(states, self.modules)
        ours = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, StatefulStreams) and states[name] is not None
        }
        begun = {name: states[name] for name in ours}
        storage.fitted(ours, begun)
        for name, state in begun.items():
            if state.position.shape[0] != 1:
                streams = f"{state.position.shape[0]} streams, and not of one"
                raise ValueError(f"the state of module {name!r} does not fit: it is of {streams}")
        self._states[slot] = {name: _copy(state, self._device) for name, state in states.items()}

    def get(self, slot: int) -> dict[str, Any]:
        return {name: _copy(state, "cpu") for name, state in self._states[slot].items()}

    def mark(self) -> dict[int, dict[str, Any]]:
        return dict(self._states)

    def return_to(self, mark: dict[int, dict[str, Any]]) -> None:
        self._states = mark

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        outputs = {}
        for slot, token in tokens.items():
            for name, module in self.modules.items():
                state = self._states[slot][name]
                module.clean_state() if state is None else module.set_state(_copy(state))
            with torch.no_grad():
                out = self._model.forward_step(token.unsqueeze(0).to(self._device))
            self._states[slot] = {n: _copy(m.get_state()) for n, m in self.modules.items()}
            if out is not None and type(out).__name__ != "TensorPlaceholder":  # that of continual
                _check_rows(out, 1)
                outputs[slot] = out[0]
        return outputs


def _copy(state: Any, device: torch.device | str | None = None) -> Any:
    """A copy of a tree of tensors; its clock, which has no bytes, stays where it is."""
    if isinstance(state, Tensor):
        return state.detach().to(device or state.device, copy=True)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        parts = zip(state._fields, state, strict=True)
        return type(state)(*(x if _is_clock(name, x) else _copy(x, device) for name, x in parts))
    if isinstance(state, (tuple, list)):
        return type(state)(_copy(part, device) for part in state)
    if isinstance(state, dict):
        return {name: _copy(part, device) for name, part in state.items()}
    return state


def _is_clock(name: str, part: Any) -> bool:
    return name == "clock" and isinstance(part, Tensor) and part.numel() == 0


def check_model(model: nn.Module, graph: bool) -> list[str]:
    """Names of the modules because of which streams step one by one; none where they are rows.

    Raises:
        ValueError: it keeps no streams, or state that nobody can read, or mixes streams; or
            ``graph`` is asked of streams that step one by one.
        TypeError: it has no ``forward_step``.
    """
    foreign = _foreign_modules(model)
    if not foreign:
        stateful_modules(model)  # or there is nothing to serve
    if not callable(getattr(model, "forward_step", None)):
        raise TypeError(
            "the model must have a forward_step, which takes a token through its modules, but "
            f"{type(model).__name__} has none"
        )
    if mixing := _mixes_streams(model):
        raise ValueError(f"{mixing}, of which a pool serves each alone")
    if foreign and graph:
        raise ValueError(f"no graph of a model that is stepped stream by stream: {foreign[0]}")
    return foreign


def _foreign_modules(model: nn.Module) -> list[str]:
    """Names of modules that keep a state by ``get_state`` and ``set_state`` and not by streams.

    Raises:
        ValueError: one has a state that cannot be read or set.
    """
    upstream = getattr(sys.modules.get("continual.module"), "CoModule", None)
    found = []
    for name, module in model.named_modules():
        if not _keeps(module, upstream) or isinstance(module, StatefulStreams):
            continue
        readable = _own(module, "get_state", upstream) and _own(module, "set_state", upstream)
        if not readable and any(_keeps(m, upstream) for m in module.children()):
            continue  # what it keeps, they do
        if not readable:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) keeps a state that cannot be read and "
                "set: it has clean_state, but not get_state and set_state"
            )
        found.append(name)
    return found


def _mixes_streams(model: nn.Module) -> str | None:
    """Which module's output for a row of a batch depends on the others, and why; None if none's."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or module.running_mean is None:
            why = "call eval()" if module.running_mean is not None else "it keeps no statistics"
            return f"module {name!r} ({type(module).__name__}; {why}) normalises over streams"
    return None


def _keeps(module: nn.Module, upstream: type | None) -> bool:
    """Whether it, or a module inside, keeps a state."""
    if isinstance(module, StatefulStreams):
        return True
    names = ("get_state", "set_state", "clean_state")
    itself = any(_own(module, name, upstream) for name in names) and not _says_none(module)
    return itself or any(_keeps(child, upstream) for child in module.children())


def _says_none(module: nn.Module) -> bool:
    """Whether its ``_state_shape``, as in ``continual``, tells that there is no state."""
    shapes: list[Any] = [getattr(module, "_state_shape", 1)]
    while shapes and isinstance(shapes[-1], list):
        shapes.extend(shapes.pop())
    return all(shape == 0 for shape in shapes)


def _own(module: nn.Module, name: str, upstream: type | None) -> bool:
    """Whether the module's class itself has this method, and not only by ``continual``'s base."""
    method = getattr(type(module), name, None)
    return callable(method) and method is not getattr(upstream, name, None)


def receptive_field_of(model: nn.Module) -> int:
    """Tokens that an output depends on: as the model says, or for its modules in a row."""
    own = getattr(model, "receptive_field", None)
    if isinstance(own, (int, Tensor)):
        return int(own)
    fields = [m._layout().sequence_len for m in model.modules() if isinstance(m, StatefulStreams)]
    return 1 + sum(length - 1 for length in fields)
