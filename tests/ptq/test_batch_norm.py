"""Re-tuned statistics against torch's own cumulative averages, and what happens when data is bad."""

import copy

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import OctavoError, OctavoWarning
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.batch_norm import retune_batch_norms_
from tests.ptq.convolutional import NETWORKS, images, output, trained


def norms(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, model):
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def batches(number=3, size=4):
    return [images(size, seed) for seed in range(number)]


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "decoder", "perceptron", "hf_resnet"])
def test_equals_torch_with_momentum_none(name):
    model = NETWORKS[name]()
    oracle = copy.deepcopy(model).double()
    for norm in norms(oracle).values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches():
            oracle(batch.double())
    assert retune_batch_norms_(model, batches()) == list(norms(oracle))
    for own, expected in zip(norms(model).values(), norms(oracle).values(), strict=True):
        assert torch.allclose(own.running_mean.double(), expected.running_mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(own.running_var.double(), expected.running_var, rtol=1e-4)
        assert own.num_batches_tracked == 3 and own.momentum == 0.1
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mends_a_quantized_model():
    """Few bits move the statistics; re-tuning brings them back."""
    generator = torch.Generator().manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 10)).eval()
    data = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(4)]
    retune_batch_norms_(model, data)  # now these are the float model's own
    new = torch.rand(200, 3, 8, 8, generator=generator)
    expected = model(new)
    with torch.no_grad():
        model[1].weight += 0.3 * model[1].weight.abs().mean()  # a weight error that is anything but zero on average
    ov.quantize_(model, ov.schemes.dynamic(ov.formats.E5M2))
    assert isinstance(model[1], QuantizedLayer)
    before = ov.sqnr(expected, model(new))
    retune_batch_norms_(model, data)
    assert ov.sqnr(expected, model(new)) > before + 3


def test_only_batch_norms_train():
    modes = {}
    model = NETWORKS["mobilenet"]().train()
    model[0].eval()
    handles = [
        m.register_forward_hook(lambda m, *_, name=name: modes.update({name: m.training}))
        for name, m in model.named_modules()
        if not any(m.children())
    ]
    before = [m.training for m in model.modules()]
    retune_batch_norms_(model, batches())
    assert {name for name, training in modes.items() if training} == set(norms(model))
    assert [m.training for m in model.modules()] == before
    for handle in handles:
        handle.remove()


def test_half_precision_averages_do_not_stall():
    model = nn.Sequential(nn.BatchNorm1d(3)).bfloat16()
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 3, generator=generator).add(5).bfloat16() for _ in range(300)]
    retune_batch_norms_(model, data)
    expected = torch.stack([x.double().mean(0) for x in data]).mean(0)
    assert torch.allclose(model[0].running_mean.double(), expected, rtol=2**-8)


def test_data_that_raises_midway():
    def stream():
        yield from batches(2)
        raise ZeroDivisionError("disk")

    model = NETWORKS["resnet"]().train()
    model[1].momentum = 0.5
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        retune_batch_norms_(model, stream())
    assert same(before, model) and model.training and model[1].momentum == 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "held no batch"),
        (images(), "put it into a list"),
        ([images(), torch.full((2, 3, 8, 8), float("nan"))], "batch 1: the input of 2 holds NaN"),
        ([images(), images(1)], r"batch 1: 2 sees one number a channel \(\[1, 33\]\)"),
        ([{"wrong": images()}], "does not take"),
        (["text"], "a batch is"),
    ],
)
def test_bad_data(data, message):
    model = NETWORKS["perceptron"]()
    before = state(model)
    with pytest.raises(OctavoError, match=message):
        retune_batch_norms_(model, data)
    assert same(before, model) and model[2].momentum == 0.1


def test_nothing_to_tune():
    with pytest.raises(OctavoError, match="Sequential has no BatchNorm"):
        retune_batch_norms_(nn.Sequential(nn.Linear(2, 2)), [torch.randn(3, 2)])
    without = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(OctavoError, match="no BatchNorm"):
        retune_batch_norms_(without, [torch.randn(3, 2)])


def test_a_norm_that_no_batch_reaches_keeps_its_statistics():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.extra = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.extra(self.norm(x)) if self.training else self.norm(x)

    model = trained(Auxiliary())
    before = model.extra.running_mean.clone()
    with pytest.warns(OctavoWarning, match="no batch reached extra"):
        assert retune_batch_norms_(model, [(torch.randn(4, 3), "label")]) == ["norm"]
    assert torch.equal(model.extra.running_mean, before)


def test_progress_and_own_calls():
    seen = []

    def track(items, what):
        seen.append(what)
        return items

    model = NETWORKS["perceptron"]()
    data = [{"picture": x} for x in batches()]
    assert retune_batch_norms_(model, data, call=lambda m, b: output(m, b["picture"]), track=track) == ["2", "5"]
    assert seen == ["re-tuning"]
