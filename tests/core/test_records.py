"""Every noun as JSON and back, and JSON that means harm."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import (
    Cast,
    Constant,
    Current,
    OctavoError,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    Static,
    accumulate,
    from_json,
    schemes,
    to_json,
)
from octavo.core import formats, records

NOUNS = [
    *formats.CATALOGUE,
    formats.float_format(4, 3, 7.25, "none", name="learned"),
    formats.float_format(3, 4, 3, "fn", subnormals=False),
    formats.float_format(5, 3, signed=False),
    formats.integer_format(6),
    formats.IntegerFormat("odd", -3, 250),
    *(PerTensor(), PerToken(), PerChannel(0), PerChannel(-2), PerGroup(48), PerBlock(128, 32)),
    *(Current(), Current(power_of_two=True), Static(), Static(power_of_two=True), Constant(), Constant(0.1)),
    Cast("INT8"),
    Cast("UINT8", PerGroup(32), affine=True),
    Cast("E5M2", PerToken(), Constant(0.25), "stochastic"),
    *schemes.NAMES.values(),
    Scheme(Cast(formats.float_format(4, 3, 7.5, "none")), Cast("E5M6", PerToken())),
    *(accumulate.FP32, accumulate.Sequential("BF16", "stochastic"), accumulate.Integer(16, "saturate")),
    *(accumulate.Chunked("FP16_169", 32), accumulate.Chunked("FP16_169", outer="FP16")),
    *(accumulate.TensorCore(), accumulate.TensorCore(16, 20, None)),
]


@pytest.mark.parametrize("noun", NOUNS, ids=str)
def test_round_trip(noun):
    again = from_json(json.loads(json.dumps(to_json(noun), allow_nan=False)))
    assert again == noun
    assert type(again) is type(noun)
    assert hash(again) == hash(noun)


def test_every_record_is_covered():
    assert {type(noun).__name__ for noun in NOUNS} == set(records.RECORDS)


def test_containers_and_plain_values():
    data = {"a": [PerToken(), None, 1, 2.5, True, "x"], "b": {"c": schemes.INT8_DYNAMIC}}
    again = from_json(json.loads(json.dumps(to_json(data))))
    assert again == data
    assert to_json((1, 2)) == [1, 2]
    for value in (object(), {1, 2}, b"bytes", 1j):
        with pytest.raises(OctavoError, match="no JSON form"):
            to_json(value)


def test_catalogue_formats_are_written_as_their_name():
    assert to_json(formats.E4M3FN) == {"type": "Format", "name": "E4M3FN"}
    impostor = formats.float_format(4, 3, 8, "fn", name="E4M3FN")
    assert from_json(to_json(impostor)) == impostor != formats.E4M3FN


@pytest.mark.parametrize(
    "data",
    [
        {"type": "os.system", "command": "true"},
        {"type": "Tensor"},
        {"type": None},
        {"type": ["Cast"]},
        {"type": "Format"},
        {"type": "Format", "name": "E9M9"},
        {"type": "Format", "name": {}},
        {"type": "PerGroup"},
        {"type": "PerGroup", "size": 0},
        {"type": "PerGroup", "size": "4"},
        {"type": "PerGroup", "size": 4.5},
        {"type": "PerGroup", "size": math.nan},
        {"type": "PerGroup", "size": None},
        {"type": "PerGroup", "size": [4]},
        {"type": "PerGroup", "size": 4, "extra": 1},
        {"type": "PerChannel", "axis": "0"},
        {"type": "PerChannel", "axis": 0.5},
        {"type": "PerBlock", "rows": 4},
        {"type": "PerBlock", "rows": 4, "cols": -1},
        {"type": "PerBlock", "rows": math.nan, "cols": 4},
        {"type": "Constant", "value": "1"},
        {"type": "Constant", "value": 0},
        {"type": "Constant", "value": math.inf},
        {"type": "Current", "power_of_two": "no"},
        {"type": "Cast"},
        {"type": "Cast", "format": "E4M3FN", "granularity": "row"},
        {"type": "Cast", "format": "E4M3FN", "granularity": {"type": "Current"}},
        {"type": "Cast", "format": "E4M3FN", "scale": {"type": "PerToken"}},
        {"type": "Cast", "format": "E4M3FN", "scale": 1.0},
        {"type": "Cast", "format": "E4M3FN", "rounding": "sideways"},
        {"type": "Cast", "format": "E4M3FN", "rounding": ["up"]},
        {"type": "Cast", "format": "E4M3FN", "affine": True},
        {"type": "Cast", "format": "INT8", "affine": "false"},
        {"type": "Cast", "format": {"type": "PerToken"}},
        {"type": "Scheme", "weight": "int8"},
        {"type": "Scheme", "weight": None},
        {"type": "Scheme", "weight": {"type": "Cast", "format": "FP16"}},
        {"type": "Scheme", "weight": {"type": "Cast", "format": "INT8"}, "input": "int8"},
        {"type": "FloatFormat", "name": "x", "exponent": 4, "mantissa": 3, "bias": -1e300},
        {"type": "FloatFormat", "name": "x", "exponent": 4, "mantissa": 3, "bias": 10**400},
        {"type": "FloatFormat", "name": "x", "exponent": "4", "mantissa": 3, "bias": 7},
        {"type": "FloatFormat", "name": "x", "exponent": 4.5, "mantissa": 3, "bias": 7},
        {"type": "FloatFormat", "name": "x", "exponent": 10**9, "mantissa": 3, "bias": 7},
        {"type": "FloatFormat", "name": ["x"], "exponent": 4, "mantissa": 3, "bias": 7},
        {"type": "FloatFormat", "name": "x", "exponent": 4, "mantissa": 3, "bias": 7, "specials": {"a": 1}},
        {"type": "IntegerFormat", "name": "x", "low": -1.5, "high": 2},
        {"type": "IntegerFormat", "name": "x", "low": "a", "high": 2},
        {"type": "IntegerFormat", "name": None, "low": -3, "high": 2},
    ],
    ids=str,
)
def test_hostile_records(data):
    with pytest.raises(OctavoError) as caught:
        from_json(data)
    assert len(str(caught.value)) < 2000


def test_a_deep_record():
    deep = data = []
    for _ in range(100_000):
        data.append([])
        data = data[0]
    with pytest.raises(OctavoError, match="deep"):
        from_json(deep)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name", "size"]), inner),
    max_leaves=6,
)


@given(st.sampled_from([*records.RECORDS, "Format"]), st.data())
def test_random_fields(name, data):
    """Whatever a file says, a record comes back whole or an OctavoError is raised."""
    fields = {
        "FloatFormat": ["name", "exponent", "mantissa", "bias", "specials", "subnormals"],
        "IntegerFormat": ["name", "low", "high"],
        "Cast": ["format", "granularity", "scale", "rounding", "affine"],
        "Scheme": ["weight", "input"],
    }.get(name, ["axis", "size", "rows", "cols", "value", "power_of_two", "name"])
    content = data.draw(st.dictionaries(st.sampled_from(fields), JSON))
    try:
        record = from_json({"type": name, **content})
    except OctavoError:
        return
    assert from_json(to_json(record)) == record
    hash(record)
