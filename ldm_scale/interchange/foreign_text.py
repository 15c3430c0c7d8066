"""Text encoders and tokenizers in pipelines that other software wrote, as our `text` section.

They become a part of the trained model, as in a model of ours that was trained jointly with its text encoder: a
pipeline says no more of where its text encoder came from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm_scale.conditioning.text import TextCondition
from ldm_scale.conditioning.tokenizers import build_tokenizer
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import VOCABULARY
from ldm_scale.interchange.foreign_config import CONFIG, Plain, building, require_tensors
from ldm_scale.interchange.foreign_section import MAX_LAYERS, Section
from ldm_scale.interchange.foreign_tower import ACTIVATIONS, WHO, clip_activation, clip_section
from ldm_scale.interchange.foreign_weights import TRANSFORMERS_STEMS, read_foreign_tensors
from ldm_scale.interchange.name_maps import restore, text_encoder_names
from ldm_scale.interchange.safetensors_io import read_json
from ldm_scale.interchange.text_encoder import LDMBertConfig, LDMBertModel, published

TEXT_CLASSES: dict[str, tuple[Any, Any]] = {
    "CLIPTextModel": (CLIPTextModel, CLIPTextConfig),
    "LDMBertModel": (LDMBertModel, LDMBertConfig),
}
TOKENIZER_CLASSES: dict[str, Any] = {
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTokenizerFast": CLIPTokenizer,
    "BertTokenizer": BertTokenizer,
    "BertTokenizerFast": BertTokenizer,
}
CAPTIONS = ("", "a red apple on a white plate", "Grinning Face", "flag: Cote d'Ivoire, 3 stars")

# Buffers that older versions of transformers wrote beside the weights, and a head that LDMBertModel never runs.
_IDLE = ("position_ids",)


def read_foreign_text(
    encoder: Path, class_name: str, tokenizer: Path, tokenizer_name: str
) -> tuple[TextConditioningConfig, LazyTensors]:
    """The section and the tensors of a `TextCondition` that computes what the text encoder in `encoder` does.

    The section's vocabulary, where it has one, is the tokenizer's file.
    Raises: CheckpointError if ours cannot compute the same, with the key of its configuration; if its weights are not
    those of its configuration; or if the tokenizer is not one of ours.
    """
    path = encoder / CONFIG
    if class_name not in TEXT_CLASSES or tokenizer_name not in TOKENIZER_CLASSES:
        raise CheckpointError(
            f"{path.parent.parent}: text encoder {class_name} with {tokenizer_name}: those here are "
            f"{' and '.join(TEXT_CLASSES)}, with CLIPTokenizer or BertTokenizer; this model cannot be imported"
        )
    model_class, config_class = TEXT_CLASSES[class_name]
    given = {key: value for key, value in read_json(path).items() if key != "model_type"}
    Section.of_json(path, given).require_possible()
    with building(path, config_class.__name__):
        # A configuration of transformers in older files names fewer keys; the constructor knows the others.
        theirs = config_class(**given).to_dict()
    text = _section(path, theirs, is_clip=class_name == "CLIPTextModel")
    text = _with_tokenizer(text, tokenizer, TOKENIZER_CLASSES[tokenizer_name])
    with building(path, class_name), torch.device("meta"):
        expected = published(model_class(config_class(**theirs)).state_dict(), model_class)
        target = TextCondition(text).state_dict()
    found = read_foreign_tensors(encoder, TRANSFORMERS_STEMS)
    state = published(renamed(found, lambda name: None if name.endswith(_IDLE) else name), model_class)
    require_tensors(path, state, expected)
    return text, restore(state, text_encoder_names(text), target, str(encoder))


def _section(path: Path, theirs: Plain, is_clip: bool) -> TextConditioningConfig:
    """The encoder's part of the section."""
    if is_clip:
        section = clip_section(path, theirs)
        return TextConditioningConfig(
            encoder="clip",
            vocab_size=section.integer("vocab_size", at_least=1),
            max_tokens=section.integer("max_position_embeddings", at_least=1),
            width=section.integer("hidden_size", at_least=1),
            depth=section.integer("num_hidden_layers", at_least=1, at_most=MAX_LAYERS),
            num_heads=section.integer("num_attention_heads", at_least=1),
            activation=clip_activation(section),
        )
    section = Section.of_json(path, theirs)
    width = section.integer("d_model", at_least=1)
    if section.integer("encoder_ffn_dim", at_least=1) != 4 * width:
        raise section.unheld("encoder_ffn_dim", 4 * width, WHO)
    section.require_equal(WHO, scale_embedding=False)
    return TextConditioningConfig(
        encoder="bert",
        vocab_size=section.integer("vocab_size", at_least=1),
        max_tokens=section.integer("max_position_embeddings", at_least=1),
        width=width,
        depth=section.integer("encoder_layers", at_least=1, at_most=MAX_LAYERS),
        num_heads=section.integer("encoder_attention_heads", at_least=1),
        head_dim=section.integer("head_dim", at_least=1),
        activation=section.choice("activation_function", ACTIVATIONS, who=WHO),
    )


def _with_tokenizer(text: TextConditioningConfig, folder: Path, tokenizer_class: Any) -> TextConditioningConfig:
    """The section with the tokenizer in `folder`, which numbers some captions as ours does."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: without its tokenizer a text encoder is of no use; download it")
    if tokenizer_class is BertTokenizer:
        if not (folder / VOCABULARY).is_file():
            raise CheckpointError(
                f"{folder} holds no {VOCABULARY}: save the tokenizer's vocabulary there, one token a line in the order "
                "of their numbers"
            )
        text = replace(text, tokenizer="wordpiece", vocabulary=str(folder / VOCABULARY))
    try:
        theirs = tokenizer_class.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer ({str(error).splitlines()[0][:200]})") from error
    if tokenizer_class is CLIPTokenizer and theirs.pad_token_id == 0:
        text = replace(text, padding="zero")
    options = {"padding": "max_length", "max_length": text.max_tokens, "truncation": True, "return_tensors": "pt"}
    tokens = theirs(list(CAPTIONS), **options).input_ids
    try:
        ours, _ = build_tokenizer(text)(CAPTIONS, text.max_tokens)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: the tokenizer does not fit the text encoder: {error}") from error
    if not torch.equal(tokens, ours):
        row = int((tokens != ours).any(dim=1).nonzero()[0])
        raise CheckpointError(
            f"{folder} numbers {CAPTIONS[row]!r} as {tokens[row, :12].tolist()}..., the tokenizer here as "
            f"{ours[row, :12].tolist()}...: tokenizers here are OpenCLIP's byte pairs and BERT's WordPiece of lower "
            "case; this model cannot be imported"
        )
    return text
