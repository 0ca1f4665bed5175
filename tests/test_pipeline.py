"""The walk of one scan, with a small untrained model: seeds, batches, estimates, what it needs and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from test_bundle import CARD

from deft_med.bundle import Model, networks
from deft_med.card import parse
from deft_med.config import Noise, Protocol
from deft_med.errors import UsageError
from deft_med.htransform import Deft
from deft_med.pipeline import reconstruct
from deft_med.simulate import reconstruction_grid, simulate
from deft_med.volume import Scan, Volume
from operators.ct import attenuation


@pytest.fixture(scope="module")
def model() -> Model:
    card = parse({**CARD, "licence": "CC-BY-4.0", "deft_med": "0", "sha256": {f"{n}.safetensors": "0" * 64 for n in ("prior", "h")}})
    torch.manual_seed(0)
    prior, h = networks(card)
    for module in (prior, h):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.03)
    return Model(card, Deft(prior, h).requires_grad_(False).eval())


def head(slices: int = 5, n: int = 48) -> Volume:
    z, y, x = np.meshgrid(np.linspace(-0.5, 0.5, slices), *[np.linspace(-1, 1, n)] * 2, indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.9) ** 2 < 1
    hole = (x - 0.3) ** 2 + (y + 0.2) ** 2 < 0.1 * (1 + z)
    return Volume(np.where(hole, 300.0, np.where(inside, 40.0, -1024.0)), np.diag([4.0, 4.0, 5.0, 1.0]), "HU")


PROTOCOL = Protocol(name="small", views=30, noise=Noise(gaussian_percent=3.5), grid=48)


def part(scan: Scan, k: slice) -> Scan:
    return Scan(scan.y[k], scan.acquisition, scan.grid, scan.noise[k], affine=scan.affine, simulated=True)


def test_a_slice_does_not_depend_on_its_batch(model: Model) -> None:
    scan = simulate(head(), PROTOCOL)
    five = reconstruct(scan, model, steps=4, samples=2)
    one = reconstruct(part(scan, slice(0, 1)), model, steps=4, samples=2)
    assert np.array_equal(five.volume.data[:1], one.volume.data)
    assert np.array_equal(five.std.data[:1], one.std.data)
    again = reconstruct(scan, model, steps=4, samples=2)
    assert np.array_equal(five.volume.data, again.volume.data)
    other = reconstruct(scan, model, steps=4, samples=2, seed=1)
    assert not np.array_equal(five.volume.data, other.volume.data)


def test_the_measurements_of_a_slice_do_not_depend_on_its_stack() -> None:
    stack, first = head(), head()
    first = Volume(first.data[:1], first.affine, "HU")
    assert np.array_equal(simulate(stack, PROTOCOL, seed=3).y[:1], simulate(first, PROTOCOL, seed=3).y)


def test_the_estimates(model: Model) -> None:
    scan = simulate(head(1), PROTOCOL)
    done = []
    average = reconstruct(scan, model, estimate="average", steps=4, samples=3, progress=lambda k, n: done.append((k, n)))
    assert done == [(k, 10) for k in range(1, 11)]  # one shared evaluation, then three times three
    assert average.samples == 3 and average.std is not None and set(average.chi2) >= {"mean", "samples", "fbp", "reference"}
    sample = reconstruct(scan, model, estimate="sample", steps=4, samples=3)
    assert sample.samples == 1 and sample.std is None
    mean = reconstruct(scan, model, estimate="mean")
    assert "samples" not in mean.chi2
    assert average.metrics["deft"]["psnr"][0] != average.metrics["fbp"]["psnr"][0]


def test_classical_methods_need_no_model() -> None:
    scan = simulate(head(2), PROTOCOL)
    fbp, tv = reconstruct(scan, method="fbp"), reconstruct(scan, method="tv")
    assert tv.metrics["tv"]["mean"]["psnr"] > fbp.metrics["fbp"]["mean"]["psnr"] + 3
    assert tv.chi2["reference"] == pytest.approx(1, abs=0.15)
    inside = (slice(None), slice(20, 24), slice(12, 18))
    assert tv.volume.data[inside].mean() == pytest.approx(40, abs=15)


def test_what_contradicts_the_measurements_is_said() -> None:
    made = simulate(head(1), PROTOCOL)
    found = [reconstruct(dataclasses.replace(made, noise=factor * made.noise), method="fbp").warnings for factor in (0.2, 3)]
    assert "contradicts the measurements" in found[0][0] and not found[1]


def test_a_scan_out_of_plain_numpy_and_noise_from_the_data(model: Model) -> None:
    """The researcher's door: no affine, no noise, no reference."""
    made = simulate(head(1), PROTOCOL)
    scan = Scan(y=made.y[0], acquisition=made.acquisition, grid=made.grid)
    result = reconstruct(scan, method="fbp")
    assert not result.simulated and result.reference is None and result.metrics == {} and result.provenance["noise"].startswith("estimated")
    known = reconstruct(part(made, slice(0, 1)), method="fbp")
    assert np.allclose(result.volume.data, known.volume.data)
    assert result.chi2["mean"] == pytest.approx(known.chi2["mean"], rel=0.4)


@pytest.mark.parametrize(("settings", "word"), [
    ({"method": "magic"}, "unknown method"), ({"estimate": "mode"}, "unknown estimate"), ({"method": "deft"}, "wants a model"),
    ({"method": "fbp", "steps": 0}, "at least 1"), ({"method": "fbp", "device": "toaster"}, "unknown device"),
])
def test_usage(settings: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        reconstruct(simulate(head(1, 16), Protocol(name="p", views=4, noise=Noise(photons=1e4), grid=16)), **settings)


def test_the_grid_is_never_finer_than_the_source_and_keeps_the_field_of_view() -> None:
    for rows, columns, expected in ((512, 512, (256, 256)), (200, 180, (200, 180)), (512, 400, (256, 200)), (300, 300, (256, 256))):
        volume = Volume(np.zeros((1, rows, columns)), np.diag([0.7, 0.7, 1, 1]), "HU")
        assert reconstruction_grid(volume, 256) == expected
    scan = simulate(Volume(np.random.default_rng(0).normal(0, 50, (1, 60, 40)), np.diag([1.0, 1.0, 2.0, 1.0]), "HU"),
                    Protocol(name="p", views=5, noise=Noise(photons=1e5), grid=30))
    assert scan.grid.shape == (30, 20) and scan.grid.spacing == (2.0, 2.0)
    assert scan.affine[:3, 3] == pytest.approx([0.5, 0.5, 0])
    assert scan.reference.data.mean() == pytest.approx(0, abs=5)


def test_simulated_measurements_agree_with_the_solver_up_to_noise() -> None:
    """Another grid and another ray model, but the same physics: no shift, no scale between them."""
    volume = head(1, 96)
    quiet = Protocol(name="p", views=40, noise=Noise(gaussian_percent=1e-4), grid=48)
    scan = simulate(volume, quiet)
    from operators.ct import RayTransform

    solver = RayTransform(scan.grid, scan.acquisition)
    lines = solver(attenuation(torch.from_numpy(scan.reference.data)))[0].numpy()
    assert np.abs(lines - scan.y[0]).mean() < 0.01 * scan.y.mean()
    assert abs(lines.mean() / scan.y.mean() - 1) < 1e-3
