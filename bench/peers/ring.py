"""Rings made by hand around somebody else's attention: what one would write without this package.

The weights' product, a write to the ring, an attention, the output's product. As one CUDA graph
that is the hardest rival of a fused kernel; the graph timers replay it as such.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..grid import Case
from ..problem import Problem
from ..timing import capture, time_with_events
from .base import Peer, Ready, missing, not_compiled

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
SDPA_BACKENDS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    },
}


class Ring:
    """Keys and values in a ring, both in one tensor so that one kernel writes them.

    On a GPU, or compiled, the slot to write is a tensor, so that a replayed graph goes on and
    nothing is compiled anew; else it is a Python integer, which is faster.
    """

    def __init__(self, problem: Problem, heads_first: bool, compiled: bool = False) -> None:
        k, v = problem.past_kv
        if not heads_first:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.kv = torch.stack([k, v])  # (2, N, H, L, D), or (2, N, L, H, D)
        self._axis = 3 if heads_first else 2
        self._length = problem.case.sequence_len
        self._slot: int | Tensor = 0
        if compiled or problem.device.type != "cpu":
            self._slot = torch.zeros(1, dtype=torch.int64, device=problem.device)

    def write(self, kv: Tensor) -> None:
        """Write the newest token's key and value, (N, 2, H, D), over the oldest."""
        kv = kv.transpose(0, 1).unsqueeze(self._axis)
        if isinstance(self._slot, int):
            self.kv.select(self._axis, self._slot).copy_(kv.squeeze(self._axis))
            self._slot = (self._slot + 1) % self._length
        else:
            self.kv.index_copy_(self._axis, self._slot, kv)
            self._slot.add_(1).remainder_(self._length)


class _Step:
    """A step with a ring and any attention of (N, H, D) queries over it."""

    def __init__(self, problem: Problem, ring: Ring, attend: Attend) -> None:
        self._ring = ring
        self._attend = attend
        mha = problem.mha
        self._weights = (mha.in_proj_weight, mha.in_proj_bias)
        self._out = (mha.out_proj.weight, mha.out_proj.bias)
        self._heads = problem.case.num_heads

    def __call__(self, token: Tensor) -> Tensor:
        qkv = F.linear(token, *self._weights).unflatten(-1, (3, self._heads, -1))
        self._ring.write(qkv[:, 1:])
        heads = self._attend(qkv[:, 0], *self._ring.kv.unbind(0))
        return F.linear(heads.reshape(token.shape), *self._out)


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention of one query, heads first."""
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v)


def _in_inference(backend: SDPBackend | None) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(torch.inference_mode())
    if backend is not None:
        stack.enter_context(sdpa_kernel(backend))
    return stack


def _setup_sdpa(backend: SDPBackend | None, compiled: bool, problem: Problem) -> Ready:
    step = _Step(problem, Ring(problem, True, compiled), _attend_sdpa)
    call = step
    if compiled:
        torch.compiler.reset()  # or cases would use up the limit of compilations of one function
        call = torch.compile(step.__call__, dynamic=False, fullgraph=True)
    return Ready(partial(call, problem.tokens[:, 0]), partial(_in_inference, backend))


def _setup_pipeline(problem: Problem) -> Ready:
    """The same with whichever of the backends is fastest in a graph, on this very problem."""
    times = {}
    for name, backend in SDPA_BACKENDS["cuda"].items():
        ready = _setup_sdpa(backend, False, problem)
        try:
            with ready.context():
                graph = capture(ready.run, 10)
            times[name] = time_with_events(graph.replay, 5, 10).median
        except RuntimeError:  # this backend does not take the shape
            continue
    if not times:
        raise RuntimeError("no backend of scaled_dot_product_attention could be captured")
    best = min(times, key=lambda name: times[name])
    return _setup_sdpa(SDPA_BACKENDS["cuda"][best], False, problem)


def _setup_cache_layer(problem: Problem) -> Ready:
    """A static sliding-window layer of ``transformers``, which shifts its cache in every step."""
    from transformers.cache_utils import StaticSlidingWindowLayer

    case = problem.case
    layer = StaticSlidingWindowLayer(case.sequence_len, case.sequence_len)
    # Releases before 5 take positions; later ones count by themselves and ignore them.
    k, v = problem.past_kv
    layer.update(k, v, {"cache_position": torch.arange(case.sequence_len, device=problem.device)})
    newest = {"cache_position": torch.tensor([case.sequence_len], device=problem.device)}
    mha, heads = problem.mha, case.num_heads
    token = problem.tokens[:, 0]

    def run() -> Tensor:
        qkv = F.linear(token, mha.in_proj_weight, mha.in_proj_bias).unflatten(-1, (3, heads, -1, 1))
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (N, H, 1, D)
        k, v = layer.update(k, v, newest)
        out = F.scaled_dot_product_attention(q, k, v)
        return F.linear(out.reshape(token.shape), mha.out_proj.weight, mha.out_proj.bias)

    return Ready(run, torch.inference_mode, "every step copies an index from the host")


def _setup_flash_decode(problem: Problem) -> Ready:
    from flash_attn import flash_attn_with_kvcache

    case = problem.case
    lengths = torch.full((case.batch_size,), case.sequence_len, dtype=torch.int32)
    lengths = lengths.to(problem.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_with_kvcache(q.unsqueeze(1), k, v, cache_seqlens=lengths)

    step = _Step(problem, Ring(problem, heads_first=False), attend)
    return Ready(partial(step, problem.tokens[:, 0]), torch.inference_mode)


def _setup_flashinfer(problem: Problem) -> Ready:
    """FlashInfer's paged decode: the ring is its pages, all of them full."""
    import flashinfer

    case = problem.case
    length, heads = case.sequence_len, case.num_heads
    page = next(size for size in (16, 8, 4, 2, 1) if length % size == 0)
    pages = length // page
    options = {"dtype": torch.int32, "device": problem.device}
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=problem.device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    decode.plan(
        torch.arange(0, (case.batch_size + 1) * pages, pages, **options),
        torch.arange(case.batch_size * pages, **options),
        torch.full((case.batch_size,), page, **options),
        heads,
        heads,
        case.embed_dim // heads,
        page,
        q_data_type=problem.dtype,
        kv_data_type=problem.dtype,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = tuple(x.view(-1, page, *x.shape[2:]) for x in (k, v))
        return decode.run(q.contiguous(), paged)

    step = _Step(problem, Ring(problem, heads_first=False), attend)
    return Ready(partial(step, problem.tokens[:, 0]), torch.inference_mode)


def _needs_gpu(package: str, device: torch.device, case: Case) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    if case.dtype not in ("float16", "bfloat16"):
        return f"does not take {case.dtype}"
    return missing(package)


def _pipeline_absent(device: torch.device, case: Case) -> str | None:
    return None if device.type == "cuda" else "CUDA graphs need a CUDA device"


def peers(device: torch.device, compiled: bool) -> list[Peer]:
    """Rings around scaled_dot_product_attention by backend, and around installed kernels."""
    backends = SDPA_BACKENDS.get(device.type, {"math": SDPBackend.MATH})
    step = ("step",)
    found = [
        Peer(f"ring + SDPA {name}", step, partial(_setup_sdpa, backend, False))
        for name, backend in backends.items()
    ]
    reason = not_compiled(compiled)
    return [
        *found,
        Peer(
            "ring + SDPA, torch.compile",
            step,
            partial(_setup_sdpa, None, True),
            lambda case: reason,
        ),
        Peer("graphed pipeline", step, _setup_pipeline, partial(_pipeline_absent, device)),
        Peer(
            "transformers StaticSlidingWindowLayer",
            step,
            _setup_cache_layer,
            lambda case: missing("transformers"),
            copies=3,
        ),
        Peer(
            "ring + FlashAttention decode",
            step,
            _setup_flash_decode,
            partial(_needs_gpu, "flash_attn", device),
        ),
        Peer(
            "ring + FlashInfer decode",
            step,
            _setup_flashinfer,
            partial(_needs_gpu, "flashinfer", device),
        ),
    ]
