"""The command `ldm-scale doctor`: help, exit statuses, one JSON object, sub-commands that stand for themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_scale import doctor
from ldm_scale.__main__ import main
from ldm_scale.operations.doctor_report import Finding, Report
from tests.helpers.shards import make_dataset


def test_without_a_subject_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out == f"{doctor.help_text()}\n" * 2
    assert all(f"  {name} " in doctor.help_text() for name in ("data", "machine", "latents"))


def test_an_unknown_subject_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "date"])
    assert caught.value.code == 2
    assert "invalid choice: 'date'" in capsys.readouterr().err


@pytest.mark.parametrize("subject", doctor.SUBJECTS)
def test_every_subject_has_help(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", subject, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_findings_are_lines_and_errors_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_dataset(tmp_path, splits=("train", "heldout"))
    assert main(["doctor", "data", str(manifest), "--resolution", "32"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"doctor data {manifest}\nok      train: 3 shards, 24 samples")
    assert out.splitlines()[-1].startswith("0 errors, ")
    (tmp_path / "train-000001.tar").unlink()
    assert main(["doctor", "data", str(manifest), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 1
    (error,) = [finding for finding in report["findings"] if finding["level"] == "error"]
    assert "train-000001.tar" in error["what"]
    assert report["facts"]["splits"]["train"]["usable"] == 16


def test_a_subject_whose_module_is_missing_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ldm_scale.operations.doctor_latents", None)
    monkeypatch.setitem(sys.modules, "ldm_scale.operations.doctor_machine", None)
    assert main(["doctor", "data", str(make_dataset(tmp_path))]) == 0


@pytest.mark.rest
def test_the_machine_as_one_json_object(tmp_path: Path) -> None:
    overrides = ["experiment=demo_text", f"run_dir={tmp_path / 'run'}", "train.device=cpu", "train.global_batch=2"]
    done = subprocess.run(
        [sys.executable, "-m", "ldm_scale", "doctor", "machine", *overrides, "--json"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)["facts"]
    assert facts["step"]["experiment"] == "demo_text"
    assert facts["step"]["images_per_s"] > 0
    assert facts["ranks"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_configuration_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "machine", "experiment=demo_txt"]) == 2
    assert capsys.readouterr().err.startswith("error: experiment=demo_txt: ")
    assert main(["doctor", "machine", "data.resolution=30"]) == 2


def test_a_report_is_one_line_per_finding() -> None:
    report = Report("x")
    report.ok("fine")
    report.warning("slow", "disk", "buy another")
    assert report.exit_code == 0
    report.error("gone", "a.tar/k")
    report.extend([Finding("ok", "last")])
    assert report.exit_code == 1
    assert report.text().splitlines() == [
        "doctor x",
        "ok      fine",
        "warning disk: slow; buy another",
        "error   a.tar/k: gone",
        "ok      last",
        "1 errors, 1 warnings",
    ]
    assert report.as_dict()["findings"][1] == {
        "level": "warning",
        "what": "slow",
        "where": "disk",
        "fix": "buy another",
    }
