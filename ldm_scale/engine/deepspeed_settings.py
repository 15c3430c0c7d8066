"""DeepSpeed's configuration, as a dictionary of its keys; no other file spells them."""

from __future__ import annotations

from typing import Any

from ldm_scale.config.schema import OptimizerConfig, ZeroConfig


def deepspeed_settings(
    optimizer: OptimizerConfig,
    zero: ZeroConfig,
    stage: int,
    micro_batch: int,
    accumulation_steps: int,
    bf16: bool,
    on_cuda: bool,
) -> dict[str, Any]:
    """What an engine is made with.

    On a CPU nothing overlaps: there is no second stream to communicate in.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": optimizer.gradient_clip or 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": stage,
            **_memory_settings(zero, stage, on_cuda),
            "overlap_comm": zero.overlap_comm and on_cuda,
            "contiguous_gradients": on_cuda,
            "reduce_bucket_size": zero.bucket_elements,
            "allgather_bucket_size": zero.bucket_elements,
            "stage3_prefetch_bucket_size": zero.bucket_elements,
        },
    }


def _memory_settings(zero: ZeroConfig, stage: int, on_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's keys for what lies in the CPU's memory, and for what stage 3 keeps gathered."""
    on_cpu = {"device": "cpu", "pin_memory": on_cuda}
    settings: dict[str, Any] = {
        "stage3_max_live_parameters": zero.live_elements,
        "stage3_max_reuse_distance": zero.live_elements,
    }
    if zero.offload_optimizer and stage > 0:
        settings["offload_optimizer"] = on_cpu
    if zero.offload_parameters and stage == 3:
        settings["offload_param"] = on_cpu
    return settings
