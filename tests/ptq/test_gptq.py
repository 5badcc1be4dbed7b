"""GPTQ against the textbook: column by column in float64 with full inverses, and never worse than nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo as ov
from octavo import Cast, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor
from octavo.ptq.gptq import GPTQ, Inverse, Moments, Rounder

FORMATS = ["int8", "uint8", "e4m3fn", "e5m2", "e3m4", "e2m5", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "int4"]
GRANULARITIES = [PerChannel(0), PerGroup(16), PerGroup(7), PerBlock(8, 16), PerTensor()]


def casts():
    for name in FORMATS:
        affine = name == "uint8"
        for granularity in GRANULARITIES:
            yield Cast(name, granularity, affine=affine)
    yield Cast("int8", PerChannel(0), affine=True)
    yield Cast("int8", PerGroup(16), ov.Current(power_of_two=True))
    yield Cast("e4m3fn", PerTensor(), ov.Constant(0.25))


CASTS = list(casts())


def named(how):
    told = (how.format.name, how.granularity, how.scale, how.affine) if isinstance(how, Cast) else (how,)
    return "-".join(map(str, told))


def inputs(rows, width, seed=0, outlier=True):
    """Correlated rows [rows, width], one column much larger than the others, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + 0.3 * torch.eye(width)
    x = torch.randn(rows, width, generator=generator) @ mixing
    if outlier:
        x[:, 3 % width] *= 20
    return x


def moments(x, exact=None):
    seen = Moments(x.shape[1])
    seen.update(x, exact)
    return seen


def textbook(weight, how, quantized, hessian, damping, ordered):
    """Algorithm of the paper's section 3 without its speed-ups: the inverse is made anew for the columns that are left.

    Casts a column by quantizing the whole matrix with the scales that it has, in the weight's own precision.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal().clone()
    hessian += torch.diag(damping * diagonal + (diagonal == 0).double())
    order = sorted(range(len(diagonal)), key=lambda i: -diagonal[i].item()) if ordered else list(range(len(diagonal)))
    left, codes, margins = weight.double().clone(), quantized.codes.clone(), torch.ones(weight.shape)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        q = ov.quantize_scaled(left.float(), how, quantized.scale, quantized.zero_point)
        codes[:, column] = q.codes[:, column]
        for side in (-1, 1):  # would another rounding error in the float32 sums have given another code?
            beside = (left + side * (1e-5 * left.abs() + 1e-6)).float()
            near = ov.quantize_scaled(beside, how, quantized.scale, quantized.zero_point)
            margins[:, column] *= near.codes[:, column] == q.codes[:, column]
        error = (left[:, column] - q.dequantize(torch.float64)[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return codes, margins.bool()


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("how", CASTS, ids=named)
def test_equals_the_textbook(how, ordered):
    x, weight = inputs(200, 37), torch.randn(24, 37, generator=torch.Generator().manual_seed(1))
    nearest = ov.quantize(weight, how)
    got = Inverse(moments(x), 0.01, ordered).round(weight, nearest, how)
    codes, sure = textbook(weight, how, nearest, x.double().T @ x.double(), 0.01, ordered)
    # the two differ by float32 sums: a tie may fall on the other side, and what follows in its row moves a step
    ties = (~sure).any(1)
    assert torch.equal(got.codes[~ties], codes[~ties])
    assert int(ties.sum()) < 12
    assert torch.equal(got.scale, nearest.scale) and got.block == nearest.block and got.dtype == weight.dtype


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
def test_blocks_of_columns_change_nothing(width, monkeypatch):
    x, weight = inputs(400, width), torch.randn(6, width, dtype=torch.float64)
    how = Cast("int8", PerGroup(64))
    nearest = ov.quantize(weight, how)
    whole = Inverse(moments(x.double()), 0.01).round(weight, nearest, how)
    monkeypatch.setattr("octavo.ptq.gptq.BLOCK", 1)
    assert torch.equal(Inverse(moments(x.double()), 0.01).round(weight, nearest, how).codes, whole.codes)


@pytest.mark.parametrize("width", [1, 191, 192, 193, 500])
def test_half_of_the_products_is_enough(width):
    x = inputs(50, width).double()
    seen = moments(x)
    assert torch.allclose(seen.square, x.mT @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_any_rounding_keeps_to_the_grid(name):
    x, weight = inputs(200, 37), torch.randn(24, 37, generator=torch.Generator().manual_seed(1))
    how = Cast(name, PerGroup(16), rounding="stochastic", affine=name == "uint8")
    nearest = ov.quantize(weight, Cast(name, PerGroup(16), affine=name == "uint8"))
    rounded = Inverse(moments(x), 0.01).round(weight, nearest, how)
    assert loss(x, weight, rounded) < 4 * loss(x, weight, ov.quantize(weight, how))
    again = ov.quantize_scaled(
        rounded.dequantize(), Cast(name, PerGroup(16), affine=name == "uint8"), rounded.scale, rounded.zero_point
    )
    assert torch.equal(again.codes, rounded.codes)


@pytest.mark.parametrize("how", CASTS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_inputs_give_the_nearest(how, dtype):
    weight = torch.randn(24, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    nearest = ov.quantize(weight, how)
    alone = moments(torch.eye(37) * 3)
    rounder = Rounder((alone, Moments(37)))
    assert torch.equal(rounder.target(weight), weight)
    assert torch.equal(rounder.round(weight, nearest, how).codes, nearest.codes)


def loss(x, weight, rounded):
    return float((x.double() @ (weight.double() - rounded.dequantize(torch.float64)).T).square().sum())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CASTS),
    st.integers(1, 300),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(0, 1000),
    st.booleans(),
)
def test_results_are_nearer(how, rows, width, out, seed, ordered):
    x = inputs(rows, width, seed)
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed + 1))
    nearest = ov.quantize(weight, how)
    rounded = Inverse(moments(x), 0.01, ordered).round(weight, nearest, how)
    damped = torch.cat([x, (0.01 * x.square().sum(0)).sqrt().diag()])  # what damping asks for is part of the sum
    assert loss(damped, weight, rounded) <= 1.25 * loss(damped, weight, nearest) + 1e-9


@pytest.mark.parametrize("name", ["int8", "e4m3fn", "int4"])
def test_much_nearer_where_inputs_are_correlated(name):
    x = inputs(1000, 64)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:12].T @ torch.randn(12, 64) + 0.05 * x
    weight, how = torch.randn(48, 64), Cast(name, PerChannel(0))
    nearest = ov.quantize(weight, how)
    assert loss(x, weight, Inverse(moments(x), 0.01).round(weight, nearest, how)) < 0.3 * loss(x, weight, nearest)


def ridge(x, wanted, weight, damping):
    """Least squares of the rows and, below them, of the damping, which pulls towards the weight."""
    pull = (damping * x.square().sum(0)).sqrt().diag()
    return torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([wanted, pull @ weight.T])).solution.T


def test_the_target_is_a_part_of_ridge_regression():
    exact, weight = inputs(600, 40).double(), torch.randn(9, 40, dtype=torch.float64)
    x = ov.fake_quantize(exact, Cast("int4", ov.PerToken()))
    related = ((exact - x).square().sum(1) < x.square().sum(1)).double()[:, None]
    wanted = (x + related * (exact - x)) @ weight.T
    steps, parts = {}, {"all": slice(0, 600), "first": slice(0, 300), "second": slice(300, 600)}
    for name, part in parts.items():
        steps[name] = ridge(x[part], wanted[part], weight, 0.5) - weight

    def lost(share):  # of each half's regression on the other half
        one = x[300:] @ (weight + share * steps["first"]).T - wanted[300:]
        other = x[:300] @ (weight + share * steps["second"]).T - wanted[:300]
        return float(one.square().sum() + other.square().sum())

    shares = torch.linspace(0, 1.5, 3001, dtype=torch.float64)
    best = min(shares, key=lost)
    assert 0 < best < 1.5
    target = Rounder((moments(x[:300], exact[:300]), moments(x[300:], exact[300:]))).target(weight)
    assert torch.allclose(target, weight + best * steps["all"], atol=1e-3 * float(steps["all"].abs().max()))
    still = Rounder((moments(x[:300], exact[:300]), moments(x[300:], exact[300:])), GPTQ(follow=False))
    assert torch.equal(still.target(weight), weight)


def test_chance_is_not_learnt():
    """An error that has nothing to do with the input leaves weights nearly where they are, however few the rows."""
    generator = torch.Generator().manual_seed(0)
    for rows in (10, 60, 600):
        halves = []
        for _ in range(2):
            x = torch.randn(rows, 50, generator=generator)
            halves.append(moments(x, x + 0.3 * torch.randn(rows, 50, generator=generator)))
        weight = torch.randn(8, 50, generator=generator)
        moved = Rounder((halves[0], halves[1])).target(weight) - weight
        assert moved.norm() < 0.03 * weight.norm()


def test_what_is_no_chance_is_learnt():
    generator = torch.Generator().manual_seed(0)
    halves = []
    for _ in range(2):
        x = torch.randn(400, 20, generator=generator)
        halves.append(moments(x, 1.2 * x))
    weight = torch.randn(8, 20, generator=generator)
    assert torch.allclose(Rounder((halves[0], halves[1])).target(weight), 1.2 * weight, rtol=0.04, atol=0.04)


def test_rows_that_are_others_do_not_count():
    x = inputs(50, 8)
    seen = moments(x, -x)
    assert not seen.cross.any()
    seen.update(x, x[:-1])
    assert not seen.cross.any() and seen.rows == 100


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_inputs_and_dead_ones(rows):
    x = inputs(rows, 30)
    x[:, 4:9] = 0
    weight, how = torch.randn(7, 30), Cast("int8", PerChannel(0))
    nearest = ov.quantize(weight, how)
    rounded = Inverse(moments(x), 0.01).round(weight, nearest, how)
    assert torch.equal(rounded.codes[:, 4:9], nearest.codes[:, 4:9])
    assert loss(x, weight, rounded) <= loss(x, weight, nearest)
    if rows == 0:
        assert torch.equal(rounded.codes, nearest.codes)


def test_bad_settings():
    for damping in (0, -1, float("inf"), float("nan")):
        with pytest.raises(OctavoError, match="damping"):
            GPTQ(damping=damping)
        with pytest.raises(OctavoError, match="damping"):
            GPTQ(follow_damping=damping)
