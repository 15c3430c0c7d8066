"""The comparison of downsampling factors: images that fit the time, the models' equal size, what is read and drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import compression
from benchmarks.compression import FACTORS, Study, main, samples_sheet, table, unequal_times
from benchmarks.compression_plots import Point, plot_over_sampling, plot_over_training
from benchmarks.measured import RESULTS
from ldm_scale.config.compose import load_config
from ldm_scale.errors import ConfigError
from ldm_scale.planning.flops import measure_run

STUDY = Study(Path("runs"), minutes=2.0, points=4, samples=16, data="manifest.json", stage_1_images=100, steps=(5,))
POINT = Point(4, 1600, 60.0, 20, 8.0, "FD", 30.0, 28.0, None, 0.5, 0.25)


def test_the_five_networks_are_of_one_size_and_cost_less_the_coarser_they_are() -> None:
    sizes = [measure_run(load_config([f"experiment=openmoji_ldm{factor}_small"])) for factor in FACTORS]
    parameters = [size.trained.parameters for size in sizes]
    assert max(parameters) < 1.06 * min(parameters)
    flops = [size.trained.forward_flops for size in sizes]
    assert all(coarse < fine / 2 for fine, coarse in itertools.pairwise(flops))
    assert [size.latent_shape[1] for size in sizes] == [64 // factor for factor in FACTORS]


def test_pictures_and_table_have_every_model(tmp_path: Path) -> None:
    points = [
        dataclasses.replace(POINT, factor=factor, training_s=seconds, distance=40.0 / factor, low=36.0 / factor)
        for factor in (1, 4)
        for seconds in (60.0, 120.0)
    ]
    plot_over_training(points, tmp_path / "training.png")
    plot_over_sampling(points, tmp_path / "sampling.png")
    for name in ("training.png", "sampling.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 8
    models = {
        f"f{factor}": {
            "factor": factor,
            "latent_shape": [3, 64, 64],
            "unet_parameters": 3_000_000,
            "unet_forward_flops": 10**9,
            "images": 1600,
            "training_s": 120.0,
        }
        for factor in (1, 4)
    }
    lines = table(models, points).splitlines()
    assert [line.split()[0] for line in lines] == ["f", "1", "4"]
    assert "40.0" in lines[1]
    assert "10.0" in lines[2]


def test_samples_of_all_models_stand_below_each_other(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, runs=tmp_path)
    for factor, images, colour in ((1, 16, "black"), (1, 32, "red"), (4, 16, "blue")):
        folder = study.folder(factor, "over_training") / f"images-{images:010d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (80, 20), colour).save(folder / "samples.png")
    samples_sheet(study, (1, 4), tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as sheet:
        assert sheet.size == (80, 40)
        assert sheet.getpixel((5, 5)) == (255, 0, 0)  # the last checkpoint's
        assert sheet.getpixel((5, 25)) == (0, 0, 255)


def test_without_the_data_the_command_that_makes_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "nowhere.json"])
    assert "ldm-scale prepare openmoji" in capsys.readouterr().err


def test_a_failed_command_names_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "manifest.json"
    data.write_text("{}")
    runs = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(["--data", str(data), "--factor", "4", *runs]) == 1
    error = capsys.readouterr().err
    assert f"see {tmp_path / 'runs/f4/log.txt'}" in error
    assert "ldm_scale train experiment=openmoji_kl_f4_small" in error


def test_an_interruptions_checkpoint_is_no_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "images-0000000100": 10.0,
        "images-0000000310": 31.0,
        "images-0000000590": 59.0,
        "images-0000000900": 90.0,
    }
    monkeypatch.setattr(compression, "complete_folders", lambda folder: [folder / name for name in seconds])
    monkeypatch.setattr(compression, "read_manifest", lambda path: {"state": {"training_s": seconds[path.name]}})
    study = dataclasses.replace(STUDY, runs=tmp_path)  # 120 seconds, in four parts
    assert study.checkpoints(4) == [], "it is not trained yet"
    seconds["images-0000001180"] = 118.0
    assert [path.name[-4:] for path in study.checkpoints(4)] == ["0310", "0590", "0900", "1180"]


def test_models_that_trained_unequally_long_are_not_compared() -> None:
    committed = json.loads((RESULTS / "compression-cpu-2026-11-27.json").read_text())["results"]["models"]
    study = dataclasses.replace(STUDY, minutes=8.0)
    assert {len(committed), unequal_times(committed, study)} == {5, None}
    committed["f8"]["training_s"] = 500.0  # f = 16 has 466
    found = unequal_times(committed, study) or ""
    assert "f8 trained for 500 s and f16 for 466 s: equal time is within 5%" in found
    assert "sweep in runs/f8; call again" in found


def test_an_out_that_is_a_file_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("file", "manifest.json"):
        (tmp_path / name).write_text("{}")
    data = ["--data", str(tmp_path / "manifest.json")]
    with pytest.raises(ConfigError, match="is no folder to write to"):
        main([*data, "--out", str(tmp_path / "file")])
    for words, why in ((["--steps", "5", "0"], "--steps 0: must be"), (["--minutes", "nan"], "--minutes nan: must be")):
        with pytest.raises(SystemExit):
            main([*data, "--out", str(tmp_path / "out"), *words])
        assert why in capsys.readouterr().err
