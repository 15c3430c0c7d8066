"""Tiny pipelines with random weights as diffusers itself builds and saves them: like the published ones, but small."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_scale.interchange.clip_tokenizer import write_clip_tokenizer

# diffusers and transformers ship no types for their constructors.
_diffusers: Any = diffusers
_bert: Any = pipeline_latent_diffusion
_ClipModel: Any = CLIPTextModel
_ClipTokenizer: Any = CLIPTokenizer
_BertTokenizer: Any = BertTokenizer

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "apple",
    "on",
    "white",
    "plate",
    "face",
    ":",
    ",",
    "3",
)
CONTEXT = 24
FOUR_LEVELS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OURS = {"set_alpha_to_one": False, "steps_offset": 1}
DDIM = {**OURS, "clip_sample": False}


def autoencoder_kl(latent_channels: int = 4, levels: int = 2, **options: Any) -> Any:
    return _diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 16, 16, 16)[:levels],
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def vq_model(**options: Any) -> Any:
    return _diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=40,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def conditional_unet(in_channels: int = 4, **options: Any) -> Any:
    down, up = FOUR_LEVELS
    return _diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        norm_num_groups=8,
        **({"block_out_channels": (16, 32, 32, 32), "cross_attention_dim": CONTEXT} | options),
    )


def plain_unet(in_channels: int = 3, **options: Any) -> Any:
    """As LDM's of CelebA-HQ: attention on all levels but the first."""
    given = {
        "sample_size": 8,
        "in_channels": in_channels,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "attention_head_dim": 16,
    }
    return _diffusers.UNet2DModel(**(given | options))


def clip(padding: Any = "end", **options: Any) -> tuple[Any, Any]:
    """A text encoder and its tokenizer."""
    config = {
        "vocab_size": 49408,
        "hidden_size": CONTEXT,
        "intermediate_size": 4 * CONTEXT,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    return _ClipModel(CLIPTextConfig(**(config | options))), byte_pairs(padding)


@cache
def byte_pairs(padding: Any) -> Any:
    """CLIP's tokenizer; opening it takes longer than everything else here."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), 77, padding)
        return _ClipTokenizer.from_pretrained(folder)


def stable_diffusion(pipeline: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    return getattr(_diffusers, pipeline)(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def sd1(folder: Path) -> Any:
    text_encoder, tokenizer = clip(hidden_act="quick_gelu")
    return stable_diffusion(
        vae=autoencoder_kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=conditional_unet(attention_head_dim=8),
        scheduler=_diffusers.PNDMScheduler(**{**SCALED_LINEAR, "skip_prk_steps": True, **OURS}),
    )


def sd2(folder: Path) -> Any:
    text_encoder, tokenizer = clip("zero", hidden_act="gelu", num_hidden_layers=3)
    return stable_diffusion(
        vae=autoencoder_kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=conditional_unet(
            block_out_channels=(16, 32, 64, 64),
            attention_head_dim=[2, 4, 8, 8],
            use_linear_projection=True,
            upcast_attention=True,
        ),
        scheduler=_diffusers.DDIMScheduler(**SCALED_LINEAR, **DDIM, prediction_type="v_prediction"),
    )


def inpainting(folder: Path) -> Any:
    text_encoder, tokenizer = clip()
    return stable_diffusion(
        "StableDiffusionInpaintPipeline",
        vae=autoencoder_kl(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=conditional_unet(9, attention_head_dim=8),
        scheduler=_diffusers.DDIMScheduler(**SCALED_LINEAR, **DDIM),
    )


def celebahq(folder: Path) -> Any:
    return _diffusers.LDMPipeline(
        vqvae=vq_model(scaling_factor=1.0),
        unet=plain_unet(),
        scheduler=_diffusers.DDIMScheduler(**(SCALED_LINEAR | {"beta_start": 0.0015, "beta_end": 0.0195}), **DDIM),
    )


def super_resolution(folder: Path) -> Any:
    return _diffusers.LDMSuperResolutionPipeline(
        vqvae=vq_model(scaling_factor=0.5),  # which that pipeline does not read
        unet=plain_unet(6, attention_head_dim=None),
        scheduler=_diffusers.DDIMScheduler(**SCALED_LINEAR, **DDIM),
    )


def text_to_image(folder: Path) -> Any:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = _bert.LDMBertConfig(
        vocab_size=len(WORDS),
        encoder_layers=2,
        encoder_ffn_dim=4 * CONTEXT,
        encoder_attention_heads=2,
        head_dim=6,
        d_model=CONTEXT,
    )
    return _diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder_kl(levels=4),
        bert=_bert.LDMBertModel(config),
        tokenizer=_BertTokenizer(str(folder / "vocab.txt"), model_max_length=77),
        unet=conditional_unet(attention_head_dim=8),
        scheduler=_diffusers.DDIMScheduler(**SCALED_LINEAR, **DDIM),
    )


def pixels(folder: Path) -> Any:
    unet = plain_unet(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=8,
    )
    return _diffusers.DDIMPipeline(
        unet=unet, scheduler=_diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", **DDIM)
    )


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd1": sd1,
    "sd2": sd2,
    "inpainting": inpainting,
    "celebahq": celebahq,
    "super_resolution": super_resolution,
    "text_to_image": text_to_image,
    "pixels": pixels,
}


def save(kind: str, folder: Path, **options: Any) -> Path:
    """A folder with the pipeline of that name, written by diffusers."""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    torch.manual_seed(0)
    pipeline = PIPELINES[kind](scratch)
    pipeline.save_pretrained(folder / kind, **options)
    if kind == "text_to_image" and not (folder / kind / "tokenizer" / "vocab.txt").is_file():
        # As older versions of transformers do, which wrote the published folders.
        (folder / kind / "tokenizer" / "vocab.txt").write_bytes((scratch / "vocab.txt").read_bytes())
    return folder / kind


def edit(path: Path, **changes: Any) -> None:
    """Other values in a JSON file; None takes a key out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
