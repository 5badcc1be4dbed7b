"""``matmul`` with emulated accumulators: casts, scales, stretches, batches, gradients, and input that cannot be."""

import math

import pytest
import torch

import octavo as ov
from octavo.core.accumulate import FP32, Chunked, Integer, Sequential, TensorCore, sum_products
from octavo.errors import OctavoError

IBM = Chunked("FP16_169", 64)
E4, INT8 = ov.Cast("E4M3FN"), ov.Cast("INT8")
WAYS = [FP32, IBM, Sequential("TF32"), Sequential("BF16", "stochastic"), TensorCore(), TensorCore(promote=None)]


def pair(generator, m=5, k=200, n=40):
    return torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)


@pytest.mark.parametrize("how", WAYS[1:])
def test_scales_stay_outside(how, generator):
    a, b = pair(generator)
    x, w = ov.quantize(a, ov.Cast("E4M3FN", ov.PerToken())), ov.quantize(b, ov.Cast("E5M2", ov.PerChannel(1)))
    seed = torch.Generator().manual_seed(7)
    inner = sum_products(x.numbers(), w.numbers().T.contiguous(), how, torch.Generator().manual_seed(7))
    assert torch.equal(ov.matmul(x, w, accumulate=how, generator=seed), inner * x.scale * w.scale)


def test_stretches_are_added_in_fp32(generator):
    """Scales a group of 64 and a group of 48: the accumulator starts anew wherever either changes."""
    a, b = pair(generator)
    x, w = ov.quantize(a, ov.Cast("E4M3FN", ov.PerGroup(64))), ov.quantize(b.T, ov.Cast("E4M3FN", ov.PerGroup(48)))
    total = None
    edges = [0, 48, 64, 96, 128, 144, 192, 200]
    for start, stop in zip(edges, edges[1:], strict=False):
        part = sum_products(x.numbers()[:, start:stop], w.numbers()[:, start:stop], Chunked("FP16_169", 32))
        part = part * x.scale[:, start // 64, None] * w.scale[:, start // 48]
        total = part if total is None else total + part
    assert torch.equal(ov.matmul(x, w.mT, accumulate=Chunked("FP16_169", 32)), total)


@pytest.mark.parametrize("how", WAYS[1:])
def test_operands_left_alone(how, generator):
    a, b = pair(generator)
    assert torch.equal(
        ov.matmul(a, b, accumulate=how, generator=torch.Generator().manual_seed(1)),
        sum_products(a, b.T.contiguous(), how, torch.Generator().manual_seed(1)),
    )
    q = ov.quantize(b, ov.Cast("INT8", ov.PerChannel(1)))
    mixed = ov.matmul(a, b, rhs=ov.Cast("INT8", ov.PerChannel(1)), accumulate=Sequential("FP16"))
    assert torch.equal(mixed, sum_products(a, q.numbers().T.contiguous(), Sequential("FP16")) * q.scale)


def test_zero_points(generator):
    a, b = pair(generator)
    affine = ov.Cast("UINT8", ov.PerToken(), affine=True)
    x, w = ov.quantize(a, affine), ov.quantize(b, INT8)
    exact = x.numbers().double() @ w.numbers().double()
    assert torch.equal(ov.matmul(x, w, accumulate=Integer(32)), exact.float() * x.scale * w.scale)
    assert torch.equal(ov.matmul(x, w, accumulate=Integer(32)), ov.matmul(x, w))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    "shapes", [((2, 3, 4, 8), (8, 5)), ((3, 4, 8), (2, 1, 8, 5)), ((4, 8), (2, 8, 5)), ((0, 4, 8), (8, 5))]
)
def test_batches(how, shapes, generator):
    a, b = (torch.randn(s, generator=generator) for s in shapes)
    per_matrix = ov.Cast("E4M3FN", ov.PerToken())
    x, w = ov.quantize(a, per_matrix), ov.quantize(b, ov.Cast("E4M3FN"))
    result = ov.matmul(x, w, accumulate=how, generator=torch.Generator().manual_seed(0))
    exact = x.dequantize() @ w.dequantize()
    assert result.shape == exact.shape
    assert torch.allclose(result, exact, rtol=0.02, atol=0.2)
    plain = ov.matmul(a, b, accumulate=how, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain, a @ b, rtol=0.02, atol=0.2)
    if how == IBM and result.numel():
        first = (0,) * (a.dim() - 2), (0,) * (b.dim() - 2)
        one = ov.matmul(x.numbers()[first[0]], w.numbers()[first[1]], accumulate=how)
        expected = one * x.scale[first[0]] * w.scale.flatten()[0]
        assert torch.equal(result[(0,) * (result.dim() - 2)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_a(dtype, generator):
    a, b = (x.to(dtype) for x in pair(generator))
    for lhs in (None, E4):
        result = ov.matmul(a, b, lhs=lhs, rhs=E4, accumulate=IBM)
        assert result.dtype == dtype
        assert torch.allclose(result.float(), a.float() @ b.float(), atol=3)


# ---- gradients ----


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("casts", [(E4, ov.Cast("E5M2")), (None, E4), (E4, None), (None, None)])
@pytest.mark.parametrize(
    "shapes", [((6, 8), (8, 5)), ((2, 3, 6, 8), (8, 5)), ((3, 6, 8), (2, 1, 8, 5)), ((6, 8), (2, 8, 5))]
)
def test_gradients_pass_straight_through(how, casts, shapes, generator):
    a, b = (torch.randn(s, generator=generator).requires_grad_() for s in shapes)
    y = ov.matmul(a, b, *casts, accumulate=how)
    g = torch.randn(y.shape, generator=generator)
    y.backward(g)
    x, w = (ov.fake_quantize(t.detach(), c).requires_grad_() for t, c in zip((a, b), casts, strict=True))
    (x @ w).backward(g)
    assert torch.allclose(a.grad, x.grad, atol=1e-5)
    assert torch.allclose(b.grad, w.grad, atol=1e-5)


def test_the_value_is_the_same_with_and_without_gradients(generator):
    a, b = pair(generator)
    y = ov.matmul(a.requires_grad_(), b, E4, E4, IBM)
    assert y.requires_grad
    assert torch.equal(y.detach(), ov.matmul(a.detach(), b, E4, E4, IBM))
    with torch.no_grad():
        assert not ov.matmul(a, b, E4, E4, IBM).requires_grad
    q = ov.quantize(b, E4)
    ov.matmul(a, q, lhs=E4, accumulate=IBM).sum().backward()
    assert torch.allclose(a.grad, q.dequantize().sum(1).expand_as(a), atol=1e-4)


def test_gradients_keep_their_dtype_and_are_made_in_fp32(generator):
    a, b = (x.bfloat16().requires_grad_() for x in pair(generator))
    y = ov.matmul(a, b, E4, E4, IBM)
    g = torch.randn(y.shape, generator=generator).bfloat16()
    y.backward(g)
    assert a.grad.dtype == b.grad.dtype == torch.bfloat16
    exact = g.float() @ ov.quantize(b.detach(), E4).dequantize(torch.float32).T
    assert torch.equal(a.grad, exact.bfloat16())


# ---- what cannot be, and what is odd ----


def test_k_of_zero_and_one_element():
    for how in (*WAYS, Integer()):
        casts = (INT8, INT8)
        empty = ov.matmul(torch.ones(3, 0), torch.ones(0, 4), *casts, accumulate=how)
        assert torch.equal(empty, torch.zeros(3, 4))
        one = ov.matmul(torch.tensor([[3.0]]), torch.tensor([[-2.0]]), *casts, accumulate=how)
        assert one.item() == pytest.approx(-6, rel=0.02)
    assert torch.equal(ov.matmul(torch.ones(3, 0), torch.ones(0, 4), accumulate=IBM), torch.zeros(3, 4))
    assert ov.matmul(torch.ones(0, 5), torch.ones(5, 4), accumulate=IBM).shape == (0, 4)


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((3,), (3, 4)), ((2, 3), (3,)), ((2, 4, 3), (5, 3, 6))])
def test_shapes_that_do_not_fit(shapes):
    a, b = (torch.ones(s) for s in shapes)
    for how in (FP32, IBM, TensorCore()):
        with pytest.raises(OctavoError, match="matmul of"):
            ov.matmul(a, b, accumulate=how)


def test_what_an_integer_accumulator_wants(generator):
    a, b = pair(generator)
    for casts in ((None, INT8), (E4, INT8), (INT8, None), (E4, E4)):
        with pytest.raises(OctavoError, match="Integer accumulator adds integers"):
            ov.matmul(a, b, *casts, accumulate=Integer())
    with pytest.raises(OctavoError, match="floating-point"):
        ov.matmul(a.to(torch.int8), b, accumulate=IBM)
    with pytest.raises(OctavoError, match="float64"):
        ov.matmul(a.double(), b, accumulate=IBM)
    with pytest.raises(OctavoError, match="accumulate is one of"):
        ov.matmul(a, b, accumulate="fp32")


def test_integer_overflow(generator):
    a, b = torch.full((1, 300), 2.0), torch.full((300, 1), 2.0)
    exact = 127 * 127 * 300
    scale = (2 / 127) ** 2
    wrapped = (exact + 2**15) % 2**16 - 2**15
    assert float(ov.matmul(a, b, INT8, INT8, Integer(16))) == pytest.approx(wrapped * scale)
    assert float(ov.matmul(a, b, INT8, INT8, Integer(16, "saturate"))) == pytest.approx((2**15 - 1) * scale)
    assert float(ov.matmul(a, b, INT8, INT8, Integer(32))) == pytest.approx(exact * scale)


def test_operands_wider_than_the_accumulator(generator):
    """Products are exact whatever their width, and rounded when they are added."""
    a, b = pair(generator, k=1)
    wide = ov.matmul(
        a, b, ov.Cast("FP16", scale=ov.Constant()), ov.Cast("BF16", scale=ov.Constant()), Sequential("E5M2")
    )
    exact = ov.cast(a, "FP16").double() @ ov.cast(b, "BF16").double()
    assert torch.equal(wide, ov.cast(exact, "E5M2").float())


@pytest.mark.parametrize("how", WAYS)
def test_nan_and_infinity_come_through(how):
    a, b = torch.ones(3, 70), torch.ones(70, 4)
    a[0, 3], a[1, 5], a[2, 7], b[7, 1] = math.nan, math.inf, -math.inf, 0
    result = ov.matmul(a, b, accumulate=how)
    assert result[0].isnan().all()
    assert (result[1] == math.inf).all()
    assert result[2].isnan().tolist() == [False, True, False, False]
    assert (result[2, [0, 2, 3]] == -math.inf).all()
    cast = ov.matmul(a, b, ov.Cast("E4M3FN", ov.PerToken()), E4, how)
    assert cast.isnan().all()  # a block with NaN or Inf has no scale: none of its values passes as a number


@pytest.mark.parametrize("shapes", [((3, 2, 4, 8), (8, 5)), ((3, 1, 4, 8), (2, 8, 5)), ((2, 4, 8), (3, 1, 8, 5))])
@pytest.mark.parametrize("affine", [False, True])
def test_batches_of_every_granularity(shapes, affine, generator):
    """Scales that are powers of two and sums of integers: float64 says exactly what every element is."""
    grains = [ov.PerTensor(), ov.PerToken(), ov.PerChannel(0), ov.PerChannel(-1), ov.PerGroup(3), ov.PerBlock(3, 5)]
    a, b = (torch.randn(s, generator=generator) for s in shapes)
    for left in grains:
        for right in grains:
            lhs, rhs = (ov.Cast("INT8", g, ov.Current(power_of_two=True), affine=affine) for g in (left, right))
            x, w = ov.quantize(a, lhs), ov.quantize(b, rhs)
            exact = x.dequantize(torch.float64) @ w.dequantize(torch.float64)
            for how in (Integer(), TensorCore(bits=32), Sequential("TF32"), FP32):
                tolerance = 1e-2 if isinstance(how, Sequential) else 1e-6
                assert torch.allclose(ov.matmul(x, w, accumulate=how).double(), exact, rtol=tolerance, atol=tolerance)


def test_broadcast_operands_are_not_copied(monkeypatch):
    """What a kernel is given are views of what is there, however often it is given."""
    from octavo.core import matmul

    a, b, seen = torch.ones(3, 1, 1, 8), torch.ones(2, 8, 5), set()
    real = matmul.sum_products

    def spy(x, w, *rest):
        seen.update((x.data_ptr(), w.data_ptr()))
        return real(x, w, *rest)

    monkeypatch.setattr(matmul, "sum_products", spy)
    assert torch.equal(ov.matmul(a, b, accumulate=TensorCore()), torch.full((3, 2, 1, 5), 8.0))
    assert seen == {x.data_ptr() for x in (*a, *b)}


def test_what_is_longer_than_k(generator):
    a, b = pair(generator)
    for short, long in ((Chunked("FP16", 200), Chunked("FP16", 2**70)), (TensorCore(), TensorCore(promote=2**70))):
        expected = ov.matmul(a, b, accumulate=short if short != TensorCore() else TensorCore(promote=None))
        assert torch.equal(ov.matmul(a, b, accumulate=long), expected)


@pytest.mark.parametrize("wrong", ["E4M3FN", ov.formats.E4M3FN])
def test_casts_and_operands_are_named(wrong):
    x = torch.ones(2, 2)
    with pytest.raises(OctavoError, match="lhs and rhs are Casts"):
        ov.matmul(x, x, wrong)
    with pytest.raises(OctavoError, match="tensors and QTensors, not ndarray"):
        ov.matmul(x.numpy(), x)


def test_autocast_changes_no_bit(generator, monkeypatch):
    """Neither the sums, which are FP32, nor the gradients; with kernels and by the law."""
    from octavo.ops import build

    a, b = pair(generator)

    def both(fmt, how):
        x = a.clone().requires_grad_()
        y = ov.matmul(x, b, ov.Cast(fmt), ov.Cast(fmt), how)
        y.sum().backward()
        return y.detach(), x.grad

    for library in (build.library, lambda name="native": None):
        monkeypatch.setattr(build, "library", library)
        for how in (FP32, IBM, TensorCore()):
            for fmt in ("FP16", "E4M3FN", "INT8"):
                plain = both(fmt, how)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    within = both(fmt, how)
                assert all(torch.equal(*same) for same in zip(plain, within, strict=True))


def test_shapes_alone(generator):
    x = torch.ones(3, 4, device="meta", requires_grad=True)
    ov.matmul(x, x.mT).sum().backward()
    assert x.grad.shape == (3, 4)
