"""Text encoders that were trained jointly, as the models of transformers and diffusers that compute the same.

    conditioning.text.encoder    model                    in the pipeline
    clip                         `CLIPTextModel`          `StableDiffusionPipeline`
    bert                         diffusers' `LDMBertModel`  `LDMTextToImagePipeline`

Tokenizers go with either: `CLIPTokenizer`, or for WordPiece `BertTokenizer` on a copy of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_scale.conditioning.tokenizers import build_tokenizer, copy_vocabulary
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import VOCABULARY
from ldm_scale.interchange.clip_tokenizer import VOCABULARY_SIZE, write_clip_tokenizer
from ldm_scale.interchange.name_maps import text_encoder_names, translate
from ldm_scale.interchange.safetensors_io import write_json, write_tensors

# diffusers and transformers ship no types for these constructors.
LDMBertConfig: Any = pipeline_latent_diffusion.LDMBertConfig
LDMBertModel: Any = pipeline_latent_diffusion.LDMBertModel

TEXT_WEIGHTS = "model.safetensors"
CLIP_PREFIX = "text_model."
# A head for BERT's own training that LDMBertModel has and never runs.
_UNUSED = "to_logits."


def text_model_class(text: TextConditioningConfig) -> Any:
    """The class of an exported text encoder."""
    return CLIPTextModel if text.encoder == "clip" else LDMBertModel


def text_library(text: TextConditioningConfig) -> str:
    """Where a pipeline's index says that this class is."""
    return "transformers" if text.encoder == "clip" else "latent_diffusion"


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
    return LDMBertConfig(
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
        model: nn.Module = CLIPTextModel(config) if text.encoder == "clip" else LDMBertModel(config)
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
