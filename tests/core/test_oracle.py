"""The oracle itself: the fast one equals the slow one, and both equal gfloat."""

import math

import gfloat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.oracle import DIRECTED, MODES, Slow, probes

FORMATS = {
    "fn": (4, 3, 7, "fn"),
    "ieee": (5, 2, 15, "ieee"),
    "fnuz": (4, 3, 8, "fnuz"),
    "none": (2, 5, 2, "none"),
    "E3M0": (3, 0, 3, "none"),
    "E4M0": (4, 0, 7, "ieee"),
    "E1M2": (1, 2, 0, "fn"),
}


def alike(a, b):
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("name", FORMATS)
def test_three_oracles_agree(name, rounding):
    law = Slow(*FORMATS[name])
    info = law.gfloat()
    x = np.random.default_rng(1).permutation(probes(law, 200))[:700]
    for saturate in (True, False):
        if not saturate and not (law.has_infinity or law.has_nan):
            continue
        fast = law.round_array(x, rounding, saturate)
        for value, quick in zip(x, fast, strict=True):
            exact = law.round(float(value), rounding, saturate)
            assert alike(exact, float(quick)), (value, exact, quick)
            if value == np.float32(value):  # gfloat adds 0.5 to the fraction in float64, which can itself round up
                theirs = gfloat.round_float(info, float(value), MODES[rounding], saturate)
                assert alike(exact, theirs), (value, exact, theirs)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(-3, 18), st.sampled_from(["ieee", "fn", "fnuz", "none"]))
def test_tables_equal_gfloat(exponent, mantissa, bias, specials):
    if exponent == 1 and specials == "ieee":
        return  # no normal numbers; gfloat has no word for that
    law = Slow(exponent, mantissa, bias, specials)
    info = law.gfloat()
    for code, value in enumerate(law.table()):
        assert alike(float(value), gfloat.decode_float(info, code).fval)
