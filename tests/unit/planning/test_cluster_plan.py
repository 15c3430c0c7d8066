"""`ldm-scale plan --gpu`: recordings, micro-batches, recommendations, scaling, cost; mistakes; the promised keys."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch

from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.plan import main
from ldm_scale.planning.activations import backward_peak
from ldm_scale.planning.cluster import GPUS, Cluster
from ldm_scale.planning.cluster_plan import ClusterPlan, plan_on_cluster
from ldm_scale.planning.flops import measure_run
from ldm_scale.planning.jobs import Workload, transformer_trace
from ldm_scale.planning.memory import FP32, STAGE_0_BUCKET, plan_memory
from ldm_scale.planning.recommend import largest_micro_batch, recommend
from ldm_scale.planning.run_cost import checkpoints, run_cost
from ldm_scale.planning.trace import trace_step

LATENT = (4, 8, 8)
DEMO = (
    "experiment=demo_text",
    "train.device=auto",
    "train.micro_batch=null",
    "unet.num_res_blocks=1",
    "conditioning.text.depth=1",
)


@cache
def _config(*overrides: str) -> Config:
    return load_config([*DEMO, *overrides])


@cache
def _plan(nodes: int = 1, *overrides: str) -> ClusterPlan:
    config = _config("train.global_batch=256", *overrides)
    return plan_on_cluster(config, measure_run(config), Cluster(GPUS["h100"], 8, nodes))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_one_recording_tells_the_memory_of_any_micro_batch(fused: bool, recomputed: str) -> None:
    config = _config(f"train.activation_checkpointing={recomputed}")
    trace = trace_step(config, LATENT, torch.bfloat16, fused)
    for images, bucket in ((3, 10**9), (16, 100_000), (64, 1_000_000)):
        exact = backward_peak(config, images, LATENT, torch.bfloat16, bucket, fused)
        assert trace.peak(images, 2, bucket) == pytest.approx(exact, rel=0.01), (images, bucket)


def test_fused_kernels_keep_less_and_move_less() -> None:
    plain, fused = (trace_step(_config(), LATENT, torch.bfloat16, fused) for fused in (False, True))
    assert fused.peak(64, 2, 10**9) < 0.9 * plain.peak(64, 2, 10**9)
    moved = [sum(operation.bytes.of(64) for operation in trace.operations) for trace in (plain, fused)]
    assert moved[1] < 0.9 * moved[0]


def test_a_recording_has_the_flops_of_a_step_and_all_gradients() -> None:
    config = _config()
    size, trace = measure_run(config), trace_step(config, LATENT, torch.bfloat16, True)
    # Attention's backward pass is counted with the scores that it makes again, and the first layer needs no gradient.
    assert trace.flops(1) == pytest.approx(3 * size.trained_forward_flops, rel=0.1)
    forward = sum(operation.flops.of(1) for operation in trace.operations if operation.phase == "forward")
    assert forward == pytest.approx(size.trained_forward_flops, rel=0.01)
    gradients = sum(getattr(event, "elements", 0) for event in trace.events)
    assert gradients == size.trained.parameters


def test_recomputation_adds_a_forward_pass() -> None:
    plain, again = (
        trace_step(_config(f"train.activation_checkpointing={name}"), LATENT, torch.bfloat16, True)
        for name in ("none", "full")
    )
    assert 1.2 < again.flops(4) / plain.flops(4) < 1.4


def test_a_text_tower() -> None:
    """OpenCLIP ViT-H's 24 layers: 24 x 12 x 1024^2 weights, and two FLOPs for each of 77 tokens."""
    trace = transformer_trace(24, 1024, 77, 2)
    products = 2 * 24 * 12 * 1024**2 * 77
    assert trace.flops(1) == pytest.approx(products + 24 * 4 * 77**2 * 1024)
    assert sum(operation.bytes.fixed for operation in trace.operations) == 2 * 24 * 12 * 1024**2


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    work = Workload(_config(), LATENT, "bf16", cached=True)
    # Room for weights and states, the workspace, and about a hundred images.
    plan = work.memory(BatchPlan(100, 1, 100), 1, 0, "none")
    small = dataclasses.replace(GPUS["h100"], memory=(plan.device.peak + 1.5 * 2**30) / 0.95)
    images = largest_micro_batch(work, 1, small, 0, "none", 1024)
    assert images == 64
    assert largest_micro_batch(work, 1, GPUS["h100"], 0, "none", 1024) == 1024
    assert largest_micro_batch(work, 1, dataclasses.replace(small, memory=1e9), 0, "none", 1024) == 0


def test_recomputation_is_recommended_only_where_it_makes_room() -> None:
    config = _config("train.global_batch=256")
    work, software = Workload(config, LATENT, "bf16", cached=True), _plan().software
    large = recommend(work, Cluster(GPUS["h100"], 8, 1), software)
    assert large is not None
    assert (large.choice.recomputed, large.choice.batches.micro_batch) == ("none", 32)
    assert any("nothing is recomputed" in reason for reason in large.reasons)
    nothing = dataclasses.replace(GPUS["h100"], memory=1e9)
    assert recommend(work, Cluster(nothing, 8, 1), software) is None


def test_the_scaling_table_reaches_4096_gpus() -> None:
    plan = _plan()
    assert [row.num_gpus for row in plan.weak] == [1, *(8 * 2**n for n in range(10))]
    assert [row.num_gpus for row in plan.strong] == [1, 8, 16, 32, 64, 128, 256]
    assert plan.weak[-1].images_per_s < 4096 * plan.weak[0].images_per_s
    assert plan.weak[0].efficiency == 1
    for row in plan.strong:
        assert row.micro_batch * row.accumulation_steps * row.num_gpus == 256
        assert row.images_per_s == pytest.approx(256 / row.step_s)


def test_a_cluster_of_any_size_has_its_own_row() -> None:
    config = _config("train.global_batch=384")
    plan = plan_on_cluster(config, measure_run(config), Cluster(GPUS["h100"], 8, 3))
    assert [row.num_gpus for row in plan.weak[:5]] == [1, 8, 16, 24, 32]
    assert 24 in [row.num_gpus for row in plan.strong]
    assert plan.recommendation is not None
    assert any(
        "GiB" in reason and f"of {0.95 * GPUS['h100'].memory / 2**30:.1f} GiB" in reason
        for reason in plan.recommendation.reasons
    )


def test_a_run_costs_its_gpu_hours() -> None:
    cost = run_cost(3_600_000, 1000.0, 0.1, Cluster(GPUS["h100"], 8, 1), 500.0, 2.0)
    assert cost.seconds == pytest.approx(4000)
    assert cost.gpu_days == pytest.approx(8 * 4000 / 86400)
    assert cost.price == pytest.approx(8 * 4000 / 3600 * 2)
    assert cost.energy_kwh == pytest.approx(8 * 4000 / 3600 * 0.5)


def test_checkpoints_follow_daly() -> None:
    cluster = Cluster(GPUS["h100"], 8, 64, storage_rate=10e9)
    saves = checkpoints(100_000_000_000, False, cluster, 86400.0 * 30)
    assert saves.write_s == saves.stall_s == pytest.approx(10)
    assert saves.best_interval_s == pytest.approx((2 * 10 * saves.mtbf_s) ** 0.5, rel=0.01)
    assert saves.expected_failures == pytest.approx(86400 * 30 / saves.mtbf_s)
    beside = checkpoints(100_000_000_000, True, cluster, 86400.0 * 30)
    assert beside.stall_s < 0.1 * saves.stall_s
    assert beside.lost_share < saves.lost_share


def test_memory_counts_what_the_kernels_keep() -> None:
    work = Workload(_config(), LATENT, "fp32", cached=True)
    plan = work.memory(BatchPlan(4, 1, 4), 1, 0, "none")
    exact = backward_peak(work.config, 4, LATENT, torch.float32, STAGE_0_BUCKET, True)
    assert plan.compute_bytes == FP32
    assert plan.device.backward["activations and gradients"] == pytest.approx(exact, rel=0.01)


def test_json_has_the_plan_and_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpu", "h100", "--nodes", "2", "--price-per-gpu-hour", "2", "--images", "1000000", "--json"]
    assert main([*DEMO, "train.global_batch=256", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {"parameters", "forward_flops", "unet_parameters", "memory"} <= plan.keys()
    cluster = plan["cluster"]
    assert (cluster["num_gpus"], cluster["gpu"], cluster["precision"]) == (16, "h100", "bf16")
    assert {
        "memory",
        "largest_micro_batch",
        "step_s",
        "images_per_s",
        "mfu",
        "scaling",
        "checkpoints",
    } <= cluster.keys()
    step = cluster["step_s"]
    assert {
        "forward",
        "backward",
        "frozen",
        "communication_exposed",
        "communication_hidden",
        "optimizer",
    } <= step.keys()
    assert step["frozen"].keys() == {"first stage"}
    assert cluster["images_per_s"] == pytest.approx(256 / step["total"])
    assert cluster["run"]["price"] == pytest.approx(cluster["run"]["gpu_days"] * 24 * 2)
    assert cluster["recommendation"]["reasons"]
    assert sum(cluster["memory"][part] for part in ("workspace", "masters", "moments")) < cluster["memory"]["total"]


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "train.global_batch=256", "--gpu", "a100-40", "--cached"]) == 0
    text = capsys.readouterr().out
    for word in (
        "memory ",
        "largest micro-batch",
        "step ",
        "images/s",
        "checkpoint ",
        "GPU-days",
        "recommended zero.stage=",
    ):
        assert word in text
    assert "first stage" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; take one of v100"),
        (["--gpu", "h100", "--nodes", "0"], "--nodes 0: must be above 0"),
        (["--gpu", "h100", "--intra-gbs", "-1"], "--intra-gbs -1: must be above 0"),
        (["--gpu", "h100", "--nodes", "3"], "train.global_batch=256 does not divide by the 24 GPUs"),
        (["--gpu", "h100", "train.micro_batch=5"], "train.micro_batch=5 does not divide the 32 images of each rank"),
        (["--gpu", "v100", "--precision", "bf16"], "--gpu v100: it has no bf16"),
        (["--gpu", "h100", "--ranks", "8"], "--ranks and --gpu"),
        (["--nodes", "2"], "--nodes is about a cluster; name its GPU with --gpu"),
        (["--cached"], "--cached is about a cluster"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [*DEMO, "train.global_batch=256", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


STAGE_1 = ("experiment=demo_autoencoder", "train.global_batch=64", "train.device=auto", "train.micro_batch=null")


def test_stage_1_has_its_losses_and_its_discriminator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STAGE_1, "autoencoder_loss.discriminator_start_images=0", "--gpu", "h100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    step, memory = plan["cluster"]["step_s"], plan["cluster"]["memory"]
    assert all(step[part] > 0 for part in ("forward", "losses", "backward", "discriminator"))
    assert step["frozen"] == {}
    assert memory["perceptual net"] > 0
    assert memory["activations and gradients at the peak"] > 0
    never = "autoencoder_loss.discriminator_start_images=1000000000"
    assert main([*STAGE_1, never, "--gpu", "h100"]) == 0
    words = capsys.readouterr().out
    assert ", losses " in words
    assert ", discriminator " not in words


def test_pixels_have_no_stage_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["experiment=identity_f1", "--gpu", "h100"]) == 2
    assert "autoencoder.kind=identity with --gpu" in capsys.readouterr().err
    assert main(["experiment=identity_f1", "--json"]) == 0
    assert "activations and gradients" not in json.loads(capsys.readouterr().out)["memory"]["device"]["backward"]


def test_stage_1_has_no_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [*STAGE_1, "--gpu", "h100", "--cached"]) == 2
    assert "--cached with stage=autoencoder" in capsys.readouterr().err


@pytest.mark.rest
def test_a_budget_chooses_blocks_on_a_cluster_too(capsys: pytest.CaptureFixture[str]) -> None:
    large = "train.global_batch=4096"  # activations are most of the memory
    plain = _plan(1, large)
    budget = [
        "train.activation_checkpointing=budget",
        f"train.memory_budget_gib={0.8 * plain.memory.device.peak / 2**30}",
    ]
    assert main([*DEMO, large, *budget, "--gpu", "h100"]) == 0
    assert "blocks are recomputed: " in capsys.readouterr().out
    plan = _plan(1, large, *budget)
    assert 0 < len(plan.memory.recomputed) < 100
    assert plan.memory.device.peak < plain.memory.device.peak
    assert plan.step.backward > plain.step.backward
    assert run_command(main, [*DEMO, *budget[:1], "train.memory_budget_gib=0.001", "--gpu", "h100"]) == 2
    assert "train.memory_budget_gib=0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["zero.stage=2", "--ranks", "1"], "needs zero.stage=0, got 2"),
        (["zero.stage=0", "--gpu", "h100"], "one rank, got 8"),
    ],
)
def test_what_no_run_could_do_is_not_planned(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [*DEMO, "train.cuda_graphs=true", "train.global_batch=256", *words]) == 2
    assert why in capsys.readouterr().err


def test_a_v100_computes_in_fp32() -> None:
    config = _config("train.global_batch=256")
    plan = plan_on_cluster(config, measure_run(config), Cluster(GPUS["v100"], 8, 1))
    assert (plan.precision, plan.mfu) == ("fp32", None)


def test_what_is_offloaded_is_recommended_where_it_can_be() -> None:
    config = _config("zero.stage=1", "zero.offload_optimizer=true")
    found = recommend(Workload(config, LATENT, "bf16", cached=True), Cluster(GPUS["h100"], 1, 1), _plan().software)
    assert found is not None
    assert found.choice.stage == 1, "stage 0 refuses offload_optimizer"
    all_of_it = _config("zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true")
    found = recommend(Workload(all_of_it, LATENT, "bf16", cached=True), Cluster(GPUS["h100"], 8, 1), _plan().software)
    assert found is not None
    assert found.choice.stage == 3


def test_sizes_of_clusters_that_do_not_fit_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(2)
    assert all(row.fits for row in plan.weak + plan.strong)
    small = dataclasses.replace(GPUS["h100"], memory=plan.memory.device.peak + 2.0 * 2**30)
    config = _config("train.global_batch=256")
    tight = plan_on_cluster(config, measure_run(config), Cluster(small, 8, 2))
    assert tight.recommendation is not None
    work = Workload(config, LATENT, "bf16", cached=False)
    for row in tight.weak:
        batches = BatchPlan(row.micro_batch, row.accumulation_steps, row.micro_batch * row.num_gpus)
        choice = tight.recommendation.choice
        peak = work.memory(batches, row.num_gpus, choice.stage, "none")
        assert row.fits == (peak.device.peak + 1.5 * 2**30 <= 0.95 * small.memory)


def test_the_frozen_encoder_has_its_weights() -> None:
    """OpenCLIP ViT-H's text tower has 354.0M (open_clip's table of models, docs/model_profile.csv)."""
    config = load_config(["experiment=sd2", "conditioning=frozen_openclip_h", "train.device=auto"])
    memory = plan_memory(config, BatchPlan(1, 1, 1), 1, (4, 64, 64), backward=0)
    assert memory.device.held["frozen text encoder"] / 2 == pytest.approx(354.0e6, rel=0.01)
