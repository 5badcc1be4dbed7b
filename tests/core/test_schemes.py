"""Schemes: the named ones, the builders, and what cannot be."""

import pytest
import torch

import octavo as ov
from octavo import Cast, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from octavo.core import formats, schemes


def test_the_named_ones():
    assert set(schemes.NAMES) == {
        *("int8-dynamic", "fp8-dynamic", "int8-weight-only", "fp8-weight-only", "fp8-block", "int8-group64"),
        *("e3m4-int8-group64", "e5m2-dynamic", "e3m4-dynamic", "e2m5-dynamic"),
        *("e5m2-weight-only", "e3m4-weight-only", "e2m5-weight-only"),
        *("int8-static", "int8-affine-static", "fp8-static", "fp8-cscale", "w8a16", "w16a8"),
        *("e5m2-static", "e3m4-static", "e2m5-static", "llm-int8"),
        *("smoothquant-o1", "smoothquant-o2", "smoothquant-o3"),
    }
    assert ov.schemes.INT8_DYNAMIC == Scheme(Cast("INT8", PerChannel(0)), Cast("INT8", PerToken()))
    assert ov.schemes.FP8_DYNAMIC == Scheme(Cast("E4M3FN", PerChannel(0)), Cast("E4M3FN", PerToken()))
    assert ov.schemes.INT8_WEIGHT_ONLY == Scheme(Cast("INT8", PerChannel(0)))
    assert ov.schemes.FP8_BLOCK == Scheme(Cast("E4M3FN", PerBlock(128, 128)), Cast("E4M3FN", PerGroup(128)))
    mixed = schemes.E3M4_INT8_GROUP64
    assert (mixed.weight.format, mixed.input.format) == (formats.INT8, formats.E3M4)
    assert mixed.weight.granularity == mixed.input.granularity == PerGroup(64)
    assert ov.schemes.SMOOTHQUANT_O1 == Scheme(Cast("INT8"), Cast("INT8", PerToken()))
    assert ov.schemes.SMOOTHQUANT_O2 == Scheme(Cast("INT8"), Cast("INT8"))
    assert ov.schemes.SMOOTHQUANT_O3 == Scheme(Cast("INT8"), Cast("INT8", scale=ov.Static()))
    assert schemes.NAMES["e2m5-dynamic"].weight.format is formats.E2M5
    assert schemes.NAMES["e5m2-weight-only"].input is None
    assert len(set(schemes.NAMES.values())) == len(schemes.NAMES)


@pytest.mark.parametrize("name", schemes.NAMES)
def test_get_and_describe(name):
    scheme = schemes.NAMES[name]
    assert schemes.get(name) is schemes.get(name.upper().replace("-", "_")) is schemes.get(f" {name} ") is scheme
    assert schemes.get(scheme) is scheme
    assert schemes.describe(scheme) == name


def test_describe_in_words():
    assert schemes.describe(Scheme(Cast("INT8", PerGroup(32)))) == "INT8/g32 × float"
    words = schemes.describe(Scheme(Cast("E5M2", PerBlock(2, 3)), Cast("UINT8", PerTensor(), affine=True)))
    assert words == "E5M2/2×3 × UINT8/tensor/affine"


@pytest.mark.parametrize(("name", "near"), [("int8-dynamik", "int8-dynamic"), ("fp8", "fp8-"), ("int8", "int8-")])
def test_unknown_names_suggest(name, near):
    with pytest.raises(OctavoError, match=near) as caught:
        schemes.get(name)
    assert repr(name) in str(caught.value)


def test_builders():
    assert schemes.dynamic("int8") == schemes.INT8_DYNAMIC
    assert schemes.dynamic("int8", "e3m4", 64, 64) == schemes.E3M4_INT8_GROUP64
    assert schemes.weight_only("int8", group=32).weight.granularity == PerGroup(32)
    with pytest.raises(OctavoError, match="positive"):
        schemes.dynamic("int8", weight_group=0)
    with pytest.raises(OctavoError, match="no format"):
        schemes.dynamic("int99")


def test_static_schemes():
    scheme = schemes.INT8_AFFINE_STATIC
    assert scheme.static
    assert scheme.input == Cast("UINT8", PerTensor(), ov.Static(), affine=True)
    assert not schemes.FP8_CSCALE.static
    assert schemes.FP8_CSCALE.input.scale == ov.Constant(0.25)
    powers = schemes.static("e3m4", power_of_two=True)
    assert powers.weight.scale == ov.Current(power_of_two=True)
    assert schemes.describe(powers) == "E3M4/power of two × E3M4/tensor/static/power of two"
    with pytest.raises(OctavoError, match="PerToken"):
        Scheme(Cast("INT8"), Cast("INT8", PerToken(), ov.Static()))
    with pytest.raises(OctavoError, match="PerChannel"):
        Scheme(Cast("INT8"), Cast("INT8", PerChannel(1), ov.Static()))
    with pytest.raises(OctavoError, match="calibration"):
        ov.quantize(torch.ones(3), Cast("INT8", scale=ov.Static()))


def test_impossible_schemes():
    with pytest.raises(OctavoError, match="at most 8 bits on one side"):
        Scheme(Cast("FP16"))
    with pytest.raises(OctavoError, match="INT16 and FP16"):
        Scheme(Cast("INT16"), Cast("FP16"))
    with pytest.raises(OctavoError, match="leave a layer alone"):
        Scheme(None)
    with pytest.raises(OctavoError, match="INT8 and TF32"):
        Scheme(Cast("INT8"), Cast("TF32"))
    assert Scheme(Cast("INT8"), Cast("FP16")).input.format is formats.FP16
