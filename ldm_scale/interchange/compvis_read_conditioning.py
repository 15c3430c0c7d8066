"""tau_theta of a configuration of CompVis and Stability in our words; the inverse of `conditioning_there`.

Sizes of text encoders are read off the tensors, because their classes name an architecture instead of saying them. What
no tensor shows (attention heads, activation, padding) comes from the class or from the tower that it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_scale.conditioning.layout import CROP_TOKENS, TOKENS_PER_OBJECT
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ClassConditioningConfig,
    ConditioningConfig,
    InpaintingConditioningConfig,
    LayoutConditioningConfig,
    LowResolutionConditioningConfig,
    SemanticMapConditioningConfig,
    TextConditioningConfig,
)
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import VOCABULARY
from ldm_scale.interchange.compvis_conditioning import (
    BERT_HEAD_DIM,
    BERT_HEADS,
    CLIP_L,
    TEXT_FOLDER,
    check_bert_vocabulary,
)
from ldm_scale.interchange.compvis_names import COND_STAGE, UNET, shaped
from ldm_scale.interchange.compvis_read import class_name
from ldm_scale.interchange.foreign_section import Section
from ldm_scale.interchange.foreign_tower import CLIP_ACTIVATION, CLIP_TOKENS, clip_activation, clip_section
from ldm_scale.interchange.safetensors_io import read_json

# Towers by the names that FrozenCLIPEmbedder downloads: heads. All have OpenAI's activation.
CLIP_HEADS = {CLIP_L: 12, "openai/clip-vit-base-patch32": 8, "openai/clip-vit-base-patch16": 8}
IMAGENET_ROWS = 1001  # of ClassEmbedder: a thousand classes, and the one that stands for none


@dataclass(frozen=True)
class Given:
    """What a checkpoint and its user say of the conditioning, beside the YAML."""

    state: Mapping[str, Tensor]
    folder: Path  # where the checkpoint lies
    num_classes: int | None = None
    vocabulary: Path | None = None


def read_conditioning(model: Section, first: AutoencoderConfig, given: Given) -> ConditioningConfig:
    """What the model of a YAML is conditioned on.

    Raises: CheckpointError for what ours computes otherwise or not at all, and for what has to be given.
    """
    params = model.section("params")
    stage = params.get("cond_stage_config", "__is_unconditional__")
    if stage == "__is_unconditional__":
        return ConditioningConfig()
    if stage == "__is_first_stage__":
        raise CheckpointError(
            f"{params.name}.cond_stage_config=__is_first_stage__ (inpainting without captions): these models take "
            "masks of -1 and 1 and black holes, ours masks of 0 and 1 and grey ones, and no weights turn one into "
            "the other; "
            "not imported"
        )
    section = Section(stage, f"{params.name}.cond_stage_config")
    name = class_name(section.get("target"), section.name)
    key = params.get("conditioning_key") or ("concat" if params.boolean("concat_mode", True) else "crossattn")
    inpaints = class_name(model.get("target"), model.name) == "LatentInpaintDiffusion"
    expected = "hybrid" if inpaints else "concat" if name in ("SpatialRescaler", "Identity") else "crossattn"
    if key != expected:
        raise CheckpointError(f"{params.name}.conditioning_key={key!r} with {name}: expected {expected}; not imported")
    if inpaints:
        keys = params.get("concat_keys", ["mask", "masked_image"])
        if keys not in (["mask", "masked_image"], ("mask", "masked_image")):
            raise CheckpointError(f"{params.name}.concat_keys={keys!r}: ours are mask and masked_image; not imported")
        return ConditioningConfig(text=_text(name, section, given), inpainting=InpaintingConditioningConfig())
    if name == "BERTEmbedder" and not section.section("params").boolean("use_tokenizer", True):
        return ConditioningConfig(layout=_layout(section, given))
    if name == "ClassEmbedder":
        return ConditioningConfig(classes=_classes(given))
    if name == "SpatialRescaler":
        return ConditioningConfig(semantic_map=_semantic_map(section.section("params"), first))
    if name == "Identity":
        return ConditioningConfig(low_resolution=_low_resolution(model, first, given))
    return ConditioningConfig(text=_text(name, section, given))


def vocabulary_of(conditioning: ConditioningConfig, given: Given) -> Path | None:
    """The file with the words of the text encoder, where it reads any."""
    if conditioning.text is None or conditioning.text.vocabulary is None:
        return None
    return given.vocabulary or given.folder / VOCABULARY


def has_null_class(state: Mapping[str, Tensor], conditioning: ConditioningConfig) -> bool:
    """Whether the table of classes has a row for "no class"."""
    table = state.get(f"{COND_STAGE}embedding.weight")
    return conditioning.classes is None or table is None or len(table) > conditioning.classes.num_classes


def _text(name: str, section: Section, given: Given) -> TextConditioningConfig:
    readers = {"FrozenCLIPEmbedder": _clip, "FrozenOpenCLIPEmbedder": _open_clip, "BERTEmbedder": _bert}
    if name not in readers:
        raise CheckpointError(
            f"{section.name}.target={section.get('target')}: ours are {', '.join(readers)}, ClassEmbedder and "
            "SpatialRescaler; not imported"
        )
    return readers[name](section.section("params"), given)


def _clip(params: Section, given: Given) -> TextConditioningConfig:
    params.require(layer="last", layer_idx=None)
    params.require_known("version", "device", "max_length", "freeze", "layer", "layer_idx")
    version = params.get("version", CLIP_L)
    tower = given.folder / str(version)
    prefix = f"{COND_STAGE}transformer.text_model."
    tokens = _tensor(given, f"{prefix}embeddings.token_embedding.weight", 2)
    positions = _tensor(given, f"{prefix}embeddings.position_embedding.weight", 2)
    _require_all_positions(params, len(positions))
    heads, activation = CLIP_HEADS.get(str(version)), CLIP_ACTIVATION
    if heads is None:
        if not (tower / "config.json").is_file():
            raise CheckpointError(
                f"{params.name}.version={version!r}: its attention heads and activation are not known here and stand "
                f"in no tensor; put the tower's config.json into {tower}, as an export has it in {TEXT_FOLDER}/"
            )
        described = clip_section(tower / "config.json", read_json(tower / "config.json"))
        heads, activation = described.integer("num_attention_heads", 8, at_least=1), clip_activation(described)
    return TextConditioningConfig(
        vocab_size=tokens.shape[0],
        max_tokens=positions.shape[0],
        width=tokens.shape[1],
        depth=_count(given, f"{prefix}encoder.layers."),
        num_heads=heads,
        activation=activation,
    )


def _require_all_positions(params: Section, positions: int) -> None:
    """Nothing, if captions are padded to as many tokens as there are positions: ours always are."""
    length = params.integer("max_length", CLIP_TOKENS, at_least=1)
    if length != positions:
        raise CheckpointError(
            f"{params.name}.max_length={length}: the checkpoint has {positions} positions, and text encoders here read "
            f"as many tokens as they have positions; not imported"
        )


def _open_clip(params: Section, given: Given) -> TextConditioningConfig:
    import open_clip  # takes seconds, and only such models need it

    params.require_known("arch", "version", "device", "max_length", "freeze", "layer")
    arch, layer = str(params.get("arch", "ViT-H-14")), params.get("layer", "last")
    described = open_clip.get_model_config(arch)
    if described is None or "heads" not in described.get("text_cfg", {}):
        raise CheckpointError(f"{params.name}.arch={arch}: OpenCLIP has no such text tower; correct the YAML")
    if layer not in ("last", "penultimate"):
        raise CheckpointError(f"{params.name}.layer={layer!r}: must be last or penultimate; correct the YAML")
    tokens = _tensor(given, f"{COND_STAGE}model.token_embedding.weight", 2)
    positions = _tensor(given, f"{COND_STAGE}model.positional_embedding", 2)  # their max_length is not read
    layers = int(described["text_cfg"]["layers"])
    return TextConditioningConfig(
        padding="zero",
        vocab_size=tokens.shape[0],
        max_tokens=positions.shape[0],
        width=tokens.shape[1],
        depth=layers if layer == "last" else layers - 1,
        num_heads=int(described["text_cfg"]["heads"]),
        activation="quick_gelu" if described.get("quick_gelu") else "gelu",
    )


def _bert(params: Section, given: Given) -> TextConditioningConfig:
    words = given.vocabulary or given.folder / VOCABULARY
    if not words.is_file():
        raise CheckpointError(
            f"{words} is no file: the text encoder reads the words of bert-base-uncased, which the checkpoint does not "
            "hold; give its vocab.txt with --vocabulary"
        )
    check_bert_vocabulary(words)
    # Where the file lies is the artifact's to know: a path of this machine would go into its hash.
    sizes = _bert_sizes(given, "max_tokens")
    return TextConditioningConfig(encoder="bert", tokenizer="wordpiece", vocabulary=words.name, **sizes)


def _layout(section: Section, given: Given) -> LayoutConditioningConfig:
    sizes = _bert_sizes(given, "max_objects")
    tokens, objects = sizes.pop("vocab_size"), sizes.pop("max_objects") - CROP_TOKENS
    if objects % TOKENS_PER_OBJECT:
        raise CheckpointError(
            f"{section.name}: {objects + CROP_TOKENS} positions are not {TOKENS_PER_OBJECT} tokens an object and "
            f"{CROP_TOKENS} of the crop; not imported"
        )
    if given.num_classes is None:
        raise CheckpointError(
            f"{section.name}: classes of boxes are tokens, and no tensor shows how many of the {tokens} they are; give "
            "--num-classes"
        )
    return LayoutConditioningConfig(
        num_classes=given.num_classes,
        num_tokens=tokens,
        max_objects=objects // TOKENS_PER_OBJECT,
        drop_probability=0.0,  # as theirs were trained
        **sizes,
    )


def _bert_sizes(given: Given, length: str) -> dict[str, Any]:
    prefix = f"{COND_STAGE}transformer."
    tokens = _tensor(given, f"{prefix}token_emb.weight", 2)
    return {
        "vocab_size": tokens.shape[0],
        length: _tensor(given, f"{prefix}pos_emb.emb.weight", 2).shape[0],
        "width": tokens.shape[1],
        "depth": _count(given, f"{prefix}attn_layers.layers.") // 2,
        "num_heads": BERT_HEADS,
        "head_dim": BERT_HEAD_DIM,
    }


def _classes(given: Given) -> ClassConditioningConfig:
    rows, width = _tensor(given, f"{COND_STAGE}embedding.weight", 2).shape
    num_classes = given.num_classes
    if num_classes is None and rows != IMAGENET_ROWS:
        raise CheckpointError(
            f"{COND_STAGE}embedding.weight has {rows} rows, and nothing says whether the last one stands for no "
            f"class, as the last of ImageNet's {IMAGENET_ROWS} does; give --num-classes {rows - 1} if it does, "
            f"{rows} if not"
        )
    num_classes = rows - 1 if num_classes is None else num_classes
    if rows - num_classes not in (0, 1):
        raise CheckpointError(
            f"--num-classes {num_classes}: {COND_STAGE}embedding.weight has {rows} rows, one a class and perhaps one "
            f"for none; give {rows - 1} or {rows}"
        )
    # Without a row of its own "no class" was never trained, and guidance has nothing to start from.
    drop = ClassConditioningConfig.drop_probability if rows > num_classes else 0.0
    return ClassConditioningConfig(num_classes=num_classes, width=width, drop_probability=drop)


def _semantic_map(params: Section, first: AutoencoderConfig) -> SemanticMapConditioningConfig:
    params.require(multiplier=0.5, bias=False)
    stages, f = params.integer("n_stages", 1, at_least=0), first.downsampling_factor
    if params.get("method", "bilinear") not in ("bilinear", "area") or stages != math.log2(f):
        raise CheckpointError(
            f"{params.name}: ours averages maps to the latents' size, which is {int(math.log2(f))} bilinear halvings "
            f"at f={f}, not {stages} by {params.get('method', 'bilinear')}; not imported"
        )
    return SemanticMapConditioningConfig(
        num_labels=params.integer("in_channels", at_least=1), channels=params.integer("out_channels", at_least=1)
    )


def _low_resolution(model: Section, first: AutoencoderConfig, given: Given) -> LowResolutionConditioningConfig:
    channels = _tensor(given, f"{UNET}input_blocks.0.0.weight", 4).shape[1]
    if channels != first.latent_channels + 3:
        raise CheckpointError(
            f"{model.name}: the UNet takes {channels} channels, {first.latent_channels} of the latents; a small image "
            "beside them has 3; not imported"
        )
    return LowResolutionConditioningConfig(factor=first.downsampling_factor)


def _tensor(given: Given, name: str, num_dims: int) -> Tensor:
    """The tensor of that name, without values: only its shape says something of the architecture."""
    return shaped(given.state, name, num_dims, "the checkpoint")


def _count(given: Given, prefix: str) -> int:
    """How many numbers follow the prefix: layers of a list."""
    return len({name.removeprefix(prefix).split(".")[0] for name in given.state if name.startswith(prefix)})
