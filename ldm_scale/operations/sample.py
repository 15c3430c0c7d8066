"""Sampling from the command line: what the images show, and seeds, to pictures."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import SamplingConfig
from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.sampler import steps_taken
from ldm_scale.engine.tensor_file import require_place
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.load import LoadedDiffusion, load_diffusion
from ldm_scale.interchange.sampling import SampleOptions, chosen_sampling
from ldm_scale.operations.sample_files import Made, Strip, write_each, write_grid
from ldm_scale.operations.sample_guides import build_guides, open_classifier
from ldm_scale.operations.sample_inputs import SampleRequest, read_request
from ldm_scale.telemetry.log import get_logger

MAX_SEED = 2**63
Guide = Callable[[Denoiser], Denoiser]


def sample_to_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was made and how; writes the grid, each image (--images-dir), the way there (--strip).

    Raises: ConfigError for what cannot be used; CheckpointError for the source.
    """
    _check(arguments)
    device = _device(arguments.device)
    model = load_diffusion(arguments.source, arguments.weights)
    model.to(device)
    classifier = open_classifier(arguments, model)
    request = read_request(arguments, model, classifier)
    options = _options(arguments, request)
    sampling = chosen_sampling(model, options)
    guides = build_guides(arguments, model, classifier, request.guide_classes)

    strip = None if arguments.strip is None else Strip(len(request.seeds), _steps(sampling, options))

    begin = time.perf_counter()
    with _counted(model) as passes:
        images = sample_images(
            model,
            request.y,
            request.seeds,
            batch=arguments.batch,
            guides=guides,
            observe_rows=None if strip is None else strip.observe,
            **options,
        )
    seconds = time.perf_counter() - begin
    log = get_logger(0)
    made = Made(model.content_hash, arguments, sampling, (images.shape[2], images.shape[3]))
    write_grid(arguments.out, images, request, made)
    log.info(f"wrote {arguments.out} ({len(images)} images)")
    paths: list[Path] = []
    if arguments.images_dir is not None:
        paths = write_each(arguments.images_dir, images, request, made)
        log.info(f"wrote {len(images)} images into {arguments.images_dir}")
    if strip is not None:
        strip.write(arguments.strip, model, images, request.titles, made)
        log.info(f"wrote {arguments.strip} ({strip.num_images} images over the steps)")
    truncated = model.num_truncated
    if truncated:
        log.warning(f"{truncated} prompts or layouts are longer than the model reads: the rest of them was left out")
    return {
        "source": str(arguments.source),
        "grid": str(arguments.out),
        "strip": None if arguments.strip is None else str(arguments.strip),
        "model_hash": model.content_hash,
        "images": [
            {"seed": seed, "title": title, "path": str(paths[i]) if paths else None}
            for i, (seed, title) in enumerate(zip(request.seeds, request.titles, strict=True))
        ],
        "height": images.shape[2],
        "width": images.shape[3],
        "sampler": sampling.sampler,
        "num_steps": sampling.num_steps,
        "eta": sampling.eta,
        "guidance_scale": sampling.guidance_scale,
        "unet_passes": passes[0],  # images, or windows of images, that the UNet was given in all
        "truncated": truncated,
        "seconds": round(seconds, 3),
        "device": str(model.device),
    }


def sample_images(
    model: LoadedDiffusion,
    y: Conditions | Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int,
    description: str = "sample",
    guides: Callable[[slice], Guide] | None = None,
    observe_rows: Callable[[int, int, Tensor], None] | None = None,
    bar: tqdm[Any] | None = None,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """Images in batches, with a progress bar; y and options as of `LoadedDiffusion.sample`, `guides` by rows of y.

    `observe_rows` is told the first row of a batch before the arguments of `SampleOptions`' observe; `bar` is advanced
    by steps of images in place of a bar of their own.

    Shapes: returns (len(seeds), 3, H, W) in [-1, 1] on the CPU.
    Raises: ConfigError, with the largest batch that was seen to fit, if the memory does not hold one.
    """
    conditions = y if isinstance(y, Conditions) else Conditions(captions=list(y))
    num_steps = _steps(chosen_sampling(model, options), options)

    def draw(part: slice, progress: Callable[[int], None] | None, *, trial: bool = False) -> Tensor:
        chosen = options.copy()
        init_images = options.get("init_images")
        if init_images is not None:
            chosen["init_images"] = init_images[part]
        if guides is not None:
            chosen["guide"] = guides(part)
        if observe_rows is not None and not trial:
            chosen["observe"] = partial(observe_rows, part.start)
        if trial:
            chosen["num_steps"] = 1
            if chosen_sampling(model, options).guidance_scale != 1.0:
                chosen["guidance_interval"] = (0.0, math.inf)
        return model.sample(conditions.rows(part), list(seeds[part]), progress=progress, **chosen).float().cpu()

    def try_some(start: int, count: int) -> None:
        draw(slice(start, start + count), None, trial=True)

    images = []
    own = tqdm(total=len(seeds) * num_steps, desc=description, unit="step", mininterval=1.0, disable=bar is not None)
    with own:
        for start in range(0, len(seeds), batch):
            part = slice(start, min(start + batch, len(seeds)))
            count = part.stop - part.start
            try:
                images.append(draw(part, lambda _, count=count: (own if bar is None else bar).update(count)))  # type: ignore[misc]
                continue
            except (MemoryError, RuntimeError) as error:
                if not _lacks_memory(error):
                    raise
            # Outside of the handler, whose traceback would keep what did not fit alive.
            raise ConfigError(_what_fits(count, partial(try_some, start)))
    return torch.cat(images)


def _steps(sampling: SamplingConfig, options: SampleOptions) -> int:
    """Steps that are taken, of an image to start from too."""
    strength = options.get("strength")
    return sampling.num_steps if strength is None else steps_taken(sampling.num_steps, strength)


def _what_fits(batch: int, try_some: Callable[[int], None]) -> str:
    """The message for a batch that did not fit: a smaller one of which one step and the decoder do, by trial."""
    smaller = batch // 2
    while smaller:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            try_some(smaller)
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            smaller //= 2
            continue
        return f"a batch of {batch} does not fit in memory, one of {smaller} does: give --batch {smaller}"
    return (
        "not even one image of this size fits in memory: give --tile PIXELS (a window as large as the training "
        "resolution), a smaller --size, or a device with more"
    )


def _lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed; CPU allocators say so in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


@contextmanager
def _counted(model: LoadedDiffusion) -> Iterator[list[int]]:
    """[number of images, or windows, that the UNet is given inside]."""
    passes = [0]

    def count(_: object, arguments: tuple[Tensor, ...]) -> None:
        passes[0] += len(arguments[0])

    handle = model.network.unet.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def sampler_options(arguments: argparse.Namespace) -> SampleOptions:
    """The sampler and its guidance as a command line chose them; what it left out is the model's own."""
    interval = arguments.guidance_interval
    return {
        "sampler": arguments.sampler,
        "num_steps": arguments.steps,
        "eta": arguments.eta,
        "guidance_scale": arguments.guidance,
        "guidance_rescale": arguments.guidance_rescale,
        "guidance_interval": None if interval is None else (interval[0], interval[1]),
    }


def _options(arguments: argparse.Namespace, request: SampleRequest) -> SampleOptions:
    height, width = request.size or (None, None)
    return {
        **sampler_options(arguments),
        "negative": arguments.negative_prompt,
        "height": height,
        "width": width,
        "tile": arguments.tile,
        "overlap": arguments.tile_overlap,
        "max_windows": arguments.tile_batch,
        "init_images": request.init_images,
        "strength": arguments.strength,
    }


def check_sampling(arguments: argparse.Namespace) -> None:
    """Nothing, if the options of the sampler are in their ranges.

    Raises: ConfigError.
    """
    if not 0 <= arguments.seed < MAX_SEED:
        raise ConfigError(f"--seed {arguments.seed}: must be from 0 to 2^63 - 1")
    if arguments.guidance is not None and not 0.0 <= arguments.guidance < math.inf:
        raise ConfigError(
            f"--guidance {arguments.guidance}: must be a number from 0 (no caption) upwards; 1 is no guidance"
        )
    if arguments.steps is not None and arguments.steps < 1:
        raise ConfigError(f"--steps {arguments.steps}: must be at least 1")
    if arguments.eta is not None and not 0.0 <= arguments.eta <= 1.0:
        raise ConfigError(f"--eta {arguments.eta}: must be between 0 (deterministic) and 1")
    if arguments.guidance_rescale is not None and not 0.0 <= arguments.guidance_rescale <= 1.0:
        raise ConfigError(f"--guidance-rescale {arguments.guidance_rescale}: must be between 0 (off) and 1")
    if arguments.guidance_interval is not None:
        low, high = arguments.guidance_interval
        if not 0.0 <= low < high:
            raise ConfigError(f"--guidance-interval {low:g} {high:g}: must be two noise levels, 0 <= LO < HI")


def _check(arguments: argparse.Namespace) -> None:
    _check_texts(arguments)
    if arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: must be at least 1")
    check_sampling(arguments)
    if arguments.strength is not None and not 0.0 < arguments.strength <= 1.0:
        raise ConfigError(
            f"--strength {arguments.strength}: must be above 0 (keep the image) and at most 1 (ignore it)"
        )
    for option, path, name in (("--out", arguments.out, "grid.png"), ("--strip", arguments.strip, "strip.png")):
        if path is not None and path.is_dir():
            raise ConfigError(f"{option} {path} is a folder; give the name of a picture, such as {path}/{name}")
        if path is not None and path.suffix.lower() != ".png":
            raise ConfigError(f"{option} {path}: the picture is a PNG; give a name that ends in .png")
        if path is not None:
            require_place(path.parent, f"{option} {path}")
    if arguments.images_dir is not None:
        require_place(arguments.images_dir, f"--images-dir {arguments.images_dir}")


def _check_texts(arguments: argparse.Namespace) -> None:
    """Nothing, if all words are text: an argument whose bytes are not UTF-8 comes with surrogates in their place."""
    given = {
        "--prompt": arguments.prompt,
        "--negative-prompt": [arguments.negative_prompt],
        "--class": arguments.classes,
        "--clip-guidance": [arguments.clip_guidance],
        "--imagenet-guidance": [arguments.imagenet_guidance],
    }
    for option, texts in given.items():
        for text in texts:
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{option} {text!a}: holds bytes that are not UTF-8; give it in UTF-8") from None


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda but torch sees no CUDA device; use --device auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
