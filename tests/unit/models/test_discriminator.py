"""The PatchGAN against the published layer table, and its losses against their closed forms."""

import pytest
import torch
from torch import nn

from ldm_scale.errors import ConfigError
from ldm_scale.models.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lecam_penalty,
)


def published_network() -> nn.Sequential:
    """pix2pix's 70x70 discriminator, layer by layer, with its BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.LeakyReLU(0.2),
        nn.Conv2d(256, 512, 4, 1, 1, bias=False), nn.BatchNorm2d(512), nn.LeakyReLU(0.2),
        nn.Conv2d(512, 1, 4, 1, 1),
    )  # fmt: skip


def test_has_the_published_number_of_parameters() -> None:
    ours = sum(p.numel() for p in PatchDiscriminator().parameters())
    assert ours == sum(p.numel() for p in published_network().parameters()) == 2_765_633


def test_equals_the_published_network_but_for_the_norm() -> None:
    torch.manual_seed(0)
    ours = PatchDiscriminator(base_channels=8, norm_groups=1)
    published = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.GroupNorm(1, 16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.GroupNorm(1, 32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 1, 1, bias=False), nn.GroupNorm(1, 64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 4, 1, 1),
    )  # fmt: skip
    for mine, theirs in zip(ours.parameters(), published.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    x = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(ours(x), published(x))


def test_logits_of_an_image_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(base_channels=8).train()
    x = torch.randn(4, 3, 32, 32) * torch.tensor([0.1, 1.0, 3.0, 9.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_sees_patches_of_70_pixels() -> None:
    net = PatchDiscriminator(base_channels=2)
    # A norm's statistics span the whole image; without them only the convolutions' reach is left.
    net.layers = nn.Sequential(*(layer for layer in net.layers if not isinstance(layer, nn.GroupNorm)))
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    net(x)[0, 0, 7, 7].backward()
    assert x.grad is not None
    rows = x.grad[0].abs().sum(dim=(0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize(("size", "num_layers", "patches"), [(32, 3, 2), (24, 3, 1), (12, 2, 1), (256, 3, 30)])
def test_map_of_patches(size: int, num_layers: int, patches: int) -> None:
    net = PatchDiscriminator(base_channels=4, num_layers=num_layers)
    assert net(torch.zeros(1, 3, size, size)).shape == (1, 1, patches, patches)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"23x32 pixels.*at least 24.*discriminator_layers"):
        PatchDiscriminator(base_channels=4)(torch.zeros(1, 3, 23, 32))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_layers = 0"):
        PatchDiscriminator(num_layers=0)


def test_groups_divide_any_width() -> None:
    groups = [m.num_groups for m in PatchDiscriminator(base_channels=24).modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [16, 32, 32]


def test_initialisation() -> None:
    net = PatchDiscriminator()
    net.reset_parameters(torch.Generator().manual_seed(0))
    again = PatchDiscriminator()
    again.reset_parameters(torch.Generator().manual_seed(0))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, again.get_parameter(name), rtol=0, atol=0)
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            mean = 1.0 if parameter.ndim == 1 else 0.0
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
            assert parameter.mean().item() == pytest.approx(mean, abs=0.01), name


def test_losses() -> None:
    real = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    fake = torch.tensor([-3.0, -0.5, 1.0], dtype=torch.float64)
    # max(0, 1 - real) = 0, 0.5, 2 and max(0, 1 + fake) = 0, 0.5, 2
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(2.5 / 3, abs=1e-12)
    assert generator_loss(fake, "hinge").item() == pytest.approx(2.5 / 3, abs=1e-12)
    entropy = nn.BCEWithLogitsLoss()
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(expected.item(), abs=1e-12)
    expected = entropy(fake, torch.ones_like(fake))
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(expected.item(), abs=1e-12)


def test_r1_of_a_linear_discriminator_is_its_squared_weight() -> None:
    weight = torch.randn(3, 8, 8, dtype=torch.float64)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    logits = (x * weight).sum(dim=(1, 2, 3)).view(5, 1, 1, 1).expand(5, 1, 2, 3)  # the mean over patches is the logit
    assert gradient_penalty(logits, x).item() == pytest.approx(weight.square().sum().item())


def test_r1_has_a_gradient_of_its_own() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(base_channels=4, num_layers=1).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = net.layers[0].weight

    def penalty(value: torch.Tensor) -> torch.Tensor:
        state = {**dict(net.named_parameters()), "layers.0.weight": value}
        return gradient_penalty(torch.func.functional_call(net, state, (x,)), x)

    assert torch.autograd.gradcheck(penalty, weight, eps=1e-6, atol=1e-6, nondet_tol=0, fast_mode=True)


def test_lecam() -> None:
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    # (1 + 1)^2 and (3 + 1)^2 from the fakes' average -1; (-2 - 2)^2 and (0 - 2)^2 from the reals' average 2
    assert lecam_penalty(real, fake, average_real=2.0, average_fake=-1.0).item() == pytest.approx(10 + 10)


def test_batch_norm_is_the_published_network() -> None:
    torch.manual_seed(0)
    ours, published = PatchDiscriminator(norm="batch"), published_network()
    renamed = {name.removeprefix("layers."): tensor for name, tensor in ours.state_dict().items()}
    published.load_state_dict(renamed)
    x = torch.randn(3, 3, 48, 40)
    torch.testing.assert_close(ours(x), published(x))
    torch.testing.assert_close(ours.eval()(x), published.eval()(x), msg="running statistics")
