"""Streams on their way to a file, another process or another module.

A model's state is a dictionary: the state of every submodule that keeps streams, by the module's
name in the model. It holds one stream (as ``export_stream`` gives it) or all of them. The bytes are
a safetensors file whose metadata says what the tensors are; docs/streams.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ring
from .ring import InputState, QuantizedInputState, QuantizedRingState, RingState, State
from .streams import StatefulStreams, all_or_as_before, stateful_modules
from .tracing import has_numbers

FORMAT = "continual_mha.streams"
VERSION = 1
_KINDS: dict[str, Any] = {
    "kv": RingState,
    "input": InputState,
    "kv quantized": QuantizedRingState,
    "input quantized": QuantizedInputState,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
States = Mapping[str, State]


def export_stream(model: nn.Module, index: int) -> dict[str, State]:
    """Copies of one stream's state in every submodule, each of batch size 1, on the CPU.

    Raises:
        ValueError: there is no such stream, or no submodule that keeps streams.
        TypeError: ``index`` is not an integer, or ``model`` not a module.
    """
    modules = stateful_modules(model)
    return {name: _on(module.get_stream(index), "cpu") for name, module in modules.items()}


def import_stream(model: nn.Module, index: int, states: States) -> None:
    """Put a stream as ``export_stream`` returned it in the place ``index``, or change nothing.

    Raises:
        ValueError: there is no such stream, or a name, shape, dtype or formulation does not fit.
        TypeError: ``states`` is not a mapping from module names to states.
    """
    check_states(states)
    modules = stateful_modules(model)
    checked = fitted(modules, states, joins=True)
    before = {name: module.get_stream(index) for name, module in modules.items()}
    marks = {name: module.mark() for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.set_stream(index, checked[name])
    except BaseException:
        for name, module in modules.items():
            module.set_stream(index, before[name])
            module.return_to(marks[name])
        raise


def export_state(model: nn.Module) -> dict[str, State]:
    """Copies of the state of all streams in every submodule that has one, on the CPU.

    Raises:
        ValueError: there is no submodule that keeps streams.
        TypeError: ``model`` is not a module.
    """
    states = {name: module.get_state() for name, module in stateful_modules(model).items()}
    return {name: _on(state, "cpu") for name, state in states.items() if state is not None}


def import_state(model: nn.Module, states: States) -> None:
    """Set all streams as ``export_state`` returned them, or change nothing.

    Submodules that ``states`` does not name had taken no step, and begin anew.

    Raises:
        ValueError: a name, shape, dtype or formulation does not fit.
        TypeError: ``states`` is not a mapping from module names to states.
    """
    check_states(states)
    modules = stateful_modules(model)
    named = {name: module for name, module in modules.items() if name in states}
    checked = fitted(named, states)
    with all_or_as_before(list(modules.values())):
        for name, module in modules.items():
            module.set_state(checked.get(name))


def fitted(
    modules: Mapping[str, StatefulStreams], states: States, joins: bool = False
) -> dict[str, State]:
    """``states`` on the devices of ``modules``, once they are known to have the right layouts.

    Args:
        joins: whether each goes in among the streams there are, and not in their place.

    Raises:
        ValueError: a name or a state does not fit.
    """
    check_names(states, modules)
    checked = {}
    for name, module in modules.items():
        try:
            if type(states[name]) not in _NAMES:
                raise TypeError(f"it is no state, but a {type(states[name]).__name__}")
            device = module._like().device
            parts = [x for x in states[name] if isinstance(x, Tensor)]
            if has_numbers(module._like()) and not all(map(has_numbers, parts)):
                raise ValueError(f"it has no numbers that could be moved to {device}")
            state = _on(states[name], device)
            checked[name] = module._checked(state, joins)
        except (TypeError, ValueError) as error:
            where = f"module {name!r}" if name else "the module"
            raise ValueError(f"the state of {where} does not fit: {error}") from error
    return checked


def _on(state: State, device: torch.device | str) -> Any:
    parts = (x.detach().to(device) if isinstance(x, Tensor) else x for x in state[:-1])
    return ring.rebuilt(state, parts)


def check_names(states: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    """Raise a ValueError if these are not the states of modules of these names."""
    if set(states) != set(modules):
        given, own = sorted(map(str, states)) or "no module", sorted(modules) or "no module"
        raise ValueError(f"the state is that of {given}, but this model keeps it in {own}")


def check_states(states: object) -> None:
    """Raise a TypeError if ``states`` is no mapping, as a model's states are."""
    if not isinstance(states, Mapping):
        raise TypeError(
            "states must be what export returned, a mapping from modules' names to states, "
            f"but got {type(states).__name__}"
        )


def states_to_bytes(states: States) -> bytes:
    """A model's state as the bytes of a file.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``states`` is not a mapping from module names to states.
        ValueError: a state is of a kind that this package does not know.
    """
    check_states(states)
    tensors, about = {}, []
    for number, (name, state) in enumerate(sorted(states.items())):
        if type(state) not in _NAMES:
            kind = type(state).__name__
            raise ValueError(f"module {name!r} has a state that cannot be stored: {kind}")
        formulation = _NAMES[type(state)]
        entry = {"module": name, "formulation": formulation, "clock": state.clock.shape[0]}
        about.append(entry)
        for field, part in zip(state._fields[:-1], state[:-1], strict=True):
            tensors[f"{number}.{field}"] = part.detach().cpu().contiguous()
    described = json.dumps(about, sort_keys=True)
    metadata = {"format": FORMAT, "version": str(VERSION), "states": described}
    metadata["digest"] = _digest(described, tensors)
    data: bytes = _safetensors().save(tensors, metadata)
    return data


def states_from_bytes(data: bytes | bytearray | memoryview) -> dict[str, State]:
    """A model's state from what ``states_to_bytes`` made of it.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``data`` is not bytes, nor a bytearray or memoryview.
        ValueError: the bytes are damaged, cut short, of another format or of a later version.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"stored streams are bytes, but got {type(data).__name__}")
    data = bytes(data)
    metadata, load = _metadata(data), _safetensors().load
    try:
        about = json.loads(metadata["states"])
        tensors = load(data)
        if _digest(metadata["states"], tensors) != metadata["digest"]:
            raise ValueError("the checksum does not match")
        return {entry["module"]: _state(n, entry, tensors) for n, entry in enumerate(about)}
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the stored streams are damaged: {error}") from error


def _state(number: int, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    kind = _KINDS[entry["formulation"]]
    parts = [tensors[f"{number}.{field}"] for field in kind._fields[:-1]]
    state: State = kind(*parts, ring.new_clock(entry["clock"]))
    return state


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a file, if it is one of streams and of a version that is understood."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata: dict[str, str] = header["__metadata__"]
        found = metadata["format"], int(metadata["version"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError("this is no file of streams, or it is damaged") from error
    if found[0] != FORMAT:
        raise ValueError(f"this is a file of {found[0]!r}, and not of {FORMAT!r}")
    if not 1 <= found[1] <= VERSION:
        raise ValueError(f"the file is of version {found[1]}, but this package reads {VERSION}")
    return metadata


def _digest(described: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum over the description and the bytes of all tensors."""
    digest = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # reshape keeps the odd stride that an axis of one element may have, and view refuses
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "storing streams needs safetensors: pip install 'continual-mha[streams]'"
        ) from error
    return safetensors.torch


def stream_to_bytes(model: nn.Module, index: int) -> bytes:
    """One stream's state in all of ``model``, to be taken to another process.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: there is no such stream.
        TypeError: ``index`` is not an integer, or ``model`` not a module.
    """
    return states_to_bytes(export_stream(model, index))


def stream_from_bytes(model: nn.Module, index: int, data: bytes | bytearray | memoryview) -> None:
    """Put a stream from ``stream_to_bytes`` in the place ``index``, or change nothing.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: ``data`` is not bytes, nor a bytearray or memoryview.
        ValueError: the bytes are damaged, foreign, or of a model of other sizes or dtype.
    """
    import_stream(model, index, states_from_bytes(data))


def save_stream(model: nn.Module, index: int, path: str | os.PathLike[str]) -> None:
    """``stream_to_bytes`` to a file, which appears as a whole.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: there is no such stream, or at ``path`` is something else than a file.
        TypeError: ``index`` is not an integer, or ``model`` not a module.
    """
    _write(Path(path), stream_to_bytes(model, index))


def load_stream(model: nn.Module, index: int, path: str | os.PathLike[str]) -> None:
    """``stream_from_bytes`` from a file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, foreign, or of a model of other sizes or dtype.
    """
    stream_from_bytes(model, index, Path(path).read_bytes())


def save_streams(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """All streams of ``model`` to a file, which appears as a whole.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: there is no submodule that keeps streams, or at ``path`` is something else than
            a file.
    """
    _write(Path(path), states_to_bytes(export_state(model)))


def load_streams(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Set all streams from a file of ``save_streams``, or change nothing.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, foreign, or of a model of other sizes or dtype.
    """
    import_state(model, states_from_bytes(Path(path).read_bytes()))


def _write(path: Path, data: bytes) -> None:
    """Write beside and rename, so that nobody ever finds half a file, whoever else writes there."""
    path = Path(os.path.realpath(path))  # a link goes on leading there
    if path.exists() and not path.is_file():
        raise ValueError(f"streams are stored in a file, but {path} is none")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
