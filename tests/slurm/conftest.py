"""One cluster of four nodes and one clone for all tests of this folder; `make test` leaves the folder out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import stage2
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import make_dataset
from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import IMAGES, Desk, digest, fresh_clone


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    lacking = missing()
    if lacking:
        pytest.fail(f"no Slurm cluster without {', '.join(lacking)}: run `make test-slurm` as root", pytrace=False)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4) as running:
        yield running


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def desk(cluster: Cluster, clone: Path) -> Iterator[Desk]:
    """An empty queue, before and after."""
    yield Desk(cluster, clone)
    cluster.run("scancel", "--user=root")
    cluster.wait_for(lambda: not cluster.run("squeue", "--noheader").strip(), 60, "jobs did not leave")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and an autoencoder artifact."""
    path = tmp_path_factory.mktemp("inputs")
    make_dataset(path / "data", num_samples=24, samples_per_shard=4, resolution=20)
    tiny_artifact(path / "artifact")
    return path


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, clone: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of stage 2's last checkpoint on two nodes, when nothing happens to the run."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    Desk(cluster, clone).submit("train_ldm", *stage2(inputs, run_dir, *IMAGES)).wait_for_end()
    return digest(run_dir)
