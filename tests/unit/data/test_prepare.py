"""Images of a user: a folder of pictures, tars of other programs, and the command line around them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader, open_manifest
from ldm_scale.data.sources.image_folder import list_images, prepare_image_folder, sample_name
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.errors import DataError
from ldm_scale.prepare import main
from tests.helpers.shards import make_dataset, png, write_tar


def _bytes(member: bytes | str) -> bytes:
    assert isinstance(member, bytes)
    return member


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    (folder / "big-dogs" / "old").mkdir(parents=True)
    (folder / "cats").mkdir()
    (folder / ".cache").mkdir()
    for name, color in (
        ("cats/a.b.png", "red"),
        ("cats/c.JPG", "blue"),
        ("big-dogs/old/rex.webp", "green"),
        ("root.png", "white"),
    ):
        image = Image.new("RGB", (40, 20), "black")
        image.paste(color, (10, 0, 30, 20))
        image.save(folder / name)
    Image.new("RGB", (4, 4)).save(folder / ".cache" / "thumb.png")
    (folder / "cats" / "c.txt").write_text("a blue caf\u00e9 cat\n")
    (folder / "notes.md").write_text("no image")
    return folder


def test_a_folder_becomes_captioned_classified_squares(tmp_path: Path, pictures: Path) -> None:
    prepared = prepare_image_folder(pictures, tmp_path / "out", 8, 0.0, 100)
    assert prepared.manifest["classes"] == ["big-dogs", "cats", "pets"]
    dataset = open_manifest(prepared.manifest_path, "train")
    samples = {json.loads(raw["json"])["file"]: raw for raw in (dataset.read(n) for n in range(dataset.num_samples))}
    captions = {name: _bytes(raw["txt"]).decode() for name, raw in samples.items()}
    assert captions == {
        "big-dogs/old/rex.webp": "big dogs",
        "cats/a.b.png": "cats",
        "cats/c.JPG": "a blue caf\u00e9 cat",
        "root.png": "pets",
    }
    assert json.loads(samples["cats/c.JPG"]["json"])["class"] == 1
    red = np.asarray(Image.open(io.BytesIO(_bytes(samples["cats/a.b.png"]["png"]))))
    assert red.shape == (8, 8, 3)
    assert (red[:, 2:-2] == (255, 0, 0)).all()
    loader = build_loader(
        DataConfig(manifest=str(prepared.manifest_path), resolution=8, num_workers=0),
        seed=0,
        global_batch=4,
        micro_batch=4,
        rank=0,
        world_size=1,
        num_epochs=1,
    )
    assert sorted(next(iter(loader)).classes.tolist()) == [0, 1, 1, 2]
    assert prepare_image_folder(pictures, tmp_path / "out", 8, 0.0, 100).reused


@pytest.fixture
def annotated(pictures: Path) -> Path:
    """The pictures with boxes and label maps, and the files that name them in `pictures`' parent."""
    for image in ("cats/a.b", "cats/c", "big-dogs/old/rex", "root"):
        box = {"class": "ear", "box": [12, 5, 8, 10]}
        (pictures / f"{image}.json").write_text(json.dumps({"objects": [box, {"class": 1, "box": [0, 0, 5, 5]}]}))
        labels = Image.new("L", (40, 20))
        labels.paste(1, (12, 5, 20, 15))
        labels.save(pictures / f"{image}.seg.png")
    (pictures.parent / "objects.txt").write_text("tail\near\n")
    (pictures.parent / "labels.txt").write_text("nothing\near\n")
    return pictures


def _lists(folder: Path) -> list[str]:
    parent = folder.parent
    return ["--object-classes", str(parent / "objects.txt"), "--map-labels", str(parent / "labels.txt")]


def test_boxes_and_maps_of_a_folder_follow_its_squares(tmp_path: Path, annotated: Path) -> None:
    arguments = ["image-folder", str(annotated), "--resolution", "10", "--heldout-percent", "0"]
    assert main([*arguments, "--out", str(tmp_path / "out"), *_lists(annotated)]) == 0
    dataset = open_manifest(tmp_path / "out", "train")
    assert dataset.num_samples == 4  # no map is taken for a picture
    assert (dataset.object_classes, dataset.map_labels) == (("tail", "ear"), ("nothing", "ear"))
    for sample in map(dataset.read, range(4)):
        # The square is x from 10 to 30, at half the size; the other box is outside it.
        assert json.loads(sample["json"])["objects"] == [{"class": 1, "box": [1.0, 2.5, 4.0, 5.0]}]
        labels = np.asarray(Image.open(io.BytesIO(_bytes(sample["seg.png"]))))
        assert (labels[3:7, 1:5] == 1).all()
        assert labels.sum() <= 4 * 6
    (annotated / "root.json").write_text('{"objects": []}')
    with pytest.raises(DataError, match="listing="):
        main([*arguments, "--out", str(tmp_path / "out"), *_lists(annotated)])
    assert main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    dataset = open_manifest(tmp_path / "plain", "train")
    assert (dataset.num_samples, dataset.object_classes, dataset.map_labels) == (4, (), ())
    assert "seg.png" not in dataset.read(0)


def test_images_whose_annotations_cannot_be_used_are_left_out(tmp_path: Path, annotated: Path) -> None:
    (annotated / "root.json").unlink()
    (annotated / "cats" / "a.b.json").write_text("[]")
    Image.new("L", (20, 40)).save(annotated / "cats" / "c.seg.png")
    arguments = ["image-folder", str(annotated), "--resolution", "10", "--heldout-percent", "0"]
    assert main([*arguments, "--out", str(tmp_path / "out"), *_lists(annotated)]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out_names"] == [
        "cats/a.b.png: metadata is not a JSON object",
        "cats/c.JPG: label map has another size than its picture",
        'root.png: no "objects" in its .json',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no name; give each name once, one per line"),
        (b"a\nb\na\n", "has 'a' twice"),
        (b"\xff", "cannot be read as UTF-8 text"),
        (None, "cannot be read as UTF-8 text .*No such file"),
        ("\n".join(map(str, range(256))).encode(), "256 names, and a map of 8 bits tells 255 apart"),
    ],
)
def test_lists_of_names_that_cannot_be_used(tmp_path: Path, annotated: Path, text: bytes | None, message: str) -> None:
    path = tmp_path / "names.txt"
    if text is not None:
        path.write_bytes(text)
    arguments = ["image-folder", str(annotated), "--resolution", "10", "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=f"--map-labels .*names.txt: {message}"):
        main([*arguments, "--map-labels", str(path)])


def test_tars_with_boxes_and_maps_get_their_names(tmp_path: Path, annotated: Path) -> None:
    members = {"png": png(Image.new("RGB", (4, 4))), "json": b'{"objects": []}'}
    tars = [write_tar(tmp_path / f"{name}.tar", [(name, members)]) for name in ("one", "two")]
    out = tmp_path / "m.json"
    names = (["tail", "ear"], ["nothing", "ear"])
    index_tars(tars[:1], out, "train", *names)
    index_tars(tars[1:], out, "heldout")  # as the first split says
    for split in ("train", "heldout"):
        dataset = open_manifest(out, split)
        assert (dataset.object_classes, dataset.map_labels) == (("tail", "ear"), ("nothing", "ear"))
    assert index_tars(tars[:1], out, "train", *names).reused
    with pytest.raises(DataError, match="its object_classes are not those of --object-classes; give the same list"):
        index_tars(tars[:1], out, "train", ["ear"])


def test_names_of_samples_are_safe_unique_and_stable() -> None:
    names = [sample_name(path) for path in ("a/b.png", "a/b.jpg", "a-b.png", "a/\u00e9 .x.png", "l" * 300 + ".png")]
    assert len(set(names)) == 5
    assert all(len(name) < 90 and set(name.lower()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)
    assert names[0] == "a-b-821a184674"


def test_bad_images_are_left_out_counted_and_named(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "cats" / "broken.png").write_bytes(b"junk")
    (pictures / "cats" / "latin.png").write_bytes(png(Image.new("RGB", (4, 4))))
    (pictures / "cats" / "latin.txt").write_bytes(b"caf\xe9")
    assert (
        main(
            ["image-folder", str(pictures), "--resolution", "8", "--out", str(tmp_path / "o"), "--heldout-percent", "0"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "(train 4 samples)" in out
    assert "left out: 1 (image does not decode)" in out
    assert "cats/broken.png: image does not decode" in out
    assert "cats/latin.png: caption is not UTF-8" in out


def test_the_licence_of_a_folder_is_part_of_its_request(tmp_path: Path, pictures: Path) -> None:
    arguments = ["image-folder", str(pictures), "--resolution", "8", "--heldout-percent", "0", "--workers", "1"]
    assert main([*arguments, "--out", str(tmp_path / "o"), "--license", "CC-BY-4.0"]) == 0
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert (manifest["license"], manifest["request"]["license"]) == ("CC-BY-4.0", "CC-BY-4.0")
    with pytest.raises(DataError, match=r"by another request: .*license=CC-BY-4.0; asked for now"):
        main([*arguments, "--out", str(tmp_path / "o")])
    assert main([*arguments, "--out", str(tmp_path / "p")]) == 0
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["license"] is None
    assert "license" not in manifest["request"]  # as before there were licences: old data sets are found again


def test_a_folder_with_no_usable_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        prepare_image_folder(tmp_path / "none", tmp_path / "o", 8, 0.0, 10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images below it; looked for png, jpg, jpeg, webp"):
        prepare_image_folder(tmp_path / "empty", tmp_path / "o", 8, 0.0, 10)
    (tmp_path / "empty" / "x.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"none of 1 images can be used; x.png: image does not decode"):
        prepare_image_folder(tmp_path / "empty", tmp_path / "o", 8, 0.0, 10)
    assert not (tmp_path / "o").exists()


def test_a_changed_folder_is_another_request(tmp_path: Path, pictures: Path) -> None:
    prepare_image_folder(pictures, tmp_path / "o", 8, 0.0, 10)
    old = (pictures / "root.png").read_bytes()
    Image.new("RGB", (90, 90)).save(pictures / "root.png")
    with pytest.raises(DataError, match="listing="):
        prepare_image_folder(pictures, tmp_path / "o", 8, 0.0, 10)
    (pictures / "root.png").write_bytes(old)
    assert prepare_image_folder(pictures, tmp_path / "o", 8, 0.0, 10).reused
    Image.new("RGB", (9, 9)).save(pictures / "new.png")
    with pytest.raises(DataError, match="listing="):
        prepare_image_folder(pictures, tmp_path / "o", 8, 0.0, 10)
    assert "new.png" in list_images(pictures)


def test_a_folder_is_entered_once_however_it_is_linked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("root/cats/a.png", "root/cats/b.GIF", "root/dogs/c.bmp", "outside/d.png", "outside/deep/e.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    root = tmp_path / "root"
    (root / "dogs" / "loop").symlink_to(root, target_is_directory=True)
    (root / "again").symlink_to(root / "cats", target_is_directory=True)
    for name in ("linked", "twice"):
        (root / name).symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / "outside" / "back").symlink_to(root, target_is_directory=True)
    (root / "scan.tiff").write_bytes(b"II*\0")
    assert list_images(root) == ["cats/a.png", "cats/b.GIF", "dogs/c.bmp", "linked/d.png", "linked/deep/e.jpg"]
    err = capsys.readouterr().err
    for name in ("dogs/loop", "again", "twice", "linked/back"):
        assert f"{root / name}: a link to a folder whose images are read already; not followed" in err
    assert f"{root}: 1 pictures of other kinds, such as scan.tiff, are not looked at; save them as PNG" in err


def test_foreign_tars_are_indexed_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    image = png(Image.new("RGB", (20, 10), "red"))
    jpeg = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(jpeg, format="JPEG")
    # As img2dataset writes them: number, jpg, txt and a json with the caption among much else.
    first = write_tar(
        far / "00000.tar",
        [("000000000", {"jpg": jpeg.getvalue(), "json": b'{"caption": "one", "url": "u"}', "txt": b"one"})],
    )
    second = write_tar(
        near / "00001.tar",
        [
            ("./d.1/x", {"PNG": image, "cls": b"7"}),
            ("__meta__/x", {"json": b"{}"}),
            ("plain", {"PNG": image, "cls": b"2"}),
        ],
    )
    with tarfile.open(second, "a") as archive:
        directory = tarfile.TarInfo("dir")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
    before = [path.read_bytes() for path in (first, second)]
    arguments = ["index", str(second), str(first), "--out", str(near / "m.json"), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["splits"]) == ("written", {"train": 3})
    assert [path.read_bytes() for path in (first, second)] == before
    assert sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.[js]*") if path.suffix != ".jpg"
    ) == [
        "near/00001.index.safetensors",
        "near/m.index/00000.index.safetensors",
        "near/m.json",
    ]
    manifest = json.loads((near / "m.json").read_text())
    assert manifest["classes"] == [str(n) for n in range(8)]
    dataset = open_manifest(near / "m.json", "train")
    assert [dataset.key(n) for n in range(3)] == ["00000/000000000", "00001/./d.1/x", "00001/plain"]
    assert dataset.read(1)["png"] == image
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "reused"


def test_a_second_split_joins_the_manifest(tmp_path: Path) -> None:
    pixel = png(Image.new("RGB", (2, 2)))
    one = write_tar(tmp_path / "one.tar", [("a", {"png": pixel, "cls": b"dog"})])
    two = write_tar(tmp_path / "two.tar", [("a", {"png": pixel, "cls": b"cat"})])
    index_tars([one], tmp_path / "m.json", "train")
    index_tars([two], tmp_path / "m.json", "heldout")
    assert open_manifest(tmp_path / "m.json", "train").read(0)["cls"] == b"dog"
    assert open_manifest(tmp_path / "m.json", "heldout").class_names == ("cat", "dog")
    assert index_tars([one], tmp_path / "m.json", "train").reused
    with pytest.raises(DataError, match="already has a split 'train'"):
        index_tars([two], tmp_path / "m.json", "train")
    with pytest.raises(DataError, match="a second shard with the name one"):
        index_tars([one], tmp_path / "m.json", "third")


def test_tars_that_cannot_be_indexed(tmp_path: Path) -> None:
    pixel = png(Image.new("RGB", (2, 2)))
    out = tmp_path / "m.json"
    with pytest.raises(DataError, match=r"missing.tar: matches nothing"):
        index_tars([tmp_path / "missing.tar"], out, "train")
    with pytest.raises(DataError, match=r"all shards cannot be used: a.tar \(1 x no image"):
        index_tars([write_tar(tmp_path / "a.tar", [("a", {"txt": b"x"})])], out, "train")
    mixed = write_tar(tmp_path / "b.tar", [(n, {"png": pixel, "cls": c}) for n, c in (("a", b"dog"), ("b", b"3"))])
    with pytest.raises(DataError, match="sample b has class 3, others have a name"):
        index_tars([mixed], out, "train")
    with pytest.raises(DataError, match="class numbers are below"):
        index_tars([write_tar(tmp_path / "c.tar", [("a", {"png": pixel, "cls": b"99999999"})])], out, "train")
    other = [write_tar(tmp_path / f"{c}.tar", [("a", {"png": pixel, "cls": c.encode()})]) for c in ("dog", "3")]
    with pytest.raises(DataError, match=r"dog.tar: its classes are names, those of other shards are numbers"):
        index_tars(other, out, "train")
    assert not out.exists()


def test_a_manifest_of_another_source_is_not_added_to(tmp_path: Path) -> None:
    assert main(["openmoji", "--subset", "demo", "--resolution", "8", "--out", str(tmp_path / "o")]) == 0
    tar = write_tar(tmp_path / "x.tar", [("a", {"png": png(Image.new("RGB", (2, 2)))})])
    with pytest.raises(DataError, match="not made by `ldm-scale prepare index`"):
        index_tars([tar], tmp_path / "o" / "manifest.json", "extra")


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["openmoji", "--subset", "demo", "--resolution", "8", "--out", str(tmp_path / "o")]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.out.startswith(f"written: {tmp_path}/o/manifest.json (train 64 samples)")
    assert "CC BY-SA 4.0" in first.out
    assert "images/s" in first.err
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("reused: ")
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "reused"
    assert result["splits"] == {"train": 64}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resolution", "0"],
        ["--resolution", "8", "--heldout-percent", "100"],
        ["--resolution", "8", "--samples-per-shard", "0"],
    ],
)
def test_impossible_arguments_end_with_usage(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["openmoji", "--out", str(tmp_path / "o"), *arguments])
    assert caught.value.code == 2


def test_the_helper_of_other_tests_makes_what_it_promises(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, num_samples=10, samples_per_shard=4, splits=("train", "heldout"))
    for split in ("train", "heldout"):
        dataset = open_manifest(manifest, split)
        assert dataset.num_samples == 10
        assert [shard.num_samples for shard in dataset.shards] == [4, 4, 2]
