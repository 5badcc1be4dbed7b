"""Every cell against the model really quantized in that one layer; what cannot be compared says why."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import octavo as ov
from octavo.analysis import variants
from octavo.analysis.compare import compare
from octavo.analysis.comparison import Candidate, Comparison
from octavo.errors import OctavoError
from tests.analysis.planted import Chain, batches
from tests.nn import models


def tokens(count=2):
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(3, models.VOCABULARY, (2, 9))} for _ in range(count)]


def written_out(before, after, data):
    """The mean KL divergence and loss increase, in float64 and in plain torch."""
    divergence = increase = count = 0
    for batch in data:
        p, q = (F.log_softmax(m(**batch).logits[:, :-1].double(), -1).flatten(0, 1) for m in (before, after))
        target = batch["input_ids"][:, 1:].flatten()
        divergence += float(F.kl_div(q, p, reduction="sum", log_target=True))
        increase += float(F.nll_loss(q, target, reduction="sum") - F.nll_loss(p, target, reduction="sum"))
        count += len(target)
    return divergence / count, increase / count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_cell_is_what_the_model_really_loses(name):
    model, data = models.FAMILIES[name](), tokens()
    for parameter in model.parameters():  # far from uniform, so that there is something to lose
        parameter.mul_(4)
    found = compare(model, data, ["int8-dynamic", "fp8-dynamic"], whole=False)
    assert Comparison.from_json(json.loads(json.dumps(found.to_json()))) == found
    for layer in found.layers[::5]:
        for scheme in ("int8-dynamic", "fp8-dynamic"):
            twin = copy.deepcopy(model)
            summary = ov.quantize_(twin, {layer.name: scheme})
            divergence, increase = written_out(model, twin, data)
            cell = found.cell(layer.name, scheme)
            assert cell.divergence == pytest.approx(divergence, rel=1e-3, abs=2e-7)
            assert cell.loss == pytest.approx(increase, rel=1e-3, abs=2e-6)
            assert cell.weight_sqnr == pytest.approx(summary.quantized[0].sqnr)
            assert cell.bytes == summary.quantized[0].bytes_after
            assert cell.seconds > 0 and layer.seconds > 0
            assert 5 < cell.output_sqnr < 60


@torch.no_grad()
def test_a_smoothed_cell_is_one_layer_of_a_smoothed_model():
    model, data = models.llama(), tokens()
    for parameter in model.parameters():
        parameter.mul_(4)
    for block in model.model.layers:
        block.input_layernorm.weight[::7] *= 30
    candidate = Candidate(ov.schemes.INT8_DYNAMIC, smooth=0.7)
    found = compare(model, data, [candidate], whole=False)
    smooth = copy.deepcopy(model)
    ov.smooth_(smooth, data, 0.7)
    tried = 0
    for layer in found.layers:
        cell = found.cell(layer.name, candidate)
        if cell.excluded:
            assert "o_proj" in layer.name and "cannot be smoothed" in cell.excluded
            continue
        twin = copy.deepcopy(smooth)
        ov.quantize_(twin, {layer.name: "int8-dynamic"})
        divergence, increase = written_out(model, twin, data)
        assert cell.divergence == pytest.approx(divergence, rel=2e-3, abs=2e-7)
        assert cell.loss == pytest.approx(increase, rel=2e-3, abs=2e-6)
        tried += 1
    assert tried == 12


@torch.no_grad()
def test_a_whole_model_is_what_it_really_loses():
    model, data = models.llama(), tokens()
    found = compare(model, data, ["fp8-dynamic", "int8-static"])
    before, _, static = found.outcomes
    assert (before.loss, before.perplexity) == (found.loss, found.perplexity)
    twin = copy.deepcopy(model)
    ov.quantize_(twin, "int8-static", data)
    divergence, increase = written_out(model, twin, data)
    assert static.loss - found.loss == pytest.approx(increase, rel=1e-2, abs=2e-6)
    assert static.divergence == pytest.approx(divergence, rel=1e-2, abs=2e-7)
    assert static.bytes < before.bytes and static.seconds > 0
    windows = torch.cat([batch["input_ids"] for batch in data])
    assert found.perplexity == pytest.approx(ov.perplexity(model, windows).value, rel=1e-5)


def test_the_model_is_as_before():
    model = models.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    model.train()
    compare(model, tokens(1), ["int8-dynamic", Candidate(ov.schemes.INT8_DYNAMIC, rounding="gptq")], whole=False)
    assert model.training
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_of_one_size_are_timed_once():
    found = compare(Chain(), batches(), ["int8-dynamic"], whole=False)
    assert len({layer.seconds for layer in found.layers}) == 1
    assert {(layer.calls, layer.rows, layer.shape) for layer in found.layers} == {(2, 16, (64, 64))}


def test_a_spread_says_how_well_the_fastest_is_repeated():
    assert variants._timing([3.0, 1.0, 2.0, 1.1, 90.0]) == variants.Timing(1.0, 1.0)
    assert variants._timing([1.0, 1.0, 80.0, 90.0]) == variants.Timing(1.0, 0.0)


def test_neither_smoothing_nor_rounding_takes_time():
    ways = [Candidate(ov.schemes.INT8_DYNAMIC, 0.5), Candidate(ov.schemes.INT8_DYNAMIC, rounding="gptq")]
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    found = compare(model, [torch.randn(4, 64)], ["int8-dynamic", *ways], whole=False)
    assert len({found.cell("1", way).seconds for way in (found.candidates[1], *ways)}) == 1


def test_the_sensitive_layer_shows():
    found = compare(Chain(large=[3]), batches(), ["int8-dynamic", "int8-group64"], whole=False)
    costs = {layer.name: found.cell(layer.name, "int8-dynamic").cost for layer in found.layers}
    assert costs.pop("layers.3") > 100 * max(costs.values())


def test_noise_is_that_of_the_output():
    model, data = Chain().eval(), batches(1)
    found = compare(model, data, ["fp8-dynamic"], whole=False)
    twin = copy.deepcopy(model)
    ov.quantize_(twin, {"layers.1": "fp8-dynamic"})
    with torch.no_grad():
        expected = (twin(data[0]) - model(data[0])).square().sum() / model(data[0]).square().sum()
    cell = found.cell("layers.1", "fp8-dynamic")
    assert cell.divergence == pytest.approx(float(expected), rel=1e-4)
    assert cell.loss is None and found.loss is None and "noise" in found.divergence


def test_a_loss_of_ones_own():
    data = [(x, torch.zeros(16, 64)) for x in batches()]
    found = compare(Chain(), data, ["fp8-dynamic"], loss=lambda out, batch: F.mse_loss(out, batch[1]))
    assert found.loss == pytest.approx(sum(float(F.mse_loss(Chain()(x), y)) for x, y in data) / 2)
    assert found.cell("layers.0", "fp8-dynamic").divergence is None
    assert math.isfinite(found.outcomes[1].loss)
    with pytest.raises(OctavoError, match="one number"):
        compare(Chain(), data, ["fp8-dynamic"], loss=lambda out, batch: out)
    with pytest.raises(OctavoError, match="as it is is nan"):
        compare(Chain(), data, ["fp8-dynamic"], loss=lambda out, batch: math.nan)


class Shared(nn.Module):
    """One layer twice, one that no data reaches, one whose weight is NaN, and one of a size that groups do not fit."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.odd = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        self.again = self.twice

    def forward(self, x):
        return self.odd(self.again(self.twice(x).tanh()))


def test_shared_layers_are_one_row_and_unreached_ones_say_so():
    found = compare(Shared(), [torch.randn(4, 20)], ["int8-dynamic"])
    assert [(layer.names, layer.calls) for layer in found.layers] == [
        (("twice", "again"), 2),
        (("never",), 0),
        (("odd",), 1),
    ]
    assert found.cell("never", "int8-dynamic").excluded == "no data reached it"


def test_what_becomes_nan_is_excluded_with_the_reason():
    model = Chain(depth=3)

    class Brittle(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = model
            self.exact = copy.deepcopy(model.layers[0]).requires_grad_(False)

        def forward(self, x):
            same = torch.allclose(self.chain.layers[0](x), F.linear(x, self.exact.weight, self.exact.bias), atol=1e-5)
            return self.chain(x) * (1.0 if same else math.nan)

    found = compare(Brittle(), batches(1), ["int8-dynamic"])
    cell = found.cell("chain.layers.0", "int8-dynamic")
    assert cell.excluded == "its results are NaN or Inf under this scheme" and cell.cost == math.inf
    assert found.cell("chain.layers.1", "int8-dynamic").excluded is None
    assert found.outcomes[1].excluded == "its results are NaN or Inf"


def test_damaged_weights_and_sizes_that_do_not_fit_are_excluded():
    model = Chain(depth=3)
    with torch.no_grad():
        model.layers[1].weight[:, 0] = 0
    narrow = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 2))
    smooth = Candidate(ov.schemes.INT8_DYNAMIC, smooth=0.5)
    found = compare(narrow, [torch.randn(4, 7)], ["int8-group64", smooth], whole=False)
    assert "smooth" in found.cell("0", smooth.name).excluded
    with torch.no_grad():
        model.layers[1].weight[0, 0] = math.nan
    with pytest.raises(OctavoError, match="NaN"):
        compare(model, batches(1), ["int8-dynamic"])


def test_what_cannot_be_compared_says_what_to_do():
    with pytest.raises(OctavoError, match="no data"):
        compare(Chain(), [], ["int8-dynamic"])
    with pytest.raises(OctavoError, match="put it into a list"):
        compare(Chain(), torch.randn(2, 64), ["int8-dynamic"])
    with pytest.raises(OctavoError, match=r"layers\.0\.weight is on meta"):
        compare(Chain().to("meta"), batches())
    with pytest.raises(OctavoError, match="no layer can be quantized"):
        compare(nn.Sequential(nn.LayerNorm(4)), [torch.randn(2, 4)])
    with pytest.raises(OctavoError, match="no scheme"):
        compare(Chain(), batches(), [Candidate(None)])
    with pytest.raises(OctavoError, match="not a comparison"):
        Comparison.from_json({"octavo": "choice"})
    with pytest.raises(OctavoError, match="damaged"):
        Comparison.from_json({"octavo": "comparison", "layers": 3})
