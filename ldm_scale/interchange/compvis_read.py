"""Configurations of CompVis and Stability in our words: networks and forward process.

Keys of their networks that ours have no part for are refused, unknown ones too; training's own keys are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ldm_scale.config.networks import check_attention_levels, check_levels, check_unet
from ldm_scale.config.schema import AutoencoderConfig, DiffusionConfig, UNetConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.compvis_write import NORM_GROUPS, PREDICTIONS
from ldm_scale.interchange.foreign_section import MAX_LAYERS, Section

DIFFUSION_TARGETS = ("LatentDiffusion", "LatentInpaintDiffusion")
AUTOENCODER_TARGETS = {
    "AutoencoderKL": "kl",
    "VQModel": "vq",
    "VQModelInterface": "vq",
    "IdentityFirstStage": "identity",
}
# Linear in sqrt(beta), as ours of that name.
_SCHEDULES: dict[str, Literal["linear", "cosine"]] = {"linear": "linear", "cosine": "cosine"}
_LOSSES: dict[str, Literal["l1", "l2"]] = {"l1": "l1", "l2": "l2"}
_ATTENTION_TYPES = {"softmax": None, "softmax-xformers": None}  # one function; the other one there is another
_VANILLA = ("vanilla", "vanilla-xformers")


def class_name(target: object, where: str) -> str:
    """The class that a `target` names, without its modules.

    Raises: CheckpointError if it is no name.
    """
    if not isinstance(target, str) or not target:
        raise CheckpointError(f"{where}.target={target!r}: must name a class; correct the YAML")
    return target.rpartition(".")[2]


def autoencoder_config(stage: Section) -> AutoencoderConfig:
    """Architecture of a first stage, given with target and params.

    Raises: CheckpointError for what our autoencoder does not compute.
    """
    target = class_name(stage.get("target"), stage.name)
    if target not in AUTOENCODER_TARGETS:
        raise CheckpointError(
            f"{stage.name}.target={stage.get('target')}: known are {', '.join(AUTOENCODER_TARGETS)}; not imported"
        )
    kind = AUTOENCODER_TARGETS[target]
    if kind == "identity":
        return AutoencoderConfig(
            kind="identity",
            base_channels=1,
            channel_multipliers=(1,),
            num_res_blocks=1,
            latent_channels=3,
            norm_groups=1,
            mid_attention=False,
        )
    params = stage.section("params")
    params.require(remap=None, colorize_nlabels=None)
    config, embed_dim = _vqgan_config(params.section("ddconfig"), kind == "kl"), params.integer("embed_dim", at_least=1)
    if config.latent_channels != embed_dim:
        raise CheckpointError(
            f"{params.name}: z_channels={config.latent_channels} and embed_dim={embed_dim}; our autoencoders have one "
            "number for both; not imported"
        )
    return config if kind == "kl" else replace(config, kind="vq", codebook_size=params.integer("n_embed", at_least=1))


def autoencoder_resolution(stage: Section) -> int:
    """Pixels per side in training, or 0 where a first stage does not say."""
    return stage.section("params").section("ddconfig").integer("resolution", 0, at_least=0)


def unet_config(section: Section) -> UNetConfig:
    """Architecture of a UNetModel, given with target and params.

    Raises: CheckpointError for what our UNet does not compute, and for sizes that cannot be.
    """
    name = class_name(section.get("target"), section.name)
    if name != "UNetModel":
        raise CheckpointError(f"{section.name}.target={section.get('target')}: known is UNetModel; not imported")
    params = section.section("params")
    params.require(
        dims=2,
        conv_resample=True,
        num_classes=None,
        n_embed=None,
        disable_self_attentions=None,
        num_attention_blocks=None,
        disable_middle_self_attn=None,
        adm_in_channels=None,
    )
    params.require_known(*_UNET_KEYS)
    params.choice("spatial_transformer_attn_type", _ATTENTION_TYPES, "softmax")
    num_heads, head_dim = (params.integer(key, -1, at_least=-1) for key in ("num_heads", "num_head_channels"))
    params.require(num_heads_upsample=num_heads if params.get("num_heads_upsample", -1) != -1 else -1)
    if num_heads < 1 and head_dim < 1:
        raise CheckpointError(f"{params.name}: neither num_heads nor num_head_channels is given; correct the YAML")
    multipliers = params.integers("channel_mult", at_least=1)
    resolutions = params.integers("attention_resolutions", at_least=1)
    transformer = params.boolean("use_spatial_transformer", False)
    config = UNetConfig(
        base_channels=params.integer("model_channels", at_least=1),
        channel_multipliers=multipliers,
        num_res_blocks=params.same("num_res_blocks", at_most=MAX_LAYERS),
        attention_levels=tuple(level for level in range(len(multipliers)) if 2**level in resolutions),
        attention="transformer" if transformer else "self",
        transformer_depth=params.same("transformer_depth", 1, at_most=MAX_LAYERS) if transformer else 1,
        head_dim=head_dim if head_dim > 0 else None,
        num_heads=num_heads if head_dim < 1 else None,
        linear_projection=params.boolean("use_linear_in_transformer", False),
        norm_groups=NORM_GROUPS,
        scale_shift_norm=params.boolean("use_scale_shift_norm", False),
        residual_resampling=params.boolean("resblock_updown", False),
        dropout=params.number("dropout", 0.0, at_least=0, below=1),
    )
    section.checked(lambda: check_unet(config))
    return config


def diffusion_config(params: Section, prediction: str | None = None) -> DiffusionConfig:
    """Forward process of a model's params; `prediction` stands above what they say.

    Raises: CheckpointError for processes that ours are not.
    """
    params.require(given_betas=None, cosine_s=8e-3)
    schedule = params.choice("beta_schedule", _SCHEDULES, "linear", who="ours are")
    betas = (DiffusionConfig.beta_start, DiffusionConfig.beta_end)
    if schedule == "linear":
        betas = (
            params.number("linear_start", 1e-4, above=0, below=1),
            params.number("linear_end", 2e-2, above=0, below=1),
        )
    config = DiffusionConfig(
        prediction=PREDICTIONS[prediction] if prediction else params.choice("parameterization", PREDICTIONS, "eps"),
        num_timesteps=params.integer("timesteps", 1000, at_least=1),
        schedule=schedule,
        beta_start=betas[0],
        beta_end=betas[1],
        loss=params.choice("loss_type", _LOSSES, "l2"),
    )
    params.checked(lambda: build_process(config))
    return config


_UNET_KEYS = (
    *("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions"),
    *("dropout", "channel_mult", "conv_resample", "dims", "num_classes", "use_checkpoint", "use_fp16", "use_bf16"),
    *("num_heads", "num_head_channels", "num_heads_upsample", "use_scale_shift_norm", "resblock_updown", "legacy"),
    *("use_new_attention_order", "use_spatial_transformer", "transformer_depth", "context_dim", "n_embed"),
    *("disable_self_attentions", "num_attention_blocks", "disable_middle_self_attn", "use_linear_in_transformer"),
    *("adm_in_channels", "spatial_transformer_attn_type"),
)
_DDCONFIG_KEYS = (
    *("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout", "resamp_with_conv", "in_channels"),
    *("resolution", "z_channels", "double_z", "use_linear_attn", "attn_type", "give_pre_end", "tanh_out"),
)


def _vqgan_config(ddconfig: Section, is_kl: bool) -> AutoencoderConfig:
    ddconfig.require(resamp_with_conv=True, use_linear_attn=False, give_pre_end=False, tanh_out=False)
    ddconfig.require(in_channels=3, out_ch=3, double_z=is_kl)
    ddconfig.require_known(*_DDCONFIG_KEYS)
    attention = ddconfig.get("attn_type", "vanilla")
    if attention not in (*_VANILLA, "none"):
        raise CheckpointError(
            f"{ddconfig.name}.attn_type={attention!r}: ours is plain attention, or none; not imported"
        )
    has_attention = attention in _VANILLA
    multipliers, resolution = ddconfig.integers("ch_mult", at_least=1), ddconfig.integer("resolution", at_least=1)
    at = ddconfig.integers("attn_resolutions", at_least=1) if has_attention else ()
    config = AutoencoderConfig(
        kind="kl",
        base_channels=ddconfig.integer("ch", at_least=1),
        channel_multipliers=multipliers,
        num_res_blocks=ddconfig.same("num_res_blocks", at_most=MAX_LAYERS),
        latent_channels=ddconfig.integer("z_channels", at_least=1),
        norm_groups=NORM_GROUPS,
        mid_attention=has_attention,
        attention_levels=tuple(level for level in range(len(multipliers)) if resolution // 2**level in at),
    )
    ddconfig.checked(lambda: check_levels("autoencoder", config))
    ddconfig.checked(lambda: check_attention_levels("autoencoder", config))
    return config
