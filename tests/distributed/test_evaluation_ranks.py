"""`ldm-scale evaluate` on several ranks: the figures of one, whatever was measured before; mistakes told once."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from ldm_scale.__main__ import main
from ldm_scale.config.schema import ConditioningConfig, LayoutConditioningConfig
from ldm_scale.data import open_manifest
from ldm_scale.operations import evaluate_diffusion
from tests.helpers.cases import rarely
from tests.helpers.models import SIDE, tiny_model
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import TEXT
from tests.helpers.scenes import make_squares
from tests.helpers.small_features import taken_for_evaluation

NUM_IMAGES, BATCH = 36, 4
NUM_BLOCKS = NUM_IMAGES // BATCH
KINDS = ConditioningConfig(
    text=TEXT,
    layout=LayoutConditioningConfig(num_classes=3, num_tokens=64, max_objects=2, width=16, depth=1, num_heads=2),
)


class Ended(NamedTuple):
    """How a command ended on a rank."""

    status: int
    out: str
    err: str
    sampled: int  # batches


@pytest.fixture(scope="module", autouse=True)
def one_network() -> Iterator[None]:
    with taken_for_evaluation():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one picture that cannot be used."""
    return make_squares(tmp_path_factory.mktemp("squares"), NUM_IMAGES, SIDE, bad=1)


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), KINDS, open_manifest(data, "heldout").labels)


def ended(arguments: list[str], spoil: Callable[[int], None] | None = None) -> Ended:
    """The command run on this rank; `spoil` is told how many batches were sampled before."""
    sampled = 0
    plain = evaluate_diffusion.sample_images

    def counted(*positional: Any, **named: Any) -> Tensor:
        nonlocal sampled
        if spoil is not None:
            spoil(sampled)
        sampled += 1
        return plain(*positional, **named)

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_diffusion, "sample_images", counted)
        try:
            status = main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return Ended(status, out.getvalue(), err.getvalue(), sampled)


def command(action: str, source: Path, data: Path, *arguments: str | Path) -> list[str]:
    options = ["--data", data, "--device", "cpu", "--batch", str(BATCH), "--json", *arguments]
    return ["evaluate", action, str(source), *map(str, options)]


def result(ranks: list[Ended]) -> dict[str, Any]:
    """The document, which rank 0 alone prints."""
    assert [rank.status for rank in ranks] == [0] * len(ranks), ranks[0].err
    assert [rank.out for rank in ranks[1:]] == [""] * (len(ranks) - 1)
    document: dict[str, Any] = json.loads(ranks[0].out)
    return document


def require_same(found: Any, expected: Any, path: str = "") -> None:
    """Nothing, if numbers are the same to 1e-6, and all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for name, value in expected.items():
            require_same(found[name], value, f"{path}.{name}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), path
    else:
        assert found == expected, path


@pytest.mark.parametrize("action", ["diffusion", rarely("autoencoder"), "images"])
def test_figures_are_those_of_one_rank(model: Path, data: Path, tmp_path: Path, action: str) -> None:
    source = data.parent if action == "images" else model
    more = {"diffusion": ["--steps", "2", "--reference", str(data)], "images": ["--resolution", str(SIDE)]}
    documents = []
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        arguments = ["--out", str(out), *more.get(action, [])]
        if action != "autoencoder":
            arguments += ["--cache", str(tmp_path / f"cache-{ranks}"), "--resamples", "2"]
        document = result(run_ranks(ended, ranks, command(action, source, data, *arguments)))
        assert json.loads((out / "result.json").read_text()) == document
        assert sorted(path.suffix for path in out.iterdir()) == ([".json"] if action == "images" else [".json", ".png"])
        documents.append(document)
    one = documents[0]
    assert one["protocol"]["data"]["num_images"] == NUM_IMAGES - 1
    assert one["bad_images"]["count"] == 1
    for other in documents[1:]:
        assert other["protocol"] == one["protocol"]
        assert other["bad_images"] == one["bad_images"]
        require_same(other["figures"], one["figures"])


def break_off(sampled: int) -> None:
    """Rank 1 fails when it has measured two batches."""
    import os

    if sampled == 2 and os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.rest
def test_what_was_measured_before_an_interruption_is_kept(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = command("diffusion", model, data, "--steps", "1", "--resamples", "0")
    expected = result(run_ranks(ended, 1, arguments))
    arguments += ["--out", str(tmp_path / "out")]
    first, second = run_ranks(ended, 2, arguments, break_off)
    assert (first.status, second.status) == (1, 1)
    assert first.out == second.out == ""
    (line,) = [line for line in first.err.splitlines() if line.startswith("error:")]
    assert "rank 1: " in line
    assert "No space left on device: 'somewhere'" in line
    assert "error:" not in second.err
    kept = sorted((tmp_path / "out" / "parts").glob("*/*.safetensors"))
    assert [int(path.stem) for path in kept] == [0, 1, 2, 3, 4], "two of rank 1, three of rank 0"
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    damaged = bytearray(kept[1].read_bytes())
    damaged[-1] ^= 1
    kept[1].write_bytes(damaged)

    ranks = run_ranks(ended, 4, arguments)
    assert sum(rank.sampled for rank in ranks) == NUM_BLOCKS - 3
    assert sum(rank.err.count("is damaged") for rank in ranks) == 2
    found = result(ranks)
    assert found["machine"]["images_per_s"] > 0
    require_same(found["figures"], expected["figures"])
    assert found["protocol"] == expected["protocol"]
    assert not (tmp_path / "out" / "parts").exists()

    (again,) = run_ranks(ended, 1, [*arguments, "--overwrite"])
    assert again.sampled == NUM_BLOCKS, "a finished measurement leaves nothing behind"


def test_parts_of_another_measurement_are_not_taken(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = command("diffusion", model, data, "--steps", "1", "--resamples", "0", "--out", tmp_path)
    run_ranks(ended, 2, arguments, break_off)
    assert list((tmp_path / "parts").glob("*/*"))
    (other,) = run_ranks(ended, 1, [*arguments, "--seed", "7"])
    assert (other.status, other.sampled) == (0, NUM_BLOCKS)


@pytest.mark.parametrize(
    ("change", "status", "expected"),
    [(["--guidance", "-1"], 2, "--guidance -1.0"), (["--split", "none"], 3, "no split 'none'")],
)
def test_a_mistake_is_told_once(model: Path, data: Path, change: list[str], status: int, expected: str) -> None:
    ranks = run_ranks(ended, 2, command("diffusion", model, data, *change))
    assert [rank.status for rank in ranks] == [status, status]
    (line,) = [line for rank in ranks for line in rank.err.splitlines() if line.startswith("error:")]
    assert expected in line
