"""Randomness is a function of seed, purpose and index, and streams have nothing to do with each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ldm_scale.engine.seeding import normal, stream

DRAWS = 4096


def test_a_stream_depends_on_seed_purpose_and_index_alone() -> None:
    first = stream(3, "diffusion", 17).random(8)
    stream(3, "diffusion", 18).random(1000)
    np.random.default_rng().random(10)
    assert np.array_equal(stream(3, "diffusion", 17).random(8), first)


def test_the_streams_never_change_because_resumed_runs_rely_on_them() -> None:
    generator = stream(5, "posterior", 2**40 + 1)
    expected = [1570848593530605391, 3887570024259700341, 8790755750337240673]
    assert generator.integers(0, 2**63, size=3).tolist() == expected
    noise = normal([stream(5, "posterior", 2**40 + 1)], (3,))
    assert noise[0].tolist() == pytest.approx([0.39998284, 0.47022101, 2.55812001], abs=1e-6)


def test_streams_are_uncorrelated() -> None:
    places = [
        (0, "diffusion", 0),
        (0, "diffusion", 1),
        (1, "diffusion", 0),
        (0, "posterior", 0),
        (0, "diffusion", 2**32),
        (0, "diffusion", 2**32 + 1),
        (-1, "diffusion", 0),
        (2**64 - 2, "diffusion", 0),
    ]
    draws = np.stack([stream(*place).standard_normal(DRAWS) for place in places])
    correlation = np.corrcoef(draws) - np.eye(len(places))
    assert np.abs(correlation).max() < 5 / np.sqrt(DRAWS)  # five standard errors
    for a, b in itertools.combinations(draws, 2):
        assert not np.isin(a, b).any()


@pytest.mark.parametrize("index", [2**32, 2**32 + 1, 2**53 + 1, 2**63 + 5])
def test_large_indices_are_not_folded_onto_small_ones(index: int) -> None:
    draws = stream(0, "diffusion", index).random(16)
    for small in (index % 2**32, index % 2**53, index - 1, index + 1):
        if small != index:
            assert not np.array_equal(stream(0, "diffusion", small).random(16), draws)


def test_neighbouring_streams_share_no_part_even_of_a_long_draw() -> None:
    # A counter in a low word would make stream i + 1 a shifted copy of stream i.
    long, short = stream(0, "x", 0).integers(0, 2**63, 200_000), stream(0, "x", 1).integers(0, 2**63, 64)
    assert not np.isin(short, long).any()


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    shape = (3, 4, 5)
    batch = normal([stream(0, "n", index) for index in range(4)], shape)
    assert batch.shape == (4, *shape)
    assert batch.dtype == torch.float32
    for index in range(4):
        assert torch.equal(normal([stream(0, "n", index)], shape)[0], batch[index])


def test_noise_is_standard_normal() -> None:
    x = normal([stream(0, "n", index) for index in range(64)], (1000,)).double()
    error = 5 / np.sqrt(x.numel())
    assert abs(float(x.mean())) < error
    assert abs(float(x.var()) - 1) < 2 * error
    assert abs(float((x**4).mean()) - 3) < 10 * error * 3
