"""The bars of the operators, measured: `python -m operators.bench` prints each with its limit, and ends with 9 when one is missed.

Speeds are ratios against ODL's own astra_cpu ray transform, taken in turns within one run, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from operators import odl_bridge, patterns
from operators.analytic import fbp
from operators.ct import RayTransform
from operators.geometry import Beam, Cartesian, FanBeam, Grid, ParallelBeam, uniform_angles
from operators.linear import LinearOperator
from operators.mri import CartesianMRI, Coils, Complex, Fourier, Mask, NonCartesianMRI
from operators.sense import WeightedAdjoint, root_sum_of_squares

Row = tuple[str, float, str, float]  # what, measured, "<=" or ">=", limit

TURN = 2 * math.pi
GRID = Grid(shape=(256, 256), spacing=(1.0, 1.0))
CLINICAL: dict[str, Any] = {"detectors": 600, "pitch": 1.2, "source_origin": 595.0, "origin_detector": 490.6}
SHORT = math.pi + 2 * math.atan(600 * 0.6 / 1085.6)


def parallel(views: int) -> ParallelBeam:
    return ParallelBeam(angles=uniform_angles(views), detectors=363, pitch=1.0)


def adjoints() -> Iterator[Row]:
    grid = Grid(shape=(101, 120), spacing=(1.3, 1.1))
    beams: dict[str, Beam] = {
        "parallel": ParallelBeam(angles=uniform_angles(60), detectors=171, pitch=1.1),
        "parallel, shifted, uneven": ParallelBeam(
            angles=tuple((k / 60) ** 1.3 * 3 for k in range(60)), detectors=150, pitch=1.2, offset=2.3
        ),
        "fan, flat": FanBeam(angles=uniform_angles(80, TURN), **{**CLINICAL, "detectors": 200}),
        "fan, flat, shifted": FanBeam(angles=uniform_angles(80, SHORT), offset=7.7, **{**CLINICAL, "detectors": 200}),
        "fan, curved": FanBeam(angles=uniform_angles(80, TURN), curved=True, **{**CLINICAL, "detectors": 200}),
        "fan, curved, shifted": FanBeam(angles=uniform_angles(80, SHORT), curved=True, offset=-4.1, **{**CLINICAL, "detectors": 200}),
    }
    for name, beam in beams.items():
        yield f"adjoint gap, {name}", max(RayTransform(grid, beam).adjoint_error(seed) for seed in range(3)), "<=", 1e-6


def against_odl(views: int, rounds: int, batch: int = 8) -> Iterator[Row]:
    tomo = odl_bridge._odl().applications.tomo
    ours = RayTransform(GRID, parallel(views))
    space, sinograms = odl_bridge.as_odl(ours).domain, odl_bridge.as_odl(ours).range
    theirs = tomo.RayTransform(space, odl_bridge.odl_geometry(ours.beam), proj_space=sinograms, impl="astra_cpu")
    x = torch.rand(batch, *GRID.shape, generator=torch.Generator().manual_seed(0))
    images = [space.element(item.T.contiguous().numpy()) for item in x]
    y = ours(x)
    measured = [sinograms.element(item.numpy()) for item in y]
    expected = torch.stack([torch.from_numpy(np.array(theirs(item).asarray())) for item in images])
    yield f"forward against ODL astra_cpu, {views} views", float((y - expected).norm() / expected.norm()), "<=", 1e-4
    for name, work, odl_work, items in (
        ("forward", lambda: ours(x), theirs, images),
        ("adjoint", lambda: ours.H(y), theirs.adjoint, measured),
    ):
        yield f"{name} faster than ODL, {views} views, batch {batch}", _ratio(work, odl_work, items, rounds), ">=", 5.0


def _ratio(work: Callable[[], Tensor], odl_work: Callable, items: list, rounds: int) -> float:
    """Best time of theirs over best time of ours, in turns; ODL keeps its results in memory made beforehand."""
    out = [odl_work(item) for item in items]
    work()
    ours, theirs = math.inf, math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        ours = min(ours, time.perf_counter() - start)
        start = time.perf_counter()
        for item, result in zip(items, out, strict=True):
            odl_work(item, out=result)
        theirs = min(theirs, time.perf_counter() - start)
    return theirs / ours


def disks() -> Iterator[Row]:
    x, y, radius = 15.0, -25.0, 70.0
    away = np.hypot(GRID.x[None, :] - x, GRID.y[:, None] - y)
    from_centre = np.hypot(GRID.x[None, :], GRID.y[:, None])
    scans: dict[str, Beam] = {
        "parallel": parallel(360),
        "parallel, full turn": ParallelBeam(angles=uniform_angles(360, TURN), detectors=363, pitch=1.0),
        "fan, flat": FanBeam(angles=uniform_angles(480, TURN), **CLINICAL),
        "fan, curved": FanBeam(angles=uniform_angles(480, TURN), curved=True, **CLINICAL),
        "fan, flat, short": FanBeam(angles=uniform_angles(290, SHORT), **CLINICAL),
        "fan, curved, short": FanBeam(angles=uniform_angles(290, SHORT), curved=True, **CLINICAL),
    }
    for name, beam in scans.items():
        points, directions = beam.rays()
        distance = (points[..., 0] - x) * directions[..., 1] - (points[..., 1] - y) * directions[..., 0]
        chords = torch.from_numpy(2 * np.sqrt(np.maximum(radius**2 - distance**2, 0))).float()
        image = fbp(RayTransform(GRID, beam), chords).numpy()
        yield f"disk inside, {name}", abs(float(image[away < radius - 6].mean()) - 1), "<=", 5e-3
        yield f"disk outside, {name}", abs(float(image[(away > radius + 6) & (from_centre < 125)].mean())), "<=", 5e-3
        rim = image[(away > radius - 12) & (away < radius - 6)].mean()
        yield f"cupping, {name}", abs(float(rim - image[away < 20].mean())), "<=", 5e-3


def short_scans() -> Iterator[Row]:
    away, from_centre = np.hypot(GRID.x[None, :] - 30, GRID.y[:, None] + 40), np.hypot(GRID.x[None, :], GRID.y[:, None])
    truth = torch.from_numpy((from_centre < 115) * 1.0 + (away < 30) * 0.3).float()
    for name, curved in (("flat", False), ("curved", True)):
        quality = []
        for views, coverage in ((480, TURN), (290, SHORT)):
            beam = FanBeam(angles=uniform_angles(views, coverage), curved=curved, **CLINICAL)
            image = fbp(RayTransform(GRID, beam), RayTransform(GRID, beam, split=2, subrays=2)(truth))
            quality.append(-20 * math.log10(float((image - truth).square().mean().sqrt()) / 1.3))
        yield f"short scan below full scan in dB, {name}", quality[0] - quality[1], "<=", 1.5


def points() -> Iterator[Row]:
    row, column = 60, 201
    x, y = float(GRID.x[column]), float(GRID.y[row])
    image = torch.zeros(GRID.shape)
    image[row, column] = 1
    for beam in (
        parallel(60),
        FanBeam(angles=uniform_angles(90, TURN), **CLINICAL),
        FanBeam(angles=uniform_angles(90, TURN), curved=True, **CLINICAL),
    ):
        operator = RayTransform(GRID, beam)
        sinogram = operator(image)
        bins = torch.arange(beam.detectors, dtype=torch.float32)
        worst = 0.0
        for view, a in enumerate(beam.angles):
            along, depth = x * math.cos(a) + y * math.sin(a), -x * math.sin(a) + y * math.cos(a)
            if isinstance(beam, FanBeam):
                tangent = along / (beam.source_origin + depth)
                along = beam.source_detector * (math.atan(tangent) if beam.curved else tangent)
            expected = along / beam.pitch + (beam.detectors - 1) / 2
            worst = max(worst, abs(float((sinogram[view] * bins).sum() / sinogram[view].sum()) - expected))
        name = "parallel" if isinstance(beam, ParallelBeam) else "fan, curved" if beam.curved else "fan, flat"
        yield f"point off by bins in projection, {name}", worst, "<=", 0.5
        found = divmod(int(fbp(operator, sinogram).argmax()), GRID.shape[1])
        yield f"point off by pixels in FBP, {name}", math.hypot(found[0] - row, found[1] - column), "<=", 0.0


def _coil_maps(shape: tuple[int, int], coils: int = 8) -> Tensor:
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
    turns = [TURN * k / coils for k in range(coils)]
    maps = torch.stack([torch.polar(1 / (1 + (y - math.sin(a)) ** 2 + (x - math.cos(a)) ** 2), a + x * math.cos(a)) for a in turns])
    return maps / root_sum_of_squares(maps)


def _has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def mri_laws() -> Iterator[Row]:
    shape = (101, 120)
    maps, lines = _coil_maps(shape), patterns.equispaced(shape, 4)
    disc = patterns.poisson_disc(shape, 6, generator=torch.Generator().manual_seed(0))
    operators: dict[str, LinearOperator] = {
        "Fourier": Fourier(shape),
        "Cartesian lines": CartesianMRI(lines, maps),
        "Cartesian lines, gram": CartesianMRI(lines, maps).gram,
        "Poisson disc": CartesianMRI(disc, maps),
        "two channels": CartesianMRI(disc, maps) @ Complex(shape),
    }
    curves = {"radial": patterns.radial(shape, 189), "spiral": patterns.spiral(shape, 16)}
    if _has("finufft"):
        for name, curve in curves.items():
            operators |= {name: NonCartesianMRI(curve, maps), f"{name}, gram": NonCartesianMRI(curve, maps).gram}
    for name, operator in operators.items():
        yield f"adjoint gap, {name}", max(operator.adjoint_error(seed) for seed in range(3)), "<=", 1e-6
    y, x = torch.meshgrid(*(torch.arange(n) - n // 2 for n in shape), indexing="ij")
    disk = torch.sigmoid((30 - torch.hypot(y - 4.0, x + 3.0)) / 2).to(torch.complex64)
    scans: dict[str, CartesianMRI | NonCartesianMRI] = {"Cartesian": CartesianMRI(Cartesian.of(np.ones(shape, dtype=bool)), maps)}
    if _has("finufft"):
        scans |= {name: NonCartesianMRI(curve, maps) for name, curve in curves.items()}
    for name, scan in scans.items():
        back = WeightedAdjoint(scan)(scan(disk))
        yield f"smooth disk after B A, {name}", float((back - disk).norm() / disk.norm()), "<=", 0.1


def mri_speed(rounds: int, shape: tuple[int, int] = (320, 320)) -> Iterator[Row]:
    """The fused forward of 8 coils against our own composition, and against mrpro's where it is installed."""
    maps, lines = _coil_maps(shape), patterns.equispaced(shape, 4)
    fused, parts = CartesianMRI(lines, maps), Mask(lines, 8) @ Fourier((8, *shape)) @ Coils(maps)
    x = torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    yield "fused faster than composed, 8 coils, 320 x 320", _ratio(lambda: fused(x), lambda _, out=None: parts(x), [x], rounds), ">=", 1.0
    if not _has("mrpro"):
        print("fused against mrpro: skipped: mrpro is not installed")
        return
    import mrpro

    theirs = (
        mrpro.operators.CartesianMaskingOp(fused.mask)
        @ mrpro.operators.FastFourierOp(dim=(-2, -1))
        @ mrpro.operators.SensitivityOp(maps[None, :, None])
    )
    item = x[None, None, None]
    yield "forward against mrpro", float((theirs(item)[0].squeeze() - fused(x)).norm() / fused(x).norm()), "<=", 1e-5
    yield (
        "fused faster than mrpro, 8 coils, 320 x 320",
        _ratio(lambda: fused(x), lambda v, out=None: theirs(v)[0], [item], rounds),
        ">=",
        2.0,
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 when every bar is met, else 9."""
    parser = argparse.ArgumentParser(prog="python -m operators.bench", description="Measure the operators against their bars.")
    parser.add_argument("--rounds", type=int, default=15, help="timing rounds, the best of which counts (default 15)")
    options = parser.parse_args(arguments)
    missed = 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), 256 x 256 unless said otherwise\n")
    speeds = (against_odl(60, options.rounds), against_odl(200, options.rounds), mri_speed(options.rounds))
    tables = (adjoints(), *speeds, disks(), short_scans(), points(), mri_laws())
    for table in tables:
        for what, value, sense, limit in table:
            met = value <= limit if sense == "<=" else value >= limit
            missed += not met
            print(f"{what:<52} {value:>10.2g}  {sense} {limit:<8.2g} {'pass' if met else 'FAIL'}", flush=True)
    print(f"\n{'all bars met' if not missed else f'{missed} bar(s) missed'}")
    return 9 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
