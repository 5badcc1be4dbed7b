"""Static input scales: what calibration finds is what the layers use, and what is missing is named."""

import copy

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, PerChannel, PerTensor, Rule, Scheme
from octavo.calibration.line_search import LineSearch
from octavo.calibration.minmax import MinMax
from octavo.calibration.percentile import Percentile
from octavo.core import schemes
from octavo.nn.layer import QuantizedLayer
from tests.nn import models


class Branches(nn.Module):
    """A layer that runs only when asked."""

    def __init__(self):
        super().__init__()
        self.always, self.seldom = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, both=False):
        return self.seldom(self.always(x)) if both else self.always(x)


def ids(count=3):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, models.VOCABULARY, (2, 12), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("name", ["int8-static", "int8-affine-static", "fp8-static"])
def test_families(family, name):
    model = models.FAMILIES[family]()
    data = ids()
    if family == "t5":
        data = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in data]
    before = model(**data[0]).logits
    summary = ov.quantize_(model, name, data)
    assert ov.sqnr(before, model(**data[0]).logits) > 15
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert len(layers) == len(summary.quantized) >= 8
    assert all(layer.input_scale.shape == (1,) and layer.input_scale > 0 for layer in layers.values())
    assert all(layer.scheme == name for layer in summary.quantized)


def test_the_scale_is_that_of_the_range_seen():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(5, 16), 3 * torch.randn(2, 7, 16)]
    seen = torch.cat([batch.reshape(-1, 16) for batch in batches])
    inner = model[1](model[0](seen))
    symmetric, affine = copy.deepcopy(model), copy.deepcopy(model)
    ov.quantize_(symmetric, "int8-static", batches)
    assert float(symmetric[0].input_scale) == pytest.approx(float(seen.abs().max()) / 127, rel=1e-6)
    assert float(symmetric[2].input_scale) == pytest.approx(float(inner.max()) / 127, rel=1e-5)
    ov.quantize_(affine, "int8-affine-static", batches)
    assert float(affine[2].input_scale) == pytest.approx(float(inner.max()) / 255, rel=1e-5)
    assert int(affine[2].input_zero_point) == 0
    assert ov.sqnr(model(seen), affine(seen)) > ov.sqnr(model(seen), symmetric(seen))


def test_a_calibration_made_before():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(5, 16) for _ in range(6)]
    at_once = copy.deepcopy(model)
    ov.quantize_(at_once, "fp8-static", batches, observer=Percentile(99.0))
    parts = [ov.calibrate(model, "fp8-static", part, Percentile(99.0)) for part in (batches[:2], batches[2:])]
    parts[0].merge(parts[1])
    ov.quantize_(model, "fp8-static", parts[0])
    assert parts[0].batches == 6
    assert torch.equal(model[2].input_scale, at_once[2].input_scale)
    assert torch.equal(model(batches[0]), at_once(batches[0]))


def test_scales_fit_the_model_dtype():
    model = models.llama().bfloat16()
    ov.quantize_(model, "int8-static", ids())
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            assert torch.equal(module.input_scale, module.input_scale.bfloat16().float())


def test_weights_clipped_by_an_observer():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(512, 32, bias=False))
    nn.init.normal_(whole[0].weight)
    clipped = copy.deepcopy(whole)
    scheme = schemes.weight_only("int8", 64)
    ov.quantize_(whole, scheme)
    ov.quantize_(clipped, scheme, weight_observer=Percentile(97.0))
    assert clipped[0].scale.shape == whole[0].scale.shape == (32, 8)
    assert bool((clipped[0].scale <= whole[0].scale).all())
    assert bool((clipped[0].scale < whole[0].scale).any())


def test_data_is_needed():
    with pytest.raises(OctavoError, match=r"2 layers get static input scales \(0, …\).*pass batches as data"):
        ov.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "int8-static")
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(OctavoError, match="held no batch"):
        ov.quantize_(model, "int8-static", [])
    with pytest.raises(OctavoError, match="not one Tensor; put it into a list"):
        ov.quantize_(model, "int8-static", torch.ones(2, 4))
    assert isinstance(model[0], nn.Linear)
    summary = ov.quantize_(model, "int8-dynamic", [torch.ones(2, 4)])
    assert "the data was not used: no layer has a static input scale" in summary.notes
    with pytest.raises(OctavoError, match="nothing to calibrate"):
        ov.calibrate(nn.Sequential(nn.Linear(4, 4)), "int8-dynamic", [torch.ones(2, 4)])


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (LineSearch(), "1: the fully flexible line search chooses among floats"),
        (MinMax, r"an observer is .*MinMax\(\)"),
        ("mse", "not 'mse'"),
    ],
)
def test_an_observer_that_does_not_suit(observer, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [Rule("fp8-static", "0"), Rule("int8-static", "1")]
    with pytest.raises(OctavoError, match=message):
        ov.quantize_(model, rules, [torch.ones(2, 8)], observer=observer)
    assert not any(isinstance(m, QuantizedLayer) for m in model.modules())


def test_a_calibration_that_does_not_suit_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    calibration = ov.Calibration({"0": MinMax(), "1": MinMax(granularity=PerChannel(-1))})
    calibration.run(model, [torch.ones(2, 8)])
    with pytest.raises(OctavoError, match=r"the input of layer 1: .* has no ranges for PerTensor"):
        ov.quantize_(model, "int8-static", calibration)
    assert not any(isinstance(m, QuantizedLayer) for m in model.modules())


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "Module.compile of a part"])
def test_a_model_that_ran_compiled_before(whole):
    plain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
    model = torch.compile(plain, backend="eager") if whole else plain
    if not whole:
        plain[1].compile(backend="eager")
    x = torch.randn(4, 8)
    with torch.no_grad():
        before = model.eval()(x)
        summary = ov.quantize_(model, "int8-static", [x])
        assert len(summary.quantized) == 2
        assert not model(x).equal(before)
        assert ov.sqnr(before, model(x)) > 25


def test_a_layer_that_saw_no_data():
    data = [torch.randn(3, 8)]
    model = Branches()
    with pytest.raises(OctavoError, match="1 layers saw no calibration data: seldom"):
        ov.quantize_(model, "int8-static", data)
    assert isinstance(model.always, nn.Linear)
    summary = ov.quantize_(model, "int8-static", data, allow_uncalibrated=True)
    assert isinstance(model.seldom, nn.Linear)
    assert [(layer.name, layer.reason) for layer in summary.left] == [("seldom", "saw no calibration data")]
    mixed = Branches()
    ov.quantize_(mixed, [Rule("int8-dynamic", "seldom"), Rule("int8-static")], data)
    assert isinstance(mixed.seldom, QuantizedLayer)
    with pytest.raises(OctavoError, match="no layer saw calibration data"):
        ov.quantize_(nn.Sequential(nn.Linear(8, 8)), "int8-static", [torch.empty(0, 8)], allow_uncalibrated=True)
    watched = ov.calibrate(Branches(), [Rule("int8-static", "always"), Rule(None)], data)
    with pytest.raises(OctavoError, match="did not watch seldom"):
        ov.quantize_(Branches(), "int8-static", watched)


def test_nan_names_layer_and_batch_and_keeps_what_was_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    good = torch.randn(3, 4)
    bad = torch.where(torch.arange(12).view(3, 4) == 5, torch.nan, good)
    with pytest.raises(ov.CalibrationInterrupted, match="batch 1: the input of layer 0: 1 of 12 numbers") as caught:
        ov.quantize_(model, "int8-static", [good, bad])
    assert caught.value.calibration.batches == 1
    ov.quantize_(model, "int8-static", caught.value.calibration)
    assert float(model[0].input_scale) == pytest.approx(float(good.abs().max()) / 127)


def test_constant_and_zero_inputs():
    model = nn.Sequential(nn.Linear(4, 4))
    ov.quantize_(model, "int8-affine-static", [torch.zeros(3, 4)])
    assert bool(model(torch.zeros(3, 4)).isfinite().all())
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    ov.quantize_(model, "fp8-static", [torch.full((3, 4), 2.5)])
    assert torch.equal(model(torch.ones(1, 4)), layer.bias[None])


def test_modes_and_dropout():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 4)).train()
    model[1].eval()
    x = torch.randn(8, 4)
    expected = float(model[0](x).abs().max()) / 127
    ov.quantize_(model, "int8-static", [x])
    assert float(model[2].input_scale) == pytest.approx(expected, rel=1e-5)
    assert [m.training for m in model] == [True, False, True]


def test_an_observer_may_choose_the_format():
    class Chooses(MinMax):
        def settle(self, how):
            return Cast("E3M4", how.granularity, how.scale)

    model = nn.Sequential(nn.Linear(4, 4))
    summary = ov.quantize_(model, "fp8-static", [torch.randn(9, 4)], observer=Chooses())
    assert model[0].scheme.input.format.name == "E3M4"
    assert summary.quantized[0].scheme == "E4M3FN × E3M4/tensor/static"


def test_per_tensor_weights_and_powers_of_two():
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(20, 8)
    scheme = Scheme(Cast("INT8", PerTensor()), Cast("INT8", PerTensor(), ov.Static(power_of_two=True)))
    ov.quantize_(model, scheme, [x])
    assert float(torch.frexp(model[0].input_scale)[0]) == 0.5
    assert model[0].scale.shape == (1, 1)
    with pytest.raises(OctavoError, match="one scale for all of it"):
        Scheme(Cast("INT8", PerChannel(0)), Cast("INT8", ov.PerGroup(32), ov.Static()))
