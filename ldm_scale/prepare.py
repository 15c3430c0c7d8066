"""`ldm-scale prepare`: from OpenMoji, a folder of images or existing tars to webdataset shards and a manifest."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from ldm_scale.data.sources import Prepared
from ldm_scale.data.sources.image_folder import prepare_image_folder
from ldm_scale.data.sources.openmoji import SHIPPED_SUBSETS, WITHOUT_SKIN_TONES, prepare_openmoji
from ldm_scale.data.sources.tars import index_tars


def _positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _percent(text: str) -> float:
    """An argument that is a share in percent, below 100."""
    number = float(text)
    if not 0.0 <= number < 100.0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 100")
    return number


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ldm-scale prepare", description="Write webdataset shards and their manifest."
    )
    sources = parser.add_subparsers(dest="source", required=True)

    rendered = argparse.ArgumentParser(add_help=False)
    rendered.add_argument("--resolution", type=_positive, required=True, help="pixels along each side")
    rendered.add_argument("--out", type=Path, required=True, help="folder to make; reused if it answers this request")
    rendered.add_argument(
        "--heldout-percent", type=_percent, help="share of the held-out split (5; of a listed subset 0)"
    )
    rendered.add_argument("--samples-per-shard", type=_positive, default=256, help="default 256")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object instead of words")

    openmoji = sources.add_parser("openmoji", parents=[rendered, output], help="render OpenMoji's colour emoji")
    shipped = ", ".join((*SHIPPED_SUBSETS, WITHOUT_SKIN_TONES))
    openmoji.add_argument("--subset", help=f"file with one key (1F34E) per line, or one of {shipped}")

    folder = sources.add_parser("image-folder", parents=[rendered, output], help="images below a folder")
    folder.add_argument(
        "folder", type=Path, metavar="DIR", help="sub-folders are classes, NAME.txt is NAME.png's caption"
    )

    index = sources.add_parser("index", parents=[output], help="existing webdataset tars, left as they are")
    index.add_argument("shards", type=Path, nargs="+", metavar="SHARDS", help="uncompressed tars")
    index.add_argument("--out", type=Path, required=True, metavar="MANIFEST", help="manifest to write or to add to")
    index.add_argument("--split", default="train", help="name of the split that the shards make (train)")
    return parser


def _prepare(arguments: argparse.Namespace) -> Prepared:
    """What the arguments ask for."""
    if arguments.source == "index":
        return index_tars(arguments.shards, arguments.out, arguments.split)
    percent: float | None = arguments.heldout_percent
    if arguments.source == "image-folder":
        return prepare_image_folder(
            arguments.folder,
            arguments.out,
            arguments.resolution,
            5.0 if percent is None else percent,
            arguments.samples_per_shard,
        )
    if percent is None:
        percent = 5.0 if arguments.subset in (None, WITHOUT_SKIN_TONES) else 0.0
    return prepare_openmoji(arguments.out, arguments.resolution, arguments.subset, percent, arguments.samples_per_shard)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0.

    Raises: DataError if the source or the destination cannot be used.
    """
    arguments = _parser().parse_args(argv)
    started = time.monotonic()
    prepared = _prepare(arguments)
    manifest = prepared.manifest
    splits = {name: split["num_samples"] for name, split in manifest["splits"].items()}
    if arguments.json:
        result = {
            "manifest": str(prepared.manifest_path),
            "status": "reused" if prepared.reused else "written",
            "splits": splits,
            "left_out": manifest.get("left_out", {}),
            "seconds": round(time.monotonic() - started, 3),
        }
        print(json.dumps(result, ensure_ascii=False))
        return 0
    counts = ", ".join(f"{name} {count}" for name, count in splits.items())
    print(f"{'reused' if prepared.reused else 'written'}: {prepared.manifest_path} ({counts} samples)")
    for reason, count in manifest.get("left_out", {}).items():
        print(f"left out: {count} ({reason})")
    for name in manifest.get("left_out_names", []):
        print(f"  {name}")
    if manifest.get("attribution"):
        print(manifest["attribution"])
    return 0
