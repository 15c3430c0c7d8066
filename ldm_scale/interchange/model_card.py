"""README.md of an exported folder: what it is, how to use it, and what was compared before it was published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ldm_scale.engine.lazy_tensors import num_elements
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.diffusers_layout import Layout, kinds_of, layout_of
from ldm_scale.models.autoencoder import LatentStatistics

Target = Literal["diffusers", "compvis", "safetensors"]

_DIFFUSERS_PIPELINE = """\
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/of/this/folder")
image = pipeline({given}).images[0]
"""
_DIFFUSERS_PARTS = """\
from diffusers import {classes}

folder = "path/of/this/folder"
{lines}
"""
# What a pipeline is called with.
_CALLS = {
    "StableDiffusionPipeline": '"a caption", {steps}, {guidance}',
    "StableDiffusionInpaintPipeline": '"a caption", image=picture, mask_image=hole, strength=1.0, {steps}, {guidance}',
    "LDMTextToImagePipeline": '"a caption", {steps}, {guidance}',
    "LDMPipeline": "{steps}",
    "LDMSuperResolutionPipeline": "small, {steps}, eta=0.0",
    "DDIMPipeline": "{steps}",
}
# Kind of conditioning -> what the UNet takes of it, in models without a pipeline.
_INPUTS = {
    "text": "context: the last hidden state of {text_encoder}/ for the tokens of tokenizer/",
    "frozen_text": "context: the {layer} layer of the text tower of OpenCLIP's {model} ({weights}), after the last "
    "norm",
    "classes": "context: one token, the class's row of conditioner.classes.embedding.weight in conditioner/; the last "
    "row stands for no class",
    "layout": "context: of boxes, which only ldm-scale computes, with conditioner.layout.* in conditioner/",
    "semantic_map": "{channels} channels: of the map, which only ldm-scale computes, with conditioner.semantic_map.* "
    "in conditioner/",
    "low_resolution": "3 channels: the small picture in [-1, 1], enlarged to the latents' size by bicubic where it has "
    "another",
    "inpainting": "{masked} channels: latents (modes) of the picture, grey in the hole; 1 channel: 1 where any pixel "
    "of a latent lies in the hole, 0 elsewhere",
}
_INPAINTING = """\
The pipeline encodes the picture around the hole by a sample of its posterior, ours by the mode, and reduces the hole by
nearest neighbours, ours by the maximum: give it holes of whole latents, and `masked_image_latents` where it matters.
Ours sets known pixels back afterwards.
"""
_DIFFUSERS_AUTOENCODER = """\
from diffusers import {model_class}

autoencoder = {model_class}.from_pretrained("path/of/this/folder")
"""
_COMPVIS = """\
# in a checkout of CompVis' or Stability's repository
import torch
from omegaconf import OmegaConf
from ldm.util import instantiate_from_config

model = instantiate_from_config(OmegaConf.load("path/of/this/folder/config.yaml").model)
checkpoint = torch.load("path/of/this/folder/model.ckpt", map_location="cpu", weights_only=True)
model.load_state_dict(checkpoint["state_dict"], strict=False)
"""
_OWN_DIFFUSION = """\
{imports}from ldm_scale import load_diffusion
from ldm_scale.conditioning.base import Conditions

y = Conditions({given})
images = load_diffusion("path/of/this/folder").sample(y, seeds=[0])  # (1, 3, H, W) in [-1, 1]
"""
# Kind of conditioning -> what `Conditions` is given for it.
_GIVEN = {
    "text": 'captions=["a caption"]',
    "frozen_text": 'captions=["a caption"]',
    "classes": "classes=torch.tensor([0])",
    "layout": "layouts=[layout]",
    "semantic_map": "maps=labels",
    "low_resolution": "low_resolution=small",
    "inpainting": "images=pixels, masks=masks",
}
_OWN_AUTOENCODER = """\
from ldm_scale import load_autoencoder

latents = load_autoencoder("path/of/this/folder").encode(pixels)  # pixels (B, 3, H, W) in [-1, 1]
"""
_READERS = {
    "diffusers": " by diffusers and transformers",
    "compvis": " as a stranger's checkpoint by `ldm-scale import`",
    "safetensors": "",
}
_CAPTIONS = """\
Captions were tokenised by OpenCLIP, which first repairs text: curly quotes become straight, HTML entities characters,
ligatures and full-width letters plain. `CLIPTokenizer` leaves that out, so give it captions in plain characters.
"""


def model_card(artifact: Artifact | DiffusionArtifact, target: Target, differences: Mapping[str, float]) -> str:
    """The text of README.md; `differences` as `verify.measure_differences` returns them, empty for our own format."""
    is_autoencoder = isinstance(artifact, Artifact)
    provenance = artifact.provenance
    facts = {
        "experiment": provenance.get("config", {}).get("experiment") or "-",
        "weights": provenance.get("weights", "-"),
        "images seen in training": f"{provenance['images']:,}" if "images" in provenance else "-",
        "resolution": f"{provenance['resolution']} pixels",
        "parameters": f"{num_elements(artifact.state):,}",
        "content hash (sha256)": artifact.content_hash,
    }
    imported = provenance.get("imported")
    if imported is not None:
        facts["imported from"] = f"{imported['from']} ({imported['layout']})"
        if imported.get("left_out"):
            parts = (f"{number} tensors: {what}" for what, number in imported["left_out"].items())
            facts["left out of it"] = "; ".join(parts)
    autoencoder = artifact if isinstance(artifact, Artifact) else artifact.autoencoder
    statistics = autoencoder.statistics
    facts["latents"] = (
        f"{autoencoder.config.latent_channels} channels, f = {autoencoder.config.downsampling_factor}, "
        f"{_normalization(statistics, target)}, measured on {statistics.num_images:,} images"
    )
    if not is_autoencoder:
        facts["autoencoder's content hash"] = autoencoder.content_hash
    sections = [
        f"# {'Autoencoder' if is_autoencoder else 'Latent diffusion model'} made with ldm-scale",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        f"```python\n{_usage(artifact, target)}```",
    ]
    if target == "diffusers" and isinstance(artifact, DiffusionArtifact):
        layout = layout_of(artifact)
        if layout.pipeline is None:
            sections.append(_inputs(artifact, layout))
        elif layout.swaps_mask:
            sections.append(_INPAINTING.rstrip())
        if _has_byte_pairs(artifact):
            sections.append(_CAPTIONS.rstrip())
    sections += ["## Checked before publication", _checks(differences, target)]
    return "\n\n".join(sections) + "\n"


def _has_byte_pairs(artifact: DiffusionArtifact) -> bool:
    text = artifact.conditioning.text
    return artifact.conditioning.frozen_text is not None or (text is not None and text.tokenizer == "clip")


def _normalization(statistics: LatentStatistics, target: Target) -> str:
    if not statistics.channel_mean:
        return f"z = (raw - {statistics.shift:g}) * {statistics.scale:.6g}"
    where = {"diffusers": "in quant_conv and post_quant_conv", "compvis": "ldm_scale.json"}.get(
        target, "in config.json"
    )
    return f"z = (raw - mean) / deviation of each channel ({where})"


def _usage(artifact: Artifact | DiffusionArtifact, target: Target) -> str:
    if target == "compvis":
        return _COMPVIS
    if isinstance(artifact, Artifact):
        if target == "safetensors":
            return _OWN_AUTOENCODER
        return _DIFFUSERS_AUTOENCODER.format(model_class="VQModel" if artifact.config.kind == "vq" else "AutoencoderKL")
    if target == "safetensors":
        given = ", ".join(_GIVEN[kind] for kind in kinds_of(artifact.conditioning))
        return _OWN_DIFFUSION.format(given=given, imports="import torch\n\n" if "torch." in given else "")
    layout, sampling = layout_of(artifact), artifact.sampling
    if layout.pipeline is None:
        return _parts(artifact, layout)
    steps, guidance = f"num_inference_steps={sampling.num_steps}", f"guidance_scale={sampling.guidance_scale}"
    return _DIFFUSERS_PIPELINE.format(given=_CALLS[layout.pipeline.name].format(steps=steps, guidance=guidance))


def _parts(artifact: DiffusionArtifact, layout: Layout) -> str:
    scheduler = "EDMEulerScheduler" if artifact.diffusion.prediction == "edm" else "DDIMScheduler"
    unet = "UNet2DModel" if artifact.unet.attention == "self" else "UNet2DConditionModel"
    parts = {"unet": ("unet", unet), "scheduler": ("scheduler", scheduler)}
    if layout.autoencoder is not None:
        model = "VQModel" if artifact.autoencoder.config.kind == "vq" else "AutoencoderKL"
        parts["autoencoder"] = (layout.autoencoder, model)
    lines = [f'{name} = {model}.from_pretrained(folder, subfolder="{at}")' for name, (at, model) in parts.items()]
    return _DIFFUSERS_PARTS.format(classes=", ".join(sorted(m for _, m in parts.values())), lines="\n".join(lines))


def _inputs(artifact: DiffusionArtifact, layout: Layout) -> str:
    """What a program without a pipeline must know to call the parts."""
    conditioning = artifact.conditioning
    channels = artifact.autoencoder.config.latent_channels
    rows = [f"- {channels} channels: latents, noised"]
    for kind in kinds_of(conditioning):
        section = getattr(conditioning, kind)
        values = {name: getattr(section, name, "") for name in ("layer", "model", "weights", "channels")}
        rows.append("- " + _INPUTS[kind].format(**values, text_encoder=layout.text_encoder, masked=channels))
    return (
        f"There is no model_index.json, since no pipeline computes the same: {layout.reason}. The UNet's input, in "
        "this order, and its `encoder_hidden_states`:\n\n" + "\n".join(rows)
    )


def _checks(differences: Mapping[str, float], target: Target) -> str:
    if not differences:
        return "The folder was read back; names, shapes and values of all tensors are those that were written."
    schedule = ", and a scheduler visits the noise levels of the original's sampler" if target == "diffusers" else ""
    rows = "\n".join(f"| {part} | {difference:.1e} |" for part, difference in differences.items())
    return (
        f"The folder was read back{_READERS[target]}. All tensors are those that were written{schedule}. The outputs "
        "on fixed inputs, in float32, differ from the original model's by\n\n"
        f"| part | difference / norm |\n|---|---|\n{rows}"
    )
