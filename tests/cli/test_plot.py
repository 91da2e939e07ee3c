import numpy as np
import pytest

from jchain.cli import plot
from jchain.gradient.layer_report import report_layers


def test_plot_layers_writes_a_png_and_rejects_mixed_layers(problem, two_group_problem, tmp_path):
    plot.plot_layers(tmp_path / "layers.png", report_layers(problem, np.array([2, 0, 3, 5])))
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="tensors of the same names and shapes, got 2 kinds"):
        plot.plot_layers(
            tmp_path / "other.png", report_layers(two_group_problem, np.array([1, 4, 2, 6]))
        )
    with pytest.raises(
        ValueError, match="at least one layer, with tensors of the same names and shapes, got 0"
    ):
        plot.plot_layers(tmp_path / "other.png", report_layers(problem, np.array([5, -1, -1, -1])))
    assert not (tmp_path / "other.png").exists()
