"""Runs that meet at every layer: what each layer is shown, what comes out, and what is left behind after an error."""

import threading

import pytest
import torch
from torch import nn

from octavo import OctavoError
from octavo.calibration.lockstep import Halt, walk
from tests.nn import models


def plain():
    torch.manual_seed(0)
    return models.Plain().eval()


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


class Recorder:
    """Keeps what each layer was shown and what all runs gave."""

    def __init__(self, model, inputs):
        self.results, self.shown = [None] * len(inputs), {}
        self.runs = [lambda i=i, x=x: self.results.__setitem__(i, model(x)) for i, x in enumerate(inputs)]

    def visit(self, name, calls):
        assert name not in self.shown
        self.shown[name] = {run: args[0] for run, (args, _) in calls.items()}

    def answer(self, name, run, usual, args, kwargs):
        return usual(*args, **kwargs)

    def walk(self, model, layers=None):
        walk(self.runs, linears(model) if layers is None else layers, self.visit, self.answer)


def test_runs_are_what_they_would_be_alone():
    model, inputs = plain(), [torch.randn(n, 20) for n in (3, 1, 7)]
    recorder = Recorder(model, inputs)
    recorder.walk(model)
    assert list(recorder.shown) == ["first", "blocks.0", "blocks.1"]
    for x, result in zip(inputs, recorder.results, strict=True):
        assert torch.equal(result, model(x)) and not result.requires_grad
    assert [len(x) for x in recorder.shown["blocks.1"].values()] == [3, 1, 7]
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())
    assert not [t for t in threading.enumerate() if t.name.startswith("octavo run")]


def test_what_a_visit_changes_shows_behind_it():
    model, x = plain(), torch.randn(4, 20)
    recorder = Recorder(model, [x, x])
    recorder.answer = lambda name, run, usual, args, kwargs: usual(*args) * (1 if run == 0 else 2)
    recorder.walk(model)
    first, second = recorder.shown["blocks.1"].values()
    assert torch.equal(second, 2 * model.blocks[0](model.norm(2 * model.first(x + model.shift)).relu()))
    assert not torch.equal(first, second)


class Routed(nn.Module):
    """Rows go to the experts that their signs name, and to some of them none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        y = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0).long() + (x[:, 1] > 0).long() == place
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return self.last(y)


def test_runs_may_take_different_ways():
    model = Routed().eval()
    inputs = [torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[-1.0, -1, 0, 0], [1, 1, 1, 1]]), torch.zeros(2, 4)]
    recorder = Recorder(model, inputs)
    recorder.walk(model)
    assert {name: sorted(runs) for name, runs in recorder.shown.items()} == {
        "experts.0": [1, 2],
        "experts.2": [0, 1],
        "last": [0, 1, 2],
    }
    for x, result in zip(inputs, recorder.results, strict=True):
        assert torch.equal(result, model(x))


@pytest.mark.parametrize("where", ["run", "visit", "answer"])
def test_an_error_ends_all_runs(where):
    model, inputs = plain(), [torch.randn(2, 20), torch.randn(2, 20), torch.randn(2, 20)]
    recorder = Recorder(model, inputs)

    def fail(*args, **kwargs):
        raise RuntimeError("no further")

    if where == "run":
        recorder.runs[1] = fail
    else:
        setattr(recorder, where, fail)
    with pytest.raises(RuntimeError, match="no further"):
        recorder.walk(model)
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in model.modules())
    assert not [t for t in threading.enumerate() if t.name.startswith("octavo run")]


def test_an_answer_may_end_its_run_alone():
    model, inputs = plain(), [torch.randn(2, 20), torch.randn(3, 20), torch.randn(4, 20)]
    recorder = Recorder(model, inputs)

    def answer(name, run, usual, args, kwargs):
        if name == "blocks.0" and run == 1:
            raise Halt
        return usual(*args, **kwargs)

    recorder.answer = answer
    recorder.walk(model)
    assert {name: sorted(runs) for name, runs in recorder.shown.items()} == {
        "first": [0, 1, 2],
        "blocks.0": [0, 1, 2],
        "blocks.1": [0, 2],
    }
    assert recorder.results[1] is None
    assert all(torch.equal(recorder.results[run], model(inputs[run])) for run in (0, 2))


def test_a_model_that_swallows_errors_is_ended_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval()

    class Stubborn(nn.Module):
        def forward(self, x):
            while True:
                try:
                    return model(x)
                except Exception:
                    continue

    recorder = Recorder(Stubborn(), [torch.zeros(1, 2)] * 2)
    recorder.visit = lambda name, calls: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        recorder.walk(model)
    assert not [t for t in threading.enumerate() if t.name.startswith("octavo run")]


def test_threads_of_the_models_own_are_refused():
    layer = nn.Linear(2, 2)

    def run():
        caught = []

        def call():
            try:
                layer(torch.zeros(1, 2))
            except OctavoError as error:
                caught.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        raise caught[0]

    with pytest.raises(OctavoError, match="layer it is called from a thread of the model's own"):
        walk([run], {"it": layer}, lambda *_: None, lambda name, run, usual, args, kwargs: usual(*args))


def test_fused_encoder_layers_call_their_parts():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    recorder = Recorder(encoder, [x])
    recorder.walk(encoder, {"linear1": encoder.linear1, "linear2": encoder.linear2})
    assert list(recorder.shown) == ["linear1", "linear2"]
    assert torch.allclose(recorder.results[0], encoder(x), atol=1e-5)
