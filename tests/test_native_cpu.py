"""The CPU library: every kernel of every instruction set against the plain PyTorch path."""

from __future__ import annotations

import math
import mmap
import re
import tempfile
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LENGTH, assert_as_exact_as_torch, build, draw_tokens
from torch import Tensor

import continual_mha
from continual_mha import _native, inputs, ops, reference
from continual_mha.quantized import LARGEST, STORED_AS, QuantizedRing

pytestmark = pytest.mark.skipif(_native.load("cpu") is not None, reason=str(_native.load("cpu")))
assert ops  # it declares the operators that the library implements

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Case(NamedTuple):
    """Arguments of a step, of ``tokens`` tokens where it is not None."""

    streams: int = 3
    embed: int = 12
    heads: int = 2
    length: int = 5
    query_slots: int = 0
    tokens: int | None = None
    separate: bool = False
    bias: bool = True
    extra: bool = False
    zero: bool = False
    update: bool = True
    position: int | None = None
    dtype: torch.dtype = torch.float32


def draw(case: Case, seed: int = 0) -> dict[str, Any]:
    """Tokens, weights and rings. Slots that no token has reached hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return x.to(case.dtype)

    E, L, N = case.embed, case.length, case.streams
    Ek, Ev = (E + 3, E + 5) if case.separate else (E, E)
    shape = (N,) if case.tokens is None else (N, case.tokens)
    query = random(*shape, E)
    tokens = (query, random(*shape, Ek), random(*shape, Ev)) if case.separate else (query,) * 3
    weights = [
        random(E if case.separate else 3 * E, E, scale=E**-0.5),
        random(E, Ek, scale=Ek**-0.5) if case.separate else None,
        random(E, Ev, scale=Ev**-0.5) if case.separate else None,
        random(3 * E) if case.bias else None,
        random(E, E, scale=E**-0.5),
        random(E) if case.bias else None,
        random(1, 1, E) if case.extra else None,
        random(1, 1, E) if case.extra else None,
    ]
    k, v = (random(N, case.heads, L, E // case.heads) for _ in range(2))
    position = torch.randint(0, 3 * L, (N,), generator=generator)
    if case.position is not None:
        position = torch.full((N,), case.position)
    for n, seen in enumerate(position.tolist()):
        k[n, :, seen:] = math.nan
        v[n, :, seen:] = math.nan
    rings = [k, v, random(N, case.query_slots, E), position]
    return {"tokens": tokens, "weights": weights, "rings": rings}


def quantised(ring: Tensor, cache_dtype: torch.dtype) -> QuantizedRing:
    """A ring as one of codes."""
    empty = torch.zeros(1, 1, dtype=STORED_AS[cache_dtype]), torch.zeros(1, 1)
    return QuantizedRing(*empty).holding(ring)


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if x is not None and x.is_floating_point() else x


def step(
    function: Any,
    case: Case,
    drawn: dict[str, Any],
    dtype: torch.dtype,
    option: Any,
    scales: list[Tensor] | None = None,
) -> Any:
    """Output and rings after ``function`` ran on fresh rings; ``option`` is `active` or `first`.

    ``scales``, of rings of codes, are written to."""
    query, key, value = drawn["tokens"]
    shared = cast(query, dtype)
    tokens = [shared, *(shared if x is query else cast(x, dtype) for x in (key, value))]
    weights = [cast(w, dtype) for w in drawn["weights"]]
    rings = [r.clone() if (r := cast(ring, dtype)) is ring else r for ring in drawn["rings"]]
    options = (option, case.zero, 0.0, case.update)
    out = function(*tokens, *weights, *rings, *options, *(scales or ()))
    return out, rings


def functions(case: Case) -> tuple[Any, Any]:
    if case.tokens is None:
        return torch.ops.continual_mha.cpu_ring_step_, reference.ring_step_
    return torch.ops.continual_mha.cpu_ring_steps_, reference.ring_steps_


def assert_equals_reference(case: Case, option: Any = None) -> None:
    """Output as exact as plain PyTorch, the new slots too, every other slot bit for bit."""
    native, plain = functions(case)
    if case.tokens is not None and option is None:
        option = 0
    drawn = draw(case)
    out, rings = step(native, case, drawn, case.dtype, option)
    exact, exact_rings = step(plain, case, drawn, torch.float64, option)
    expected, expected_rings = step(plain, case, drawn, case.dtype, option)
    assert_as_exact_as_torch(out, exact, expected)
    assert torch.equal(rings[3], exact_rings[3])
    for ring, exact_ring, expected_ring, before in zip(
        rings[:3], exact_rings, expected_rings, drawn["rings"], strict=False
    ):
        untouched = (expected_ring == before) | (expected_ring.isnan() & before.isnan())
        if not case.update:
            assert untouched.all()
        assert torch.equal(ring.isnan(), expected_ring.isnan())
        assert torch.equal(ring[untouched].nan_to_num(7), before[untouched].nan_to_num(7))
        written = ~untouched
        assert_as_exact_as_torch(ring[written], exact_ring[written], expected_ring[written])


SHAPES = [
    Case(streams=1, embed=16, length=1),
    Case(streams=2, embed=64, heads=1, length=2),
    Case(streams=130, embed=24, heads=3, length=4),
    Case(streams=4, embed=34, heads=17, length=120),
    Case(streams=5, embed=60, heads=5, length=63),
    Case(streams=7, embed=96, heads=1, length=64),
    Case(streams=2, embed=512, heads=1, length=3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SHAPES)
def test_step_is_as_exact_as_torch_in_every_shape(case: Case, dtype: torch.dtype, isa: str) -> None:
    assert_equals_reference(case._replace(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [None, 1, 11])
@pytest.mark.parametrize("query_slots", [0, 3])
@given(
    separate=st.booleans(),
    bias=st.booleans(),
    extra=st.booleans(),
    zero=st.booleans(),
    update=st.booleans(),
)
def test_steps_are_as_exact_as_torch_with_every_option(
    dtype: torch.dtype, tokens: int | None, query_slots: int, **options: bool
) -> None:
    assert_equals_reference(Case(dtype=dtype, tokens=tokens, query_slots=query_slots, **options))


CLIPS = pytest.mark.parametrize(
    ("case", "first"),
    [
        (Case(streams=1, embed=16, length=1, tokens=5), 2),
        (Case(streams=2, embed=64, heads=1, length=63, tokens=200), 10),
        (Case(streams=2, embed=128, length=64, tokens=1), 0),
        (Case(streams=1, embed=40, length=150, tokens=90), 0),
        (Case(streams=3, embed=34, heads=17, length=20, tokens=70), 3),
        (Case(streams=2, tokens=40, query_slots=3), 40),
        (Case(streams=2, embed=80, length=33, tokens=51, query_slots=4, extra=True, zero=True), 2),
        (Case(streams=130, tokens=3, position=0), 0),
        (Case(streams=0, tokens=3), 1),
        (Case(streams=2, tokens=0), 0),
    ],
)


@CLIPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tokens_are_as_exact_as_torch(
    case: Case, first: int, dtype: torch.dtype, isa: str
) -> None:
    assert_equals_reference(case._replace(dtype=dtype), first)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_several_tokens_one_that_is_not_finite_spoils_its_windows_alone(
    dtype: torch.dtype, bad: float, isa: str
) -> None:
    """Of its stream; in windows beside it, its value meets no weight, not even one of zero."""
    case = Case(streams=2, embed=64, length=20, tokens=60, position=40, dtype=dtype)
    native, _ = functions(case)
    drawn = draw(case)
    expected, _ = step(native, case, drawn, dtype, 0)
    drawn["tokens"][0][1, 17, 3] = bad
    out, _ = step(native, case, drawn, dtype, 0)
    spoilt = slice(17, 17 + case.length)
    others = [t for t in range(60) if t not in range(17, 17 + case.length)]
    assert torch.equal(out[0], expected[0])
    assert out[1, spoilt].isnan().all()
    # another order of summation may serve beside it
    torch.testing.assert_close(out[1, others], expected[1, others])


def draw_codes(case: Case, cache_dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor]]:
    """As ``draw``, with rings of codes, and their scales. Keys and values are the first features
    of their tokens, so that every dtype and every order of summation stores the same codes."""
    drawn = draw(case)
    unit, weights = torch.eye(case.embed, dtype=case.dtype), drawn["weights"]
    if case.separate:
        weights[1:3] = (torch.nn.functional.pad(unit, (0, extra)) for extra in (3, 5))
    else:
        weights[0][case.embed :] = torch.cat([unit, unit])
    if case.bias:
        weights[3][case.embed :] = 0
    (k, k_scale), (v, v_scale) = (quantised(x, cache_dtype) for x in drawn["rings"][:2])
    drawn["rings"][:2] = k, v
    return drawn, [k_scale, v_scale]


def assert_codes_equal_reference(
    case: Case, cache_dtype: torch.dtype, active: Tensor | None = None, first: int = 0
) -> None:
    """Output as exact as plain PyTorch, every code and every scale bit for bit."""
    native, plain = functions(case)
    drawn, scales = draw_codes(case, cache_dtype)
    option = active if case.tokens is None else first
    results = []
    for function, dtype in ((native, case.dtype), (plain, torch.float64), (plain, case.dtype)):
        own = [scale.clone() for scale in scales]
        out, rings = step(function, case, drawn, dtype, option, own)
        results.append((out, [*rings[:2], *own, rings[3]], rings[2]))
    (out, parts, q), (exact, _, exact_q), (expected, expected_parts, expected_q) = results
    assert_as_exact_as_torch(out, exact, expected)
    assert_as_exact_as_torch(q, exact_q, expected_q)
    for part, expected_part in zip(parts, expected_parts, strict=True):
        torch.testing.assert_close(part, expected_part, rtol=0, atol=0, equal_nan=True)


CODES = pytest.mark.parametrize("cache_dtype", list(STORED_AS), ids=str)
TOKENS_OF_CODES = [torch.float32, torch.bfloat16, torch.float16]


@CODES
@pytest.mark.parametrize("dtype", TOKENS_OF_CODES)
@pytest.mark.parametrize("case", SHAPES)
def test_step_over_codes_is_as_exact_as_torch_in_every_shape(
    case: Case, dtype: torch.dtype, cache_dtype: torch.dtype, isa: str
) -> None:
    assert_codes_equal_reference(case._replace(dtype=dtype), cache_dtype)


@CODES
@CLIPS
@pytest.mark.parametrize("dtype", TOKENS_OF_CODES)
def test_several_tokens_over_codes_are_as_exact_as_torch(
    case: Case, first: int, dtype: torch.dtype, cache_dtype: torch.dtype, isa: str
) -> None:
    assert_codes_equal_reference(case._replace(dtype=dtype), cache_dtype, None, first)


@CODES
@given(
    tokens=st.sampled_from([None, 1, 11]),
    query_slots=st.sampled_from([0, 3]),
    separate=st.booleans(),
    bias=st.booleans(),
    extra=st.booleans(),
    zero=st.booleans(),
    update=st.booleans(),
)
def test_steps_over_codes_are_as_exact_as_torch_with_every_option(
    cache_dtype: torch.dtype, **options: Any
) -> None:
    active = torch.tensor([True, False, True])
    assert_codes_equal_reference(Case(**options), cache_dtype, active)


@CODES
@pytest.mark.parametrize("dtype", TOKENS_OF_CODES)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 37])
@pytest.mark.parametrize("many", [None, 2])
def test_tokens_become_the_codes_of_the_reference_whatever_they_hold(
    many: int | None, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, isa: str
) -> None:
    magnitudes = [0.0, 1e-45, 1e-41, 1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e30]
    tokens = torch.randn(len(magnitudes), head_dim) * torch.tensor(magnitudes)[:, None]
    ties = torch.arange(head_dim) + 0.5  # between two codes
    ties[-1] = LARGEST[cache_dtype]
    tokens = torch.cat([tokens, ties[None], -ties[None], tokens[-3:]]).to(dtype)
    tokens += 0.0  # no -0: a sum is none either
    for row, bad in zip(tokens[-3:], (math.inf, -math.inf, math.nan), strict=True):
        row[head_dim // 2] = bad
    heads = tokens.shape[0]
    sizes = {"streams": 2, "embed": heads * head_dim, "heads": heads, "tokens": many}
    case = Case(**sizes, position=7, dtype=dtype)
    drawn, scales = draw_codes(case, cache_dtype)
    drawn["weights"][0].zero_()
    drawn["weights"][3] = torch.cat([tokens.flatten()] * 3)  # what is projected is the bias
    native, _ = functions(case)
    _, (k, v, *_) = step(native, case, drawn, dtype, None if many is None else 0, scales)
    for codes, scale in ((k, scales[0]), (v, scales[1])):
        stored = QuantizedRing(codes[:, :, 7 % case.length], scale[:, :, 7 % case.length])
        expected = quantised(tokens, cache_dtype)
        finite = expected.scale.isfinite().flatten()
        for n in range(case.streams):
            assert torch.equal(stored.codes[n, finite], expected.codes[finite])
            torch.testing.assert_close(
                stored.scale[n], expected.scale, rtol=0, atol=0, equal_nan=True
            )
            read = QuantizedRing(stored.codes[n], stored.scale[n]).to(torch.float32)
            assert read[~finite].isnan().all()


@CODES
def test_token_that_is_not_finite_is_answered_with_nan_until_it_leaves(
    cache_dtype: torch.dtype, isa: str
) -> None:
    case = Case(streams=3, embed=34, heads=2, length=4, position=4)
    drawn, scales = draw_codes(case, cache_dtype)
    native, _ = functions(case)
    for t in range(9):
        tokens = torch.randn(3, 34)
        if t == 2:
            tokens[1] = math.inf
            tokens[2, 0] = math.nan
        now = {**drawn, "tokens": (tokens,) * 3}
        out, drawn["rings"] = step(native, case, now, case.dtype, None, scales)
        held = 2 <= t < 2 + case.length
        assert out[0].isfinite().all()
        assert out[1:].isnan().all() if held else out[1:].isfinite().all()


def input_functions(case: Case) -> tuple[Any, Any]:
    if case.tokens is None:
        return torch.ops.continual_mha.cpu_input_step_, inputs.input_step_
    return torch.ops.continual_mha.cpu_input_steps_, inputs.input_steps_


def input_step(
    function: Any,
    case: Case,
    ring: Tensor,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    option: Any = None,
) -> tuple[Tensor, list[Tensor]]:
    """Output, and the parts of the state after one token, or more, with a delay of
    ``query_slots``; ``option`` is `active` or `first`."""
    drawn = draw(case)
    query, weights = drawn["tokens"][0], [cast(w, dtype) for w in drawn["weights"]]
    parts = [ring.to(dtype)] if cache_dtype is None else quantised(ring, cache_dtype)
    x, *scale = (part.clone() for part in parts)
    state = [x, drawn["rings"][3].clone()]
    options = (option, case.zero, 0.0, case.update, *scale)
    sizes = (case.heads, case.query_slots)
    out = function(query.to(dtype), weights[0], *weights[3:], *state, *sizes, *options)
    return out, [*state, *scale]


def assert_input_step_equals_reference(
    case: Case, cache_dtype: torch.dtype | None = None, option: Any = None
) -> None:
    """Output as exact as plain PyTorch, the state bit for bit; no slot is read before its time."""
    native, plain = input_functions(case)
    ring = torch.randn(case.streams, case.length, case.embed).to(case.dtype)
    blank = torch.arange(case.length) >= draw(case)["rings"][3][:, None]
    ring[blank] = 0
    rest = (cache_dtype, option)
    out, state = input_step(native, case, ring, case.dtype, *rest)
    exact, _ = input_step(plain, case, ring, torch.float64, *rest)
    expected, expected_state = input_step(plain, case, ring, case.dtype, *rest)
    assert_as_exact_as_torch(out, exact, expected)
    for part, expected_part in zip(state, expected_state, strict=True):
        assert torch.equal(part, expected_part)
    ring[blank] = math.nan
    assert torch.equal(input_step(native, case, ring, case.dtype, *rest)[0], out)


@pytest.mark.parametrize("cache_dtype", [None, *STORED_AS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        *SHAPES,
        Case(streams=2, embed=16, length=64),
        Case(streams=2, embed=20, heads=4, length=200),
    ],
)
def test_input_step_is_as_exact_as_torch_in_every_shape(
    case: Case, dtype: torch.dtype, cache_dtype: torch.dtype | None, isa: str
) -> None:
    if dtype == torch.float64 and cache_dtype is not None:
        return  # plain PyTorch serves it
    assert_input_step_equals_reference(case._replace(dtype=dtype), cache_dtype)


@pytest.mark.parametrize("cache_dtype", [None, *STORED_AS], ids=str)
@CLIPS
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_inputs_are_as_exact_as_torch(
    case: Case, first: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, isa: str
) -> None:
    if dtype == torch.float64 and cache_dtype is not None:
        return  # plain PyTorch serves it
    assert_input_step_equals_reference(case._replace(dtype=dtype), cache_dtype, first)


@pytest.mark.parametrize("cache_dtype", [None, *STORED_AS], ids=str)
@given(
    tokens=st.sampled_from([None, 1, 3, 5, 13]),
    query_slots=st.integers(0, 4),
    bias=st.booleans(),
    extra=st.booleans(),
    zero=st.booleans(),
    update=st.booleans(),
    position=st.sampled_from([None, 0, 2, 4, 2**31 - 1]),
)
def test_input_step_is_as_exact_as_torch_with_every_option(
    cache_dtype: torch.dtype | None, **options: Any
) -> None:
    option = torch.tensor([True, False, True]) if options["tokens"] is None else 0
    assert_input_step_equals_reference(Case(**options), cache_dtype, option)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("many", [None, 9])
def test_the_bits_of_an_input_step_depend_on_the_stream_alone(
    many: int | None, isa: str, dtype: torch.dtype
) -> None:
    sizes = {"streams": 11, "embed": 84, "heads": 7, "length": 70, "tokens": many}
    case = Case(**sizes, position=80, extra=True, dtype=dtype)
    drawn, ring = draw(case), torch.randn(11, 70, 84).to(dtype)
    weights = [drawn["weights"][0], *drawn["weights"][3:]]
    native, _ = input_functions(case)
    option = None if many is None else 0

    def run(n: slice, tokens: Tensor) -> Tensor:
        position = drawn["rings"][3][n].clone()
        out: Tensor = native(
            tokens[n], *weights, ring[n].clone(), position, 7, 0, option, True, 0.0, True
        )
        return out

    tokens = drawn["tokens"][0]
    together = run(slice(0, 11), tokens)
    for begin, end in ((0, 1), (0, 2), (4, 7), (5, 11)):
        assert torch.equal(run(slice(begin, end), tokens), together[begin:end])
    strided = tokens.mT.contiguous().mT
    assert torch.equal(run(slice(0, 11), strided), together)


@pytest.mark.parametrize("cache_dtype", [None, *STORED_AS], ids=str)
def test_an_input_that_is_not_finite_reaches_its_stream_until_it_leaves(
    cache_dtype: torch.dtype | None, isa: str
) -> None:
    case = Case(streams=3, embed=34, heads=2, length=4, position=4)
    weights = [draw(case)["weights"][0], *draw(case)["weights"][3:]]
    ring, position = torch.randn(3, 4, 34), torch.full((3,), 4)
    x, *scale = (ring,) if cache_dtype is None else quantised(ring, cache_dtype)
    native = torch.ops.continual_mha.cpu_input_step_
    for t in range(9):
        token = torch.randn(3, 34)
        if t == 2:
            token[1] = math.inf
            token[2, 0] = math.nan
        out = native(token, *weights, x, position, 2, 0, None, False, 0.0, True, *scale)
        held = 2 <= t < 2 + case.length
        assert out[0].isfinite().all()
        assert out[1:].isnan().all() if held else out[1:].isfinite().all()


def test_wrong_arguments_of_an_input_step_are_refused() -> None:
    case = Case()
    good, ring = draw(case)["tokens"][0], torch.randn(3, 5, 12)
    weights = [draw(case)["weights"][0], *draw(case)["weights"][3:]]
    native = torch.ops.continual_mha.cpu_input_step_

    def run(token: Tensor, x: Tensor, heads: int, delay: int, *scale: Tensor) -> None:
        position = torch.zeros(3, dtype=torch.int64)
        native(token, *weights, x, position, heads, delay, None, False, 0.0, True, *scale)

    run(good, ring, 2, 0)
    for wrong, message in (
        ((good[:, :-1], ring, 2, 0), re.escape("query has shape (3, 11), expected (3, 12)")),
        ((good, ring, 5, 0), "do not make 5 heads"),
        ((good, ring, 2, 5), "delay must be"),
        ((good, ring.double(), 2, 0), "another dtype"),
        ((good, ring, 2, 0, torch.ones(3, 5, 1)), "int8 or uint8"),
        ((good, ring.to(torch.int8), 2, 0, torch.ones(3, 5)), "a scale must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*wrong)


def test_paused_streams_answer_but_do_not_advance(isa: str) -> None:
    active = torch.tensor([True, False, True, False, False])
    assert_equals_reference(Case(streams=5, query_slots=2), active)


def test_no_stream_gives_an_empty_output() -> None:
    assert_equals_reference(Case(streams=0))


def test_position_passes_the_range_of_32_bits() -> None:
    assert_equals_reference(Case(position=2**31 - 1, query_slots=3))
    assert_equals_reference(Case(position=2**40 + 3, tokens=9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_s_bits_depend_neither_on_neighbours_nor_on_the_batch_size(
    isa: str, dtype: torch.dtype
) -> None:
    case = Case(streams=11, embed=48, heads=3, length=21, position=60, dtype=dtype)
    drawn = draw(case)
    native = torch.ops.continual_mha.cpu_ring_step_
    together, _ = step(native, case, drawn, dtype, None)
    for count in (1, 2, 3, 6):
        part = {
            "tokens": (drawn["tokens"][0][:count],) * 3,
            "weights": drawn["weights"],
            "rings": [ring[:count] for ring in drawn["rings"]],
        }
        alone, _ = step(native, case, part, dtype, None)
        assert torch.equal(alone, together[:count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("embed", "heads"), [(12, 3), (44, 2), (100, 4), (160, 2)])
def test_projections_of_any_number_of_tokens(
    embed: int, heads: int, dtype: torch.dtype, isa: str
) -> None:
    for streams in (1, 4, 5, 16, 17, 33, 49, 70, 290):
        assert_equals_reference(Case(streams=streams, embed=embed, heads=heads, dtype=dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_of_many_tokens_keep_them_apart(
    dtype: torch.dtype, bad: float, isa: str
) -> None:
    case = Case(streams=50, embed=44, heads=2, dtype=dtype)
    drawn = draw(case)
    native = torch.ops.continual_mha.cpu_ring_step_
    expected, _ = step(native, case, drawn, case.dtype, None)
    drawn["tokens"][0][[3, 40], 5] = bad
    out, _ = step(native, case, drawn, case.dtype, None)
    others = [i for i in range(50) if i not in (3, 40)]
    assert torch.equal(out[others], expected[others])
    assert not torch.equal(out[3], expected[3])


def test_update_false_gives_the_bits_of_update_true() -> None:
    case = Case(streams=4, query_slots=2)
    drawn = draw(case)
    native = torch.ops.continual_mha.cpu_ring_step_
    updated, _ = step(native, case, drawn, case.dtype, None)
    kept, _ = step(native, case._replace(update=False), drawn, case.dtype, None)
    assert torch.equal(updated, kept)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("position", [3, 130])
@pytest.mark.parametrize("delay", [0, 1])
def test_a_step_without_update_writes_to_no_ring_for_a_moment(
    delay: int, position: int, cache_dtype: torch.dtype | None
) -> None:
    """Which others may read meanwhile. Here the ring's memory cannot be written to at all."""
    module = build(
        query_index=-1 - delay, sequence_len=70, formulation="input", cache_dtype=cache_dtype
    ).requires_grad_(False)
    tokens = torch.randn(3, position + 1, module.embed_dim)
    module.start_streams(3)
    module.forward_steps(tokens[:, :-1])
    held = []
    for name in ("_ring_x", "_ring_x_scale"):
        ring = getattr(module, name)
        if ring is None:
            continue
        with tempfile.TemporaryFile() as file:
            file.write(ring.view(torch.uint8).numpy().tobytes())
            file.flush()
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to
            fixed = torch.frombuffer(memory, dtype=ring.dtype).view(ring.shape)
        held.append((name, ring, fixed))
    for name, _, fixed in held:
        module._buffers[name] = fixed
    peeked = module.forward_step(tokens[:, -1], update_state=False)
    for name, ring, _ in held:
        module._buffers[name] = ring
    assert torch.equal(peeked, module.forward_step(tokens[:, -1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_of_the_tokens_do_not_matter(dtype: torch.dtype) -> None:
    native = torch.ops.continual_mha.cpu_ring_step_
    case = Case(streams=6, separate=True, dtype=dtype)
    drawn = draw(case)
    expected, _ = step(native, case, drawn, dtype, None)
    for spread in (lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        strided = {**drawn, "tokens": tuple(map(spread, drawn["tokens"]))}
        assert not strided["tokens"][0].is_contiguous()
        out, _ = step(native, case, strided, dtype, None)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_change_a_bit(threads: int) -> None:
    case = Case(streams=9, embed=256, heads=4, length=70)
    drawn = draw(case)
    native = torch.ops.continual_mha.cpu_ring_step_
    expected, _ = step(native, case, drawn, case.dtype, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, _ = step(native, case, drawn, case.dtype, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 1), (3, 1), (1, 6), (3, 6)])
def test_shared_tile_is_as_exact_as_torch(
    mask: tuple[int, int] | None, sink: bool, dtype: torch.dtype, isa: str
) -> None:
    N, H = 3, 6
    for slots, key_dim, value_dim in [(1, 1, 1), (7, 12, 20), (64, 70, 128)]:
        query = (torch.randn(N, H, key_dim) * key_dim**-0.5).to(dtype)
        key = torch.randn(N, slots, key_dim).to(dtype)
        value = torch.randn(slots, N, value_dim).to(dtype).transpose(0, 1)
        rest = [
            None if mask is None else torch.randn(*mask, slots),
            torch.randn(N, H) if sink else None,
        ]
        wide = [cast(x, torch.float64) for x in (query, key, value, *rest)]
        out, lse = torch.ops.continual_mha.cpu_attend_shared(query, key, value, *rest)
        exact, exact_lse = reference.attend_shared(*wide)
        expected, expected_lse = reference.attend_shared(query, key, value, *rest)
        assert_as_exact_as_torch(out, exact, expected)
        assert_as_exact_as_torch(lse, exact_lse, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 4, 9, 16, 18, 35])
def test_shared_tile_of_any_number_of_heads(heads: int, dtype: torch.dtype, isa: str) -> None:
    """From operators, gradients too, and, with queries that are not rounded, in a whole `forward`;
    of views."""
    native = torch.ops.continual_mha
    for slots, width, of_value in ((16, 32, None), (31, 34, 66), (49, 100, 100), (130, 64, None)):
        clip = torch.randn(3, slots, 2 * width).to(dtype)[..., :width]
        value = None if of_value is None else torch.randn(3, slots, of_value).to(dtype)
        query = (torch.randn(3, heads, width) * width**-0.5).to(dtype)
        args = (query, clip, value, None, None)
        wide = [cast(x, torch.float64) for x in args]
        found = native.cpu_attend_shared(*args)
        exact, plain = reference.attend_shared(*wide), reference.attend_shared(*args)
        for mine, right, other in zip(found, exact, plain, strict=True):
            assert_as_exact_as_torch(mine, right, other)
        grad = torch.randn(found[0].shape).to(dtype)
        given = (grad, None, *args)
        found = native.cpu_attend_shared_backward(*given, *found)
        plain = reference.attend_shared_backward(*given, *plain)
        exact = reference.attend_shared_backward(grad.double(), None, *wide, *exact)
        for mine, right, other in zip(found, exact, plain, strict=True):
            assert_as_exact_as_torch(mine, right, other)
    module = build(embed_dim=2 * heads, num_heads=heads, sequence_len=40).to(dtype)
    x = draw_tokens(module, 3, 40)[0]
    module.requires_grad_(False)
    with continual_mha.use_backend("cpu"):
        found = module(x)
        before = torch.get_num_threads()
        torch.set_num_threads(3)  # which share the heads
        try:
            assert all(map(torch.equal, module(x), found))
        finally:
            torch.set_num_threads(before)
    with continual_mha.use_backend("torch"):
        plain = module(x)
        exact = module.double()(x.double())
    for mine, right, other in zip(found, exact, plain, strict=True):
        assert_as_exact_as_torch(mine, right, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 1), (3, 6)])
@pytest.mark.parametrize("sizes", [(1, 1, None), (7, 12, 20), (70, 33, None), (33, 130, 64)])
def test_shared_tile_and_its_gradients_are_as_exact_as_torch(
    sizes: tuple[int, int, int | None],
    mask: tuple[int, int] | None,
    sink: bool,
    dropout: bool,
    dtype: torch.dtype,
    isa: str,
) -> None:
    """With all that `attend_shared_full` knows, and gradients of all of its results."""
    N, H = 3, 6
    slots, key_dim, value_dim = sizes
    seed, p = (torch.tensor([1 << 61 | 12345]), 0.3) if dropout else (None, 0.0)
    args = [
        (torch.randn(N, H, key_dim) * key_dim**-0.5).to(dtype),
        torch.randn(N, key_dim, slots).to(dtype).mT,  # whose features are far apart
        None if value_dim is None else torch.randn(slots, N, value_dim).to(dtype).transpose(0, 1),
        None if mask is None else torch.randn(*mask, slots),
        torch.randn(N, H) if sink else None,
    ]
    if args[3] is not None:
        args[3][0, 0, slots // 2 + 1 :] = -math.inf
    exact_args = [cast(x, torch.float64) for x in args]
    how = (seed, p, True)
    results = torch.ops.continual_mha.cpu_attend_shared_full(*args, *how)
    plain = reference.attend_shared_full(*args, *how)
    exact = reference.attend_shared_full(*exact_args, *how)
    for actual, best, expected in zip(results, exact, plain, strict=True):
        assert_as_exact_as_torch(actual, best, expected)

    grads = [torch.randn(x.shape).to(x.dtype) for x in results]
    grads[2] = grads[2] if dropout else None
    given = [*grads, *args]
    mine = torch.ops.continual_mha.cpu_attend_shared_full_backward(*given, seed, *results[:3], p)
    plain = reference.attend_shared_full_backward(*given, seed, *plain[:3], p)
    exact = reference.attend_shared_full_backward(
        *(cast(x, torch.float64) for x in given), seed, *exact[:3], p
    )
    for actual, best, expected in zip(mine, exact, plain, strict=True):
        # the sink's gradient is fp32, but comes from outputs that were rounded
        assert_as_exact_as_torch(actual.to(dtype), best, expected.to(dtype))
    results = (*results[:3], p)
    of_query = torch.ops.continual_mha.cpu_attend_shared_query_backward(*given, seed, *results)
    for alone, together in zip(of_query, mine[::3], strict=True):
        assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_gradients_may_lie_anywhere(dtype: torch.dtype) -> None:
    """Heads before streams, as products of matrices by head leave them, or features apart."""
    N, H, S, E = 3, 6, 7, 20
    native = torch.ops.continual_mha
    query, grad = (torch.randn(N, H, E).to(dtype) for _ in range(2))
    key = torch.randn(N, S, E).to(dtype)
    out, lse = native.cpu_attend_shared(query, key, None, None, None)
    expected = native.cpu_attend_shared_backward(grad, None, query, key, *[None] * 3, out, lse)
    for axes in [(1, 0, 2), (0, 2, 1), (2, 1, 0)]:
        there, back = (x.permute(axes).contiguous().permute(axes) for x in (query, grad))
        assert not there.is_contiguous()
        assert torch.equal(native.cpu_attend_shared(there, key, None, None, None)[0], out)
        found = native.cpu_attend_shared_backward(back, None, there, key, *[None] * 3, out, lse)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_as_torch_rounds(dtype: torch.dtype, isa: str) -> None:
    """A sum over one slot with the weight 1, in which every number of 16 bits comes back, and over
    two with weights of one half, where numbers lie halfway between two others.

    AVX512_BF16 takes subnormal numbers for zeros, in torch's products too.
    """

    def known(x: torch.Tensor) -> torch.Tensor:
        if dtype != torch.bfloat16 or isa not in ("amx", "avx512_bf16"):
            return x
        return x.where(~(x.abs() < torch.finfo(dtype).tiny), 0)

    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    query, one = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype)
    for other in (bits, bits.roll(-1), bits.flip(0), torch.zeros_like(bits)):
        value = torch.stack([bits, other]).unsqueeze(0)
        out, _ = torch.ops.continual_mha.cpu_attend_shared(
            query, one.expand(1, 2, 1), value, None, None
        )
        expected = (known(known(bits).float() + known(other).float()) * 0.5).to(dtype)
        torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_dropped_is_what_the_reference_drops(isa: str) -> None:
    """Weights as they are applied: zeros in the same places."""
    N, H, S, p = 2, 3, 37, 0.6
    query, key = torch.zeros(N, H, S), torch.eye(S).expand(N, S, S)
    args = (query, key, None, None, None, torch.tensor([-7]), p, False)
    out = torch.ops.continual_mha.cpu_attend_shared_full(*args)[0]
    expected = reference.attend_shared_full(*args)[0]
    assert torch.equal(out == 0, expected == 0)
    assert 0 < (out == 0).sum() < out.numel()


def test_shared_tile_with_everything_masked_is_nan_as_in_torch() -> None:
    mask = torch.full((1, 1, 3), -math.inf)
    tokens = torch.randn(1, 2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    out, lse = torch.ops.continual_mha.cpu_attend_shared(*tokens, mask, None)
    expected, expected_lse = reference.attend_shared(*tokens, mask, None)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse, expected_lse)


def clip_call(drawn: dict[str, Any], dtype: torch.dtype, *rest: Any) -> tuple[Any, ...]:
    """Arguments of `single_query` with the first token of a case as the query."""
    query, key, value = (cast(x, dtype) for x in drawn["tokens"])
    mask, *others = rest
    weights = [cast(w, dtype) for w in drawn["weights"]]
    return (query[:, 0], key, value, *weights, cast(mask, dtype), *others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 1), (3, 1), (1, 6), (3, 6)])
def test_single_query_is_as_exact_as_torch(
    mask: tuple[int, int] | None, need_weights: bool, dtype: torch.dtype, isa: str
) -> None:
    for extra, zero in [(False, False), (True, False), (False, True), (True, True)]:
        for tokens, separate in [(1, False), (7, True), (70, False)]:
            case = Case(embed=30, heads=6, tokens=tokens, separate=separate, bias=tokens > 1)
            case = case._replace(extra=extra, dtype=dtype)
            added = None if mask is None else torch.randn(*mask, tokens, dtype=dtype)
            drawn, rest = draw(case), (added, case.heads, zero, need_weights)
            out, attn = torch.ops.continual_mha.cpu_single_query(*clip_call(drawn, dtype, *rest))
            exact, exact_attn = inputs.single_query(*clip_call(drawn, torch.float64, *rest))
            plain, plain_attn = inputs.single_query(*clip_call(drawn, dtype, *rest))
            assert_as_exact_as_torch(out, exact, plain)
            assert_as_exact_as_torch(attn, exact_attn, plain_attn)
            assert attn.shape == ((3, tokens + extra + zero) if need_weights else (0,))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_single_query_to_which_the_mask_leaves_nothing(need_weights: bool, extra: bool) -> None:
    case = Case(tokens=4, extra=extra, dtype=torch.float64)
    mask = torch.zeros(3, 2, 4, dtype=torch.float64)
    mask[1, 0] = -math.inf
    args = clip_call(draw(case), case.dtype, mask, case.heads, False, need_weights)
    out, attn = torch.ops.continual_mha.cpu_single_query(*args)
    expected, expected_attn = inputs.single_query(*args)
    assert expected[1].isnan().any() == (need_weights and not extra)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attn, expected_attn, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_single_query_takes_tiles_and_masks_that_lie_anywhere() -> None:
    case = Case(tokens=9, embed=24, heads=3)
    args = list(clip_call(draw(case), case.dtype, torch.randn(3, 3, 9), case.heads, False, True))
    expected = torch.ops.continual_mha.cpu_single_query(*args)
    for i in (0, 1, 2, 11):
        args[i] = args[i].transpose(0, -1).contiguous().transpose(0, -1)
        assert not args[i].is_contiguous()
    for out, wanted in zip(torch.ops.continual_mha.cpu_single_query(*args), expected, strict=True):
        assert torch.equal(out, wanted)


def test_single_query_of_a_stream_has_the_same_bits_in_any_batch_and_on_any_threads() -> None:
    case = Case(streams=9, tokens=33, embed=64, heads=4)
    args = clip_call(draw(case), case.dtype, None, case.heads, True, True)
    expected = torch.ops.continual_mha.cpu_single_query(*args)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = slice(3, 8)
        some = (args[0][rows], args[1][rows], args[2][rows], *args[3:])
        found = torch.ops.continual_mha.cpu_single_query(*some)
    finally:
        torch.set_num_threads(before)
    for out, wanted in zip(found, expected, strict=True):
        assert torch.equal(out, wanted[rows])


def test_nan_in_a_clip_stays_in_its_stream() -> None:
    case = Case(tokens=6)
    drawn = draw(case)
    drawn["tokens"][0][1, 2] = math.nan
    args = clip_call(drawn, case.dtype, None, case.heads, False, True)
    for found in torch.ops.continual_mha.cpu_single_query(*args):
        assert found[1].isnan().all()
        assert not found[[0, 2]].isnan().any()


def test_nan_in_a_token_reaches_the_windows_that_hold_it_and_no_other() -> None:
    case = Case(streams=1, length=4, tokens=20, position=4)
    drawn = draw(case)
    query = drawn["tokens"][0].clone()
    query[:, 9] = math.nan
    drawn["tokens"] = (query,) * 3
    out, _ = step(torch.ops.continual_mha.cpu_ring_steps_, case, drawn, case.dtype, 0)
    touched = torch.arange(9, 13)
    assert out[:, touched].isnan().all()
    assert not out[:, :9].isnan().any()
    assert not out[:, 13:].isnan().any()


def test_wrong_arguments_are_refused_with_the_operator_s_name() -> None:
    case = Case()
    drawn = draw(case)
    native = torch.ops.continual_mha.cpu_ring_step_
    short = {**drawn, "tokens": (drawn["tokens"][0][:, :-1],) * 3}
    with pytest.raises(RuntimeError, match="cpu_ring_step_: query must have 12 features"):
        step(native, case, short, case.dtype, None)
    shapes = re.escape("cpu_ring_step_: active has shape (2,), expected (3,)")
    with pytest.raises(RuntimeError, match=shapes):
        step(native, case, drawn, case.dtype, torch.ones(2, dtype=torch.bool))


def test_cases_that_are_not_covered_are_declined_with_a_reason() -> None:
    case = Case()
    drawn = draw(case)
    args = [*drawn["tokens"], *drawn["weights"], *drawn["rings"], None, False, 0.0, True]
    assert _native.why_not_cpu("ring_step_", *args) is None
    assert "dropout" in str(_native.why_not_cpu("ring_step_", *args[:-2], 0.5, True))
    assert "dtype" in str(_native.why_not_cpu("ring_step_", args[0].double(), *args[1:]))
    query, position = draw(case)["tokens"][0], torch.zeros(3, dtype=torch.int64)
    weights = [drawn["weights"][0], *drawn["weights"][3:]]
    given_ = [query, *weights, torch.zeros(3, 5, 12), position, 2, 0, None, False]
    assert _native.why_not_cpu("input_step_", *given_, 0.0, True) is None
    assert "dropout" in str(_native.why_not_cpu("input_step_", *given_, 0.5, True))
    given_[0] = query.double()
    assert "dtype" in str(_native.why_not_cpu("input_step_", *given_, 0.0, True))
    assert "take_slots" in str(_native.why_not_cpu("take_slots", *args))


@pytest.mark.parametrize(
    ("argument", "shape", "reason"),
    [
        (1, (2, 7, 5), "key has shape (2, 7, 5), expected (2, 7, 8)"),
        (2, (2, 6, 8), "value has shape (2, 6, 8)"),
        (3, (2, 3, 6), "mask must be broadcastable"),
        (4, (2, 4), "sink has shape (2, 4)"),
    ],
)
def test_shared_attention_refuses_what_does_not_fit_together(argument, shape, reason):
    args = [torch.zeros(2, 3, 8), torch.zeros(2, 7, 8), torch.zeros(2, 7, 8), None, None]
    args[argument] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=re.escape(f"cpu_attend_shared: {reason}")):
        torch.ops.continual_mha.cpu_attend_shared(*args)


@pytest.mark.parametrize(
    ("arguments", "tokens", "said"),
    [
        ({"formulation": "input"}, 11, ["cpu: runs it"]),
        ({"formulation": "input"}, 12, ["projected to keys and values first", "cpu: runs it"]),
        ({"formulation": "input", "batch_invariant": True}, 12, ["cpu: runs it"]),
        ({"cache_dtype": torch.int8}, 12, ["cpu: runs it"]),
        ({"cache_dtype": torch.int8, "batch_invariant": True}, 12, ["cpu: runs it"]),
        (
            {"cache_dtype": torch.int8, "batch_invariant": True, "dtype": torch.float64},
            12,
            ["as many single steps", "cpu: the rings are quantised"],
        ),
    ],
)
def test_tokens_at_once_take_the_cheapest_way_that_keeps_the_promises(arguments, tokens, said):
    module = build(**arguments).requires_grad_(False)
    x = draw_tokens(module, 2, tokens)[0]
    lines = continual_mha.explain(module, x).splitlines()[1:]
    for line, part in zip(lines, said, strict=False):
        assert part in line
    assert len(lines) >= len(said)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 7, 4), (2, 0, 4), (0, 3, 5, 2)], ids=str)
def test_slots_are_taken_as_by_plain_pytorch(shape, dtype):
    ring = torch.randint(-100, 100, shape).to(dtype)
    position = torch.tensor([0, 13, 2**62])[: shape[0]]
    take = torch.ops.continual_mha.cpu_take_slots
    for kept in (ring, ring.transpose(0, -1).contiguous().transpose(0, -1)):
        for count in range(shape[-2] + 1):
            for first in (0, 1, 2):
                expected = reference.take_slots(ring, position, first, count)
                assert torch.equal(take(kept, position, first, count), expected)


def test_more_slots_than_there_are_cannot_be_taken():
    take = torch.ops.continual_mha.cpu_take_slots
    ring, position = torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)
    for arguments in (
        (ring, position, 0, 4),
        (ring, position, -1, 1),
        (ring, position, 0, -1),
        (ring, position[:1], 0, 1),
        (ring, position.int(), 0, 1),
        (ring[0], position, 0, 1),
    ):
        with pytest.raises(RuntimeError, match="cpu_take_slots"):
            take(*arguments)


def calls_of(module: Any) -> list[Any]:
    clip = torch.ones(2, 6, 8)
    steps = lambda: [module.forward_step(x) for x in clip.unbind(1)]
    return [lambda: module(clip), steps, lambda: module.forward_steps(clip)]


@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_a_weight_without_memory_is_refused(name: str, formulation: str) -> None:
    """As wrappers that shard or offload weights leave it, also where it is a part of another."""
    module = build(embed_dim=8, num_heads=2, formulation=formulation).requires_grad_(False)
    for call in calls_of(module):
        call()  # and again, without asking what has been asked
    weight = module.get_parameter(name)
    all_weights = torch.cat([torch.ones(3), weight.flatten()])
    weight.data = all_weights[3:].view_as(weight)
    for call in calls_of(module):
        call()
    all_weights.untyped_storage().resize_(0)
    for call in calls_of(module):
        with pytest.raises(RuntimeError, match="storage"):
            call()


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_tokens_and_rings_without_memory_are_refused(
    formulation: str, cache_dtype: torch.dtype | None
) -> None:
    module = build(formulation=formulation, cache_dtype=cache_dtype).requires_grad_(False)
    token, clip = torch.ones(2, module.embed_dim), torch.ones(2, 3, module.embed_dim)
    for _ in range(LENGTH + 2):
        module.forward_step(token)
    ring = module._buffers["_ring_k" if formulation == "kv" else "_ring_x"]
    one, many = lambda: module.forward_step(token), lambda: module.forward_steps(clip)
    for freed, calls in ((token, [one]), (clip, [many]), (ring, [one, many])):
        freed.untyped_storage().resize_(0)
        for call in calls:
            with pytest.raises(RuntimeError, match="storage"):
                call()
        freed.untyped_storage().resize_(freed.nbytes)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_left_to_pytorch(formulation: str, gradient: bool) -> None:
    module = build(embed_dim=8, num_heads=2, formulation=formulation).requires_grad_(False)
    expected = [call() for call in calls_of(module)]
    module.clean_state()
    sparse = module.out_proj.weight.detach().to_sparse_csr()
    module.out_proj.weight = torch.nn.Parameter(sparse, requires_grad=False)
    module.in_proj_weight.requires_grad_(gradient)
    torch.testing.assert_close([call() for call in calls_of(module)], expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("formulation", ["kv", "input"])
@pytest.mark.parametrize("position", [-1, -(10**9), 2**63 - 1])
def test_step_from_positions_that_cannot_be_is_refused(position, formulation, grad):
    """Where nobody has asked before, or the buffer was written to."""
    module = build(formulation=formulation)
    module.start_streams(2)
    state = module.get_state()._replace(position=torch.tensor([0, position]))
    expected = pytest.raises(RuntimeError, match=r"position .* stream 1 is negative or too large")
    with torch.set_grad_enabled(grad):
        with expected:
            module._forward_step(torch.randn(2, module.embed_dim), prev_state=state)
        with torch.no_grad():
            module._ring_position.copy_(state.position)
        for call, shape in ((module.forward_step, (2,)), (module.forward_steps, (2, 3))):
            with pytest.raises(RuntimeError, match="negative or too large"):
                call(torch.randn(*shape, module.embed_dim))
