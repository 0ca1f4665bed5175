"""The operators' bars, as a test."""

import pytest

from operators import bench


@pytest.mark.slow
def test_every_bar_is_met(capsys):
    assert bench.main([]) == 0
    assert "all bars met" in capsys.readouterr().out
