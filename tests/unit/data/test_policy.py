from __future__ import annotations

import pytest

from ldm_scale.data.policy import BadSampleLog, ConsecutiveLimit, SkippedSample
from ldm_scale.errors import DataError


def test_only_bad_samples_in_a_row_stop_and_all_of_them_are_named() -> None:
    limit = ConsecutiveLimit(2)
    for number in range(10):
        limit.bad(SkippedSample(f"s/{number}", "r"))
        if number % 2:
            limit.good()
    limit.bad(SkippedSample("s/a", "image does not decode"))
    limit.bad(SkippedSample("s/b", "caption is not UTF-8"))
    with pytest.raises(
        DataError, match=r"3 samples in a row .*max_consecutive_bad=2\): s/a \(image.*; s/b \(cap.*; s/c"
    ):
        limit.bad(SkippedSample("s/c", "image does not decode"))


def test_the_log_counts_by_reason_and_names_each_sample_once() -> None:
    log = BadSampleLog()
    assert log.describe() == ""
    log.add([SkippedSample("s/1", "x"), SkippedSample("s/2", "y")])
    log.add([SkippedSample("s/1", "x")])
    assert log.counts == {"x": 2, "y": 1}
    assert log.describe() == "skipped 3 samples (2 x x, 1 x y), such as s/1, s/2"
