"""`ldm-scale report`: a run of either stage as one page, whole, in progress or damaged, whatever its texts hold."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.__main__ import main
from ldm_scale.telemetry.tensorboard import METRICS_FILE, TENSORBOARD_FOLDER
from ldm_scale.training.account import ATTEMPTS
from tests.helpers.disks import full_disk
from tests.helpers.evaluations import kl_result
from tests.helpers.events import rewrite_pictures
from tests.helpers.reported import CANARY, Page, trained_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {stage: trained_run(tmp_path_factory.mktemp(stage), stage) for stage in ("autoencoder", "diffusion")}


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run of captions, to be damaged."""
    return Path(shutil.copytree(runs["diffusion"], tmp_path / "run"))


def _report(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> tuple[dict[str, Any], Page]:
    capsys.readouterr()
    assert main(["report", str(run), "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    text = Path(document["page"]).read_text(encoding="utf-8")
    assert document["bytes"] == len(text.encode())
    return document, Page(text)


def _refusal(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["report", *arguments]) == status
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    ("stage", "headings", "pictures"),
    [
        ("autoencoder", {"health-of-the-gan", "use-of-the-codebook"}, {"reconstruction"}),
        ("diffusion", {"by-level-of-noise", "findings"}, {"samples/raw", "samples/ema"}),
    ],
)
def test_a_run_of_either_stage_is_one_page(
    runs: dict[str, Path], stage: str, headings: set[str], pictures: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    document, page = _report(capsys, runs[stage])
    assert (document["status"], document["images"], document["missing"]) == ("finished", 32, [])
    everywhere = {"pictures", "losses", "optimisation", "throughput-and-memory", "cost", "checkpoints-and-product"}
    assert headings | everywhere | {"environment", "configuration"} <= set(page.headings())
    shown = [str(image["alt"]).partition(" at ")[0] for image in page.of("img")]
    assert set(shown) == pictures
    assert len(shown) == document["pictures"] == 2 * len(pictures), "at 16 and at 32 images"
    assert len(page.of("svg")) > 10
    config = json.loads((runs[stage] / ATTEMPTS).read_text().splitlines()[0])["config"]
    keys = {key for section in config.values() if isinstance(section, dict) for key in section}
    assert {key for key in keys if not re.search(rf"(^|\n|\.){key}(\n|\.|$)", page.text)} == set()


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_nothing_is_loaded_and_nothing_in_a_text_becomes_markup(
    runs: dict[str, Path], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, page = _report(capsys, runs[stage])
    assert CANARY in page.text
    assert {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        name for name, _ in page.elements
    } == set()
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], (name, attributes)
        for key in ("src", "href", "srcset", "xlink:href", "action"):
            assert str(attributes.get(key, "#")).startswith(("data:image/", "#")), (name, attributes)
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    style = Path(runs[stage] / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_captions_stand_beside_their_pictures(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, page = _report(capsys, runs["diffusion"])
    assert "an apple" in page.texts
    assert all("an apple" in str(image["alt"]) for image in page.of("img"))


def test_each_damaged_or_missing_piece_costs_itself_and_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / METRICS_FILE).open("ab") as file:
        file.write(b"{half a row\n")
    (events,) = (run / TENSORBOARD_FOLDER).iterdir()
    content = events.read_bytes()
    events.write_bytes(content[: content.rindex(b"IEND") - 20])
    (newest,) = (run / "checkpoints").iterdir()
    (newest / "manifest.json").write_text("{")
    (run / "result.json").write_text("[1")
    document, page = _report(capsys, run)
    told = "\n".join(document["missing"])
    assert re.search(r"metrics\.jsonl: 1 of its \d+ lines are damaged", told)
    assert re.search(r"tfevents\S* ends within a record or is damaged after \d+ of them", told)
    assert f"checkpoint {newest.name}: " in told
    assert "result.json is damaged" in told
    assert all(line in page.text for line in document["missing"])
    assert document["pictures"] > 0
    assert "losses" in page.headings()


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (METRICS_FILE, "metrics.jsonl is not there"),
        (ATTEMPTS, "attempts.jsonl is not there"),
        (TENSORBOARD_FOLDER, "pictures: tensorboard has none"),
        ("checkpoints", ""),
        ("result.json", ""),
    ],
)
def test_a_run_that_lacks_a_piece_has_a_page_of_the_others(
    run: Path, lost: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    document, page = _report(capsys, run)
    assert [text for text in document["missing"] if text.startswith(told)] if told else document["missing"] == []
    assert "configuration" in page.headings()
    assert document["images"] == 32
    assert ("pictures" in page.headings()) == (lost != TENSORBOARD_FOLDER)


def test_a_picture_that_does_not_decode_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_pictures(run / TENSORBOARD_FOLDER, lambda name, data: data[:60] if name == "samples/ema" else data)
    document, page = _report(capsys, run)
    assert any(text.startswith("the picture samples/ema at 32 images is damaged") for text in document["missing"])
    assert {str(image["alt"]).partition(" at ")[0] for image in page.of("img")} == {"samples/raw"}


def test_a_run_in_progress_says_so_and_one_that_was_killed_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "result.json").unlink()
    start, _ = (run / ATTEMPTS).read_text().splitlines(keepends=True)
    (run / ATTEMPTS).write_text(start)
    assert _report(capsys, run)[0]["status"] == "running"
    earlier = json.loads(start) | {"time": time.time() - 7200}
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    for row in rows:
        row["time"] -= 3600
    (run / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / ATTEMPTS).write_text(json.dumps(earlier) + "\n")
    document, page = _report(capsys, run)
    assert document["status"] == "dead"
    assert "runs, or ended without notice" in page.text


def test_evaluations_within_the_run_and_beside_it_are_shown_with_their_protocol(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, resolution in ((run / "evaluations" / "a", 64), (tmp_path / "elsewhere", 128)):
        folder.mkdir(parents=True)
        result = kl_result()
        result["model"]["label"], result["protocol"]["resolution"] = f"model {resolution}", resolution
        (folder / "result.json").write_text(json.dumps(result))
    (run / "evaluations" / "broken").mkdir()
    (run / "evaluations" / "broken" / "result.json").write_text("{")
    document, page = _report(capsys, run, "--results", str(tmp_path / "elsewhere"))
    assert document["evaluations"] == [
        str(tmp_path / "elsewhere" / "result.json"),
        str(run / "evaluations" / "a" / "result.json"),
    ]
    assert {"model 64", "model 128", "25 +- 2", "data.split", "heldout"} <= set(page.texts)
    assert "Not to be compared with one another" in page.text
    assert any(text.startswith("an evaluation: ") for text in document["missing"])


def test_an_older_page_is_made_anew_and_nothing_else_is_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "page.html"
    first, _ = _report(capsys, run, "--out", str(out))
    assert first["page"] == str(out)
    assert _report(capsys, run, "--out", str(out))[0]["pictures"] == first["pictures"]
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    mine = tmp_path / "mine.html"
    mine.write_text("<html>my own</html>")
    line = _refusal(capsys, 2, str(run), "--out", str(mine))
    assert "exists and is no page of ldm-scale report; remove it, or give another name" in line
    assert mine.read_text() == "<html>my own</html>"
    for text in (
        "notes: made with ldm-scale report",
        '<!DOCTYPE html>\n<html><head><meta name="author" content="ldm-scale report 1">',
    ):
        mine.write_text(text)
        assert "exists and is no page" in _refusal(capsys, 2, str(run), "--out", str(mine)), (
            "it names the program alone"
        )
        assert mine.read_text() == text
    assert "is a folder; give the name of a page" in _refusal(capsys, 2, str(run), "--out", str(tmp_path))


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no such folder; give the run_dir" in _refusal(capsys, 2, str(tmp_path / "nowhere"))
    assert "holds nothing that a run leaves" in _refusal(capsys, 2, str(tmp_path / "empty"))
    assert not (tmp_path / "empty" / "report.html").exists()
    assert "no such file" in _refusal(capsys, 3, str(run), "--results", str(tmp_path / "none"))


def test_a_full_disk_leaves_no_half_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _report(capsys, run)
    before = (run / "report.html").read_bytes()
    with full_disk():
        line = _refusal(capsys, 1, str(run))
    assert "report.html" in line
    assert (run / "report.html").read_bytes() == before
    assert [path.name for path in run.iterdir() if path.name.startswith(("report", ".report"))] == ["report.html"]


_EVERY_STAGE = {
    "scalars": {
        f"time_share/{name}" for name in ("data", "forward", "backward", "reduce", "update", "evaluate", "save")
    }
    | {"images_per_s", "throughput/model_tflops_per_s", "memory/host_peak_gib"},
    "images": set[str](),
    "tensors": {"configuration/text_summary", "custom_scalars__config__", "diagnosis/text_summary"},
}
_STAGES: dict[str, dict[str, set[str]]] = {
    "autoencoder": {
        "scalars": {"codebook/used_share", "codebook/perplexity", "discriminator/accuracy", "adaptive_weight"},
        "images": {"reconstruction"},
        "tensors": {"reconstruction/captions/text_summary"},
    },
    "diffusion": {
        "scalars": {f"validation/{weights}/bin{i}" for weights in ("raw", "ema", "zero") for i in range(8)},
        "images": {"samples/raw", "samples/ema", "validation/noise_levels"},
        "tensors": {"samples/raw/captions/text_summary", "samples/ema/captions/text_summary"},
    },
}


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_tensorboard_has_all_of_it_and_its_charts_name_what_there_is(runs: dict[str, Path], stage: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import metadata

    events = EventAccumulator(str(runs[stage] / TENSORBOARD_FOLDER)).Reload()
    tags = events.Tags()
    for kind, wanted in _EVERY_STAGE.items():
        assert (wanted | _STAGES[stage][kind]) - set(tags[kind]) == set()
    (stored,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    drawn = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert len(drawn) > 10
    assert drawn - set(tags["scalars"]) == set()
    session = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    hyperparameters = metadata.parse_session_start_info_plugin_data(session).hparams
    assert hyperparameters["train.total_images"].number_value == 32
    experiment = events.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    compared = {info.name.tag for info in metadata.parse_experiment_plugin_data(experiment).metric_infos}
    assert compared
    assert compared - set(tags["scalars"]) == set()
