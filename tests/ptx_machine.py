"""A machine for PTX in numpy: runs what Triton or nvcc compiled, on the CPU, and finds its races.

All programs of a launch run at once, an instruction at a time over all of their threads; of threads
that went apart those that are behind go first. So nothing orders the accesses of two programs, or
of two warps, but the barriers, fences and atomics that the kernel itself has, and the machine
raises `FaultError` where it finds two accesses of one byte, one of them a write, which those do not
order. It also raises for what memory checkers find: an access beside a tensor or the shared memory,
a misaligned one, shared memory read before it was written or while a copy into it is on its way,
shared memory of a program that may not have begun or may have ended, and instructions of a whole
warp that only a part of one reaches.

The instructions are those that Triton and nvcc make of this package's kernels for sm_80 and sm_90.
What they do is from NVIDIA's "Parallel Thread Execution ISA".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ptx_memory import Array, FaultError, Generic, Global, Mask, Memory, Order, Shared, Space

Source = Callable[[], Any]

_WARP = 32
_TYPES: dict[str, Any] = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter, widths in (
        ("b", "u", (8, 16, 32, 64)),
        ("u", "u", (8, 16, 32, 64)),
        ("s", "i", (8, 16, 32, 64)),
        ("f", "f", (16, 32, 64)),
    )
    for bits in widths
}
_TYPES["pred"] = np.dtype(bool)
_SIZES = {name: dtype.itemsize for name, dtype in _TYPES.items()} | {"bf16": 2}


class Line(NamedTuple):
    """One instruction: `@[!]predicate opcode operands`, and from where in the source it comes."""

    predicate: str
    opcode: str
    operands: tuple[str, ...]
    source: str


class Program(NamedTuple):
    """A kernel's instructions, where its labels are, and the widths of its registers.

    `parameters` are the places and types of the parameters, or their sizes where they are bytes;
    `symbols` the addresses of parameters and shared memory by name, and `shared_bytes` how much of
    the latter comes before what a launch adds to it.
    """

    name: str
    lines: list[Line]
    labels: dict[str, int]
    registers: dict[str, Any]
    parameters: list[tuple[int, str | int]]
    symbols: dict[str, int]
    shared_bytes: int


_FILE = re.compile(r"\.file\s+(\d+)\s+\"(?:[^\"]*/)?([^\"/]+)\"")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_DECLARED = re.compile(r"\.reg \.(\w+)\s+(.*)$")
_PARAMETER = re.compile(
    r"\.param (?:\.align (\d+) )?\.(\w+) (?:\.ptr [^,]*? )?([\w$]+)(?:\[(\d+)\])?$"
)
_SHARED = re.compile(r"^\s*(?:\.\w+ )*\.shared (?:\.align (\d+) )?\.(\w+) ([\w$]+)\[(\d*)\];", re.M)
_INSTRUCTION = re.compile(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$")
_NAME = re.compile(r"[%$\w]+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def _parameters(declarations: str) -> tuple[list[tuple[int, str | int]], dict[str, int]]:
    """Where the parameters are, and by which names."""
    parameters: list[tuple[int, str | int]] = []
    symbols, end = {}, 0
    for text in declarations.split(","):
        found = _PARAMETER.match(text.strip())
        if found is None:
            raise NotImplementedError(text)
        align, kind, name, count = found.groups()
        size = _SIZES[kind]
        end += -end % int(align or size)
        symbols[name] = end
        parameters.append((end, int(count) * size if count else kind))
        end += int(count or 1) * size
    return parameters, symbols


def _shared_symbols(ptx: str) -> tuple[dict[str, int], int]:
    """Where named shared memory is, and the size of what the launch does not size itself."""
    symbols, end = {}, 0
    found = sorted(_SHARED.findall(ptx), key=lambda x: not x[3])  # the launch's comes last
    for align, kind, name, count in found:
        end += -end % int(align or _SIZES[kind])
        symbols[name] = end
        end += int(count or 0) * _SIZES[kind]
    return symbols, end


def _statements(body: str) -> Iterator[str]:
    """Braces, labels and what stands before semicolons, each by itself."""
    for text in body.splitlines():
        text = text.split("//")[0].strip()
        while text.startswith(("{", "}")):  # operands in braces never come first
            yield text[0]
            text = text[1:].strip()
        for part in re.findall(r"[^;]+;?", text):
            part = part.strip()
            closes = part == "}"
            if part:
                yield part if closes else part.rstrip(";").strip()


def parse(ptx: str, entry: str = r"\w+") -> Program:
    """The kernel of that name, or the first one."""
    found = re.search(rf"\.visible \.entry ({entry})\(([^)]*)\)", ptx)
    assert found is not None
    body = ptx[ptx.index("\n{\n", found.end()) + 3 :]
    files = dict(_FILE.findall(ptx))
    parameters, symbols = _parameters(found[2])
    shared, shared_bytes = _shared_symbols(ptx)
    lines: list[Line] = []
    labels: dict[str, int] = {}
    registers: dict[str, Any] = {}
    source, scopes = "", 0
    local: list[dict[str, str]] = []  # of each open brace, what its registers are called here
    for text in _statements(body):
        if location := _LOCATION.match(text):
            source = f"{files[location[1]]}:{location[2]}:{location[3]}"
        elif text == "{":
            scopes += 1
            local.append({})
        elif text == "}":
            if not local:
                break
            local.pop()
        elif text.endswith(":"):
            labels[text[:-1]] = len(lines)
        elif declared := _DECLARED.match(text):
            for item in declared[2].split(","):
                item = item.strip()
                several = re.match(r"(%\w+)<(\d+)>", item)
                names = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [item]
                if local:
                    local[-1].update({name: f"{name}#{scopes}" for name in names})
                    names = [local[-1][name] for name in names]
                width = declared[1]
                registers.update(
                    dict.fromkeys(names, width if width == "pred" else "b" + width[1:])
                )
        elif not text.startswith("."):
            instruction = _INSTRUCTION.match(text)
            if instruction is None:
                raise NotImplementedError(text)
            predicate, opcode, rest = instruction.groups()
            for names in local:
                predicate, rest = (
                    _NAME.sub(lambda x, names=names: names.get(x[0], x[0]), y or "")
                    for y in (predicate, rest)
                )
            operands = tuple(x.strip() for x in _OPERAND.findall(rest))
            lines.append(Line(predicate or "", opcode, operands, source))
    types = {register: _TYPES[width] for register, width in registers.items()}
    symbols |= shared
    return Program(found[1], lines, labels, types, parameters, symbols, shared_bytes)


def _to_bf16(x: Array) -> Array:
    """Bits of the nearest bfloat16, the even one of two."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _from_bf16(bits: Array) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _flush(x: Array) -> Array:
    """Numbers too small for a normalised float32 become zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _halves(x: Array) -> Array:
    """[..., 2] the two 16-bit parts of 32-bit registers, the low one first."""
    return np.ascontiguousarray(x).view(np.uint16).reshape(*x.shape, 2)


def _floats(x: Array, kind: str) -> Array:
    """What 16-bit patterns stand for, in float32."""
    return _from_bf16(x) if kind == "bf16" else x.view(np.float16).astype(np.float32)


def _unwritten(dtype: Any) -> Array:
    """What a register holds that nobody wrote, which is not zero."""
    return np.array([0xA5] * 8, np.uint8).view(dtype)[0] if dtype.kind != "b" else np.array(True)


class Machine:
    """`grid` programs of `threads` threads each; `run` runs them to their ends over a memory.

    `shared_bytes` are those that the launch adds to what the kernel declares, and `cluster` how
    many consecutive programs reach each other's.

    `harmless` says of a place in the source, as file:line:column, that the kernel does not use what
    it reads there where others may write it meanwhile.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        harmless: Callable[[str], bool] = lambda source: False,
        cluster: int = 1,
        seed: int = 0,
    ) -> None:
        self.program, self.threads, self.harmless = program, threads, harmless
        self.programs, self.cluster = int(np.prod(grid)), cluster
        self.warps = threads // _WARP  # of each program
        self.random = np.random.default_rng(seed)
        lanes = np.arange(self.programs * threads, dtype=np.int64)
        self._cta, self._warp = lanes // threads, lanes // _WARP
        self._shared_bytes = program.shared_bytes + shared_bytes
        tid = (lanes % threads).astype(np.uint32)
        special = {"%tid.x": tid, "%laneid": tid % _WARP, "%ntid.x": np.full_like(tid, threads)}
        rest = self._cta
        for axis, size in zip("xyz", (*grid, 1, 1), strict=False):
            special[f"%ctaid.{axis}"] = (rest % size).astype(np.uint32)
            special[f"%nctaid.{axis}"] = np.full_like(tid, size)
            rest = rest // size
        for axis in "yz":
            special[f"%tid.{axis}"] = np.zeros_like(tid)
        self._special = special
        self.r: dict[str, Array] = {}
        self.at = program.lines[0]  # what is being done
        self._steps: list[Callable[[Mask], None] | None] = [None] * len(program.lines)

    def run(
        self, memory: Memory, arguments: Sequence[int | float | bytes], one_by_one: bool = False
    ) -> None:
        """Run every program to its end: all at once, or one cluster after the other in any order.

        `arguments` are the kernel's: addresses and integers, floats, or a structure's bytes.
        """
        self.memory, self.order = memory, Order(self)
        self.parameters = Space(self, self._encoded(arguments))
        self.shared, self.globals = Shared(self, self._shared_bytes), Global(self)
        self.generic = Generic(self.shared, self.globals)
        with np.errstate(all="ignore"):
            if one_by_one:
                for which in self.random.permutation(self.programs // self.cluster):
                    self._run(int(which) * self.cluster, self.cluster)
            else:
                self._run(0, self.programs)
        self.order.end()

    def _encoded(self, arguments: Sequence[int | float | bytes]) -> Array:
        """The arguments as the bytes of the kernel's parameters."""
        encoded = b""
        for (start, kind), value in zip(self.program.parameters, arguments, strict=True):
            encoded = encoded.ljust(start, b"\0")
            if isinstance(value, bytes):
                assert kind == len(value)
                encoded += value
            elif isinstance(value, float):
                encoded += np.float32(value).tobytes()
            else:
                encoded += (value % 2**64).to_bytes(8, "little")[: _SIZES[kind]]
        return np.frombuffer(encoded, np.uint8)

    # The order of things.

    def _begin(self, first: int, count: int) -> None:
        """Lanes are now the threads of `count` programs from the first on."""
        those = slice(first * self.threads, (first + count) * self.threads)
        self.n = count * self.threads
        self.cta = self._cta[those]
        self.warp = self._warp[those]  # over all programs
        self.r.update({name: value[those] for name, value in self._special.items()})
        registers = self.program.registers
        nobodys = {dtype: self._full(_unwritten(dtype)) for dtype in set(registers.values())}
        self.r.update({name: nobodys[dtype] for name, dtype in registers.items()})
        self.live = np.ones(self.n, bool)

    def _run(self, first: int, count: int) -> None:
        self._begin(first, count)
        self.order.begin()
        self.shared.begin()
        groups: dict[int, Array] = {0: self.live.copy()}
        waiting: dict[int, Array] = {}  # at which barrier
        lines, labels = self.program.lines, self.program.labels
        while groups or waiting:
            if not groups:
                groups = self._barrier(waiting)
                continue
            pc = min(groups)
            mask = groups.pop(pc)
            others = min(groups) if groups else len(lines)
            whole: Mask = None if mask.all() else mask
            while True:
                line = lines[pc]
                self.at = line
                if line.opcode in ("bra", "bra.uni"):
                    taken = mask & self._predicate(line.predicate)
                    target = labels[line.operands[0]]
                    stays = mask & ~taken
                    for place, those in ((target, taken), (pc + 1, stays)):
                        if those.any():
                            groups[place] = groups[place] | those if place in groups else those
                    break
                if line.opcode == "ret":
                    stays = mask & ~self._predicate(line.predicate)
                    self.live &= stays | ~mask
                    if stays.any():
                        groups[pc + 1] = stays
                    break
                if line.opcode in _BARRIERS:
                    if line.operands not in ((), ("0",)) or line.predicate:
                        raise NotImplementedError(str(line))
                    waiting[pc] = waiting.get(pc, False) | mask
                    break
                step = self._steps[pc]
                if step is None:
                    step = self._steps[pc] = self._decode(line)
                step(whole)
                pc += 1
                if pc == others:
                    groups[pc] |= mask
                    break
        self.shared.end()

    def _barrier(self, waiting: dict[int, Array]) -> dict[int, Array]:
        """Take those out of the waiting who may go on, for there is nobody left who need not wait.

        They may where all that live of a program, or of a cluster, wait for each other.
        """
        released = np.zeros(self.n, bool)
        for opcode, size in (("bar.sync", 1), ("barrier.cluster.wait", self.cluster)):
            those = [x for pc, x in waiting.items() if self.program.lines[pc].opcode == opcode]
            if not those:
                continue
            for mask in those:
                self._whole_warps(mask)
            here = np.logical_or.reduce(those)
            here &= ~np.isin(self.cta // size, np.unique(self.cta[self.live & ~here] // size))
            if opcode == "bar.sync":
                self.order.barrier(np.unique(self.cta[here]))
            else:
                for cluster in np.unique(self.cta[here] // size):
                    self.order.cluster_barrier(np.flatnonzero(here & (self.cta // size == cluster)))
            released |= here
        if not released.any():
            raise self.fault("waits for who never comes", np.flatnonzero(self.live))
        groups = {}
        for pc, mask in list(waiting.items()):
            if (mask & released).any():
                groups[pc + 1] = mask & released
                waiting[pc] = mask & ~released
                if not waiting[pc].any():
                    del waiting[pc]
        return groups

    def fault(self, what: str, lanes: Array) -> FaultError:
        lane = int(lanes[0])
        where = f"program {self.cta[lane]}, thread {lane % self.threads}"
        return FaultError(f"{self.program.name}: {what} ({where}): {self.at}")

    # Operands.

    def _predicate(self, predicate: str) -> Array:
        if not predicate:
            return np.ones(self.n, bool)
        negated = predicate.startswith("!")
        value = self.r[predicate.lstrip("!")]
        return ~value if negated else value

    def get(self, operand: str, kind: str) -> Source:
        """What reads an operand as numbers of a type; of bf16 as float32."""
        r = self.r
        if operand in r:
            if kind == "bf16":
                return lambda: _from_bf16(r[operand])
            dtype = _TYPES[kind]
            if r[operand].dtype == dtype:
                return lambda: r[operand]
            if r[operand].dtype.itemsize == dtype.itemsize:
                return lambda: r[operand].view(dtype)
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return lambda: r[operand].astype(unsigned).view(dtype)
        if operand in self.program.symbols:
            value: Any = np.uint64(self.program.symbols[operand])
        elif operand.startswith("0f"):
            value = np.uint32(int(operand[2:], 16)).view(_TYPES[kind])
            return lambda: value
        elif operand.startswith("0d"):
            value = np.uint64(int(operand[2:], 16)).view(_TYPES[kind])
            return lambda: value
        else:
            bits = int(operand.rstrip("U"), 0)
            if kind == "pred":
                return lambda: np.bool_(bits != 0)
            size = _SIZES[kind]
            value = np.uint64(bits % 2**64)
            raw = np.array(value, np.uint64).astype(f"u{size}")
            if kind == "bf16":
                value = _from_bf16(raw)[()]
            else:
                value = raw.view(_TYPES[kind])[()]
            return lambda: value
        value = value.astype(f"u{_SIZES[kind]}").view(_TYPES[kind])
        return lambda: value

    def _full(self, value: Any) -> Array:
        """[threads] what is the same for all, too."""
        if isinstance(value, np.ndarray) and value.ndim:
            return value
        return np.broadcast_to(value, self.n)

    def put(self, name: str, value: Any, mask: Mask) -> None:
        """Write a register in the threads of the mask."""
        if name.startswith("_"):
            return
        old = self.r[name]
        value = np.asarray(value)
        if value.dtype != old.dtype:
            if value.dtype.itemsize == old.dtype.itemsize:
                value = value.view(old.dtype)
            elif value.dtype.kind == "i":  # sign-extended
                value = value.astype(f"i{old.dtype.itemsize}").view(old.dtype)
            else:
                value = value.view(f"u{value.dtype.itemsize}").astype(old.dtype)
        if mask is not None:
            value = np.where(mask, value, old)
        elif value.ndim == 0:
            value = np.full(self.n, value, old.dtype)
        self.r[name] = value

    @staticmethod
    def several(operand: str) -> list[str]:
        return [x.strip() for x in operand.strip("{}").split(",")]

    def _address(self, operand: str, kind: str) -> Source:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        source = self.get(base, kind)
        add = int(offset or "0", 0)
        return lambda: self._full(np.asarray(source()).astype(np.int64) + add)

    def _place(self, operand: str, space: str) -> tuple[Callable[[], Any], Source]:
        """Where and at which address an access is."""
        if space.startswith("shared"):
            return lambda: self.shared, self._address(operand, "u32")
        if space == "global":
            return lambda: self.globals, self._address(operand, "u64")
        if space == "param":
            return lambda: self.parameters, self._address(operand, "u64")
        if space in ("local", "const"):
            raise NotImplementedError(f"memory of {space}")
        return lambda: self.generic, self._address(operand, "u64")

    # Instructions.

    def _decode(self, line: Line) -> Callable[[Mask], None]:
        parts = line.opcode.split(".")
        make = getattr(self, f"_make_{parts[0]}", None)
        if parts[0] in _SIMPLE:
            step: Callable[[Mask], None] = self._arithmetic(line, parts[1:], _SIMPLE[parts[0]])
        elif make is not None:
            step = make(line, parts[1:])
        else:
            raise NotImplementedError(str(line))
        if not line.predicate:
            return step

        def guarded(mask: Mask) -> None:
            these = self._predicate(line.predicate)
            these = these if mask is None else mask & these
            if these.all():
                step(None)
            elif these.any():
                step(these)

        return guarded

    def _elementwise(self, line: Line, kind: str, compute: Callable, result: str = "") -> Callable:
        """`compute` over all operands but the first, which takes what it returns."""
        sources = [self.get(x, kind) for x in line.operands[1:]]
        target = line.operands[0]
        if (result or kind) == "bf16":
            return lambda mask: self.put(target, _to_bf16(compute(*[x() for x in sources])), mask)
        return lambda mask: self.put(target, compute(*[x() for x in sources]), mask)

    def _pairwise(self, line: Line, kind: str, compute: Callable) -> Callable:
        """The same for two 16-bit numbers in each register."""
        sources = [self.get(x, "b32") for x in line.operands[1:]]

        def step(mask: Mask) -> None:
            pairs = [_halves(self._full(x())) for x in sources]
            if kind == "bf16":
                result = _to_bf16(compute(*[_from_bf16(x) for x in pairs]))
            else:
                dtype = _TYPES[kind]
                result = compute(*[x.view(dtype) for x in pairs]).view(np.uint16)
            self.put(line.operands[0], np.ascontiguousarray(result).view(np.uint32)[:, 0], mask)

        return step

    def _arithmetic(self, line: Line, parts: list[str], compute: Callable) -> Callable:
        kind = parts[-1]
        if kind.endswith("x2"):
            return self._pairwise(line, kind[:-2], compute)
        if "ftz" in parts:
            return self._elementwise(
                line, kind, lambda *xs: _flush(compute(*[_flush(np.asarray(x)) for x in xs]))
            )
        return self._elementwise(line, kind, compute)

    def _make_max(self, line: Line, parts: list[str]) -> Callable:
        fn = np.maximum if "NaN" in parts or parts[-1][0] in "us" else np.fmax
        return self._arithmetic(line, [x for x in parts if x != "NaN"], fn)

    def _make_min(self, line: Line, parts: list[str]) -> Callable:
        fn = np.minimum if "NaN" in parts or parts[-1][0] in "us" else np.fmin
        return self._arithmetic(line, [x for x in parts if x != "NaN"], fn)

    def _make_fma(self, line: Line, parts: list[str]) -> Callable:
        dtype = np.float16 if parts[-1].startswith("f16") else np.float32

        def fma(a: Array, b: Array, c: Array) -> Array:
            exact = np.multiply(a, b, dtype=np.float64) + c  # the product is exact
            result = exact.astype(dtype)
            if "rm" in parts:  # towards minus infinity
                return np.where(result > exact, np.nextafter(result, np.float32(-np.inf)), result)
            return result

        return self._arithmetic(line, parts, fma)

    def _make_div(self, line: Line, parts: list[str]) -> Callable:
        if parts[-1][0] == "f":
            return self._arithmetic(line, parts, np.divide)
        return self._elementwise(line, parts[-1], lambda a, b: _quotient(a, b))

    def _make_rem(self, line: Line, parts: list[str]) -> Callable:
        return self._elementwise(line, parts[-1], lambda a, b: a - _quotient(a, b) * b)

    def _make_mul(self, line: Line, parts: list[str]) -> Callable:
        return self._multiply(line, parts, False)

    def _make_mad(self, line: Line, parts: list[str]) -> Callable:
        return self._multiply(line, parts, True)

    def _multiply(self, line: Line, parts: list[str], add: bool) -> Callable:
        kind = parts[-1]
        if kind[0] in "fb" or parts[0] == "lo":
            compute = (lambda a, b, c: a * b + c) if add else np.multiply
            return self._arithmetic(line, parts, compute)
        size = _SIZES[kind]
        wide = f"{kind[0]}{16 * size}"
        a, b = (self.get(x, kind) for x in line.operands[1:3])
        if parts[0] == "wide":
            dtype = _TYPES[wide]
            c = self.get(line.operands[3], wide) if add else lambda: dtype.type(0)
            return lambda mask: self.put(
                line.operands[0], np.multiply(a(), b(), dtype=dtype) + c(), mask
            )
        assert parts[0] == "hi"
        assert not add
        if size == 4:
            return lambda mask: self.put(
                line.operands[0],
                (np.multiply(a(), b(), dtype=_TYPES[wide]) >> 32).astype(_TYPES[kind]),
                mask,
            )

        def high(mask: Mask) -> None:  # of 128 bits
            x, y = (self._full(v()).astype(object) for v in (a, b))
            self.put(line.operands[0], ((x * y) >> 64).astype(_TYPES[kind]), mask)

        return high

    def _make_lop3(self, line: Line, parts: list[str]) -> Callable:
        a, b, c = (self.get(x, "b32") for x in line.operands[1:4])
        table = int(line.operands[4], 0)

        def step(mask: Mask) -> None:
            x, y, z = a(), b(), c()
            result = np.uint32(0)
            for case in range(8):
                if table >> case & 1:
                    terms = [v if case >> s & 1 else ~v for v, s in ((x, 2), (y, 1), (z, 0))]
                    result = result | (terms[0] & terms[1] & terms[2])
            self.put(line.operands[0], result, mask)

        return step

    def _make_shl(self, line: Line, parts: list[str]) -> Callable:
        return self._shift(line, parts[-1], np.left_shift)

    def _make_shr(self, line: Line, parts: list[str]) -> Callable:
        return self._shift(
            line, "u" + parts[-1][1:] if parts[-1][0] == "b" else parts[-1], np.right_shift
        )

    def _shift(self, line: Line, kind: str, shift: Callable) -> Callable:
        value, count = self.get(line.operands[1], kind), self.get(line.operands[2], "u32")
        bits = 8 * _SIZES[kind]
        dtype = _TYPES[kind]

        def step(mask: Mask) -> None:
            x, by = value(), np.asarray(count())
            result = shift(x, np.minimum(by, bits - 1).astype(dtype))
            if kind[0] != "s":
                result = np.where(by >= bits, dtype.type(0), result)
            self.put(line.operands[0], result, mask)

        return step

    def _make_bfe(self, line: Line, parts: list[str]) -> Callable:
        kind = parts[-1]
        a = self.get(line.operands[1], "u32")
        start, length = (self.get(x, "u32") for x in line.operands[2:])

        def step(mask: Mask) -> None:
            at, size = (np.asarray(x()).astype(np.int64) & 255 for x in (start, length))
            bits = a().astype(np.int64) >> np.minimum(at, 63)
            field = bits & ((np.int64(1) << np.minimum(size, 32)) - 1)
            if kind == "s32":
                assert (at + size <= 32).all()
                negative = (size > 0) & ((field >> np.maximum(size - 1, 0)) & 1 == 1)
                field = np.where(negative, field - (np.int64(1) << size), field)
            self.put(line.operands[0], field.astype(_TYPES[kind]), mask)

        return step

    def _make_popc(self, line: Line, parts: list[str]) -> Callable:
        return self._elementwise(line, "b32", lambda x: np.bitwise_count(x).astype(np.uint32))

    def _make_prmt(self, line: Line, parts: list[str]) -> Callable:
        assert parts == ["b32"]
        a, b, select = (self.get(x, "b32") for x in line.operands[1:])

        def step(mask: Mask) -> None:
            low, high = (self._full(x()).astype(np.uint64) for x in (a, b))
            both, choice = low | high << np.uint64(32), select().astype(np.uint64)
            result = np.zeros(self.n, np.uint64)
            for byte in range(4):
                nibble = choice >> np.uint64(4 * byte) & np.uint64(15)
                picked = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
                sign = np.where(picked & np.uint64(128), np.uint64(255), np.uint64(0))
                picked = np.where(nibble & np.uint64(8), sign, picked)
                result |= picked << np.uint64(8 * byte)
            self.put(line.operands[0], result.astype(np.uint32), mask)

        return step

    def _make_selp(self, line: Line, parts: list[str]) -> Callable:
        a, b = (self.get(x, parts[-1]) for x in line.operands[1:3])
        which = self.get(line.operands[3], "pred")
        return lambda mask: self.put(line.operands[0], np.where(which(), a(), b()), mask)

    def _make_setp(self, line: Line, parts: list[str]) -> Callable:
        compare, kind = _COMPARISONS[parts[0]], parts[-1]
        if len(parts) != 2:
            raise NotImplementedError(str(line))
        if kind.endswith("x2"):
            first, second = line.operands[0].split("|")
            sources = [self.get(x, "b32") for x in line.operands[1:]]

            def step(mask: Mask) -> None:
                pairs = [_floats(_halves(self._full(x())), kind[:-2]) for x in sources]
                result = compare(*pairs)
                self.put(first, result[:, 0], mask)
                self.put(second, result[:, 1], mask)

            return step
        return self._elementwise(line, kind, compare, "pred")

    def _make_mov(self, line: Line, parts: list[str]) -> Callable:
        kind = parts[-1]
        target, source = line.operands
        if target.startswith("{"):
            names = self.several(target)
            size = _SIZES[kind] // len(names)
            whole = self.get(source, kind)

            def unpack(mask: Mask) -> None:
                pieces = np.ascontiguousarray(self._full(whole())).view(f"u{size}")
                for i, name in enumerate(names):
                    self.put(name, pieces.reshape(self.n, -1)[:, i].copy(), mask)

            return unpack
        if source.startswith("{"):
            names = self.several(source)
            size = 8 * _SIZES[kind] // len(names)
            pieces = [self.get(x, f"b{size}") for x in names]

            def pack(mask: Mask) -> None:
                parts = [self._full(x()) for x in pieces]
                self.put(target, np.stack(parts, 1).view(_TYPES[kind])[:, 0], mask)

            return pack
        return self._elementwise(line, kind, lambda x: x)

    def _make_cvt(self, line: Line, parts: list[str]) -> Callable:
        to, kind = parts[-2:]
        how = set(parts[:-2])
        target = line.operands[0]
        sources = [self.get(x, kind) for x in line.operands[1:]]
        if to.endswith("x2"):  # the first one is the high half
            high, low = sources
            bits = _to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)

            def pack(mask: Mask) -> None:
                both = [bits(self._full(x())) for x in (low, high)]
                self.put(target, np.stack(both, 1).view(np.uint32)[:, 0], mask)

            return pack
        (source,) = sources
        if to == "bf16":
            return lambda mask: self.put(target, _to_bf16(source()), mask)
        if to == "tf32" and how == {"rna"}:
            return lambda mask: self.put(target, _to_tf32(source()), mask)
        dtype = _TYPES["f32"] if kind == "bf16" and to == "f32" else _TYPES[to]
        if to[0] in "us" and (kind[0] == "f" or kind == "bf16"):
            rounding = _ROUNDINGS[next(x for x in how if x in _ROUNDINGS)]
            limits = np.iinfo(dtype)

            def to_integer(mask: Mask) -> None:
                x = rounding(source().astype(np.float64))
                x = np.where(np.isnan(x), 0.0, np.clip(x, limits.min, limits.max))
                wide = np.where(x >= limits.max, limits.max, x.astype(np.int64))
                self.put(target, wide.astype(dtype), mask)

            return to_integer
        if how == {"sat"}:
            return lambda mask: self.put(
                target, np.fmin(np.fmax(source(), 0), 1).astype(dtype), mask
            )
        if how - {"rn"}:
            raise NotImplementedError(str(line))
        return lambda mask: self.put(target, source().astype(dtype), mask)

    # Across the threads of a warp.

    def _whole_warps(self, mask: Mask) -> Array:
        """[warps] which of them run; an error where only a part of one does."""
        if mask is None:
            return np.ones(self.n // _WARP, bool)
        by_warp = mask.reshape(-1, _WARP)
        runs = by_warp.any(1)
        if (runs & ~by_warp.all(1)).any():
            raise self.fault("only a part of a warp arrives", np.flatnonzero(mask))
        return runs

    def _make_shfl(self, line: Line, parts: list[str]) -> Callable:
        mode = parts[1]
        target, _, found = line.operands[0].partition("|")
        source = self.get(line.operands[1], "b32")
        count, clamp = (self.get(x, "u32") for x in line.operands[2:4])

        def step(mask: Mask) -> None:
            self._whole_warps(mask)
            lane = np.arange(self.n) % _WARP
            by, limits = (np.asarray(x()).astype(np.int64) for x in (count, clamp))
            segment, last = limits >> 8 & 31, limits & 31
            most = (lane & segment) | (last & ~segment)
            if mode == "bfly":
                other, valid = lane ^ by, (lane ^ by) <= most
            elif mode == "idx":
                other = (lane & segment) | (by & ~segment)
                valid = other <= most
            elif mode == "down":
                other, valid = lane + by, lane + by <= most
            else:
                raise NotImplementedError(str(line))
            other = np.where(valid, other, lane)
            value = self._full(source())
            self.put(target, value[np.arange(self.n) - lane + other], mask)
            if found:
                self.put(found, self._full(valid), mask)

        return step

    def _make_redux(self, line: Line, parts: list[str]) -> Callable:
        kind = parts[-1]
        reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}[parts[1]].reduce
        source = self.get(line.operands[1], kind)

        def step(mask: Mask) -> None:
            self._whole_warps(mask)
            value = self._full(source()).reshape(-1, _WARP)
            total = reduce(value, axis=1, dtype=_TYPES[kind])
            self.put(line.operands[0], np.repeat(total, _WARP), mask)

        return step

    def _make_bar(self, line: Line, parts: list[str]) -> Callable:
        assert parts[:2] == ["warp", "sync"]

        def step(mask: Mask) -> None:
            self._whole_warps(mask)

        return step

    # Memory.

    def _make_ld(self, line: Line, parts: list[str]) -> Callable:
        kind = parts[-1]
        targets = self.several(line.operands[0])
        size = _SIZES[kind]
        whole = size * len(targets)
        space, address = self._place(line.operands[1], parts[0])
        constant = {"constant": True} if "nc" in parts else {}

        def step(mask: Mask) -> None:
            lanes = np.arange(self.n) if mask is None else np.flatnonzero(mask)
            data = space().load(lanes, address()[lanes], whole, **constant)
            values = data.view(_TYPES.get(kind, f"u{size}"))
            for i, target in enumerate(targets):
                full = np.zeros(self.n, values.dtype)
                full[lanes] = values[:, i]
                self.put(target, full, mask)

        return step

    def _make_st(self, line: Line, parts: list[str]) -> Callable:
        kind = parts[-1]
        sources = [self.get(x, "b" + str(8 * _SIZES[kind])) for x in self.several(line.operands[1])]
        space, address = self._place(line.operands[0], parts[0])

        def step(mask: Mask) -> None:
            lanes = np.arange(self.n) if mask is None else np.flatnonzero(mask)
            values = [self._full(x())[lanes] for x in sources]
            data = np.stack(values, 1).view(np.uint8).reshape(len(lanes), -1)
            space().store(lanes, address()[lanes], data)

        return step

    def _make_atom(self, line: Line, parts: list[str]) -> Callable:
        known = {"global", "gpu", "relaxed", "acq_rel", "acquire", "release"}
        if set(parts[:-2]) - known or parts[-2:] not in (["add", "u32"], ["inc", "u32"]):
            raise NotImplementedError(str(line))
        acquires = bool({"acquire", "acq_rel"} & set(parts))
        releases = bool({"release", "acq_rel"} & set(parts))
        address, by = self._address(line.operands[1], "u64"), self.get(line.operands[2], "u32")
        change: dict[str, Callable] = {
            "add": lambda old, x: old + x,
            "inc": lambda old, limit: 0 if old >= limit else old + 1,
        }
        to = change[parts[-2]]

        def step(mask: Mask) -> None:
            lanes = np.arange(self.n) if mask is None else np.flatnonzero(mask)
            values = self._full(by())
            old = np.zeros(self.n, np.uint32)
            for lane in map(int, self.random.permutation(lanes)):
                value, at = values[lane], int(address()[lane])
                old[lane] = self.globals.count(
                    lane, at, lambda x, value=value: to(x, value), acquires, releases
                )
            self.put(line.operands[0], old, mask)

        return step

    def _make_membar(self, line: Line, parts: list[str]) -> Callable:
        if parts != ["gl"]:
            raise NotImplementedError(str(line))
        return lambda mask: self.order.fence(mask)

    # Clusters, and addresses that say of which program's memory they are.

    def _make_barrier(self, line: Line, parts: list[str]) -> Callable:
        if parts[:2] != ["cluster", "arrive"]:
            raise NotImplementedError(str(line))
        releases = "relaxed" not in parts
        return lambda mask: self.order.arrive(mask, releases)

    def _make_cvta(self, line: Line, parts: list[str]) -> Callable:
        if parts[0] == "to":
            if parts[1] != "global":
                raise NotImplementedError(str(line))
            return self._elementwise(line, "u64", lambda x: x)
        if parts[0] in ("global", "param"):  # of parameters none but comparisons are known
            return self._elementwise(line, "u64", lambda x: x)
        assert parts == ["shared", "u64"]
        return self._elementwise(line, "s64", lambda x: Generic.of_shared(self.cta, x))

    def _make_mapa(self, line: Line, parts: list[str]) -> Callable:
        if parts != ["u64"]:
            raise NotImplementedError(str(line))
        address, rank = self.get(line.operands[1], "s64"), self.get(line.operands[2], "s32")

        def step(mask: Mask) -> None:
            bad = (rank() < 0) | (rank() >= self.cluster)
            bad = self._full(bad) & (True if mask is None else mask)
            if bad.any():
                raise self.fault("maps to beyond the cluster", np.flatnonzero(bad))
            first = self.cta // self.cluster * self.cluster
            self.put(line.operands[0], Generic.moved(address(), first + rank()), mask)

        return step

    def _make_cp(self, line: Line, parts: list[str]) -> Callable:
        if parts[1] == "commit_group":
            return lambda mask: self.shared.commit(mask)
        if parts[1] in ("wait_group", "wait_all"):
            behind = int(line.operands[0], 0) if line.operands else 0
            return lambda mask: self.shared.wait(mask, behind)
        assert parts[:1] == ["async"]
        assert parts[2:4] == ["shared", "global"]
        to, source = self._address(line.operands[0], "u32"), self._address(line.operands[1], "u64")
        size = int(line.operands[2], 0)
        given = self.get(line.operands[3], "u32") if len(line.operands) > 3 else None

        def step(mask: Mask) -> None:
            lanes = np.arange(self.n) if mask is None else np.flatnonzero(mask)
            data = np.zeros((len(lanes), size), np.uint8)
            counts = self._full(size if given is None else given())[lanes]
            for count in np.unique(counts):
                if count:
                    these = counts == count
                    some = lanes[these]
                    data[these, :count] = self.globals.load(some, source()[some], int(count))
            self.shared.copy(lanes, to()[lanes], data)

        return step

    def _make_ldmatrix(self, line: Line, parts: list[str]) -> Callable:
        targets = self.several(line.operands[0])
        address = self._address(line.operands[1], "u32")
        rows = 8 * len(targets)

        def step(mask: Mask) -> None:
            runs = np.flatnonzero(self._whole_warps(mask))
            at = address().reshape(-1, _WARP)[runs, :rows]
            lanes = runs[:, None] * _WARP + np.arange(rows)
            data = self.shared.load(lanes.ravel(), at.ravel(), 16)
            matrices = data.view(np.uint16).reshape(len(runs), -1, 8, 8)
            if "trans" in parts:
                matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
            pairs = matrices.view(np.uint32).reshape(len(runs), -1, _WARP)
            for i, target in enumerate(targets):
                full = np.zeros((self.n // _WARP, _WARP), np.uint32)
                full[runs] = pairs[:, i]
                self.put(target, full.ravel(), mask)

        return step

    def _make_stmatrix(self, line: Line, parts: list[str]) -> Callable:
        sources = [self.get(x, "b32") for x in self.several(line.operands[1])]
        address = self._address(line.operands[0], "u32")
        lane = np.arange(_WARP)
        row, column = lane // 4, lane % 4 * 2

        def step(mask: Mask) -> None:
            runs = np.flatnonzero(self._whole_warps(mask))
            at = address().reshape(-1, _WARP)[runs]
            for i, source in enumerate(sources):
                pairs = _halves(self._full(source())).reshape(-1, _WARP, 2)[runs]
                matrices = np.zeros((len(runs), 8, 8), np.uint16)
                matrices[:, row, column], matrices[:, row, column + 1] = (
                    pairs[..., 0],
                    pairs[..., 1],
                )
                if "trans" in parts:
                    matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
                lanes = runs[:, None] * _WARP + 8 * i + np.arange(8)
                data = matrices.view(np.uint8).reshape(-1, 16)
                self.shared.store(lanes.ravel(), at[:, 8 * i : 8 * i + 8].ravel(), data)

        return step

    # Matrix units.

    def _registers(self, names: list[str]) -> list[Source]:
        return [self.get(x, "b32") for x in names]

    def _numbers(self, sources: list[Source], kind: str) -> Array:
        """[warps, registers, 8, 4, numbers of a register] what registers hold in float32."""
        bits = np.stack([self._full(x()) for x in sources]).reshape(len(sources), -1, 8, 4)
        values = _tf32(bits)[..., None] if kind == "tf32" else _floats(_halves(bits), kind)
        return values.swapaxes(0, 1)

    def _fragment(self, sources: list[Source], kind: str) -> Array:
        """[warps, 16, K] a matrix of 16 rows, K = 16 for 16-bit numbers and 8 for tf32."""
        values = self._numbers(sources, kind)
        warps, _, rows, _, _ = values.shape
        values = values.reshape(warps, 2, 2, rows, -1)  # halves of K, then halves of the rows
        return values.transpose(0, 2, 3, 1, 4).reshape(warps, 2 * rows, -1)

    def _make_mma(self, line: Line, parts: list[str]) -> Callable:
        shape, types = parts[2], parts[5:]
        kind = types[1]
        if shape != ("m16n8k8" if kind == "tf32" else "m16n8k16") or types[0] != "f32":
            raise NotImplementedError(str(line))
        d, a, b, c = (self.several(x) for x in line.operands)
        a_sources, b_sources = self._registers(a), self._registers(b)
        c_sources = [self.get(x, "f32") for x in c]

        def step(mask: Mask) -> None:
            self._whole_warps(mask)
            left = self._fragment(a_sources, kind)
            right = self._numbers(b_sources, kind).transpose(0, 1, 3, 4, 2)
            right = right.reshape(len(left), -1, 8)
            old = np.stack([self._full(x()) for x in c_sources], 1)
            # [warps, halves of the rows, the eight rows, their pairs of columns]
            old = old.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)
            new = _multiply_add(left, right, old.reshape(-1, 16, 8)).reshape(-1, 2, _WARP, 2)
            for i in range(4):
                self.put(d[i], new[:, i // 2, :, i % 2].ravel(), mask)

        return step

    def _make_wgmma(self, line: Line, parts: list[str]) -> Callable:
        if parts[0] == "fence":
            return lambda mask: None
        if parts[0] == "commit_group":
            return lambda mask: self.shared.commit(mask, "products")
        if parts[0] == "wait_group":
            behind = int(line.operands[0], 0)
            return lambda mask: self.shared.wait(mask, behind, "products")
        shape, kind = parts[3], parts[5]
        width = int(shape[4 : shape.index("k")])
        d, a = self.several(line.operands[0]), line.operands[1]
        in_registers = a.startswith("{")
        a_sources = self._registers(self.several(a)) if in_registers else []
        a_address = None if in_registers else self.get(a, "b64")
        b_address = self.get(line.operands[2], "b64")
        adds = self.get(line.operands[3], "pred")
        negate_a, negate_b, *transposed = (int(x, 0) for x in line.operands[4:])
        if negate_a != 1 or negate_b != 1 or kind not in ("bf16", "f16", "tf32"):
            raise NotImplementedError(str(line))
        transposed = transposed or [0]  # never, of tf32
        old = [self.get(x, "f32") for x in d]
        g, t = np.arange(_WARP) // 4, np.arange(_WARP) % 4

        def step(mask: Mask) -> None:
            runs = self._whole_warps(mask).reshape(-1, 4)
            if (runs.any(1) & ~runs.all(1)).any():
                raise self.fault("only a part of a warpgroup arrives", np.flatnonzero(mask))
            groups = np.flatnonzero(runs[:, 0])
            if in_registers:
                left = self._fragment(a_sources, kind)
                left = left.reshape(-1, 64, left.shape[-1])[groups]
            else:
                left = self._tile(groups, a_address, 64, kind, bool(transposed[0]))
            right = self._tile(groups, b_address, width, kind, bool(transposed[-1]))
            scale = self._full(adds())
            sums = np.zeros((self.n // _WARP, 16, width), np.float32)
            places = [(g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2) for i in range(len(d))]
            for place, before in zip(places, old, strict=True):
                kept = np.where(scale, before(), np.float32(0))
                sums[:, place[0], place[1]] = kept.reshape(-1, _WARP)
            sums = sums.reshape(-1, 64, width)
            sums[groups] = _multiply_add(left, right.transpose(0, 2, 1), sums[groups])
            sums = sums.reshape(-1, 16, width)
            for place, name in zip(places, d, strict=True):
                self.put(name, sums[:, place[0], place[1]].ravel(), mask)

        return step

    def _tile(self, groups: Array, source: Source, rows: int, kind: str, along: bool) -> Array:
        """[groups, rows, K] of shared memory, as descriptors say; `along`: rows side by side."""
        lanes = groups * 4 * _WARP
        size = 4 if kind == "tf32" else 2
        words = self._full(source())[lanes].astype(np.int64)
        start, leading, stride = (((words >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
        swizzle = {0: 16, 1: 128, 2: 64, 3: 32}
        modes = np.unique(words >> 62 & 3)
        assert len(modes) == 1
        span = swizzle[int(modes[0])]
        row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
        start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
        if along:
            per = span // size
            at = start + row // per * leading + k // 8 * stride + k % 8 * span + row % per * size
        elif span == 16:
            per = span // size
            at = start + row // 8 * stride + k // per * leading + row % 8 * 16 + k % per * size
        else:
            at = start + row // 8 * stride + row % 8 * span + k * size
        at = at ^ ((at >> 7 & (span // 16 - 1)) << 4)
        data = self.shared.multiply(lanes, at.reshape(len(groups), -1), size)
        values = _tf32(data) if kind == "tf32" else _floats(data, kind)
        return values.reshape(len(groups), rows, -1)

    def _make_fence(self, line: Line, parts: list[str]) -> Callable:
        assert parts[:2] == ["proxy", "async"]
        return lambda mask: self.shared.fence(mask)

    def _make_griddepcontrol(self, line: Line, parts: list[str]) -> Callable:
        return lambda mask: None


def _quotient(a: Any, b: Any) -> Any:
    """Integers' quotient, rounded towards zero."""
    if np.asarray(a).dtype.kind == "u":
        return a // np.where(b == 0, 1, b).astype(np.asarray(a).dtype)
    wide = np.asarray(a).astype(np.int64)
    by = np.where(b == 0, 1, np.asarray(b).astype(np.int64))
    return (np.sign(wide) * np.sign(by) * (np.abs(wide) // np.abs(by))).astype(np.asarray(a).dtype)


def _tf32(bits: Array) -> Array:
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _to_tf32(x: Array) -> Array:
    """As bits of float32, rounded to nearest, halves away from zero."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), 0x7FFFE000, bits + np.uint32(0x1000) & 0xFFFFE000).astype(
        np.uint32
    )


def _truncated(x: Array) -> Array:
    """float64 to float32, towards zero, but to infinity beyond the largest."""
    near = x.astype(np.float32)
    larger = (np.abs(near) > np.abs(x)) & np.isfinite(near)
    return np.where(larger, np.nextafter(near, np.float32(0)), near)


def _multiply_add(left: Array, right: Array, sums: Array) -> Array:
    """[..., M, N] sums + left @ right as a matrix unit does it, which truncates its sums.

    How many products it adds up at once differs between architectures; here K / 2, as few as known.
    """
    half = left.shape[-1] // 2
    with np.errstate(invalid="ignore", over="ignore"):
        for part in (slice(None, half), slice(half, None)):
            products = np.matmul(left[..., part], right[..., part, :], dtype=np.float64)
            sums = _truncated(products + sums)
    return sums


def _unordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


_SIMPLE: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt,
    "copysign": lambda sign, size: np.copysign(size, sign),
    "rcp": np.reciprocal, "ex2": np.exp2, "lg2": np.log2, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
_BARRIERS = ("bar.sync", "barrier.cluster.wait")
_COMPARISONS: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: _differ(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMPARISONS |= {
    f"{name}u": _unordered(compare)
    for name, compare in (
        ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal),
        ("gt", np.greater), ("ge", np.greater_equal),
    )
}  # fmt: skip
_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _differ(a: Any, b: Any) -> Any:
    """Whether two numbers differ; of floats neither may be NaN."""
    result = np.not_equal(a, b)
    if np.asarray(a).dtype.kind == "f":
        result = result & ~(np.isnan(a) | np.isnan(b))
    return result
