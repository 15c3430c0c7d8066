"""kill -9 of a rank at every named point of a save: a run that is started again finds the checkpoint before or the new
one, whole. Most cases are `make test-rest`'s.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from ldm_scale.engine.checkpoint import PROGRESS
from ldm_scale.engine.folder_write import write_folder
from ldm_scale.engine.rank_files import complete_folders
from tests.helpers.kills import CASES, Case, found_after, killed_save, weights_after
from tests.helpers.sharded import BATCH, max_difference

SAMPLE = (
    Case("save.write,nth=2", 1, "first"),
    Case("save.rename", 0, "again"),
    Case("save.renamed", 0, "later"),
    Case("save.sync", 1, "background"),
)
PUBLISHED = ("save.renamed", "save.retain")


@pytest.fixture(scope="module")
def weights() -> dict[int, dict[str, Tensor]]:
    """Of an undisturbed run, by steps."""
    return {steps: weights_after(steps) for steps in (0, 1, 2)}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case in SAMPLE else pytest.mark.rest) for case in CASES]
)
def test_after_a_kill_the_checkpoint_before_or_the_new_one_is_there_whole(
    tmp_path: Path, weights: dict[int, dict[str, Tensor]], case: Case
) -> None:
    root = tmp_path / "run" / "checkpoints"
    killed_save(root, case)
    images, found = found_after(root)
    steps = {"first": 0, "later": 1, "again": 1, "background": 1}[case.mode]
    before = {"first": 0, "later": BATCH, "again": 2 * BATCH, "background": BATCH}[case.mode]
    is_new = images == 2 * BATCH and max_difference(found, weights[2 if steps else 0]) == 0
    is_before = images == before and (not steps or max_difference(found, weights[1]) == 0)
    if case.rank == 0:  # it publishes: what is found is decided by how far it came
        assert is_new == (case.point in PUBLISHED)
    assert is_new or is_before
    assert not list(root.glob("damaged-*"))
    assert (tmp_path / "run" / PROGRESS).exists() or case.mode == "first"
    # The next save of the run clears up.
    write_folder(root, 3 * BATCH, 0, [], {"models": {"net": {}}})
    names = [path.name for path in root.iterdir()]
    assert all(name.startswith("images-") for name in names), names
    assert len(complete_folders(root)) == len(names)


def test_there_are_at_least_as_many_cases_as_promised() -> None:
    assert len(set(map(str, CASES))) == len(CASES) >= 72
