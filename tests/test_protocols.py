"""Every protocol that is no plain scan: what it simulates fits its own likelihood, and what was not measured counts nowhere."""

import numpy as np
import pytest
import torch

from deft_med import bundle
from deft_med.config import KSpaceProtocol, Metal, Noise, SliceProtocol, protocol
from deft_med.errors import UnsupportedError, UsageError
from deft_med.guidance import dds, red_diff
from deft_med.likelihood import Gaussian
from deft_med.nonlinear import Magnitudes, Nonlinear, Transmission
from deft_med.problem import Problem, pose, with_known_noise
from deft_med.schedule import sigmas
from deft_med.simulate import simulate
from deft_med.volume import Counts, Scan, Volume
from operators import counts
from operators.geometry import ThickSlices
from operators.slices import SliceInterpolation, SliceMean
from operators.testing import check_operator

N = 48
TASKS = ("ct_counts", "ct_metal_trace", "ct_missing_wedge", "ct_superresolution", "phase_retrieval")


def head(unit: str = "HU") -> Volume:
    y, x = np.meshgrid(*[np.linspace(-1, 1, N)] * 2, indexing="ij")
    hu = np.where((x / 0.75) ** 2 + (y / 0.6) ** 2 < 1, 40.0, -1000.0)
    hu[(x - 0.2) ** 2 + (y + 0.1) ** 2 < 0.02] = 300
    return Volume((hu if unit == "HU" else hu + 1000)[None].astype(np.float32), np.diag([1.0, 1.0, 1.0, 1.0]), unit)


def posed(name: str, seed: int = 0) -> tuple[Scan, Problem]:
    chosen = protocol(name)
    scan = simulate(head("HU" if chosen.modality == "CT" else "a.u."), chosen, seed=seed)
    return scan, pose(scan)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_fits_its_reference_and_can_be_solved(name: str) -> None:
    scan, problem = posed(name)
    likelihood = problem.likelihood
    start = likelihood.direct()
    assert start.shape == (1, *likelihood.shape) and torch.isfinite(start).all()
    assert torch.isfinite(likelihood.s_img).all() and torch.isfinite(likelihood.score(start)).all()
    assert list(problem.classical)[0] in problem.baselines
    if problem.image is not None:
        truth = problem.image(scan.reference.data[0])  # type: ignore[union-attr]
        # below 1 by the sub-pixel part, which a piecewise constant head on its own grid does not have
        assert 0.3 < float(likelihood.chi2(truth)) < 1.2
        assert float(likelihood.chi2(start)) > 2 * float(likelihood.chi2(truth))
        if isinstance(likelihood, Gaussian):
            one = dds(lambda x, sigma: x, likelihood, sd=0.5, iterations=10)(start, torch.ones(1))
            assert float((one - truth).square().mean()) < float((start - truth).square().mean())
            assert float(likelihood.chi2(one)) < 0.7 * float(likelihood.chi2(start))


@pytest.mark.parametrize("name", ["ct_counts", "phase_retrieval"])
def test_a_gradient_method_runs_on_what_is_not_linear(name: str) -> None:
    likelihood = posed(name)[1].likelihood
    x = torch.zeros(1, *likelihood.shape)
    begun = likelihood.misfit(x)
    found = red_diff(lambda x, sigma: likelihood.direct(), likelihood, x, sigmas(12), weight=1.0, rate=0.02,
                     generators=[torch.Generator().manual_seed(0)])
    assert float(likelihood.misfit(found)) < 0.05 * float(begun)


def test_scores_are_gradients() -> None:
    """Against finite differences in double precision, at the images where methods start."""
    for name in ("ct_counts", "phase_retrieval"):
        likelihood = posed(name)[1].likelihood
        u = likelihood.direct() + 0.05
        direction = torch.randn(u.shape, generator=torch.Generator().manual_seed(1))
        slope = float((likelihood.score(u) * direction).sum())
        ends = [float(likelihood.misfit(u + h * direction).double()) for h in (1e-3, -1e-3)]
        assert -0.5 * (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=2e-2), name


def test_many_photons_make_counts_gaussian() -> None:
    """Differences of ln p between two near images agree with those of the logarithms' Gaussian where every ray has many counts."""
    rays = protocol("ct_counts")
    many = {"photons": 1e5, "electronic": 0.0, "ceiling": None}
    scan = simulate(head(), type(rays)(**{**vars(rays), "noise": Noise(counts=True, **many)}), seed=3)  # type: ignore[arg-type]
    likelihood = pose(scan).likelihood
    assert isinstance(likelihood, Transmission)
    truth = pose(scan).image(scan.reference.data[0])  # type: ignore[misc, union-attr]
    other = truth + 1e-2 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    lines = likelihood.lines
    plain = Gaussian(lines.forward, lines.y, torch.from_numpy(counts.line_integrals(likelihood.counts, 1e5)[1].numpy()), lines.inverse)
    found, wanted = (float(one.misfit(other).double() - one.misfit(truth).double()) for one in (likelihood, plain))
    assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(("name", "words"), [("ct_metal_trace", "parallel but incomplete"), ("ct_superresolution", "thick-slice")])
def test_a_card_says_that_it_does_not_cover_them(name: str, words: str) -> None:
    assert any(words in flag for flag in bundle.check(bundle.load_model("ct").card, posed(name)[0]))


def test_rays_that_were_not_measured_count_nowhere() -> None:
    scan, problem = posed("ct_metal_trace")
    likelihood, missing = problem.likelihood, ~np.isfinite(scan.noise)  # type: ignore[arg-type]
    assert 0.01 < missing.mean() < 0.5 and (scan.y[missing] == 0).all()
    u = likelihood.direct()
    moved = Gaussian(likelihood.forward, torch.where(torch.from_numpy(missing)[:, None], 7.0, likelihood.y), likelihood.sigma,
                     likelihood.inverse)
    torch.testing.assert_close(moved.misfit(u), likelihood.misfit(u))
    torch.testing.assert_close(moved.residual(u), likelihood.residual(u))
    torch.testing.assert_close(moved.score(u), likelihood.score(u))
    assert int(likelihood.count) == (~missing).sum()


def test_thick_slices_have_an_exact_adjoint_and_an_interpolation() -> None:
    for thick in (ThickSlices(rows=17, columns=6, factor=4), ThickSlices(rows=16, columns=5, factor=4, fwhm=3.0)):
        mean = SliceMean(thick)
        check_operator(mean)
        flat = torch.full((1, thick.rows, thick.columns), 3.0)
        torch.testing.assert_close(mean(flat), torch.full((1, *thick.shape), 3.0))
        torch.testing.assert_close(SliceInterpolation(thick)(mean(flat)), flat)


def test_any_forward_model_is_a_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 1, 6, 6, generator=generator)
    y = truth.square() + 0.01 * torch.randn(truth.shape, generator=generator)
    likelihood = Nonlinear(torch.square, y, torch.tensor(0.01), (1, 6, 6), inverse=lambda v: v.clamp(min=0).sqrt())
    assert likelihood.chi2(truth) == pytest.approx([1, 1], abs=0.6)
    torch.testing.assert_close(likelihood.score(truth), 2 * truth * (y - truth.square()) / 1e-4, rtol=1e-3, atol=1e-3)
    assert float(likelihood.residual(truth).abs().mean()) < 0.05 and likelihood.take(torch.tensor([1])).y.shape[0] == 1
    with pytest.raises(ValueError, match="no approximate inverse"):
        Nonlinear(torch.square, y, torch.tensor(0.01), (1, 6, 6)).direct()


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Noise(gaussian_percent=1.0, counts=True), "noise counts want photons"),
    (lambda: Metal(disks=0), "metal wants disks >= 1"),
    (lambda: SliceProtocol("p", factor=0, noise_hu=1.0), "wants factor >= 1"),
    (lambda: SliceProtocol("p", factor=9, noise_hu=1.0).acquisition((4, 4)), "has no slice of 9"),
    (lambda: KSpaceProtocol("p", "equispaced", 1.0, coils=1, phaseless=True), "wants coils >= 2"),
    (lambda: type(protocol("ct_sparse60"))("p", 60, Noise(photons=1e4), missing_deg=(120.0, 60.0)), "missing_deg wants two angles"),
])
def test_protocols_that_make_no_sense_are_refused(make, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_scans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="must not exceed the ceiling 5"):
        Counts(np.full((1, 2), 6.0, np.float32), 10.0, ceiling=5.0)
    with pytest.raises(ValueError, match="Counts wants photons > 0"):
        Counts(np.ones((1, 2), np.float32), 0.0)
    with pytest.raises(ValueError, match="counts want photons > 0"):
        counts.draw(torch.ones(2), 0.0, generator=torch.Generator())
    with pytest.raises(ValueError, match="at most the 3 rows"):
        ThickSlices(rows=3, columns=3, factor=4)
    with pytest.raises(ValueError, match="reformat needs 'coronal' or 'sagittal'"):
        head().reformat("axial")
    thick = simulate(head(), protocol("ct_superresolution"))
    with pytest.raises(UnsupportedError, match="cannot be told from the data"):
        with_known_noise(Scan(y=thick.y, acquisition=thick.acquisition, grid=thick.grid, noise=None))
    assert isinstance(posed("phase_retrieval")[1].likelihood, Magnitudes)


def test_reformatted_voxels_stay_where_they_are() -> None:
    volume = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.diag([1.0, 2.0, 3.0, 1.0]), "HU")
    for plane, place in (("coronal", (1, 1, 2)), ("sagittal", (2, 1, 1))):
        turned = volume.reformat(plane)
        k, row, column = place
        assert turned.data[k, row, column] == volume.data[1, 1, 2]
        np.testing.assert_allclose(turned.affine @ [column, row, k, 1], volume.affine @ [2, 1, 1, 1])
