"""How `attention` chooses an implementation, what it refuses, and the kernels as torch ops."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldm_kernels.attention import op, reference
from ldm_kernels.common import launch, tuning
from tests.helpers.kernels import gradients

attention = op.attention


def _qkv(
    queries: int = 6, keys: int = 5, head_dim: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, head_dim, generator=generator) for n in (queries, keys, keys))
    return [x.to(device, dtype).transpose(1, 2) for x in (q, k, v)]


@pytest.fixture
def paths() -> Callable[[], list[str]]:
    """The paths that attention took since the test began."""
    before = launch.outcomes()

    def taken() -> list[str]:
        now = launch.outcomes()
        return sorted(
            path for (name, path), n in now.items() if name == "attention" and n > before.get((name, path), 0)
        )

    return taken


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("scale", [None, 0.3, -0.5])
def test_plain_backends(backend: str, scale: float | None, paths: Callable[[], list[str]]) -> None:
    q, k, v = _qkv()
    exact = reference.attention(q.double(), k.double(), v.double(), scale)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(attention(q, k, v, backend, scale), exact.float(), rtol=1e-5, atol=1e-6)
    assert paths() == [backend]


def test_the_reference_keeps_the_type_and_softmaxes_in_fp32() -> None:
    q, k, v = _qkv(keys=300, dtype=torch.float16)
    out = reference.attention(q * 16, k, v, 0.3)
    assert out.dtype == torch.float16
    exact = (((q * 16) @ k.transpose(-1, -2)).double() * 0.3).softmax(-1)  # of scores that fp16 tells apart by 0.03
    torch.testing.assert_close(out, exact.half() @ v, rtol=1e-3, atol=1e-3)


def test_auto_on_the_cpu(paths: Callable[[], list[str]]) -> None:
    q, k, v = _qkv()
    torch.testing.assert_close(attention(q, k, v), reference.attention(q, k, v), rtol=1e-5, atol=1e-6)
    assert paths() == (["triton cross"] if launch.INTERPRETED else ["sdpa"])


def test_auto_where_the_kernels_do_not_serve(device: str, paths: Callable[[], list[str]]) -> None:
    for head_dim, dtype in ((160, torch.float32), (16, torch.float64)):
        q, k, v = _qkv(head_dim=head_dim, dtype=dtype, device=device)
        torch.testing.assert_close(attention(q, k, v), reference.attention(q, k, v), rtol=1e-4, atol=1e-5)
    assert paths() == ["sdpa"]


def test_auto_leaves_bfloat16_out_of_the_interpreter(paths: Callable[[], list[str]]) -> None:
    q, k, v = _qkv(dtype=torch.bfloat16)
    assert attention(q, k, v).dtype == torch.bfloat16
    assert paths() == ["sdpa"]


def test_few_keys_take_the_cross_kernels(device: str, paths: Callable[[], list[str]]) -> None:
    attention(*_qkv(keys=128, dtype=torch.float16, device=device), backend="triton")
    assert paths() == ["triton cross"]
    attention(*_qkv(keys=129, dtype=torch.float16, device=device), backend="triton")
    assert paths() == ["triton cross", "triton self"]


@pytest.mark.parametrize("keys", [5, 130])
def test_a_negative_scale(keys: int, device: str) -> None:
    qkv = _qkv(keys=keys, device=device)
    g = torch.randn_like(qkv[0])
    actual = gradients(lambda q, k, v: attention(q, k, v, "triton", -0.3), qkv, g)
    exact = gradients(lambda q, k, v: reference.attention(q, k, v, -0.3), qkv, g)
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("winner", ["triton", "reference", "xformers", "sdpa"])
def test_auto_follows_the_measured_winner(
    winner: str, paths: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(operation: str, backend: str, allowed: Any, tensor: Tensor, shape: dict[str, int]) -> str:
        asked.append((operation, backend, shape))
        return winner

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(op, "_HAS_XFORMERS", False)
    q, k, v = _qkv(queries=6, keys=5, head_dim=160)
    attention(q, k, v)
    assert asked == [("attention", "auto", {"queries": 6, "keys": 5, "head_dim": 160, "batch": 6})]
    # A winner that cannot run here (no such package, a shape that the kernels do not serve) leaves the default.
    assert paths() == ["reference" if winner == "reference" else "sdpa"]


def test_refusals(device: str) -> None:
    q, k, v = _qkv(device=device)
    with pytest.raises(ValueError, match="'flash' is unknown; take one of auto, triton, sdpa, xformers, reference"):
        attention(q, k, v, "flash")
    with pytest.raises(ValueError, match=r"q has 3 dimensions and k 4, .* four"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"k \(2, 3, 5, 16\), v \(2, 3, 4, 16\), but k and v must be of one shape"):
        attention(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match=r"q is \(1, 3, 6, 16\).* differ from q in the number of tokens"):
        attention(q[:1], k, v)
    with pytest.raises(TypeError, match=r"q is torch.float32 .* k torch.float16 .* share type and device"):
        attention(q, k.half(), v.half())
    wide = _qkv(head_dim=136, device=device)
    with pytest.raises(ValueError, match=r"head dims 1 to 128 .* not head dim 136 and 5 keys; take backend 'auto'"):
        attention(*wide, backend="triton")
    with pytest.raises(ValueError, match="at least one key, not head dim 16 and 0 keys"):
        attention(q, k[:, :, :0], v[:, :, :0], "triton")
    with pytest.raises(TypeError, match=r"float16 and bfloat16, not torch\.float64"):
        attention(q.double(), k.double(), v.double(), "triton")


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_refuses_the_cpu() -> None:
    with pytest.raises(TypeError, match=r"needs the package triton and a tensor on a CUDA device.*TRITON_INTERPRET=1"):
        attention(*_qkv(), backend="triton")


def test_xformers_refuses_the_cpu() -> None:
    with pytest.raises(TypeError, match="backend 'xformers' needs CUDA tensors, and these are on 'cpu'; take backend"):
        attention(*_qkv(), backend="xformers")


def test_xformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match=r"needs the package xformers.*pip install xformers.* or take backend 'auto'"):
        op._memory_efficient_attention(*_qkv(), 0.25)
    assert op.xformers_operator(*_qkv()) == "unknown"


def test_xformers_is_handed_its_layout_and_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        seen.update(query=query.shape, key=key.shape, value=value.shape, scale=scale)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = _qkv()
    out = op._memory_efficient_attention(q, k, v, 0.3)
    assert seen == {"query": (2, 6, 3, 16), "key": (2, 5, 3, 16), "value": (2, 5, 3, 16), "scale": 0.3}
    torch.testing.assert_close(out, reference.attention(q, k, v, 0.3), rtol=1e-5, atol=1e-6)


def test_the_operator_of_xformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # The question has no public form: the installed release must still answer it, or say that it does not.
    pytest.importorskip("xformers.ops.fmha.dispatch", reason="xformers cannot be imported here")
    from xformers.ops.fmha import dispatch

    class Operator:
        NAME = "an operator"

    shapes = []

    def chosen(inputs: Any, needs_gradient: bool) -> type[Operator]:
        shapes.append((inputs.query.shape, inputs.key.shape, needs_gradient))
        return Operator

    monkeypatch.setattr(dispatch, "_dispatch_fw", chosen)
    assert op.xformers_operator(*_qkv()) == "an operator"
    assert shapes == [((2, 6, 3, 16), (2, 5, 3, 16), True)]


def test_the_package_imports_without_triton_and_leaves_xformers_alone() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from ldm_kernels.attention import op; "
        "assert 'xformers' not in sys.modules; "
        "x = torch.ones(1, 1, 2, 8); assert torch.equal(op.attention(x, x, x, 'sdpa'), x)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.parametrize("keys", [5, 130])
def test_opcheck(keys: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck's own allocations must stay as they are
    # Contiguous inputs: what is laid out otherwise, the fake tensors must know.
    q, k, v = (x[:1, :2].contiguous().requires_grad_() for x in _qkv(keys=keys, device=device))
    if keys == 5:
        torch.library.opcheck(op.cross_attention_fwd, (q, k, v, 0.25))
        out = op.cross_attention_fwd(q, k, v, 0.25).detach()
        plain = [x.detach() for x in (torch.randn_like(out), q, k, v)]
        torch.library.opcheck(op.cross_attention_bwd, (*plain, 0.25))
        return
    torch.library.opcheck(op.attention_fwd, (q, k, v, 0.25))
    out, lse = (x.detach() for x in op.attention_fwd(q, k, v, 0.25))
    assert not op.attention_fwd(q, k, v, 0.25)[1].requires_grad
    plain = [x.detach() for x in (torch.randn_like(out), q, k, v, out)]
    torch.library.opcheck(op.attention_bwd, (*plain, lse, 0.25))


@pytest.mark.parametrize("keys", [5, 130])
def test_compile_and_checkpoints_change_nothing(keys: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler must see torch's own functions
    inputs = [x[:1] for x in _qkv(keys=keys, device=device)]
    g = torch.randn_like(inputs[0])

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, "triton").sin()

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(g)
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    expected = results(block)
    assert len(expected) == 4
    for other in (
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        lambda *x: checkpoint(block, *x, use_reentrant=False),
        lambda *x: checkpoint(block, *x, use_reentrant=True),
    ):
        torch.testing.assert_close(results(other), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_autocast(backend: str, device: str) -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(keys=130, device=device))
    with torch.autocast(device, dtype=torch.float16):
        out = attention(q, k.half(), v, backend)
    assert out.dtype == torch.float16
    expected = reference.attention(q.detach().half(), k.detach().half(), v.detach().half())
    torch.testing.assert_close(out, expected, rtol=5e-3, atol=2e-3)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in grads)
    with torch.autocast(device, dtype=torch.float16):
        assert attention(q.double(), k.double(), v.double(), "reference").dtype != torch.float32


def test_empty_batches(device: str) -> None:
    for keys in (5, 130):
        q, k, v = (x[:0] for x in _qkv(keys=keys, device=device))
        assert attention(q, k, v, "triton").shape == (0, 3, 6, 16)
