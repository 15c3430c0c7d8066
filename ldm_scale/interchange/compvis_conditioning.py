"""tau_theta in checkpoints of CompVis and Stability: `cond_stage_model` and what is concatenated to the latents.

    conditioning                     cond_stage_config                     their conditioning_key
    nothing                          __is_unconditional__                  (none)
    text, clip, padding=end          FrozenCLIPEmbedder                    crossattn
    text, clip, padding=zero         FrozenOpenCLIPEmbedder                crossattn
    frozen_text                      FrozenOpenCLIPEmbedder                crossattn
    text, bert                       BERTEmbedder                          crossattn
    layout                           BERTEmbedder, use_tokenizer false     crossattn
    classes                          ClassEmbedder                         crossattn
    semantic_map                     SpatialRescaler                       concat
    low_resolution                   torch.nn.Identity                     concat
    captions and inpainting          that of the captions, LatentInpaintDiffusion  hybrid

Inpainting alone is refused: theirs (`__is_first_stage__`) sees masks of -1 and 1 and holes that are black, ours masks
of 0 and 1 and grey holes, which no weights can turn into each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ldm_scale.conditioning.layout import CROP_TOKENS, TOKENS_PER_OBJECT
from ldm_scale.config.schema import ConditioningConfig, LayoutConditioningConfig, TextConditioningConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.interchange.compvis_names import AS_IS, COND_STAGE, Form, Place, Places, mask_before_image
from ldm_scale.interchange.name_maps import text_encoder_names

ENCODERS = "ldm.modules.encoders.modules."
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_L_CONFIG = TextConditioningConfig(width=768, depth=12, num_heads=12, activation="quick_gelu")
TEXT_FOLDER = "text_encoder"  # of an export, where the text tower is none that their code can download
BERT_HEADS, BERT_HEAD_DIM, BERT_WORDS = 8, 64, 30522
ELSEWHERE = "export with --to safetensors"

_TRANSFORMER_BLOCKS = {
    "openclip": {
        "norm1": "ln_1",
        "attention.to_out": "attn.out_proj",
        "norm2": "ln_2",
        "mlp_in": "mlp.c_fc",
        "mlp_out": "mlp.c_proj",
    },
    "bert": {"norm1": "0.0", "attention.to_out": "0.1.to_out", "norm2": "1.0", "mlp_in": "1.1.net.0.0"}
    | {"mlp_out": "1.1.net.2"},
}


@dataclass(frozen=True)
class ConditioningThere:
    """A model's conditioning in the words of their configuration."""

    target: str  # the class of the whole model
    cond_stage_config: dict[str, Any] | str
    params: dict[str, Any]  # of the whole model


def kinds(conditioning: ConditioningConfig) -> tuple[str, ...]:
    """Names of the sections that are given."""
    return tuple(field.name for field in fields(conditioning) if getattr(conditioning, field.name) is not None)


def conv_in_form(conditioning: ConditioningConfig, latent_channels: int) -> Form:
    """Form of the UNet's first convolution: theirs takes the mask before the masked image's latents."""
    return AS_IS if conditioning.inpainting is None else mask_before_image(latent_channels)


def conditioner_places(conditioning: ConditioningConfig, null_class: bool = True) -> Places:
    """Tensors of the conditioner in their cond_stage_model; `null_class`: its table has a row for "no class"."""
    places: Places = {}
    if conditioning.text is not None:
        places |= _text_places(conditioning.text)
    if conditioning.layout is not None:
        places |= _bert_places("conditioner.layout", conditioning.layout)
    if conditioning.classes is not None:
        form = AS_IS if null_class else _WITHOUT_LAST_ROW
        places["conditioner.classes.embedding.weight"] = Place((f"{COND_STAGE}embedding.weight",), form)
    if conditioning.semantic_map is not None:
        places["conditioner.semantic_map.projection.weight"] = Place(
            (f"{COND_STAGE}channel_mapper.weight",), _COLUMNS_OF_LABELS
        )
    return places


def conditioning_there(artifact: DiffusionArtifact) -> ConditioningThere:
    """How their configuration says what the model is conditioned on.

    Raises: CheckpointError for what their code cannot compute; it names the part.
    """
    conditioning, f = artifact.conditioning, artifact.autoencoder.config.downsampling_factor
    given = kinds(conditioning)
    crossattn = {"conditioning_key": "crossattn", "cond_stage_trainable": True}
    concat = {"concat_mode": True, "conditioning_key": "concat"}
    if not given:
        return _latent_diffusion("__is_unconditional__", {"cond_stage_trainable": False, "cond_stage_key": "image"})
    if given in (("text",), ("frozen_text",)):
        trained = {"cond_stage_key": "caption", "cond_stage_trainable": given == ("text",)}
        return _latent_diffusion(_captions_there(conditioning), crossattn | trained)
    if given in (("text", "inpainting"), ("frozen_text", "inpainting")):
        hybrid = {"conditioning_key": "hybrid", "cond_stage_trainable": False, "cond_stage_key": "txt"}
        return ConditioningThere(
            "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
            _captions_there(conditioning),
            hybrid | {"finetune_keys": None},
        )
    if given == ("classes",) and conditioning.classes is not None:
        params: dict[str, Any] = {
            "n_classes": conditioning.classes.num_classes + 1,
            "embed_dim": conditioning.classes.width,
        }
        stage = _stage("ClassEmbedder", params | {"key": "class_label"})
        return _latent_diffusion(stage, crossattn | {"cond_stage_key": "class_label"})
    if given == ("layout",) and conditioning.layout is not None:
        stage = _layout_there(conditioning.layout)
        return _latent_diffusion(stage, crossattn | {"cond_stage_key": "coordinates_bbox"})
    if given == ("semantic_map",) and conditioning.semantic_map is not None:
        section = conditioning.semantic_map
        if artifact.state["conditioner.semantic_map.projection.weight"][-1].any():
            raise CheckpointError(
                "conditioning.semantic_map: the row for unknown pixels is not zero, and SpatialRescaler has none; "
                f"{ELSEWHERE}"
            )
        stages = {"n_stages": int(math.log2(f)), "in_channels": section.num_labels, "out_channels": section.channels}
        params = concat | {"cond_stage_trainable": True, "cond_stage_key": "segmentation"}
        return _latent_diffusion(_stage("SpatialRescaler", stages), params)
    if given == ("low_resolution",) and conditioning.low_resolution is not None:
        factor = conditioning.low_resolution.factor
        if factor != f:
            raise CheckpointError(
                f"conditioning.low_resolution.factor={factor}: their code concatenates the small image as it is, in "
                f"the latents' size, which is f={f}; {ELSEWHERE}"
            )
        params = concat | {"cond_stage_trainable": False, "cond_stage_key": "LR_image"}
        return _latent_diffusion({"target": "torch.nn.Identity"}, params)
    raise _refused(given)


def needs_text_folder(text: TextConditioningConfig | None) -> bool:
    """Whether an export brings the text tower's configuration along: their code knows only towers that it downloads."""
    return text is not None and text.encoder == "clip" and text.padding == "end" and not _is_clip_l(text)


def check_bert_vocabulary(vocabulary: Path) -> None:
    """Nothing, if the words are those of bert-base-uncased, which their BERTTokenizer always takes.

    Raises: CheckpointError.
    """
    try:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{vocabulary}: not a text file in UTF-8 ({error.reason}); give a vocab.txt") from error
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1996: "the"}
    if len(words) != BERT_WORDS or any(words[number] != word for number, word in known.items()):
        raise CheckpointError(
            f"{vocabulary}: their BERTTokenizer always takes the {BERT_WORDS} words of bert-base-uncased, and these "
            "are "
            f"{len(words)} others; give its vocab.txt, or {ELSEWHERE}"
        )


def open_clip_architectures(text: TextConditioningConfig) -> list[tuple[str, str]]:
    """(arch, layer) of OpenCLIP's text towers that compute what the section's transformer computes, best known first.

    A tower whose penultimate layer is read has one block more than the section.
    """
    import open_clip  # takes seconds, and only such models need it

    found = []
    for name in sorted(open_clip.list_models(), key=lambda name: name != "ViT-H-14"):
        config = open_clip.get_model_config(name) or {}
        tower = config.get("text_cfg", {})
        plain = not any(tower.get(key) for key in ("hf_model_name", "hf_tokenizer_name", "embed_cls", "no_causal_mask"))
        sizes = (tower.get("context_length", 77), tower.get("vocab_size", 49408), tower.get("width", 512))
        heads, layers = tower.get("heads", 8), tower.get("layers", 12)
        activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
        wanted = (text.max_tokens, text.vocab_size, text.width, text.num_heads, text.activation)
        if plain and (*sizes, heads, activation) == wanted and layers in (text.depth, text.depth + 1):
            found.append((name, "last" if layers == text.depth else "penultimate"))
    return found


def _refused(given: tuple[str, ...]) -> CheckpointError:
    """The error for kinds of conditioning that their code has no place for."""
    if given == ("inpainting",):
        return CheckpointError(
            "conditioning.inpainting alone: their model without captions takes masks of -1 and 1 and black holes, ours "
            f"masks of 0 and 1 and grey ones; {ELSEWHERE}"
        )
    return CheckpointError(
        f"a model conditioned on {' and '.join(given)}: their LatentDiffusion has one cond_stage_model; {ELSEWHERE}"
    )


def _is_clip_l(text: TextConditioningConfig) -> bool:
    sizes = ("width", "depth", "num_heads", "activation", "max_tokens", "vocab_size")
    return all(getattr(text, size) == getattr(CLIP_L_CONFIG, size) for size in sizes)


def _latent_diffusion(stage: dict[str, Any] | str, params: dict[str, Any]) -> ConditioningThere:
    return ConditioningThere("ldm.models.diffusion.ddpm.LatentDiffusion", stage, params)


def _stage(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": f"{ENCODERS}{name}", "params": params}


def _captions_there(conditioning: ConditioningConfig) -> dict[str, Any]:
    if conditioning.text is not None:
        return _text_there(conditioning.text)
    frozen = conditioning.frozen_text
    assert frozen is not None, "a model of captions has one of the two"
    tower = {"arch": frozen.model, "version": frozen.weights, "freeze": True, "layer": frozen.layer}
    return _stage("FrozenOpenCLIPEmbedder", tower)


def _text_there(text: TextConditioningConfig) -> dict[str, Any]:
    if text.encoder == "bert":
        _check_bert_sizes("conditioning.text", text)
        check_bert_vocabulary(Path(text.vocabulary or ""))
        sizes = {"n_embed": text.width, "n_layer": text.depth, "vocab_size": text.vocab_size}
        return _stage("BERTEmbedder", sizes | {"max_seq_len": text.max_tokens})
    if text.tokenizer != "clip":
        raise CheckpointError(
            f"conditioning.text.tokenizer={text.tokenizer} with encoder=clip: their CLIP embedders tokenise by byte "
            f"pairs; {ELSEWHERE}"
        )
    if text.padding == "end":
        version = CLIP_L if _is_clip_l(text) else TEXT_FOLDER
        return _stage("FrozenCLIPEmbedder", {"version": version, "max_length": text.max_tokens})
    towers = open_clip_architectures(text)
    if not towers:
        raise CheckpointError(
            f"conditioning.text of {text.depth} layers of width {text.width} with padding=zero: FrozenOpenCLIPEmbedder "
            f"builds towers of OpenCLIP alone, and none has these sizes; {ELSEWHERE}"
        )
    import open_clip

    arch, layer = towers[0]
    versions = [tag for tag in open_clip.list_pretrained_tags_by_model(arch) if "laion" in tag] or [""]
    return _stage("FrozenOpenCLIPEmbedder", {"arch": arch, "version": versions[0], "freeze": True, "layer": layer})


def _layout_there(layout: LayoutConditioningConfig) -> dict[str, Any]:
    _check_bert_sizes("conditioning.layout", layout)
    sizes = {"n_embed": layout.width, "n_layer": layout.depth, "vocab_size": layout.num_tokens}
    max_tokens = TOKENS_PER_OBJECT * layout.max_objects + CROP_TOKENS
    return _stage("BERTEmbedder", sizes | {"max_seq_len": max_tokens, "use_tokenizer": False})


def _check_bert_sizes(section: str, config: TextConditioningConfig | LayoutConditioningConfig) -> None:
    head_dim = config.head_dim or config.width // config.num_heads
    if (config.num_heads, head_dim) != (BERT_HEADS, BERT_HEAD_DIM):
        raise CheckpointError(
            f"{section}: {config.num_heads} heads of {head_dim}, and their BERTEmbedder has {BERT_HEADS} of "
            f"{BERT_HEAD_DIM}, whatever its width; {ELSEWHERE}"
        )
    if isinstance(config, TextConditioningConfig) and config.activation != "gelu":
        raise CheckpointError(f"{section}.activation={config.activation}: BERTEmbedder has gelu; {ELSEWHERE}")


def _text_places(text: TextConditioningConfig) -> Places:
    if text.encoder == "bert":
        return _bert_places("conditioner.text", text)
    if text.padding == "zero":
        return _open_clip_places(text)
    prefix = f"{COND_STAGE}transformer."
    return {
        f"conditioner.text.{ours}": Place(tuple(f"{prefix}{name}" for name in theirs))
        for ours, theirs in text_encoder_names(text).items()
    }


def _open_clip_places(text: TextConditioningConfig) -> Places:
    ours, theirs = "conditioner.text.encoder", f"{COND_STAGE}model"
    places = {
        f"{ours}.token_embedding.weight": Place((f"{theirs}.token_embedding.weight",)),
        f"{ours}.position_embedding": Place((f"{theirs}.positional_embedding",)),
    }
    places |= _pair(f"{ours}.norm_out", f"{theirs}.ln_final")
    for index in range(text.depth):
        block, their_block = f"{ours}.blocks.{index}", f"{theirs}.transformer.resblocks.{index}"
        for leaf in ("weight", "bias"):
            places[f"{block}.attention.to_qkv.{leaf}"] = Place((f"{their_block}.attn.in_proj_{leaf}",))
        for name, their_name in _TRANSFORMER_BLOCKS["openclip"].items():
            places |= _pair(f"{block}.{name}", f"{their_block}.{their_name}")
    return places


def _bert_places(section: str, config: TextConditioningConfig | LayoutConditioningConfig) -> Places:
    """Their encoder counts attention and feed-forward layers as one list."""
    ours, theirs = f"{section}.encoder", f"{COND_STAGE}transformer"
    places = {
        f"{ours}.token_embedding.weight": Place((f"{theirs}.token_emb.weight",)),
        f"{ours}.position_embedding": Place((f"{theirs}.pos_emb.emb.weight",)),
    }
    places |= _pair(f"{ours}.norm_out", f"{theirs}.norm")
    for index in range(config.depth):
        block = f"{ours}.blocks.{index}"
        attention = f"{theirs}.attn_layers.layers.{2 * index}.1"
        places[f"{block}.attention.to_qkv.weight"] = Place(tuple(f"{attention}.to_{p}.weight" for p in "qkv"))
        for name, there in _TRANSFORMER_BLOCKS["bert"].items():
            layer, rest = there.split(".", 1)
            places |= _pair(f"{block}.{name}", f"{theirs}.attn_layers.layers.{2 * index + int(layer)}.{rest}")
    return places


def _pair(ours: str, theirs: str) -> Places:
    return {f"{ours}.{leaf}": Place((f"{theirs}.{leaf}",)) for leaf in ("weight", "bias")}


_WITHOUT_LAST_ROW = Form(
    lambda ours: ours[:-1], lambda theirs: torch.cat([theirs, theirs.new_zeros(1, theirs.shape[1])])
)
# A table of labels with a row of zeros for the unknown one, as the 1x1 convolution of one-hot maps.
_COLUMNS_OF_LABELS = Form(
    lambda ours: ours[:-1].T[:, :, None, None],
    lambda theirs: torch.cat([theirs.flatten(1).T, theirs.new_zeros(1, theirs.shape[0])]),
)
