"""Outputs are local, and what a command line shows of itself is without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

import ldm_scale
from ldm_scale.__main__ import main

CANARY = "canary7secret"
URL = f"s3://user:{CANARY}@bucket/folder?sig={CANARY}"
SOURCES = ("openmoji", "openmoji-scenes", "coco", "image-folder", "table", "index", "filter", "buckets", "mix")
OUTPUTS = [
    *(("prepare", source, "--out") for source in SOURCES),
    *(("evaluate", action, "--out") for action in ("autoencoder", "diffusion", "rate-distortion")),
    *((command, "--out") for command in ("encode", "export", "sample", "replay")),
    ("sample", "--images-dir"),
    ("doctor", "data", "--sheet"),
    ("demo", "--data"),
    ("demo", "--runs"),
]


@pytest.mark.parametrize("option", OUTPUTS, ids=" ".join)
def test_a_url_is_no_place_for_results(
    option: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if option[0] == "demo":  # it lacks nothing, and would begin
        monkeypatch.setattr("ldm_scale.operations.demo.run_demo", lambda *_: 1)
    assert main([*option, URL]) == 2
    output, errors = capsys.readouterr()
    assert (output, errors.count("\n")) == ("", 1)
    assert errors.startswith("error: s3://bucket/folder: this is a URL, and results are written to local files")


def test_a_run_folder_is_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=demo_autoencoder", f"run_dir={URL}"]) == 2
    assert capsys.readouterr().err.startswith("error: run_dir=s3://bucket/folder: this is a URL, and results are")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [URL],
        ["doctor", URL],
        ["plan", URL],
        ["evaluate", URL],
        ["export", "x", "--out", "y", "--to", URL],
        ["encode", "x", "y", "--out", "z", URL],
        ["encode", "x", "y", "--out", "z", "--batch", URL],
        ["replay", "x", f"--outt={URL}"],
        ["train", f"experiment={URL}"],
    ],
    ids=lambda arguments: " ".join(arguments[:-1]),
)
def test_a_wrong_command_line_shows_no_secret(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    output, errors = capsys.readouterr()
    assert (status, output) == (2, "")
    assert "error: " in errors
    assert CANARY not in errors


def test_every_parser_is_one_of_ours() -> None:
    sources = Path(ldm_scale.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "argparse.ArgumentParser(" in path.read_text()] == []
