"""Evaluation of a run's checkpoints: the command line's figures, whatever happens to the run; it learns the same."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.__main__ import main
from ldm_scale.config.schema import Config, EvaluationConfig
from ldm_scale.config.validate import validate
from ldm_scale.engine import env
from ldm_scale.errors import ConfigError, DataError, LdmScaleError, NumericsError, Restart
from ldm_scale.evaluate import _parser
from ldm_scale.operations import evaluate_diffusion
from ldm_scale.operations.evaluate_checkpoints import CheckpointEvaluator
from ldm_scale.operations.train import train
from tests.helpers.cases import rarely
from tests.helpers.ranks import run_ranks, started_ranks
from tests.helpers.resumptions import BATCH, Setting, config_of, left_by, logged
from tests.helpers.small_features import taken_for_evaluation

STEPS, EVERY = 3, 2  # of a run; between evaluations
MEASURED = (16, 24)
NUM_IMAGES = 7
METRIC = "evaluation/samples.kernel"


@pytest.fixture(scope="module", autouse=True)
def one_network() -> Iterator[None]:
    with taken_for_evaluation():
        yield


def run_of(stage: str, root: Path, name: str, zero: int = 0, ranks: int = 1, **train_keys: Any) -> Config:
    """A short run whose checkpoints are evaluated."""
    keys = {"total_images": STEPS * BATCH, "checkpoint_every_images": 0} | train_keys
    config = config_of(Setting(stage, zero, "fp32", ranks, 1, 0), root, name, **keys)
    evaluation = EvaluationConfig(every_images=EVERY * BATCH, num_images=NUM_IMAGES, batch=2)
    return dataclasses.replace(config, evaluation=evaluation)


def trained(config: Config, at: int = 0, event: Callable[[], None] | None = None) -> str:
    """How the run ended, in which something happens before the `at`-th batch of samples."""
    plain, batches = evaluate_diffusion.sample_images, 0

    def counted(*positional: Any, **named: Any) -> torch.Tensor:
        nonlocal batches
        batches += 1
        if event is not None and batches == at:
            event()
        return plain(*positional, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_diffusion, "sample_images", counted)
        try:
            ending = "finished" if train(config, env.read_launch()) else "stopped"
        except Restart:
            ending = "to be restarted"
        except LdmScaleError as error:
            ending = str(error)
    return f"{ending} after {batches}"


def scripted(config: Config, values: tuple[float, ...], known: float = 0.0) -> str:
    """As `trained`, of a run whose evaluations find these values; `known` is what was found before its start."""
    plain, left = CheckpointEvaluator.__call__, iter(values)

    def replaced(self: CheckpointEvaluator, checkpoint: Path, between: Callable[[], object]) -> dict[str, float]:
        found = plain(self, checkpoint, between)
        return found | {METRIC: known if between.__name__ == "end" else next(left)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointEvaluator, "__call__", replaced)
        return trained(config)


def results(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The documents of a run's evaluations by images."""
    paths = sorted((run_dir / "evaluations").glob("*/result.json"))
    documents = [json.loads(path.read_text()) for path in paths]
    return {int(document["model"]["images"]): document for document in documents}


def figures(run_dir: Path) -> dict[int, dict[str, float]]:
    """The evaluations' figures in metrics.jsonl, each once."""
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        named = {name: value for name, value in row.items() if name.startswith("evaluation/")}
        if named:
            assert row["images"] not in found, "told twice"
            found[row["images"]] = named
    return found


def offline(command: str) -> dict[str, Any]:
    """What the command of a record gives."""
    program, *words = shlex.split(command)
    assert program == "ldm-scale"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*words, "--json"]) == 0
    document: dict[str, Any] = json.loads(out.getvalue())
    return document


@pytest.mark.parametrize(
    ("stage", "zero", "ranks"), [rarely("diffusion", 3, 2), ("autoencoder", 1, 2), rarely("diffusion", 0, 1)]
)
def test_figures_are_those_of_the_command_line(stage: str, zero: int, ranks: int, tmp_path: Path) -> None:
    config = run_of(stage, tmp_path, "measured", zero, ranks)
    endings = run_ranks(trained, ranks, config)
    assert all(ending.startswith("finished") for ending in endings), endings
    documents = results(tmp_path / "measured")
    assert tuple(documents) == MEASURED
    told = figures(tmp_path / "measured")
    assert tuple(told) == MEASURED
    assert sorted(path.name for path in (tmp_path / "measured/evaluations").glob("*/parts")) == []
    for images in MEASURED:
        document = documents[images]
        assert document["protocol"]["data"]["num_images"] == NUM_IMAGES
        assert document["model"]["weights"] == "ema"
        assert told[images] == {f"evaluation/{record['figure']}": record["value"] for record in document["records"]}
    assert len({json.dumps(found) for found in told.values()}) == len(MEASURED), "other weights, other figures"

    (again,) = run_ranks(offline, 1, documents[16]["command"])
    assert again["model"]["content_sha256"] == documents[16]["model"]["content_sha256"]
    assert again["protocol"] == documents[16]["protocol"]
    assert again["figures"] == documents[16]["figures"]

    plain = dataclasses.replace(config, evaluation=EvaluationConfig(), run_dir=str(tmp_path / "plain"))
    run_ranks(trained, ranks, plain)
    assert left_by(tmp_path / "measured", 24)["files"] == left_by(tmp_path / "plain", 24)["files"]
    others = {name: value for name, value in logged(tmp_path / "measured")[24].items() if "evaluation/" not in name}
    assert others == logged(tmp_path / "plain")[24]


def test_a_command_line_means_what_is_measured(tmp_path: Path) -> None:
    sections = {
        "features": "inception_v3",
        "features_weights": "inception.pth",
        "weights": "raw",
        "seed": 3,
        "clip_model": "RN50",
        "clip_weights": "clip.pt",
        "split": "train",
    }
    for stage in ("autoencoder", "diffusion"):
        for given in ({}, sections):
            config = run_of(stage, tmp_path, stage)
            evaluation = dataclasses.replace(config.evaluation, **given)  # type: ignore[arg-type]
            config = dataclasses.replace(config, evaluation=evaluation)
            ours = vars(CheckpointEvaluator(config).arguments(tmp_path / "checkpoints" / "7"))
            program, group, *words = shlex.split(ours.pop("command"))
            assert (program, group) == ("ldm-scale", "evaluate")
            theirs = vars(_parser().parse_args(words))
            assert (theirs.pop("out"), theirs.pop("overwrite"), theirs.pop("run") is not None) == (None, False, True)
            assert (ours.pop("out"), ours.pop("overwrite")) == (tmp_path / stage / "evaluations" / "7", True)
            assert ours == theirs


def terminate() -> None:
    """The last rank is asked to stop."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    os._exit(9)


@pytest.mark.rest
def test_an_evaluation_goes_on_after_a_stop(tmp_path: Path) -> None:
    unbroken = run_of("diffusion", tmp_path, "unbroken", 1, 2, best_metric=METRIC, keep_checkpoints=1)
    # Four blocks of two ranks, twice.
    assert run_ranks(trained, 2, unbroken) == ["finished after 4"] * 2
    stopped = dataclasses.replace(unbroken, run_dir=str(tmp_path / "stopped"))
    assert run_ranks(trained, 2, stopped, 1, terminate) == ["stopped after 2", "stopped after 1"]
    assert results(tmp_path / "stopped") == {}
    assert len(list((tmp_path / "stopped/evaluations").glob("*/parts/*/*"))) == 3
    assert run_ranks(trained, 2, stopped) == ["finished after 3", "finished after 2"]

    # Both stand at the end, with all figures told once and the same best checkpoint.
    for name, document in results(tmp_path / "stopped").items():
        assert document["figures"] == results(tmp_path / "unbroken")[name]["figures"]
    assert figures(tmp_path / "stopped") == figures(tmp_path / "unbroken")
    named = [json.loads((tmp_path / run / "best.json").read_text()) for run in ("unbroken", "stopped")]
    assert named[0] == named[1]
    told = {images: found[METRIC] for images, found in figures(tmp_path / "unbroken").items()}
    assert named[0]["images"] == min(told, key=lambda images: told[images])
    assert named[0]["value"] == min(told.values())


@pytest.mark.rest
def test_a_run_that_was_killed_knows_its_evaluations(tmp_path: Path) -> None:
    config = run_of("diffusion", tmp_path, "killed", best_metric=METRIC)
    with started_ranks(trained, 1, tmp_path / "logs", config, 6, kill) as (rank,):
        assert rank.end() == 9
    told = figures(tmp_path / "killed")
    assert tuple(told) == (16,)
    # It begins at 24 images again, whose evaluation had one of four blocks.
    assert run_ranks(trained, 1, config) == ["finished after 3"]
    assert tuple(figures(tmp_path / "killed")) == MEASURED
    result = json.loads((tmp_path / "killed/result.json").read_text())
    told = figures(tmp_path / "killed")
    assert result["best"]["value"] == min(found[METRIC] for found in told.values())


@pytest.mark.rest
def test_results_of_another_run_are_not_taken(tmp_path: Path) -> None:
    config = run_of("diffusion", tmp_path, "run", total_images=16)
    assert run_ranks(trained, 1, config) == ["finished after 4"]
    before = results(tmp_path / "run")
    (tmp_path / "run" / "evaluations").rename(tmp_path / "kept")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "kept").rename(tmp_path / "run" / "evaluations")
    anew = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=2e-3))
    assert run_ranks(trained, 1, anew) == ["finished after 4"]
    assert results(tmp_path / "run")[16]["figures"] != before[16]["figures"]


def fail() -> None:
    raise NumericsError("the samples are not finite")


def exhaust() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")


def full() -> None:
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        rarely(fail, "the samples are not finite"),
        (exhaust, "2 images at once do not fit into the device's memory (CUDA out of memory. Tried to allocate 2 GiB)"),
        rarely(full, "No space left on device"),
    ],
)
def test_an_evaluation_that_fails_does_not_end_the_run(
    event: Callable[[], None], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_of("diffusion", tmp_path, "failed")
    assert run_ranks(trained, 1, config, 2, event) == ["finished after 6"]
    assert tuple(figures(tmp_path / "failed")) == (24,)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "evaluation at 16 images failed" in line]
    assert words in line
    assert "--" not in line


def test_the_run_ends_early_by_an_evaluation(tmp_path: Path) -> None:
    config = run_of("diffusion", tmp_path, "early", total_images=64, best_metric=METRIC, patience_images=1)
    assert run_ranks(scripted, 1, config, (2.0, 1.0, 1.5)) == ["finished after 12"]
    assert tuple(figures(tmp_path / "early")) == (16, 32, 48)
    result = json.loads((tmp_path / "early/result.json").read_text())
    assert (result["images"], result["best"]["images"]) == (48, 32)
    assert "has not been better than" in result["ended_early"]


@pytest.mark.rest
def test_what_the_last_evaluation_found_is_known_when_the_run_goes_on(tmp_path: Path) -> None:
    keys = {"best_metric": METRIC, "keep_checkpoints": 1, "total_images": 24, "best_is": "highest"}
    config = run_of("diffusion", tmp_path, "run", **keys)
    assert run_ranks(scripted, 1, config, (1.0, 3.0)) == ["finished after 8"]
    folder = tmp_path / "run"
    assert json.loads((folder / "best.json").read_text())["images"] == 24
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_images=40))
    # At 24 images nothing falls due any more; what was found there counts.
    assert run_ranks(scripted, 1, longer, (2.0, 2.5), 3.0) == ["finished after 8"]
    assert json.loads((folder / "best.json").read_text())["images"] == 24
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "images-0000000024",
        "images-0000000040",
    ]


@pytest.mark.rest
def test_a_run_that_ended_early_is_finished(tmp_path: Path) -> None:
    config = run_of("diffusion", tmp_path, "early", total_images=64, best_metric=METRIC, patience_images=1)
    assert run_ranks(scripted, 1, config, (2.0, 1.0, 1.5)) == ["finished after 12"]
    before = (tmp_path / "early/result.json").stat().st_mtime_ns
    assert run_ranks(scripted, 1, config, (), 1.5) == ["finished after 0"]
    assert (tmp_path / "early/result.json").stat().st_mtime_ns == before, "there was nothing left to do"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_images": 21}, ConfigError, "evaluation.num_images=21: "),
        ({"split": "none"}, DataError, "none"),
        ({"weights": "ema=0.1"}, ConfigError, "this run keeps raw, ema; set"),
        ({"features_weights": "nowhere.pth"}, ConfigError, "evaluation.features_weights=nowhere.pth"),
        ({"features": "inception_v3", "features_weights": "nowhere.pth"}, LdmScaleError, "nowhere.pth"),
        ({"clip_model": "RN50"}, ConfigError, "evaluation.clip_model=RN50"),
        ({}, ConfigError, "takes 33 images, and 7 are measured; set evaluation.num_images"),
        ({"manifest": "nowhere.json"}, DataError, "nowhere.json"),
    ],
)
def test_what_an_evaluation_needs_is_looked_for_first(
    change: dict[str, Any], error: type[LdmScaleError], words: str, tmp_path: Path
) -> None:
    config = run_of("diffusion", tmp_path, "run", best_metric="evaluation/frechet")
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **change))
    with pytest.raises(error) as refused:
        CheckpointEvaluator(config).check()
    assert words in str(refused.value)
    assert not re.search(r"--(?!help)", str(refused.value)), "words of the command line"
    assert not (tmp_path / "run").exists()


def test_rules_of_the_configuration(tmp_path: Path) -> None:
    config = run_of("diffusion", tmp_path, "run", best_metric=METRIC, validate_every_images=0)
    validate(config, world_size=1)
    never = dataclasses.replace(config, evaluation=EvaluationConfig())
    with pytest.raises(ConfigError, match=r"evaluation\.every_images=0 asks for none"):
        validate(never, world_size=1)
