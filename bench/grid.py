"""The shapes that are measured: what each stands for, and how much of the grid a size takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

MODES = ("step", "forward", "forward_backward", "steps", "steps_backward")
SIZES = ("quick", "standard", "full")
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Family(NamedTuple):
    """An application: its attention, whatever the number of streams."""

    name: str
    embed_dim: int
    num_heads: int
    sequence_len: int


EXAMPLE = Family("example", 512, 8, 32)  # the documented example of `continual-inference`
DETECTION = Family("detection", 1024, 8, 64)  # online action detection
AUDIO = Family("audio", 192, 16, 120)  # audio classification; a head has 12 features
SPEECH = Family("speech", 512, 8, 250)  # streaming speech
LONG_1024 = Family("long-1024", 512, 8, 1024)
LONG_4096 = Family("long-4096", 512, 8, 4096)
FAMILIES = (EXAMPLE, DETECTION, AUDIO, SPEECH, LONG_1024, LONG_4096)
# Points for which there are older measurements of `continual-inference`.
NARROW = Family("narrow", 128, 4, 32)
MIDDLE = Family("middle", 512, 8, 128)
WIDE = Family("wide", 512, 8, 256)
# In which order tables have them.
_LISTED = (NARROW, EXAMPLE, DETECTION, MIDDLE, WIDE, AUDIO, SPEECH, LONG_1024, LONG_4096)
_PLACES = {family.name: place for place, family in enumerate(_LISTED)}


class Case(NamedTuple):
    """One point of the grid.

    Attributes:
        family: the application, by name.
        batch_size: streams, ``N``.
        embed_dim: ``E``.
        num_heads: ``H``.
        sequence_len: window, ``L``; the clip's length in ``forward``.
        tokens: tokens per stream in a call, ``T``; 1 in a step.
        dtype: name of the dtype.
        mode: one of ``MODES``; what ends in ``backward`` is a call with its gradients.
    """

    family: str
    batch_size: int
    embed_dim: int
    num_heads: int
    sequence_len: int
    tokens: int
    dtype: str
    mode: str

    @property
    def label(self) -> str:
        """Short name for people: ``step detection N=8 E=1024 H=8 L=64 bfloat16``."""
        sizes = f"N={self.batch_size} E={self.embed_dim} H={self.num_heads} L={self.sequence_len}"
        many = f" T={self.tokens}" if self.takes_many else ""
        return f"{self.mode} {self.family} {sizes}{many} {self.dtype}"

    @property
    def trains(self) -> bool:
        """Whether gradients are taken of tokens and weights."""
        return self.mode.endswith("backward")

    @property
    def takes_many(self) -> bool:
        """Whether a call of a stream takes ``T`` tokens."""
        return self.mode.startswith("steps")

    @property
    def goes_on(self) -> bool:
        """Whether a call goes on from a state, and does not take a clip."""
        return self.mode.startswith("step")

    @property
    def state_bytes(self) -> int:
        """Bytes of all streams' keys and values."""
        return 2 * self.batch_size * self.sequence_len * self.embed_dim * BYTES[self.dtype]


def place_of(case: Case) -> tuple[int | str, ...]:
    """What sorts cases for a table; they are measured in another order."""
    family = _PLACES.get(case.family, len(_PLACES))
    return MODES.index(case.mode), family, case.tokens, case.batch_size, case.dtype


def case_of(family: Family, batch_size: int, mode: str, dtype: str, tokens: int = 1) -> Case:
    """A family with so many streams."""
    return Case(
        family.name,
        batch_size,
        family.embed_dim,
        family.num_heads,
        family.sequence_len,
        tokens,
        dtype,
        mode,
    )


# Per device and size, (family, numbers of streams) for steps. The design's own figures come first,
# so that a run that is cut short has them.
_STEP_POINTS: dict[str, dict[str, list[tuple[Family, tuple[int, ...]]]]] = {
    "cpu": {
        "quick": [(NARROW, (1,)), (EXAMPLE, (1, 10)), (AUDIO, (8,))],
        "standard": [
            (NARROW, (1,)),
            (EXAMPLE, (1, 8, 10, 64, 512)),
            (DETECTION, (1, 8, 16, 64)),
            (MIDDLE, (64,)),
            (WIDE, (256,)),
            (AUDIO, (1, 8, 64, 512)),
            (SPEECH, (1, 8, 64)),
            (LONG_1024, (1, 8)),
            (LONG_4096, (1,)),
        ],
        "full": [
            (NARROW, (1, 8, 64, 512)),
            (EXAMPLE, (1, 8, 10, 64, 512, 4096)),
            (DETECTION, (1, 8, 16, 64, 512)),
            (MIDDLE, (64,)),
            (WIDE, (256,)),
            (AUDIO, (1, 8, 64, 512, 4096)),
            (SPEECH, (1, 8, 64, 512)),
            (LONG_1024, (1, 8, 64)),
            (LONG_4096, (1, 8, 64)),
        ],
    },
    "cuda": {
        "quick": [(EXAMPLE, (1, 4096)), (DETECTION, (512,)), (AUDIO, (64,))],
        "standard": [
            (EXAMPLE, (1, 8, 10, 64, 128, 512, 4096)),
            (DETECTION, (1, 8, 64, 512, 4096)),
            (AUDIO, (1, 64, 4096)),
            (SPEECH, (1, 64, 512, 4096)),
            (LONG_1024, (1, 8, 64, 512)),
            (LONG_4096, (1, 8, 64)),
        ],
        "full": [
            (EXAMPLE, (1, 2, 4, 8, 10, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)),
            (DETECTION, (1, 8, 64, 512, 4096, 16384)),
            (AUDIO, (1, 8, 64, 512, 4096, 16384)),
            (SPEECH, (1, 8, 64, 512, 4096)),
            (LONG_1024, (1, 8, 64, 512, 4096)),
            (LONG_4096, (1, 8, 64, 512)),
        ],
    },
}
_FORWARD_POINTS: dict[str, dict[str, list[tuple[Family, int]]]] = {
    "cpu": {
        "quick": [(EXAMPLE, 10)],
        "standard": [(EXAMPLE, 10), (DETECTION, 16), (WIDE, 32), (AUDIO, 16)],
        "full": [(EXAMPLE, 10), (DETECTION, 16), (DETECTION, 256), (WIDE, 32), (AUDIO, 16)],
    },
    "cuda": {
        "quick": [(DETECTION, 256)],
        "standard": [(DETECTION, 256), (EXAMPLE, 10), (WIDE, 256), (AUDIO, 256)],
        "full": [(DETECTION, 256), (EXAMPLE, 10), (WIDE, 256), (AUDIO, 256), (LONG_1024, 256)],
    },
}
_STEPS_POINTS: dict[str, dict[str, list[tuple[Family, int, int]]]] = {
    "cpu": {
        "quick": [(EXAMPLE, 1, 16)],
        "standard": [(EXAMPLE, 1, 16), (EXAMPLE, 1, 256), (DETECTION, 1, 64), (SPEECH, 8, 64)],
        "full": [
            (EXAMPLE, 1, 16),
            (EXAMPLE, 1, 256),
            (DETECTION, 1, 64),
            (DETECTION, 16, 256),
            (SPEECH, 8, 64),
        ],
    },
    "cuda": {
        "quick": [(EXAMPLE, 8, 256)],
        "standard": [(EXAMPLE, 8, 256), (DETECTION, 64, 256), (SPEECH, 1, 256), (SPEECH, 64, 16)],
        "full": [
            (EXAMPLE, 1, 256),
            (EXAMPLE, 8, 256),
            (DETECTION, 64, 256),
            (SPEECH, 1, 256),
            (SPEECH, 64, 16),
            (LONG_1024, 8, 256),
        ],
    },
}
DEFAULT_DTYPES = {
    "cpu": {"quick": ("float32",), "standard": ("float32",), "full": ("float32", "bfloat16")},
    "cuda": {
        "quick": ("bfloat16",),
        "standard": ("bfloat16",),
        "full": ("bfloat16", "float16", "float32"),
    },
}


def cases(
    device_type: str,
    size: str,
    modes: tuple[str, ...] = MODES,
    dtypes: tuple[str, ...] | None = None,
) -> Iterator[Case]:
    """The grid for ``cpu`` or ``cuda``, most important points first: a smaller size's, of any mode.

    Args:
        size: ``quick``, ``standard`` or ``full``, each of which holds the one before.
        modes: which modes to take.
        dtypes: names of dtypes; those that the size has by default if None.
    """
    found: dict[Case, None] = {}
    for each in SIZES[: SIZES.index(size) + 1]:
        for dtype in dtypes or DEFAULT_DTYPES[device_type][each]:
            for mode in modes:
                found |= dict.fromkeys(_cases_of_mode(device_type, each, mode, dtype))
    yield from found


def _cases_of_mode(device_type: str, size: str, mode: str, dtype: str) -> Iterator[Case]:
    if mode == "step":
        for family, batch_sizes in _STEP_POINTS[device_type][size]:
            yield from (case_of(family, n, mode, dtype) for n in batch_sizes)
    elif mode in ("steps", "steps_backward"):
        for family, n, tokens in _STEPS_POINTS[device_type][size]:
            yield case_of(family, n, mode, dtype, tokens)
    else:
        for family, n in _FORWARD_POINTS[device_type][size]:
            yield case_of(family, n, mode, dtype)


class Work(NamedTuple):
    """The least that a case has to move and to compute, in bytes and floating-point operations."""

    bytes: int
    flops: int


def work(case: Case, formulation: str = "kv") -> Work:
    """What ``case`` costs at least: every weight, input, output and cached value moved once.

    ``kv`` caches (or projects) keys and values, ``input`` keeps the tokens themselves and moves
    the two projections to the query's side. The backward pass counts as twice the forward pass.
    """
    n, e, h, length = case.batch_size, case.embed_dim, case.num_heads, case.sequence_len
    size = BYTES[case.dtype]
    weights = 4 * e * e
    passes = 3 if case.trains else 1
    if not case.goes_on:
        elements = weights + n * length * e + n * e
        moved = min(2 * length * e * e + 2 * length * e, 2 * e * e + 2 * h * length * e)
        return Work(passes * elements * size, 2 * passes * n * (2 * e * e + moved))
    cached = (1 if formulation == "input" else 2) * length * e
    written = (1 if formulation == "input" else 2) * min(case.tokens, length) * e
    elements = weights + n * (cached + written + 2 * case.tokens * e)
    attention = 2 * h * length * e if formulation == "input" else 2 * length * e
    flops = 2 * n * case.tokens * (4 * e * e + attention)
    return Work(passes * elements * size, passes * flops)
