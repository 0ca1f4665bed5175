"""Built on ODL: the same rays, the same numbers, ODL's operators and solvers on ours, and nothing of ODL's left behind."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from operators import odl_bridge, patterns
from operators.ct import RayTransform
from operators.geometry import FanBeam, Grid, ParallelBeam, uniform_angles
from operators.linear import LinearOperator
from operators.mri import CartesianMRI, Complex
from operators.testing import check_operator

GRID = Grid(shape=(23, 30), spacing=(1.3, 1.3))
UNEVEN = tuple(math.pi * (k / 40) ** 1.2 for k in range(40))
BEAMS = {
    "parallel": ParallelBeam(angles=uniform_angles(17, math.pi, 0.2), detectors=43, pitch=1.1, offset=-1.75),
    "parallel uneven": ParallelBeam(angles=UNEVEN, detectors=43, pitch=1.1),
    "fan": FanBeam(angles=uniform_angles(50, 6.0), detectors=39, pitch=1.9, source_origin=80.0, origin_detector=40.0, offset=1.0),
    "curved": FanBeam(
        angles=uniform_angles(50, 6.0), detectors=39, pitch=1.9, source_origin=80.0, origin_detector=10.0, curved=True, offset=2.3
    ),
}


@pytest.fixture(scope="module")
def odl():
    return odl_bridge._odl()


@pytest.fixture
def tomo(odl):
    return odl.applications.tomo


@pytest.mark.parametrize("name", BEAMS)
def test_our_rays_are_odls(name):
    beam = BEAMS[name]
    points, directions = beam.rays()
    others, ways = odl_bridge.odl_rays(odl_bridge.odl_geometry(beam))
    across = (others - points)[..., 0] * directions[..., 1] - (others - points)[..., 1] * directions[..., 0]
    np.testing.assert_allclose(ways, directions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(across, 0, atol=1e-12)


@pytest.mark.parametrize("name", BEAMS)
def test_geometries_and_spaces_go_there_and_back(name):
    beam = BEAMS[name]
    back = odl_bridge.from_odl_geometry(odl_bridge.odl_geometry(beam))
    assert type(back) is type(beam) and back.shape == beam.shape
    np.testing.assert_allclose(back.rays()[0], beam.rays()[0], atol=1e-12)
    np.testing.assert_allclose(back.rays()[1], beam.rays()[1], atol=1e-12)
    grid = odl_bridge.from_odl_space(odl_bridge.odl_space(Grid(shape=(7, 9), spacing=(2.0, 0.5))))
    assert grid.shape == (7, 9)
    assert grid.spacing == pytest.approx((2.0, 0.5))


@pytest.mark.parametrize("name", BEAMS)
def test_our_projector_drives_odls_ray_transform(name, tomo):
    ours = RayTransform(GRID, BEAMS[name])
    theirs = odl_bridge.as_odl(ours)
    assert isinstance(theirs, tomo.RayTransform)
    x, y = torch.rand(GRID.shape), torch.rand(BEAMS[name].shape)
    element = theirs.domain.element(x.T.numpy())  # ODL's image is (x, y)-indexed
    np.testing.assert_allclose(theirs(element).asarray(), ours(x), rtol=1e-6)
    back = theirs.adjoint(theirs.range.element(y.numpy()))
    np.testing.assert_allclose(back.asarray().T, ours.H(y), rtol=1e-6)
    again = odl_bridge.from_odl(theirs)
    torch.testing.assert_close(again(x), ours(x))
    assert again.adjoint_error() < 1e-6


def test_on_odls_own_weighted_space_the_adjoint_is_odls(odl, tomo):
    space = odl.uniform_discr([-15 * 1.3, -11.5 * 1.3], [15 * 1.3, 11.5 * 1.3], (30, 23), dtype="float32")
    geometry = odl_bridge.odl_geometry(BEAMS["parallel uneven"])
    ours = RayTransform(odl_bridge.from_odl_space(space), odl_bridge.from_odl_geometry(geometry))
    theirs = tomo.RayTransform(space, geometry, impl="astra_cpu")
    plugged = odl_bridge.odl_ray_transform(ours, space, geometry)
    x = space.element(np.random.default_rng(0).random((30, 23)))
    y = theirs(x)
    np.testing.assert_allclose(plugged(x).asarray(), y.asarray(), atol=1e-4 * float(np.abs(y.asarray()).max()))
    expected = theirs.adjoint(y).asarray()
    np.testing.assert_allclose(plugged.adjoint(y).asarray(), expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("name", "tolerance"), [("parallel uneven", 1e-4), ("fan", 3e-2)])  # ASTRA's fan weighs rays otherwise
def test_forward_agrees_with_astra_through_odl(name, tolerance, tomo):
    grid = Grid(shape=(64, 64), spacing=(1.0, 1.0))
    beam = (
        ParallelBeam(angles=UNEVEN, detectors=93, pitch=1.0)
        if name != "fan"
        else BEAMS["fan"].__class__(**{**vars(BEAMS["fan"]), "detectors": 93, "pitch": 1.6})
    )
    theirs = odl_bridge.from_odl(
        tomo.RayTransform(
            odl_bridge.odl_space(grid),
            odl_bridge.odl_geometry(beam),
            impl="astra_cpu",
            proj_space=odl_bridge.as_odl(RayTransform(grid, beam)).range,
        )
    )
    x = torch.rand(2, 64, 64)
    expected = theirs(x)
    assert float((RayTransform(grid, beam)(x) - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("name", ["parallel", "curved"])
def test_an_odl_operator_keeps_our_contract(name):
    operator = odl_bridge.from_odl(odl_bridge.as_odl(RayTransform(GRID, BEAMS[name])))
    assert operator.domain_shape == GRID.shape
    x = torch.rand(2, *GRID.shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(x).square().sum() / 2, x, create_graph=True)
    torch.testing.assert_close(gradient, operator.gram(x))
    (second,) = torch.autograd.grad(gradient.square().sum() / 2, x)
    torch.testing.assert_close(second, operator.gram(gradient).detach())


class Matrix(LinearOperator):
    def __init__(self):
        super().__init__((3, 4), (5,), torch.complex64, torch.complex64)
        self.matrix = torch.randn(5, 12, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))

    def _forward(self, x):
        return x.flatten(-2) @ self.matrix.to(x.dtype).T

    def _adjoint(self, y):
        return (y @ self.matrix.to(y.dtype).conj()).unflatten(-1, (3, 4))


def test_any_operator_crosses_both_ways(odl):
    ours = Matrix()
    check_operator(ours)
    theirs = odl_bridge.as_odl(ours)
    x, y = theirs.domain.one(), theirs.range.one()
    assert complex(theirs(x).inner(y)) == pytest.approx(complex(x.inner(theirs.adjoint(y))), rel=1e-5)
    back = odl_bridge.from_odl(theirs)
    value = torch.ones(2, 3, 4, dtype=torch.complex64)
    torch.testing.assert_close(back(value), ours(value))
    assert back.adjoint_error() < 1e-6
    gradient = odl_bridge.from_odl(odl.PartialDerivative(odl_bridge.odl_space(GRID), axis=0))  # ODL's own, weighted and (x, y)-indexed
    assert gradient.domain_shape == GRID.shape
    assert gradient.adjoint_error() < 1e-6
    ramp = torch.arange(30.0).expand(GRID.shape) * 1.3
    torch.testing.assert_close(gradient(ramp)[:, 1:-1], torch.ones(23, 28), rtol=1e-4, atol=1e-4)


def test_an_odl_solver_runs_on_ours(odl):
    ours = RayTransform(GRID, BEAMS["fan"])
    theirs = odl_bridge.as_odl(ours)
    truth = torch.zeros(GRID.shape)
    truth[5:12, 8:20] = 1
    y = theirs.range.element(ours(truth).numpy())
    x = theirs.domain.zero()
    odl.solvers.conjugate_gradient_normal(theirs, x, y, niter=60)
    assert float(np.abs(x.asarray().T - truth.numpy()).max()) < 0.15


@pytest.fixture
def mri():
    maps = torch.randn(3, 12, 15, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)) / 3
    return CartesianMRI(patterns.equispaced((12, 15), 2), maps)


def test_odls_algebra_runs_on_mri(odl, mri):
    theirs = odl_bridge.as_odl(mri)
    assert theirs.domain == odl.cn((12, 15), dtype="complex64") and theirs.range.shape == (3, 12, 15)
    x = torch.randn(12, 15, dtype=torch.complex64)
    y = mri(x) + 0.1
    gap = complex(theirs(x.numpy()).inner(theirs.range.element(y.numpy()))) - complex(
        theirs.domain.element(x.numpy()).inner(theirs.adjoint(y.numpy()))
    )
    assert abs(gap) < 1e-5 * float(torch.linalg.vector_norm(y)) ** 2
    twice = 2j * theirs.adjoint * theirs + odl.IdentityOperator(theirs.domain)
    np.testing.assert_allclose(twice(x.numpy()).asarray(), 2j * mri.gram(x) + x, atol=1e-5)
    real = odl_bridge.as_odl(mri @ Complex((12, 15)))
    assert real.domain == odl.rn((2, 12, 15), dtype="float32")
    back = odl_bridge.from_odl(real)
    assert back.adjoint_error() < 1e-6
    image = torch.randn(2, 2, 12, 15)
    torch.testing.assert_close(back(image), mri(torch.complex(image[:, 0], image[:, 1])))


def test_an_odl_solver_runs_on_mri(odl, mri):
    theirs, truth = odl_bridge.as_odl(mri), torch.randn(12, 15, dtype=torch.complex64)
    x = theirs.domain.zero()
    odl.solvers.conjugate_gradient_normal(theirs, x, theirs.range.element(mri(truth).numpy()), niter=60)
    np.testing.assert_allclose(x.asarray(), truth, atol=1e-3)


def test_crossing_to_odl_costs_microseconds(mri):
    theirs, x = odl_bridge.as_odl(mri), torch.randn(12, 15, dtype=torch.complex64)
    element = theirs.domain.element(x.numpy())
    assert np.shares_memory(odl_bridge._view(element).numpy(), element.data), "nothing is copied on the way in"

    def best(work):
        spent = []
        for _ in range(50):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
        return min(spent)

    assert best(lambda: theirs(element)) - best(lambda: mri(x)) < 300e-6


def test_importing_odl_leaves_no_trace():
    code = (
        "import numpy as np, os; before = np.get_printoptions(), os.environ.get('SCIPY_ARRAY_API')\n"
        "from operators import odl_bridge; odl_bridge._odl()\n"
        "assert (np.get_printoptions(), os.environ.get('SCIPY_ARRAY_API')) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_reconstruction_imports_no_odl():
    code = (
        "import sys, operators.ct, operators.analytic, operators.sense, operators.variational, operators.odl_bridge\n"
        "assert not {'odl', 'astra', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_the_bridge_says_what_it_cannot_carry(odl, tomo):
    space, fan = odl_bridge.odl_space(GRID), odl_bridge.odl_geometry(BEAMS["fan"])
    with pytest.raises(ValueError, match="two or more rising angles"):
        odl_bridge.odl_geometry(ParallelBeam(angles=(1.0, 0.0), detectors=3, pitch=1.0))
    with pytest.raises(ValueError, match="a grid needs a uniform two-dimensional space"):
        odl_bridge.from_odl_space(odl.rn(3))
    with pytest.raises(ValueError, match="a grid is centred on the isocentre"):
        odl_bridge.from_odl_space(odl.uniform_discr([0, 0], [1, 1], (4, 4)))
    with pytest.raises(ValueError, match="expected a Parallel2dGeometry or a FanBeamGeometry, got NoneType"):
        odl_bridge.from_odl_geometry(None)
    with pytest.raises(ValueError, match="bins must be evenly spaced"):
        odl_bridge.from_odl_geometry(tomo.Parallel2dGeometry(fan.motion_partition, odl.nonuniform_partition([0, 1, 3])))
    with pytest.raises(ValueError, match="arc must be centred on the source"):
        odl_bridge.from_odl_geometry(
            tomo.FanBeamGeometry(fan.motion_partition, odl.uniform_partition(-0.1, 0.1, 5), 80, 40, det_curvature_radius=70)
        )
    with pytest.raises(ValueError, match="shifted or tilted"):
        odl_bridge.from_odl_geometry(tomo.FanBeamGeometry(fan.motion_partition, fan.det_partition, 80, 40, translation=(3, 0)))
    with pytest.raises(ValueError, match="are not those of RayTransform"):
        odl_bridge.odl_ray_transform(RayTransform(GRID, BEAMS["parallel"]), space, fan)
    with pytest.raises(ValueError, match=r"the projector's grid is \(30, 23\)"):
        odl_bridge.Projector(RayTransform(GRID, BEAMS["fan"])).call_forward(odl.rn((4, 4)).zero())
    with pytest.raises(TypeError, match="expected an ODL operator, got RayTransform"):
        odl_bridge.from_odl(RayTransform(GRID, BEAMS["fan"]))
    with pytest.raises(ValueError, match="only a linear operator can be wrapped"):
        odl_bridge.from_odl(odl.PowerOperator(odl.rn(3), 2.0))
    with pytest.raises(ValueError, match="only a constant weighting can be undone"):
        odl_bridge.from_odl(odl.IdentityOperator(odl.rn(3, dtype="float32", weighting=np.array([1.0, 2.0, 3.0], dtype="float32"))))
