"""Another library's samplers see our prior and our scan: frames, levels and units by their laws, the library where it is installed."""

import importlib.util
import sys

import pytest
import torch
from torch import Generator, Tensor

from deft_med import peers
from deft_med.errors import UsageError
from deft_med.intensity import Affine
from deft_med.likelihood import Gaussian
from deft_med.nonlinear import Transmission
from deft_med.peers import InUnitNorm, InUnitRange
from deft_med.testing import Laboratory
from operators.mri import Complex, Fourier

installed = pytest.mark.skipif(importlib.util.find_spec("deepinv") is None, reason="deepinv is not installed (extra: peers)")
foreign = pytest.mark.filterwarnings("ignore")  # warnings of another library are its own


@pytest.fixture(scope="module")
def lab() -> Laboratory:
    return Laboratory.ct(24, 30)


@pytest.fixture(scope="module")
def scan(lab: Laboratory) -> tuple[Tensor, Gaussian]:
    generator = Generator().manual_seed(0)
    x0 = lab.draw(1, generator)
    return x0, lab.measure(x0, generator)


def prior(lab: Laboratory):
    return lambda x, sigma: lab.prior(x.double(), sigma.double()).to(x)


def test_the_denoiser_of_v_is_that_of_u(lab: Laboratory) -> None:
    u = lab.draw(2, Generator().manual_seed(1))
    v = (u + 1) / 4
    inner = InUnitRange(lab.prior, -1.0)
    for sigma in (0.05, torch.tensor(0.05), torch.tensor([0.05, 0.05])):
        assert torch.allclose(inner(v, sigma), (lab.prior(u, torch.full((2,), 0.2, dtype=u.dtype)) + 1) / 4, rtol=0, atol=1e-6)
    levels = torch.tensor([0.05, 0.1], dtype=u.dtype)
    assert torch.allclose(inner(v, levels) * 4 - 1, lab.prior(u, 4 * levels))


def test_levels_that_the_prior_does_not_know(lab: Laboratory) -> None:
    """Above, the answer is the one at the highest level of an image with its noise; below, the lowest level is asked."""
    seen = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((float(x.std()), float(sigma)))
        return x

    noise = torch.randn(1, 1, 64, 64, dtype=torch.float64, generator=Generator().manual_seed(0))
    InUnitRange(spy, -1.0)(100 * noise, 100.0)
    InUnitRange(spy, -1.0)(0.5 + 0 * noise, 1e-5)
    assert seen[0] == (pytest.approx(80, rel=0.03), 80.0) and seen[1][1] == pytest.approx(0.01)


def test_the_measurements_are_the_same_scan(lab: Laboratory, scan: tuple[Tensor, Gaussian]) -> None:
    x0, likelihood = scan
    data, generator = InUnitNorm(likelihood, -1.0), Generator().manual_seed(2)
    v = torch.rand(x0.shape, generator=generator, dtype=x0.dtype)
    w = torch.randn(data.y.shape, generator=generator, dtype=x0.dtype)
    assert float((data(v) * w).sum()) == pytest.approx(float((v * data.adjoint(w)).sum()), rel=1e-10)
    misfit = (data.y - data((x0 + 1) / 4)).square().mean() / data.sigma**2
    assert float(misfit) == pytest.approx(float(likelihood.chi2(x0)), rel=1e-6)
    for _ in range(40):
        v = data.adjoint(data(v))
        length = v.norm()
        v = v / length
    assert float(length) == pytest.approx(1, rel=1e-4)


def test_complex_measurements_become_real_ones_and_unmeasured_ones_nothing() -> None:
    generator = Generator().manual_seed(0)
    forward = Affine(Fourier((8, 6)) @ Complex((8, 6)), 2.0, 0.0)
    u = torch.randn(1, 2, 8, 6, dtype=torch.float64, generator=generator)
    sigma = torch.full((1, 8, 6), 0.1, dtype=torch.float64)
    sigma[:, :4] = torch.inf
    likelihood = Gaussian(forward, forward(u), sigma, forward.operator.H)
    data = InUnitNorm(likelihood, -2.0)
    assert data.y.shape == (1, 8, 6, 2) and not data.y[:, :4].any()
    assert torch.allclose(data((u + 2) / 4), data.y)
    w = torch.randn(data.y.shape, generator=generator, dtype=torch.float64)
    assert float((data(u) * w).sum()) == pytest.approx(float((u * data.adjoint(w)).sum()), rel=1e-10)


def test_what_is_refused(lab: Laboratory, scan: tuple[Tensor, Gaussian], monkeypatch: pytest.MonkeyPatch) -> None:
    _, likelihood = scan
    run = {"generators": [Generator()], "steps": 2}
    with pytest.raises(ValueError, match="unknown method 'deepinv-magic'"):
        peers.sample_with("deepinv-magic", lab.prior, likelihood, **run)
    with pytest.raises(ValueError, match="deepinv-dps has no setting zeta"):
        peers.sample_with("deepinv-dps", lab.prior, likelihood, zeta=1.0, **run)
    counts = Transmission(likelihood, torch.ones_like(likelihood.y), 1e4)
    with pytest.raises(ValueError, match="asks for a linear forward model with Gaussian noise, got Transmission"):
        peers.sample_with("deepinv-dps", lab.prior, counts, **run)
    monkeypatch.setitem(sys.modules, "deepinv", None)
    peers._deepinv.cache_clear()
    with pytest.raises(UsageError, match=r"deepinv is not installed.*pip install -c requirements.lock deepinv=="):
        peers.sample_with("deepinv-dps", lab.prior, likelihood, **run)
    peers._deepinv.cache_clear()


@installed
@foreign
def test_without_data_its_dps_samples_our_prior(lab: Laboratory, scan: tuple[Tensor, Gaussian]) -> None:
    """Mean and deviation of the Gaussian prior come out: noise levels and frames are right at both ends."""
    calls = 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x)
        return prior(lab)(x, sigma)

    drawn = peers.sample_with("deepinv-dps", counted, scan[1], generators=[Generator().manual_seed(k) for k in range(16)], steps=100,
                              weight=1e-6)
    assert calls == 16 * 100
    expected = float(lab.spectrum[0, 0] / lab.n**2 / 16) ** 0.5  # of the mean over 16 images
    assert abs(float(drawn.mean()) - lab.mean) < 3 * expected
    assert float((drawn - lab.mean).square().mean().sqrt()) == pytest.approx(lab.sd, rel=0.15)  # first-order steps narrow


@installed
@foreign
@pytest.mark.parametrize(("name", "steps", "weight", "share"), [("deepinv-diffpir", 50, 2.0, 0.5), ("deepinv-dps", 100, 1000.0, 0.7)])
def test_its_samplers_reconstruct_our_scan(lab: Laboratory, scan: tuple[Tensor, Gaussian], name: str, steps: int, weight: float,
                                           share: float) -> None:
    """A sample of the posterior has sqrt 2 of the least error, 0.42 of the prior's deviation."""
    x0, likelihood = scan
    state = torch.get_rng_state()
    first, again = (peers.sample_with(name, prior(lab), likelihood, generators=[Generator().manual_seed(3)], steps=steps, weight=weight)
                    for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state) and first.shape == x0.shape
    assert float((first - x0).square().mean().sqrt()) < share * lab.sd


@installed
@foreign
@pytest.mark.parametrize("name", ["DiffPIR", "DPS", "DDRM"])
def test_its_samplers_take_our_prior_to_its_own_physics(lab: Laboratory, name: str) -> None:
    """Its Tomography and its own simulated data; DDRM, which wants a singular value decomposition, on its inpainting."""
    library = peers._deepinv()
    torch.manual_seed(0)
    noise = library.physics.GaussianNoise(0.01)
    v = ((lab.draw(1, Generator().manual_seed(3)) + 1) / 4).float()
    if name == "DDRM":
        physics = library.physics.Inpainting((1, lab.n, lab.n), mask=0.5, noise_model=noise)
    else:
        physics = library.physics.Tomography(angles=30, img_width=lab.n, normalize=True, noise_model=noise)
    y, inner = physics(v), InUnitRange(prior(lab), -1.0)
    made = {"DiffPIR": lambda: library.sampling.DiffPIR(inner, library.optim.data_fidelity.L2(), sigma=0.01, max_iter=50, zeta=0.5,
                                                        lambda_=2.0)(y, physics, x_init=torch.zeros_like(v)),
            "DPS": lambda: library.sampling.DPS(inner, num_steps=101, weight=1000.0)(y, physics, x_init=tuple(v.shape)),
            "DDRM": lambda: library.sampling.DDRM(inner, sigmas=torch.logspace(0.5, -2, 50).tolist())(y, physics)}[name]()
    blank = torch.full_like(v, (lab.mean + 1) / 4)
    ratio = float((made - v).square().mean() / (blank - v).square().mean()) ** 0.5
    print(f"{name}: error {ratio:.2f} of the prior's deviation")
    assert ratio < 0.75
