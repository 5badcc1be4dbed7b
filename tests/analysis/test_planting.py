"""Planted outliers: the function stays, the activations do not; and dimensions that are taken away for a while."""

import copy

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import OctavoError
from octavo.analysis import ablation, outliers, planting
from tests.analysis.test_outliers import tokens
from tests.nn import models


class Backwards(nn.Module):
    """A linear layer reads the channels of a norm, but others than those in their places."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.norm(x)[:, torch.arange(3, -1, -1)])


@pytest.mark.parametrize("family", ["llama", "tied_llama", "qwen2", "gpt2", "opt"])
def test_not_a_bit_of_the_function_changes(family):
    model = models.FAMILIES[family]()
    batch = {"input_ids": tokens()}
    before = models.logits(model)
    planted = planting.plant_outliers_(model, batch, channels=3, size=60.0)
    assert torch.equal(models.logits(model), before)
    assert len(planted.pairs) >= 2
    found = outliers.find_outliers(model, [batch])
    chosen = set(planted.factors[0])
    large = [x for x in found.of_layers if x.largest > 40]
    assert {x.names[0] for x in large} >= {pair.readers[0] for pair in planted.pairs}
    assert chosen <= {d.index for d in found.systematic}
    assert all(40 < x.largest < 90 for x in large)
    assert "channel" in str(planted)


def test_chosen_channels():
    model = models.llama()
    planted = planting.plant_outliers_(model, {"input_ids": tokens()}, channels=(1, 63), size=1000.0)
    assert all(list(factors) == [1, 63] for factors in planted.factors)
    other = planting.plant_outliers_(models.llama(), {"input_ids": tokens()}, channels=4)
    again = planting.plant_outliers_(models.llama(), {"input_ids": tokens()}, channels=4)
    assert list(other.factors[0]) == list(again.factors[0])


def test_nowhere_to_plant():
    with pytest.raises(OctavoError, match="no norm"):
        planting.plant_outliers_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4))
    with pytest.raises(OctavoError, match="no norm"):
        planting.plant_outliers_(Backwards().eval(), torch.randn(3, 4))
    for channels in (0, [64], [-1], []):
        with pytest.raises(OctavoError, match="channels are from 0 to 63"):
            planting.plant_outliers_(models.llama(), {"input_ids": tokens()}, channels=channels)


def test_what_they_cost_in_eight_bits():
    """INT8 loses the ordinary channels; LLM.int8() and E4M3 do not."""
    model = models.llama(hidden_size=128, intermediate_size=256)
    exact = models.logits(model)
    planting.plant_outliers_(model, {"input_ids": tokens()}, channels=2, size=400.0)
    found = {}
    for scheme in ("int8-dynamic", "llm-int8", "fp8-dynamic"):
        twin = copy.deepcopy(model)
        ov.quantize_(twin, scheme)
        found[scheme] = ov.sqnr(exact, models.logits(twin))
    assert found["llm-int8"] > found["int8-dynamic"] + 10
    assert found["fp8-dynamic"] > found["int8-dynamic"]


def test_dimensions_taken_away():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    x = 10 * torch.randn(5, 6)
    expected = model(x.index_fill(1, torch.tensor([1, 4]), 0.0))
    plain = model(x)
    with ablation.without(model, {"0": [1, 4]}):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), plain)
    clipped = x.clone()
    clipped[:, 2] = clipped[:, 2].clamp(-3, 3)
    with ablation.without(model, {"0": [2], "2": []}, "clip", 3.0):
        assert torch.equal(model(x), model[2](model[1](nn.functional.linear(clipped, model[0].weight, model[0].bias))))
    with pytest.raises(OctavoError, match="does not have the dimensions"), ablation.without(model, {"0": [6]}):
        model(x)
    with pytest.raises(OctavoError, match="no layer nobody"), ablation.without(model, {"nobody": [0]}):
        pass
    with pytest.raises(OctavoError, match="'zero' or 'clip'"), ablation.without(model, {}, "cut"):
        pass
    assert not model[0]._forward_pre_hooks


def test_attention_peak():
    model = models.llama(attn_implementation="eager")
    ids = tokens(3, 8)
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    expected = torch.stack([x[:, :, 1:].amax(-1) for x in maps]).mean()
    assert ablation.attention_peak(model, ids, batch=2) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(OctavoError, match="eager"):
        ablation.attention_peak(models.llama(attn_implementation="sdpa"), ids)
    for windows in (ids[:, :1], ids[:0], ids[0]):
        with pytest.raises(OctavoError, match="two tokens"):
            ablation.attention_peak(model, windows)
