"""What all command lines have in common: examples, errors that show no secret, results that go to local paths alone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from ldm_scale.errors import ConfigError
from ldm_scale.redaction import public_name, public_urls

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# What is tried first, at the end of each command's help; here and not beside the options, so that one look shows them
# all. A test parses every line.
EXAMPLES = {
    "ldm-scale": ("ldm-scale demo --minutes 5",),
    "ldm-scale prepare": ("ldm-scale prepare image-folder photos --resolution 128 --out data/photos",),
    "ldm-scale prepare openmoji": (
        "ldm-scale prepare openmoji --resolution 160 --subset no-skin-tones --out data/openmoji_no_skin_tones_160",
    ),
    "ldm-scale prepare openmoji-scenes": (
        "ldm-scale prepare openmoji-scenes --resolution 64 --num-samples 20000 --out data/openmoji_scenes_64",
    ),
    "ldm-scale prepare coco": (
        "ldm-scale prepare coco --images train2017 --instances instances_train2017.json --split train --resolution 256 "
        "--out data/coco",
    ),
    "ldm-scale prepare image-folder": ("ldm-scale prepare image-folder photos --resolution 128 --out data/photos",),
    "ldm-scale prepare table": (
        "ldm-scale prepare table photos.csv --image-column file --caption-column text --resolution 256 --out data/mine",
    ),
    "ldm-scale prepare index": ("ldm-scale prepare index shards/*.tar --out data/mine/manifest.json",),
    "ldm-scale prepare filter": (
        "ldm-scale prepare filter data/mine/manifest.json --min-side 512 --out data/mine/large.json",
    ),
    "ldm-scale prepare buckets": (
        "ldm-scale prepare buckets data/mine/manifest.json --resolution 512 --out data/mine/buckets.json",
    ),
    "ldm-scale prepare mix": (
        "ldm-scale prepare mix data/a/manifest.json=3 data/b/manifest.json=1 --out data/mixed.json",
    ),
    "ldm-scale plan": (
        "ldm-scale plan experiment=sd2 data.resolution=256 --ranks 8",
        "ldm-scale plan experiment=sd2 conditioning=frozen_openclip_h --gpu h100 --nodes 4 --cached",
    ),
    "ldm-scale encode": ("ldm-scale encode runs/ae/artifact data/mine/manifest.json --out data/mine_latents",),
    "ldm-scale train": (
        "ldm-scale train experiment=openmoji_text artifact=runs/ae/artifact run_dir=runs/ldm zero.stage=2",
    ),
    "ldm-scale sample": (
        'ldm-scale sample runs/ldm --prompt "red apple" --num-images 8 --steps 20 --out grid.png --strip strip.png',
    ),
    "ldm-scale evaluate": ("ldm-scale evaluate autoencoder runs/ae --data data/mine/manifest.json --out results/ae",),
    "ldm-scale evaluate autoencoder": (
        "ldm-scale evaluate autoencoder runs/ae --data data/mine/manifest.json --out results/ae",
    ),
    "ldm-scale evaluate diffusion": (
        "ldm-scale evaluate diffusion runs/ldm --data data/mine/manifest.json --steps 20 --out results/ldm",
    ),
    "ldm-scale evaluate images": (
        "ldm-scale evaluate images samples/ --data data/mine/manifest.json --out results/samples",
    ),
    "ldm-scale evaluate sweep": (
        "ldm-scale evaluate sweep runs/ldm --data data/mine/manifest.json --guidance 1 2 4 --steps 10 20 50 "
        "--weights raw ema --out results/sweep",
    ),
    "ldm-scale evaluate compare": ("ldm-scale evaluate compare results/ae results/other",),
    "ldm-scale evaluate rate-distortion": (
        "ldm-scale evaluate rate-distortion results/kl_f4 results/kl_f8 --out rate_distortion.png",
    ),
    "ldm-scale export": ("ldm-scale export runs/ldm --to diffusers --out my-pipeline",),
    "ldm-scale import": (
        "ldm-scale import stable-diffusion-v1-5 --out models/sd1",
        "ldm-scale import v1-5-pruned-emaonly.safetensors --out models/sd1",
        "ldm-scale import 512-base-ema.ckpt --config v2-inference.yaml --out models/sd2",
        "ldm-scale import kl-f8/model.ckpt --scale-factor 0.18215 --out models/kl_f8",
    ),
    "ldm-scale report": ("ldm-scale report runs/ldm --results results/ldm --out ldm.html",),
    "ldm-scale replay": (
        "ldm-scale replay runs/demo_text",
        "ldm-scale replay runs/demo_text --image 40960 --json",
    ),
    "ldm-scale doctor": ("ldm-scale doctor data data/mine/manifest.json --resolution 128",),
    "ldm-scale doctor data": ("ldm-scale doctor data data/mine/manifest.json --resolution 128",),
    "ldm-scale doctor machine": ("ldm-scale doctor machine experiment=openmoji_autoencoder",),
    "ldm-scale doctor latents": ("ldm-scale doctor latents data/mine_latents --artifact runs/ae/artifact",),
    "ldm-scale doctor order": (
        "ldm-scale doctor order data/mine/manifest.json --seed 0 --epoch 0 --global-batch 64 --world-size 8 "
        "--batches 0:2",
    ),
    "ldm-scale demo": ("ldm-scale demo --minutes 5",),
}


def example_lines(prog: str) -> str:
    """The examples of a command, each on a line of its own, to stand below its help; "" where it has none."""
    return "".join(f"\nexample: {line}" for line in EXAMPLES.get(prog, ()))


class Parser(argparse.ArgumentParser):
    """argparse's, with examples, which repeats what it was given in its errors. Sub-commands get such parsers too."""

    def format_help(self) -> str:
        """argparse's help, and the examples, which it would fold into a paragraph."""
        examples = example_lines(self.prog)
        return super().format_help() + (f"{examples}\n" if examples else "")

    def error(self, message: str) -> NoReturn:
        """Ends with the usage, the message and status 2."""
        super().error(public_urls(message))


def output_path(text: str, key: str = "") -> Path:
    """Where a command shall write; `key` is what stands before it in the message.

    Raises: ConfigError if it is a URL, of which a path would make local folders named after its scheme, host and user.
    """
    if _URL.match(text):
        raise ConfigError(
            f"{key}{public_name(text)}: this is a URL, and results are written to local files and folders alone; give "
            "a path, such as one on a mounted file system"
        )
    return Path(text)
