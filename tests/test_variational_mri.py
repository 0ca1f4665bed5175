"""Classical MRI: coil-by-coil encodings of a head, and what CG-SENSE, wavelets and total variation make of them."""

from __future__ import annotations

import math

import pytest
import torch
from mri_phantom import Sense, equispaced, fourier, head, ring

from operators.linear import LinearOperator
from operators.noise import gaussian
from operators.solve import cg_sense
from operators.testing import check_operator
from operators.variational import _octaves, _Wavelets, tv, wavelet

SHAPE = (40, 35)
IMAGE = head(SHAPE).to(torch.complex64)
A = Sense(ring(8, SHAPE).to(torch.complex64), equispaced(SHAPE, 5, 10))
SIGMA = 0.02


def measured(seed=0, sigma=SIGMA):
    return gaussian(A(IMAGE), sigma, generator=torch.Generator().manual_seed(seed)) * A.mask


def psnr(x):
    return float(-10 * torch.log10((x.abs() - IMAGE.abs()).pow(2).mean() / IMAGE.abs().max() ** 2))


def test_the_operator_of_these_tests():
    check_operator(A, tolerance=1e-6)


class Unitary(LinearOperator):
    def _forward(self, x):
        return fourier(x)

    def _adjoint(self, y):
        return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(y, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


FOURIER = Unitary(SHAPE, SHAPE, torch.complex64, torch.complex64)


def test_cg_sense_solves_its_normal_equations_item_by_item():
    y = torch.stack([measured(), 1e-3 * measured(1), torch.zeros_like(measured())]).to(torch.complex128)
    x = cg_sense(A, y, 0.05, iterations=200, tolerance=1e-10)
    assert x.shape == (3, *SHAPE)
    residual = A.H(A(x) - y) + 0.05 * x
    assert float(residual[0].abs().max()) < 1e-9 and float(residual[1].abs().max()) < 1e-12 and not x[2].any()
    torch.testing.assert_close(cg_sense(A, y[1], 0.05, iterations=200, tolerance=1e-10), x[1])
    assert torch.equal(cg_sense(A, y, 0.05, iterations=3, x0=x, tolerance=1e-6), x)
    ridge = cg_sense(FOURIER, fourier(IMAGE), 1.0)
    torch.testing.assert_close(ridge, IMAGE / 2, rtol=0, atol=1e-5)


def test_too_many_iterations_without_a_weight_are_worse_than_none():
    y = measured()
    few, many, weighted = (psnr(cg_sense(A, y, w, iterations=n, tolerance=0)) for w, n in ((0.0, 4), (0.0, 60), (0.03, 60)))
    assert many < few and many < psnr(A.H(y)) and many < weighted
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        cg_sense(A, y, -1.0)


@pytest.mark.parametrize("n", [32, 45, 33])
def test_octaves_share_the_energy_of_every_frequency(n):
    low, high = _octaves(n, 4)
    kept = sum(h.abs() ** 2 / 2 ** (j + 1) for j, h in enumerate(high)) + low[-1].abs() ** 2 / 2**4
    torch.testing.assert_close(kept, torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_wavelets_have_an_adjoint_and_a_spectrum(dtype):
    w = _Wavelets(3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 19, 16, dtype=dtype, generator=generator)
    p = torch.randn(9, 2, 19, 16, dtype=dtype, generator=generator)
    assert w.apply(x).dtype == dtype and w.apply(x).shape == p.shape
    torch.testing.assert_close(torch.vdot(w.apply(x).flatten(), p.flatten()), torch.vdot(x.flatten(), w.adjoint(p).flatten()))
    torch.testing.assert_close(
        w.adjoint(w.apply(x)),
        torch.fft.ifft2(w.spectrum(x) * torch.fft.fft2(x)).to(dtype)
        if x.is_complex()
        else torch.fft.ifft2(w.spectrum(x) * torch.fft.fft2(x)).real,
    )
    assert float(w.apply(torch.ones_like(x)).abs().max()) < 1e-12  # a constant has no details
    y, columns = torch.meshgrid(torch.arange(19.0), torch.arange(16.0), indexing="ij")
    ramp = (y + columns).to(dtype).expand(2, -1, -1)
    assert float(w.apply(ramp)[:3, :, 4:-4, 4:-4].abs().max()) < 1e-9  # nor has a slope, away from the wrapped edges


def test_the_norm_is_the_mean_over_the_shifts_of_the_orthogonal_one():
    x = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    root = math.sqrt(3)
    h = torch.tensor([1 + root, 3 + root, 3 - root, 1 - root], dtype=torch.float64) / (4 * math.sqrt(2))
    g = h.flip(0) * torch.tensor([1.0, -1.0, 1.0, -1.0])

    def halved(a, taps, axis):
        return sum(t * a.roll(k, axis) for k, t in enumerate(taps)).index_select(axis, torch.arange(0, a.shape[axis], 2))

    def details(a, levels):
        total = 0.0
        for _ in range(levels):
            rows_low, rows_high = halved(a, h, 0), halved(a, g, 0)
            for band in (halved(rows_low, g, 1), halved(rows_high, h, 1), halved(rows_high, g, 1)):
                total = total + band.abs().sum()
            a = halved(rows_low, h, 1)
        return total

    mean = torch.stack([details(x.roll((i, j), (0, 1)), 2) for i in range(4) for j in range(4)]).mean()
    torch.testing.assert_close(_Wavelets(2).apply(x[None]).abs().sum(), mean)


def objective(method, x, y, weight):
    if method is wavelet:
        norm = _Wavelets(4).apply(x[None]).abs().sum()
    else:
        dy, dx = torch.zeros_like(x), torch.zeros_like(x)
        dy[:-1], dx[:, :-1] = x.diff(dim=0), x.diff(dim=1)
        norm = (dy.abs() ** 2 + dx.abs() ** 2).sqrt().sum()
    return float(((A(x) - y).abs() ** 2).sum() / (2 * SIGMA**2) + weight * norm)


@pytest.mark.parametrize("method", [tv, wavelet])
def test_a_complex_minimum_is_the_minimum_that_the_gap_promises(method):
    y = measured().to(torch.complex128)
    weight = 0.4 / SIGMA
    rough, record = method(A, y, weight, sigma=SIGMA, tolerance=3e-2, max_iterations=2000)
    fine, exact = method(A, y, weight, sigma=SIGMA, tolerance=1e-3, max_iterations=3000)
    assert record.converged and exact.converged and record.iterations < exact.iterations
    values = [objective(method, x, y, weight) for x in (rough, fine)]
    assert values[0] == pytest.approx(float(record.objective), rel=1e-9)
    assert values[0] - values[1] <= float(record.gap) * values[0]
    for seed in range(4):  # no direction goes down
        step = 1e-3 * torch.randn(SHAPE, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))
        assert objective(method, fine + step, y, weight) > values[1] * (1 - 1e-3)
    turned, _ = method(A, 1j * y, weight, sigma=SIGMA, tolerance=1e-3, max_iterations=3000)  # a phase is nothing to it
    assert float((turned - 1j * fine).norm() / fine.norm()) < 1e-2


@pytest.mark.parametrize("sigma", [0.02, 0.005])
def test_both_beat_what_has_no_prior(sigma):
    y = measured(sigma=sigma)
    tuned = max(psnr(cg_sense(A, y, w, iterations=60)) for w in (1e-3, 3e-3, 1e-2, 3e-2, 0.1))
    assert tuned > psnr(A.H(y))
    for method in (tv, wavelet):
        x, record = method(A, y, 0.3 / sigma, sigma=sigma, tolerance=2e-2, max_iterations=1000)
        assert record.converged and psnr(x) > tuned + 1.5
        again, _ = method(A, y, 0.3 / sigma, sigma=sigma, tolerance=2e-2, max_iterations=1000)
        assert torch.equal(x, again)


def test_wavelets_do_not_depend_on_the_unit_or_the_batch():
    y = torch.stack([measured(), measured(1)])[:, None]
    x, record = wavelet(A, y, 20.0, sigma=SIGMA, tolerance=1e-3, max_iterations=2000)
    assert x.shape == (2, 1, *SHAPE) and record.gap.shape == (2, 1)
    scaled, _ = wavelet(A, 100 * y, 0.2, sigma=100 * SIGMA, tolerance=1e-3, max_iterations=2000)
    assert float((scaled / 100 - x).norm() / x.norm()) < 2e-2
    alone, _ = wavelet(A, y[1, 0], 20.0, sigma=SIGMA, tolerance=1e-3, max_iterations=2000)
    assert float((alone - x[1, 0]).norm() / x[1, 0].norm()) < 1e-3


def test_variational_methods_are_checked():
    y = measured()
    for levels in (0, 6):
        with pytest.raises(ValueError, match=rf"levels must lie in 1 to 5 for an image \(40, 35\), got {levels}"):
            wavelet(A, y, 1.0, levels=levels)
    with pytest.raises(ValueError, match="weight and sigma must be positive"):
        wavelet(A, y, 0.0)
    _, record = wavelet(A, y, 1.0, tolerance=1e-9, max_iterations=3)
    assert not record.converged and record.iterations == 3
    carrying = Sense(A.maps, A.mask)
    carrying.batch_shape = (2,)
    with pytest.raises(ValueError, match=r"one physics for all; this operator carries \(2,\)"):
        tv(carrying, torch.stack([y, y]), 1.0)
