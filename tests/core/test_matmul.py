"""Products of quantized matrices against float64 of the dequantized operands, and against other people's kernels."""

import itertools

import pytest
import torch

import octavo as ov
from octavo import Cast, Constant, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core import formats, matmul
from octavo.core.cast import quantize_unchecked

CASTS = {
    "INT8": Cast("INT8"),
    "UINT8 affine": Cast("UINT8", affine=True),
    "INT8 affine": Cast("INT8", affine=True),
    "UINT8": Cast("UINT8"),
    "E4M3FN": Cast("E4M3FN"),
    "E5M2": Cast("E5M2"),
    "E3M4": Cast("E3M4"),
    "E2M5": Cast("E2M5"),
}
OTHERS = {
    "INT4": Cast("INT4"),
    "INT4 affine": Cast("INT4", affine=True),
    "INT16": Cast("INT16"),
    "INT16 affine": Cast("INT16", affine=True),
    "E5M6": Cast("E5M6"),
    "FP16": Cast("FP16", scale=Constant(1.0)),
    "BF16": Cast("BF16", scale=Constant(1.0)),
    "real bias": Cast(formats.float_format(4, 3, 7.4, "none")),
    "integers with an odd range": Cast(formats.IntegerFormat("ODD", -3, 250)),
}


def with_granularity(how, granularity):
    return Cast(how.format, granularity, how.scale, how.rounding, how.affine)


def check(q, p, actual):
    """q [.., M, K] times p [.., K, N] within the bound of an FP32 sum of K products and one rounding a stretch."""
    a, b = q.dequantize(torch.float64), p.dequantize(torch.float64)
    expected, size = a @ b, a.abs() @ b.abs()
    # zero points come out of exact sums, so what is summed can be larger than the result's own terms
    if q.zero_point is not None or p.zero_point is not None:
        size = size + expected.abs()
    assert actual.shape == expected.shape
    wrong = (actual.double() - expected).abs()
    bound = (a.shape[-1] + 8) * 2.0**-24 * size + 1e-37
    assert bool((wrong <= bound).all()), (wrong / (size + 1e-30)).max()


@pytest.mark.parametrize("right", CASTS)
@pytest.mark.parametrize("left", CASTS)
def test_all_pairs_of_formats(left, right, generator):
    x = torch.randn(9, 100, generator=generator) + 0.3
    w = torch.randn(100, 13, generator=generator) - 0.2
    pairs = [(PerTensor(), PerTensor()), (PerToken(), PerChannel(1)), (PerGroup(48), PerBlock(64, 5))]
    for one, other in pairs:
        q = ov.quantize(x, with_granularity(CASTS[left], one))
        p = ov.quantize(w, with_granularity(CASTS[right], other))
        check(q, p, ov.matmul(q, p))
        assert torch.equal(matmul.multiply(q, p.mT), ov.matmul(q, p))


@pytest.mark.parametrize("other", OTHERS)
def test_unusual_formats(other, generator):
    x = torch.randn(5, 70, generator=generator)
    w = torch.randn(70, 6, generator=generator)
    for name in ("INT8", "UINT8 affine", "E4M3FN", *OTHERS):
        how = {**CASTS, **OTHERS}[name]
        q, p = ov.quantize(x, with_granularity(OTHERS[other], PerToken())), ov.quantize(w, how)
        check(q, p, ov.matmul(q, p))
        check(p.mT, q.mT, ov.matmul(p.mT, q.mT))


LEFT = [
    PerTensor(),
    PerToken(),
    PerChannel(1),
    PerGroup(48),
    PerGroup(64),
    PerGroup(7),
    PerBlock(4, 16),
    PerBlock(1, 33),
]


@pytest.mark.parametrize(("one", "other"), list(itertools.product(LEFT, LEFT)), ids=str)
def test_granularities_need_not_fit_each_other(one, other, generator):
    """Scales along K on both sides, of 48 against 64 and worse; K = 130 leaves a ragged end on all of them."""
    for left, right in (("INT8", "INT8"), ("E4M3FN", "E3M4"), ("UINT8 affine", "INT8 affine"), ("INT8", "E5M2")):
        x = torch.randn(6, 130, generator=generator)
        w = torch.randn(5, 130, generator=generator) * torch.rand(130, generator=generator)
        q = ov.quantize(x, with_granularity(CASTS[left], one))
        p = ov.quantize(w, with_granularity(CASTS[right], other)).mT
        check(q, p, ov.matmul(q, p))


def test_integers_are_exact(generator):
    x = torch.randn(33, 500, generator=generator)
    w = torch.randn(500, 17, generator=generator)
    for left, right in itertools.product(("INT8", "INT8 affine", "UINT8 affine", "UINT8"), repeat=2):
        q, p = ov.quantize(x, CASTS[left]), ov.quantize(w, CASTS[right])
        exact = q.numbers(torch.float64).long() @ p.numbers(torch.float64).long()
        scaled = exact.float() * q.scale * p.scale
        assert torch.equal(ov.matmul(q, p), scaled)


def test_a_long_k_does_not_overflow():
    k = (1 << 17) + 77
    for low, high in ((-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0)):
        x, w = torch.full((2, k), low), torch.full((k, 3), high)
        for left, right in (("INT8", "INT8"), ("UINT8 affine", "INT8 affine"), ("E4M3FN", "E4M3FN")):
            q, p = ov.quantize(x, CASTS[left]), ov.quantize(w, CASTS[right])
            expected = q.dequantize(torch.float64) @ p.dequantize(torch.float64)
            torch.testing.assert_close(
                ov.matmul(q, p).double(), expected, rtol=1e-5 if left == "E4M3FN" else 1e-6, atol=0
            )


@pytest.mark.parametrize("k", [1, 17, 100, 128])
def test_odd_sizes(k, generator):
    for m, n in ((1, 1), (1, 5), (3, 1), (0, 4), (4, 0), (17, 33)):
        for name, how in CASTS.items():
            x, w = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
            q, p = ov.quantize(x, how), ov.quantize(w, with_granularity(how, PerGroup(8)))
            y = ov.matmul(q, p)
            assert y.shape == (m, n), name
            check(q, p, y)


def test_no_k():
    for how in CASTS.values():
        y = ov.matmul(ov.quantize(torch.empty(3, 0), how), ov.quantize(torch.empty(0, 2), how))
        assert torch.equal(y, torch.zeros(3, 2))


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 5, 12), (12, 7)),
        ((5, 12), (3, 12, 7)),
        ((2, 3, 5, 12), (3, 12, 7)),
        ((2, 1, 5, 12), (1, 3, 12, 7)),
        ((1, 5, 12), (4, 12, 7)),
        ((0, 5, 12), (12, 7)),
    ],
    ids=str,
)
def test_batches(name, left, right, generator):
    x, w = torch.randn(left, generator=generator), torch.randn(right, generator=generator)
    for granularity in (PerTensor(), PerToken(), PerGroup(5), PerBlock(2, 5), PerChannel(-1), PerChannel(0)):
        q = ov.quantize(x, with_granularity(CASTS[name], granularity))
        p = ov.quantize(w, with_granularity(CASTS[name], granularity))
        check(q, p, ov.matmul(q, p))


@pytest.mark.parametrize("m", [1, 17])
def test_fp8_equals_torch(m, generator):
    """torch._scaled_mm in FP32 with scales of one: the same products, summed in another order."""
    x, w = torch.randn(m, 64, generator=generator), torch.randn(32, 64, generator=generator)
    for how in (Cast("E4M3FN"), Cast("E4M3FN", scale=Constant(1.0))):
        q, p = ov.quantize(x, how), ov.quantize(w, how)
        a, b = (t.codes.view(torch.float8_e4m3fn) for t in (q, p))
        theirs = torch._scaled_mm(a, b.T, q.scale.reshape(()), p.scale.reshape(()), out_dtype=torch.bfloat16)
        ours = ov.matmul(q, p.mT)
        size = q.dequantize(torch.float64).abs() @ p.dequantize(torch.float64).abs().T
        assert bool(((ours - theirs.float()).abs() <= theirs.float().abs() * 2.0**-8 + 64 * 2.0**-23 * size).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_the_arguments_may_be(dtype, generator):
    a = torch.randn(4, 16, generator=generator).to(dtype)
    b = torch.randn(16, 3, generator=generator).to(dtype)
    how = Cast("INT8", PerToken())
    q, p = ov.quantize(a, how), ov.quantize(b, Cast("INT8", PerChannel(1)))
    both = ov.matmul(a, b, lhs=how, rhs=Cast("INT8", PerChannel(1)))
    assert both.dtype == dtype
    assert torch.equal(both, ov.matmul(q, p))
    assert torch.equal(ov.matmul(a, b), a @ b)
    assert torch.equal(ov.matmul(a, p), a @ p.dequantize(dtype))
    assert torch.equal(ov.matmul(q, b), q.dequantize(dtype) @ b)
    assert torch.equal(ov.matmul(a, b, rhs=Cast("INT8")), a @ ov.fake_quantize(b, Cast("INT8")))


def test_shapes_that_do_not_fit():
    for a, b in (((4, 5), (6, 3)), ((5,), (5, 3)), ((4, 5), (5,)), ((4, 5), (3, 5))):
        with pytest.raises(OctavoError, match=r"\[…, K, N\]"):
            ov.matmul(torch.ones(a), torch.ones(b), lhs=Cast("INT8"), rhs=Cast("INT8"))
        with pytest.raises(OctavoError, match=r"\[…, K, N\]"):
            ov.matmul(torch.ones(a), torch.ones(b))


@pytest.mark.parametrize("name", CASTS)
def test_nan_shows_in_its_row_and_no_other(name):
    x = torch.randn(5, 20)
    for bad in (float("nan"), float("inf")):
        x[2, 7] = bad
        q = quantize_unchecked(x, with_granularity(CASTS[name], PerToken()))
        y = matmul.multiply(q, ov.quantize(torch.randn(6, 20), CASTS[name]))
        assert y.isnan().all(1).tolist() == [False, False, True, False, False]
        assert bool(y[[0, 1, 3, 4]].isfinite().all())
