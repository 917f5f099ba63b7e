"""Streams in files and bytes: what comes back, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import EMBED, LENGTH, assert_same_state, build, draw_tokens, step_through
from safetensors.torch import save, save_file
from torch import nn

import continual_mha as co

N = 3
KINDS = {
    "kv": {"formulation": "kv"},
    "kv_delayed": {"formulation": "kv", "query_index": 1},
    "input": {"formulation": "input"},
}


def streaming(kind="kv", steps=LENGTH + 2, dtype=torch.float32, seed=0, **arguments):
    module = build(seed, **{**KINDS[kind], **arguments}).to(dtype).requires_grad_(False)
    step_through(module, draw_tokens(module, N, steps, seed=seed + 3)[0])
    return module


class Stack(nn.Module):
    """Two attentions in a row."""

    def __init__(self, **arguments):
        super().__init__()
        self.layers = nn.ModuleList([build(seed, **arguments) for seed in range(2)])
        self.requires_grad_(False)

    def forward_step(self, x):
        for layer in self.layers:
            x = layer.forward_step(x)
            if x is None:
                return None
        return x


def stack_after(steps, **arguments):
    model = Stack(**arguments)
    for token in draw_tokens(model.layers[0], N, steps)[0].unbind(1):
        model.forward_step(token)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, LENGTH - 1, 3 * LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_goes_on_in_another_module_from_a_file(kind, steps, dtype, tmp_path):
    source = streaming(kind, steps, dtype)
    target = build(**KINDS[kind]).to(dtype).requires_grad_(False)
    target.start_streams(5)
    co.save_stream(source, 1, tmp_path / "stream")
    co.load_stream(target, 4, tmp_path / "stream")
    assert_same_state(target.get_stream(4), source.get_stream(1))
    x = draw_tokens(source, N, 9, seed=8)[0]
    alone = build(**KINDS[kind]).to(dtype).requires_grad_(False)
    alone.set_state(source.get_stream(1))
    for token in x.unbind(1):
        expected = alone.forward_step(token[1:2])
        got = target.forward_step(token[[0, 1, 2, 0, 1]])
        if expected is not None:
            assert bool(target.ready[4])
            torch.testing.assert_close(got[4:], expected)


@pytest.mark.parametrize("steps", [1, LENGTH, 3 * LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_model_goes_on_from_a_file_bit_for_bit(kind, steps, tmp_path):
    """Of two layers in a row, the second may not have taken a step yet."""
    source, target = stack_after(steps, **KINDS[kind]), stack_after(2, **KINDS[kind])
    co.save_streams(source, tmp_path / "all")
    co.load_streams(target, tmp_path / "all")
    for token in draw_tokens(source.layers[0], N, 12, seed=8)[0].unbind(1):
        expected, got = source.forward_step(token), target.forward_step(token)
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(expected, got)


def test_bytes_say_what_they_are():
    data = co.stream_to_bytes(streaming("input"), 0)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    assert metadata["format"] == "continual_mha.streams"
    assert metadata["version"] == "1"
    (state,) = json.loads(metadata["states"])
    assert state["formulation"] == "input"
    assert state["module"] == ""


def test_bytes_may_come_in_any_buffer_and_nothing_else_is_taken_for_them():
    module = streaming()
    data = co.stream_to_bytes(module, 1)
    for buffer in (bytearray(data), memoryview(data)):
        for state, again in zip(
            co.states_from_bytes(buffer).values(), co.states_from_bytes(data).values(), strict=True
        ):
            assert_same_state(state, again)
    for other in (None, "stream", 3):
        with pytest.raises(TypeError, match=f"bytes, but got {type(other).__name__}"):
            co.stream_from_bytes(module, 0, other)


def test_checksum_is_the_documented_one_and_that_of_older_files():
    """Of which any other would call all of them damaged."""
    k = torch.arange(8.0).view(1, 1, 4, 2)
    state = co.RingState(k, -k, k.new_zeros(1, 0, 2), torch.tensor([3]), torch.empty(3, 0))
    data = co.states_to_bytes({"layer": state})
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    digest = hashlib.sha256(metadata["states"].encode())
    for name, part in sorted(zip(("0.k", "0.v", "0.q", "0.position"), state, strict=False)):
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        digest.update(part.contiguous().numpy().tobytes())
    assert metadata["digest"] == digest.hexdigest()
    assert metadata["digest"].startswith("fd42c9da62e57945")


def test_description_that_was_changed_is_damage():
    module = streaming()
    data = co.stream_to_bytes(module, 1)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    (entry,) = json.loads(metadata["states"])
    for changes in ({"clock": LENGTH - 1}, {"module": "other"}):
        described = json.dumps([{**entry, **changes}], sort_keys=True)
        assert_refused(module, with_metadata(data, states=described), "checksum")


def test_state_of_streams_that_train_is_stored_without_their_graph():
    module = build()
    module.forward_step(draw_tokens(module, N, 1)[0][:, 0])
    assert module.get_state().k.requires_grad
    for exported in (co.export_state(module), co.export_stream(module, 1)):
        assert not any(part.requires_grad for part in exported[""])


def with_metadata(data, **changes):
    """The same file with other metadata."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def assert_refused(module, data, words, index=0):
    before = module.get_state()
    with pytest.raises(ValueError, match=words):
        co.stream_from_bytes(module, index, data)
    assert_same_state(module.get_state(), before)


def test_damaged_bytes_are_refused_wherever_the_damage_is():
    module = streaming()
    data = co.stream_to_bytes(module, 1)
    before = module.get_state()
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        with pytest.raises(ValueError, match=r"damaged|file of|version|fit"):
            co.stream_from_bytes(module, 0, bytes(damaged))
    assert_same_state(module.get_state(), before)


def test_truncated_bytes_are_refused_whatever_is_left():
    module = streaming()
    data = co.stream_to_bytes(module, 1)
    for length in [0, 1, 8, 20, 200, len(data) // 2, len(data) - 1]:
        assert_refused(module, data[:length], "damaged")
    assert_refused(module, data + b"\0", "damaged")


def test_foreign_files_are_refused(tmp_path):
    module = streaming()
    before = module.get_state()
    save_file({"k": torch.zeros(3)}, tmp_path / "other", {"format": "pt"})
    torch.save({"k": torch.zeros(3)}, tmp_path / "pickle")
    (tmp_path / "text").write_text("To be, or not to be, that is the question.")
    for name in ("other", "pickle", "text"):
        with pytest.raises(ValueError, match="file"):
            co.load_stream(module, 0, tmp_path / name)
        with pytest.raises(ValueError, match="file"):
            co.load_streams(module, tmp_path / name)
    assert_same_state(module.get_state(), before)
    assert_refused(module, save({"k": torch.zeros(3)}), "no file of streams")
    nested = b"[" * 100_000 + b"]" * 100_000
    for header in (nested, b'{"__metadata__": {"format": "f", "version": 1e999}}', b"[]"):
        data = len(header).to_bytes(8, "little") + header
        assert_refused(module, data, "no file of streams")


def test_other_versions_and_formats_are_refused():
    module = streaming()
    data = co.stream_to_bytes(module, 1)
    co.stream_from_bytes(module, 0, with_metadata(data))
    assert_refused(module, with_metadata(data, version="2"), "version 2")
    assert_refused(module, with_metadata(data, version="0"), "version 0")
    assert_refused(module, with_metadata(data, format="other"), "'other'")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"kind": "input"}, "does not fit"),
        ({"sequence_len": LENGTH + 1}, "shape"),
        ({"num_heads": 1}, "shape"),
        ({"embed_dim": 2 * EMBED}, "shape"),
        ({"query_index": 0}, "shape"),
        ({"dtype": torch.float64}, "float32"),
    ],
    ids=str,
)
def test_streams_of_another_kind_of_module_are_refused(other, words):
    data = co.stream_to_bytes(streaming(**other), 1)
    assert_refused(streaming(), data, words)


def test_streams_of_another_model_are_refused():
    stack, module = stack_after(4 * LENGTH), streaming()
    before = [layer.get_state() for layer in stack.layers]
    assert_refused(module, co.stream_to_bytes(stack, 0), r"layers\.0")
    with pytest.raises(ValueError, match=r"layers\.0"):
        co.stream_from_bytes(stack, 0, co.stream_to_bytes(module, 0))
    states = co.export_stream(stack, 1)
    states["layers.1"] = co.export_stream(streaming(sequence_len=7), 0)[""]
    with pytest.raises(ValueError, match=r"layers\.1"):
        co.import_stream(stack, 0, states)
    for layer, state in zip(stack.layers, before, strict=True):
        assert_same_state(layer.get_state(), state)


def test_what_is_no_state_is_refused_and_changes_nothing():
    module = streaming()
    before, one = module.get_state(), co.export_stream(module, 1)[""]
    spoilt = [
        (None, "it is no state, but a NoneType"),
        ((1, 2), "it is no state, but a tuple"),
        (one._replace(position=None), "state.position must be a tensor"),
        (one._replace(clock=None), "state.clock must be a tensor"),
        (one._replace(position=one.position[0]), r"state.position must have shape \(N,\)"),
    ]
    pool = co.StreamPool(streaming(), 2, (module.embed_dim,))
    for state, words in spoilt:
        for call in (
            lambda states: co.import_stream(module, 0, states),
            lambda states: co.import_state(module, states),
            pool.restore,
        ):
            with pytest.raises(ValueError, match=words):
                call({"": state})
    with pytest.raises(TypeError, match=r"mapping .*, but got NoneType"):
        co.import_stream(module, 0, None)
    with pytest.raises(TypeError, match=r"mapping .*, but got NoneType"):
        co.import_state(module, None)
    assert_same_state(module.get_state(), before)
    assert pool.statistics().open == 0


def test_names_and_positions_that_are_none_are_refused():
    pool = co.StreamPool(build(), 1, (EMBED,))
    states = pool.export(pool.open())
    pool.close(0)
    with pytest.raises(ValueError, match="the state is that of"):
        pool.restore({0: states[""], "a": states[""]})
    lost = states[""]._replace(position=states[""].position.to("meta"))
    with pytest.raises(ValueError, match="does not fit"):
        pool.restore({"": lost})
    assert pool.statistics().open == 0


def test_import_that_fails_in_the_second_module_changes_nothing(monkeypatch):
    stack = stack_after(LENGTH + 1)
    before = [layer.get_state() for layer in stack.layers]
    states = co.export_stream(stack_after(3 * LENGTH), 1)
    second = stack.layers[1]
    real = second.set_stream
    calls = []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(second, "set_stream", fails_once)
    with pytest.raises(MemoryError):
        co.import_stream(stack, 0, states)
    monkeypatch.undo()
    twin = copy.deepcopy(stack)
    for layer, state in zip(twin.layers, before, strict=True):
        layer.set_state(state)
    for token in draw_tokens(second, N, 12, seed=8)[0].unbind(1):
        expected, got = twin.forward_step(token), stack.forward_step(token)
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(expected, got)


def test_import_of_all_streams_that_fails_in_the_second_module_changes_nothing(monkeypatch):
    def fails(state):
        raise MemoryError

    stack = stack_after(LENGTH + 1)
    before = [layer.get_state() for layer in stack.layers]
    rings = [layer._ring_position for layer in stack.layers]
    states = co.export_state(stack_after(3 * LENGTH))
    monkeypatch.setattr(stack.layers[1], "set_state", fails)
    with pytest.raises(MemoryError):
        co.import_state(stack, states)
    for layer, state, ring in zip(stack.layers, before, rings, strict=True):
        assert_same_state(layer.get_state(), state)
        assert layer._ring_position is ring  # what was captured as a graph still goes on from it


def test_stream_that_does_not_exist_is_refused(tmp_path):
    module = streaming()
    data = co.stream_to_bytes(module, 1)
    assert_refused(module, data, "streams 0 to 2", index=N)
    with pytest.raises(ValueError, match="streams 0 to 2"):
        co.save_stream(module, N, tmp_path / "stream")
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    module = streaming()
    co.save_stream(module, 0, tmp_path / "stream")
    before = (tmp_path / "stream").read_bytes()

    def no_space(*args):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        co.save_stream(module, 1, tmp_path / "stream")
    assert (tmp_path / "stream").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_that_store_in_one_file_leave_a_whole_one(tmp_path):
    module, path = streaming(), tmp_path / "stream"
    co.save_stream(module, 0, path)
    stop = threading.Event()

    def store(index):
        while not stop.is_set():
            co.save_stream(module, index, path)

    with ThreadPoolExecutor(3) as pool:
        stores = [pool.submit(store, index) for index in range(3)]
        try:
            for _ in range(50):
                co.states_from_bytes(path.read_bytes())
        finally:
            stop.set()
        for done in stores:
            done.result()
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_goes_on_leading_to_the_file(tmp_path):
    module, path, link = streaming(), tmp_path / "stream", tmp_path / "link"
    link.symlink_to(path)
    co.save_stream(module, 0, link)
    assert link.is_symlink()
    co.load_stream(module, 1, path)


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match="in a file"):
            co.save_streams(streaming(), path)
    assert pipe.is_fifo()


def test_without_safetensors_nothing_is_called_damaged(monkeypatch):
    module = streaming()
    data = co.stream_to_bytes(module, 0)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (
        lambda: co.states_from_bytes(data),
        lambda: co.stream_from_bytes(module, 0, data),
        lambda: co.stream_to_bytes(module, 0),
    ):
        with pytest.raises(ImportError, match="needs safetensors"):
            call()


def test_file_for_which_there_is_no_memory_is_not_called_damaged(monkeypatch):
    def load(data):
        raise MemoryError

    data = co.stream_to_bytes(streaming(), 0)
    monkeypatch.setattr("safetensors.torch.load", load)
    with pytest.raises(MemoryError):
        co.states_from_bytes(data)


def test_model_without_streams_is_refused():
    with pytest.raises(ValueError, match="no module that keeps streams"):
        co.export_state(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch.nn.Module, but got NoneType"):
        co.export_state(None)


def test_positions_of_odd_strides_are_stored():
    module, other = build(), build()
    for each in (module, other):
        each.start_streams(1)
    state = module.get_state()
    positions = torch.stack([state.position] * 2, dim=1)
    module.set_state(state._replace(position=positions[:, 0]))
    co.stream_from_bytes(other, 0, co.stream_to_bytes(module, 0))
    assert_same_state(other.get_state(), module.get_state())


def test_rings_of_odd_strides_are_stored():
    module, other = streaming(), streaming(seed=1)
    state = module.get_state()
    odd = state._replace(k=state.k.mT.contiguous().mT)
    assert not odd.k.is_contiguous()
    co.import_state(other, co.states_from_bytes(co.states_to_bytes({"": odd})))
    assert_same_state(other.get_state(), state)
