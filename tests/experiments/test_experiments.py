"""Every experiment's quick run passes, and its parts agree with independent implementations on other settings."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import octavo as ov
from octavo.analysis import distributions, experiment
from octavo.report import plots
from tests.experiments.conftest import FOLDER

F = ov.formats
NAMES = experiment.names(FOLDER)


def test_all_are_there():
    expected = "bits-of-accuracy crest-factor fp8-lm-memory gate-counts hopper-accumulator int8-vs-fp8-dot-products"
    expected += " number-formats outlier-matmul shared-microexponents swamping"
    assert set(expected.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_passes(name):
    one = experiment.load(name, FOLDER)
    outcome = one.run(quick=True, seed=3)
    assert not outcome.missed, [(c.target.name, c.ours, c.target.value) for c in outcome.missed]
    assert outcome.met > 0
    assert outcome.result.tables
    assert outcome.result.plots
    text = one.readme
    assert "arxiv.org" in text or name in ("crest-factor", "int8-vs-fp8-dot-products")
    for heading in ("## Where it comes from", "## Tolerance", "## What to change"):
        assert heading in text
    assert plots.png(outcome.result.plots[0]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_only_the_public_api(name):
    code = (FOLDER / name / "run.py").read_text()
    inside = ("octavo.core", "octavo.ops", "octavo.nn", "octavo.ptq", "octavo.io", "octavo.cli", "octavo.report")
    assert not any(room in code for room in inside)


def test_another_seed_is_another_run_and_the_same_seed_the_same():
    one = experiment.load("swamping", FOLDER)
    values = [one.run(quick=True, seed=seed, lengths=(256,)).result.values for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("name", "changed", "value"),
    [
        ("swamping", {"lengths": [10_000]}, "length 10000: no chunk"),
        ("swamping", {"accumulator": "BF16", "formats": ("FP16",), "chunks": ()}, "length 256: FP16 accumulator"),
        ("int8-vs-fp8-dot-products", {"chunks": (64, 9999), "length": 100}, "ρ=0.1, chunk 9999: FP8"),
        ("crest-factor", {"formats": {"INT8": F.INT8, "E2M1": "E2M1"}}, "INT8 = E2M1"),
        ("crest-factor", {"integer": "INT4", "crests": (30, 40)}, "E4M3 level"),
        ("bits-of-accuracy", {"formats": {"FP4": "fp4"}}, "normal: FP4"),
        ("number-formats", {"formats": ("E2M1",), "example": "BF16"}, "E2M1 max"),
        ("outlier-matmul", {"shape": (3, 20, 5), "smooth": {}}, "LLM.int8(), dB"),
        ("hopper-accumulator", {"cast": None, "lengths": (2000,), "promote": None}, "promotion helps by"),
    ],
)
def test_one_line_changed(name, changed, value):
    """Whatever is an argument can be another, quick or not, and is drawn."""
    result = experiment.load(name, FOLDER).run(quick=True, **changed).result
    assert (value in result.values) == (value != "E4M3 level")  # which lies below these crest factors
    for plot in result.plots:
        assert plots.png(plot).startswith(b"\x89PNG")


def test_quick_runs_keep_what_was_asked_for():
    result = experiment.load("hopper-accumulator", FOLDER).run(quick=True, lengths=(100, 700), length=300).result
    assert [row[0] for row in result.tables[0].rows] == [100, 700]
    assert "K = 300" in result.tables[1].title
    assert (
        experiment.load("outlier-matmul", FOLDER).run(quick=True, shape=(3, 20, 5)).result.tables[0].title[:6]
        == "3 × 20"
    )


def test_nothing_sent_by_one_rank(module):
    layout = module("fp8-lm-memory").Layout(1, 1, 1)
    result = experiment.load("fp8-lm-memory", FOLDER).run(layout=layout).result
    assert result.values["FP8-LM: sent, GiB"] == 0
    assert "communication saved" not in result.values


def test_unknown_parameter():
    with pytest.raises(ov.OctavoError, match="has no parameter 'length'; it has"):
        experiment.load("swamping", FOLDER).run(length=3)


# number formats


def test_sums_are_those_of_numpy(module):
    random = np.random.default_rng(0)
    for a, b in zip(random.uniform(-2000, 2000, 40), random.normal(0, 30, 40), strict=True):
        ours = module("number-formats").add(float(a), float(b), F.FP16)
        assert ours == float(np.float16(np.float64(np.float16(a)) + np.float64(np.float16(b))))


def test_gaps_are_those_of_numpy(module):
    for octave in (-14, -3, 0, 10, 15):
        assert module("number-formats").gap(F.FP16, octave) == float(np.spacing(np.float16(2.0**octave)))


# bits of accuracy


def test_other_distributions_and_formats():
    one = experiment.load("bits-of-accuracy", FOLDER)
    density = distributions.laplace()
    found = one.run(
        quick=True, formats={"mine": F.E3M2, "INT4": F.INT4}, distributions={"Laplace": density}, script={}, levels=16
    ).result
    best = min(density.mse(distributions.grid_of(F.INT4) * c) for c in np.geomspace(0.5, 20, 2000))
    assert found.values["Laplace: INT4"] == pytest.approx(math.log2(math.sqrt(2 / best)), abs=1e-3)
    assert found.values["Laplace: Lloyd-Max"] > found.values["Laplace: INT4"]


# dot products


def numpy_quantize(x, top, rounding, chunk):
    """One vector in float64, integers."""
    out = np.empty_like(x)
    for start in range(0, len(x), chunk or len(x)):
        part = x[start : start + (chunk or len(x))]
        scale = np.abs(part).max() / top
        steps = np.abs(part / scale)
        whole = np.floor(steps + 0.5) if rounding == "nearest-away" else np.floor(steps)
        out[start : start + len(part)] = np.sign(part) * whole * scale
    return out


@pytest.mark.parametrize(("n", "chunk"), [(1000, None), (1000, 96), (333, 64), (40, 100)])
@pytest.mark.parametrize("rounding", ["nearest-away", "toward-zero"])
def test_quantized_vectors(module, generator, n, chunk, rounding):
    dots = module("int8-vs-fp8-dot-products")
    x = torch.randn(5, n, generator=generator, dtype=torch.float64)
    ours = dots.quantize(x, dots.Way(F.INT8, 127, rounding), chunk)
    slow = np.stack([numpy_quantize(row, 127, rounding, chunk) for row in x.numpy()])
    assert np.allclose(ours.numpy(), slow, rtol=1e-12, atol=1e-12)


def test_other_lengths_and_correlations(module):
    one = experiment.load("int8-vs-fp8-dot-products", FOLDER)
    values = one.run(quick=True, correlations=(0.5,), chunks=(None, 64), length=700, lengths=(50,)).result.values
    # independent law: noise of x·y is 2 · n · Δ²/12, with Δ = E[amax]/127 of 700 normal numbers
    amax = np.abs(np.random.default_rng(1).normal(size=(2000, 700))).max(1)
    law = 10 * math.log10((0.5 * 700) ** 2 / (2 * 700 * np.mean((amax / 127) ** 2) / 12))
    assert values["ρ=0.5, chunk no: INT8 rounded, powers"] == pytest.approx(law, abs=1.5)
    assert values["ρ=0.5, chunk 64: INT8 rounded, powers"] > values["ρ=0.5, chunk no: INT8 rounded, powers"]


# crest factor


def test_crest_factor_of_samples(module, generator):
    x = torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    for fmt, crest in ((F.INT8, 9.0), (F.E3M4, 50.0), (F.E5M2, 20.0)):
        how = ov.Cast(fmt, scale=ov.Constant(crest / fmt.max))
        ours = module("crest-factor").sqnr(distributions.normal(), fmt, crest)
        assert ours == pytest.approx(ov.sqnr(x, ov.fake_quantize(x, how)), abs=0.05)


def test_crossover_of_another_bulk(module):
    crest, bulk = module("crest-factor"), distributions.student_t(6)
    found = crest.crossover(bulk, F.INT8, F.E4M3FN)
    gap = crest.sqnr(bulk, F.INT8, found) - crest.sqnr(bulk, F.E4M3FN, found)
    assert abs(gap) < 1e-6
    assert crest.sqnr(bulk, F.INT8, found * 1.1) < crest.sqnr(bulk, F.E4M3FN, found * 1.1)


# swamping


@pytest.mark.parametrize(("n", "chunk"), [(1000, None), (1000, 24), (3000, 100), (10, 64)])
def test_sums_in_fp16(module, generator, n, chunk):
    x = module("swamping").ones_or_so(3, n, generator)
    accumulate = ov.accumulate.Chunked(F.FP16, chunk) if chunk else ov.accumulate.Sequential(F.FP16)
    ours = module("swamping").total(x, accumulate)

    def slow(row):
        total = np.float16(0)
        for value in row:
            total = np.float16(np.float64(total) + np.float64(value))
        return total

    for row, found in zip(x.numpy(), ours.tolist(), strict=True):
        parts = [slow(row[i : i + chunk]) for i in range(0, n, chunk)] if chunk else row
        assert found == float(slow(parts))


def test_another_accumulator_moves_the_curve():
    one = experiment.load("swamping", FOLDER)
    run = dict(quick=True, lengths=(2048,), chunks=(32,))
    small = one.run(accumulator=F.float_format(6, 7, name="E6M7"), **run).result.values
    large = one.run(accumulator=F.FP16, **run).result.values
    assert small["length 2048: no chunk"] < 0.6 < 0.99 < large["length 2048: no chunk"]
    assert small["length 2048: chunk 32"] > 0.98


# Hopper


def slow_tensor_core(a, b, align, bits, promote):
    """One dot product in exact fractions."""
    kept, promoted = Fraction(0), np.float32(0)
    for start in range(0, len(a), align):
        terms = [
            kept,
            *(
                Fraction(x) * Fraction(y)
                for x, y in zip(a[start : start + align], b[start : start + align], strict=True)
            ),
        ]
        top = max(abs(t) for t in terms)
        if top:
            exponent = math.frexp(float(top))[1] - 1
            unit = Fraction(2) ** (exponent - bits + 1)
            kept = sum((int(t / unit) * unit for t in terms), Fraction(0))
        if promote and (start + align) % promote == 0:
            promoted = np.float32(float(promoted) + float(kept))
            kept = Fraction(0)
    return float(np.float32(float(promoted) + float(kept)))


@pytest.mark.parametrize(("n", "align", "bits", "promote"), [(256, 32, 14, None), (512, 16, 10, 64), (96, 8, 12, 32)])
def test_tensor_core_in_fractions(module, generator, n, align, bits, promote):
    how = ov.Cast(F.E4M3FN, scale=ov.Constant())
    a, b = (ov.cast(torch.randn(3, n, generator=generator), F.E4M3FN) for _ in range(2))
    found = module("hopper-accumulator").errors(a, b, how, ov.accumulate.TensorCore(align, bits, promote))
    slow = torch.tensor([[slow_tensor_core(x, y, align, bits, promote) for y in b.tolist()] for x in a.tolist()])
    exact = a.double() @ b.double().T
    assert torch.allclose(found, 100 * (slow.double() - exact).abs() / exact.abs().mean(), rtol=1e-9, atol=1e-12)


# gates


def test_gates_by_hand(module):
    gates = module("gate-counts")
    g = gates.Gates()
    assert (g.add(27), g.multiply(8), g.multiply(5), g.widen(9, 28)) == (185, 428, 149, 217)
    # INT8 into 27 bits: 64 ANDs, 7 rows; a 15-bit adder, 12 half adders, 27 flip-flops
    assert gates.multiplier(gates.eight_bits(0), g) + gates.fixed(gates.eight_bits(0), g, 12) == 428 + 101 + 36 + 162
    double = gates.Gates(*(2 * price for price in (1, 3, 3, 3, 7, 6)))
    assert gates.floating(gates.eight_bits(4), gates.Operand(5, 11), double, 3) == 2 * gates.floating(
        gates.eight_bits(4), gates.Operand(5, 11), g, 3
    )


# FP8-LM


def test_memory_of_another_model(module):
    lm = module("fp8-lm-memory")
    model, layout = lm.Model(24, 1024, 50000, 1024), lm.Layout(1, 1, 8)
    values = lm.run(model=model, layout=layout).values
    matrices, rest = 24 * 12 * 1024**2, 50000 * 1024 + 1024 * 1024
    assert values["BF16: sent, GiB"] == pytest.approx((matrices + rest) * 6 * 7 / 8 / 2**30)
    assert values["FP8-LM: sent, GiB"] == pytest.approx((matrices * 2 + rest * 6) * 7 / 8 / 2**30)


# outliers


def test_llm_int8_and_smoothquant_in_numpy(module):
    matmul = module("outlier-matmul")
    x, w = matmul.outliers(40, 96, 24, 4, torch.Generator().manual_seed(5))
    a, b = x.double().numpy(), w.double().numpy()

    def rows(t):
        scale = (np.abs(t).max(1, keepdims=True) / 127).astype(np.float32)
        return np.clip(np.rint(t.astype(np.float32) / scale), -127, 127) * scale.astype(np.float64)

    large = (np.abs(a) > 6).any(0)
    slow = a[:, large] @ b[large] + rows(a[:, ~large]) @ rows(b[~large].T).T
    assert np.allclose(matmul.llm_int8(x, w).numpy(), slow, rtol=1e-4, atol=1e-3)

    alpha = 0.3
    s = np.abs(a).max(0) ** alpha / np.abs(b).max(1) ** (1 - alpha)
    token, channel = ov.Cast(F.INT8, ov.PerToken()), ov.Cast(F.INT8, ov.PerChannel(1))
    slow = rows(a / s) @ rows((b * s[:, None]).T).T
    ours = matmul.smoothed(x, w, alpha, token, channel).numpy()
    assert np.mean((ours - slow) ** 2) < 1e-3 * np.mean((slow - a @ b) ** 2)  # a tie may go the other way in float32


# shared microexponents


def slow_microexponents(block, mantissa, pair, shift_bits):
    top = math.frexp(max(abs(v) for v in block))[1]
    out = []
    for start in range(0, len(block), pair):
        some = block[start : start + pair]
        largest = max(abs(v) for v in some)
        most = 2**shift_bits - 1
        shift = most if largest == 0 else min(most, top - math.frexp(largest)[1])
        unit = Fraction(2) ** (top - shift - mantissa)
        for value in some:
            code = round(Fraction(value) / unit)  # ties to even
            out.append(float(max(-(2**mantissa) + 1, min(2**mantissa - 1, code)) * unit))
    return out


@pytest.mark.parametrize(
    ("mantissa", "block", "pair", "shift_bits"), [(7, 16, 2, 1), (3, 8, 4, 2), (2, 16, 2, 1), (4, 32, 8, 3)]
)
def test_microexponents_in_fractions(module, generator, mantissa, block, pair, shift_bits):
    mx = module("shared-microexponents").Microexponents(mantissa, block, pair, shift_bits)
    x = torch.randn(50, block, generator=generator, dtype=torch.float64) * torch.exp2(
        torch.randint(-6, 6, (50, block), generator=generator).double()
    )
    x[0, :pair] = 0
    slow = torch.tensor(
        [slow_microexponents(row, mantissa, pair, shift_bits) for row in x.tolist()], dtype=torch.float64
    )
    assert torch.equal(mx.round(x), slow)


def test_no_block_below_the_bound(module):
    mx = module("shared-microexponents").Microexponents(2, block=4, pair=2)
    grid = [0.0, 0.124, 0.126, 0.25, 0.374, 0.49, 0.51, 0.74, 0.99, 1.0, 1.25, 1.74, 1.99]
    x = torch.tensor(list(itertools.product(grid, repeat=4)), dtype=torch.float64)
    x = x[x.amax(1) >= 1]
    noise = (mx.round(x) - x).square().sum(1)
    assert (10 * torch.log10(x.square().sum(1) / noise)).min() >= mx.bound
