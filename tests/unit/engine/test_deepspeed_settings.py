"""What DeepSpeed is told, as DeepSpeed itself reads it."""

from __future__ import annotations

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ldm_scale.config.schema import OptimizerConfig, ZeroConfig
from ldm_scale.engine.deepspeed_settings import deepspeed_settings


def _read(zero: ZeroConfig, stage: int, on_cuda: bool) -> DeepSpeedZeroConfig:
    settings = deepspeed_settings(OptimizerConfig(), zero, stage, 4, 2, bf16=on_cuda, on_cuda=on_cuda)
    return DeepSpeedZeroConfig(**settings["zero_optimization"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_communication_overlaps_on_cuda_where_it_is_asked_for(stage: int) -> None:
    assert _read(ZeroConfig(stage=stage), stage, on_cuda=True).overlap_comm is True
    assert _read(ZeroConfig(stage=stage, overlap_comm=False), stage, on_cuda=True).overlap_comm is False
    assert _read(ZeroConfig(stage=stage), stage, on_cuda=False).overlap_comm is False


def test_buckets_are_those_of_the_configuration() -> None:
    read = _read(ZeroConfig(bucket_elements=12_345), 2, on_cuda=True)
    assert (read.reduce_bucket_size, read.allgather_bucket_size, read.prefetch_bucket_size) == (12_345,) * 3
    assert read.contiguous_gradients
    assert read.stage == 2


def test_offloaded_states_are_pinned_on_cuda() -> None:
    read = _read(ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True), 3, on_cuda=True)
    assert read.offload_optimizer is not None
    assert read.offload_param is not None
    assert read.offload_optimizer.pin_memory
    assert read.offload_param.pin_memory
