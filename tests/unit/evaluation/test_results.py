"""Results as files and tables, and the refusal to set different protocols side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.results import (
    Result,
    comparison_table,
    read_result,
    require_one_protocol,
    result_text,
    unique_labels,
    write_result,
)
from tests.helpers.evaluations import identity_result, kl_result, vq_result


def as_result(document: dict[str, Any], source: str = "a.json") -> Result:
    return Result(source, document["model"], document["protocol"], document["figures"])


def test_a_result_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    path = write_result(tmp_path / "new" / "folder", kl_result())
    assert read_result(path) == read_result(path.parent)
    assert read_result(path).figures == kl_result()["figures"]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file; `ldm-scale evaluate "),
        ("{", "cannot be read"),
        ("[]", "not a result of"),
        ('{"format": "other"}', "not a result of"),
        (json.dumps(kl_result() | {"version": 2}), "result version 2, this program reads 1"),
        (json.dumps(kl_result() | {"figures": {}}), r"incomplete or damaged \(KeyError: 'perceptual'\); evaluate"),
        (json.dumps(kl_result() | {"figures": kl_result()["figures"] | {"rate": 3}}), "incomplete or damaged"),
        (json.dumps(kl_result() | {"figures": None}), "model, protocol or figures are missing"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"r\.json.*{expected}"):
        read_result(path)


def test_a_result_is_there_once_its_pictures_are(tmp_path: Path) -> None:
    write_result(tmp_path, kl_result(), {"picture.png": b"first"})
    before = (tmp_path / "result.json").read_bytes()
    (tmp_path / "other.png").mkdir()
    with pytest.raises(OSError, match=r"other\.png"):
        write_result(tmp_path, vq_result(), {"other.png": b"second"})
    assert (tmp_path / "result.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.png", "picture.png", "result.json"]


def test_models_may_differ_under_one_protocol() -> None:
    require_one_protocol([as_result(document) for document in (kl_result(), vq_result(), identity_result())])


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("resolution", 128, "resolution is 64 and 128;"),
        ("data.num_images", 50, "data.num_images is 100 and 50;"),
        ("data.pixels_digest", "f", f"data.pixels_digest is '{'e' * 32}' and 'f';"),
        ("program_version", "0.2.0", "program_version is '0.1.0' and '0.2.0';"),
        ("new", True, "new is 'nothing' and True;"),
    ],
)
def test_another_protocol_is_refused_with_the_field_and_both_values(field: str, value: object, expected: str) -> None:
    other = vq_result()
    place, _, name = field.rpartition(".")
    (other["protocol"][place] if place else other["protocol"])[name] = value
    with pytest.raises(ConfigError, match=r"^a\.json and b\.json were measured under different protocols") as caught:
        require_one_protocol([as_result(kl_result()), as_result(kl_result()), as_result(other, "b.json")])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_table_has_a_column_for_each_model() -> None:
    results = [as_result(document) for document in (kl_result(), vq_result(), identity_result())]
    lines = [line.split("  ") for line in comparison_table(results).splitlines()]
    rows = {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}
    assert rows[""] == ["kl-f4-c3", "vq-f8-n256-c4", "identity-f1-c3"]
    assert rows["PSNR, dB"] == ["25.00 +- 2.00", "22.00 +- 2.00", "exact"]
    assert rows["codes used"] == ["-", "75.0% in 6400 choices", "-"]
    assert rows["perplexity of the codes"] == ["-", "200.5", "-"]
    assert rows["FD-EffNetLite0-PCA32, original halves (floor)"] == ["8.000"] * 3
    assert rows["stored bits per pixel"] == ["-", "-", "24.0000"]


def test_only_lpips_is_called_psim() -> None:
    document = kl_result()
    assert "PSIM" not in comparison_table([as_result(document)])
    document["figures"]["perceptual"]["name"] = "LPIPS-VGG"
    assert "LPIPS-VGG (the paper's PSIM)" in comparison_table([as_result(document)])


def test_text_names_what_was_left_out() -> None:
    document = kl_result()
    document["bad_images"] = {"count": 1, "reasons": {"x": 1}, "names": {"shard/key": "image does not decode"}}
    document["figures"]["frechet"]["not_measured"] = "4 images, at least 33 are needed"
    text = result_text(document)
    assert "left out: 1 images\n  shard/key: image does not decode" in text
    assert "FD-EffNetLite0-PCA32: 4 images, at least 33 are needed" in text
    assert "data.digest" in text


def test_labels_are_told_apart() -> None:
    a, b, c = (as_result(kl_result(), source) for source in ("one/result.json", "two/result.json", "two/again.json"))
    assert unique_labels([a]) == ["kl-f4-c3"]
    assert unique_labels([a, b]) == ["kl-f4-c3 one", "kl-f4-c3 two"]
    assert unique_labels([b, c]) == ["kl-f4-c3 two #1", "kl-f4-c3 two #2"]
