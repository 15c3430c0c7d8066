"""The training command as people and launchers start it: it stops on request, continues, and finishes once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import ldm_scale
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import read_manifest
from ldm_scale.engine.run_lock import LOCK
from ldm_scale.train import main
from tests.helpers.commands import TOTAL_IMAGES, stage1, stage2
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset

ROOT = Path(ldm_scale.__file__).parents[1]
BIN = Path(sys.executable).parent
# Plain python takes all cores; on a busy machine several threads in a tiny network only wait for each other.
ON_ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.execv(sys.argv[1], sys.argv[1:])"
)
PYTHON = [sys.executable, "-c", ON_ONE_CORE, sys.executable]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train")
    make_dataset(path / "data", num_samples=16, samples_per_shard=16, resolution=20)
    tiny_artifact(path / "artifact")
    return path


class Process:
    """A training in processes of its own; its output is kept in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for_progress(self, run_dir: Path) -> None:
        """Returns when the run has written a checkpoint that was not there before."""
        before = latest_checkpoint(run_dir / "checkpoints")
        deadline = time.monotonic() + 90
        while latest_checkpoint(run_dir / "checkpoints") == before:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def wait(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end:\n{self.output}") from None


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Where tests put what they start; the end of the test is the end of it, too."""
    started: list[Process] = []
    yield started
    for item in started:
        if item.process.poll() is None:
            os.killpg(item.process.pid, signal.SIGKILL)


def _images(run_dir: Path) -> int:
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    return int(read_manifest(path)["state"]["cur_images"])


def _start(processes: list[Process], log: Path, *command: str) -> Process:
    processes.append(Process([*PYTHON, *command], log))
    return processes[-1]


@pytest.mark.timeout(400)
def test_stops_on_a_signal_and_continues_where_it_stopped(
    folder: Path, tmp_path: Path, processes: list[Process]
) -> None:
    run_dir = tmp_path / "run"
    first = _start(processes, tmp_path / "first.log", "ldm_scale/train.py", *stage1(folder, run_dir))
    stopped = _stop(first, run_dir, signal.SIGTERM)  # as schedulers do: the loader's worker gets it as well
    assert not (run_dir / "result.json").exists()

    second = _start(processes, tmp_path / "second.log", "-m", "ldm_scale", "train", *stage1(folder, run_dir))
    assert second.wait() == 0, second.output
    assert f"continuing at {stopped} images" in second.output
    _require_finished(run_dir)
    assert "Traceback" not in first.output + second.output


def _stop(run: Process, run_dir: Path, number: signal.Signals) -> int:
    """At how many images the run has stopped, once it had got anywhere and its processes got the signal."""
    run.wait_for_progress(run_dir)
    os.killpg(run.process.pid, number)
    assert run.wait() == 0, run.output
    stopped = _images(run_dir)
    assert 0 < stopped < TOTAL_IMAGES
    assert f"stopped by {number.name} at {stopped} images" in run.output
    return stopped


def _require_finished(run_dir: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["images"], result["steps"]) == (TOTAL_IMAGES, TOTAL_IMAGES // 8)
    rows = [json.loads(line)["images"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(rows), "a continued run's rows overlap those before it"


@pytest.mark.rest
@pytest.mark.timeout(400)
def test_ctrl_c_stops_it_and_another_batch_does_not_continue_it(
    folder: Path, tmp_path: Path, processes: list[Process]
) -> None:
    run_dir = tmp_path / "run"
    first = _start(processes, tmp_path / "first.log", "-m", "ldm_scale", "train", *stage1(folder, run_dir))
    stopped = _stop(first, run_dir, signal.SIGINT)  # as a terminal does for Ctrl-C

    other = stage1(folder, run_dir, "train.global_batch=16")
    other_batch = _start(processes, tmp_path / "batch.log", "ldm_scale/train.py", *other)
    assert other_batch.wait() == 2, other_batch.output
    *_, last = other_batch.output.splitlines()
    assert last.startswith("error: ")
    assert "train.global_batch: 8 saved, 16 given" in last
    assert "Traceback" not in other_batch.output
    assert _images(run_dir) == stopped

    second = _start(processes, tmp_path / "second.log", "ldm_scale/train.py", *stage1(folder, run_dir))
    assert second.wait() == 0, second.output
    assert f"continuing at {stopped} images" in second.output
    _require_finished(run_dir)
    assert "Traceback" not in first.output + second.output


@pytest.mark.rest
@pytest.mark.timeout(300)
def test_launchers_stop_together_and_take_over_from_each_other(
    folder: Path, tmp_path: Path, processes: list[Process]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["ldm_scale/train.py", *stage2(folder, run_dir, "zero.stage=2")]

    torchrun = Process([str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", *arguments], tmp_path / "t.log")
    processes.append(torchrun)
    torchrun.wait_for_progress(run_dir)
    ranks = psutil.Process(torchrun.process.pid).children()
    (rank1,) = [child for child in ranks if child.environ().get("RANK") == "1"]
    rank1.send_signal(signal.SIGTERM)  # the other rank must stop after the same step
    assert torchrun.wait() == 0, torchrun.output
    stopped = _images(run_dir)
    assert 0 < stopped < TOTAL_IMAGES
    assert "2 rank(s) on cpu (gloo), float32, activations in channels_last; ZeRO stage 2" in torchrun.output
    assert f"stopped by another rank at {stopped} images" in torchrun.output

    total = stopped + 16
    launcher = [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]
    deepspeed = Process([*launcher, *arguments, f"train.total_images={total}"], tmp_path / "d.log")
    processes.append(deepspeed)
    assert deepspeed.wait() == 0, deepspeed.output
    assert f"continuing at {stopped} images" in deepspeed.output
    assert json.loads((run_dir / "result.json").read_text())["images"] == total
    assert "Traceback" not in torchrun.output + deepspeed.output


def test_a_finished_run_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    # On two ranks the latent statistics come out a little different, and stage 2 knows the artifact by its hash.
    run_dir = tmp_path / "run"
    arguments = stage1(folder, run_dir, "train.total_images=16")
    assert run_ranks(main, 1, arguments) == [0]

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != LOCK}

    before = contents()
    assert run_ranks(main, 2, arguments) == [0, 0]
    # A total that its last step exceeds is this one too; one that it would have ended before is not.
    shorter = [*arguments, "optimizer.warmup_images=0"]
    assert run_ranks(main, 2, [*shorter, "train.total_images=9"]) == [0, 0]
    with pytest.raises(AssertionError) as refused:
        run_ranks(main, 2, [*shorter, "train.total_images=8"])
    assert str(refused.value).count("ConfigError: train.total_images=8: the run in") == 2
    assert contents() == before
    (run_dir / "result.json").write_text("null")
    assert run_ranks(main, 1, arguments) == [0]
    assert json.loads((run_dir / "result.json").read_text())["images"] == 16
