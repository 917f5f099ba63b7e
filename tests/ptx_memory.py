"""The memories of the machine for PTX: who may reach what, and which accesses nothing orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from ptx_machine import Machine

Array = np.ndarray
Mask = Any  # an array of bool, or None for all threads

_GUARD = 256  # bytes between tensors, which nobody may touch
_BASE = 1 << 33  # the first address of global memory: no 32-bit arithmetic reaches it
_SHARED = 1 << 32  # of the shared memory of program 0, among generic addresses
_WINDOW = 1 << 18  # from there to that of the next program


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


class Order:
    """What lies before what, of the accesses of all threads.

    A *time* is twice the number of barriers that a thread's program has passed, its start being the
    first, and 1 more once the thread has arrived at the next barrier of its cluster. Never is 0.
    `known[p, q]` is a time of q: all that q
    did before it lies before whatever p does now. A program learns it by an atomic that acquires
    what another one released, and its other threads at their next barrier; or at a barrier of its
    cluster. `executed[p, q]` is the same where only that matters that q has come so far: behind an
    arrival that releases nothing, too.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        count = machine.programs
        self.barriers = np.ones(count, np.int64)
        self.known, self.learnt, self.executed = (np.ones((count, count), int) for _ in range(3))
        self.visited = np.zeros((count, count), int)  # when q's shared memory was last reached by p
        self.released: dict[int, Array] = {}  # by atomics at an address

    def begin(self) -> None:
        """The machine's threads are others, who have done nothing yet."""
        count = self.machine.n
        self.arrived, self.releasing = np.zeros(count, int), np.zeros(count, bool)
        # Of each thread the time of its last fence and which of `fences` says what it knew, and
        # what it observed by atomics that do not acquire, until a fence does.
        self.fences: list[Array] = []
        self.fenced, self.fence_times = (np.zeros(count, int) for _ in range(2))
        self.observed: dict[int, Array] = {}

    def own(self, lanes: Array) -> tuple[Array, Array, Array]:
        """[lanes, 1] their programs, their warps, and the times."""
        mine = self.machine.cta[lanes]
        start = 2 * self.barriers[mine]
        times = start + (self.arrived[lanes] == start)
        return mine[:, None], self.machine.warp[lanes][:, None], times[:, None]

    def unordered(self, lanes: Array, program: Array, warp: Array, time: Array) -> Array:
        """[lanes, ...] which accesses, if there were any, do not lie before what the lanes do."""
        mine, own_warp, now = self.own(lanes)
        beside = (time >> 1 == now >> 1) & (warp != own_warp)
        foreign = (program != mine) & (time > 0)
        if not foreign.any():
            return beside
        return np.where(foreign, self.known[mine, program] <= time, beside)

    def visit(self, lanes: Array, program: Array) -> None:
        """These reach the shared memory of other programs, which have to be there."""
        mine, _, now = (x[:, 0] for x in self.own(lanes))
        cluster = self.machine.cluster
        for what, bad in (
            ("another cluster", mine // cluster != program // cluster),
            ("a program that may not have begun", self.executed[mine, program] == 1),
        ):
            if bad.any():
                raise self.machine.fault(f"reaches shared memory of {what}", lanes[bad])
        np.maximum.at(self.visited, (mine, program), now)

    def end(self) -> None:
        """No program may end while others reach its shared memory."""
        for p, q in np.argwhere(self.visited >= self.executed.T):
            what = f"program {p} reaches shared memory of program {q}, which may have ended"
            raise FaultError(f"{self.machine.program.name}: {what}")

    def fence(self, mask: Mask) -> None:
        """What these threads know is what their next atomics release, if those do not themselves.

        And they acquire what they observed.
        """
        lanes = np.arange(self.machine.n) if mask is None else np.flatnonzero(mask)
        self.fenced[lanes] = len(self.fences)
        self.fences.append(self.known.copy())
        self.fence_times[lanes] = 2 * self.barriers[self.machine.cta[lanes]]
        for lane in set(self.observed).intersection(lanes.tolist()):
            self._learn(int(self.machine.cta[lane]), self.observed.pop(lane))

    def _learn(self, program: int, known: Array) -> None:
        self.learnt[program] = np.maximum(self.learnt[program], known)

    def exchange(self, lane: int, address: int, acquires: bool, releases: bool) -> None:
        """By an atomic of one thread; the next one there observes what any has released so far."""
        mine = int(self.machine.cta[lane])
        nothing = np.zeros(self.machine.programs, int)
        before = self.released.get(address, nothing)
        if acquires:
            self._learn(mine, before)
        else:
            self.observed[lane] = np.maximum(self.observed.get(lane, nothing), before)
        own = nothing
        if releases:  # what all its threads did before their last barrier
            own = np.maximum(self.known[mine], self.learnt[mine])
            own[mine] = 2 * self.barriers[mine]
        elif self.fence_times[lane]:
            own = self.fences[self.fenced[lane]][mine].copy()
            own[mine] = self.fence_times[lane]
        self.released[address] = np.maximum(own, before)

    def barrier(self, programs: Array) -> None:
        """All threads of these have met; one thread's knowledge becomes that of its program."""
        self.barriers[programs] += 1
        self.known[programs] = np.maximum(self.known[programs], self.learnt[programs])
        self.executed[programs] = np.maximum(self.executed[programs], self.known[programs])

    def arrive(self, mask: Mask, releases: bool) -> None:
        """These threads arrive at the barrier of their cluster, and go on."""
        lanes = np.arange(self.machine.n) if mask is None else np.flatnonzero(mask)
        if self.arrived[lanes].any():
            raise self.machine.fault("arrives twice at one barrier of the cluster", lanes)
        self.arrived[lanes] = 2 * self.barriers[self.machine.cta[lanes]]
        self.releasing[lanes] = releases

    def cluster_barrier(self, lanes: Array) -> None:
        """All threads of a cluster, who have arrived, know of each other."""
        if not self.arrived[lanes].all():
            raise self.machine.fault("waits for the cluster without having arrived", lanes)
        programs = np.unique(self.machine.cta[lanes])
        for table in (self.known, self.executed):
            all_of_them = np.zeros(self.machine.programs, int)
            for program in programs:
                those = lanes[self.machine.cta[lanes] == program]
                if table is self.executed or self.releasing[those].all():
                    own = table[program].copy()
                    own[program] = self.arrived[those].min() + 1
                    all_of_them = np.maximum(all_of_them, own)
            table[programs] = np.maximum(table[programs], all_of_them)
        self.arrived[lanes] = 0
        self.barrier(programs)


class Place(NamedTuple):
    """Where in a table of every byte what lanes reach is: `pieces` of `unit` bytes each.

    pieces: [lanes, count], each from byte `piece * unit` on.
    """

    pieces: Array
    unit: int

    def of(self, table: Array) -> Array:
        """[lanes, bytes] what the table has there."""
        lanes, count = self.pieces.shape
        return table.reshape(-1, self.unit)[self.pieces].reshape(lanes, count * self.unit)

    def put(self, table: Array, values: Any) -> None:
        """Change the table there: values for [lanes, bytes], for [lanes, 1] or for all."""
        if np.ndim(values):
            each = values.shape[1] > 1
            values = values.reshape(*self.pieces.shape, self.unit) if each else values[..., None]
        table.reshape(-1, self.unit)[self.pieces] = values

    def add(self, table: Array, value: int) -> None:
        np.add.at(table.reshape(-1, self.unit), self.pieces, value)

    def which(self, lanes: Array) -> Place:
        return Place(self.pieces[lanes], self.unit)

    def behind(self, distance: Any) -> Place:
        """So many bytes behind, or [lanes, 1] so many, in whole pieces."""
        return Place(self.pieces + distance // self.unit, self.unit)

    def words(self) -> Place:
        """The same in a table of every four bytes."""
        if self.unit < 4:
            return Place(self.pieces * self.unit // 4, 1)
        return Place(self.pieces, self.unit // 4)


class Space:
    """Bytes that threads reach by address, and the checks that any such have."""

    name = ""

    def __init__(self, machine: Machine, memory: Array) -> None:
        self.machine, self.order, self.bytes = machine, machine.order, memory

    def never(self, lanes: Array, bad: Array, what: str) -> None:
        """An error if anything of [lanes, ...] is bad."""
        if bad.any():
            raise self.machine.fault(what, lanes[bad.reshape(len(lanes), -1).any(1)])

    def load(self, lanes: Array, address: Array, size: int) -> Array:
        """[lanes, size] bytes."""
        return self.bytes[address[:, None] + np.arange(size)]

    def put(self, lanes: Array, at: Place, data: Array) -> None:
        at.put(self.bytes, data)
        twice = at.of(self.bytes) != data
        self.never(lanes, twice, f"several threads write one byte of {self.name}")


def _mark(readers: Array, times: Array, at: Place, warp: Array, now: Array) -> None:
    """Note a reader: `warp`, or several where one has read since the last barrier."""
    before = np.where(at.of(times) >> 1 == now >> 1, at.of(readers), -1)
    marks = np.where((before != -1) & (before != warp), _SEVERAL, warp)
    at.put(readers, marks)
    different = at.of(readers) != marks
    if different.any():
        at.put(readers, np.where(different, _SEVERAL, marks))
    at.put(times, now)


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
        count = len(self.bytes)
        # which warp wrote each byte, and of each program of a cluster which one read it last
        self.writer, self.written = (np.zeros(count, np.int32) for _ in range(2))
        self.reader, self.read = (np.zeros((machine.cluster, count), np.int32) for _ in range(2))
        self.coming = np.zeros(count, bool)
        self.multiplied = np.zeros(count, np.int16)
        self.unfenced = np.zeros(count, bool)  # not for matrix units to read yet

    def begin(self) -> None:
        """The machine's threads are others, who have begun nothing yet."""
        count = self.machine.n
        self.groups = {kind: np.zeros(count, np.int64) for kind in ("copies", "products")}
        # lanes, their groups, and for each lane the bytes, and what comes into them
        self.pending: dict[str, list[tuple[Array, Array, Place, Array]]] = {
            kind: [] for kind in self.groups
        }

    def at(self, lanes: Array, address: Array, size: int, program: Array | None = None) -> Place:
        """Where in `bytes` these are, of the threads' own programs or of others."""
        beyond = (address < 0) | (address + size > self.size)
        self.never(lanes, beyond, "reaches beyond the shared memory")
        self.never(lanes, address % size != 0, "reaches shared memory misaligned")
        own = self.machine.cta[lanes]
        if program is None:
            program = own
        elif (foreign := program != own).any():
            self.order.visit(lanes[foreign], program[foreign])
        return Place(((program * self.size + address) // size)[:, None], size)

    def load(self, lanes: Array, address: Array, size: int, program: Array | None = None) -> Array:
        """[lanes, size] bytes."""
        at = self.at(lanes, address, size, program)
        self._there(lanes, at)
        racing = self._overwritten(lanes, at)
        self.never(lanes, racing, "reads shared memory as another warp writes")
        mine, warp, now = self.order.own(lanes)
        _mark(self.reader, self.read, self._of_rank(at, mine % self.machine.cluster), warp, now)
        return at.of(self.bytes)

    def _of_rank(self, at: Place, rank: Any) -> Place:
        """The same for the programs of that rank in their clusters, in what there is of each."""
        return at.behind(rank * len(self.bytes))

    def _overwritten(self, lanes: Array, at: Place) -> Array:
        writer = at.of(self.writer)
        program = writer // self.machine.warps
        return self.order.unordered(lanes, program, writer, at.of(self.written))

    def _there(self, lanes: Array, at: Place) -> None:
        self.never(lanes, at.of(self.written) == 0, "reads shared memory that nobody wrote")
        self.never(lanes, at.of(self.coming), "reads what is still being copied")

    def store(
        self, lanes: Array, address: Array, data: Array, program: Array | None = None
    ) -> None:
        at = self.at(lanes, address, data.shape[1], program)
        self._free(lanes, at, at.of(self.bytes) != data)
        self.put(lanes, at, data)
        self._arrive(lanes, at)
        at.put(self.unfenced, True)

    def _free(self, lanes: Array, at: Place, changes: Array | bool) -> None:
        """`changes`: where a byte becomes another one; the same once more harms nobody."""
        twice = self._overwritten(lanes, at) & changes
        self.never(lanes, twice, "writes shared memory as another warp does")
        cluster = self.machine.cluster
        first = at.pieces[:, :1] * at.unit // self.size // cluster * cluster
        for rank in range(cluster):
            program = first + rank
            theirs = self._of_rank(at, rank)
            reader, read = theirs.of(self.reader), theirs.of(self.read)
            early = self.order.unordered(lanes, program, reader, read) & changes
            self.never(lanes, early, "writes shared memory as another warp reads")
        self.never(lanes, at.of(self.coming), "writes what is still being copied")
        self.never(lanes, at.of(self.multiplied) > 0, "writes what is still being multiplied")

    def _arrive(self, lanes: Array, at: Place) -> None:
        _, warp, now = self.order.own(lanes)
        at.put(self.writer, warp)
        at.put(self.written, now)

    def copy(self, lanes: Array, address: Array, data: Array) -> None:
        """Begin to copy [lanes, size] bytes to the addresses."""
        at = self.at(lanes, address, data.shape[1])
        self._free(lanes, at, True)
        at.put(self.coming, True)
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
                here = at.which(over)
                here.put(self.coming, False)
                self.put(lanes[over], here, data[over])
                self._arrive(lanes[over], here)
                here.put(self.unfenced, False)
            else:
                at.which(over).add(self.multiplied, -1)
            if not over.all():
                left.append((lanes[~over], group[~over], at.which(~over), data[~over]))
        self.pending[kind] = left

    def fence(self, mask: Mask) -> None:
        """What these threads' programs wrote is there for the matrix units."""
        programs = self.machine.cta if mask is None else self.machine.cta[mask]
        self.unfenced.reshape(-1, self.size)[np.unique(programs)] = False

    def multiply(self, lanes: Array, address: Array, size: int) -> Array:
        """The bits at the addresses [lanes, count], which a warpgroup of each lane reads."""
        at = Place((self.machine.cta[lanes][:, None] * self.size + address) // size, size)
        beyond = (address < 0) | (address + size > self.size)
        self.never(lanes, beyond, "multiplies what lies beyond the shared memory")
        self._there(lanes, at)
        mine, _, now = self.order.own(lanes)
        late = at.of(self.written) >> 1 == now >> 1
        self.never(lanes, late, "multiplies what was written since the last barrier")
        self.never(lanes, at.of(self.unfenced), "multiplies what no fence has published")
        mine = self._of_rank(at, mine % self.machine.cluster)
        mine.put(self.read, now)
        mine.put(self.reader, _SEVERAL)
        at.add(self.multiplied, 1)
        group = self.groups["products"][lanes]
        self.pending["products"].append((lanes, group, at, np.zeros((len(lanes), 0))))
        return at.of(self.bytes).view(f"u{size}")

    def end(self) -> None:
        """Nothing may be on its way when a program ends."""
        if self.pending["copies"] or self.pending["products"]:
            raise FaultError(f"{self.machine.program.name}: ends before what it began has ended")


class Global(Space):
    """The memory that all programs share."""

    name = "global memory"

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, machine.memory.bytes)
        count, size = machine.programs, len(self.bytes)
        # of each byte the program and the warp that wrote it, and of each program and 4 bytes which
        # warp read them last
        self.program, self.writer, self.written = (np.zeros(size, np.int32) for _ in range(3))
        self.reader = np.zeros((count, size // 4), np.int32)
        self.read = np.zeros((count, size // 4), np.int16)

    def at(self, lanes: Array, address: Array, size: int) -> Place:
        """Where in `bytes` these are."""
        unit = size & -size
        self.never(lanes, address % unit != 0, "reaches global memory misaligned")
        start = address - _BASE
        outside = (start < 0) | (start + size > len(self.bytes))
        self.never(lanes, outside, "reaches beside every tensor")
        at = Place((start // unit)[:, None] + np.arange(size // unit), unit)
        self.never(lanes, ~at.of(self.machine.memory.usable), "reaches beside every tensor")
        return at

    def _written(self, lanes: Array, at: Place, doing: str) -> None:
        """What is there has been written before, not meanwhile."""
        program = at.of(self.program)
        late = self.order.unordered(lanes, program, at.of(self.writer), at.of(self.written))
        foreign = program != self.machine.cta[lanes][:, None]
        self.never(lanes, late & foreign, f"{doing} what another program writes")
        self.never(lanes, late, f"{doing} what another warp writes")

    def load(self, lanes: Array, address: Array, size: int, constant: bool = False) -> Array:
        """[lanes, size] bytes, of which `constant` promises that the kernel does not write them."""
        at = self.at(lanes, address, size)
        if self.machine.harmless(self.machine.at.source):
            return at.of(self.bytes)
        self._written(lanes, at, "reads")
        if constant:
            written = at.of(self.written) > 0
            self.never(lanes, written, "reads as constant what the kernel writes")
        mine, warp, now = self.order.own(lanes)
        words = at.words().behind(mine * self.reader.shape[1])
        _mark(self.reader, self.read, words, warp, now)
        return at.of(self.bytes)

    def store(self, lanes: Array, address: Array, data: Array) -> None:
        at = self.at(lanes, address, data.shape[1])
        changed = (at.of(self.bytes) != data).any(1)
        if changed.any():  # the same once more harms nobody
            some, there = lanes[changed], at.which(changed)
            self._written(some, there, "writes")
            mine = self.machine.cta[some][:, None]
            words = there.words()
            read = self.read.reshape(len(self.read), -1, words.unit)[:, words.pieces]
            known = self.order.known[mine[:, 0]].T[:, :, None, None]
            late = read >= known  # [programs, lanes, ...] words
            late[mine[:, 0], np.arange(len(some))] = False
            self.never(some, late.any(0), "writes what another program reads")
            own = words.behind(mine * self.read.shape[1])
            late = self.order.unordered(some, mine, own.of(self.reader), own.of(self.read))
            self.never(some, late, "writes what another warp reads")
        self.put(lanes, at, data)
        for table, value in zip(
            (self.program, self.writer, self.written), self.order.own(lanes), strict=True
        ):
            at.put(table, value)

    def count(
        self, lane: int, address: int, to: Callable[[Any], Any], acquires: bool, releases: bool
    ) -> int:
        """An atomic change `to` of 32 bits by one thread."""
        lanes = np.array([lane])
        at = self.at(lanes, np.array([address]), 4)
        mine = int(self.machine.cta[lane])
        foreign = at.of(self.program) != mine
        self.never(lanes, (at.of(self.written) > 0) & foreign, "counts too late")
        old = at.of(self.bytes).view(np.uint32)[0, 0]
        at.put(self.bytes, np.array([[to(old)]], np.uint32).view(np.uint8))
        # in the order of what it releases
        self.read[mine, at.pieces[0, 0]] = 2 * self.order.barriers[mine] - 1
        self.order.exchange(lane, address, acquires, releases)
        return int(old)


class Generic:
    """What an address alone says: tensors, or the shared memory of a program of the cluster."""

    def __init__(self, shared: Shared, tensors: Global) -> None:
        self.shared, self.tensors = shared, tensors

    @staticmethod
    def of_shared(program: Array, address: Array) -> Array:
        return _SHARED + program * _WINDOW + address

    @classmethod
    def moved(cls, address: Array, program: Array) -> Array:
        """The same place in the shared memory of another program."""
        return cls.of_shared(program, (address - _SHARED) % _WINDOW)

    def load(self, lanes: Array, address: Array, size: int) -> Array:
        data = np.zeros((len(lanes), size), np.uint8)
        shared = (address >= _SHARED) & (address < _BASE)
        if shared.any():
            program, at = np.divmod(address[shared] - _SHARED, _WINDOW)
            data[shared] = self.shared.load(lanes[shared], at, size, program)
        if not shared.all():
            data[~shared] = self.tensors.load(lanes[~shared], address[~shared], size)
        return data

    def store(self, lanes: Array, address: Array, data: Array) -> None:
        shared = (address >= _SHARED) & (address < _BASE)
        if shared.any():
            program, at = np.divmod(address[shared] - _SHARED, _WINDOW)
            self.shared.store(lanes[shared], at, data[shared], program)
        if not shared.all():
            self.tensors.store(lanes[~shared], address[~shared], data[~shared])
