"""Nothing that a data set, a checkpoint, a configuration or a name contains is ever run, by the interpreter or a shell.

Canaries stand in all of them. Forks with an audit hook prepare, train, resume and export, and write down every
program that is started and every name that a pickle looks up.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_scale.__main__ import main
from tests.helpers.commands import stage2
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_sample, write_tar


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self._path}",))


@dataclass
class _Outcome:
    """Of a command: its status, what it said, and what was started or looked up that it should not have."""

    status: int
    stderr: str
    strange: list[tuple[str, str]]
    num_lookups: int


def _audited(folder: Path, *arguments: str) -> _Outcome:
    ((status, stderr, seen),) = run_ranks(_watched, 1, folder, arguments)
    strange = [(event, f"{what} by {files[-3:]}") for event, what, files in seen if not _is_known(event, what, files)]
    num_lookups = sum(event == "pickle.find_class" for event, *_ in seen)
    return _Outcome(status, stderr, strange, num_lookups)


def _watched(folder: Path, arguments: tuple[str, ...]) -> tuple[int, str, list[tuple[str, str, list[str]]]]:
    """Status and stderr of the command, and what it started or looked up, with the files that did. In a fork."""
    seen: list[tuple[str, str, list[str]]] = []

    def watch(event: str, values: tuple[object, ...]) -> None:
        started = event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")
        if started or event == "pickle.find_class":
            seen.append((event, repr(values), [frame.filename for frame in traceback.extract_stack()]))

    os.chdir(folder)
    sys.addaudithook(watch)
    with tempfile.TemporaryFile("w+") as errors:
        os.dup2(errors.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        status = main(list(arguments))
        sys.stderr.flush()
        errors.seek(0)
        return status, errors.read(), seen


def _is_known(event: str, what: str, files: list[str]) -> bool:
    """Whether it is of libraries that look for CUDA and a compiler, or tensors on their way from a loader process."""
    if event == "pickle.find_class":
        return any(file.endswith(("multiprocessing/queues.py", "multiprocessing/connection.py")) for file in files)
    if "'gcc'" in what:
        return any("/deepspeed/ops/" in file for file in files) and "ldm_scale" not in what
    return "'/sbin/ldconfig'" in what and any("cuda/pathfinder" in file for file in files)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose captions, names and members would all touch a file named canary-*, if anything ran them."""
    path = tmp_path_factory.mktemp("hostile")
    os_call = f"__import__('os').system('touch {path}/canary-eval')"
    yaml = f"!!python/object/apply:os.system ['touch {path}/canary-yaml']"
    texts = (f"$(touch {path}/canary-sh)", f"`touch {path}/canary-tick`", "${oc.env:HOME}", os_call, yaml)
    samples = []
    for number in range(16):
        members = make_sample(number, 20, np.random.default_rng(number))
        members["txt"] = texts[number % 5].encode()
        if number == 3:  # costs this sample: the index refuses it
            members |= {kind: pickle.dumps(_Canary(path / f"canary-{kind}")) for kind in ("pkl", "pyd", "pth")}
        samples.append((f"a;touch canary-name{number}", members))
    (path / "data").mkdir()
    write_tar(path / "data" / "shard-$(touch canary-shard).tar", samples)
    tiny_artifact(path / "artifact")
    return path


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[_Outcome]:
    """Of an index, a training, its continuation and an export."""
    run = folder / "run;touch canary-run"
    manifest = folder / "data" / "manifest.json"
    return [
        _audited(folder, "prepare", "index", str(folder / "data" / "*.tar"), "--out", str(manifest)),
        _audited(folder, "train", *stage2(folder, run, "train.total_images=16", "data.num_workers=1")),
        _audited(folder, "train", *stage2(folder, run, "train.total_images=24", "data.num_workers=1")),
        _audited(folder, "export", str(run), "--to", "safetensors", "--out", str(folder / "out")),
    ]


def test_no_content_is_run(folder: Path, outcomes: list[_Outcome]) -> None:
    assert [outcome.status for outcome in outcomes] == [0, 0, 0, 0], "".join(outcome.stderr for outcome in outcomes)
    assert [outcome.strange for outcome in outcomes] == [[], [], [], []]
    assert not [path for path in folder.rglob("canary-*") if "shard" not in path.name]
    assert outcomes[1].num_lookups > 0  # the hook sees what it is there for


def test_no_pickle_in_place_of_ours_is_read(folder: Path, outcomes: list[_Outcome]) -> None:
    canary = pickle.dumps(_Canary(folder / "canary-pickle"))
    copy = folder / "copy"
    shutil.copytree(folder / "artifact", copy / "artifact")
    shutil.copytree(folder / "data", copy / "data")
    shutil.copytree(folder / "run;touch canary-run", copy / "run")
    for checkpoint in (copy / "run" / "checkpoints").glob("images-*"):
        for file in checkpoint.iterdir():
            file.write_bytes(canary)
    tried = [_audited(copy, "train", *stage2(copy, copy / "run"))]
    for file in (next((copy / "artifact").glob("*.safetensors")), copy / "data" / "manifest.json"):
        file.write_bytes(canary)
        tried.append(_audited(copy, "train", *stage2(copy, copy / "another")))
    assert [outcome.status > 0 for outcome in tried] == [True] * 3
    assert [outcome.strange for outcome in tried] == [[]] * 3
    assert not (folder / "canary-pickle").exists()
    assert "Traceback" not in "".join(outcome.stderr for outcome in tried)


@pytest.mark.parametrize(
    "override",
    [
        "+unet._target_=os.system",
        "unet._target_=os.system",
        "data.manifest='pipe:touch canary-pipe'",
        "data.manifest='pipe:touch canary-pipe |.tar'",
        "run_dir=${oc.env:HOME}",
    ],
)
def test_a_configuration_starts_nothing(folder: Path, override: str) -> None:
    outcome = _audited(folder, "train", *stage2(folder, folder / "run"), override)
    assert outcome.status > 0
    assert outcome.strange == []
    assert not list(folder.rglob("canary-pipe*"))
