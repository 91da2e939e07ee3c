"""Rotary positions. test_parity.py compares their kinds with those of transformers."""

import numpy as np
import pytest

from jchain.hub.config import Config
from jchain.hub.rotary import compute_rotary, read_rope_options, select_frequencies

LENGTH = {"max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]}


def compute(options, *, is_partial=False):
    config = Config(LENGTH | options, "config")
    return compute_rotary(config, read_rope_options(config), 4, is_partial=is_partial)


def test_rope_scaling_takes_the_place_of_rope_parameters():
    linear, both = {"rope_type": "linear", "factor": 2.0}, {"rope_parameters": {"rope_theta": 9.0}}
    assert compute(both).frequencies == pytest.approx((1, 9**-0.5))
    assert compute(both | {"rope_theta": 100.0}).frequencies == pytest.approx((1, 9**-0.5))
    assert compute(both | {"rope_scaling": linear}).frequencies == pytest.approx((0.5, 0.005))
    assert compute(both | {"rope_scaling": {}}) == compute(both | {"rope_scaling": None})
    theta = {"rope_scaling": linear, "rope_theta": 100.0}
    assert compute(both | theta).frequencies == pytest.approx((0.5, 0.05))


def test_dynamic_scaling_changes_long_sequences_only():
    found = compute({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 100.0})
    assert found.long == (64, 2.0)
    for length in (1, 64):
        assert select_frequencies(found.frequencies, found.long, length) == found.frequencies
    # The base becomes 100 * (2 * 96 / 64 - 1) ** (4 / (4 - 2)).
    base = 100.0 * 2.0**2
    longer = select_frequencies(found.frequencies, found.long, 96)
    np.testing.assert_allclose(longer, [1, base**-0.5], rtol=1e-6)


def test_longrope_has_factors_for_long_sequences():
    options = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16, "rope_theta": 4.0}
    found = compute(options)
    assert select_frequencies(found.frequencies, found.long, 16) == pytest.approx((1, 0.25))
    assert select_frequencies(found.frequencies, found.long, 17) == pytest.approx((0.25, 0.0625))
    assert found.scale == pytest.approx(np.sqrt(1 + np.log(4) / np.log(16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rope_scaling": "linear"},
            "rope_scaling = 'linear' is not supported, expected an object",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope_type = 'mrope' is not supported, expected def"),
        ({"rope_theta": -1}, "rope_theta = -1.0 is not supported, expected a positive number"),
        ({"rope_theta": "1e4"}, "rope_theta = '1e4' is not supported, expected a number"),
        ({"rope_theta": float("inf")}, "rope_theta = inf is not supported, expected a number"),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0]}},
            "long_factor = .1.0. is not supported, expected a list of 2 numbers",
        ),
        (
            {"rope_scaling": LONGROPE | {"short_factor": [1.0, 0.0]}},
            "short_factor = .* is not supported, expected a list of 2 positive numbers",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.0}},
            "rope_type = 'linear' is not supported, expected options with which frequencies are",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "rope_scaling: partial_rotary_factor = 0.5 is not supported, expected None or 1.0",
        ),
    ],
)
def test_options_that_make_no_frequencies_are_rejected(options, message):
    with pytest.raises(ValueError, match=message), np.errstate(divide="ignore"):
        compute(options)


def test_a_part_of_each_head_is_rotated():
    half = {"partial_rotary_factor": 0.5}
    assert compute(half) == compute({})
    assert compute(half, is_partial=True).frequencies == (1.0,)
    for share in (2.0, -0.5, 0.1):
        with pytest.raises(ValueError, match=f"partial_rotary_factor = {share} is not supported"):
            compute({"partial_rotary_factor": share}, is_partial=True)
