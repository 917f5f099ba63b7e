"""What the machine for PTX computes, and what it does not let pass."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("numpy")
from ptx_machine import Machine, parse
from ptx_memory import FaultError, Memory


def run(body: str, tensor: Tensor, programs: int = 1, cluster: int = 1) -> None:
    """Some lines of PTX, of which %rd1 is the tensor's address and %r1 the thread's number.

    %rd2 is the address of the thread's own number in the tensor, %r2 one in shared memory, and %rd3
    that of structure {int, float}: {11, 0.75}.
    """
    ptx = f"""
.visible .entry kernel(
	.param .u32 kernel_param_0,
	.param .u64 kernel_param_1,
	.param .align 8 .b8 kernel_param_2[8]
)
{{
	.reg .pred %p<5>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_1];
	mov.b64 %rd3, kernel_param_2;
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd2, %rd1, %rd2;
	shl.b32 %r2, %r1, 2;
{body}
	ret;
}}
"""
    memory = Memory([tensor])
    machine = Machine(parse(ptx), (programs,), 64, 1024, cluster=cluster)
    machine.run(memory, [5, memory.address(tensor), struct.pack("if", 11, 0.75)])
    memory.read_back()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("st.global.b32 [%rd2+4], %r1;", "beside every tensor"),
        ("st.global.b32 [%rd2+2], %r1;", "misaligned"),
        ("st.global.b32 [%rd1], %r1;", "several threads write one byte"),
        ("ld.shared.b32 %r3, [%r2];", "nobody wrote"),
        ("st.shared.b32 [%r2+1000], %r1;", "beyond the shared memory"),
        ("xor.b32 %r3, %r2, 128; st.shared.b32 [%r2], %r1; ld.shared.b32 %r4, [%r3];", "another"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "part of a warp"),
        ("ld.global.b32 %r3, [%rd1]; st.global.b32 [%rd2], %r1;", "another warp reads"),
        (
            "setp.lt.s32 %p1, %r1, 32; @%p1 ld.global.b16 %rs1, [%rd1+130]; "
            "st.global.b32 [%rd2], %r1;",
            "another warp reads",
        ),
        (
            "st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r3, %r2, 128; "
            "ld.shared.b32 %r4, [%r3]; st.shared.b32 [%r2], %r3;",
            "as another warp reads",
        ),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $L__a; bar.sync 0; $L__a:", "part of a warp"),
        ("st.global.b32 [%rd2], %r1; ld.global.nc.b32 %r3, [%rd2];", "constant"),
        ("barrier.cluster.wait;", "without having arrived"),
    ],
)
def test_what_the_hardware_does_not_promise_is_a_fault(body: str, what: str) -> None:
    body = body.replace("; ", ";\n")
    with pytest.raises(FaultError, match=what):
        run(body, torch.full((64,), 99, dtype=torch.int32))


def test_programs_that_write_one_word_are_found_out() -> None:
    body = "mov.u32 %r3, %ctaid.x;\nst.global.b32 [%rd2], %r3;"
    with pytest.raises(FaultError, match="write"):
        run(body, torch.zeros(64, dtype=torch.int32), programs=2)


def test_a_program_that_writes_what_another_one_has_read_is_found_out() -> None:
    body = """
mov.u32 %r3, %ctaid.x;setp.eq.s32 %p1, %r3, 1;setp.eq.s32 %p2, %r3, 0;
@%p1 ld.global.b32 %r4, [%rd2];@%p2 st.global.b32 [%rd2], %r1;
"""
    outcome(body, torch.full((64,), 99, dtype=torch.int32), "another program reads")


COUNT = "@%p1 atom.{}.gpu.global.inc.u32 %r5, [%rd1], 1;"
MESSAGES = {
    "released by the count": ("bar.sync 0;", COUNT.format("acq_rel"), "bar.sync 0;", None),
    "fenced by who counts": (
        "bar.sync 0;", f"@%p1 membar.gl;{COUNT.format('relaxed')}@%p1 membar.gl;", "bar.sync 0;",
        None,
    ),
    "not released": ("bar.sync 0;", COUNT.format("relaxed"), "bar.sync 0;", "another program"),
    "not acquired": ("bar.sync 0;", COUNT.format("release"), "bar.sync 0;", "another program"),
    "counted early": ("", COUNT.format("acq_rel"), "bar.sync 0;", "another program"),
    "fenced by others than count": (
        "membar.gl;bar.sync 0;", f"{COUNT.format('relaxed')}@%p1 membar.gl;", "bar.sync 0;",
        "another program",
    ),
    "fenced by others than counted": (
        "bar.sync 0;", f"@%p1 membar.gl;{COUNT.format('relaxed')}", "bar.sync 0;membar.gl;",
        "another program",
    ),
}  # fmt: skip


def outcome(body: str, tensor: Tensor, what: str | None, cluster: int = 1) -> None:
    """Runs two programs, which must raise what is said."""
    body = body.replace(";", ";\n")
    if what is None:
        return run(body, tensor, 2, cluster)
    with pytest.raises(FaultError, match=what):
        run(body, tensor, 2, cluster)
    return None


@pytest.mark.parametrize("name", MESSAGES)
def test_what_one_program_tells_another(name: str) -> None:
    before, count, after, what = MESSAGES[name]
    body = f"""
mov.u32 %r3, %ctaid.x;shl.b32 %r4, %r3, 8;cvt.u64.u32 %rd4, %r4;add.s64 %rd4, %rd2, %rd4;
st.global.b32 [%rd4+256], %r1;
{before}
setp.eq.s32 %p1, %r1, 0;{count}
mov.b32 %r6, 0;@%p1 st.shared.b32 [%r6], %r5;
{after}
ld.shared.b32 %r5, [%r6];setp.eq.s32 %p2, %r5, 0;@%p2 bra $L__end;
sub.s32 %r3, 1, %r3;shl.b32 %r4, %r3, 8;cvt.u64.u32 %rd4, %r4;add.s64 %rd4, %rd2, %rd4;
ld.global.b32 %r3, [%rd4+256];st.global.b32 [%rd2+768], %r3;
$L__end:
"""
    tensor = torch.zeros(256, dtype=torch.int32)
    outcome(body, tensor, what)
    if what is None:
        assert tensor[192:].tolist() == list(range(64))
        assert tensor[0] == 0


ALL, RELAXED, WAIT = (f"barrier.cluster.{x};" for x in ("arrive", "arrive.relaxed", "wait"))
CLUSTERS = {
    "in order": (ALL + WAIT, "", RELAXED + WAIT, None),
    "not released": (RELAXED + WAIT, "", RELAXED + WAIT, "as another warp writes"),
    "too early": ("", "", ALL + WAIT, "may not have begun"),
    "too late": (ALL + WAIT, "", "", "may have ended"),
    "arrived before it": (ALL + WAIT + RELAXED, "", WAIT, "may have ended"),
    "beyond": (ALL + WAIT, "add.s32 %r4, %r4, 2;", RELAXED + WAIT, "beyond the cluster"),
    "never met": (ALL + "@%p1 bra $L__end;" + WAIT, "", "bar.sync 0;", "part of a warp"),
    "twice": (ALL + ALL + WAIT, "", "", "arrives twice"),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_programs_of_a_cluster_reach_each_others_memory(name: str) -> None:
    before, rank, after, what = CLUSTERS[name]
    body = f"""
mov.u32 %r3, %ctaid.x;shl.b32 %r4, %r3, 6;add.s32 %r5, %r4, %r1;setp.eq.s32 %p1, %r1, 0;
st.shared.b32 [%r2], %r5;
{before}
cvt.u64.u32 %rd4, %r2;cvta.shared.u64 %rd4, %rd4;sub.s32 %r4, 1, %r3;{rank}
mapa.u64 %rd4, %rd4, %r4;ld.b32 %r5, [%rd4];
{after}
shl.b32 %r3, %r3, 8;cvt.u64.u32 %rd5, %r3;add.s64 %rd5, %rd5, %rd2;st.b32 [%rd5], %r5;
$L__end:
"""
    tensor = torch.zeros(128, dtype=torch.int32)
    outcome(body, tensor, what, cluster=2)
    if what is None:
        assert tensor.tolist() == [*range(64, 128), *range(64)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("prmt.b32 %r3, %r1, 511, 0x5410;", lambda i: i | 511 << 16),
        ("bfe.s32 %r3, %r1, 2, 3;", lambda i: ((i >> 2 & 7) ^ 4) - 4),
        ("lop3.b32 %r3, %r1, 12, 5, 0xEA;", lambda i: i & 12 | 5),
        ("mul.hi.s32 %r3, %r1, -1;", lambda i: -1 if i else 0),
        ("shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1;", lambda i: i ^ 3),
        ("redux.sync.max.s32 %r3, %r1, -1;", lambda i: i | 31),
        ("cvt.rn.f32.s32 %r3, %r1;\nmul.f32 %r3, %r3, 0f40200000;\ncvt.rzi.s32.f32 %r3, %r3;",
         lambda i: int(2.5 * i)),
        ("sub.s32 %r3, %r1, 40;\ndiv.s32 %r3, %r3, 7;", lambda i: int((i - 40) / 7)),
        ("ld.param.v2.b32 {%r3, %r4}, [%rd3];", lambda i: 11),
        ("ld.param.f32 %r3, [kernel_param_2+4];\nmul.f32 %r3, %r3, 0f40800000;\n"
         "cvt.rzi.s32.f32 %r3, %r3;", lambda i: 3),
        ("ld.param.u32 %r3, [kernel_param_0];", lambda i: 5),
        ("shfl.sync.down.b32 %r3|%p1, %r1, 8, 31, -1;\nselp.b32 %r3, %r3, -1, %p1;",
         lambda i: i + 8 if i % 32 < 24 else -1),
        ("mov.b32 %r3, 1;\n{ .reg .b32 %r3;\nmov.b32 %r3, 7;\n add.s32 %r4, %r1, %r3; }\n"
         "add.s32 %r3, %r3, %r4;", lambda i: i + 8),
        ("cvt.rn.f32.s32 %r3, %r1;\nmul.f32 %r3, %r3, 0f3E800000;\ncvt.sat.f32.f32 %r3, %r3;\n"
         "mul.f32 %r3, %r3, 0f40800000;\ncvt.rzi.s32.f32 %r3, %r3;", lambda i: min(i, 4)),
        ("cvt.rn.f32.s32 %r3, %r1;\nfma.rm.f32 %r3, %r3, 0f3E800000, 0f4B400000;\n"
         "sub.f32 %r3, %r3, 0f4B400000;\ncvt.rzi.s32.f32 %r3, %r3;", lambda i: i // 4),
        ("or.b32 %r3, %r1, 0x64006400;\nmov.b32 %r4, 0x40004000;\nmov.b32 %r5, 0xE400E400;\n"
         "fma.rn.f16x2 %r3, %r3, %r4, %r5;", lambda i: 0x64006400 + 2 * i),
        ("setp.lt.s32 %p1, %r1, 9;\n@%p1 bra $L__a;\nmov.b32 %r3, 1;\nbra $L__b;\n$L__a:\n"
         "mov.b32 %r3, 2;\n$L__b:", lambda i: 2 if i < 9 else 1),
        ("and.b32 %r4, %r1, 31;\nst.shared.b32 [%r2], %r4;\nbar.sync 0;\nand.b32 %r4, %r1, 15;\n"
         "shl.b32 %r4, %r4, 4;\n"
         "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r5, %r3}, [%r4];",
         lambda i: 0x40000 * (i % 4 * 2 + 1) + 8 * (i % 4) + 0x10001 * (i % 32 // 8)
         if i // 4 % 2 == 0 else 0),
    ],
)  # fmt: skip
def test_instructions(body: str, expected: Callable[[int], int]) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    run(f"{body}\nst.global.b32 [%rd2], %r3;", out)
    assert out.tolist() == [expected(i) for i in range(64)]
