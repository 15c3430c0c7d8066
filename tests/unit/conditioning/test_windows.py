"""The UNet in overlapping windows against the UNet on the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.conditioning.windows import WindowedUNet
from ldm_scale.models.build import build_seeded, build_unet
from tests.helpers.runs import UNET, set_random_outputs


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    network = build_seeded(lambda: build_unet(UNET, 5, 3, 16), 2)
    set_random_outputs(network, seed=1)
    return network.requires_grad_(False)


def _inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 5, height, width, generator=generator)
    return x, torch.arange(batch) * 300, torch.randn(batch, 4, 16, generator=generator)


def test_one_window_is_the_unet_exactly(unet: nn.Module) -> None:
    x, t, context = _inputs(2, 8, 16)
    assert torch.equal(WindowedUNet(unet, 16)(x, t, context), unet(x, t, context))


@pytest.mark.parametrize(("height", "width"), [(8, 20), (16, 16), (13, 30)])
def test_a_network_that_sees_no_farther_than_the_margin_gives_the_whole(height: int, width: int) -> None:
    """Of an overlap of 8 the outer 2 weigh nothing: two 3x3 convolutions see just that far."""
    first, second = torch.randn(6, 5, 3, 3), torch.randn(3, 6, 3, 3)

    def local(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        shift = t.float()[:, None, None, None] + context.mean(dim=(1, 2))[:, None, None, None]
        return F.conv2d(F.conv2d(x, first, padding=1).tanh(), second, padding=1) + shift

    x, t, context = _inputs(2, height, width)
    result = WindowedUNet(local, 12, 8, max_windows=3)(x, t, context)
    torch.testing.assert_close(result, local(x, t, context), rtol=1e-5, atol=1e-4)
    # Not so with a smaller overlap: the seams show, or this test would prove nothing.
    seams = WindowedUNet(local, 12, 2, max_windows=3)(x, t, context) - local(x, t, context)
    assert seams.abs().max() > 0.01


def test_no_more_than_so_many_windows_are_given_at_once() -> None:
    shapes: list[torch.Size] = []

    def spy(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        assert len(x) == len(t)
        shapes.append(x.shape)
        return x[:, :3]

    x, t, _ = _inputs(3, 40, 24)
    torch.testing.assert_close(WindowedUNet(spy, 8, 2, max_windows=4)(x, t, None), x[:, :3])
    assert max(shape[0] for shape in shapes) == 4
    assert {shape[1:] for shape in shapes} == {(5, 8, 8)}
    assert sum(shape[0] for shape in shapes) == 3 * 7 * 4


def test_every_window_has_its_images_time_and_context() -> None:
    x, t, context = _inputs(3, 20, 8)
    result = WindowedUNet(lambda x, t, c: x[:, :1] * 0 + t[:, None, None, None] + c[:, :1, :1, None], 8)(x, t, context)  # type: ignore[index]
    torch.testing.assert_close(result, (t[:, None, None, None] + context[:, :1, :1, None]).expand(3, 1, 20, 8))


def test_a_megapixel_runs(unet: nn.Module) -> None:
    """1024 x 1024 pixels at f = 8: attention over all 16,384 latents would be 16 times as wide as over a window."""
    x, t, context = _inputs(1, 128, 128)
    result = WindowedUNet(unet, 32, 8, max_windows=4)(x, t, context)
    assert result.shape == (1, 3, 128, 128)
    assert result.isfinite().all()
