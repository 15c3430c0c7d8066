"""Data: from sources over tar shards to batches. The commands and the training use what is named here."""

from ldm_scale.data.annotations import Layout, SceneObject
from ldm_scale.data.batch import Batch
from ldm_scale.data.latents import LatentCache
from ldm_scale.data.loader import Loader, build_loader, check_moments, require_images
from ldm_scale.data.metadata import NO_CLASS
from ldm_scale.data.policy import BadRecord, BadSampleLog, SkippedSample
from ldm_scale.data.shards import Dataset, open_manifest
from ldm_scale.data.unindexed import Unindexed, open_unindexed

__all__ = [
    "NO_CLASS",
    "BadRecord",
    "BadSampleLog",
    "Batch",
    "Dataset",
    "SkippedSample",
    "LatentCache",
    "Layout",
    "Loader",
    "SceneObject",
    "Unindexed",
    "build_loader",
    "check_moments",
    "open_manifest",
    "open_unindexed",
    "require_images",
]
