"""``rounding="gptq"`` in rules: nearer to the float model, ordinary layers, and refusals before anything changes."""

import copy

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, PerChannel, PerGroup, PerTensor, Rule, Scheme
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.bias_correction import correct_biases_
from octavo.ptq.gptq import Moments, Rounder
from tests.nn import models

COARSE = Scheme(Cast("int4", PerChannel(0)))
COARSE_BOTH = Scheme(Cast("int8", PerGroup(16)), Cast("int4", ov.PerToken()))


def batches(model, count=4, length=12, rows=16):
    made = []
    for seed in range(count):
        ids = torch.randint(3, models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
        made.append({"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})})
    return made


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untouched(model, before):
    after = model.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    return same and not any("forward" in vars(m) for m in model.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def error(exact, model, data):
    return sum(float((exact(**b).logits - model(**b).logits).square().sum()) for b in data)


@pytest.mark.parametrize("scheme", [COARSE, COARSE_BOTH], ids=["weights", "both"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family, scheme):
    torch.manual_seed(0)
    exact = models.FAMILIES[family]()
    nearest, rounded = copy.deepcopy(exact), copy.deepcopy(exact)
    data = batches(exact)
    ov.quantize_(nearest, [Rule(scheme)])
    summary = ov.quantize_(rounded, [Rule(scheme, rounding="gptq")], (batch for batch in data))
    assert error(exact, rounded, data) < error(exact, nearest, data)
    done = [x for x in summary.layers if x.rounding == "gptq"]
    assert done and {x.name for x in done} == {x.name for x in summary.quantized}
    assert "rounded by GPTQ" in str(summary)
    layers = {n: m for n, m in nearest.named_modules() if isinstance(m, QuantizedLayer)}
    for name, layer in layers.items():
        other = rounded.get_submodule(name)
        assert type(other) is type(layer) and other.scheme == layer.scheme
        assert other.codes.dtype == layer.codes.dtype and other.scale.shape == layer.scale.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = models.gpt2().to(dtype)
    summary = ov.quantize_(model, [Rule(ov.schemes.INT8_DYNAMIC, rounding="gptq")], batches(model))
    assert all(x.rounding == "gptq" and x.sqnr > 25 for x in summary.quantized)
    assert models.logits(model).dtype == dtype and models.logits(model).isfinite().all()


def test_the_layers_behind_see_the_rounded_ones():
    """Two layers in a row: the second is rounded by the 8-bit results of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    exact, data = copy.deepcopy(model), [torch.randn(40, 16), torch.randn(3, 16)]
    ov.quantize_(model, [Rule(COARSE, rounding="gptq")], data)
    halves = (Moments(24), Moments(24))
    with torch.no_grad():
        for x, half in zip(data, halves, strict=True):
            half.update(model[1](model[0](x)), exact[1](exact[0](x)))
    inverse = Rounder(halves)
    target = inverse.target(exact[2].weight.detach())
    expected = inverse.round(target, ov.quantize(target, COARSE.weight), COARSE.weight)
    assert torch.equal(model[2].codes, expected.codes) and torch.equal(model[2].scale, expected.scale)


def test_with_static_scales_observers_and_stacks():
    model = models.llama()
    stacked = Scheme(Cast("int8", PerTensor()), Cast("uint8", PerTensor(), ov.Static(), affine=True))
    rules = [
        Rule(stacked, "*_proj", rounding="gptq"),
        Rule("fp8-dynamic", "lm_head"),
    ]
    summary = ov.quantize_(model, rules, iter(batches(model)), weight_observer=ov.calibration.MSE())
    assert {x.rounding for x in summary.quantized if x.name != "lm_head"} == {"gptq"}
    assert model.lm_head.scheme == ov.schemes.FP8_DYNAMIC
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.scale, attention.k_proj.scale)
    assert models.logits(model).isfinite().all()


def test_llm_int8():
    model = models.opt()
    exact = copy.deepcopy(model)
    ov.quantize_(
        model,
        [Rule(Scheme(Cast("int4", PerChannel(0)), Cast("int8", ov.PerToken()), 2.0), rounding="gptq")],
        batches(model),
    )
    assert ov.sqnr(models.logits(exact), models.logits(model)) > 10


def test_bias_correction_goes_on_top():
    torch.manual_seed(0)
    exact = models.opt()
    model, data = copy.deepcopy(exact), batches(exact)
    ov.quantize_(model, [Rule(COARSE, rounding="gptq")], data)
    before = error(exact, model, data)
    shifts = correct_biases_(model, exact, data)
    assert shifts and error(exact, model, data) < 1.05 * before


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(4, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.conv(x).mean(-1))


def test_what_is_no_linear_layer_is_named():
    model, data = Convolving().eval(), [torch.randn(30, 4, 9)]
    before = state(model)
    with pytest.raises(OctavoError, match=r"conv cannot be rounded by GPTQ: it is no linear layer \(Conv1d\)"):
        ov.quantize_(model, [Rule("int8-dynamic", "conv", rounding="gptq"), Rule("int8-dynamic")], data)
    assert untouched(model, before)
    summary = ov.quantize_(model, [Rule("int8-dynamic", rounding="gptq")], data)
    assert {x.name: x.rounding for x in summary.quantized} == {"conv": "nearest", "out": "gptq"}
    assert any(note.startswith("conv is rounded to the nearest") for note in summary.notes)


class Experts(nn.Module):
    """The second layer sees two rows, the third none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.layers[0](x)
        few = x[:, 0] > 1e3
        if few.any():
            y[few] = self.layers[1](x[few])
        return self.layers[2](y) if len(x) == 0 else y


def test_layers_that_see_little_or_nothing():
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(50, 6)
    x[7:9, 0] = 2e3
    before = state(model)
    with pytest.raises(OctavoError, match=r"1 layers that GPTQ is to round saw no data: layers\.2"):
        ov.quantize_(model, [Rule(COARSE, rounding="gptq")], [x])
    assert untouched(model, before)
    summary = ov.quantize_(model, [Rule(COARSE, rounding="gptq")], [x], allow_uncalibrated=True)
    assert [y.rounding for y in summary.layers] == ["gptq", "gptq", "nearest"]
    assert any("layers.2: saw no data" in note for note in summary.notes)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.again, self.once = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.once(self.again(self.again(x)))


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (Twice, [torch.randn(5, 6)], "one batch calls layer again several times"),
        (Experts, [], "no batch"),
        (Experts, None, "there is none"),
        (Experts, [torch.full((3, 6), float("nan"))], r"the input of layer layers\.0 holds NaN or Inf"),
        (Experts, [torch.randn(3, 6), "text"], "rounding, batch 1: a batch is a tensor"),
        (
            Experts,
            [torch.randn(3, 6), torch.randn(3, 5)],
            r"layer layers\.0 takes floats \[…, 6\], and was called with",
        ),
    ],
)
def test_bad_data_changes_nothing(make, data, words):
    model = make().eval()
    before = state(model)
    with pytest.raises(OctavoError, match=words):
        ov.quantize_(model, [Rule("int8-dynamic", rounding="gptq")], data)
    assert untouched(model, before)


class Tailed(nn.Module):
    """Long work behind the last layer; a second call of it, if asked for."""

    def __init__(self, again):
        super().__init__()
        self.first, self.last, self.tail = nn.Linear(6, 6), nn.Linear(6, 6), nn.Hardtanh()
        self.again, self.calls = again, 0

    def forward(self, x):
        y = self.tail(self.last(self.first(x)))
        self.calls += 1
        return self.last(y) if self.again else y


def test_behind_the_last_layer_one_run_goes_on():
    torch.manual_seed(0)
    data = [torch.randn(20, 6) for _ in range(3)]
    model = Tailed(again=False).eval()
    exact = copy.deepcopy(model)
    ov.quantize_(model, [Rule(COARSE_BOTH, rounding="gptq")], data)
    assert model.calls == 1
    with torch.no_grad():
        assert all(ov.sqnr(exact(x), model(x)) > 10 for x in data)
    with pytest.raises(OctavoError, match="one batch calls layer last several times"):
        ov.quantize_(Tailed(again=True).eval(), [Rule(COARSE_BOTH, rounding="gptq")], data)


def test_shared_weights_are_named():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    model[1].weight = model[0].weight
    with pytest.raises(OctavoError, match=r"0 cannot be rounded by GPTQ: it shares its weight"):
        ov.quantize_(model, [Rule("int8-dynamic", "[01]", rounding="gptq")], [torch.randn(3, 6)])
    summary = ov.quantize_(model, [Rule("int8-dynamic", rounding="gptq")], [torch.randn(3, 6)])
    assert [x.rounding for x in summary.layers] == ["nearest", "nearest", "gptq"]
    assert model[0].codes is model[1].codes or torch.equal(model[0].codes, model[1].codes)


def test_a_finished_calibration_is_not_enough():
    model = models.llama()
    calibration = ov.calibrate(model, "int8-static", batches(model))
    with pytest.raises(OctavoError, match="a finished Calibration has kept none"):
        ov.quantize_(model, [Rule("int8-static", rounding="gptq")], calibration)


def test_progress_names_every_layer():
    seen = []

    def track(items, what):
        for item in items:
            seen.append((what, item))
            yield item

    model = models.opt()
    summary = ov.quantize_(model, [Rule("int8-dynamic", rounding="gptq")], batches(model), track=track)
    assert [name for what, name in seen if what == "rounding"] == [x.name for x in summary.quantized]
