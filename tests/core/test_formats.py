"""Formats: limits, tables and codes against the literature's numbers, ml_dtypes, gfloat, torch and exact rationals."""

import math

import gfloat
import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo as ov
from octavo import OctavoError
from octavo.core import formats
from octavo.core.formats import FloatFormat, IntegerFormat, float_format, integer_format
from tests.core.oracle import Slow, slow

FLOATS = [f for f in formats.CATALOGUE if isinstance(f, FloatFormat)]
SMALL = [f for f in FLOATS if f.bits <= 8]
INTEGERS = [f for f in formats.CATALOGUE if isinstance(f, IntegerFormat)]
# name: max, smallest normal, smallest number (algorithms.md §1 and the papers named there)
LIMITS = {
    "E4M3FN": (448.0, 2**-6, 2**-9),
    "E4M3": (240.0, 2**-6, 2**-9),
    "E5M2": (57344.0, 2**-14, 2**-16),
    "E3M4": (15.5, 2**-2, 2**-6),
    "E2M5": (3.9375, 2**-1, 2**-6),
    "E4M3FNUZ": (240.0, 2**-7, 2**-10),
    "E5M2FNUZ": (57344.0, 2**-15, 2**-17),
    "QUALCOMM_E3M4": (15.5, 2**-3, 2**-7),
    "QUALCOMM_E4M3": (240.0, 2**-7, 2**-10),
    "QUALCOMM_E5M2": (57344.0, 2**-15, 2**-17),
    "HFP8_143": (30.0, 2**-10, 2**-13),
    "HFP8_152": (57344.0, 2**-14, 2**-16),
    "HFP9_153": (61440.0, 2**-14, 2**-17),
    "FP16_169": (2**32 * (2 - 2**-9), 2**-30, 2**-30),
    "E5M6": (2**15 * (2 - 2**-6), 2**-14, 2**-20),
    "FP16": (65504.0, 2**-14, 2**-24),
    "BF16": (3.3895313892515355e38, 2**-126, 2**-133),
    "TF32": (2**127 * (2 - 2**-10), 2**-126, 2**-136),
    "E3M2": (28.0, 2**-2, 2**-4),
    "E2M3": (7.5, 1.0, 2**-3),
    "E2M1": (6.0, 1.0, 0.5),
    "E8M0": (2.0**127, 2.0**-127, 2.0**-127),
}
INTEGER_LIMITS = {"INT8": (-128, 127, 8), "UINT8": (0, 255, 8), "INT16": (-32768, 32767, 16), "INT4": (-8, 7, 4)}
ML_DTYPES = {
    "E4M3FN": ml_dtypes.float8_e4m3fn,
    "E4M3": ml_dtypes.float8_e4m3,
    "E5M2": ml_dtypes.float8_e5m2,
    "HFP8_152": ml_dtypes.float8_e5m2,
    "E3M4": ml_dtypes.float8_e3m4,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "HFP8_143": ml_dtypes.float8_e4m3b11fnuz,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E8M0": ml_dtypes.float8_e8m0fnu,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
GFLOAT = {
    "E4M3FN": gf.format_info_ocp_e4m3,
    "E5M2": gf.format_info_ocp_e5m2,
    "E3M2": gf.format_info_ocp_e3m2,
    "E2M3": gf.format_info_ocp_e2m3,
    "E2M1": gf.format_info_ocp_e2m1,
    "E8M0": gf.format_info_ocp_e8m0,
    "E4M3FNUZ": gf.format_info_p3109(8, 4, domain=gfloat.Domain.Finite),
    "E5M2FNUZ": gf.format_info_p3109(8, 3, domain=gfloat.Domain.Finite),
    "FP16": gf.format_info_binary16,
    "BF16": gf.format_info_bfloat16,
}
TORCH = {
    "E4M3FN": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
    "E4M3FNUZ": torch.float8_e4m3fnuz,
    "E5M2FNUZ": torch.float8_e5m2fnuz,
}


def same(actual, expected):
    """Equal as numbers, signs of zero included; any NaN equals any other."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    number = ~(np.isnan(actual) & np.isnan(expected))
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual)[number], np.signbit(expected)[number])


def test_the_tables_here_are_complete():
    assert set(LIMITS) == {f.name for f in FLOATS}
    assert set(INTEGER_LIMITS) == {f.name for f in INTEGERS}
    assert len({f.name.lower() for f in formats.CATALOGUE}) == len(formats.CATALOGUE)
    assert all(getattr(formats, f.name) is f for f in formats.CATALOGUE)


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    fmt = formats.get(name)
    top, normal, least = LIMITS[name]
    assert fmt.max == top
    assert fmt.min == (-top if fmt.signed else normal)
    assert fmt.min_normal == normal
    assert fmt.min_subnormal == least
    if fmt.mantissa:
        assert fmt.epsilon == 2.0**-fmt.mantissa
        if 2 <= fmt.max:  # the number after 1 is 1 + epsilon
            after = fmt.values()[fmt.values() > 1][0]
            assert after == 1 + fmt.epsilon or name == "E2M5" or fmt.min_normal > 1


@pytest.mark.parametrize("name", INTEGER_LIMITS)
def test_integer_limits(name):
    fmt = formats.get(name)
    low, high, bits = INTEGER_LIMITS[name]
    assert (fmt.min, fmt.max, fmt.bits, fmt.low, fmt.high) == (low, high, bits, low, high)
    assert fmt.signed == (low < 0)
    assert fmt.values().tolist() == list(range(low, high + 1))
    assert torch.iinfo(fmt.code_dtype).min <= low
    assert high <= torch.iinfo(fmt.code_dtype).max
    assert fmt.min_subnormal == fmt.epsilon == 1.0
    assert not (fmt.has_nan or fmt.has_infinity or fmt.has_negative_zero)


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_table_equals_exact_rationals(fmt):
    if fmt.bits > 16:
        return  # test_wide_tables does these
    same(fmt.table, slow(fmt).table())


@pytest.mark.parametrize("name", ML_DTYPES)
def test_table_equals_ml_dtypes(name):
    fmt, dtype = formats.get(name), np.dtype(ML_DTYPES[name])
    codes = np.arange(2**fmt.bits, dtype=np.uint16 if fmt.bits > 8 else np.uint8)
    with np.errstate(invalid="ignore"):
        same(fmt.table, codes.view(dtype).astype(np.float64))


@pytest.mark.parametrize("name", GFLOAT)
def test_table_equals_gfloat(name):
    fmt, info = formats.get(name), GFLOAT[name]
    assert info.k == fmt.bits
    codes = range(2**fmt.bits) if fmt.bits <= 8 else range(0, 2**fmt.bits, 37)
    same(fmt.table[list(codes)], [gfloat.decode_float(info, code).fval for code in codes])
    assert (fmt.max, fmt.min) == (info.max, info.min)


@pytest.mark.parametrize("name", TORCH)
def test_table_equals_torch(name):
    fmt = formats.get(name)
    same(fmt.table, torch.arange(256, dtype=torch.uint8).view(TORCH[name]).double())


def test_wide_tables():
    every = torch.arange(2**16, dtype=torch.int32)
    same(formats.FP16.table, every.short().view(torch.float16).double())
    same(formats.BF16.table, every.short().view(torch.bfloat16).double())
    tf32 = (np.arange(2**19, dtype=np.uint32) << 13).view(np.float32)
    with np.errstate(invalid="ignore"):
        same(formats.TF32.table, tf32.astype(np.float64))


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_values_are_the_finite_numbers_ascending(fmt):
    values = fmt.values()
    assert values.dtype == torch.float64
    assert bool((values[1:] > values[:-1]).all())
    assert bool(values.isfinite().all())
    assert (values[0].item(), values[-1].item()) == (fmt.min, fmt.max)
    assert values[values > 0][0] == fmt.min_subnormal
    law = slow(fmt) if fmt.bits <= 16 else None
    if law is not None:
        expected = {float(v) for v in law.codes if not isinstance(v, str)}
        assert set(values.tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fmt", [f for f in SMALL if f.signed or f is formats.E8M0], ids=str)
def test_every_code_round_trips(fmt, dtype):
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    numbers = ov.decode(codes, fmt, dtype)
    if dtype == torch.bfloat16:  # every format of at most 8 bits is exact there
        same(numbers.double(), fmt.table)
    back = ov.encode(numbers, fmt, overflow="nonsaturating" if fmt.has_infinity else "saturate")
    assert back.dtype == torch.uint8
    expected = codes.clone()
    missing = fmt.table.isnan()
    if fmt.has_nan:  # payloads become the canonical NaN of their sign
        sign = codes[missing] & (0 if fmt.specials == "fnuz" else fmt.sign_bit)
        expected[missing] = sign | fmt.nan_code
    if dtype == torch.bfloat16:  # torch drops a NaN's sign on the way there
        back, expected = back[~missing], expected[~missing]
    assert back.tolist() == expected.tolist()


@pytest.mark.parametrize("fmt", [f for f in FLOATS if f.bits > 8], ids=str)
def test_wider_codes_round_trip(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.int32)
    numbers = ov.decode(codes, fmt)
    keep = ~numbers.isnan()  # where there are no subnormals their codes mean nothing
    back = ov.encode(numbers[keep], fmt, overflow="nonsaturating" if fmt.has_infinity else "saturate")
    assert back.dtype == torch.int32
    assert torch.equal(back, codes[keep])


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_integer_codes_round_trip(fmt):
    codes = fmt.values().to(fmt.code_dtype)
    assert torch.equal(ov.encode(ov.decode(codes, fmt), fmt), codes)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *[("E4M3FN", 0x7F), ("E5M2", 0x7E), ("E4M3", 0x7C), ("E3M4", 0x78), ("E4M3FNUZ", 0x80), ("HFP8_143", 0x80)],
        *[("E8M0", 0xFF), ("FP16", 0x7E00), ("BF16", 0x7FC0)],
    ],
)
def test_canonical_nan(name, code):
    fmt = formats.get(name)
    assert fmt.nan_code == code
    assert ov.encode(torch.tensor([math.nan]), fmt).item() == code
    negative = torch.tensor([math.nan]).copysign(torch.tensor(-1.0))
    wanted = code if fmt.specials == "fnuz" or not fmt.signed else code | fmt.sign_bit
    assert ov.encode(negative, fmt).item() == wanted


@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(-20, 40),
    st.sampled_from(["ieee", "fn", "fnuz", "none"]),
    st.booleans(),
    st.booleans(),
)
def test_any_format(exponent, mantissa, bias, specials, subnormals, signed):
    no_number = exponent == 1 and mantissa == 0 and specials in ("ieee", "fn")
    no_place_for_nan = specials == "fnuz" and not signed
    if no_number or no_place_for_nan:  # and nothing else may be refused
        with pytest.raises(OctavoError, match=f"E{exponent}M{mantissa}"):
            float_format(exponent, mantissa, bias, specials, subnormals, signed=signed)
        return
    fmt = float_format(exponent, mantissa, bias, specials, subnormals, signed=signed)
    law = Slow(exponent, mantissa, bias, specials, subnormals, signed)
    if len(law.magnitudes) == 1:  # zero and nothing else
        pytest.fail(f"{fmt} has no number but 0")
    assert fmt.max == float(law.max)
    assert fmt.min == (-float(law.max) if signed else 0.0)
    assert fmt.min_subnormal == float(law.magnitudes[1])
    assert fmt.has_infinity == law.has_infinity
    assert fmt.has_nan == (specials in ("fn", "fnuz") or (specials == "ieee" and mantissa > 0))
    same(fmt.table, law.table())
    numbers = ov.decode(torch.arange(2**fmt.bits, dtype=fmt.code_dtype), fmt, torch.float64)
    keep = ~numbers.isnan()
    back = ov.encode(numbers[keep], fmt, overflow="nonsaturating" if fmt.has_infinity else "saturate")
    assert torch.equal(back.long(), torch.arange(2**fmt.bits)[keep])


@given(st.integers(2, 5), st.integers(0, 4), st.floats(-10, 20), st.sampled_from(["ieee", "fn", "none"]))
def test_a_real_bias_stretches_the_integer_one(exponent, mantissa, bias, specials):
    fmt = float_format(exponent, mantissa, bias, specials)
    whole = float_format(exponent, mantissa, math.floor(bias), specials)
    stretch = 2.0 ** -(bias - math.floor(bias))
    same(fmt.table, whole.table.numpy() * stretch)
    assert fmt.max == whole.max * stretch
    # Qualcomm's rule (2208.09225): the largest number of "none" is 2**(2**E − 1 − b)·(2 − 2**−M)
    if specials == "none":
        assert fmt.max == pytest.approx(2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa), rel=1e-12)


@given(st.integers(2, 5), st.integers(1, 4), st.floats(-3, 20), st.sampled_from(["ieee", "fn", "fnuz", "none"]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_of_a_real_bias_round_trip(dtype, exponent, mantissa, bias, specials):
    fmt = float_format(exponent, mantissa, bias, specials)
    codes = torch.arange(2**fmt.bits, dtype=fmt.code_dtype)
    numbers = ov.decode(codes, fmt, dtype)
    keep = ~numbers.isnan()
    back = ov.encode(numbers[keep], fmt, overflow="nonsaturating" if fmt.has_infinity else "saturate")
    assert torch.equal(back, codes[keep])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(exponent=0, mantissa=3), "1 to 8 exponent bits"),
        (dict(exponent=9, mantissa=3), "1 to 8 exponent bits"),
        (dict(exponent=4, mantissa=-1), "mantissa bits"),
        (dict(exponent=4, mantissa=24), "mantissa bits"),
        (dict(exponent=4, mantissa=3, specials="inf"), "ieee, fn, fnuz, none"),
        (dict(exponent=4, mantissa=3, bias=math.inf), "bias"),
        (dict(exponent=4, mantissa=3, bias=math.nan), "bias"),
        (dict(exponent=4, mantissa=3, bias=-1e6), "float32"),
        (dict(exponent=4, mantissa=3, bias=-1e300), "float32"),
        (dict(exponent=4, mantissa=3, bias=1e6), "float32"),
        (dict(exponent=4, mantissa=3, bias=1e300), "float32"),
        (dict(exponent=4, mantissa=3, bias=-114), "float32"),
        (dict(exponent=8, mantissa=7, bias=126), "float32"),
        (dict(exponent=1, mantissa=0, specials="ieee"), "no number"),
        (dict(exponent=4, mantissa=3, specials="fnuz", signed=False), "signed"),
    ],
)
def test_impossible_formats_are_named(arguments, words):
    with pytest.raises(OctavoError, match=words) as caught:
        float_format(**arguments, name="Mine")
    assert "'Mine'" in str(caught.value)


def test_a_bias_of_a_wrong_kind():
    with pytest.raises(OctavoError):
        float_format(4, 3, "seven")


@pytest.mark.parametrize("bits", [1, 24, 0, -3])
def test_impossible_integers(bits):
    with pytest.raises(OctavoError):
        integer_format(bits)


@pytest.mark.parametrize(("low", "high"), [(1, 5), (-5, 0), (0, 2**23), (-(2**23) - 1, 5)])
def test_integers_that_lack_zero_or_room(low, high):
    with pytest.raises(OctavoError, match="'Mine'"):
        IntegerFormat("Mine", low, high)


def test_integers_of_any_width():
    for bits in range(2, 24):
        fmt = integer_format(bits)
        assert (fmt.low, fmt.high, fmt.bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, bits)
        unsigned = integer_format(bits, signed=False)
        assert (unsigned.low, unsigned.high, unsigned.bits) == (0, 2**bits - 1, bits)


def test_get():
    assert formats.get("e4m3fn") is formats.E4M3FN
    assert formats.get("E4M3FN") is formats.E4M3FN
    assert formats.get("Float8-E4M3FN") is formats.E4M3FN
    assert formats.get("torch.float8_e5m2") is formats.E5M2
    assert formats.get(torch.float8_e4m3fnuz) is formats.E4M3FNUZ
    assert formats.get(torch.int8) is formats.INT8
    assert formats.get(torch.uint8) is formats.UINT8
    assert formats.get(torch.float16) is formats.FP16
    assert formats.get(torch.bfloat16) is formats.BF16
    assert formats.get(torch.float8_e8m0fnu) is formats.E8M0
    assert formats.get("qualcomm-e4m3") is formats.QUALCOMM_E4M3
    assert formats.get("fp8") is formats.E4M3FN
    assert formats.get(formats.E2M5) is formats.E2M5
    for alias, name in formats.ALIASES.items():
        assert formats.get(alias).name == name


@pytest.mark.parametrize(("name", "suggestion"), [("e4m3f", "e4m3fn"), ("int9", "int8"), ("bf17", "bf16")])
def test_get_suggests(name, suggestion):
    with pytest.raises(OctavoError, match=suggestion) as caught:
        formats.get(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", "zzzzzz", None, 8, torch.int32])
def test_get_of_the_unknown(name):
    with pytest.raises(OctavoError, match="no format"):
        formats.get(name)


def test_formats_are_values():
    again = float_format(4, 3, 7, "fn", name="E4M3FN")
    assert again == formats.E4M3FN
    assert hash(again) == hash(formats.E4M3FN)
    assert float_format(4, 3, 8, "fn", name="E4M3FN") != formats.E4M3FN
    with pytest.raises(AttributeError):
        formats.E4M3FN.bias = 8
    assert float_format(4, 3).name == "E4M3"
    assert float_format(4, 3, 11, "fnuz").name == "E4M3B11FNUZ"
    assert float_format(4, 3, specials="none").name == "E4M3N"


def test_eight_bit():
    assert {f.name for f in formats.eight_bit()} == {
        *("E4M3FN", "E4M3", "E5M2", "E3M4", "E2M5", "E4M3FNUZ", "E5M2FNUZ", "QUALCOMM_E3M4", "QUALCOMM_E4M3"),
        *("QUALCOMM_E5M2", "HFP8_143", "HFP8_152", "INT8"),
    }


@pytest.mark.parametrize("fmt", formats.CATALOGUE, ids=str)
def test_exact_in_bfloat16_is_true(fmt):
    if not fmt.exact_in_bfloat16:
        assert fmt.bits > 8 or not fmt.signed or isinstance(fmt, IntegerFormat)
        return
    values = fmt.values()
    assert torch.equal(values.bfloat16().double(), values)
    largest = max(values.abs().max().item() ** 2, 1.0)
    smallest = values[values > 0].min().item() ** 2
    assert smallest >= 2.0**-126
    assert largest <= 2.0**127
