"""The comparison of pixels and latents: its shapes, a shortened run, its ratios, projections and refusals."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import pixel_vs_latent, train_step
from benchmarks.measured import RESULTS, environment
from benchmarks.pixel_latent import command, costs, quality, rounds, steps, tables
from benchmarks.pixel_latent.models import FAMILIES, SCALES, Model, Scale, models
from benchmarks.pixel_latent.published import CLAIM, GPUS, TABLE_6, TABLE_18
from benchmarks.pixel_latent.steps import CACHED, DENOISE, ON_THE_FLY, Prepared
from ldm_scale.__main__ import run_command
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import ConditioningConfig, TrainConfig
from ldm_scale.data import Batch, batch
from ldm_scale.engine import env
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.planning.flops import measure_run
from ldm_scale.planning.memory import network_sizes
from tests.helpers.documents import ROOT
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, UNET, tiny_config

CPU = torch.device("cpu")
PATIENCE_S = 600.0  # the two tests with ranks take some 15 seconds of an idle core
pytestmark = pytest.mark.timeout(PATIENCE_S)
# A sixteenth would leave Table 6's LDM-1 11 channels, and the embedding of times needs an even number.
SHORT = Scale(resolution=64, narrowing=8, batch=2, sample_images=(1, 1), ddim_steps=1, pairs=False)
ALL = models()
BY_KEY = {model.key: model for model in ALL}
CHOSEN = ("imagenet/LDM-1", "imagenet/LDM-4", "inpainting/LDM-1", "inpainting/LDM-4 KL")


def _here() -> env.Environment:
    return env.start(env.read_launch(), TrainConfig(device="cpu"))


def _shortened() -> dict[str, dict[str, Any]]:
    return command.measure([BY_KEY[key] for key in CHOSEN], SHORT, _here(), 4)


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    (found,) = run_ranks(_shortened, 1, timeout_s=PATIENCE_S)
    return found  # type: ignore[no-any-return]


def test_a_shortened_comparison_has_all_figures(figures: dict[str, dict[str, Any]]) -> None:
    assert tuple(figures) == CHOSEN
    for key, entry in figures.items():
        cacheable = key.startswith("imagenet")
        assert entry["failed"] is entry["ratio_refused"] is None
        expected = {ON_THE_FLY, "sample", "sample_double"} | ({CACHED} if cacheable else set())
        assert set(entry["images_per_s"]) == set(entry["ratio"]) == expected
        assert all(rate["min"] > 0 for rate in entry["images_per_s"].values())
        assert all(value is None for value in entry["mfu"].values()), "a CPU has no peak of its own"
        assert set(entry["gpu_days"]) == expected & {CACHED, ON_THE_FLY}
        assert all(gpu["basis"] == costs.COMPUTED for mode in entry["gpu_days"].values() for gpu in mode.values())
    for family in ("imagenet", "inpainting"):
        assert figures[f"{family}/LDM-1"]["ratio"][ON_THE_FLY]["median"] == 1.0
    first, other = (figures[key]["images_per_s"][CACHED] for key in CHOSEN[:2])
    ratio = figures["imagenet/LDM-4"]["ratio"][CACHED]
    assert other["min"] / first["max"] <= ratio["min"] <= ratio["median"] <= ratio["max"] <= other["max"] / first["min"]


def test_the_files_say_what_was_measured(figures: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    described = environment(CPU, datetime.now(UTC).date().isoformat())
    with_peak = {key: entry | {"peak_bytes": {ON_THE_FLY: 2**20 * 77}} for key, entry in figures.items()}
    points = [{"f": 1, "training_flops": 1e9, "sample_flops": 1e9, "distance": 3.0, "distance_name": "FD"}]
    command.write_all(tmp_path, with_peak, SHORT, 4, CPU, described, points)
    stem = f"pixel_vs_latent-imagenet-inpainting-cpu-{described['date']}"
    endings = (".json", ".csv", ".md", "-cost.png", "-quality.png")
    assert {path.name for path in tmp_path.iterdir()} == {stem + ending for ending in endings}
    rows = list(csv.DictReader(io.StringIO((tmp_path / f"{stem}.csv").read_text())))
    assert [f"{row['family']}/{row['name']}" for row in rows] == list(CHOSEN)
    assert float(rows[1]["train_cached_ratio"]) == figures["imagenet/LDM-4"]["ratio"][CACHED]["median"]
    assert rows[2]["train_cached_images_per_s"] == ""
    text = (tmp_path / f"{stem}.md").read_text()
    assert "is not images a second" in text
    assert costs.COMPUTED in text
    assert "77" in text
    line = next(line for line in text.splitlines() if line.startswith("| LDM-4 KL | 2.91"))
    assert "3.73; 4.86" in line
    assert "(2.70)" in line
    (document,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert document["environment"]["torch"] == torch.__version__
    assert document["results"]["evaluations"] == points


def test_a_run_of_some_families_replaces_no_other_and_draws_no_empty_plot(
    figures: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    full, small = SCALES["full"], SCALES["small"]
    every = {model.key: {"family": model.family} for model in ALL}
    assert command.name_of(every, small) == "pixel_vs_latent"
    assert command.name_of(every, full) == "pixel_vs_latent-full"
    pairs = {key: entry for key, entry in figures.items() if entry["family"] == "inpainting"}
    assert command.name_of(pairs, full) == "pixel_vs_latent-full-inpainting"
    command.write_all(tmp_path, pairs, SHORT, 4, CPU, environment(CPU, ""), [])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".md"]


def test_the_committed_report_is_of_the_committed_figures() -> None:
    (path,) = RESULTS.glob("pixel_vs_latent-cpu-*.json")
    document = json.loads(path.read_text())
    results, scale = document["results"], SCALES["small"]
    assert results["scale"] == json.loads(json.dumps(asdict(scale)))
    text = tables.markdown(results["models"], scale, results["rounds"], document["environment"])
    assert path.with_suffix(".md").read_text() == text
    assert path.with_suffix(".csv").read_bytes().decode() == tables.csv_text(results["models"])


def _memory_and_steps(folder: Path) -> tuple[dict[str, int], int, list[list[int]], bool]:
    """Bytes that an LDM-4 takes and its parameters; the image numbers of each of two steps of two micro-batches, and
    whether they moved the weights."""
    here = _here()
    took = rounds.peaks(BY_KEY["imagenet/LDM-4"], SHORT, here)
    one = Prepared(replace(BY_KEY["imagenet/LDM-4"], fits=1), SHORT, here, folder)
    seen: list[list[int]] = []
    accumulate = one.task.accumulate

    def noted(batches: Any, images: int) -> Any:
        seen.append([number for batch in batches for number in batch.image_numbers.tolist()])
        return accumulate(batches, images)

    one.task.accumulate = noted  # type: ignore[method-assign]
    fragments = one.task.trained["diffusion"].model.fragments
    before = sum(float(fragment.master.double().abs().sum()) for fragment in fragments)
    for _ in range(2):
        one.run(CACHED, lambda: 0.0)
    after = sum(float(fragment.master.double().abs().sum()) for fragment in fragments)
    return took, sum(parameter.numel() for parameter in one.task.network.parameters()), seen, before != after


def test_a_step_is_the_trainers_on_the_batch_budget_and_memory_is_beyond_the_states(tmp_path: Path) -> None:
    ((took, parameters, seen, moved),) = run_ranks(_memory_and_steps, 1, tmp_path / "artifact", timeout_s=PATIENCE_S)
    assert seen == [[0, 1], [2, 3]]
    assert moved
    assert set(took) == {CACHED, ON_THE_FLY, "sample_double"}
    states = 16 * parameters  # fp32 weights, Adam's two moments, an average
    assert all(states < peak < 60 * parameters + 2**29 for peak in took.values())


class _Fake:
    """A model whose steps take no time; one of them gives NaN."""

    def __init__(self, model: Model, scale: Scale, here: env.Environment, folder: Path) -> None:
        self.model = model
        self.actions = {ON_THE_FLY: lambda: None, DENOISE: lambda: torch.ones(1)}
        if model.f == 4:
            self.actions[DENOISE] = lambda: torch.tensor([float("nan")])

    def images(self, action: str) -> int:
        return 1

    run = Prepared.run


def test_a_model_that_gives_nan_has_no_figures_and_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "Prepared", _Fake)
    group = [BY_KEY[f"celeba/LDM-{f}"] for f in (1, 2, 4)]
    here = env.Environment(env.Launch(), CPU, torch.float32)
    seconds, failed = rounds.take_turns(group, SHORT, here, 4)
    assert list(seconds) == ["celeba/LDM-1", "celeba/LDM-2"] or list(seconds) == ["celeba/LDM-2", "celeba/LDM-1"]
    assert len(seconds["celeba/LDM-1"][ON_THE_FLY]) == 4
    assert len(seconds["celeba/LDM-1"][DENOISE]) == 2, "sampling is timed in every third round"
    assert [rounds.sampling_rounds(n) for n in (4, 6, 7, 10)] == [2, 2, 3, 4]
    assert list(failed) == ["celeba/LDM-4"]
    assert "denoise gave values that are not finite" in failed["celeba/LDM-4"]
    counts = {model.key: model.published for model in group}
    assert costs.refused(group[0], group[2], counts, failed) == failed["celeba/LDM-4"]
    assert costs.refused(group[0], group[1], counts, failed) is None


def test_unequal_models_have_no_ratio() -> None:
    first, other = BY_KEY["imagenet/LDM-1"], BY_KEY["celeba/LDM-1"]
    counts = {model.key: model.published for model in (first, other)}
    assert "32% apart" in (costs.refused(first, other, counts, {}) or "")


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_model_has_about_its_pixel_models_parameters_and_batch(scale: Scale) -> None:
    for family in FAMILIES:
        group = [model for model in ALL if model.family == family]
        sizes = {model.key: _parameters(model, scale) for model in group}
        for model in group:
            assert costs.refused(group[0], model, {m.key: m.published for m in group}, {}) is None
            assert abs(sizes[model.key] / sizes[group[0].key] - 1) < costs.FAR
            plan = batch_plan(model.at(scale), 1)
            assert plan.global_batch == scale.batch
            assert plan.micro_batch <= model.fits


def _parameters(model: Model, scale: Scale) -> int:
    if scale.narrowing == 1:
        return model.published.parameters
    config = model.at(scale)
    return sum(sum(sizes) for _, sizes, _ in network_sizes(config, config.autoencoder.latent_channels))


def test_the_networks_are_the_papers() -> None:
    printed = {"imagenet": (396, 391, 391, 395, 395, 395), "celeba": (270, 265, 274, 258, 260, 258)}
    for family, sizes in printed.items():
        found = [model for model in ALL if model.family == family]
        assert [model.f for model in found] == [1, 2, 4, 8, 16, 32]
        for model, size in zip(found, sizes, strict=True):
            assert model.published.size.unet is not None
            assert model.published.size.unet.parameters / 1e6 == pytest.approx(size, rel=0.03)
    # reference counts of the published networks: 1188 and 208.4 GFLOP a pass, 345.2 of the VQ-f4's encoder
    pixels, latents = BY_KEY["imagenet/LDM-1"].published, BY_KEY["imagenet/LDM-4"].published
    assert costs.counted_ratios(pixels, latents)[CACHED] == pytest.approx(1188 / 208.4, rel=0.003)
    expected = 3 * 1188 / (3 * 208.4 + 345.2)
    assert costs.counted_ratios(pixels, latents)[ON_THE_FLY] == pytest.approx(expected, rel=0.003)
    assert latents.sample(100) == pytest.approx(100 * 208.4e9 + 670.6e9, rel=0.003)
    # Inpainting encodes the picture and the masked picture.
    inpainting = BY_KEY["inpainting/LDM-4 VQ"].published
    assert inpainting.train_on_the_fly == pytest.approx(3 * 207.6e9 + 2 * 345.2e9, rel=0.003)


def test_days_are_images_times_flops_over_speed() -> None:
    model = BY_KEY["imagenet/LDM-4"]
    computed = costs.gpu_days(model, {CACHED: None, ON_THE_FLY: None}, "cpu")
    flops = 3 * 208.4e9
    assert computed[CACHED]["A100"]["days"] == pytest.approx(80e6 * flops / (0.28 * 312e12) / 86400, rel=0.003)
    assert {gpu["basis"] for gpu in computed[CACHED].values()} == {"computed, not measured"}
    measured = costs.gpu_days(model, {CACHED: 0.5, ON_THE_FLY: 0.25}, "NVIDIA H100 80GB HBM3")
    assert measured[CACHED]["B200"]["days"] == pytest.approx(80e6 * flops / (0.5 * 2250e12) / 86400, rel=0.003)
    assert measured[ON_THE_FLY]["V100"]["share_of_peak"] == 0.25
    assert {gpu["basis"] for gpu in measured[CACHED].values()} == {
        "projected by the share of the peak measured on NVIDIA H100 80GB HBM3"
    }
    assert set(GPUS) == {"V100", "A100", "H100", "H200", "B200"}


@pytest.mark.parametrize(("scale", "is_projected"), [(SHORT, False), (replace(SHORT, narrowing=1), True)])
def test_only_published_networks_say_what_share_of_a_gpu_they_reach(scale: Scale, is_projected: bool) -> None:
    model = BY_KEY["imagenet/LDM-4"]
    seconds = {model.key: {CACHED: [0.1] * 4, ON_THE_FLY: [0.2] * 4, DENOISE: [0.1] * 4, "denoise_double": [0.4] * 4}}
    seconds[model.key] |= {"decode": [0.1] * 4, "decode_double": [0.4] * 4}
    device = ("NVIDIA H100 80GB HBM3", torch.bfloat16)
    entry = costs.figures_of([model], seconds, {}, scale, device)[model.key]
    assert entry["mfu"][CACHED] > 0
    assert (entry["gpu_days"][CACHED]["H100"]["basis"] != costs.COMPUTED) is is_projected


def test_utilisation_is_counted_flops_over_the_peak() -> None:
    counted = BY_KEY["imagenet/LDM-4"].published
    rates = {CACHED: {"median": 100.0}, ON_THE_FLY: {"median": 100.0}}
    found = costs.utilisation(counted, rates, ("NVIDIA H100 80GB HBM3", torch.bfloat16))
    assert found[CACHED] == pytest.approx(100 * 3 * 208.4e9 / 989.4e12, rel=0.003)
    assert found[ON_THE_FLY] == pytest.approx(100 * (3 * 208.4e9 + 345.2e9) / 989.4e12, rel=0.003)
    assert costs.utilisation(counted, rates, ("cpu", torch.float32)) == {CACHED: None, ON_THE_FLY: None}


def test_the_papers_rows_are_as_printed() -> None:
    first, latents = TABLE_6["LDM-1"], TABLE_6["LDM-4 KL"]
    assert latents.training / first.training == pytest.approx(2.91, abs=0.005)
    assert first.epoch_h / latents.epoch_h == pytest.approx(CLAIM, abs=0.005)
    # What makes the column doubtful: the same number of units an epoch for all, too few to be images.
    units = [row.training * row.epoch_h * 3600 for row in TABLE_6.values()]
    assert all(8_100 < count < 8_900 for count in units)
    # images / V100-days as published imply these rates of an A100, which is 2.2 V100.
    rates = [2.2 * row.images / (row.v100_days * 86400) for row in TABLE_18]
    assert rates == pytest.approx([34.8, 59.8, 20.1], rel=0.005)


def test_pairs_and_families_take_turns() -> None:
    assert [len(group) for group in rounds.groups(ALL, pairs=False)] == [6, 6, 4]
    pairs = rounds.groups(ALL, pairs=True)
    assert [len(group) for group in pairs] == [2] * 13
    assert all(first.f == 1 and first.family == other.family for first, other in pairs)


def _evaluated(folder: Path, name: str, model: Path, seed: int = 0) -> Path:
    document = json.loads((ROOT / "docs" / "results" / "conditioning" / "text.json").read_text())
    document["model"] |= {"path": str(model), "images": 1000}
    document["protocol"]["seed"] = seed
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return path


def test_quality_stands_beside_what_the_model_took(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, ConditioningConfig())
    (point,) = quality.points([_evaluated(tmp_path, "a", model)])
    config = tiny_config("diffusion", Path(), tmp_path / "run", conditioning={"text": None}, unet={"attention": "self"})
    size = measure_run(config)
    assert size.unet is not None
    assert point["f"] == 2 ** (len(AUTOENCODER.channel_multipliers) - 1)
    assert UNET.base_channels == 16
    assert point["training_flops"] == 1000 * 3 * size.unet.forward_flops
    # 25 steps under guidance are 50 passes.
    assert point["sample_flops"] == 50 * size.unet.forward_flops + size.decoder.forward_flops
    assert point["distance"] == pytest.approx(229.518, abs=0.001)


def test_results_of_other_protocols_or_without_their_model_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, ConditioningConfig())
    paths = [_evaluated(tmp_path, "a", model), _evaluated(tmp_path, "b", model, seed=1)]
    with pytest.raises(ConfigError, match="seed is 0 and 1"):
        quality.points(paths)
    with pytest.raises(CheckpointError, match="is not there"):
        quality.points([_evaluated(tmp_path, "c", tmp_path / "gone")])


def test_it_starts_by_its_path_and_refuses_in_one_line(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "pixel_vs_latent.py")]
    words = [*script, "--out", str(tmp_path), "--evaluations", "nowhere.json"]
    done = subprocess.run(words, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, "as a command of ldm-scale that lacks a file of data"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "nowhere.json: no such file" in errors[0]
    assert "Traceback" not in done.stderr


def test_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pixel_vs_latent.parse(["--rounds", "3"])
    assert ended.value.code == 2
    assert "at least 4" in capsys.readouterr().err


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert run_command(pixel_vs_latent.main, ["--out", str(tmp_path / "file")]) == 2
    assert f"error: --out {tmp_path / 'file'}: is no folder to write to" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert run_command(pixel_vs_latent.main, ["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: OMP_NUM_THREADS=many: must be a whole number")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_pinned_once_where_there_is_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []

    def noted(parts: Sequence[Batch], pin: bool = False) -> Batch:
        pinned.append(pin)
        return batch.join(parts)

    for module in (steps, train_step):
        monkeypatch.setattr(module, "join", noted)
    here = SimpleNamespace(device=torch.device(device), rank=0)
    config = SimpleNamespace(conditioning=SimpleNamespace(classes=None), data=SimpleNamespace(resolution=8))
    task: Any = SimpleNamespace(
        environment=here, config=config, plan=SimpleNamespace(micro_batch=2), latent_shape=(4, 8, 8)
    )
    pictures = steps.random_batch(task, 2, 16)
    assert pictures.images.is_contiguous(memory_format=torch.channels_last)
    assert train_step.random_batch(task).moments is not None
    assert pinned == [device == "cuda"] * 2


def test_a_table_has_no_figure_where_there_is_none() -> None:
    group = [BY_KEY["imagenet/LDM-1"], BY_KEY["imagenet/LDM-4"]]
    failed = {model.key: "does not fit into the device's memory" for model in group}
    found = costs.figures_of(group, {}, failed, SHORT, ("cpu", torch.float32))
    text = tables.markdown(found, SHORT, 10, environment(CPU, "2026-11-27"))
    assert re.search(r"\| LDM-4 \| 401\.4M \(6\.37M\) \| 208 \| - \| - \| 5\.70 \(", text)
    assert "Timed in 4 of the 10 rounds, each time 1 DDIM step(s)" in text
    full = SCALES["full"]
    text = tables.markdown(
        costs.figures_of(group, {}, failed, full, ("cpu", torch.float32)), full, 10, environment(CPU, "")
    )
    for name, micro_batch in (("LDM-1", 7), ("LDM-4", 28)):  # divisors of 112 that the paper's GPU held
        assert re.search(rf"\| {name} \|.*\| {micro_batch} \| - \| - \|", text)
    assert "- imagenet LDM-4: does not fit" in text
