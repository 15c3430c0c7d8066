"""What diffusion costs in pixels and in latents: the paper's comparison, on this machine.

LDM-1 (pixels), 2, 4, 8, 16 and 32 of Tables 13 and 14 and the inpainting models of Table 6 (arXiv:2112.10752): the
same images, about the same number of parameters, equally many images an optimizer step. Measured of each: training
images/s with cached latents and encoded on the fly, peak memory, sampling images/s at the resolution and at twice that;
counted: FLOPs, MFU, GPU-days. A training step is the trainer's own, under ZeRO, with the update of the average; loading
is left out.

    python benchmarks/pixel_vs_latent.py                                # small: narrowed networks at 128 px on a CPU
    python benchmarks/pixel_vs_latent.py --scale full --device cuda     # as published, 256 px, bf16
    python benchmarks/pixel_vs_latent.py --evaluations RESULT RESULT    # also draws quality against cost

Models take turns in rounds; the figure is the median over rounds. On one CPU thread the clock is the process's own
time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("imagenet", "celeba", "inpainting")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (below 10: a trial; 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument(
        "--evaluations", type=Path, nargs="+", default=[], metavar="RESULT", help="of ldm-scale evaluate diffusion"
    )
    parser.add_argument("--peaks", action="store_true", help="peak memory alone, as JSON")
    arguments = parser.parse_args(argv)
    arguments.family = arguments.family or list(FAMILIES)
    if arguments.rounds < 4:
        parser.error(f"--rounds {arguments.rounds}: at least 4, because sampling is timed in every third")
    return arguments


def main(argv: Sequence[str]) -> int:
    """0; 1 if a model gave no figures; 2 without the device.

    Raises: LdmScaleError for what cannot be used.
    """
    arguments = parse(argv)
    import torch

    from benchmarks.measured import make_folder, threads
    from benchmarks.pixel_latent.command import run

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    if not arguments.peaks:
        make_folder(arguments.out)
    threads()  # before a process for memory is started: what is wrong with OMP_NUM_THREADS is said once
    return run(arguments)


if __name__ == "__main__":
    # Run by its path, this file sees its own folder, whose names are nobody else's business.
    sys.path[0:1] = [str(ROOT), str(ROOT / "kernels")]
    from ldm_scale.__main__ import run_command

    sys.exit(run_command(main, sys.argv[1:]))
