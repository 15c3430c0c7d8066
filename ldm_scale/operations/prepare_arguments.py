"""What `ldm-scale prepare` understands: its sources, their options, and which values those may have."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_scale.command_line import Parser, output_path
from ldm_scale.data.sources.openmoji import SHIPPED_SUBSETS, WITHOUT_SKIN_TONES
from ldm_scale.data.sources.openmoji_scenes import DEFAULT_SUBSET
from ldm_scale.data.sources.scenes import BACKGROUNDS

_MAX_RESOLUTION = 8192  # of one picture in memory: 200 MB


def _positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _resolution(text: str) -> int:
    """An argument that is a side of pictures in pixels."""
    number = _positive(text)
    if number > _MAX_RESOLUTION:
        raise argparse.ArgumentTypeError(f"{text} must be at most {_MAX_RESOLUTION}")
    return number


def _percent(text: str) -> float:
    """An argument that is a share in percent, below 100."""
    number = float(text)
    if not 0.0 <= number < 100.0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 100")
    return number


def _share(text: str) -> float:
    """An argument that is a share of 1."""
    number = float(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to 1")
    return number


def _aspect(text: str) -> float:
    """An argument that is a ratio of the longer side to the shorter."""
    number = float(text)
    if not 1.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be at least 1: it is the longer side by the shorter")
    return number


def _named_number(text: str) -> tuple[str, float]:
    """An argument NAME=X with a number X; the name may hold equals signs."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not equals or not name or not float("-inf") < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a name, an equals sign and a number")
    return name, value


def build_parser() -> argparse.ArgumentParser:
    """The command line of `ldm-scale prepare`."""
    parser = Parser(prog="ldm-scale prepare", description="Write webdataset shards and their manifest.")
    sources = parser.add_subparsers(dest="source", required=True)

    written = Parser(add_help=False)
    written.add_argument("--resolution", type=_resolution, required=True, help="pixels along each side")
    written.add_argument(
        "--out", type=output_path, required=True, help="folder to make; reused if it answers this request"
    )
    written.add_argument("--samples-per-shard", type=_positive, default=256, help="default 256")
    written.add_argument("--workers", type=_positive, help="processes that make shards (one per processor)")
    licensed = Parser(add_help=False)
    licensed.add_argument(
        "--license", metavar="TEXT", help="licence of the pictures, for the manifest: SPDX's or words"
    )
    rendered = Parser(add_help=False, parents=[written])
    rendered.add_argument(
        "--heldout-percent", type=_percent, help="share of the held-out split (5; of a listed subset 0)"
    )
    lists = Parser(add_help=False)
    lists.add_argument("--object-classes", type=Path, metavar="FILE", help="classes of the boxes, one name per line")
    lists.add_argument("--map-labels", type=Path, metavar="FILE", help="labels of the maps, one name per line, from 0")
    output = Parser(add_help=False)
    output.add_argument("--json", action="store_true", help="print one JSON object instead of words")

    openmoji = sources.add_parser("openmoji", parents=[rendered, output], help="render OpenMoji's colour emoji")
    shipped = ", ".join((*SHIPPED_SUBSETS, WITHOUT_SKIN_TONES))
    openmoji.add_argument("--subset", help=f"file with one key (1F34E) per line, or one of {shipped}")

    scenes = sources.add_parser(
        "openmoji-scenes", parents=[rendered, output], help="emoji on backgrounds, with captions, boxes and maps"
    )
    scenes.add_argument("--num-samples", type=_positive, required=True, help="scenes; more leave the first as they are")
    scenes.add_argument("--seed", type=int, default=0, help="another one draws other scenes (0)")
    scenes.add_argument("--max-objects", type=_positive, default=3, help="emoji in a scene, from 1 up (3)")
    scenes.add_argument(
        "--backgrounds",
        choices=tuple(BACKGROUNDS),
        default="all",
        help="all; plain: colours and gradients, no stripes, checks and dots; white: what small models can learn (all)",
    )
    scenes.add_argument(
        "--subset", default=DEFAULT_SUBSET, help=f"emoji that are its classes, as for openmoji ({DEFAULT_SUBSET})"
    )

    _add_coco(sources.add_parser("coco", parents=[written, licensed, output], help="images with COCO's annotations"))

    folder = sources.add_parser(
        "image-folder", parents=[rendered, lists, licensed, output], help="images below a folder"
    )
    folder.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="sub-folders are classes; beside NAME.png, NAME.txt is its caption, NAME.json has its boxes, NAME.seg.png "
        "is its map",
    )

    _add_table(sources.add_parser("table", parents=[rendered, licensed, output], help="images that a table lists"))
    _add_index(sources.add_parser("index", parents=[lists, output], help="existing webdataset tars, left as they are"))
    _add_filter(sources.add_parser("filter", parents=[output], help="a manifest of the samples that meet some rules"))
    _add_buckets(sources.add_parser("buckets", parents=[output], help="a manifest with aspect-ratio buckets"))
    mix = sources.add_parser("mix", parents=[output], help="a manifest that draws from others in fixed shares")
    mix.add_argument("manifests", type=_named_number, nargs="+", metavar="MANIFEST=WEIGHT", help="weights above 0")
    mix.add_argument("--out", type=output_path, required=True, metavar="MANIFEST", help="manifest to write")
    return parser


def _add_table(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows the options of tables."""
    parser.add_argument("table", type=Path, metavar="FILE", help=".csv or .tsv with a line of names, or .parquet")
    parser.add_argument("--image-column", required=True, metavar="NAME", help="paths of the images")
    parser.add_argument("--caption-column", metavar="NAME", help="a caption, or in Parquet a list of them")
    parser.add_argument("--class-column", metavar="NAME", help="names, or numbers from 0")
    parser.add_argument("--keep", metavar="NAME,...", default="", help="columns that the samples' .json shall have too")
    parser.add_argument("--base", type=Path, metavar="DIR", help="what paths are relative to (the folder of FILE)")


def _add_index(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows the options of the index."""
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="uncompressed tars: paths, URLs, globs, {00..99}")
    parser.add_argument(
        "--out", type=output_path, required=True, metavar="MANIFEST", help="manifest to write or to add to"
    )
    parser.add_argument("--split", default="train", help="name of the split that the shards make (train)")
    parser.add_argument("--workers", type=_positive, help="processes (one per core)")
    parser.add_argument(
        "--checksums",
        action=argparse.BooleanOptionalAction,
        help="read every byte, for checksums of shards and members (of local shards yes, of remote ones no)",
    )
    parser.add_argument(
        "--max-bad", type=_share, default=0.5, help="leave a shard out if more of its samples are unusable (0.5)"
    )
    parser.add_argument(
        "--max-bad-total", type=_share, default=0.1, help="fail if more of all samples are left out (0.1)"
    )


def _add_filter(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows the options of the filter."""
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest of the images to choose from")
    parser.add_argument("--out", type=output_path, required=True, metavar="MANIFEST2", help="manifest to write")
    parser.add_argument("--split", action="append", metavar="NAME", help="may be repeated (default: every split)")
    parser.add_argument("--min-side", type=_positive, metavar="PX", help="shorter side at least")
    parser.add_argument("--max-side", type=_positive, metavar="PX", help="longer side at most")
    parser.add_argument("--min-pixels", type=_positive, metavar="N", help="width x height at least")
    parser.add_argument("--max-aspect", type=_aspect, metavar="R", help="longer side by shorter at most")
    for least, word in (("min", "least"), ("max", "most")):
        parser.add_argument(
            f"--{least}-score",
            type=_named_number,
            action="append",
            default=[],
            metavar="NAME=X",
            help=f"number NAME of the sample's json at {word}; may be repeated",
        )
    parser.add_argument(
        "--min-caption-length", type=_positive, metavar="N", help="characters of the shortest caption at least"
    )
    parser.add_argument("--workers", type=_positive, help="processes (one per core)")


def _add_buckets(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows the options of the buckets."""
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="manifest of the images to group")
    parser.add_argument("--out", type=output_path, required=True, metavar="MANIFEST2", help="manifest to write")
    parser.add_argument("--resolution", type=_resolution, required=True, help="side of the square of the largest area")
    parser.add_argument("--step", type=_positive, default=64, help="sides are multiples of it (64)")
    parser.add_argument("--max-aspect", type=_aspect, default=2.0, help="longer side by shorter at most (2)")
    parser.add_argument("--min-share", type=_share, default=0.001, help="smaller buckets join their neighbours (0.001)")
    parser.add_argument("--workers", type=_positive, help="processes (one per core)")


def _add_coco(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows the options of COCO."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--instances", type=Path, required=True, metavar="FILE", help="such as instances_train2017.json"
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="such as captions_train2017.json")
    parser.add_argument("--split", required=True, help="name of the split to make, such as train or heldout")
    parser.add_argument("--min-objects", type=int, default=0, help="leave images with fewer out (0)")
    maps = parser.add_mutually_exclusive_group()
    maps.add_argument("--stuff", type=Path, metavar="DIR", help="COCO-Stuff's label maps, NAME.png for NAME.jpg")
    maps.add_argument("--instance-maps", action="store_true", help="label maps drawn from the instances' outlines")
    maps.add_argument("--panoptic", type=Path, metavar="FILE", help="label maps from panoptic_train2017.json and")
    parser.add_argument("--panoptic-maps", type=Path, metavar="DIR", help="the folder of its PNGs")
    parser.add_argument("--map-labels", type=Path, metavar="FILE", help="labels of --stuff, one name per line, from 0")
