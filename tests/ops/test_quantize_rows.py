"""Quantizing rows in one pass against doing it step by step, which is what ``core.cast`` does without it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo as ov
from octavo.core import cast, formats
from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked
from octavo.core.granularity import PerGroup, PerTensor, PerToken
from octavo.core.scaling import Current
from octavo.ops import build, native, reference

FORMATS = ["E4M3FN", "E4M3", "E5M2", "E3M4", "E2M5", "E4M3FNUZ", "E5M2FNUZ", "HFP8_143", "QUALCOMM_E5M2", "E3M2"]
INTEGERS = ["INT8", "UINT8", "INT4"]
OTHERS = [
    formats.float_format(7, 0, specials="none"),
    formats.float_format(5, 2, subnormals=False),
    formats.float_format(4, 3, 20, "none", subnormals=False),
    formats.float_format(6, 0, subnormals=False),
    formats.integer_format(7, signed=False),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BEST = min(native._instruction_set(), 2)


def check(x, how, scale=None, zeros=None):
    """The same bits by every kernel, by the law, and step by step."""

    def run():
        if scale is None:
            return quantize_unchecked(x, how)
        return quantize_scaled(x, how, scale, zeros)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cast, "_quantize_rows", lambda *_: None)
        expected = run()
    results = {}
    for isa in range(BEST + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_instruction_set", lambda isa=isa: isa)
            results[isa] = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "quantize_rows", lambda *_: None)
        results["law"] = run()
    for name, q in results.items():
        assert q.codes.dtype == expected.codes.dtype
        assert torch.equal(q.scale.nan_to_num(-1), expected.scale.nan_to_num(-1)), name
        assert (q.zero_point is None) == (expected.zero_point is None)
        assert q.zero_point is None or torch.equal(q.zero_point, expected.zero_point), name
        wrong = q.codes != expected.codes
        where = x.expand(q.codes.shape)[wrong][:5]
        assert not wrong.any(), f"{name}: {where}: {q.codes[wrong][:5]} for {expected.codes[wrong][:5]}"


def tensor(draw, dtype):
    shape = draw(st.sampled_from([(1, 1), (3, 1), (5, 17), (2, 3, 100), (7,), (33, 64), (1, 257)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["normal", "any bits", "few values", "zeros", "positive", "tiny"]))
    x = torch.randn(shape, generator=generator)
    if kind == "any bits":
        bits = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)
        x = bits.view(torch.float32).nan_to_num(0.0).clamp(-3e38, 3e38)
    if kind == "few values":  # ties
        x = (x * 8).round() / 16
    if kind == "zeros":
        x = -torch.zeros(shape)
    if kind == "positive":
        x = x.abs() + 3
    if kind == "tiny":
        x = x * 1e-39
    x = x.to(dtype)
    if draw(st.booleans()) and x.isinf().any() and kind == "any bits":
        x = x.nan_to_num(0.0, 1.0, -1.0)
    if draw(st.integers(0, 4)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    if draw(st.booleans()) and x.dim() > 1:
        x = x.mT.contiguous().mT  # columns lie together
    return x


@st.composite
def casts(draw):
    fmt = draw(st.sampled_from([*FORMATS, *INTEGERS, *INTEGERS, *OTHERS]))
    affine = isinstance(formats.get(fmt), formats.IntegerFormat) and draw(st.booleans())
    granularity = draw(st.sampled_from([PerToken(), PerGroup(1), PerGroup(7), PerGroup(16), PerGroup(64), PerTensor()]))
    return Cast(fmt, granularity, Current(draw(st.booleans())), affine=affine)


@settings(max_examples=250, deadline=None)
@given(data=st.data(), how=casts(), dtype=st.sampled_from(DTYPES))
def test_own_scales(data, how, dtype):
    check(tensor(data.draw, dtype), how)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), how=casts(), dtype=st.sampled_from(DTYPES), power=st.integers(-40, 10))
def test_given_scales(data, how, dtype, power):
    x = tensor(data.draw, dtype)
    found = quantize_unchecked(torch.randn(x.shape), how)
    zeros = None if found.zero_point is None else found.zero_point
    check(x, how, found.scale * 2.0**power, zeros)


@pytest.mark.parametrize("fmt", [*FORMATS, *INTEGERS, *OTHERS])
def test_every_number_and_tie(fmt):
    fmt = formats.get(fmt)
    numbers = fmt.values()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, numbers * 1.5]).float()
    x = torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))])[None]
    check(x, Cast(fmt), torch.ones(1, 1))
    check(x, Cast(fmt, PerToken()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_rows_and_threads(dtype):
    before = torch.get_num_threads()
    x = torch.randn(50, 3001).to(dtype)
    x[20, 5] = torch.nan
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for how in (
                Cast("INT8", PerToken()),
                Cast("E4M3FN", PerGroup(128)),
                Cast("UINT8", PerToken(), affine=True),
            ):
                check(x[:, ::2], how)
                check(x[::2, 3:], how)
    finally:
        torch.set_num_threads(before)


def test_float16_widens_exactly():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()][:, None]
    check(x, Cast("E5M2", PerToken()))
    check(x.T, Cast("E5M2", PerToken()), torch.full((1, 1), 2.0**-12))


def test_it_serves_what_layers_use(monkeypatch):
    """So that a condition that goes wrong shows as more than lost time."""
    if build.library() is None:
        pytest.skip(build.status())
    monkeypatch.setattr(reference, "quantize_rows", None)
    monkeypatch.setattr(cast, "compute_scale", None)
    for name in ("INT8", "E4M3FN"):
        for granularity in (PerToken(), PerGroup(64)):
            ov.quantize(torch.randn(4, 9, 100), Cast(name, granularity))
        quantize_scaled(torch.randn(4, 9, 100), Cast(name), torch.ones(1))


@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_numbers_beside_ties(scale, seed):
    """Where a quotient by way of the scale's reciprocal could round the other way."""
    generator = torch.Generator().manual_seed(seed)
    ties = (torch.randint(-300, 300, (64, 40), generator=generator) + 0.5) * torch.tensor(scale)
    beside = (ties.view(torch.int32) + torch.randint(-4, 5, ties.shape, generator=generator)).view(torch.float32)
    for how in (Cast(formats.INT8, PerTensor()), Cast(formats.UINT8, PerTensor(), affine=True)):
        zeros = torch.tensor([[100]], dtype=torch.int32) if how.affine else None
        check(beside, how, torch.tensor([[scale]]), zeros)
