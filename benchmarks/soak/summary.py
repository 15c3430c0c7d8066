"""What a soak found, judged and written down: Markdown, JSON and a picture."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.soak.account import Row, effective_share, image_seconds, lost_seconds

MAX_LOST_S = 60.0
MIN_EFFECTIVE = 0.90  # with a fault every ten minutes; six lost seconds a minute
SHOWN_SAID = 160
DRAWN_ROWS = 2000


@dataclass
class Fault:
    """One that came."""

    kind: str
    what: str
    at_s: float
    images: int
    said: str = ""  # the log's line that tells of it
    starts: int = 0  # that it took
    jobs: int = 0  # that had to be submitted again
    problem: str = ""


@dataclass
class Found:
    """All that was seen, growing while the soak runs."""

    minutes: float
    kinds: int
    rows: list[Row] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    skipped_images: int = 0
    checks: dict[str, str] = field(default_factory=dict)  # "" where it holds
    disturbed: str = ""
    undisturbed: str = ""
    problem: str = ""  # why it is unfinished

    @property
    def is_measured(self) -> bool:
        """Whether there are steps to measure by."""
        return len(self.rows) > 2

    @property
    def lost_s(self) -> list[float]:
        """The time that each fault took, a skipped step with it."""
        lost = lost_seconds(self.rows, [fault.at_s for fault in self.faults])[1:]
        skipped_s = self.skipped_images * image_seconds(self.rows)
        return [s + skipped_s * (fault.kind == "not finite") for s, fault in zip(lost, self.faults, strict=True)]

    @property
    def effective(self) -> float:
        """The share of the time that trained."""
        return effective_share(self.rows, self.skipped_images)


def failures(found: Found) -> list[str]:
    """What is not as it should be, in words; [] if all is well."""
    failed = [f"unfinished: {found.problem.splitlines()[0]}"] if found.problem else []
    failed += [f"{fault.kind}: {fault.problem}" for fault in found.faults if fault.problem]
    if found.is_measured:
        lost = zip(found.faults, found.lost_s, strict=True)
        failed += [
            f"{fault.kind} took {s:.0f} s, {MAX_LOST_S:.0f} s are allowed" for fault, s in lost if s > MAX_LOST_S
        ]
        # With faults that come oftener than every ten minutes the same losses are a larger share.
        least = 1 - (1 - MIN_EFFECTIVE) * max(1.0, 10 * len(found.faults) / found.minutes)
        if found.effective < least:
            failed.append(f"effective training time is {found.effective:.1%}, {least:.0%} are asked for")
    failed += [f"{name}: no, {problem}" for name, problem in found.checks.items() if problem]
    if not found.problem and found.disturbed != found.undisturbed:
        failed.append(f"the weights differ from the undisturbed run's: {found.disturbed} and {found.undisturbed}")
    return failed


def write(out: Path, name: str, found: Found, environment: Mapping[str, Any]) -> None:
    """Writes OUT/NAME.md, .json and, where steps were seen, .png."""
    out.mkdir(parents=True, exist_ok=True)
    if found.is_measured:
        draw(out / f"{name}.png", found)
    (out / f"{name}.json").write_text(json.dumps(document(found, environment), indent=1) + "\n")
    (out / f"{name}.md").write_text(text(name, found, environment))


def document(found: Found, environment: Mapping[str, Any]) -> dict[str, Any]:
    """All of it as plain data; times count from the first step."""
    begin_s = found.rows[0][0] if found.rows else 0.0
    faults = [asdict(fault) | {"at_s": round(fault.at_s - begin_s, 1)} for fault in found.faults]
    measured: dict[str, Any] = {}
    if found.is_measured:
        for fault, lost_s in zip(faults, found.lost_s, strict=True):
            fault["lost_s"] = round(lost_s, 1)
        measured = {
            "wall_s": round(found.rows[-1][0] - begin_s, 1),
            "image_s": round(image_seconds(found.rows), 5),
            "effective": round(found.effective, 4),
            "lost_before_the_first_s": round(_before_the_first(found), 1),
        }
    return {
        "environment": dict(environment),
        "failures": failures(found),
        "measured": measured,
        "faults": faults,
        "skipped_images": found.skipped_images,
        "checks": found.checks,
        "digests": {"disturbed": found.disturbed, "undisturbed": found.undisturbed},
        "rows": [[round(at_s - begin_s, 2), images] for at_s, images in _thinned(found.rows)],
    }


def text(name: str, found: Found, environment: Mapping[str, Any]) -> str:
    """The report in Markdown: what failed, figures, a line per fault."""
    failed = failures(found)
    state = "UNFINISHED" if found.problem else "FAILED" if failed else "passed"
    lines = [f"# Soak: {found.kinds} faults in {found.minutes:g} minutes of training: {state}", ""]
    lines += [*(f"- {failure}" for failure in failed), ""] if failed else []
    settings = environment["settings"]
    lines += [
        f"A tiny stage-2 run, {settings['ranks']} ranks on {settings['ranks']} of the {settings['nodes']} nodes of a "
        f"real Slurm cluster in namespaces, steps slowed down to {settings['slow_s']:g} s; "
        f"{environment['date']}, {environment['device']}, torch {environment['torch']}, load average "
        f"{environment['load_average']:.1f} at the end.",
        "",
    ]
    if found.is_measured:
        wall_s, image_s = found.rows[-1][0] - found.rows[0][0], image_seconds(found.rows)
        seen = found.rows[-1][1] - found.rows[0][1]
        most_s = max(found.lost_s, default=0.0)
        lines += [
            f"**Effective training time: {found.effective:.1%}** ({seen} images of {image_s:.4f} s, the median of the "
            f"run's own steps, in {wall_s / 60:.1f} minutes). Most that a fault took: {most_s:.0f} s "
            f"of {MAX_LOST_S:.0f} s; together {sum(found.lost_s):.0f} s.",
            "",
            "| minute | fault | lost, s | starts | submitted again | the log says |",
            "|---|---|---|---|---|---|",
        ]
        for fault, lost_s in zip(found.faults, found.lost_s, strict=True):
            said = (
                textwrap.shorten(fault.said.replace("|", "/"), SHOWN_SAID, placeholder=" ...")
                + f"{' **' + fault.problem + '**' if fault.problem else ''}"
            )
            minute = (fault.at_s - found.rows[0][0]) / 60
            lines.append(
                f"| {minute:.1f} | {fault.kind}: {fault.what} | {lost_s:.1f} | {fault.starts} | "
                f"{'yes' if fault.jobs else 'no'} | {said} |"
            )
        lines.append("")
    if found.undisturbed:
        same = "the same" if found.disturbed == found.undisturbed else "DIFFERENT"
        lines += [
            f"Weights, moments and averages at the end, SHA-256: `{found.disturbed}`, and of the undisturbed run {same}"
            + (f" (`{found.undisturbed}`)." if same == "DIFFERENT" else "."),
            "",
        ]
    lines += [f"- {check}: {'yes' if not problem else 'NO, ' + problem}" for check, problem in found.checks.items()]
    lines += ["", *([f"![images over time, time lost]({name}.png)", ""] if found.is_measured else [])]
    lines += [
        "How it is measured: effective training time is the usual time of all images that count over the time from "
        "first to last step. An interval between two steps that brings no new image, or lasts three times as long as "
        "usual, is lost but for the usual time of its new images, and belongs to the last fault before its end; a "
        "skipped step counts as lost. The cluster is hastier than most: SlurmdTimeout is "
        f"{settings['dead_after_s']} s (with two rounds of pings, a lost node is noticed after 25 s) and a requeued "
        "job starts after 5 s; Slurm's defaults are 300 s and 120 s.",
        "",
    ]
    return "\n".join(lines)


def draw(path: Path, found: Found) -> None:
    """Nothing; images over time with the faults, and the time that each took, as a picture."""
    begin_s = found.rows[0][0]
    figure, (above, below) = plt.subplots(2, 1, figsize=(12, 9), height_ratios=(3, 2), layout="constrained")
    rows = _thinned(found.rows)
    above.plot([(at_s - begin_s) / 60 for at_s, _ in rows], [images for _, images in rows], linewidth=1.0)
    for fault in found.faults:
        minute = (fault.at_s - begin_s) / 60
        above.axvline(minute, color="tab:red", linewidth=0.8, alpha=0.6)
        above.annotate(
            fault.kind, (minute, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
        )
    above.set(xlabel="minutes from the first step", ylabel="images", ylim=(0, None))
    above.grid(alpha=0.3)
    bars = below.barh([fault.kind for fault in found.faults], found.lost_s, color="tab:red", alpha=0.7)
    below.bar_label(bars, fmt="%.0f s", padding=3)
    below.axvline(MAX_LOST_S, color="black", linestyle="--", linewidth=0.8)
    below.set(xlabel="seconds lost (dashed: what is allowed)")
    below.invert_yaxis()
    figure.suptitle(f"effective training time {found.effective:.1%}{' (unfinished)' if found.problem else ''}")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _before_the_first(found: Found) -> float:
    return lost_seconds(found.rows, [fault.at_s for fault in found.faults])[0]


def _thinned(rows: list[Row]) -> list[Row]:
    """At most DRAWN_ROWS of them, so that a report stays small; where the run is set back or waits, all."""
    every = -(-len(rows) // DRAWN_ROWS)
    if every <= 1:
        return rows
    usual_s = image_seconds(rows)
    kept = {0, len(rows) - 1, *range(0, len(rows), every)}
    for number, ((before_s, before), (at_s, images)) in enumerate(itertools.pairwise(rows)):
        if images <= before or at_s - before_s > 3 * usual_s * (images - before):
            kept |= {number, number + 1}
    return [rows[number] for number in sorted(kept)]
