"""What engines are asked to run: smoothing wherever they multiply INT8, and one α for all that read one norm."""

import copy

import pytest
import torch

import octavo as ov
from octavo.analysis import engines
from octavo.analysis.choose import choose
from octavo.analysis.compare import quantizable
from octavo.analysis.comparison import Candidate
from octavo.analysis.planting import plant_outliers_
from octavo.core import formats, schemes
from octavo.ptq import pairs
from tests.analysis.planted import Chain, batches
from tests.analysis.test_outliers import tokens
from tests.nn import models

INT8 = schemes.INT8_DYNAMIC


@pytest.mark.parametrize("name", engines.ENGINES)
def test_whatever_is_smoothed_is_also_tried_as_it_is(name):
    engine = engines.get(name)
    assert len({c.name for c in engine.candidates}) == len(engine.candidates)
    plain = [c.scheme for c in engine.candidates if c.smooth is None]
    smoothed = [c for c in engine.candidates if c.smooth is not None]
    assert {c.scheme for c in smoothed} <= set(plain)
    assert all(engine.kernels is None or c.scheme in engine.kernels for c in engine.candidates)
    assert bool(smoothed) == (name != "llama.cpp")
    assert all(isinstance(c.scheme.input.format, formats.IntegerFormat) for c in smoothed)


def test_those_that_no_layer_can_run_are_left_out():
    layers = quantizable(Chain())
    wanted = [Candidate(None), Candidate(schemes.get("int8-group64")), Candidate(INT8, 0.5), Candidate(INT8)]
    assert engines.runnable(engines.get("vllm"), layers, wanted) == wanted[2:]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_planted_outliers_are_smoothed_away(family):
    torch.manual_seed(0)
    model = models.FAMILIES[family]()
    data = [{"input_ids": tokens()}]
    plant_outliers_(model, data[0], channels=2, size=1000.0)
    wanted = [INT8, Candidate(INT8, 0.7), Candidate(INT8, 0.5)]
    choice = choose(model, data, 1e-5, "bytes", candidates=wanted)
    became = {d.layer: d.candidate for d in choice.decisions}
    behind_norms = [pair for pair in pairs.find(model, data[0])[0] if pair.kind == "norm"]
    assert len(behind_norms) >= 4
    for pair in behind_norms:
        assert len({became[name] for name in pair.readers if name in became}) <= 1, pair
        assert all("smooth" in became[name] for name in pair.readers if name in became), pair
    plain = copy.deepcopy(model)
    ov.quantize_(plain, INT8)
    mixed = copy.deepcopy(model)
    ov.quantize_(mixed, choice.rules, data)
    exact = models.logits(model)
    assert ov.sqnr(exact, models.logits(mixed)) > ov.sqnr(exact, models.logits(plain)) + 6


def test_where_no_norm_is_smoothing_is_excluded_with_the_reason():
    found = ov.compare(Chain(), batches(), [INT8, Candidate(INT8, 0.5)], whole=False)
    cells = {cell.layer: cell for cell in found.cells if "smooth" in cell.candidate}
    assert "cannot be smoothed" in cells["layers.0"].excluded
    choice = choose(Chain(), batches(), 1e-2, "bytes", candidates=[INT8, Candidate(INT8, 0.5)])
    assert choice.decisions[0].candidate == "int8-dynamic"
