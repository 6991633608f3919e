"""The gauge of collapse, against cases worked out by hand."""

import numpy as np
import pytest

from prime_jax.train.validate import effective_rank


def test_effective_rank_by_hand() -> None:
    """Points on k axes, both ways, spread equally in k directions; on one line in one; equal ones in none."""
    for axes in (1, 3, 8):
        points = np.concatenate([np.eye(8)[:axes], -np.eye(8)[:axes]]).astype(np.float32)
        assert effective_rank(points) == pytest.approx(axes, rel=1e-5)
    assert effective_rank(np.ones((5, 8), np.float32)) == pytest.approx(1)


def test_effective_rank_lies_between_for_unequal_directions() -> None:
    """Two directions with singular values 3 : 1, so e to the entropy of (3/4, 1/4)."""
    points = np.array([[3, 0], [-3, 0], [0, 1], [0, -1]], np.float32)
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(points) == pytest.approx(expected, rel=1e-5)
