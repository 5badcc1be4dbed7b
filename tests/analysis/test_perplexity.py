"""Perplexity against a direct computation, and errors that name the culprit."""

import math

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import OctavoError
from octavo.analysis.perplexity import Perplexity, obstacle, perplexity
from tests.nn import models


def windows(count=5, length=9, seed=0):
    return torch.randint(0, models.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def direct(model, ids):
    """Token after token, in float64."""
    total, count = 0.0, 0
    for window in ids:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        for place in range(len(window) - 1):
            chances = torch.softmax(logits[place], -1)
            total -= math.log(chances[window[place + 1]].item())
            count += 1
    return total / count, count


@pytest.mark.parametrize("family", ["llama", "tied_llama", "gpt2", "opt", "qwen2", "mixtral"])
def test_equals_a_direct_computation(family):
    model = models.FAMILIES[family]()
    ids = windows()
    loss, count = direct(model, ids)
    for batch in (1, 2, 4, 100):
        got = perplexity(model, ids, batch)
        assert got.tokens == count == 5 * 8
        assert got.loss == pytest.approx(loss, rel=1e-5)
        assert got.value == pytest.approx(math.exp(loss), rel=1e-4)


def test_of_a_quantized_model():
    model = models.llama()
    ids = windows(3, 20)
    before = perplexity(model, ids)
    ov.quantize_(model, "int8-dynamic")
    after = perplexity(model, ids)
    assert after == Perplexity(after.value, after.loss, 57)
    assert 0 < abs(after.loss - before.loss) < 0.02
    assert after.loss == pytest.approx(direct(model, ids)[0], rel=1e-5)


def test_a_certain_and_a_hopeless_model():
    model = models.llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, windows()).value == pytest.approx(models.VOCABULARY, rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight) * 1e5)
    assert math.isfinite(perplexity(model, windows()).value)


def test_the_mode_comes_back():
    for training in (True, False):
        model = models.llama(attention_dropout=0.5).train(training)
        first = perplexity(model, windows())
        assert model.training == training
        assert perplexity(model, windows()) == first  # evaluated without dropout
    model = models.llama().train()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(OctavoError):
        perplexity(model, windows())
    assert model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "model.norm", "lm_head", "model.embed_tokens"],
)
def test_nan_names_the_first_layer(name, value):
    model = models.llama()
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.fill_(value)
    with pytest.raises(OctavoError, match=rf"the loss is nan: {name} \("):
        perplexity(model, windows())
    assert not any(m._forward_hooks for m in model.modules())


def test_nan_in_a_quantized_layer():
    model = models.llama()
    ov.quantize_(model, "int8-dynamic")
    model.model.layers[1].mlp.down_proj.scale.fill_(math.nan)
    with pytest.raises(OctavoError, match=r"model.layers.1.mlp.down_proj \(QuantizedLinear\)"):
        perplexity(model, windows())


@pytest.mark.parametrize(
    "make", [models.t5, models.bert, models.Plain, lambda: models.llama().model, lambda: nn.Linear(3, 3)]
)
def test_not_a_causal_model(make):
    model = make()
    assert type(model).__name__ in obstacle(model)
    with pytest.raises(OctavoError, match=type(model).__name__):
        perplexity(model, windows())
    assert obstacle(models.llama()) is None


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 1), (3, 0), (2, 3, 4)])
def test_windows_of_a_wrong_shape(shape):
    with pytest.raises(OctavoError, match=r"\[count, length\]"):
        perplexity(models.llama(), torch.zeros(shape, dtype=torch.long))


def test_tokens_the_model_does_not_know():
    ids = windows()
    ids[1, 2] = models.VOCABULARY
    with pytest.raises(OctavoError, match="token 128, the model knows 128"):
        perplexity(models.llama(), ids)
    ids[1, 2] = -100
    with pytest.raises(OctavoError, match="token -100"):
        perplexity(models.llama(), ids)


def test_progress():
    seen = []

    def track(items, what):
        seen.append((len(items), what))
        return items

    perplexity(models.llama(), windows(5), 2, track=track)
    assert seen == [(3, "evaluating")]
