"""Accumulators: what they are, what they do to long sums, and the published numbers."""

import dataclasses
import math

import pytest
import torch

import octavo as ov
from octavo.core import formats
from octavo.core.accumulate import FP32, Chunked, Integer, Sequential, TensorCore, sum_products
from octavo.errors import OctavoError

IBM = formats.FP16_169


@pytest.mark.parametrize(
    "how", [FP32, Sequential(IBM), Chunked(IBM), TensorCore(), Integer(), Chunked("FP16", 8, "stochastic", "FP16")]
)
def test_accumulators_are_records(how):
    assert ov.from_json(ov.to_json(how)) == how
    assert hash(how) == hash(ov.from_json(ov.to_json(how)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        how.bits = 3
    assert Sequential("fp16_169") == Sequential(IBM)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sequential("INT8"), "Integer"),
        (lambda: Sequential("E8M0"), "sign and a zero"),
        (lambda: Sequential(formats.float_format(4, 3, 7.5, "none")), "fractional bias"),
        (lambda: Sequential("FP17"), "no format"),
        (lambda: Sequential(IBM, "nearest"), "rounding is one of"),
        (lambda: Chunked(IBM, 0), "chunk"),
        (lambda: Chunked(IBM, 2.5), "chunk"),
        (lambda: Chunked(IBM, outer="INT8"), "Integer"),
        (lambda: TensorCore(align=0), "align"),
        (lambda: TensorCore(bits=99), "bits"),
        (lambda: TensorCore(promote=0), "promote"),
        (lambda: Integer(1), "bits"),
        (lambda: Integer(33), "bits"),
        (lambda: Integer(overflow="stop"), "wrap"),
    ],
)
def test_what_cannot_be(make, says):
    with pytest.raises(OctavoError, match=says):
        make()


def test_operands_are_checked():
    a = torch.ones(2, 3)
    for bad, says in (
        ((a.double(), a), "float32"),
        ((a[0], a), "M, K"),
        ((a, a[:, :2]), "M, K"),
        ((a / 3, a), None),
    ):
        if says is not None:
            with pytest.raises(OctavoError, match=says):
                sum_products(*bad, FP32)
    for odd in (a / 3, a * math.inf, a * math.nan, a * 2.0**25):
        with pytest.raises(OctavoError, match="integers"):
            sum_products(odd, a, Integer())
    with pytest.raises(OctavoError, match="accumulate is FP32"):
        sum_products(a, a, "fp32")


# ---- the formats of hardware, against torch's own arithmetic ----


@pytest.mark.parametrize(("name", "dtype"), [("FP16", torch.float16), ("BF16", torch.bfloat16)])
def test_sums_in_a_torch_dtype(name, dtype, generator):
    """Values whose products are exact in float32 and whose sums are too: torch's cast then rounds only once."""
    a = torch.randint(-8, 9, (5, 200), generator=generator).float()
    b = torch.randint(-8, 9, (40, 200), generator=generator).float() / 4
    total = torch.zeros(5, 40)
    for k in range(200):
        total = (total + a[:, k, None] * b[:, k]).to(dtype).float()
    assert torch.equal(sum_products(a, b, Sequential(name)), total)


def test_float32_as_an_emulated_format(generator):
    """24 bits, one rounding an addition: what a float32 loop does where products are exact in float32."""
    a, b = torch.randn(3, 300, generator=generator).bfloat16().float(), torch.randn(50, 300, generator=generator)
    b = b.bfloat16().float()
    total = torch.zeros(3, 50)
    for k in range(300):
        total = total + a[:, k, None] * b[:, k]
    single = formats.float_format(8, 23, name="FP32")
    assert torch.equal(sum_products(a, b, Sequential(single)), total)
    assert torch.allclose(sum_products(a, b, FP32), total, atol=1e-4)


def test_chunks(generator):
    a, b = torch.randn(3, 100, generator=generator), torch.randn(40, 100, generator=generator)
    parts = [sum_products(a[:, i : i + 32], b[:, i : i + 32], Sequential("BF16")) for i in range(0, 100, 32)]
    total = torch.zeros(3, 40)
    for part in parts:
        total = (total.double() + part.double()).to(torch.float32)  # of BF16 numbers near one another: exact
    outer = formats.float_format(8, 23, name="FP32")
    assert torch.equal(sum_products(a, b, Chunked("BF16", 32, outer=outer)), total)
    # a chunk larger than K is one chunk, and one chunk of the same format is no chunk at all
    for rounding in ("nearest-even", "toward-zero"):
        plain = sum_products(a, b, Sequential("BF16", rounding))
        assert torch.equal(sum_products(a, b, Chunked("BF16", 1000, rounding)), plain)
        assert torch.equal(sum_products(a, b, Chunked("BF16", 1, rounding)), plain) == (rounding == "")
    narrow = sum_products(a, b, Chunked("BF16", 1000, outer="E5M2"))
    assert torch.equal(narrow, ov.cast(sum_products(a, b, Sequential("BF16")), "E5M2", overflow="nonsaturating"))


def test_a_generator_is_a_seed():
    a = torch.rand(4, 50)
    how = Sequential("E4M3FN", "stochastic")
    one, two, three = (sum_products(a, a, how, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    torch.manual_seed(3)
    first = sum_products(a, a, how)
    second = sum_products(a, a, how)
    torch.manual_seed(3)
    assert torch.equal(first, sum_products(a, a, how))
    assert not torch.equal(first, second)


# ---- published: targets, section 4: swamping and chunks ----


def sums(length, how, trials=48):
    """Mean of (sum ÷ exact) for the sum of U(1 − √3, 1 + √3), which has mean 1 and standard deviation 1."""
    generator = torch.Generator().manual_seed(length)
    x = 1 + (2 * torch.rand(trials, length, generator=generator) - 1) * math.sqrt(3)
    return (sum_products(x, torch.ones(1, length), how, generator).double()[:, 0] / x.double().sum(1)).squeeze()


@pytest.mark.parametrize(
    ("chunk", "length", "ratio", "tolerance"),
    [
        (None, 2048, 1.0, 0.01),
        (None, 4096, 0.920, 0.01),
        (None, 8192, 0.499, 0.01),
        (None, 16384, 0.250, 0.01),
        (None, 65536, 0.0625, 0.002),
        (8, 8192, 0.998, 0.005),
        (8, 65536, 0.255, 0.01),
        (16, 65536, 0.50, 0.01),
        (32, 65536, 0.993, 0.005),
        (64, 65536, 1.000, 0.002),
    ],
)
def test_swamping(chunk, length, ratio, tolerance):
    how = Sequential(IBM) if chunk is None else Chunked(IBM, chunk)
    assert float(sums(length, how).mean()) == pytest.approx(ratio, abs=tolerance)


def test_stochastic_rounding_does_not_swamp():
    ratio = sums(65536, Sequential(IBM, "stochastic"), trials=256)
    assert float(ratio.std()) == pytest.approx(0.027, rel=0.15)
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * 0.027 / 16)


# ---- published: targets, section 8: Hopper ----


def test_hopper():
    """U[0, 1) cast to E4M3FN, K = 4096: 7.5 % mean relative error, 0.055 % with promotion every 128."""
    generator = torch.Generator().manual_seed(0)
    cast = ov.Cast("E4M3FN")
    a, b = (ov.quantize(torch.rand(48, 4096, generator=generator), cast).numbers() for _ in range(2))
    exact = a.double() @ b.double().mT

    def error(how):
        return float(((sum_products(a, b, how).double() - exact).abs() / exact).mean())

    assert error(TensorCore(promote=None)) == pytest.approx(0.075, rel=0.02)
    assert error(TensorCore()) == pytest.approx(0.00055, rel=0.02)
    assert error(TensorCore(bits=32)) < 1e-6


def test_integers_overflow():
    a, b = torch.full((1, 3), 100.0), torch.tensor([[100.0, 100.0, -100.0]])
    assert float(sum_products(a, b, Integer(16))) == 10000
    assert float(sum_products(a, b, Integer(15))) == 10000  # 20000 wraps to −12768, and comes back
    assert float(sum_products(a[:, :2], b[:, :2], Integer(15))) == 20000 - 32768
    assert float(sum_products(a, b, Integer(15, "saturate"))) == 16383 - 10000
    assert float(sum_products(a, b.flip(1), Integer(15, "saturate"))) == 10000  # the order matters
