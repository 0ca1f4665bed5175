"""ASTRA above the memory cap: the same operator as the matrix, and never a silent failure."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from operators import _sparse
from operators._astra import AstraProjector, serves
from operators.ct import RayTransform
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles

GRID = Grid(shape=(63, 80), spacing=(1.3, 1.3))
PARALLEL = ParallelBeam(angles=uniform_angles(40, math.pi, 0.2), detectors=131, pitch=1.1, offset=2.7)
FAN = FanBeam(angles=uniform_angles(40, 6.0), detectors=131, pitch=2.1, source_origin=200.0, origin_detector=100.0, offset=2.7)


def image():
    x = torch.rand(3, *GRID.shape, generator=torch.Generator().manual_seed(0))
    x[:, :20, 10:] = 0  # lopsided in both axes
    return x


@pytest.mark.parametrize(("beam", "tolerance"), [(PARALLEL, 1e-4), (FAN, 4e-2)], ids=["parallel", "fan"])
def test_above_the_cap_astra_takes_over(monkeypatch, beam, tolerance):
    x = image()
    stored = RayTransform(GRID, beam)
    y = stored(x)
    back = stored.H(y)
    monkeypatch.setattr(_sparse, "MEMORY_CAP", 1000)
    large = RayTransform(GRID, beam)
    assert isinstance(large._projector(), AstraProjector)
    assert float((large(x) - y).norm() / y.norm()) < tolerance
    assert float((large.H(y) - back).norm() / back.norm()) < tolerance
    assert large.adjoint_error() < 1e-6
    assert pickle.loads(pickle.dumps(large._projector()))._cpu is None
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(large(leaf).square().sum() / 2, leaf)
    torch.testing.assert_close(gradient, large.gram(x))


def test_astra_serves_what_it_can():
    cpu = torch.device("cpu")
    assert serves(GRID, PARALLEL, cpu) and serves(GRID, FAN, cpu)
    assert not serves(Grid(shape=(4, 4), spacing=(1.0, 2.0)), PARALLEL, cpu)
    assert not serves(GRID, FanBeam(**{**vars(FAN), "curved": True}), cpu)
    assert not serves(GRID, FAN, torch.device("cuda"))
    with pytest.raises(ValueError, match="ASTRA does not project ParallelBeam with these pixels on meta"):
        AstraProjector(GRID, PARALLEL).forward(torch.zeros(1, 63 * 80, device="meta"))


def test_a_projection_that_was_not_written_is_noticed(monkeypatch):
    projector = AstraProjector(GRID, PARALLEL)
    monkeypatch.setattr(AstraProjector, "_on_cpu", lambda *_: None)
    with pytest.raises(RuntimeError, match="ASTRA wrote no projection"):
        projector.forward(image().flatten(1))
    with pytest.raises(RuntimeError, match="ASTRA wrote no backprojection"):
        projector.adjoint(torch.ones(1, 40 * 131))
    assert not projector.forward(torch.zeros(1, 63 * 80)).any()


@pytest.mark.gpu
def test_stacked_slices_on_cuda_are_the_matrix():
    x = image().cuda()
    stored = RayTransform(GRID, PARALLEL).cuda()
    projector = AstraProjector(GRID, PARALLEL)
    y = stored(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        direct = projector.forward(x.flatten(1)).reshape(y.shape)
        back = projector.adjoint(y.flatten(1)).reshape(x.shape)
    stream.synchronize()
    assert float((direct - y).norm() / y.norm()) < 2e-2  # texture interpolation
    expected = stored.H(y)
    assert float((back - expected).norm() / expected.norm()) < 5e-2  # voxel-driven, not the exact adjoint
