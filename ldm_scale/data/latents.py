"""What a latent cache is: the provenance in its manifest, the members of a sample, and which of them a step sees.

A latent shard is a plain webdataset tar with the samples of an image shard, in their order and under their names, but
instead of the picture each has moments of its raw latents, one member per variant:

    latents.center.npy                the largest centred square
    latents.mirror.npy                its mirror image, where the cache holds flips and no crops
    latents.crop0.npy, .crop1.npy ... random squares, some of them mirrored where the cache holds flips
    text.npy                          contexts of all its captions, where the cache holds a frozen text encoder's
    latents.json                      the picture's size, and of each variant its box in the picture's pixels and
                                      whether it is mirrored; or, instead of all that, why the picture cannot be used

All other members (caption, class, metadata, label map) are the source's; boxes and maps go through the recorded box. A
sample that cannot be used keeps its place, so that numbers mean the same in both and it is replaced as training from
images replaces it.

Moments, not samples: mean and log-variance of a KL posterior, one above the other, so that every epoch draws anew; the
raw latents themselves of the other kinds. Raw, because statistics belong to the artifact and are applied in training.
The cost is twice the bytes of one sample.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldm_scale.config.convert import section_from_dict
from ldm_scale.data.annotations import View
from ldm_scale.data.arrays import Members, all_finite, array_of, not_finite
from ldm_scale.data.permutation import uniforms
from ldm_scale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ldm_scale.data.decode import DecodeSettings

PREFIX = "latents."
RECORD = "latents.json"
CONTEXTS = "text.npy"
CENTER, MIRROR = "center", "mirror"
LATENTS, IMAGES = "latents", "images"  # kinds of shards
# Raised when the same transform would give other pixels: caches made before belong to another transform then.
TRANSFORM_VERSION = 2

# How our records of usable pictures begin, before and since they tell the picture's size.
_USABLE = (b'{"size": [', b'{"variants": {')


@dataclass(frozen=True)
class LatentTransform:
    """Everything between a picture's file and its stored moments but the autoencoder."""

    resolution: int  # pixels along each side
    random_crops: int = 0  # variants with a random square; 0 = the centred one alone
    crop_scale_min: float = 1.0  # smallest side of a random square as a share of the picture's shorter side
    horizontal_flip: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"  # what the encoder computed in
    dtype: Literal["float16", "float32"] = "float16"  # what the moments are stored in
    resampling: str = "bicubic with antialiasing, once, from a box with whole corners"
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    version: int = TRANSFORM_VERSION

    @property
    def sha256(self) -> str:
        """Hash of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CachedText:
    """Whose contexts of the captions a cache holds, in float16."""

    model: str  # OpenCLIP's name of the architecture
    weights_sha256: str  # of the text tower's tensors
    layer: Literal["last", "penultimate"]
    max_tokens: int
    width: int


@dataclass(frozen=True)
class LatentCache:
    """The provenance of a manifest's latent shards."""

    artifact_sha256: str  # content hash of the autoencoder artifact
    kind: Literal["kl", "vq", "identity"]
    f: int  # pixels per latent along each axis
    c: int  # channels of the raw latents
    transform: LatentTransform
    program: str = field(default="", compare=False)  # version that wrote it, for people
    text: CachedText | None = None  # None: no contexts beside the latents

    @cached_property
    def moments_shape(self) -> tuple[int, int, int]:
        """Shape of one variant's moments: (2c, h, w) of a KL posterior, else (c, h, w)."""
        side = self.transform.resolution // self.f
        return (2 * self.c if self.kind == "kl" else self.c, side, side)

    @cached_property
    def stored_dtype(self) -> np.dtype[Any]:
        """What the moments are stored in."""
        return np.dtype(self.transform.dtype)

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of every sample."""
        if self.transform.random_crops:
            return (CENTER, *(f"crop{number}" for number in range(self.transform.random_crops)))
        return (CENTER, MIRROR) if self.transform.horizontal_flip else (CENTER,)

    def variant(self, settings: DecodeSettings, epoch: int, key: str) -> str:
        """The variant that a sample has in an epoch.

        A flip falls as it does for pictures, so that a cache with flips alone gives what its images give.
        """
        if not settings.augment or len(self.variants) == 1:
            return CENTER
        if self.transform.random_crops:
            (choice,) = uniforms(1, "variant", settings.seed, epoch, key)
            return f"crop{int(choice * self.transform.random_crops)}"
        return MIRROR if uniforms(4, "augment", settings.seed, epoch, key)[3] < 0.5 else CENTER

    def others(self, variant: str) -> frozenset[str]:
        """Members of all variants but this one."""
        return frozenset(member(name) for name in self.variants if name != variant)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest or a sidecar, with the hash of the transform."""
        content = json.loads(json.dumps(asdict(self)))
        return {**content, "transform_sha256": self.transform.sha256}

    @classmethod
    def from_dict(cls, content: Any, owner: str) -> LatentCache:
        """What `to_dict` wrote; `owner` is the file, for messages.

        Raises: DataError if it is something else, or its hash is not that of its transform.
        """
        try:
            values = dict(content)
            stated = values.pop("transform_sha256")
            cache = section_from_dict(cls, values, LATENTS)
        except (TypeError, ValueError, KeyError, ConfigError) as error:
            raise DataError(
                f"{owner}: malformed provenance of latents ({error!r}); write it with `ldm-scale encode`"
            ) from None
        if stated != cache.transform.sha256:
            raise DataError(
                f"{owner}: its transform hashes to {cache.transform.sha256[:12]} and it states {str(stated)[:12]}; the "
                "file was edited or belongs to another version: encode anew with `ldm-scale encode`"
            )
        return cache


def member(variant: str) -> str:
    """Extension of a variant's moments."""
    return f"{PREFIX}{variant}.npy"


def pack_moments(moments: NDArray[np.float32], dtype: str, key: str) -> bytes:
    """The .npy of one variant's moments.

    Raises: DataError, naming the key, if they are not finite or the type cannot hold them.
    """
    largest = float(np.abs(moments).max())
    if not math.isfinite(largest):
        raise DataError(
            f"{key}: the autoencoder gives moments that are not finite; look at the picture and the artifact"
        )
    if largest > float(np.finfo(dtype).max):
        raise DataError(
            f"{key}: a moment of {largest:g} lies outside {dtype} (at most {np.finfo(dtype).max:g}); encode with "
            "--dtype float32"
        )
    buffer = io.BytesIO()
    np.save(buffer, moments.astype(dtype), allow_pickle=False)
    return buffer.getvalue()


def refused(sample: Members) -> str | None:
    """Why the picture of a sample cannot be used, as latents.json says; None if it can.

    Raises: DataError as `read_record`, where it does not begin as the record of a usable picture.
    """
    content = sample[RECORD]
    if not isinstance(content, str) and bytes(content[:16]).startswith(_USABLE):
        return None
    reason: str | None = read_record(sample).get("unusable")
    return reason


def read_record(sample: Members) -> dict[str, Any]:
    """The content of latents.json: "variants" (name -> box, flip) or "unusable" (the reason).

    Raises: DataError if it is neither.
    """
    try:
        content = sample[RECORD]
        record = json.loads(content if isinstance(content, str) else bytes(content))
        if isinstance(record.get("unusable"), str) or isinstance(record["variants"], dict):
            return record  # type: ignore[no-any-return]
    except (KeyError, ValueError, AttributeError):
        pass
    raise DataError(f"{sample['__key__']!s}: its {RECORD} is missing or malformed; encode its shard anew")


def read_view(record: Mapping[str, Any], variant: str, key: str) -> View:
    """The part of the picture that a variant shows.

    Raises: DataError, naming the key, if the record does not tell.
    """
    try:
        width, height = record["size"]
        left, top, right, bottom = record["variants"][variant]["box"]
        return View((width, height), (left, top, right, bottom), bool(record["variants"][variant]["flip"]))
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{key}: its {RECORD} does not tell the picture's size and the box of {variant}, which boxes and maps "
            "need; encode its shard anew"
        ) from None


def pack_contexts(contexts: NDArray[Any], key: str) -> bytes:
    """The .npy of the contexts of a sample's captions. Shapes: (captions, M, d).

    Raises: DataError, naming the key, if float16 cannot hold them.
    """
    stored = contexts.astype(np.float16)
    if not np.isfinite(stored).all():
        raise DataError(
            f"{key}: the text encoder gives contexts that are not finite, or lie outside float16; look at its weights"
        )
    buffer = io.BytesIO()
    np.save(buffer, stored, allow_pickle=False)
    return buffer.getvalue()


def read_context(sample: Members, number: int, text: CachedText) -> NDArray[Any]:
    """The context of the sample's caption `number`. Shapes: returns (M, d) in float16.

    Raises: DataError, naming the key, if it is missing or of another shape or type than the manifest's.
    """
    key, contexts = str(sample["__key__"]), array_of(sample, CONTEXTS)
    expected = (text.max_tokens, text.width)
    if contexts.ndim != 3 or contexts.shape[1:] != expected or contexts.dtype != np.float16 or number >= len(contexts):
        raise DataError(
            f"{key}: its {CONTEXTS} has shape {contexts.shape} of {contexts.dtype}, its manifest says {expected} of "
            f"float16 for each caption, and it has {number + 1} or more; encode its shard anew"
        )
    context: NDArray[Any] = contexts[number]
    return context


def read_moments(sample: Members, variant: str, cache: LatentCache) -> NDArray[Any]:
    """Moments of one variant, in the stored type: a view of the member that cannot be written to.

    Raises: DataError, naming the key, if they are missing, not finite or of another shape or type than the manifest's.
    """
    moments = view_moments(sample, variant, cache)
    if not all_finite(moments):
        raise not_finite(str(sample["__key__"]), member(variant))
    return moments


def view_moments(sample: Members, variant: str, cache: LatentCache) -> NDArray[Any]:
    """What `read_moments` returns, finite or not: of a whole batch that is asked for less.

    Raises: DataError as `read_moments`, but for numbers that are not finite.
    """
    name = member(variant)
    moments = array_of(sample, name)
    if moments.shape != cache.moments_shape or moments.dtype != cache.stored_dtype:
        raise DataError(
            f"{sample['__key__']!s}: its {name} has shape {moments.shape} of {moments.dtype}, its manifest says "
            f"{cache.moments_shape} of {cache.transform.dtype}; encode its shard anew"
        )
    return moments
