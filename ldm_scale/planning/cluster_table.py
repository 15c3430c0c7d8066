"""A plan on a cluster as text for people, and as one object for programs."""

from __future__ import annotations

import dataclasses

from ldm_scale.planning.cluster import GB
from ldm_scale.planning.cluster_plan import ClusterPlan
from ldm_scale.planning.recommend import USABLE_SHARE, Recommendation
from ldm_scale.planning.run_cost import ScalingRow
from ldm_scale.planning.step_time import StepTime


def cluster_dict(plan: ClusterPlan) -> dict[str, object]:
    """The plan for programs. Units: bytes, bytes/s, seconds, images/s, kWh."""
    cluster, cost = plan.cluster, plan.cost
    return {
        "gpu": cluster.gpu.name,
        "num_gpus": cluster.num_gpus,
        "gpus_per_node": cluster.gpus_per_node,
        "num_nodes": cluster.num_nodes,
        "intra_bytes_per_s": cluster.intra,
        "inter_bytes_per_s": cluster.inter,
        "storage_bytes_per_s": cluster.storage,
        "precision": plan.precision,
        "cached": plan.cached,
        "efficiency": dataclasses.asdict(plan.software),
        "micro_batch": plan.batches.micro_batch,
        "accumulation_steps": plan.batches.accumulation_steps,
        "memory": {
            **plan.memory.device.held,
            **{f"{name} at the peak": count for name, count in _at_the_peak(plan).items()},
            "workspace": plan.workspace,
            "total": plan.memory.device.peak + plan.workspace,
            "available": USABLE_SHARE * plan.cluster.gpu.memory,
        },
        "fits": plan.fits,
        "largest_micro_batch": plan.largest_micro_batch,
        "step_s": _step_dict(plan.step),
        "images_per_s": plan.images_per_s,
        "mfu": plan.mfu,
        "scaling": {
            "weak": [dataclasses.asdict(row) for row in plan.weak],
            "strong": [dataclasses.asdict(row) for row in plan.strong],
        },
        "checkpoints": dataclasses.asdict(plan.checkpoints),
        "run": dataclasses.asdict(cost),
        "recommendation": None if plan.recommendation is None else _recommendation_dict(plan.recommendation, plan),
    }


def _at_the_peak(plan: ClusterPlan) -> dict[str, int]:
    """What is there beside what lies between steps, at the larger of the two peaks."""
    backward, update = plan.memory.device.backward, plan.memory.device.update
    return backward if sum(backward.values()) >= sum(update.values()) else update


def _step_dict(step: StepTime) -> dict[str, object]:
    return dataclasses.asdict(step) | {"total": step.total}


def _recommendation_dict(recommendation: Recommendation, plan: ClusterPlan) -> dict[str, object]:
    choice = recommendation.choice
    return {
        "zero_stage": choice.stage,
        "activation_checkpointing": choice.recomputed,
        "micro_batch": choice.batches.micro_batch,
        "accumulation_steps": choice.batches.accumulation_steps,
        "step_s": choice.step.total,
        "images_per_s": choice.batches.global_batch / choice.step.total,
        "memory_bytes": choice.memory_bytes,
        "reasons": recommendation.reasons,
    }


def cluster_table(plan: ClusterPlan) -> str:
    """The plan for people."""
    cluster, gpu = plan.cluster, plan.cluster.gpu
    lines = [
        f"on {cluster.num_gpus} x {gpu.name} ({cluster.num_nodes} nodes of {cluster.gpus_per_node}; "
        f"{cluster.intra / GB:g} GB/s per GPU inside, {cluster.inter / GB:g} between nodes, storage "
        f"{cluster.storage / GB:g} GB/s), {plan.precision}, "
        f"{_input(plan)}: computed, not measured",
        f"            what software reaches: {plan.software.source}",
        *_memory_lines(plan),
        *_step_lines(plan),
        *_scaling_lines(plan),
        *_run_lines(plan),
        *_recommendation_lines(plan),
    ]
    return "\n".join(lines)


def _input(plan: ClusterPlan) -> str:
    """What a step begins with."""
    if plan.cached:
        return "latents from a cache"
    return "images encoded on the fly" if "first stage" in plan.step.frozen else "images"


def _memory_lines(plan: ClusterPlan) -> list[str]:
    parts = plan.memory.device.held | _at_the_peak(plan) | {"workspace": plan.workspace}
    total = plan.memory.device.peak + plan.workspace
    listed = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items())
    verdict = "fits" if plan.fits else "does NOT fit"
    usable = USABLE_SHARE * plan.cluster.gpu.memory
    return [
        f"memory      {total / 2**30:.2f} of {usable / 2**30:.1f} GiB ({100 * USABLE_SHARE:.0f}% of the GPU's), "
        f"{verdict}: {listed}",
        f"            largest micro-batch {plan.largest_micro_batch or 'none: not one image fits'}"
        + (f"; the configuration takes {plan.batches.micro_batch}" if plan.largest_micro_batch else ""),
    ]


def _step_lines(plan: ClusterPlan) -> list[str]:
    step = plan.step
    parts = {
        "forward": step.forward,
        **({"losses": step.losses} if step.losses else {}),
        "backward": step.backward,
        **({"discriminator": step.discriminator} if step.discriminator else {}),
        **step.frozen,
        "communication exposed": step.communication_exposed,
        "optimizer": step.optimizer,
        "averages": step.averages,
        "waiting for input": step.input_exposed,
    }
    listed = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in parts.items())
    mfu = "" if plan.mfu is None else f", MFU {100 * plan.mfu:.1f}%"
    micro, accumulation = plan.batches.micro_batch, plan.batches.accumulation_steps
    return [
        f"step        {1e3 * step.total:.1f} ms ({micro} images x {accumulation}): {listed}; hidden communication "
        f"{1e3 * step.communication_hidden:.1f}",
        f"speed       {plan.images_per_s:,.0f} images/s, {plan.images_per_s / plan.cluster.num_gpus:.1f} per GPU{mfu}",
    ]


def _scaling_lines(plan: ClusterPlan) -> list[str]:
    """A line for each number of GPUs; strong scaling ends where the batch does not divide any more."""
    strong = {row.num_gpus: row for row in plan.strong}
    what = "as configured" if plan.recommendation is None else "as recommended below"
    lines = [
        f"scaling     {what}; weak: {plan.weak[0].micro_batch} x {plan.weak[0].accumulation_steps} images a GPU, so "
        f"that the global batch grows; strong: a global batch of {plan.batches.global_batch}",
        "GPUs        weak: images/s  per GPU    strong: images/s  per GPU  micro-batch x accumulation",
        *(_scaling_line(row, strong.get(row.num_gpus)) for row in plan.weak),
    ]
    if not all(row.fits for row in (*plan.weak, *plan.strong)):
        lines.append("            * does not fit into a GPU's memory at this size: the states are divided by too few")
    return lines


def _scaling_line(weak: ScalingRow, strong: ScalingRow | None) -> str:
    line = f"{weak.num_gpus:>6}{weak.images_per_s:>20,.0f}{weak.images_per_s / weak.num_gpus:>9.1f}{_mark(weak)}"
    if strong is None:
        return f"{line}{'-':>19}"
    return (
        f"{line}{strong.images_per_s:>19,.0f}{strong.images_per_s / strong.num_gpus:>9.1f}"
        f"{_mark(strong)} {strong.micro_batch} x {strong.accumulation_steps}"
    )


def _mark(row: ScalingRow) -> str:
    return " " if row.fits else "*"


def _run_lines(plan: ClusterPlan) -> list[str]:
    saves, cost = plan.checkpoints, plan.cost
    price = "" if cost.price is None else f", {cost.price:,.0f} to pay"
    return [
        f"checkpoint  {saves.num_bytes / GB:.1f} GB in {saves.write_s:.1f} s, a pause of {saves.stall_s:.2f} s; "
        f"best every {saves.best_interval_s / 60:.1f} min ({saves.bytes_per_s / 1e6:.1f} MB/s); a failure every "
        f"{saves.mtbf_s / 3600:,.0f} h, {saves.expected_failures:.1f} expected; {100 * saves.lost_share:.2f}% is lost",
        f"run         {cost.seconds / 86400:.2f} days, {cost.gpu_days:,.1f} GPU-days, "
        f"{cost.energy_kwh:,.0f} kWh{price}",
    ]


def _recommendation_lines(plan: ClusterPlan) -> list[str]:
    if plan.recommendation is None:
        return [
            "recommended nothing: one image fits at no ZeRO stage, with everything recomputed; take more or larger GPUs"
        ]
    choice = plan.recommendation.choice
    speed = choice.batches.global_batch / choice.step.total
    keys = (
        f"zero.stage={choice.stage} train.micro_batch={choice.batches.micro_batch} "
        f"train.activation_checkpointing={choice.recomputed}"
    )
    return [
        f"recommended {keys} (accumulation {choice.batches.accumulation_steps}): {speed:,.0f} images/s",
        *(f"            {reason}" for reason in plan.recommendation.reasons),
    ]
