"""What a compiled kernel uses, read from its machine code with the tools that come with Triton.

Registers, stack and static shared memory are in the binary's headers (`cuobjdump -res-usage`); the instructions come
from its disassembly (`nvdisasm`). Counts are of instructions in the code, not of instructions executed: a loop's body
counts once. They say how memory is accessed and which unit multiplies, never how long anything takes.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# Shared memory that one block may have (CUDA C++ Programming Guide, "Compute Capabilities": technical specifications).
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_MATRIX = re.compile(r"(?:[HIDQOB]G?|UTC[A-Z]*)MMA")
_TENSOR_COPY = re.compile(r"(?:UTMA|UBLK)[A-Z]*")
_OPERANDS = ("TF32", "BF16", "S8", "U8", "E4M3", "E5M2")


@dataclass(frozen=True)
class Figures:
    """One binary's figures. `loads` and `stores` of global memory count instructions by width in bits per thread."""

    registers: int  # per thread
    stack_bytes: int  # per thread
    shared_bytes: int  # per block, static and dynamic
    local_loads: int  # instructions that read what was spilled
    local_stores: int
    loads: dict[int, int]
    stores: dict[int, int]
    tensor_copies: int  # instructions of the tensor memory accelerator
    matrix: dict[str, int]  # matrix products by instruction and type of their operands, such as HMMA.BF16
    special: int  # MUFU: exponentials, reciprocals, roots
    atomics: int  # on global memory
    instructions: int


def figures_of(compiled: Any) -> Figures:
    """Figures of what `Compilation.compiled` returned."""
    return _disassembled(compiled.asm["cubin"], int(compiled.metadata.shared))


@functools.cache
def _disassembled(cubin: bytes, dynamic_shared_bytes: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    return parse(usage, code, dynamic_shared_bytes)


def parse(usage: str, code: str, dynamic_shared_bytes: int) -> Figures:
    """Figures from the two tools' texts."""
    found = _USAGE.search(usage)
    assert found is not None, f"cuobjdump's answer has no resource usage: {usage!r}"
    registers, stack_bytes, static_bytes = (int(number) for number in found.groups())
    mnemonics = [m for m in _INSTRUCTION.findall(code) if m != "NOP"]
    bases = Counter(m.split(".")[0] for m in mnemonics)
    return Figures(
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=static_bytes + dynamic_shared_bytes,
        local_loads=bases["LDL"],
        local_stores=bases["STL"],
        loads=_by_width(mnemonics, ("LDG", "LDGSTS")),
        stores=_by_width(mnemonics, ("STG",)),
        tensor_copies=sum(n for base, n in bases.items() if _TENSOR_COPY.fullmatch(base)),
        matrix=dict(sorted(Counter(_matrix_kind(m) for m in mnemonics if _MATRIX.fullmatch(_base(m))).items())),
        special=bases["MUFU"],
        atomics=sum(bases[base] for base in ("ATOM", "ATOMG", "RED", "REDG")),
        instructions=len(mnemonics),
    )


def _base(mnemonic: str) -> str:
    return mnemonic.split(".")[0]


def _by_width(mnemonics: list[str], bases: tuple[str, ...]) -> dict[int, int]:
    """Instructions with these bases by the bits that each moves per thread, widest first."""
    widths = Counter(_width(m) for m in mnemonics if _base(m) in bases)
    return dict(sorted(widths.items(), reverse=True))


def _width(mnemonic: str) -> int:
    """Bits per thread: LDG.E.128 has 128, LDG.E.U16 16, and LDG.E without a size 32."""
    sizes = [int(part.lstrip("US")) for part in mnemonic.split(".")[1:] if re.fullmatch(r"[US]?\d+", part)]
    return max((size for size in sizes if size in (8, 16, 32, 64, 128, 256)), default=32)


def _matrix_kind(mnemonic: str) -> str:
    """The instruction with its operands' type: F16 where none is written; tcgen05 keeps it in a descriptor."""
    parts = mnemonic.split(".")
    if parts[0].startswith("UTC"):
        return parts[0]
    operands = next((t for t in _OPERANDS if t in parts), "F16")
    return f"{parts[0]}.{operands}"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
