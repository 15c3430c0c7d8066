"""Our checkpoints in the layout of CompVis, read by diffusers' own single-file converters, compute there what they
compute here (float32, random weights); published architectures have exactly the tensors that those converters know."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import AutoencoderConfig, ConditioningConfig, TextConditioningConfig, UNetConfig
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.interchange.compvis_conditioning import conditioner_places
from ldm_scale.interchange.compvis_names import FIRST_STAGE, UNET, autoencoder_places, to_theirs, unet_places
from ldm_scale.interchange.compvis_write import fill_compvis_folder, written_unet
from ldm_scale.interchange.load import LoadedAutoencoder, LoadedDiffusion
from ldm_scale.models.autoencoder import Autoencoder
from tests.helpers.compvis import BERT, TEXT, first_stage, second_stage, theirs, write_vocabulary
from tests.helpers.towers import tiny_tower

TOLERANCE = 1e-4  # of the outputs' norm
FIRST = AutoencoderConfig(base_channels=32, channel_multipliers=(1, 2, 2), num_res_blocks=2)
UNETS = {
    "convolutions, a number of heads": UNetConfig(
        base_channels=32, channel_multipliers=(1, 2, 4), head_dim=None, num_heads=4, linear_projection=False
    ),
    "linear layers, a width of heads": UNetConfig(
        base_channels=64, channel_multipliers=(1, 2), attention_levels=(0,), head_dim=32, num_res_blocks=1
    ),
}


def relative_difference(found: Tensor, ours: Tensor) -> float:
    assert found.shape == ours.shape
    assert ours.norm() > 0.1, "an output near zero proves nothing"
    return float((found - ours).norm() / ours.norm())


def converted_unet(
    state: dict[str, Tensor], config: UNetConfig, context_dim: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """diffusers' UNet of the configuration without weights, and the weights as its converter makes them."""
    levels = range(len(config.channel_multipliers))
    attended = [level in config.attention_levels for level in levels]
    widths = [config.base_channels * m for m in config.channel_multipliers]
    # diffusers calls the number of heads `attention_head_dim`.
    heads = config.num_heads or [width // (config.head_dim or 1) for width in widths]
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(  # type: ignore[no-untyped-call]
            in_channels=state[f"{UNET}input_blocks.0.0.weight"].shape[1],
            out_channels=state[f"{UNET}out.2.weight"].shape[0],
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
            block_out_channels=widths,
            layers_per_block=config.num_res_blocks,
            cross_attention_dim=context_dim,
            attention_head_dim=heads,
            use_linear_projection=config.linear_projection,
            transformer_layers_per_block=config.transformer_depth,
        )
    return unet, single_file_utils.convert_ldm_unet_checkpoint(state, unet.config)


def converted_autoencoder(state: dict[str, Tensor], config: AutoencoderConfig) -> tuple[Any, dict[str, Tensor]]:
    levels = len(config.channel_multipliers)
    with torch.device("meta"):
        model: Any = AutoencoderKL(  # type: ignore[no-untyped-call]
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[config.base_channels * m for m in config.channel_multipliers],
            latent_channels=config.latent_channels,
            layers_per_block=config.num_res_blocks,
        )
    return model, single_file_utils.convert_ldm_vae_checkpoint(state, model.config)


@pytest.fixture(scope="module", params=UNETS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionArtifact, Path]:
    folder = tmp_path_factory.mktemp("theirs")
    artifact = second_stage(UNETS[request.param], ConditioningConfig(text=TEXT), first_stage(FIRST))
    fill_compvis_folder(folder, artifact)
    return artifact, folder


@torch.no_grad()
def test_unet(model: tuple[DiffusionArtifact, Path]) -> None:
    artifact, folder = model
    unet, weights = converted_unet(theirs(folder / "model.ckpt"), artifact.unet, TEXT.width)
    unet.load_state_dict(weights, assign=True)
    z, t, context = torch.randn(2, 4, 8, 16), torch.tensor([3, 960]), torch.randn(2, 7, TEXT.width)
    found = unet.eval()(z, t, context).sample
    assert relative_difference(found, LoadedDiffusion(artifact)(z, t, context)) < TOLERANCE


@torch.no_grad()
def test_autoencoder(model: tuple[DiffusionArtifact, Path]) -> None:
    artifact, folder = model
    other, weights = converted_autoencoder(theirs(folder / "model.ckpt"), FIRST)
    other.load_state_dict(weights, assign=True)
    other.eval()
    ours = LoadedAutoencoder(artifact.autoencoder)
    x, z = torch.rand(2, 3, 16, 32) * 2 - 1, torch.randn(2, 4, 4, 8)
    # The scale is in the YAML, as theirs.
    assert relative_difference(other.encode(x).latent_dist.mode() * 0.3, ours.encode(x)) < TOLERANCE
    assert relative_difference(other.decode(z / 0.3).sample, ours.decode(z)) < TOLERANCE


@torch.no_grad()
def test_clip_text_encoder(model: tuple[DiffusionArtifact, Path]) -> None:
    artifact, folder = model
    weights = single_file_utils.convert_ldm_clip_checkpoint(theirs(folder / "model.ckpt"))
    config = CLIPTextConfig(
        hidden_size=TEXT.width,
        intermediate_size=4 * TEXT.width,
        num_hidden_layers=TEXT.depth,
        num_attention_heads=TEXT.num_heads,
        hidden_act=TEXT.activation,
    )
    found = clip_context(config, weights, ["a red apple", ""], artifact)
    assert relative_difference(*found) < TOLERANCE
    # What their FrozenCLIPEmbedder opens by the name in the YAML.
    opened = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokens = condition(artifact).tokens(["a red apple", ""])
    assert relative_difference(opened(tokens).last_hidden_state, found[1]) < TOLERANCE


def condition(artifact: DiffusionArtifact) -> TextCondition:
    assert artifact.conditioning.text is not None
    ours = TextCondition(artifact.conditioning.text).eval()
    prefix = "conditioner.text."
    ours.load_state_dict({n.removeprefix(prefix): t for n, t in artifact.state.items() if n.startswith(prefix)})
    return ours


def clip_context(
    config: CLIPTextConfig, weights: dict[str, Tensor], captions: list[str], artifact: DiffusionArtifact
) -> tuple[Tensor, Tensor]:
    """Contexts of a CLIPTextModel with the converted weights, and ours."""
    other = CLIPTextModel(config).eval()
    own = other.state_dict()
    other.load_state_dict({n if n in own else n.removeprefix("text_model."): t for n, t in weights.items()})
    ours = condition(artifact)
    tokens = ours.tokens(captions)
    found: Tensor = other(tokens).last_hidden_state
    return found, ours(tokens, (1, 1))


@torch.no_grad()
def test_open_clip_text_encoder(tmp_path: Path) -> None:
    tiny_tower(tmp_path)  # OpenCLIP knows its architecture now: three blocks, of which the third is not read
    text = TextConditioningConfig(padding="zero", max_tokens=9, width=16, depth=2, num_heads=2)
    unet = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), head_dim=32)
    artifact = second_stage(unet, ConditioningConfig(text=text))
    (tmp_path / "theirs").mkdir()
    fill_compvis_folder(tmp_path / "theirs", artifact)
    state = theirs(tmp_path / "theirs" / "model.ckpt")
    unread = [name for name in state if ".resblocks.2." in name]
    assert len(unread) == 12
    assert not any(state.pop(name).any() for name in unread)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        max_position_embeddings=9,
    )
    weights = single_file_utils.convert_open_clip_checkpoint(SimpleNamespace(config=config), state)
    assert relative_difference(*clip_context(config, weights, ["a red apple", ""], artifact)) < TOLERANCE


@torch.no_grad()
def test_bert_text_encoder(tmp_path: Path) -> None:
    text = TextConditioningConfig(**(vars(BERT) | {"vocabulary": write_vocabulary(tmp_path / "vocab.txt")}))
    unet = UNetConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), head_dim=32)
    artifact = second_stage(unet, ConditioningConfig(text=text))
    (tmp_path / "theirs").mkdir()
    fill_compvis_folder(tmp_path / "theirs", artifact)
    state = theirs(tmp_path / "theirs" / "model.ckpt")
    config = LDMBertConfig(  # type: ignore[no-untyped-call]
        max_position_embeddings=9,
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=8,
        head_dim=64,
        d_model=16,
    )
    prefix = "cond_stage_model."
    there = tree({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
    other: Any = convert_ldm_bert_checkpoint(there, config).eval()  # type: ignore[no-untyped-call]
    ours = condition(artifact)
    tokens = torch.randint(30522, (2, 9))
    assert relative_difference(other(tokens)[0], ours(tokens, (1, 1))) < TOLERANCE


class tree:
    """A state dict as the modules that it is of, for a converter that reads attributes; absent ones are empty."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        if name in self._state:
            return nn.Parameter(self._state[name])
        if name in ("weight", "bias"):
            return None
        start = f"{name}."
        return tree({key.removeprefix(start): t for key, t in self._state.items() if key.startswith(start)})

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(index.start, index.stop)]
        return getattr(self, str(index))


# Parameters of the UNet as published, and tensors of its state dict.
PUBLISHED = {"sd1": (859_520_964, 686), "sd2": (865_910_724, 686), "text_ldm8": (872_300_484, 686)}
PUBLISHED |= {"imagenet_ldm4_b1200": (400_920_579, 688)}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_architectures_have_the_tensors_that_diffusers_converts(experiment: str) -> None:
    """On the meta device: names and shapes are all of what its converters make a whole model of."""
    config = load_config([f"experiment={experiment}"])
    with torch.device("meta"):
        network = LatentDiffusion(config.unet, config.conditioning, config.autoencoder.latent_channels)
        first = Autoencoder(config.autoencoder)
    places = unet_places(written_unet(config.unet)) | conditioner_places(config.conditioning)
    state = dict(to_theirs(network.state_dict(), places))
    of_unet = [tensor for name, tensor in state.items() if name.startswith(UNET)]
    assert (sum(t.numel() for t in of_unet), len(of_unet)) == PUBLISHED[experiment]
    context_dim = network.conditioner.context_dim
    assert context_dim is not None
    unet, weights = converted_unet(state, config.unet, context_dim)
    assert shapes(weights) == shapes(unet.state_dict())
    if config.autoencoder.kind == "kl":
        state |= to_theirs(first.state_dict(), autoencoder_places(config.autoencoder, FIRST_STAGE))
        autoencoder, weights = converted_autoencoder(state, config.autoencoder)
        assert shapes(weights) == shapes(autoencoder.state_dict())
    if experiment == "sd1":
        clip = {n: t for n, t in state.items() if n.startswith("cond_stage_model.transformer.text_model.")}
        assert (sum(t.numel() for t in clip.values()), len(clip)) == (123_060_480, 196)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
