"""What a doctor found: findings, one line each, and the figures they rest on.

An error is what makes the run that follows fail or mean something else than it says, and ends the command with 1. A
warning is what costs money or quality and may be wanted. An ok says what was checked, so that silence is never taken
for health.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    level: Level
    what: str  # what was found, with its figure
    where: str = ""  # the file, shard and key, or rank that it is about
    fix: str = ""  # what to do about it


@dataclass
class Report:
    """What a sub-command of `ldm-scale doctor` returns."""

    subject: str  # such as "data manifest.json"
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # JSON values; units in the names

    def ok(self, what: str, where: str = "") -> None:
        """Notes a check that passed."""
        self.findings.append(Finding("ok", what, where))

    def warning(self, what: str, where: str = "", fix: str = "") -> None:
        """Notes what costs something and may be wanted."""
        self.findings.append(Finding("warning", what, where, fix))

    def error(self, what: str, where: str = "", fix: str = "") -> None:
        """Notes what must be mended first."""
        self.findings.append(Finding("error", what, where, fix))

    def extend(self, findings: Iterable[Finding]) -> None:
        """Notes several findings."""
        self.findings.extend(findings)

    @property
    def exit_code(self) -> int:
        """1 if an error is among the findings, else 0."""
        return int(any(finding.level == "error" for finding in self.findings))

    def as_dict(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "subject": self.subject,
            "exit_code": self.exit_code,
            "findings": [asdict(finding) for finding in self.findings],
            "facts": self.facts,
        }

    def text(self) -> str:
        """The report for people: one line per finding, then the count of each level."""
        lines = [f"doctor {self.subject}", *(_line(finding) for finding in self.findings)]
        counts = {level: sum(finding.level == level for finding in self.findings) for level in ("error", "warning")}
        return "\n".join([*lines, f"{counts['error']} errors, {counts['warning']} warnings"])


def _line(finding: Finding) -> str:
    """A finding as one line."""
    place = f"{finding.where}: " if finding.where else ""
    fix = f"; {finding.fix}" if finding.fix else ""
    return " ".join(f"{finding.level:<7} {place}{finding.what}{fix}".split(" "))
