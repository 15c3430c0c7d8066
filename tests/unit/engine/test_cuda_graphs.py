"""Everything around a recording: when it is made, of what, when it is replayed, and what is refused.

The recording itself needs a GPU; elsewhere a recorder stands in that computes what it was given, and notes its calls.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.config.schema import Config
from ldm_scale.engine.cuda_graphs import ReplayedForward, check_cuda_graphs, record_on_cuda
from ldm_scale.errors import ConfigError
from ldm_scale.models.build import build_seeded, build_unet
from tests.helpers.runs import UNET, set_random_outputs, tiny_config

CUDA = torch.device("cuda")
WIDTH = 16


class _Static(torch.autograd.Function):
    """As a replay: output and gradients lie in memory that the next one overwrites."""

    @staticmethod
    def forward(ctx: Any, network: nn.Module, kept: dict[str, Any], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs[: kept["count"]]]
        with torch.enable_grad():
            output = network(*leaves)
        ctx.kept, ctx.output = kept, output
        ctx.inputs = [*leaves, *network.parameters()]
        kept.setdefault("output", torch.empty_like(output)).copy_(output.detach())
        return kept["output"].detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        wanted = [x for x in ctx.inputs if x.requires_grad]
        found = iter(torch.autograd.grad(ctx.output, wanted, gradient))
        results: list[Tensor | None] = [None, None]
        for index, x in enumerate(ctx.inputs):
            if not x.requires_grad:
                results.append(None)
                continue
            kept = ctx.kept.setdefault(index, torch.empty_like(x))
            results.append(kept.copy_(next(found)).detach())
        return tuple(results)


class _Recorder:
    """In place of torch's: replays by computing, in static memory."""

    def __init__(self) -> None:
        self.samples: list[tuple[Tensor, ...]] = []
        self.parameters: list[int] = []
        self.replays = 0

    def __call__(self, network: nn.Module, samples: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        self.samples.append(samples)
        self.parameters.append(sum(1 for _ in network.parameters()))
        network(*samples)  # as torch's does, several times
        kept: dict[str, Any] = {"count": len(samples)}

        def replay(*inputs: Tensor) -> Tensor:
            self.replays += 1
            return _Static.apply(network, kept, *inputs, *network.parameters())  # type: ignore[no-any-return, no-untyped-call]

        return replay


def _unet(config: Any = UNET) -> nn.Module:
    context_dim = None if config.attention == "self" else WIDTH
    unet = build_seeded(lambda: build_unet(config, 3, 3, context_dim), 0)
    set_random_outputs(unet, seed=1)
    return unet


def _inputs(batch: int = 2, device: str = "cpu", requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    z, context = (torch.randn(batch, *shape, generator=generator) for shape in ((3, 8, 8), (5, WIDTH)))
    return z.to(device), torch.arange(batch, device=device), context.to(device).requires_grad_(requires_grad)


def test_training_records_once_and_replays() -> None:
    plain, unet, recorder = _unet(), _unet(), _Recorder()
    names = list(unet.state_dict())
    ReplayedForward(unet, recorder)
    assert list(unet.state_dict()) == names
    for step in range(3):
        inputs = _inputs()
        for network in (plain, unet):
            network.zero_grad()
            network(*inputs).square().mean().backward()
        assert recorder.replays == step + 1
        for a, b in zip(plain.parameters(), unet.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    assert len(recorder.samples) == 1
    assert recorder.parameters == [len(list(unet.parameters()))], "gradients of the weights are recorded, too"
    given = _inputs()
    for sample, x in zip(recorder.samples[0], given, strict=True):
        assert sample.shape == x.shape
        assert sample.requires_grad == x.requires_grad
        assert sample.is_leaf
        assert sample.data_ptr() != x.data_ptr()


def test_micro_batches_add_up() -> None:
    plain, unet = _unet(), _unet()
    ReplayedForward(unet, _Recorder())
    for seed in range(3):
        z, t, context = _inputs()
        for network in (plain, unet):
            network(z + seed, t, context).square().mean().backward()
    for a, b in zip(plain.parameters(), unet.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_evaluation_computes_as_before() -> None:
    unet, recorder = _unet(), _Recorder()
    ReplayedForward(unet, recorder)
    expected = _unet()
    with torch.no_grad():
        assert torch.equal(unet(*_inputs(3)), expected(*_inputs(3)))
    unet.eval()
    assert torch.equal(unet(*_inputs(5)), expected(*_inputs(5)))
    assert recorder.samples == []


def test_inputs_that_are_absent_stay_absent() -> None:
    config = dataclasses.replace(UNET, attention="self")
    unet, recorder = _unet(config), _Recorder()
    ReplayedForward(unet, recorder)
    z, t, _ = _inputs()
    assert torch.equal(unet(z, t, None), _unet(config)(z, t, None))
    assert len(recorder.samples[0]) == 2


def test_another_shape_is_refused() -> None:
    unet = _unet()
    ReplayedForward(unet, _Recorder())
    unet(*_inputs(2))
    with pytest.raises(ConfigError, match=r"takes inputs of \[2, 3, 8, 8\].* a batch has \[4, 3, 8, 8\]"):
        unet(*_inputs(4))
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs=false"):
        unet(*_inputs(2, requires_grad=False))


def test_other_threads_may_call_cuda_during_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's threads allocate pinned memory, which CUDA's global mode forbids; torch must know the argument."""
    signature = inspect.signature(torch.cuda.make_graphed_callables)
    given: list[inspect.BoundArguments] = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *a, **k: given.append(signature.bind(*a, **k)))
    record_on_cuda(_unet(), _inputs()[:1])
    assert given[0].arguments["capture_error_mode"] == "thread_local"


def _config(stage: str = "diffusion", **sections: dict[str, Any]) -> Config:
    train = {"cuda_graphs": True, "device": "auto"} | sections.pop("train", {})
    return tiny_config(stage, Path(), Path("run"), train=train, **sections)


def test_what_allows_a_recording() -> None:
    check_cuda_graphs(_config(), world_size=1)
    check_cuda_graphs(_config("classifier"), world_size=1, device=CUDA)


@pytest.mark.parametrize(
    ("config", "world_size", "device", "reason"),
    [
        (_config("autoencoder"), 1, None, "stage 1 has two networks"),
        (_config(train={"device": "cpu"}), 1, None, "needs a CUDA device"),
        (_config(), 1, torch.device("cpu"), "needs a CUDA device"),
        (_config(zero={"stage": 2}), 1, CUDA, r"needs zero\.stage=0, got 2"),
        (_config(), 2, CUDA, "for one rank, got 2"),
        (_config(unet={"dropout": 0.1}), 1, CUDA, r"needs unet\.dropout=0, got 0\.1"),
        (
            _config(train={"activation_checkpointing": "full"}),
            1,
            CUDA,
            r"needs train\.activation_checkpointing=none, got full",
        ),
    ],
)
def test_what_forbids_a_recording(config: Config, world_size: int, device: torch.device | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^train\\.cuda_graphs=true .*{reason}.*set train\\.cuda_graphs=false$"):
        check_cuda_graphs(config, world_size, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA graphs are recorded there")
def test_a_recorded_step_is_the_plain_one() -> None:
    plain, unet = _unet().cuda(), _unet().cuda()
    ReplayedForward(unet, record_on_cuda)
    for step in range(4):
        z, t, context = _inputs(device="cuda")
        z = z + step  # a replay must read the new inputs
        for network in (plain, unet):
            network.zero_grad(set_to_none=True)
            network(z, t, context).square().mean().backward()
            with torch.no_grad():
                for parameter in network.parameters():  # and the weights as they have become
                    parameter -= 1e-2 * parameter.grad
        for a, b in zip(plain.parameters(), unet.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
