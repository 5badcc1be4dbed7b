"""A replayed model gives the very same results as one that runs in full, whatever its architecture."""

import copy

import pytest
import torch
from torch import nn

from octavo.analysis.replay import Recording, tensors, units
from octavo.nn import swap
from tests.nn import models


def batch_for(name, model):
    torch.manual_seed(0)
    if name == "plain":
        return torch.randn(5, 20)
    ids = {"input_ids": torch.randint(3, models.VOCABULARY, (2, 9))}
    return ids | ({"decoder_input_ids": ids["input_ids"][:, :4]} if model.config.is_encoder_decoder else {})


FAMILIES = {**models.FAMILIES, "plain": models.Plain}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_from_any_layer_on_the_output_is_that_of_a_full_run(name):
    model = FAMILIES[name]().eval()
    batch = batch_for(name, model)
    layers = [x for x in swap.layers(model) if isinstance(x.module, nn.Linear) or x.kind == "Conv1D"]
    recording = Recording(model, batch, [x.module for x in layers])
    assert recording.exact
    for layer in layers[:: max(1, len(layers) // 5)]:
        twin = copy.deepcopy(model)
        changed = twin.get_submodule(layer.name)
        changed.weight = nn.Parameter(changed.weight * 1.5)  # its own, where it was tied
        expected = tensors(twin(**batch) if isinstance(batch, dict) else twin(batch))
        larger = copy.deepcopy(layer.module)
        larger.weight.data = layer.weight * 1.5
        found = tensors(recording.run({layer.module: larger.forward}))
        assert all(map(torch.equal, found, expected))
    plain = tensors(model(**batch) if isinstance(batch, dict) else model(batch))
    assert all(map(torch.equal, tensors(recording.run({})), plain))
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_comes_before_does_not_run_again():
    model = models.llama().eval()
    ran = []
    for number, block in enumerate(model.model.layers):
        block.mlp.down_proj.register_forward_hook(lambda *_, n=number: ran.append(n))
    last = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        recording = Recording(model, batch_for("llama", model), [last])
        ran.clear()
        recording.run({last: last.forward})
    assert ran == [1]
    assert set(model.model.layers) <= set(units(model))


def test_inputs_are_those_of_the_model_as_it_is():
    model = models.Plain().eval()
    x = batch_for("plain", model)
    with torch.no_grad():
        recording = Recording(model, x, [model.first, model.blocks[1]])
        expected = model.blocks[0](model.norm(model.first(x + model.shift)).relu())
        assert torch.equal(recording.inputs(model.blocks[1])[0], expected)
        assert torch.equal(recording.inputs(model.first)[0], x + model.shift)
    assert recording.inputs(model.blocks[0]) == []  # nobody asked to watch it


class InPlace(nn.Module):
    """Changes results in place, as convolutional networks do."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x):
        for step in self.steps:
            y = step(x)
            y += x
            x = y.relu_()
        return x


class BehindTheBack(nn.Module):
    """Its second layer needs what the first left in an attribute, and counts."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.count = 0

    def forward(self, x):
        self.count += 1
        for step in self.steps:
            x = step(x)
        return x * self.count


@torch.no_grad()
def test_changes_in_place_are_no_harm():
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(3, 8)
    recording = Recording(model, x, list(model.steps))
    assert recording.exact
    for _ in range(2):
        assert torch.equal(recording.run({model.steps[3]: model.steps[3].forward}), model(x))


@torch.no_grad()
def test_a_model_that_does_not_repeat_itself_is_run_in_full():
    model = BehindTheBack()
    recording = Recording(model, torch.ones(1, 8), list(model.steps))
    assert not recording.exact
    ran = []
    model.steps[0].register_forward_hook(lambda *_: ran.append(0))
    recording.run({model.steps[2]: model.steps[2].forward})
    assert ran == [0]
