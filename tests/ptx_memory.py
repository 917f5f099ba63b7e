"""The memories of the machine for PTX: who may reach what, and which accesses nothing orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from ptx_machine import Machine

Array = np.ndarray
Mask = Any  # an array of bool, or None for all threads

_GUARD = 256  # bytes between tensors, which nobody may touch
_BASE = 1 << 33  # the first address of global memory: no 32-bit arithmetic reaches it


class FaultError(Exception):
    """A kernel did what the hardware does not promise anything for."""


class Memory:
    """The storages of some tensors one after the other, as a kernel's global memory.

    `read_back` copies what became of them into the tensors.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._storages: dict[int, tuple[Any, int]] = {}
        size = _GUARD
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages and storage.nbytes():
                size += -size % 512
                self._storages[storage.data_ptr()] = storage, size
                size += storage.nbytes() + _GUARD
        size += -size % 512
        self.bytes = np.zeros(size, np.uint8)
        self.usable = np.zeros(size, bool)
        for storage, start in self._storages.values():
            self.bytes[start : start + storage.nbytes()] = self._of(storage)
            self.usable[start : start + storage.nbytes()] = True

    @staticmethod
    def _of(storage: Any) -> Array:
        return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()

    def address(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return _BASE
        offset = tensor.data_ptr() - storage.data_ptr()
        return _BASE + self._storages[storage.data_ptr()][1] + offset

    def read_back(self) -> None:
        for storage, start in self._storages.values():
            self._of(storage)[:] = self.bytes[start : start + storage.nbytes()]


_SEVERAL = -2  # in place of a warp


class Space:
    """Bytes that threads reach by address, and the checks that any such have."""

    name = ""

    def __init__(self, machine: Machine, memory: Array) -> None:
        self.machine, self.bytes = machine, memory

    def never(self, lanes: Array, bad: Array, what: str) -> None:
        """An error if anything of [lanes, ...] is bad."""
        if bad.any():
            raise self.machine.fault(what, lanes[bad.reshape(len(lanes), -1).any(1)])

    def put(self, lanes: Array, at: Array, data: Array) -> None:
        self.bytes[at] = data
        self.never(lanes, self.bytes[at] != data, f"several threads write one byte of {self.name}")


def _mark(array: Array, at: Any, before: Array, warp: Array) -> None:
    """Note a reader: `warp`, or several where one has read already (`before`, or in this call)."""
    marks = np.where((before != -1) & (before != warp), _SEVERAL, warp)
    array[at] = marks
    array[at] = np.where(array[at] != marks, _SEVERAL, marks)


class Shared(Space):
    """The shared memory of every program, and what is on its way into it or out of it.

    Copies arrive when they are waited for, as late as they may; until then nobody may read there.
    Matrix units read at once, but until that is waited for nobody may write there. What threads
    stored they may read behind a fence. Of copies Triton 3.6 does not ask that, nor does this.
    """

    name = "shared memory"

    def __init__(self, machine: Machine, size: int) -> None:
        self.size = size + -size % 128
        super().__init__(machine, np.full(self.size * machine.programs, 0xA5, np.uint8))
        # who wrote each byte and who read it last, and how many barriers its program had passed
        self.writer, self.reader = (np.full(len(self.bytes), -1, np.int32) for _ in range(2))
        self.written, self.read = (np.full(len(self.bytes), -1, np.int32) for _ in range(2))
        self.coming = np.zeros(len(self.bytes), bool)
        self.multiplied = np.zeros(len(self.bytes), np.int16)
        self.unfenced = np.zeros(len(self.bytes), bool)  # not for matrix units to read yet
        self.groups = {kind: np.zeros(machine.n, np.int64) for kind in ("copies", "products")}
        # lanes, their groups, and for each lane the bytes, and what comes into them
        self.pending: dict[str, list[tuple[Array, Array, Array, Array]]] = {
            kind: [] for kind in self.groups
        }

    def at(self, lanes: Array, address: Array, size: int) -> Array:
        beyond = (address < 0) | (address + size > self.size)
        self.never(lanes, beyond, "reaches beyond the shared memory")
        self.never(lanes, address % size != 0, "reaches shared memory misaligned")
        start = self.machine.cta[lanes] * self.size + address
        return start[:, None] + np.arange(size)

    def _own(self, lanes: Array) -> tuple[Array, Array]:
        """[lanes, 1] their warps, and how many barriers they have passed."""
        barriers = self.machine.barriers[self.machine.cta[lanes]]
        return self.machine.warp[lanes][:, None], barriers[:, None]

    def load(self, lanes: Array, address: Array, size: int) -> Array:
        """[lanes, size] bytes."""
        at = self.at(lanes, address, size)
        self._there(lanes, at)
        warp, now = self._own(lanes)
        racing = (self.written[at] == now) & (self.writer[at] != warp)
        self.never(lanes, racing, "reads shared memory as another warp writes")
        _mark(self.reader, at, np.where(self.read[at] == now, self.reader[at], -1), warp)
        self.read[at] = now
        return self.bytes[at]

    def _there(self, lanes: Array, at: Array) -> None:
        self.never(lanes, self.written[at] < 0, "reads shared memory that nobody wrote")
        self.never(lanes, self.coming[at], "reads what is still being copied")

    def store(self, lanes: Array, address: Array, data: Array) -> None:
        at = self.at(lanes, address, data.shape[1])
        self._free(lanes, at, self.bytes[at] != data)
        self.put(lanes, at, data)
        self._arrive(lanes, at)
        self.unfenced[at] = True

    def _free(self, lanes: Array, at: Array, changes: Array) -> None:
        """`changes`: where a byte becomes another one; the same once more harms nobody."""
        warp, now = self._own(lanes)
        twice = (self.written[at] == now) & (self.writer[at] != warp) & changes
        self.never(lanes, twice, "writes shared memory as another warp does")
        early = (self.read[at] == now) & (self.reader[at] != warp) & changes
        self.never(lanes, early, "writes shared memory as another warp reads")
        self.never(lanes, self.coming[at], "writes what is still being copied")
        self.never(lanes, self.multiplied[at] > 0, "writes what is still being multiplied")

    def _arrive(self, lanes: Array, at: Array) -> None:
        self.writer[at], self.written[at] = self._own(lanes)

    def copy(self, lanes: Array, address: Array, data: Array) -> None:
        """Begin to copy [lanes, size] bytes to the addresses."""
        at = self.at(lanes, address, data.shape[1])
        self._free(lanes, at, np.ones(at.shape, bool))
        self.coming[at] = True
        self.pending["copies"].append((lanes, self.groups["copies"][lanes], at, data))

    def commit(self, mask: Mask, kind: str = "copies") -> None:
        self.groups[kind][slice(None) if mask is None else mask] += 1

    def wait(self, mask: Mask, behind: int, kind: str = "copies") -> None:
        """Let everything arrive but for each thread's last `behind` groups."""
        ends = self.groups[kind] - behind
        if mask is not None:
            ends = np.where(mask, ends, -1)
        left = []
        for lanes, group, at, data in self.pending[kind]:
            over = group < ends[lanes]
            if kind == "copies":
                self.coming[at[over]] = False
                self.put(lanes[over], at[over], data[over])
                self._arrive(lanes[over], at[over])
                self.unfenced[at[over]] = False
            else:
                np.subtract.at(self.multiplied, at[over], 1)
            if not over.all():
                left.append((lanes[~over], group[~over], at[~over], data[~over]))
        self.pending[kind] = left

    def fence(self, mask: Mask) -> None:
        """What these threads' programs wrote is there for the matrix units."""
        programs = self.machine.cta if mask is None else self.machine.cta[mask]
        self.unfenced.reshape(-1, self.size)[np.unique(programs)] = False

    def multiply(self, lanes: Array, address: Array) -> Array:
        """16-bit numbers at the addresses [lanes, count], which a warpgroup of each lane reads."""
        at = self.machine.cta[lanes][:, None] * self.size + address
        at = (at[..., None] + np.arange(2)).reshape(len(lanes), -1)
        beyond = (address < 0) | (address + 2 > self.size)
        self.never(lanes, beyond, "multiplies what lies beyond the shared memory")
        self._there(lanes, at)
        _, now = self._own(lanes)
        late = self.written[at] == now
        self.never(lanes, late, "multiplies what was written since the last barrier")
        self.never(lanes, self.unfenced[at], "multiplies what no fence has published")
        self.read[at], self.reader[at] = now, _SEVERAL
        np.add.at(self.multiplied, at, 1)
        group = self.groups["products"][lanes]
        self.pending["products"].append((lanes, group, at, np.zeros((len(lanes), 0))))
        return self.bytes[at].view(np.uint16)

    def end(self) -> None:
        """Nothing may be on its way when a program ends."""
        if self.pending["copies"] or self.pending["products"]:
            raise FaultError(f"{self.machine.program.name}: ends before what it began has ended")


class Global(Space):
    """The memory that all programs share, and what each knows of the others.

    `known[p, q]` is how many barriers of q lie before what p may rely on: everything that q did
    before that many. A program learns it by an atomic that acquires what another one released, and
    its other threads at their next barrier.
    """

    name = "global memory"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, machine.memory.bytes)
        count, size = machine.programs, len(self.bytes)
        # of each byte the program and the warp that wrote it, and how many barriers it had passed
        self.program, self.writer = (np.full(size, -1, np.int32) for _ in range(2))
        self.written = np.zeros(size, np.int32)
        # of each program and 4 bytes, how many it had passed when it read them, plus 1, and who
        self.read = np.zeros((count, size // 4), np.uint16)
        self.reader = np.zeros((count, size // 4), np.int32)
        self.known, self.learnt = (np.zeros((count, count), np.int64) for _ in range(2))
        self.released: dict[int, Array] = {}

    def at(self, lanes: Array, address: Array, size: int) -> Array:
        """[lanes, size] where in `bytes` these are."""
        self.never(lanes, address % (size & -size) != 0, "reaches global memory misaligned")
        at = (address - _BASE)[:, None] + np.arange(size)
        inside = (at >= 0) & (at < len(self.bytes))
        inside &= self.machine.memory.usable[np.where(inside, at, 0)]
        self.never(lanes, ~inside, "reaches beside every tensor")
        return at

    def _own(self, lanes: Array) -> tuple[Array, Array, Array]:
        """[lanes, 1] their programs, their warps, and how many barriers they have passed."""
        mine = self.machine.cta[lanes]
        barriers = self.machine.barriers[mine]
        return mine[:, None], self.machine.warp[lanes][:, None], barriers[:, None]

    def _written(self, lanes: Array, at: Array, doing: str) -> None:
        """What is there has been written before, not meanwhile."""
        mine, warp, now = self._own(lanes)
        program = self.program[at]
        foreign = (program >= 0) & (program != mine)
        if foreign.any():
            late = foreign & (self.known[mine, program] <= self.written[at])
            self.never(lanes, late, f"{doing} what another program writes")
        late = (program == mine) & (self.written[at] == now) & (self.writer[at] != warp)
        self.never(lanes, late, f"{doing} what another warp writes")

    def load(self, lanes: Array, address: Array, size: int) -> Array:
        """[lanes, size] bytes."""
        at = self.at(lanes, address, size)
        if self.machine.harmless(self.machine.at.source):
            return self.bytes[at]
        self._written(lanes, at, "reads")
        mine, warp, now = self._own(lanes)
        where = mine, at[:, ::4] // 4
        _mark(
            self.reader, where, np.where(self.read[where] == now + 1, self.reader[where], -1), warp
        )
        self.read[where] = now + 1
        return self.bytes[at]

    def store(self, lanes: Array, address: Array, data: Array) -> None:
        at = self.at(lanes, address, data.shape[1])
        changed = (self.bytes[at] != data).any(1)
        if changed.any():  # the same once more harms nobody
            some = lanes[changed]
            self._written(some, at[changed], "writes")
            mine, warp, now = self._own(some)
            words = at[changed][:, ::4] // 4
            known = self.known[mine[:, 0]].T[:, :, None]
            late = self.read[:, words] > known  # [programs, lanes, words]
            late[mine[:, 0], np.arange(len(some))] = False
            self.never(some, late.any(0), "writes what another program reads")
            late = (self.read[mine, words] == now + 1) & (self.reader[mine, words] != warp)
            self.never(some, late, "writes what another warp reads")
        self.put(lanes, at, data)
        self.program[at], self.writer[at], self.written[at] = self._own(lanes)

    def count(self, lane: int, address: int, add: Any) -> int:
        """An atomic addition to 32 bits by one thread, which acquires and releases."""
        lanes = np.array([lane])
        at = self.at(lanes, np.array([address]), 4)
        mine = int(self.machine.cta[lane])
        self.never(lanes, (self.program[at] >= 0) & (self.program[at] != mine), "counts too late")
        old = int(self.bytes[at[0]].view(np.uint32)[0])
        self.bytes[at[0]] = np.array([old + int(add)], np.uint32).view(np.uint8)
        passed = self.machine.barriers[mine]
        self.read[mine, at[0, 0] // 4] = passed  # in the order of what it releases
        before = self.released.get(address, np.zeros(self.machine.programs, np.int64))
        self.learnt[mine] = np.maximum(self.learnt[mine], before)
        own = self.known[mine].copy()
        own[mine] = passed  # what all its threads did before their last one
        self.released[address] = np.maximum(own, self.learnt[mine])
        return old

    def learn(self) -> None:
        """At a barrier one thread's knowledge becomes that of its program."""
        self.known = np.maximum(self.known, self.learnt)
