"""A start loads no library that it has no use for."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEEDLESS = {
    "from ldm_scale.conditioning.tokenizers import clip_tokenizer; clip_tokenizer()": ("transformers", "timm"),
    "from ldm_scale.engine import imports; imports.import_uncompiled('deepspeed.runtime.zero.muon.original_muon')": (
        "torch._inductor.compile_fx",
    ),
}


@pytest.mark.parametrize("code", NEEDLESS)
def test_what_nobody_needs_is_not_imported(code: str) -> None:
    found = f"import sys; print(*[name for name in {NEEDLESS[code]} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{found}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
