"""`evaluate diffusion` over a grid of guidance scales, steps and averages; cells that are finished are not made again.

A cell is a folder with its result, which is written last. So a sweep that was ended, or that is given more values, goes
on where it was: a cell counts if it is of these very weights and this sampler, and all cells share one request.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_scale import __version__
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.engine.tensor_file import replace_file, require_place
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.features import NUM_COMPONENTS
from ldm_scale.evaluation.images import open_split
from ldm_scale.evaluation.results import RESULT_FILE, SAMPLES_FORMAT, read_result, reading
from ldm_scale.evaluation.samples import RealFeatures
from ldm_scale.evaluation.sweep import names_of, plot_sweep, sweep_rows, sweep_table, write_csv
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.interchange.sampling import chosen_sampling
from ldm_scale.operations.evaluate_diffusion import evaluate_diffusion, read_diffusion
from ldm_scale.operations.evaluation_reference import check_set_request
from ldm_scale.operations.evaluation_setup import check_batch
from ldm_scale.operations.sample import check_sampling, sampler_options
from ldm_scale.telemetry.log import get_logger

REQUEST_FILE, CSV_FILE, PLOT_FILE = "sweep.json", "sweep.csv", "sweep.png"
# What all cells share; weights, guidance and steps may grow from one call to the next.
_SHARED = (
    *("split", "num_images", "seed", "sampler", "eta", "guidance_rescale", "guidance_interval"),
    *("features", "features_weights", "clip_model", "clip_weights"),
    *("reference", "reference_split", "num_reference", "resamples"),
)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: the arguments that `evaluate diffusion` would have, and what its model must be."""

    arguments: argparse.Namespace
    content_sha256: str
    autoencoder_sha256: str
    sampling: dict[str, Any]

    @property
    def path(self) -> Path:
        """Its result."""
        return Path(self.arguments.out) / RESULT_FILE


def evaluate_sweep(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The sweep's rows and where they lie, and a table of them; writes cells, CSV and plot into --out.

    Raises: ConfigError, DataError or CheckpointError for what the command line names.
    """
    cells = agreed(lambda: _open(arguments))
    known: dict[str, RealFeatures] = {}  # by autoencoder: all cells are beside the same images
    documents = []
    for number, cell in enumerate(cells, 1):
        where = f"cell {number} of {len(cells)} ({cell.path.parent.name})"
        # What rank 0 sees: another rank might look when the result is there already.
        found = collectives.broadcast_object(agreed(partial(_finished, cell, arguments.overwrite)))
        get_logger().info(f"{where}: " + ("sampling" if found is None else "is finished"))
        if found is None:
            real = known.setdefault(cell.autoencoder_sha256, RealFeatures())
            found = evaluate_diffusion(cell.arguments, known=real)
        documents.append(found)
    return agreed(lambda: _written(arguments, cells, documents) if collectives.rank() == 0 else ({}, ""))


def _open(arguments: argparse.Namespace) -> list[Cell]:
    """All cells, in a folder that is this sweep's."""
    check_batch(arguments)
    check_set_request(arguments)
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder for {CSV_FILE}, {PLOT_FILE} and the cells")
    if collectives.rank() == 0:
        require_place(out, f"--out {out}")
    dataset = open_split(arguments.data, arguments.split)
    _check_number(arguments, dataset.num_samples)
    cells = _cells(arguments)
    request = {name: _plain(getattr(arguments, name)) for name in _SHARED}
    if collectives.rank() == 0:
        _claim(out, request | {"data": dataset.digest, "program_version": __version__}, arguments.overwrite)
    return cells


def _written(
    arguments: argparse.Namespace, cells: list[Cell], documents: list[dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    out: Path = arguments.out
    rows = sweep_rows(documents, [str(cell.path) for cell in cells])
    names = names_of(documents)
    write_csv(rows, out / CSV_FILE)
    title = f"{arguments.source}, {documents[0]['protocol']['resolution']} px"
    plot_sweep(rows, names, title, out / PLOT_FILE)
    get_logger().info(f"wrote {out / CSV_FILE} and {PLOT_FILE}")
    document = {"csv": str(out / CSV_FILE), "plot": str(out / PLOT_FILE), "names": names, "cells": rows}
    return document, f"{sweep_table(rows, names)}\nwrote {out / CSV_FILE} and {out / PLOT_FILE}"


def _check_number(arguments: argparse.Namespace, available: int) -> None:
    least = 2 if arguments.features == "inception_v3" else NUM_COMPONENTS + 1
    asked = available if arguments.num_images is None else arguments.num_images
    if asked < least:
        raise ConfigError(
            f"a sweep of {asked} samples has no distance to plot, which takes {least} in these features: give more "
            "with --num-images, or a larger --data"
        )


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """All points of the grid, each checked before the first is sampled."""
    cells = []
    for weights in dict.fromkeys(arguments.weights or [None]):
        artifact = read_diffusion(arguments.source, weights)
        model = LoadedDiffusion(artifact)
        for guidance in dict.fromkeys(arguments.guidance or [None]):
            for steps in dict.fromkeys(arguments.steps or [None]):
                given = vars(arguments) | {"weights": weights, "guidance": guidance, "steps": steps}
                one = argparse.Namespace(**given)
                check_sampling(one)
                sampling = chosen_sampling(model, sampler_options(one))
                profile = re.sub(r"[^A-Za-z0-9.]+", "-", str(weights or artifact.provenance.get("weights")))
                name = f"{profile}-w{sampling.guidance_scale:g}-steps{sampling.num_steps}"
                # The folder is this sweep's: a result that is there was looked at before.
                one.out, one.overwrite = arguments.out / "cells" / name, True
                known = {"num_steps": sampling.num_steps, "guidance_scale": sampling.guidance_scale}
                cells.append(Cell(one, artifact.content_hash, artifact.autoencoder.content_hash, known))
    return cells


def _finished(cell: Cell, overwrite: bool) -> dict[str, Any] | None:
    """The result of a cell, if it has one, which counts, on rank 0.

    Raises: ConfigError if it is another model's.
    """
    if overwrite or collectives.rank() != 0 or not cell.path.exists():
        return None
    try:
        result = read_result(cell.path, (SAMPLES_FORMAT,))
        document: dict[str, Any] = json.loads(cell.path.read_text(encoding="utf-8"))
        with reading(result):
            sweep_rows([document], [str(cell.path)])
    except DataError as error:
        get_logger().warning(f"{error}: the cell is made again")
        return None
    model = document["model"]
    if model["content_sha256"] != cell.content_sha256:
        raise ConfigError(
            f"{cell.path} is of other weights ({model['content_sha256'][:12]}) than {cell.arguments.source} holds now "
            f"({cell.content_sha256[:12]}); give another --out, or --overwrite to make all cells again"
        )
    assert all(model["sampling"][name] == value for name, value in cell.sampling.items()), "a cell is named by both"
    return document


def _claim(out: Path, request: dict[str, Any], overwrite: bool) -> None:
    """Nothing; the folder is this sweep's, new or begun before.

    Raises: ConfigError with the first field in which a sweep that is there differs.
    """
    path = out / REQUEST_FILE
    if path.exists() and not overwrite:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} cannot be read ({error}); give another --out, or --overwrite") from None
        differing = [name for name in request if before.get(name) != request[name]]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"--out {out} holds a sweep of another request: {name} was {before.get(name)!r} and is "
                f"{request[name]!r}; give another folder, or --overwrite to make all cells again"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(request, indent=2) + "\n")


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Path):
        return str(value.resolve())
    return list(value) if isinstance(value, tuple) else value
