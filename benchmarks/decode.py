"""Time of one core from a picture's file to 8-bit RGB at the size of training, with several decoders and resizers.

Each case is a photograph as JPEG, PNG or WebP, cut to a square and brought to a number of pixels, then shown whole at
256. All ways take turns within a round, one thread, process time, median and quartiles over rounds; beside them stands
by how much the result differs from Pillow's antialiased bicubic from the full size (mean, 99.9th percentile, maximum).
`ours` is `data/pictures.py`.

    pip install simplejpeg
    python -m benchmarks.decode [--case jpeg_512] [--rounds 40]
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.harness import Way, take_turns
from benchmarks.measured import command_line, is_trial, parse, spread, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.data.pictures import Picture, resize

Pixels = NDArray[np.uint8]
Decoder = Callable[[bytes], Pixels]

SIDE = 256  # of the result
SHAPE = (SIDE, SIDE)
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "jpeg_256": ("JPEG", 256, {"quality": 90}),
    "jpeg_512": ("JPEG", 512, {"quality": 90}),
    "jpeg_1024": ("JPEG", 1024, {"quality": 90}),
    "png_512": ("PNG", 512, {}),
    "webp_512": ("WEBP", 512, {"quality": 90}),
}
WARMUP_ROUNDS = 2
REFERENCE = "Pillow"
_MODULES = {"pillow": "PIL", "torchvision": "torchvision", "simplejpeg": "simplejpeg"}


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = command_line("Time from a picture's file to pixels.", CASES, "rounds", 40)
    arguments = parse(parser, argv)
    if arguments.device != "cpu":
        parser.error("--device cuda: pictures are decoded on the CPU; leave --device out")
    torch.set_num_threads(1)
    if not find_spec("simplejpeg"):
        print("without simplejpeg, which is not installed")
    results = {name: measure(*CASES[name], arguments.rounds) for name in arguments.case or CASES}
    print(table(results))
    if not is_trial(arguments.rounds, "rounds"):
        packages = [package for package in ("pillow", "torchvision", "simplejpeg") if find_spec(_MODULES[package])]
        versions = {package: version(package) for package in packages}
        versions["libjpeg-turbo in pillow"] = str(features.version_feature("libjpeg_turbo"))
        write_results(arguments.out, "decode", torch.device("cpu"), {"versions": versions, "cases": results})
    return 0


def photograph(form: str, side: int, options: dict[str, Any]) -> bytes:
    """A photograph that comes with matplotlib as a square file."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    square = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box=(0, 0, 512, 512))
    buffer = io.BytesIO()
    square.save(buffer, form, **options)
    return buffer.getvalue()


def measure(form: str, side: int, options: dict[str, Any], num_rounds: int) -> dict[str, Any]:
    """Times, ratios to Pillow's and deviations from Pillow's of every way for one file."""
    data = photograph(form, side, options)
    ways = (_ways() | _jpeg_ways()) if form == "JPEG" else _ways()
    timed = {name: Way(partial(_seconds, way, data), times_itself=True) for name, way in ways.items()}
    label, clock = f"{form} {side}", time.process_time
    turns = take_turns(timed, num_rounds, warmup=WARMUP_ROUNDS, clock=clock, name=label)
    wanted = ways[REFERENCE](data).astype(int)
    deviations = {name: np.abs(way(data) - wanted) for name, way in ways.items()}
    return {
        "bytes": len(data),
        "image_s": turns.spreads(),
        "speed_over_pillow": {name: spread(turns.ratios(REFERENCE, name)) for name in ways},
        "deviation_of_255": {
            name: {"mean": float(d.mean()), "percentile_99_9": float(np.percentile(d, 99.9)), "max": int(d.max())}
            for name, d in deviations.items()
        },
    }


def _seconds(way: Decoder, data: bytes) -> float:
    """Of one of two passes in a row: the first finds the caches as another way left them."""
    begin_s = time.process_time()
    way(data)
    way(data)
    return (time.process_time() - begin_s) / 2


def table(results: dict[str, Any]) -> str:
    """A line per case and way."""
    lines = [f"{'':<42}{'images/s':>9}{'ms':>8}{'quartiles':>16}{'x Pillow':>9}  deviation: mean, 99.9 %, max"]
    for case, result in results.items():
        for name, times in result["image_s"].items():
            ms = {key: value * 1e3 for key, value in times.items()}
            off = result["deviation_of_255"][name]
            lines.append(
                f"{case + ', ' + name:<42}{1e3 / ms['median']:>9.0f}{ms['median']:>8.2f}"
                f"{ms['lower_quartile']:>8.2f}..{ms['upper_quartile']:<6.2f}"
                f"{result['speed_over_pillow'][name]['median']:>9.2f}"
                f"  {off['mean']:.3f}, {off['percentile_99_9']:.0f}, {off['max']}"
            )
    return "\n".join(lines)


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))


def _by_pillow(image: Image.Image) -> Pixels:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _draft(data: bytes) -> Image.Image:
    """With two pixels for each of the result at least."""
    image = _open(data)
    image.draft(None, (2 * SIDE, 2 * SIDE))
    image.load()
    return image


def _ways() -> dict[str, Decoder]:
    """Those for any format."""

    def ours(data: bytes) -> Pixels:
        picture = Picture(data)
        return picture.render((0, 0, *picture.size), False, SHAPE)

    return {
        REFERENCE: lambda data: _by_pillow(_open(data).convert("RGB")),
        "Pillow + torch": lambda data: resize(np.array(_open(data).convert("RGB")), SHAPE),
        "ours": ours,
    }


def _jpeg_ways() -> dict[str, Decoder]:
    """Those for JPEG alone."""

    def torchvision(data: bytes) -> Pixels:
        decoded = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return resize(decoded.permute(1, 2, 0).contiguous().numpy(), SHAPE)

    ways: dict[str, Decoder] = {
        "Pillow, draft": lambda data: _by_pillow(_draft(data)),
        "Pillow, draft + torch": lambda data: resize(np.array(_draft(data)), SHAPE),
        "torchvision + torch": torchvision,
    }
    if not find_spec("simplejpeg"):
        return ways
    from simplejpeg import decode_jpeg as simple

    scaled = {"min_height": 2 * SIDE, "min_width": 2 * SIDE}
    fast = {"fastdct": True, "fastupsample": True}
    return ways | {
        "simplejpeg + Pillow": lambda data: _by_pillow(Image.fromarray(simple(data))),
        "simplejpeg + torch": lambda data: resize(simple(data), SHAPE),
        "simplejpeg, scaled + torch": lambda data: resize(simple(data, **scaled), SHAPE),
        "simplejpeg, scaled, fast + torch": lambda data: resize(simple(data, **scaled, **fast), SHAPE),
    }


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
