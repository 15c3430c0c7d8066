"""Both stages on real images, from rendering to samples and an export: `ldm-scale demo` (what `make demo` runs)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm_scale.command_line import Parser, output_path


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was made (now or by an earlier call), 130 when it was interrupted and can be continued."""
    parser = Parser(
        prog="ldm-scale demo",
        description="Renders OpenMoji, trains an autoencoder and a text-conditional latent diffusion model, samples, "
        "measures and exports. Called again, it continues or reuses. With a CUDA GPU it picks the larger experiment.",
    )
    parser.add_argument(
        "--data", type=output_path, default=Path("data"), help="where the rendered images go (default data)"
    )
    parser.add_argument(
        "--runs", type=output_path, default=Path("runs"), help="where runs and results go (default runs)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=11.0,
        help="time for the two trainings (default 11): on a slow machine they see fewer images than configured",
    )
    arguments = parser.parse_args(argv)
    from ldm_scale.config.compose import load_config
    from ldm_scale.operations.demo import choose_recipe, run_demo

    recipe = choose_recipe(arguments.data, arguments.runs)
    configs = [load_config(overrides) for overrides in recipe.overrides()]
    return run_demo(recipe, configs[0], configs[1], arguments.minutes)
