"""Text encoders that were trained jointly, as the models of transformers and diffusers that compute the same.

    conditioning.text.encoder    model                    in the pipeline
    clip                         `CLIPTextModel`          `StableDiffusionPipeline`
    bert                         diffusers' `LDMBertModel`  `LDMTextToImagePipeline`

Tokenizers go with either: `CLIPTokenizer`, or for WordPiece `BertTokenizer` on a copy of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_scale.conditioning.tokenizers import build_tokenizer, copy_vocabulary
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import VOCABULARY, Artifact
from ldm_scale.interchange.clip_tokenizer import VOCABULARY_SIZE, write_clip_tokenizer
from ldm_scale.interchange.name_maps import text_encoder_names, translate
from ldm_scale.interchange.safetensors_io import write_json, write_tensors

# diffusers and transformers ship no types for these constructors.
_LDMBertConfig: Any = LDMBertConfig
_LDMBertModel: Any = LDMBertModel

TEXT_WEIGHTS = "model.safetensors"
CLIP_PREFIX = "text_model."
# A head for BERT's own training that LDMBertModel has and never runs.
_UNUSED = "to_logits."


@dataclass(frozen=True)
class Pipeline:
    """A text-to-image pipeline of diffusers, and what it calls its parts."""

    name: str
    autoencoder: str
    text_encoder: str
    text_library: str  # where model_index.json says that the text encoder's class is
    text_model: Any  # class

    def require(self, text: TextConditioningConfig, autoencoder: Artifact) -> None:
        """Nothing, if the pipeline can tokenise for and decode with the model's parts.

        Raises: CheckpointError for the part that it cannot use.
        """
        if autoencoder.statistics.shift != 0.0:
            raise CheckpointError(
                f"latent_statistics.shift={autoencoder.statistics.shift}: {self.name} only scales latents and "
                "would decode shifted ones wrongly; export with --to safetensors"
            )
        if self.text_model is CLIPTextModel:
            if autoencoder.config.kind == "vq":
                raise CheckpointError(
                    f"autoencoder.kind=vq: {self.name} hands its decoder a generator, which VQModel does not take; "
                    "export with --to safetensors, or the autoencoder alone"
                )
            return
        for key, found, fixed in (
            ("conditioning.text.max_tokens", text.max_tokens, 77),
            ("the autoencoder's f", autoencoder.config.downsampling_factor, 8),
        ):
            if found != fixed:
                raise CheckpointError(
                    f"{key}={found}: {self.name}, the one pipeline with an LDMBertModel, fixes it at {fixed}; export "
                    "with --to safetensors"
                )


def pipeline_of(text: TextConditioningConfig) -> Pipeline:
    """The pipeline for models with such a text encoder."""
    if text.encoder == "clip":
        return Pipeline("StableDiffusionPipeline", "vae", "text_encoder", "transformers", CLIPTextModel)
    return Pipeline("LDMTextToImagePipeline", "vqvae", "bert", "latent_diffusion", LDMBertModel)


def tokenizer_class(text: TextConditioningConfig) -> Any:
    """transformers' tokenizer of an exported model."""
    return CLIPTokenizer if text.tokenizer == "clip" else BertTokenizer


def fill_tokenizer(folder: Path, text: TextConditioningConfig) -> None:
    """Nothing; the existing `folder` holds what `tokenizer_class` opens."""
    if text.tokenizer == "clip":
        write_clip_tokenizer(folder, text.max_tokens, text.padding)
        return
    copy_vocabulary(text, folder / VOCABULARY)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": text.max_tokens},
    )


def text_model_config(text: TextConditioningConfig) -> Any:
    """Configuration of the model in the pipeline: `CLIPTextConfig` or `LDMBertConfig`.

    Raises: CheckpointError if the vocabulary is not the exported tokenizer's.
    """
    if text.tokenizer == "clip" and text.vocab_size != VOCABULARY_SIZE:
        raise CheckpointError(
            f"conditioning.text.vocab_size={text.vocab_size}: the exported CLIPTokenizer has {VOCABULARY_SIZE} tokens; "
            f"train with conditioning.text.vocab_size={VOCABULARY_SIZE}, or export with --to safetensors"
        )
    tokenizer = build_tokenizer(text)
    if text.encoder == "clip":
        return CLIPTextConfig(
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_tokens,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            projection_dim=text.width,
            num_hidden_layers=text.depth,
            num_attention_heads=text.num_heads,
            hidden_act=text.activation,
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.padding,
            architectures=["CLIPTextModel"],
        )
    return _LDMBertConfig(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_tokens,
        encoder_layers=text.depth,
        encoder_ffn_dim=4 * text.width,
        encoder_attention_heads=text.num_heads,
        head_dim=text.head_dim or text.width // text.num_heads,
        activation_function=text.activation,
        d_model=text.width,
        dropout=0.0,
        pad_token_id=tokenizer.padding,
        architectures=["LDMBertModel"],
    )


def fill_text_encoder(folder: Path, text: TextConditioningConfig, state: Mapping[str, Tensor]) -> None:
    """Nothing; the existing `folder` holds the model with the tensors `state` of a `TextCondition`."""
    config = text_model_config(text)
    with torch.device("meta"):
        model: nn.Module = CLIPTextModel(config) if text.encoder == "clip" else _LDMBertModel(config)
    target = published(model.state_dict(), type(model))
    tensors = translate(state, text_encoder_names(text), target, "the text encoder")
    # Opening a file without them would report them as missing and draw random ones.
    unused = {n: torch.zeros(t.shape) for n, t in model.state_dict().items() if n.startswith(_UNUSED)}
    write_tensors(folder / TEXT_WEIGHTS, tensors | unused)
    config.save_pretrained(folder)


def published(state: Mapping[str, Tensor], model_class: type[nn.Module]) -> LazyTensors:
    """The tensors of their model that have a place in ours, under the names that they have in files.

    transformers 5 dropped `CLIPTextModel`'s prefix in memory.
    """
    if issubclass(model_class, CLIPTextModel):
        return renamed(state, lambda name: CLIP_PREFIX + name.removeprefix(CLIP_PREFIX))
    return renamed(state, lambda name: None if name.startswith(_UNUSED) else name)


def loadable(published_state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> LazyTensors:
    """The inverse of `published`: tensors for a model whose state dict is `own`."""
    named = renamed(published_state, lambda name: name if name in own else name.removeprefix(CLIP_PREFIX))
    return renamed(own, lambda name: name if name.startswith(_UNUSED) else None) | named
