"""Figures of a model with the protocol that they were measured under, as files and as tables.

A result is one JSON object: `model` says what was measured, `protocol` how, `figures` what came out. Two results may be
set side by side only if their protocols are equal, field by field; what the model is may differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_scale.engine.tensor_file import replace_files
from ldm_scale.errors import ConfigError, DataError

FORMAT, VERSION = "ldm-scale-autoencoder-evaluation", 1
SAMPLES_FORMAT = "ldm-scale-diffusion-evaluation"
IMAGES_FORMAT = "ldm-scale-images-evaluation"
_COMMANDS = {FORMAT: "autoencoder", SAMPLES_FORMAT: "diffusion", IMAGES_FORMAT: "images"}
RESULT_FILE = "result.json"
_ABSENT = "nothing"


@dataclass(frozen=True)
class Result:
    """One evaluation; `source` is where it was read from, for messages."""

    source: str
    model: dict[str, Any]
    protocol: dict[str, Any]
    figures: dict[str, Any]
    format: str = FORMAT

    @property
    def label(self) -> str:
        """Short name of the model, such as kl-f8-c4."""
        return str(self.model["label"])


def write_result(directory: Path, document: dict[str, Any], pictures: Mapping[str, bytes] | None = None) -> Path:
    """Path of the document's file in the directory, which is there once all pictures (files by name) are.

    Older files are replaced at once or not at all.
    Raises: OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    replace_files(directory, {**(pictures or {}), RESULT_FILE: text})
    return directory / RESULT_FILE


def read_result(path: Path, formats: Sequence[str] = tuple(_COMMANDS)) -> Result:
    """The result in a file, or in a folder's result.json.

    Raises: DataError if there is none, or it is not of these formats and our version.
    """
    if path.is_dir():
        path = path / RESULT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `ldm-scale evaluate ... --out DIR` writes a {RESULT_FILE}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: this result cannot be read ({error}); evaluate the model again") from None
    if not isinstance(content, dict) or content.get("format") not in formats:
        commands = " or ".join(f"`ldm-scale evaluate {_COMMANDS[name]}`" for name in formats)
        raise DataError(f'{path}: not a result of {commands} (its "format" must be {" or ".join(map(repr, formats))})')
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: result version {content.get('version')}, this program reads {VERSION}; evaluate again"
        )
    parts = [content.get(part) for part in ("model", "protocol", "figures")]
    if not all(isinstance(part, dict) for part in parts) or "label" not in content["model"]:
        raise DataError(f"{path}: model, protocol or figures are missing from this result; evaluate the model again")
    result = Result(str(path), content["model"], content["protocol"], content["figures"], content["format"])
    with reading(result):
        _ROWS[result.format](result.figures)
    return result


@contextmanager
def reading(result: Result) -> Iterator[None]:
    """A block that takes values out of a result.

    Raises: DataError in the place of what a result that lacks some of them, or has others in their place, leads to.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{result.source}: this result is incomplete or damaged ({type(error).__name__}: {error}); evaluate the "
            "model again"
        ) from None


def require_one_protocol(results: Sequence[Result]) -> None:
    """Nothing, if all results were measured in the same way.

    Raises: ConfigError with the first field that differs, and both values.
    """
    first = results[0]
    expected = dict(_fields({"of": _COMMANDS[first.format]} | first.protocol))
    for other in results[1:]:
        found = dict(_fields({"of": _COMMANDS[other.format]} | other.protocol))
        differing = [name for name in expected | found if expected.get(name, _ABSENT) != found.get(name, _ABSENT)]
        if differing:
            name = differing[0]
            more = f" (and {len(differing) - 1} more fields)" if len(differing) > 1 else ""
            raise ConfigError(
                f"{first.source} and {other.source} were measured under different protocols: {name} is "
                f"{expected.get(name, _ABSENT)!r} and {found.get(name, _ABSENT)!r}{more}; their figures cannot be "
                "compared: evaluate both in the same way"
            )


def unique_labels(results: Sequence[Result]) -> list[str]:
    """A name for each result: the model's, with the folder of its result or a number where two have the same."""
    labels = [result.label for result in results]
    if len(set(labels)) < len(labels):
        labels = [f"{label} {Path(r.source).parent.name}".strip() for label, r in zip(labels, results, strict=True)]
    return [label if labels.count(label) == 1 else f"{label} #{i + 1}" for i, label in enumerate(labels)]


def figure_rows(figures: dict[str, Any]) -> dict[str, str]:
    """The figures for people: printed value by name, in the order of a table."""
    perceptual, frechet, bicubic = figures["perceptual"], figures["frechet"], figures["bicubic"]
    distance = perceptual["name"]
    rows = {
        "PSNR, dB": _spread(figures["psnr_db"], 2, absent="exact"),
        "PSNR of bicubic by f, dB": _number(bicubic["psnr_db"], 2, absent="exact"),
        "SSIM": _spread(figures["ssim"], 4),
        "SSIM of bicubic by f": _number(bicubic["ssim"], 4),
        "L1, pixels in [-1, 1]": _spread(figures["mean_absolute_error"], 5),
        distance + (" (the paper's PSIM)" if distance == "LPIPS-VGG" else ""): _spread(perceptual, 4),
        f"{distance} of bicubic by f": _number(bicubic["perceptual"], 4),
        f"{distance} of unrelated images": _number(perceptual["unrelated"], 4),
        frechet["name"]: _with_interval(frechet["distance"], frechet.get("interval"), 3),
        f"{frechet['name']}, half against other half": _number(frechet["halves_reconstructed"], 3),
        f"{frechet['name']}, original halves (floor)": _number(frechet["halves_original"], 3),
        "latent numbers per pixel": _number(figures["rate"]["numbers_per_pixel"], 4),
    }
    rates = {
        "kl_bits_per_pixel": "KL from N(0, 1), bits per pixel",
        "kl_bits_per_pixel_fitted": "KL from fitted Gaussians, bits per pixel",
        "code_bits_per_pixel": "log2|Z| a code, bits per pixel",
        "code_entropy_bits_per_pixel": "entropy of the codes, bits per pixel",
        "stored_bits_per_pixel": "stored bits per pixel",
    }
    rows |= {name: _number(figures["rate"][key], 4) for key, name in rates.items() if key in figures["rate"]}
    if "value" in figures.get("inception_score", {}):
        score = figures["inception_score"]
        rows[score["name"]] = _with_interval(score["value"], score["interval"], 2)
    if "codes" in figures:
        rows["codes used"] = f"{figures['codes']['share_used']:.1%} in {figures['codes']['num_chosen']} choices"
        rows["perplexity of the codes"] = _number(figures["codes"]["perplexity"], 1)
    if figures["exact_images"]:
        rows["images that come back exactly"] = str(figures["exact_images"])
    return rows


def sample_rows(figures: dict[str, Any]) -> dict[str, str]:
    """As `figure_rows`, of samples."""
    frechet, rows = figures["frechet"], {}
    for key, what in {
        "distance": "",
        "reconstructions": " of reconstructions",
        "halves_sampled": ", half against other half",
        "halves_reconstructed": " of reconstructions, half against other half",
        "halves_real": ", real halves (floor)",
    }.items():
        rows[f"{frechet['name']}{what}"] = _number(frechet[key], 3)
    rows |= set_rows(figures)
    for kind, found in figures.items():
        if kind in ("frechet", "samples") or "not_measured" in found:
            continue
        for key, (name, digits) in _SAMPLE_FIGURES.items():
            if key in found:
                value = found[key]
                cell = _spread(value, digits, "exact") if isinstance(value, dict) else _number(value, digits)
                rows[f"{kind.replace('_', ' ')}: {name}"] = cell
    return rows


def set_rows(figures: dict[str, Any]) -> dict[str, str]:
    """As `figure_rows`, of a set of samples beside a reference set."""
    rows = {}
    for key, found in figures.get("samples", {}).items():
        if "value" not in found:
            continue
        digits = _SET_DIGITS.get(key, 3)
        name = found["name"] + (" to the reference" if key == "frechet" else "")
        rows[name] = _with_interval(found["value"], found["interval"], digits)
        for companion, what in {
            "floor": "halves of the reference (floor)",
            "shuffled": "captions shuffled",
            "real": "real images",
        }.items():
            if found.get(companion) is not None:
                rows[f"{found['name']}, {what}"] = _number(found[companion], digits)
    return rows


_SET_DIGITS = {"kernel": 5, "clip_score": 4}
_SAMPLE_FIGURES = {
    "psnr_db": ("PSNR, dB", 2),
    "bicubic_psnr_db": ("PSNR of bicubic, dB", 2),
    "reconstruction_psnr_db": ("PSNR of reconstructions, dB", 2),
    "ssim": ("SSIM", 4),
    "bicubic_ssim": ("SSIM of bicubic", 4),
    "reconstruction_ssim": ("SSIM of reconstructions", 4),
    "consistency_psnr_db": ("PSNR made small again, dB", 2),
    "hole_psnr_db": ("PSNR in the hole, dB", 2),
    "mean_colour_psnr_db": ("PSNR of the mean colour, dB", 2),
    "known_exact": ("images whose known pixels are exact", 3),
    "iou": ("IoU of boxes", 3),
    "hits": ("boxes with an IoU of 0.5", 3),
    "colour_match": ("colours in the boxes", 3),
    "shuffled_iou": ("IoU of boxes, shuffled", 3),
    "shuffled_hits": ("boxes with an IoU of 0.5, shuffled", 3),
    "shuffled_colour_match": ("colours in the boxes, shuffled", 3),
    "real_iou": ("IoU of boxes, real images", 3),
    "real_hits": ("boxes with an IoU of 0.5, real images", 3),
    "real_colour_match": ("colours in the boxes, real images", 3),
    "miou": ("mIoU", 3),
    "shuffled_miou": ("mIoU, shuffled", 3),
    "real_miou": ("mIoU, real images", 3),
    "agreement": ("nearest real image agrees", 3),
    "chance": ("by chance", 3),
    "reconstructions": ("of reconstructions", 3),
    "real_others": ("of real images and others", 3),
}
_ROWS = {FORMAT: figure_rows, SAMPLES_FORMAT: sample_rows, IMAGES_FORMAT: set_rows}


def comparison_table(results: Sequence[Result]) -> str:
    """Figures of several models in columns."""
    columns = [_ROWS[result.format](result.figures) for result in results]
    names = list(dict.fromkeys(name for rows in columns for name in rows))
    lines = [["", *unique_labels(results)]]
    lines += [[name, *(rows.get(name, "-") for rows in columns)] for name in names]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def result_text(document: dict[str, Any]) -> str:
    """A result document for people: figures, protocol, what was left out."""
    result = Result("", document["model"], document["protocol"], document["figures"], document["format"])
    model, bad = document["model"], document["bad_images"]
    if result.format == IMAGES_FORMAT:
        what = f"{document['protocol']['samples']['num_samples']} images"
    else:
        what = f"{model['label']}, {model['parameters']:,} parameters, {model['weights']} weights"
    lines = [f"{model['path']}: {what}, content {model['content_sha256'][:12]}"]
    lines += [comparison_table([result])]
    figures = document["figures"]
    for name, found in [*figures.items(), *figures.get("samples", {}).items()]:
        if isinstance(found, dict) and "not_measured" in found:
            lines += [f"{found.get('name', name)}: {found['not_measured']}"]
    if bad["count"]:
        lines += [f"left out: {bad['count']} images", *(f"  {key}: {why}" for key, why in bad["names"].items())]
    return "\n".join([*lines, "", "protocol", protocol_lines(document["protocol"])])


def protocol_lines(protocol: dict[str, Any]) -> str:
    """The protocol for people, a field a line."""
    fields = dict(_fields(protocol))
    width = max(map(len, fields))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in fields.items())


def _fields(protocol: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names, with dots for what lies inside, and values."""
    for name, value in protocol.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _spread(summary: dict[str, Any], digits: int, absent: str = "-") -> str:
    if summary["mean"] is None:
        return absent
    return f"{summary['mean']:.{digits}f} +- {summary['std']:.{digits}f}"


def _with_interval(value: float | None, interval: dict[str, Any] | None, digits: int) -> str:
    cell = _number(value, digits)
    return cell if interval is None else f"{cell} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def _number(value: float | None, digits: int, absent: str = "-") -> str:
    return absent if value is None else f"{value:.{digits}f}"
