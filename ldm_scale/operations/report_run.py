"""What a run directory holds, read piece by piece: whatever is missing or damaged costs itself alone, and is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_scale.engine.hangs import FOLDER as HANGS
from ldm_scale.engine.hangs import VERDICT
from ldm_scale.engine.rank_files import has_own_name, images_of, read_manifest
from ldm_scale.engine.verification import DAMAGED
from ldm_scale.errors import CheckpointError, ConfigError, DataError
from ldm_scale.evaluation.results import RESULT_FILE, Result, read_result
from ldm_scale.telemetry.events import RunEvents, read_events
from ldm_scale.telemetry.side_files import read_record, read_rows
from ldm_scale.telemetry.tensorboard import METRICS_FILE, TENSORBOARD_FOLDER
from ldm_scale.training.account import ATTEMPTS
from ldm_scale.training.skipping import SKIPPED_STEPS

ALIVE_S = 900.0  # without a figure, after which a run without an end counts as dead
_MAX_FOUND_RESULTS = 20


@dataclass(frozen=True)
class Attempt:
    """One start of the run, from its beginning to its end or its last sign of life."""

    start: dict[str, Any]
    end_s: float
    images: int  # seen at the end, as far as known
    reason: str  # why it ended; "" where nobody has written it down

    @property
    def seconds(self) -> float:
        """That it lasted at least."""
        return max(0.0, self.end_s - float(self.start["time"]))

    @property
    def device_hours(self) -> float:
        """Hours of all ranks together."""
        return self.seconds * int(self.start["ranks"]) / 3600


@dataclass(frozen=True)
class Checkpoint:
    """A folder of the run's checkpoints."""

    name: str
    images: int | None  # None of a damaged one that was set aside
    num_bytes: int
    trouble: str = ""


@dataclass
class RunFolder:
    """Everything that could be read, and in `missing` what could not, in words."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)  # of the newest checkpoint that can be read
    result: dict[str, Any] | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    events: RunEvents = field(default_factory=RunEvents)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    hangs: list[tuple[str, str]] = field(default_factory=list)  # when, and the verdict
    results: list[Result] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Seen so far, as far as anything says."""
        known = [int(row["images"]) for row in self.rows[-1:]]
        known += [checkpoint.images for checkpoint in self.checkpoints if checkpoint.images is not None]
        known += [attempt.images for attempt in self.attempts]
        return max(known, default=0) if self.result is None else int(self.result["images"])

    @property
    def total_images(self) -> int | None:
        """That the run is to see; None where its configuration is not known."""
        return self.config.get("train", {}).get("total_images")  # type: ignore[no-any-return]

    @property
    def status(self) -> str:
        """In a word: finished, running, stopped, failed or dead."""
        if self.result is not None:
            return "finished"
        if not self.attempts:
            return "unknown"
        last = self.attempts[-1]
        if not last.reason:
            return "running" if time.time() - last.end_s < ALIVE_S else "dead"
        return last.reason if last.reason in ("finished", "stopped") else "failed"


def read_run(path: Path, results: Sequence[Path] = ()) -> RunFolder:
    """What the folder holds; `results` are evaluations that lie elsewhere.

    Raises: ConfigError if it is no folder of a run; DataError if one of `results` cannot be read.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder; give the run_dir of a run")
    run = RunFolder(path)
    run.rows = _rows(run, METRICS_FILE, lambda row: int(row["images"]), is_expected=True)
    starts = _rows(run, ATTEMPTS, _check_attempt, is_expected=True)
    run.attempts = _attempts(starts, [float(row["time"]) for row in run.rows if "time" in row], run.rows)
    _read_checkpoints(run)
    run.result = read_record(path / RESULT_FILE, lambda record: record if int(record["images"]) >= 0 else None)
    if run.result is None and (path / RESULT_FILE).exists():
        run.missing.append(f"{RESULT_FILE} is damaged")
    run.config = run.attempts[-1].start["config"] if run.attempts else run.config
    if not (run.rows or run.attempts or run.checkpoints or run.result or (path / TENSORBOARD_FOLDER).is_dir()):
        raise ConfigError(
            f"{path} holds nothing that a run leaves ({METRICS_FILE}, {ATTEMPTS}, checkpoints, {TENSORBOARD_FOLDER}); "
            "give the run_dir of a run"
        )
    if not run.config:
        run.missing.append(f"the configuration: neither {ATTEMPTS} nor a checkpoint that can be read has it")
    _read_events(run)
    run.skipped = _rows(run, SKIPPED_STEPS, lambda row: row["images"][0], is_expected=False)
    for verdict in sorted((path / HANGS).glob(f"*/{VERDICT}")):
        run.hangs.append((verdict.parent.name, verdict.read_text(encoding="utf-8", errors="replace").strip()))
    _read_results(run, results)
    return run


def _rows(
    run: RunFolder, name: str, check: Callable[[dict[str, Any]], object], *, is_expected: bool
) -> list[dict[str, Any]]:
    """The rows of a file; what is damaged or missing of it is noted."""
    path = run.path / name
    try:
        rows = read_rows(path, check)
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
    except OSError as error:
        run.missing.append(f"{name} cannot be read ({error.strerror or error})")
        return []
    if lines > len(rows):
        run.missing.append(f"{name}: {lines - len(rows)} of its {lines} lines are damaged and left out")
    if is_expected and not path.exists():
        run.missing.append(f"{name} is not there")
    return rows


def _check_attempt(row: dict[str, Any]) -> None:
    """Nothing; KeyError, TypeError or ValueError where a row lacks what is looked for."""
    float(row["time"]), int(row["images"])
    if row["event"] == "start":
        if not isinstance(row["config"], dict) or not isinstance(row["versions"], dict) or int(row["ranks"]) < 1:
            raise TypeError("start")
    elif row["event"] == "end":
        str(row["reason"])


def _attempts(
    rows: Sequence[dict[str, Any]], times: Sequence[float], metrics: Sequence[dict[str, Any]]
) -> list[Attempt]:
    """The starts with their ends. One that was killed ended after its last figure, before the next start."""
    attempts = []
    for number, row in enumerate(rows):
        if row["event"] != "start":
            continue
        following = rows[number + 1] if number + 1 < len(rows) else None
        if following is not None and following["event"] == "end":
            attempts.append(Attempt(row, float(following["time"]), int(following["images"]), str(following["reason"])))
            continue
        begin, limit = float(row["time"]), float(following["time"]) if following is not None else float("inf")
        own = [i for i, at_s in enumerate(times) if begin <= at_s <= limit]
        end_s, images = (times[own[-1]], int(metrics[own[-1]]["images"])) if own else (begin, int(row["images"]))
        reason = "killed, or ended without notice; its figures go that far" if following is not None else ""
        attempts.append(Attempt(row, end_s, images, reason))
    return attempts


def _read_checkpoints(run: RunFolder) -> None:
    root = run.path / "checkpoints"
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
    for folder in folders:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        if folder.name.startswith(DAMAGED):
            run.checkpoints.append(Checkpoint(folder.name, None, size, "was found damaged and set aside"))
        elif has_own_name(folder):
            try:
                manifest = read_manifest(folder)
            except (CheckpointError, OSError) as error:
                run.checkpoints.append(Checkpoint(folder.name, None, size, str(error)))
                run.missing.append(f"checkpoint {folder.name}: {error}")
                continue
            run.checkpoints.append(Checkpoint(folder.name, images_of(folder), size))
            config, state = manifest.get("config"), manifest.get("state")
            run.config = config if isinstance(config, dict) else run.config
            run.state = state if isinstance(state, dict) else run.state


def _read_events(run: RunFolder) -> None:
    try:
        run.events = read_events(run.path)
    except OSError as error:
        run.missing.append(f"{TENSORBOARD_FOLDER} cannot be read ({error.strerror or error})")
        return
    run.missing += run.events.damage
    if not run.events.pictures:
        run.missing.append(f"pictures: {TENSORBOARD_FOLDER} has none (yet)")


def _read_results(run: RunFolder, given: Sequence[Path]) -> None:
    """Evaluations that are given, which must be readable, and those within the run's folder."""
    run.results = [read_result(path) for path in given]
    known = {Path(result.source).resolve() for result in run.results}
    found = sorted(path for depth in ("*", "*/*", "*/*/*") for path in run.path.glob(f"{depth}/{RESULT_FILE}"))
    num_found = len(found)
    found = found[-_MAX_FOUND_RESULTS:]  # the newest of a run's own, which are named by images
    for path in found:
        if path.resolve() in known:
            continue
        try:
            run.results.append(read_result(path))
        except DataError as error:
            run.missing.append(f"an evaluation: {error}")
    if num_found > _MAX_FOUND_RESULTS:
        run.missing.append(f"{num_found - _MAX_FOUND_RESULTS} older evaluations; name those to show with --results")


def series(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float | None]]]:
    """Every figure of metrics.jsonl over the images seen, by its name; what is no number is left out."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("images", "time") and (value is None or isinstance(value, int | float)):
                found.setdefault(name, []).append((float(row["images"]), None if value is None else float(value)))
    return found


def plain(value: object) -> str:
    """A value of a configuration or a record for people: JSON, and texts as they are."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
