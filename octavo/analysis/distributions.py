"""What a grid of numbers loses on a density: integrals, not samples.

The mean squared error of rounding ``x`` to the nearest of ``values`` is ``Σ ∫ (x − value)² p(x) dx``, one integral a
cell. A sample of a heavy tail misses what matters (Student-t with ν ≤ 4 has no fourth moment, so the error of a sampled
error is infinite), an integral does not. A ``Distribution`` is a density with its support and *knots*, the edges of
pieces on which it is smooth; every cell is cut at the knots and integrated by Gauss-Legendre quadrature.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from octavo.core import formats
from octavo.core.formats import Format, IntegerFormat
from octavo.errors import OctavoError

Array = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(12)
FARTHEST = 1e80  # in scales; what a density has beyond is not counted: 1e-40 of the variance for a Student-t of ν = 2.5


@dataclass(frozen=True)
class Distribution:
    """A density on ``[low, high]``; scaled so that its integral is 1, whatever ``density`` integrates to.

    ``location`` and ``scale`` say where it lives: the pieces of the quadrature are small there and grow outwards.
    ``kinks`` are points where the density is not smooth.
    """

    name: str
    density: Callable[[Array], Array]
    low: float = -math.inf
    high: float = math.inf
    location: float = 0.0
    scale: float = 1.0
    kinks: tuple[float, ...] = ()
    knots: Array = field(init=False, repr=False, compare=False)
    mass: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.low < self.high and self.scale > 0):
            raise OctavoError(f"distribution {self.name!r}: it needs low < high and a positive scale")
        some = np.clip(self.location + self.scale * np.linspace(-8, 8, 65), self.low, self.high)
        try:
            found = np.asarray(self.density(some))
        except Exception as error:  # anybody's function
            raise OctavoError(f"distribution {self.name!r}: its density fails on an array: {error}") from error
        if found.shape != some.shape or (found < 0).any():
            raise OctavoError(
                f"distribution {self.name!r}: a density takes an array and gives one like it, not below 0"
            )
        near, far = np.arange(0, 8, 0.25), 8 * 2.0 ** np.arange(0, math.log2(FARTHEST), 0.25)
        far = far[: 4 * 20] if self._light() else np.concatenate([far[:80], far[80::4]])
        out = np.concatenate([near, far]) * self.scale
        knots = np.concatenate([self.location - out[::-1], self.location + out, self.kinks])
        ends = [edge for edge in (self.low, self.high) if math.isfinite(edge)]
        knots = np.unique(np.concatenate([knots[(knots > self.low) & (knots < self.high)], ends]))
        object.__setattr__(self, "knots", knots)
        object.__setattr__(self, "mass", 1.0)
        mass = float(self._integrate(knots, lambda x, _: np.ones_like(x)).sum())
        if not (math.isfinite(mass) and mass > 0):
            raise OctavoError(f"distribution {self.name!r}: its density integrates to {mass:g} on its support")
        object.__setattr__(self, "mass", mass)

    def _light(self) -> bool:
        """Whether nothing is left of the second moment a million scales out."""
        out = self.location + np.array([-1e6, 1e6]) * self.scale
        out = out[(out > self.low) & (out < self.high)]
        return bool((self.density(out) == 0).all())

    def _integrate(self, edges: Array, f: Callable[[Array, Array], Array]) -> Array:
        """∫ f(x, middle of the piece) p(x) dx between neighbouring edges."""
        half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
        x = middle + half * NODES
        pieces: Array = (half * WEIGHTS * self.density(x) * f(x, middle)).sum(1) / self.mass
        return pieces

    def expect(self, f: Callable[[Array], Array], edges: Array | None = None) -> float:
        """The mean of ``f(x)``; ``edges`` are points where ``f`` is not smooth."""
        return float(self._integrate(self._cut(edges), lambda x, _: f(x)).sum())

    @property
    def mean(self) -> float:
        """The mean."""
        return self.expect(lambda x: x)

    @property
    def std(self) -> float:
        """The standard deviation. Raises ``OctavoError`` if it is infinite."""
        mean = self.mean
        pieces = self._integrate(self.knots, lambda x, _: np.square(x - mean))
        variance = float(pieces.sum())
        ends = (pieces[0] * math.isinf(self.low), pieces[-1] * math.isinf(self.high))
        if not max(ends) <= 1e-3 * variance < math.inf:  # what lies farther out would still count
            raise OctavoError(f"distribution {self.name!r} has no variance; truncate it with low and high")
        return math.sqrt(variance)

    def mse(self, values: Array) -> float:
        """The mean squared error of rounding to the nearest of ``values`` (ascending)."""
        edges = (values[1:] + values[:-1]) / 2

        def squared_error(x: Array, middle: Array) -> Array:
            return np.square(x - values[np.searchsorted(edges, middle)])

        return float(self._integrate(self._cut(edges), squared_error).sum())

    def lloyd_max(self, levels: int = 256, steps: int = 2000, tolerance: float = 1e-10) -> tuple[Array, float]:
        """The ``levels`` values of least mean squared error, and that error: Lloyd's iteration (1957, published 1982).

        Cells are split half-way between values, values are the means of their cells, over and over. It starts from the
        cube-root companding of Panter and Dite, which is optimal for many levels.
        """
        root = self._integrate(self.knots, lambda x, _: np.ones_like(x)) / np.diff(self.knots)
        share = np.concatenate([[0.0], np.cumsum(np.cbrt(root) * np.diff(self.knots))])
        values = np.interp((np.arange(levels) + 0.5) / levels * share[-1], share, self.knots)
        error = math.inf
        for _ in range(steps):
            edges = (values[1:] + values[:-1]) / 2
            cut = self._cut(edges)
            cell = np.searchsorted(edges, (cut[1:] + cut[:-1]) / 2)
            mass, first = np.zeros(levels), np.zeros(levels)
            np.add.at(mass, cell, self._integrate(cut, lambda x, _: np.ones_like(x)))
            np.add.at(first, cell, self._integrate(cut, lambda x, _: x))
            values = np.where(mass > 0, first / np.where(mass > 0, mass, 1.0), values)
            before, error = error, self.mse(values)
            if before - error <= tolerance * error:
                break
        return values, error

    def _cut(self, edges: Array | None) -> Array:
        if edges is None:
            return self.knots
        inside = edges[(edges > self.knots[0]) & (edges < self.knots[-1])]
        return np.unique(np.concatenate([self.knots, inside]))


def uniform(low: float = -1.0, high: float = 1.0) -> Distribution:
    """Constant between ``low`` and ``high``."""
    middle, width = (low + high) / 2, high - low
    return Distribution(f"uniform [{low:g}, {high:g}]", np.ones_like, low, high, middle, width / 8)


def normal(mean: float = 0.0, std: float = 1.0, low: float = -math.inf, high: float = math.inf) -> Distribution:
    """Gaussian, truncated to ``[low, high]``."""

    def density(x: Array) -> Array:
        found: Array = np.exp(-np.square((x - mean) / std) / 2)
        return found

    return Distribution(f"normal{_range(low, high)}", density, low, high, mean, std)


def laplace(scale: float = 1.0, low: float = -math.inf, high: float = math.inf) -> Distribution:
    """Two-sided exponential, truncated to ``[low, high]``."""
    return Distribution(f"Laplace{_range(low, high)}", lambda x: np.exp(-np.abs(x) / scale), low, high, 0.0, scale)


def student_t(nu: float = 3.0, low: float = -math.inf, high: float = math.inf) -> Distribution:
    """Student's t, truncated to ``[low, high]``; untruncated it needs ν > 2, or its variance is infinite."""
    if nu <= 2 and not (math.isfinite(low) and math.isfinite(high)):
        raise OctavoError(f"Student-t with ν = {nu:g} has no variance; take ν > 2, or truncate it")
    return Distribution(
        f"Student-t ν={nu:g}{_range(low, high)}",
        lambda x: (1 + np.square(x) / nu) ** (-(nu + 1) / 2),
        low,
        high,
    )


def grid_of(fmt: "Format | str") -> Array:
    """The numbers of a format, symmetric, scaled so that the largest is 1: multiply by the clip."""
    fmt = formats.get(fmt)
    values: Array = fmt.values().numpy()
    top = min(fmt.max, -fmt.min) if isinstance(fmt, IntegerFormat) and fmt.signed else fmt.max
    values = values[np.abs(values) <= top] / top
    return values


@dataclass(frozen=True)
class BestClip:
    """The clip of least error: where the grid's largest number should be, and the root mean squared error there."""

    clip: float
    rmse: float
    sigma: float

    @property
    def bits(self) -> float:
        """``log2(σ / RMSE)``, the bits of accuracy of 2303.17951."""
        return math.log2(self.sigma / self.rmse)

    @property
    def mse_db(self) -> float:
        """``−10 · log10(MSE)``."""
        return -20 * math.log10(self.rmse)


def clip_errors(distribution: Distribution, grid: Array, clips: Array) -> Array:
    """The root mean squared error at each clip."""
    return np.array([math.sqrt(distribution.mse(grid * clip)) for clip in clips])


def best_clip(
    distribution: Distribution, grid: Array, octaves: int = 24, steps: int = 24, most: float = math.inf
) -> BestClip:
    """Search all clips from σ/4 to ``2**octaves`` σ, ``steps`` an octave, then close in on the best.

    ``most`` keeps the clip below a limit, such as the end of the support.
    """
    sigma = distribution.std
    if math.isfinite(distribution.low) and math.isfinite(distribution.high):  # nothing to gain far beyond the support
        most = min(most, 4 * max(abs(distribution.low), abs(distribution.high)))
    clips = sigma * 2.0 ** np.arange(-2, octaves, 1 / steps)
    clips = np.append(clips[clips < most], most) if math.isfinite(most) else clips
    errors = clip_errors(distribution, grid, clips)
    best = int(errors.argmin())
    low, high = clips[max(best - 1, 0)], clips[min(best + 1, len(clips) - 1)]
    found, least = float(clips[best]), float(errors[best])
    for _ in range(3):  # the error is bumpy in the clip, so a finer grid rather than a bracket that trusts one valley
        finer = np.linspace(low, high, 25)
        errors = clip_errors(distribution, grid, finer)
        best = int(errors.argmin())
        low, high = finer[max(best - 1, 0)], finer[min(best + 1, len(finer) - 1)]
        if errors[best] < least:
            found, least = float(finer[best]), float(errors[best])
    return BestClip(found, least, sigma)


def _range(low: float, high: float) -> str:
    return f" in [{low:g}, {high:g}]" if math.isfinite(low) or math.isfinite(high) else ""
