"""What is read from a binary, on small kernels and on a disassembly written by hand."""

from __future__ import annotations

import pytest
import torch

from ldm_kernels.common import launch

if launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 interprets kernels, and these compile them", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton, which compiles without a GPU")

from ldm_kernels.common import binary
from ldm_kernels.common.binary import Figures
from tests.helpers.toy_kernels import figures, product, toy


@pytest.mark.parametrize("architecture", [80, 90])
def test_vectors_are_128_bits_wide_where_alignment_is_known(architecture: int) -> None:
    aligned, odd = figures(toy(4096), architecture), figures(toy(4095), architecture)
    assert set(aligned.loads) == set(aligned.stores) == {128}
    assert max(odd.loads) < 128
    assert aligned.stack_bytes == aligned.local_loads == aligned.local_stores == aligned.atomics == 0
    assert 0 < aligned.registers < 64
    assert aligned.matrix == {}


def test_matrix_instructions_are_told_apart_by_their_operands() -> None:
    assert set(figures(product(torch.bfloat16, "ieee"), 80).matrix) == {"HMMA.BF16"}
    assert set(figures(product(torch.float16, "ieee"), 80).matrix) == {"HMMA.F16"}
    assert set(figures(product(torch.float32, "tf32"), 80).matrix) == {"HMMA.TF32"}
    assert figures(product(torch.float32, "ieee"), 80).matrix == {}


def test_disassembly_is_parsed() -> None:
    code = "\n".join(
        [
            "        /*0010*/                   S2R R0, SR_TID.X ;",
            "        /*0020*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;",
            "        /*0030*/             @!UP0 LDG.E.EF.64 R4, [R2.64] ;",
            "        /*0040*/              @P3  LDG.E.U16 R4, [R2] ;",
            "        /*0050*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64] ;",
            "        /*0060*/                   LDG.E R4, [R2.64] ;",
            "        /*0070*/                   STG.E.64 [R2.64], R4 ;",
            "        /*0080*/                   LDL.LU.64 R4, [R1+0x8] ;",
            "        /*0090*/                   STL [R1], R4 ;",
            "        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;",
            "        /*00b0*/                   HMMA.16816.F32 R4, R8, R10, R4 ;",
            "        /*00c0*/                   UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR8] ;",
            "        /*00d0*/                   MUFU.EX2 R4, R12 ;",
            "        /*00e0*/                   RED.E.ADD.F32 [R2.64], R5 ;",
            "        /*00f0*/                   REDUX.SUM UR4, R5 ;",
            "        /*0100*/                   UTMALDG.2D [UR8], [UR4] ;",
            "        /*0110*/                   NOP ;",
        ]
    )
    usage = " Function k:\n  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:568 TEXTURE:0\n"
    assert binary.parse(usage, code, 2048) == Figures(
        registers=40,
        stack_bytes=16,
        shared_bytes=3072,
        local_loads=1,
        local_stores=1,
        loads={128: 2, 64: 1, 32: 1, 16: 1},
        stores={64: 1},
        tensor_copies=1,
        matrix={"HGMMA.BF16": 1, "HMMA.F16": 1, "UTCHMMA": 1},
        special=1,
        atomics=1,
        instructions=16,
    )
