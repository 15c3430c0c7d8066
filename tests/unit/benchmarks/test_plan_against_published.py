"""The planner's constants against the published rows that they were not fitted on."""

from __future__ import annotations

import pytest

from benchmarks.plan_against_published import (
    CAMPAIGNS,
    compared,
    constants,
    is_predicted,
    median_error,
    memory_rows,
    own_rows,
    read,
    rows,
    summary,
    table,
)
from benchmarks.published_networks import lay_out


def test_at_most_a_third_of_the_rows_is_fitted() -> None:
    held = [row for name in CAMPAIGNS for row in read(name)["rows"] if row["of_the_median"]]
    assert len(held) == 29
    assert 3 * sum(row["fitted"] for row in held) <= len(held)
    assert all(read(name)["source"] for name in CAMPAIGNS)


@pytest.mark.parametrize("row", read("edm2")["rows"], ids=lambda row: row["network"])
def test_edm2_as_laid_out_has_about_the_published_sizes(row: dict[str, float]) -> None:
    multiply_adds, parameters = lay_out(int(row["base_channels"])).counts()
    assert multiply_adds == pytest.approx(1e9 * row["gmac"], rel=0.03)
    assert parameters == pytest.approx(1e6 * row["mparams"], rel=0.08)  # without the embedding's layers


@pytest.mark.timeout(400)
def test_the_median_error_of_predicted_rows() -> None:
    speeds = compared(rows(), constants())
    assert median_error(speeds, is_predicted) <= 0.15
    assert table(speeds).count("\n") == len(speeds) + 1
    assert "all predicted rows" in summary(speeds)


@pytest.mark.timeout(400)
def test_memory_is_within_a_tenth() -> None:
    published = {row["micro_batch"]: row["error"] for row in memory_rows()}
    assert abs(published[32]) <= 0.10
    assert abs(published[64]) <= 0.10
    assert all(abs(row["error"]) <= 0.10 for row in own_rows())
