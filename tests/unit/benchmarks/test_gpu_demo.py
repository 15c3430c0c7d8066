"""The GPU demonstration without a GPU: its calls continue one another, and its results are small and whole."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_demo import __main__ as command
from benchmarks.gpu_demo import stages as training
from benchmarks.gpu_demo import weights
from benchmarks.gpu_demo.stages import Plan, Planned, Stage
from ldm_scale.__main__ import run_command
from ldm_scale.conditioning.base import Conditions
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.compose import load_config
from ldm_scale.errors import CheckpointError, LdmScaleError, NumericsError
from ldm_scale.interchange.artifact import DiffusionArtifact, read_diffusion_artifact
from ldm_scale.interchange.load import LoadedDiffusion, load_diffusion
from ldm_scale.interchange.publish import publish
from ldm_scale.models.build import build_autoencoder
from ldm_scale.train import main as train_main
from tests.helpers.commands import stage1, stage2
from tests.helpers.models import tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import CONDITIONING
from tests.helpers.shards import make_dataset

BATCH = 8


def _stage(name: str, overrides: Sequence[str], slowdown: float = 1.0) -> Stage:
    return Stage(name, load_config(overrides), tuple(overrides), slowdown)


def _stages(folder: Path, out: Path) -> list[Stage]:
    first, second = out / "autoencoder", out / "text"
    return [
        _stage("autoencoder", stage1(folder, first, "data.num_workers=0")),
        _stage("text", stage2(folder, second, "data.num_workers=0", f"artifact={first / 'artifact'}")),
    ]


class Pretended:
    """Trainings that only write what real ones would: a row each time, ten images a second."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.stopped: set[int] = set()  # numbers of calls that the time ends

    def __call__(self, overrides: Sequence[str], until_s: float, enough: Callable[[], bool]) -> None:
        self.calls.append(list(overrides))
        config = load_config(overrides)
        run_dir, total = Path(config.run_dir), config.train.total_images
        run_dir.mkdir(parents=True, exist_ok=True)
        path, start = run_dir / "metrics.jsonl", time.time() + 1
        done = json.loads(path.read_text().splitlines()[-1])["images"] if path.exists() else 0
        for images in range(done + BATCH, total + 1, BATCH):
            with path.open("a") as file:
                print(json.dumps({"images": images, "time": start + images / 10, "lr": 0.1}), file=file)
            if enough() or len(self.calls) - 1 in self.stopped:
                return
        (run_dir / "result.json").write_text(json.dumps({"images": total}))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROW_STEPS", 1)
    monkeypatch.setattr(training, "MEASURED_ROWS", 4)


@pytest.mark.usefixtures("quick")
def test_what_the_time_ends_the_next_call_goes_on_with(tmp_path: Path) -> None:
    stages, launch, plan_path = _stages(tmp_path, tmp_path), Pretended(), tmp_path / "plan.json"
    launch.stopped = {1}

    def call(seconds: float = 1000.0) -> bool:
        now = time.time()
        return training.train(stages, plan_path, 100.0, now, now + seconds, launch)

    assert not call(), "the first stage's training was stopped"
    assert len(launch.calls) == 2, "one to measure, one to train"
    plan = Plan.read(plan_path, 0.0)
    # 5 rows while measured; half of the 100 s at 10 images/s but for another start, of which a share goes into steps.
    start_s = plan.stages["autoencoder"].start_s
    wanted = 5 * BATCH + 10 * (50 - start_s) * training.MARGIN
    assert plan.stages["autoencoder"].images_per_s == pytest.approx(10, rel=0.01)
    assert 1 < start_s < 20, "the first row says that it was written more than a second after the start"
    assert plan.stages["autoencoder"].total_images == pytest.approx(wanted, abs=5 * BATCH)
    assert plan.stages["autoencoder"].total_images % BATCH == 0
    assert call()
    assert len(launch.calls) == 5, "no speed is measured twice"
    assert launch.calls[2] == launch.calls[1], "the same command continues"
    later = Plan.read(plan_path, 0.0)
    assert later.stages["autoencoder"] == plan.stages["autoencoder"]
    assert later.stages["text"].seconds == pytest.approx(100.0, abs=20), "what is left, to the last stage alone"
    assert later.used_s > plan.used_s
    assert call()
    assert len(launch.calls) == 5


@pytest.mark.usefixtures("quick")
def test_no_training_begins_with_less_than_a_minute(tmp_path: Path) -> None:
    stages, launch, now = _stages(tmp_path, tmp_path), Pretended(), time.time()
    assert not training.train(stages, tmp_path / "plan.json", 100.0, now, now + training.STOP_S + 50, launch)
    assert launch.calls == []


@pytest.mark.usefixtures("quick")
def test_a_failed_training_leaves_the_time_that_it_took(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise LdmScaleError("it has told why")

    begin_s = time.time() - 30
    with pytest.raises(LdmScaleError, match="told why"):
        training.train(_stages(tmp_path, tmp_path), tmp_path / "plan.json", 100.0, begin_s, begin_s + 1000, fail)
    assert Plan.read(tmp_path / "plan.json", 0.0).used_s == pytest.approx(30, abs=5)


def test_planned_images_are_whole_steps_beyond_the_warm_up(tmp_path: Path) -> None:
    stage = _stage("text", [*stage2(tmp_path, tmp_path / "run"), "optimizer.warmup_images=80"], slowdown=2.0)
    assert training.total_images(stage, 10.0, 0.0) == 88
    assert training.total_images(stage, 10.0, 1000.0) == int(10 * 1000 * training.MARGIN / 2) // BATCH * BATCH


def test_what_happens_at_image_counts_keeps_its_place() -> None:
    config = load_config(["experiment=gpu_demo_autoencoder"])
    half = load_config(["experiment=gpu_demo_autoencoder", *training.scaled(config, config.train.total_images // 2)])
    loss, halved = config.autoencoder_loss, half.autoencoder_loss
    assert half.train.total_images == config.train.total_images // 2
    assert halved.discriminator_start_images == loss.discriminator_start_images // 2
    assert halved.adversarial_ramp_images == loss.adversarial_ramp_images // 2
    assert half.train.validate_every_images == half.train.total_images // training.EVENTS


SCRIPT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, {handler})
Path(sys.argv[1]).write_text("listening")
while True: time.sleep(0.05)
"""


@pytest.mark.parametrize(("handler", "status"), [("lambda *_: sys.exit(0)", 0), ("signal.SIG_IGN", -signal.SIGKILL)])
def test_a_process_is_asked_to_stop_and_then_made_to(
    handler: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KILL_S", 1.0)
    mark = tmp_path / "mark"
    source = [sys.executable, "-c", SCRIPT.format(handler=handler), str(mark)]
    assert training.supervise(source, time.time() + 60, mark.exists) == (status, True)


def test_a_process_that_ends_by_itself_was_not_asked() -> None:
    assert training.supervise([sys.executable, "-c", "exit(3)"], time.time() + 60, lambda: False) == (3, False)


def _train_here(overrides: list[str], rows: int | None) -> None:
    """Trains in this process, which is a forked one; with `rows`, SIGTERM comes once as many metrics are there."""
    metrics, ended = Path(load_config(overrides).run_dir) / "metrics.jsonl", threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            if metrics.exists() and len(metrics.read_text().splitlines()) >= (rows or 0):
                os.kill(os.getpid(), signal.SIGTERM)

    # Outside the training loop, which has a handler of its own, the signal says nothing.
    signal.signal(signal.SIGTERM, lambda *_: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    watcher = threading.Thread(target=watch, daemon=True)
    if rows is not None:
        watcher.start()
    train_main(overrides)
    ended.set()


@pytest.mark.rest
@pytest.mark.usefixtures("quick")
@pytest.mark.timeout(240)
def test_two_calls_end_with_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "data", num_samples=16, samples_per_shard=16, resolution=20)
    out = tmp_path / "out"
    stages, launches = _stages(tmp_path, out), []

    def launch(overrides: Sequence[str], until_s: float, enough: Callable[[], bool]) -> None:
        launches.append(overrides)
        measuring = any("log_every_images" in override for override in overrides)
        run_ranks(_train_here, 1, list(overrides), training.MEASURED_ROWS + 1 if measuring else None)

    def ending(patch: pytest.MonkeyPatch) -> training.Launch:
        def last(overrides: Sequence[str], until_s: float, enough: Callable[[], bool]) -> None:
            launch(overrides, until_s, enough)
            if len(launches) == 2:  # the first stage has ended, and so has the time
                patch.setattr(training, "LEAST_S", 1e6)

        return last

    training.require_inputs(stages)
    monkeypatch.setattr(weights, "SHARD_BYTES", 2_000_000)  # the vocabulary's embedding has 1.6 MB
    # Nothing of the time is left when a speed is known, so one more step is made.
    with monkeypatch.context() as patch:
        assert command.demonstrate(stages, out, 600.0, 0.0, ending(patch)) == 0
    assert len(launches) == 2
    assert "no results yet" in capsys.readouterr().out
    assert command.demonstrate(stages, out, 600.0, 0.0, launch) == 0
    assert len(launches) == 4
    results = out / "results"
    files = {str(path.relative_to(results)): path for path in results.rglob("*") if path.is_file()}
    assert {"grid.png", "curves.png", "report.json", "report.md", "model/weights.safetensors.index.json"} < set(files)
    assert all(0 < path.stat().st_size < weights.MAX_FILE_BYTES for path in files.values())
    report = json.loads(files["report.json"].read_text())
    assert report["finished"]
    assert report["psnr_db"]["heldout"] > 0
    assert len(report["losses"]["ema"]) == len(report["losses"]["log_snr"])
    assert report["stages"]["text"]["images"] == report["stages"]["text"]["planned_images"] == stages[1].images
    assert report["model"]["weights"] == "ema"
    assert "| log-SNR | raw | ema | zero | linear |" in files["report.md"].read_text()
    assert load_diffusion(results / "model").content_hash == report["model"]["content_sha256"]


def test_weights_in_halves_and_several_files_are_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = read_diffusion_artifact(tiny_model(tmp_path, CONDITIONING))
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_600_000)
    folder = tmp_path / "halves"
    for _ in range(2):  # the second replaces the first
        weights.write(folder, weights.rounded(original))
    shards = sorted(folder.glob("weights-*.safetensors"))
    assert len(shards) > 1
    assert sum(path.stat().st_size for path in shards) < 0.51 * (tmp_path / "model/weights.safetensors").stat().st_size
    halves, whole = load_diffusion(folder), LoadedDiffusion(original)
    assert halves.network.unet.conv_in.weight.dtype == torch.float32
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(halves.network.state_dict()[name], value, rtol=2**-11, atol=2**-25)
    y = Conditions(captions=["a"])
    torch.testing.assert_close(halves.sample(y, [0]), whole.sample(y, [0]), rtol=0, atol=0.02)
    again = publish(read_diffusion_artifact(folder), "safetensors", tmp_path / "again")
    assert again.content_hash == halves.content_hash, "the same model in other files"

    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=shards[-1].name):
        load_diffusion(folder)


def test_an_index_without_a_place_for_each_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "halves"
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_600_000)
    weights.write(folder, weights.rounded(read_diffusion_artifact(tiny_model(tmp_path, CONDITIONING))))
    index = folder / "weights.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    other = next(file for file in content["weight_map"].values() if file != content["weight_map"][first])
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {first: other}}))
    with pytest.raises(CheckpointError, match=r"lacks it"):
        load_diffusion(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_diffusion(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = read_diffusion_artifact(tiny_model(tmp_path, CONDITIONING))
    monkeypatch.setattr(weights, "SHARD_BYTES", 1_000_000)
    with pytest.raises(CheckpointError, match=r"embedding.* has 1\.6 MB"):
        weights.write(tmp_path / "halves", weights.rounded(original))
    assert not (tmp_path / "halves").exists()
    name = "unet.conv_in.bias"
    beyond = DiffusionArtifact(original.content, original.state | {name: torch.full((1,), 1e6)}, original.autoencoder)
    with pytest.raises(NumericsError, match=name):
        weights.rounded(beyond)


def test_the_experiments_weights_fit_into_files(tmp_path: Path) -> None:
    first, second = (stage.config for stage in command.default_stages(tmp_path, "cpu"))
    with torch.device("meta"):
        networks = [build_autoencoder(first.autoencoder)]
        networks.append(LatentDiffusion(second.unet, second.conditioning, second.autoencoder.latent_channels))
    assert dataclasses.asdict(first.autoencoder) == dataclasses.asdict(second.autoencoder)
    sizes = {name: 2 * x.numel() for network in networks for name, x in network.state_dict().items()}
    assert max(sizes.values()) < weights.SHARD_BYTES, max(sizes, key=lambda name: sizes[name])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--device", "cuda"], 2, "CUDA device"),
        (["--device", "cpu"], 3, "ldm-scale prepare openmoji --resolution 160 --subset no-skin-tones --out data/"),
    ],
)
def test_what_is_missing_is_told_in_a_line(
    arguments: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capfd.readouterr()
    assert run_command(command.main, [*arguments, "--out", str(tmp_path / "out")]) == status
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_the_plan_is_kept(tmp_path: Path) -> None:
    plan = Plan(840.0, 12.5, {"text": Planned(100.0, 20.0, 300.0, 25_600)})
    plan.write(tmp_path / "new" / "plan.json")
    assert Plan.read(tmp_path / "new" / "plan.json", 1.0) == plan
