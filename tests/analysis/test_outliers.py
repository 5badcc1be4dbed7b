"""Outlier dimensions, massive activations and tails: counted again by hand, in one batch or many."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import octavo as ov
from octavo import OctavoError
from octavo.analysis import outliers
from octavo.calibration.batches import enter
from tests.nn import models


def tokens(count=4, length=12, seed=0):
    return torch.randint(3, models.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def seen_by(model, name, batches):
    """All vectors that enter a layer, by a hook of our own."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            enter(model, batch)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in found]).double().numpy()


@pytest.fixture
def model():
    model = models.llama()
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[5] = 40.0
    model.model.layers[1].input_layernorm.weight.data[9] = 10.0
    return model


def test_against_numpy(model):
    batches = [{"input_ids": part} for part in tokens(6).split(4)]
    found = outliers.find_outliers(model, batches, threshold=3.0)
    assert found.width == 64
    assert found.blocks == 3  # two layers and the head
    assert len(found.inputs) == 2 * 6 + 2
    for one in found.of_layers:
        x = seen_by(model, one.names[0], batches)
        assert (one.tokens, one.width) == x.shape
        assert one.largest == pytest.approx(np.abs(x).max(), rel=1e-6)
        assert one.rms == pytest.approx(math.sqrt((x**2).mean()), rel=1e-6)
        d = x - x.mean()
        assert one.kurtosis == pytest.approx((d**4).mean() / (d**2).mean() ** 2, rel=1e-6)
        assert one.crest == pytest.approx(np.abs(x).max() / math.sqrt((x**2).mean()), rel=1e-6)
        crests = np.abs(x).max(1) / np.sqrt((x**2).mean(1))
        assert one.token_crest == pytest.approx(crests.mean(), rel=1e-6)
        assert one.dimensions == (np.abs(x) > 3).any(0).sum()
        assert one.affected == pytest.approx((np.abs(x) > 3).any(1).mean())
    first = found.of_layers[0]
    assert first.names == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def test_the_papers_criterion(model):
    """Dimension 5 is large everywhere; 9 in one layer of three; in the head's input neither is."""
    batches = [{"input_ids": tokens(6)}]
    found = outliers.find_outliers(model, batches, threshold=8.0, layer_share=0.5)
    assert [d.index for d in found.systematic] == [5]
    top = found.systematic[0]
    assert top.layers == 2
    inputs = [seen_by(model, x.names[0], batches)[:, 5] for x in found.of_layers if x.width == 64]
    shares = [float((np.abs(x) > 8).mean()) for x in inputs]
    assert top.tokens == pytest.approx(np.mean([share for share in shares if share]))
    assert top.largest == pytest.approx(max(np.abs(x).max() for x in inputs), rel=1e-6)
    assert 9 in [d.index for d in found.dimensions]
    assert {d.index for d in outliers.find_outliers(model, batches, threshold=8.0).systematic} >= {5, 9}
    assert outliers.find_outliers(model, batches, threshold=1e6).dimensions == ()
    assert outliers.find_outliers(model, batches, threshold=8.0, token_share=1.01).systematic == ()


def test_massive_activations():
    """One token's embedding is huge in one dimension: it goes along the residual stream, and its place is told."""
    model = models.llama(rms_norm_eps=1e-6)
    model.model.embed_tokens.weight.data[7, 33] = -5000.0
    ids = tokens(2).where(tokens(2) != 7, 8)
    ids[:, 0], ids[0, 3] = 7, 7
    found = outliers.find_outliers(model, [{"input_ids": ids}])
    top = found.massive[0]
    assert (top.position, top.dimension) == (0, 33)
    assert -5001 < top.value < -4999
    assert top.ratio > 1000
    assert {(m.position, m.dimension) for m in found.massive} == {(0, 33), (3, 33)}
    assert found.positions[0] == 2 * found.positions[3]
    assert "layernorm" in top.name


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**31))
def test_batches_make_no_difference(sizes, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(sum(sizes), 7).exp() + 3
    whole, parts = outliers.find_outliers(model, [x]), outliers.find_outliers(model, x.split(sizes))
    assert whole.dimensions == parts.dimensions
    for one, other in zip(whole.inputs, parts.inputs, strict=True):
        for name in ("tokens", "largest", "rms", "kurtosis", "crest", "token_crest", "dimensions", "affected"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "mixtral"])
def test_families(family):
    model = models.FAMILIES[family]()
    batch = {"input_ids": tokens()}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens()
    found = outliers.find_outliers(model, [batch])
    assert found.width == 64
    assert {x.kind for x in found.inputs} == {"layers", "norm"}
    assert json.loads(json.dumps(found.to_json()))["inputs"][0]["tokens"] > 0


def test_a_model_in_eight_bits(model):
    batch = {"input_ids": tokens()}
    found = outliers.find_outliers(model, [batch])
    ov.quantize_(model, "int8-dynamic")
    assert [x.names for x in outliers.find_outliers(model, [batch]).inputs] == [x.names for x in found.inputs]


def test_a_convnet():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    found = outliers.find_outliers(model, [torch.randn(5, 3, 8, 8)])
    assert [(x.kind, x.width, x.tokens) for x in found.inputs] == [
        ("layers", 3, 5 * 64),
        ("norm", 8, 5 * 36),
        ("layers", 288, 5),
    ]


def test_numbers_that_are_none():
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    x[1, 2], x[0, 0] = math.nan, math.inf
    found = outliers.find_outliers(model, [x])
    assert "2 numbers" in found.notes[0]
    assert math.isfinite(found.inputs[0].kurtosis)
    flat = outliers.find_outliers(model, [torch.zeros(3, 4)]).inputs[0]
    assert math.isnan(flat.kurtosis)
    assert math.isnan(flat.crest)
    assert flat.token_crest == 1


def test_half_precision():
    model = nn.Linear(64, 2).bfloat16()
    found = outliers.find_outliers(model, [300 * torch.randn(10, 64).bfloat16()])
    assert found.inputs[0].kurtosis == pytest.approx(3, abs=0.6)


def test_what_cannot_be():
    model = nn.Linear(4, 2)
    with pytest.raises(OctavoError, match="positive number"):
        outliers.find_outliers(model, [torch.randn(3, 4)], threshold=0.0)
    with pytest.raises(OctavoError, match="no batch"):
        outliers.find_outliers(model, [])
    with pytest.raises(OctavoError, match="put it into a list"):
        outliers.find_outliers(model, torch.randn(3, 4))
    with pytest.raises(OctavoError, match="no layer with a matrix"):
        outliers.find_outliers(nn.ReLU(), [torch.randn(3, 4)])
    assert not model._forward_pre_hooks
