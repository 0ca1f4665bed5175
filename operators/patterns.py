"""Sampling patterns of k-space: which lines, points or curves an accelerated scan measures.

Each function answers a value (`Cartesian` or `Trajectory`) whose `acceleration` is the one achieved. Axis 1 counts columns (kx), axis
0 rows (ky); a pattern of lines varies along its `axis`, the phase-encoding direction, and is constant along the other, the readout.
Padded columns were filled with zeros by a scanner: they are never samples, whatever a pattern says.

Equispaced and random lines follow the formulas of the fastMRI challenge: Zbontar et al., arXiv:1811.08839, and its public masks.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from operators.geometry import Array, Cartesian, Trajectory, _count, _pair

GOLDEN = math.pi * (math.sqrt(5) - 1) / 2  # rad, 111.25 degrees: Winkelmann et al., IEEE Trans. Med. Imaging 26(1), 2007
_CENTRE = 0.32  # fully sampled fraction times acceleration: 8 % at 4, 4 % at 8


def equispaced(
    shape: tuple[int, int],
    acceleration: float,
    *,
    centre_fraction: float | None = None,
    centre_lines: int | None = None,
    offset: int | None = None,
    generator: torch.Generator | None = None,
    axis: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Cartesian:
    """Every so-many-th line and a full centre; the spacing is widened so that centre and lines together reach the acceleration.

    With N lines, n of them central, spacing R (N - n) / (N - n R), rounded line by line, starting at `offset`.

    Args:
        acceleration: R, at least 1.
        centre_fraction, centre_lines: the full centre, one way or the other; 0.32 / R of the lines when neither is given.
        offset: the first line; drawn from `generator` when None, or 0 without one.
        padding: columns at the left and the right that hold no measurement.

    Raises:
        ValueError: an acceleration below 1 or that the centre alone exceeds, a centre, offset, axis or padding out of range.
    """
    shape, n = _lines(shape, axis)
    centre = _centre(n, acceleration, centre_fraction, centre_lines)
    lines = _central(n, centre)
    if centre < n:
        step = acceleration * (n - centre) / (n - centre * acceleration)
        last = max(1, round(step))
        if offset is None:
            offset = 0 if generator is None else int(torch.randint(last, (), generator=generator))
        if not 0 <= offset < last:
            raise ValueError(f"offset must be one of the first {last} lines, got {offset}")
        lines[np.rint(np.arange(offset, n - 1, step)).astype(int)] = True
    return _spread(shape, lines, axis, padding)


def random(
    shape: tuple[int, int],
    acceleration: float,
    *,
    generator: torch.Generator,
    centre_fraction: float | None = None,
    centre_lines: int | None = None,
    axis: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Cartesian:
    """A full centre of n lines, and each other line with probability (N / R - n) / (N - n): R is reached on average only.

    Arguments and errors as in `equispaced`.
    """
    shape, n = _lines(shape, axis)
    centre = _centre(n, acceleration, centre_fraction, centre_lines)
    lines = _central(n, centre)
    if centre < n:
        lines |= torch.rand(n, generator=generator, dtype=torch.float64).numpy() < (n / acceleration - centre) / (n - centre)
    return _spread(shape, lines, axis, padding)


def poisson_disc(
    shape: tuple[int, int],
    acceleration: float,
    *,
    generator: torch.Generator,
    calibration: tuple[int, int] = (24, 24),
    padding: tuple[int, int] = (0, 0),
) -> Cartesian:
    """Points that keep a distance from each other which grows with theirs from the centre, and a full rectangle there.

    Points are visited in random order; one that is free is taken, and frees none within its radius s (0.3 + |k|), |k| = 1 at the
    edge's middle. The scale s is found by bisection, surplus points are dropped at random: the acceleration is met to a point.
    Dart throwing: Cook, ACM Trans. Graph. 5(1), 1986.

    Raises:
        ValueError: an acceleration below 1 or that the calibration rectangle alone exceeds, or calibration or padding out of range.
    """
    shape, _ = _lines(shape, 1)
    _check_acceleration(acceleration)
    ny, nx = shape
    sizes = _pair("calibration", calibration)
    if not all(0 <= size <= length for size, length in zip(sizes, shape)):
        raise ValueError(f"calibration must lie within {shape}, got {sizes}")
    full = _unpadded(np.outer(_central(ny, sizes[0]), _central(nx, sizes[1])), padding)
    target = round(ny * nx / acceleration)
    if full.sum() > target:
        raise ValueError(f"the calibration rectangle alone exceeds {target} points, which is acceleration {acceleration} of {shape}")
    free = _unpadded(np.ones(shape, dtype=bool), padding)
    if free.sum() < target:
        raise ValueError(f"acceleration {acceleration} asks for {target} points, the padding leaves {int(free.sum())}")
    free &= ~full
    order = torch.randperm(ny * nx, generator=generator).numpy()
    radii = np.hypot(*np.meshgrid(*(2 * (np.arange(n) - n // 2) / n for n in shape), indexing="ij")) + 0.3
    low, high, best = 0.0, 2.0 * math.sqrt(acceleration), free | full
    for _ in range(12):
        scale = (low + high) / 2
        mask = full | _darts(free, scale * radii, order)
        if mask.sum() < target:
            high = scale
            continue
        low, best = scale, mask
        if mask.sum() <= 1.01 * target:
            break
    surplus = order[(best & ~full).ravel()[order]][: best.sum() - target]
    best.ravel()[surplus] = False
    return Cartesian.of(best)


def radial(shape: tuple[int, int], spokes: int, samples: int | None = None, *, golden: bool = True, start: float = 0.0) -> Trajectory:
    """Straight lines through the centre, spoke after spoke.

    Full coverage takes pi / 2 times as many spokes as the image has pixels on a side. Point j of a spoke at angle a is
    t (sin a, cos a) as (ky, kx), t = 2 pi (j - samples // 2) / samples.

    Args:
        samples: points on a spoke; twice the longer side when None.
        golden: turn by the golden angle from spoke to spoke, else by pi / spokes.
        start: angle of the first spoke in rad.

    Raises:
        ValueError: a count below one.
    """
    shape, _ = _lines(shape, 1)
    spokes, samples = _count("spokes", spokes), _count("samples", 2 * max(shape) if samples is None else samples)
    angles = start + np.arange(spokes) * (GOLDEN if golden else math.pi / spokes)
    t = 2 * math.pi * (np.arange(samples) - samples // 2) / samples
    return Trajectory.of(shape, np.stack([np.outer(np.sin(angles), t), np.outer(np.cos(angles), t)], axis=-1).reshape(-1, 2))


def spiral(
    shape: tuple[int, int], interleaves: int, *, turns: float | None = None, samples: int | None = None, start: float = 0.0
) -> Trajectory:
    """Archimedean spirals from the centre to the edge, interleave after interleave, at constant speed along the curve.

    At u in [0, 1), interleave i stands at pi u (sin a, cos a) as (ky, kx), a = start + 2 pi (turns u + i / interleaves).

    Args:
        turns: of one interleave; when None as many as full coverage of the diagonal takes: the longer side / (sqrt(2) interleaves).
        samples: points on an interleave; when None two to a cell of k-space along the curve.
        start: angle at which the first interleave sets out, in rad.

    Raises:
        ValueError: a count below one, or turns not positive.
    """
    shape, _ = _lines(shape, 1)
    interleaves = _count("interleaves", interleaves)
    turns = max(shape) / (math.sqrt(2) * interleaves) if turns is None else turns
    if not turns > 0:
        raise ValueError(f"turns must be positive, got {turns}")
    u = np.linspace(0, 1, 4096 + 64 * math.ceil(turns))
    speed = math.pi * np.hypot(1, 2 * math.pi * turns * u)
    length = np.concatenate([[0], np.cumsum((speed[1:] + speed[:-1]) / 2 * np.diff(u))])
    samples = _count("samples", math.ceil(length[-1] * max(shape) / math.pi) if samples is None else samples)
    reach = np.interp(length[-1] * np.arange(samples) / samples, length, u)
    angle = start + 2 * math.pi * (turns * reach[None, :] + np.arange(interleaves)[:, None] / interleaves)
    return Trajectory.of(shape, (math.pi * reach[None, :, None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1)).reshape(-1, 2))


def _darts(free: Array, radii: Array, order: Array) -> Array:
    """Free points in the given order, each of which bars its disk to all that follow, (ny, nx) bool."""
    (ny, nx), taken = free.shape, np.zeros(free.shape, dtype=bool)
    squares = np.ceil(radii**2).astype(int)
    reach = int(math.sqrt(squares.max())) + 1
    open_ = np.zeros((ny + 2 * reach, nx + 2 * reach), dtype=bool)  # a rim, so that no disk is cut
    open_[reach : reach + ny, reach : reach + nx] = free
    disks: dict[int, tuple[int, Array]] = {}
    rows, columns = np.divmod(order, nx)
    for row, column, square in zip(rows.tolist(), columns.tolist(), squares.ravel()[order].tolist()):
        if not open_[row + reach, column + reach]:
            continue
        taken[row, column] = True
        if square not in disks:
            r = math.isqrt(square)
            disks[square] = r, np.add.outer(np.arange(-r, r + 1) ** 2, np.arange(-r, r + 1) ** 2) >= max(square, 1)
        r, outside = disks[square]
        open_[row + reach - r : row + reach + r + 1, column + reach - r : column + reach + r + 1] &= outside
    return taken


def _lines(shape: tuple[int, int], axis: int) -> tuple[tuple[int, int], int]:
    ny, nx = (_count("shape", n) for n in _pair("shape", shape))
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (rows) or 1 (columns), got {axis}")
    return (ny, nx), (ny, nx)[axis]


def _check_acceleration(acceleration: float) -> None:
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise ValueError(f"acceleration must be at least 1, got {acceleration}")


def _centre(n: int, acceleration: float, fraction: float | None, lines: int | None) -> int:
    """Number of fully sampled lines."""
    _check_acceleration(acceleration)
    if fraction is not None and lines is not None:
        raise ValueError("give centre_fraction or centre_lines, not both")
    if lines is None:
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"centre_fraction must lie in [0, 1], got {fraction}")
        lines = round(n * (_CENTRE / acceleration if fraction is None else fraction))
    if not 0 <= lines <= n:
        raise ValueError(f"centre_lines must lie between 0 and {n}, got {lines}")
    if acceleration == 1:
        return n
    if lines * acceleration >= n:
        raise ValueError(f"a centre of {lines} lines alone exceeds 1 / {acceleration} of {n} lines")
    return lines


def _central(n: int, size: int) -> Array:
    """True on the central `size` of n."""
    first = (n - size + 1) // 2
    return (np.arange(n) >= first) & (np.arange(n) < first + size)


def _spread(shape: tuple[int, int], lines: Array, axis: int, padding: tuple[int, int]) -> Cartesian:
    return Cartesian.of(_unpadded(np.broadcast_to(lines if axis == 1 else lines[:, None], shape).copy(), padding))


def _unpadded(mask: Array, padding: tuple[int, int]) -> Array:
    left, right = _pair("padding", padding)
    if left < 0 or right < 0 or left + right >= mask.shape[1]:
        raise ValueError(f"padding must leave some of the {mask.shape[1]} columns, got {(left, right)}")
    mask[:, :left] = False
    mask[:, mask.shape[1] - right :] = False
    return mask
