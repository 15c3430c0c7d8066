"""What a run's figures look like to TensorBoard's own reader and to a JSON parser."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_scale.telemetry import tensorboard
from ldm_scale.telemetry.tensorboard import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    Curves,
    ScalarWriter,
    draw_curves,
    image_grid,
    read_metrics,
)
from tests.helpers.disks import full_disk

CURVES = Curves(
    "losses", "noise", "error", ("low", "high"), {"raw": (0.5, 0.2), "zero": (1.0, math.inf)}, frozenset({"zero"})
)


def scalars_seen_by_tensorboard(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / TENSORBOARD_FOLDER)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_scalars_reach_both_readers(tmp_path: Path) -> None:
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_scalars({"loss": 0.5, "lr": torch.tensor(1e-4).item()}, 64)
        writer.add_scalars({"loss": 0.25}, 128)
    assert scalars_seen_by_tensorboard(tmp_path, "loss") == [(64, 0.5), (128, 0.25)]
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["images"] for row in rows] == [64, 128]
    assert rows[0]["loss"] == 0.5
    assert rows[0]["lr"] == pytest.approx(1e-4)
    assert rows[0]["time"] <= rows[1]["time"]
    assert rows == read_metrics(tmp_path)


def test_resuming_takes_back_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    with ScalarWriter(tmp_path, enabled=True) as writer:
        for images in (64, 128, 192):
            writer.add_scalars({"loss": float(images)}, images)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"images": 256, "lo')  # killed while writing
    with ScalarWriter(tmp_path, enabled=True, resume_images=128) as writer:
        writer.add_scalars({"loss": -1.0}, 192)
    expected = [(64, 64.0), (128, 128.0), (192, -1.0)]
    assert [(row["images"], row["loss"]) for row in read_metrics(tmp_path)] == expected
    assert scalars_seen_by_tensorboard(tmp_path, "loss") == expected


@pytest.mark.parametrize(
    "damaged", [b"{", b"\xff\xfe", b"null", b"[1]", b'{"imagus": 96}', b'{"images": "96"}', b"[" * 9999 + b"]" * 9999]
)
def test_a_damaged_line_costs_itself_and_no_start(
    tmp_path: Path, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_scalars({"loss": 1.0}, 64)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(damaged + b"\n")
    with ScalarWriter(tmp_path, enabled=True, resume_images=128) as writer:
        writer.add_scalars({"loss": 2.0}, 128)
    assert f"{tmp_path / METRICS_FILE}: line 2 is damaged and left out" in capsys.readouterr().err
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0]
    assert capsys.readouterr().err == ""


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path: Path) -> None:
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_scalars({"loss": 1.0}, 0)
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_scalars({"loss": 2.0}, 0)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [2.0]
    assert scalars_seen_by_tensorboard(tmp_path, "loss") == [(0, 2.0)]


def test_rows_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    writer = ScalarWriter(tmp_path, enabled=True)
    writer.add_scalars({"loss": 1.0}, 64)
    assert len(read_metrics(tmp_path)) == 1
    writer.flush()
    assert scalars_seen_by_tensorboard(tmp_path, "loss") == [(64, 1.0)]
    writer.close()


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_scalars({"loss": float("nan"), "norm": float("inf")}, 64)
    text = (tmp_path / METRICS_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(tmp_path)[0]["loss"] is None


def test_a_disabled_writer_writes_nothing(tmp_path: Path) -> None:
    with ScalarWriter(tmp_path / "run", enabled=False) as writer:
        writer.add_scalars({"loss": 1.0}, 64)
        writer.add_picture("samples", image_grid(torch.zeros(1, 3, 4, 4)), 64, ["a"])
        writer.add_configuration({"train.seed": 0}, ["loss"])
        writer.add_curves("curves", CURVES, 64)
        writer.add_text("words", "x", 64)
        writer.add_charts({"chart": ["loss"]}, "losses")
        writer.flush()
    assert not (tmp_path / "run").exists()
    assert read_metrics(tmp_path / "run") == []


def test_importing_telemetry_does_not_import_tensorboard() -> None:
    code = "import sys, ldm_scale.telemetry.tensorboard; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    import io

    import numpy as np
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_picture("samples/raw", image_grid(images, columns=2), 64)
    (event,) = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload().Images("samples/raw")
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 64
    assert pixels.shape == (4, 10, 3)
    assert pixels[:, :4].max() == 0
    assert pixels[:, 4:].min() == 255


def test_image_grid_places_images_row_by_row() -> None:
    images = (torch.arange(5) / 4 * 2 - 1).view(5, 1, 1, 1).expand(5, 3, 2, 3)
    grid = image_grid(images, columns=2, gap=1)
    assert grid.shape == (3, 8, 7)
    values = [[0, 64], [128, 191], [255, 255]]  # the last one is the empty place
    for row in range(3):
        for column in range(2):
            tile = grid[:, 3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
            assert (tile == values[row][column]).all()
    assert (grid[:, 2] == 255).all()


@pytest.mark.filterwarnings("error")  # of exceptions in threads
def test_figures_go_on_when_the_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "RETRY_S", 0.0)
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_scalars({"loss": 0.5}, 64)
        writer.flush()
        with full_disk():
            writer.add_text("words", "refused by the event file alone", 96)
            writer.flush()
            for images in (128, 192):
                writer.add_scalars({"loss": 0.4}, images)
                writer.flush()
        writer.add_scalars({"loss": 0.25}, 256)
    assert [row["images"] for row in read_metrics(tmp_path)] == [64, 128, 192, 256]
    assert scalars_seen_by_tensorboard(tmp_path, "loss") == [(64, 0.5), (256, 0.25)]
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path / METRICS_FILE} cannot be written (File too large): free space there") == 1
    assert said.count(f"{tmp_path / TENSORBOARD_FOLDER} cannot be written (File too large): free space there") == 1
    assert "metrics.jsonl is written again, with the rows that waited\n" in said
    assert "tensorboard is written again; figures and pictures between images 64 and 256 are missing there" in said


def test_a_run_that_starts_on_a_full_disk_has_its_figures_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "RETRY_S", 0.0)
    with ScalarWriter(tmp_path, enabled=True) as writer:
        for images in (64, 128, 192):
            writer.add_scalars({"loss": float(images)}, images)
    with full_disk():
        writer = ScalarWriter(tmp_path, enabled=True, resume_images=64)
        writer.add_charts({"chart": ["loss"]}, "losses")
        writer.add_scalars({"loss": 1.0}, 128)
    with writer:
        writer.add_scalars({"loss": 2.0}, 192)
    assert [(row["images"], row["loss"]) for row in read_metrics(tmp_path)] == [(64, 64.0), (128, 1.0), (192, 2.0)]
    assert scalars_seen_by_tensorboard(tmp_path, "loss") == [(64, 64.0), (192, 2.0)]


def test_charts_curves_and_texts_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_charts({"bin 0": ["raw/bin0", "zero/bin0"], "bin 1": ["raw/bin1", "zero/bin1"]}, "noise levels")
        writer.add_curves("curves", CURVES, 64)
        writer.add_text("diagnosis", "**stuck**: the loss", 128)
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    (picture,) = events.Images("curves")
    assert picture.step == 64
    (text,) = events.Tensors("diagnosis/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (128, b"**stuck**: the loss")
    (stored,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "noise levels"
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {"bin 0": ["raw/bin0", "zero/bin0"], "bin 1": ["raw/bin1", "zero/bin1"]}


def test_curves_are_drawn_as_they_are() -> None:
    (axes,) = draw_curves(CURVES).axes
    raw, zero = axes.lines
    assert list(raw.get_ydata()) == [0.5, 0.2]
    assert math.isnan(zero.get_ydata()[1])
    assert (raw.get_linestyle(), zero.get_linestyle()) == ("-", "--")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["low", "high"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["raw", "zero"]
    assert axes.get_ylim()[0] == 0


def test_captions_are_told_beside_their_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = image_grid(torch.zeros(2, 3, 4, 4))
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_picture("samples/raw", picture, 64, ["red\n apple", "cr\u00e8me"])
        writer.add_picture("samples/none", picture, 64, ["", ""])
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    (text,) = events.Tensors("samples/raw/captions/text_summary")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (64, "1. red apple\n2. cr\u00e8me")
    assert events.Tags()["tensors"] == ["samples/raw/captions/text_summary"]
    assert set(events.Tags()["images"]) == {"samples/raw", "samples/none"}


def _hyperparameters(event_file: Path) -> tuple[dict[str, object], set[str]]:
    """Values of a session and names of figures, as TensorBoard's own page reads them out of one event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    content = EventAccumulator(str(event_file)).Reload().summary_metadata
    session = metadata.parse_session_start_info_plugin_data(
        content[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG].plugin_data.content)
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in session.hparams.items()}
    return values, {info.name.tag for info in experiment.metric_infos}


def test_the_configuration_is_in_every_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "RETRY_S", 0.0)
    values = {"optimizer.lr": 1e-3, "train.seed": 7, "data.horizontal_flip": True, "data.manifest": "a|b", "zero": None}
    with ScalarWriter(tmp_path, enabled=True) as writer:
        writer.add_configuration(values, ["loss", "validation/raw/mean"])
        writer.flush()
        with full_disk():
            writer.add_scalars({"loss": 0.4}, 64)
            writer.flush()
        writer.add_scalars({"loss": 0.2}, 128)
    files = sorted((tmp_path / TENSORBOARD_FOLDER).glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    for file in files:
        found, figures = _hyperparameters(file)
        assert found == {**values, "zero": "None"}
        assert figures == {"loss", "validation/raw/mean"}
