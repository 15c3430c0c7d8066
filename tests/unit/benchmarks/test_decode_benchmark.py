"""The benchmark of decoders compares what gives the same picture."""

from __future__ import annotations

import pytest

from benchmarks import decode


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("case", ["jpeg_256", "jpeg_1024", "png_512"])
def test_a_case_is_measured(case: str) -> None:
    result = decode.measure(*decode.CASES[case], num_rounds=2)
    assert {"Pillow", "ours"} <= set(result["image_s"])
    assert all(times["min"] > 0 for times in result["image_s"].values())
    assert result["speed_over_pillow"]["Pillow"]["median"] == 1
    allowed = 0.5 if case == "jpeg_1024" else 0.01
    assert result["deviation_of_255"]["ours"]["mean"] <= allowed
    assert f"{case}, ours" in decode.table({case: result})


def test_pictures_are_decoded_on_the_cpu() -> None:
    with pytest.raises(SystemExit):
        decode.main(["--device", "cuda"])
