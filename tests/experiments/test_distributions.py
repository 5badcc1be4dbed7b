"""The integrals against scipy's adaptive quadrature, tables of Max (1960), and samples."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

import octavo as ov
from octavo.analysis import distributions as d
from octavo.errors import OctavoError

F = ov.formats
CASES = [
    (d.normal(0.5, 2.0), stats.norm(0.5, 2.0)),
    (d.normal(0, 1, -2, 5), stats.truncnorm(-2, 5)),
    (d.laplace(0.7), stats.laplace(scale=0.7)),
    (d.student_t(5), stats.t(5)),
    (d.student_t(2.5), stats.t(2.5)),
    (d.uniform(-1, 3), stats.uniform(-1, 4)),
]
IDS = [ours.name for ours, _ in CASES]


def slow_mse(pdf, values, low, high):
    """Cell by cell with scipy, the outermost to infinity."""
    edges = [low, *((values[1:] + values[:-1]) / 2), high]
    total = 0.0
    for value, a, b in zip(values, edges, edges[1:], strict=False):
        a, b = max(a, low), min(b, high)
        if a < b:
            total += integrate.quad(lambda x, v=value: (x - v) ** 2 * pdf(x), a, b, limit=200)[0]
    return total


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=IDS)
@pytest.mark.parametrize(("fmt", "clip"), [(F.integer_format(5), 3.7), (F.E2M3, 6.1), (F.E3M2, 40.0)], ids=str)
def test_mean_squared_error(ours, theirs, fmt, clip):
    values = d.grid_of(fmt) * clip
    slow = slow_mse(theirs.pdf, values, *theirs.support())
    assert ours.mse(values) == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=IDS)
def test_moments(ours, theirs):
    assert ours.mean == pytest.approx(theirs.mean(), abs=1e-9)
    assert ours.std == pytest.approx(theirs.std(), rel=1e-6)


def test_truncated_student_t_without_variance():
    ours = d.student_t(1.5, -20, 20)
    mass = stats.t(1.5).cdf(20) - stats.t(1.5).cdf(-20)
    second = integrate.quad(lambda x: x * x * stats.t(1.5).pdf(x), -20, 20)[0] / mass
    assert ours.std == pytest.approx(math.sqrt(second), rel=1e-9)


@pytest.mark.parametrize(("levels", "error"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_lloyd_max_of_max_1960(levels, error):
    values, mse = d.normal().lloyd_max(levels, 20_000, 1e-13)
    assert mse == pytest.approx(error, rel=1e-3)
    assert np.allclose(values, -values[::-1], atol=1e-4)


def test_lloyd_max_meets_its_conditions():
    values, mse = d.normal().lloyd_max(32, 20_000, 1e-13)  # Max printed 0.002499; the optimum is 0.002505
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    mass = np.diff(stats.norm.cdf(edges))
    assert np.allclose(values, -np.diff(stats.norm.pdf(edges)) / mass, atol=1e-5)
    assert mse == pytest.approx(1 - np.sum(mass * values**2), rel=1e-4)


def test_lloyd_max_is_better_than_any_grid():
    for density in (d.laplace(), d.student_t(4)):
        bound = math.sqrt(density.lloyd_max(64, 500)[1])
        assert all(d.best_clip(density, d.grid_of(f), steps=8).rmse > bound for f in (F.integer_format(6), F.E3M2))


@pytest.mark.parametrize("fmt", [F.INT4, F.E2M3, F.E4M3FN, F.INT8], ids=str)
def test_best_clip_is_the_best(fmt):
    density, grid = d.laplace(2.0), d.grid_of(fmt)
    best = d.best_clip(density, grid, octaves=8)
    tries = best.sigma * np.geomspace(0.5, 200, 400)
    assert best.rmse <= d.clip_errors(density, grid, tries).min() * (1 + 1e-9)
    around = optimize.minimize_scalar(
        lambda c: density.mse(grid * c), bounds=(best.clip * 0.97, best.clip * 1.03), method="bounded"
    )
    assert best.rmse**2 <= around.fun * (1 + 1e-6)


def test_against_samples_cast_by_the_library(generator):
    x = torch.randn(2_000_000, generator=generator, dtype=torch.float64)
    for fmt, clip in ((F.E4M3FN, 7.0), (F.INT8, 4.0), (F.E3M4, 9.0)):
        scale = clip / fmt.max
        sampled = float((ov.cast((x / scale).clamp(-fmt.max, fmt.max), fmt) * scale - x).square().mean())
        assert d.normal().mse(d.grid_of(fmt) * clip) == pytest.approx(sampled, rel=0.01)


def test_integers_are_symmetric():
    assert d.grid_of(F.INT8)[0] == -1
    assert len(d.grid_of(F.INT8)) == 255
    assert d.grid_of(F.UINT8)[0] == 0


def test_a_density_of_your_own():
    triangle = d.Distribution("triangle", lambda x: 1 - np.abs(x), -1, 1, kinks=(0.0,))
    assert triangle.std == pytest.approx(math.sqrt(1 / 6), rel=1e-12)
    assert triangle.expect(np.abs, np.zeros(1)) == pytest.approx(1 / 3, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: d.student_t(2.0),
        lambda: d.normal(0, 0),
        lambda: d.uniform(1, 1),
        lambda: d.Distribution("nothing", np.zeros_like, 0, 1),
        lambda: d.Distribution("broken", lambda x: x * np.nan, 0, 1),
        lambda: d.Distribution("one number", lambda x: 1.0),
        lambda: d.Distribution("of one number", lambda x: math.exp(-x * x)),
        lambda: d.Distribution("below zero", np.sin, 0, 7),
        lambda: d.Distribution("Cauchy", lambda x: 1 / (1 + x * x)).std,
    ],
)
def test_what_cannot_be(make):
    with pytest.raises(OctavoError):
        make()
