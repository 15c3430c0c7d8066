"""Parts of a run's page: markup that escapes, curves that say what the figures say, pictures within bounds."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, DiffusionConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.evaluation.noise_levels import NUM_BINS, log_snr_ranges
from ldm_scale.evaluation.results import write_result
from ldm_scale.operations.report_charts import MAX_COLUMNS, Chart, Line, draw, number_text
from ldm_scale.operations.report_curves import groups
from ldm_scale.operations.report_html import details, escaped, table, tag
from ldm_scale.operations.report_pictures import MAX_PICTURE_BYTES, MAX_SIDE_PX, Album, figures
from ldm_scale.operations.report_run import RunFolder, _read_results, read_run
from ldm_scale.telemetry.events import EventPicture
from tests.helpers.evaluations import RESULT
from tests.helpers.reported import CANARY, Page


def test_what_is_not_markup_is_text_wherever_it_stands() -> None:
    page = tag("p", CANARY, title=CANARY, data_x=CANARY)
    markup = str(page) + str(table([(CANARY, CANARY)], (CANARY,))) + str(details(CANARY, CANARY))
    assert "<script" not in markup
    parsed = Page(markup)
    assert parsed.texts.count(CANARY) == 6
    (paragraph,) = parsed.of("p")
    assert paragraph == {"title": CANARY, "data-x": CANARY}
    assert tag("details", open=True) == "<details open></details>"
    assert tag("details", open=False, id=None) == "<details></details>"


def test_a_page_shows_no_password_of_a_url() -> None:
    assert escaped("s3://user:secret@host/shards?sig=secret") == "s3://host/shards"


def _path_points(svg: str, kind: str) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path d="M([^"]*)" class="{kind}"', svg)
    return [(float(x), float(y)) for x, y in (point.split() for point in path.rstrip("Z").split("L"))]


def test_a_line_goes_where_its_figures_are() -> None:
    svg = draw(Chart("loss", [Line("loss", [(0, 1.0), (50, 3.0), (100, 2.0)])]))
    (x0, y0), (x1, y1), (x2, y2) = _path_points(svg, "line")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0, "up is more"
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)
    assert "<b>2</b>" in svg, "the last figure stands beside the name"


def test_many_points_become_columns_of_mean_and_range() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.2, 10_000)
    svg = draw(Chart("loss", [Line("loss", list(enumerate(values.tolist())))]))
    line, band = _path_points(svg, "line"), _path_points(svg, "band")
    assert 100 < len(line) <= MAX_COLUMNS
    assert len(band) == 2 * len(line)
    assert len(svg) < 20_000
    upper, lower = band[: len(line)], band[len(line) :][::-1]
    size = -(-10_000 // MAX_COLUMNS)
    means, highs, lows = (
        np.array([reduce(values[start : start + size]) for start in range(0, 10_000, size)])
        for reduce in (np.mean, np.max, np.min)
    )
    slope, zero = np.polyfit(means, [y for _, y in line], 1)
    for places, expected in ((line, means), (upper, highs), (lower, lows)):
        inside = np.clip(slope * expected + zero, 10, 186)  # of the axes
        np.testing.assert_allclose([y for _, y in places], inside, atol=0.3)
    assert f"<b>{number_text(float(means[-1]))}</b>" in svg


def test_gaps_and_what_is_not_finite_are_left_out() -> None:
    points = [(0, 1.0), (1, None), (2, float("nan")), (3, float("inf")), (4, 2.0)]
    assert len(_path_points(draw(Chart("x", [Line("x", points)])), "line")) == 2
    assert draw(Chart("x", [Line("x", [(0, None)])])) == ""
    assert draw(Chart("x", [])) == ""


def test_wide_ranges_are_logarithmic_and_outliers_are_counted() -> None:
    decades = draw(Chart("x", [Line("x", [(n, 10.0**-n) for n in range(5)])]))
    heights = [y for _, y in _path_points(decades, "line")]
    assert np.diff(heights) == pytest.approx(np.diff(heights)[0], abs=0.2)
    assert "logarithmic" in decades
    spike = draw(Chart("x", [Line("x", [(n, 1e9 if n == 70 else 1.0 + n / 1000) for n in range(150)])]))
    assert "1 points beyond the range" in spike
    assert "logarithmic" not in spike
    assert "logarithmic" not in draw(Chart("x", [Line("x", [(0, 0.0), (1, 1000.0)])])), "zero has no logarithm"


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-3.0, -3.0], [1e-300, 1e300], [0.1, 0.1000001]])
def test_every_range_can_be_drawn(values: list[float]) -> None:
    svg = draw(Chart("x", [Line("x", list(enumerate(values)))]))
    numbers = [float(n) for point in _path_points(svg, "line") for n in point]
    assert all(0 <= n <= 360 for n in numbers)


def test_numbers_are_short() -> None:
    given = [0, 0.123456, 1234.5, 1.5e-7, 3e9, None, float("nan")]
    assert [number_text(x) for x in given] == ["0", "0.1235", "1,234", "1.50e-07", "3.00e+09", "-", "-"]


def _series(*names: str) -> dict[str, list[tuple[float, float | None]]]:
    return {name: [(0.0, 1.0), (10.0, 2.0)] for name in names}


def test_every_figure_is_drawn_once_known_ones_together() -> None:
    bins = [f"validation/{w}/bin{i}" for w in ("raw", "ema", "zero") for i in range(NUM_BINS)]
    names = ["loss", "lr", "validation/raw/mean", "validation/ema/mean", "validation/zero/mean", "odd/figure", *bins]
    config = config_to_dict(Config(diffusion=DiffusionConfig()))
    found = {group.title: group.charts for group in groups(_series(*names), config)}
    (training, heldout) = found["Losses"]
    assert [line.name for line in training.lines] == ["loss"]
    assert [(line.name, line.is_reference) for line in heldout.lines] == [
        ("trained weights", False),
        ("averaged weights", False),
        ("predicting zero", True),
    ]
    over_range, over_time = found["By level of noise"]
    ranges = [f"{high:.1f} to {low:.1f}" for high, low in log_snr_ranges(build_process(DiffusionConfig()))]
    assert list(over_range.places) == [line.name for line in over_time.lines] == ranges
    assert [len(line.points) for line in over_range.lines] == [NUM_BINS] * 3
    assert [chart.title for chart in found["All other figures"]] == ["odd/figure"]


def test_parts_of_a_noise_range_that_is_not_known_are_numbered() -> None:
    series = _series(*(f"validation/accuracy/raw/bin{i}" for i in range(3)))
    (group,) = groups(series, {"diffusion": {"prediction": "of another version"}})
    assert list(group.charts[0].places) == ["part 1 of 3", "part 2 of 3", "part 3 of 3"]


def _noise_png(side: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_large_pictures_are_reduced_and_small_ones_left_as_they_are() -> None:
    album = Album()
    small, large = _noise_png(64), _noise_png(2000)
    assert len(large) > MAX_PICTURE_BYTES
    before = album.left_bytes
    shown = album.embedded(small, "small")
    assert shown is not None
    assert before - album.left_bytes == len(small)
    reduced = album.embedded(large, "large")
    assert reduced is not None
    assert Page(reduced).of("img")[0]["width"] == Page(reduced).of("img")[0]["height"] != str(MAX_SIDE_PX)
    assert len(reduced) < 4 / 3 * MAX_PICTURE_BYTES + 1000


def test_a_page_weighs_no_more_than_it_may_and_the_last_pictures_come_first() -> None:
    pictures = {
        name: [EventPicture(name, images, _noise_png(128, images)) for images in (10, 20, 30)] for name in ("a", "b")
    }
    one = len(_noise_png(128))
    album, missing = Album(left_bytes=int(3.5 * one)), list[str]()
    page = Page("".join(figures(pictures, album, missing)))
    assert [image["alt"] for image in page.of("img")] == ["a at 30 images", "a at 10 images", "b at 30 images"]
    assert (album.count, album.num_left_out, missing) == (3, 3, [])


def _write_attempts(run: Path, rows: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    start = {"config": {"experiment": "x"}, "versions": {}, "ranks": 4, "hosts": {}, "device": "H100"}
    whole = [row | start if row["event"] == "start" else row for row in rows]
    (run / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))


def test_attempts_that_were_killed_end_with_their_last_figure(tmp_path: Path) -> None:
    _write_attempts(
        tmp_path,
        [
            {"event": "start", "time": 1000.0, "images": 0},
            {"event": "start", "time": 5000.0, "images": 64},
            {"event": "end", "time": 8600.0, "images": 128, "reason": "stopped"},
            {"event": "start", "time": 9000.0, "images": 128},
            {"event": "end", "time": 9036.0, "images": 160, "reason": "NumericsError: nan"},
        ],
    )
    rows = [{"images": 32, "time": 1900.0}, {"images": 64, "time": 2800.0}, {"images": 96, "time": 6000.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert [attempt.seconds for attempt in run.attempts] == [1800.0, 3600.0, 36.0]
    assert [attempt.device_hours for attempt in run.attempts] == [2.0, 4.0, 0.04]
    assert [attempt.images for attempt in run.attempts] == [64, 128, 160]
    assert run.attempts[0].reason.startswith("killed")
    assert (run.status, run.images, run.total_images) == ("failed", 160, None)


def test_of_many_evaluations_the_newest_are_shown(tmp_path: Path) -> None:
    for images in range(25):
        write_result(tmp_path / "evaluations" / f"images-{images:010d}", RESULT)
    run = RunFolder(tmp_path)
    _read_results(run, ())
    assert [Path(result.source).parent.name[-2:] for result in run.results] == [f"{n:02d}" for n in range(5, 25)]
    assert run.missing == ["5 older evaluations; name those to show with --results"]
