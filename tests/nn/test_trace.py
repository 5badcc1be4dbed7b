"""Who reads what, in models of many shapes, and that looking changes nothing."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from octavo import OctavoError
from octavo.nn.trace import trace, trace_symbolically
from tests.nn import models


class Net(nn.Module):
    """Three layers and whatever the test does with them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.drop, self.same, self.relu = nn.Dropout(0.5), nn.Identity(), nn.ReLU(inplace=True)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def readers(model, name="a", example=None):
    runs = trace(model, torch.randn(4, 6) if example is None else example).runs(name)
    assert len(runs) == 1
    return [str(reader) for reader in runs[0].readers]


def twice(net, x):
    y = net.a(x)
    return net.b(y) + net.c(y)


def residual(net, x):
    y = net.a(x)
    return net.b(y) + y


def in_place(net, x):
    y = net.a(x)
    net.relu(y)
    return net.b(y)


def added_in_place(net, x):
    y = net.a(x)
    y += x
    return net.b(y)


def sliced_assignment(net, x):
    y = net.a(x)
    y[:, 0] = 0
    return net.b(y)


def kept(net, x):
    net.features = net.a(x)
    return net.b(net.features)


def returned(net, x):
    y = net.a(x)
    return {"logits": [net.b(y), (y,)]}


def inspected(net, x):
    y = net.a(x)
    return net.b(y) if y.shape[0] and y.sum().item() < 1e9 else y


def through_grad(net, x):
    with torch.enable_grad():
        return net.b(net.a(x))


def data_attribute(net, x):
    y = net.a(x)
    return net.b(y) + y.data.mean()


def exception_inside(net, x):
    y = net.a(x)
    with contextlib.suppress(RuntimeError):
        net.b(y[:, :3])
    return net.c(y)


CASES = {
    twice: ["module 'b'", "module 'c'"],
    residual: ["module 'b'", "function 'add'"],
    in_place: ["module 'relu'"],
    added_in_place: ["function 'add_'"],
    sliced_assignment: ["function 'select'", "module 'b'"],
    kept: ["module 'b'", "output"],
    returned: ["module 'b'", "output"],
    inspected: ["function 'sum'", "module 'b'"],
    through_grad: ["module 'b'", "output"],  # the graph keeps it for the backward pass
    data_attribute: ["module 'b'", "function 'detach'"],
    exception_inside: ["function 'slice'", "module 'c'"],
    (lambda net, x: net.b(net.a(x))): ["module 'b'"],
    (lambda net, x: net.b(net.drop(net.same(net.a(x))))): ["module 'b'"],
    (lambda net, x: net.b(F.dropout(net.a(x), 0.5, net.training))): ["module 'b'"],
    (lambda net, x: net.b(net.a(x).view(2, 2, 6))): ["function 'view'"],
    (lambda net, x: net.b(F.relu(net.a(x)))): ["function 'relu'"],
    (lambda net, x: torch.cat([net.a(x), x])): ["function 'cat'"],
}


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_readers(forward):
    assert readers(Net(forward)) == CASES[forward]


def test_modules_that_run_several_times():
    net = Net(lambda net, x: net.a(net.a(x)))
    first, second = trace(net, torch.randn(2, 6)).runs("a")
    assert first.readers == [second] and [str(x) for x in second.readers] == ["output"]


def test_shared_modules_and_weights():
    net = Net(lambda net, x: net.c(net.b(net.a(x))))
    net.b, net.c.weight = net.a, net.a.weight
    flow = trace(net, torch.randn(2, 6))
    assert len(flow.runs("a")) == 2 and not flow.runs("b")
    assert flow.state["c.weight"] is flow.state["a.weight"] is flow.state["b.weight"]
    assert [str(x) for x in flow.state["a.weight"].readers] == ["module 'a'", "module 'a'", "module 'c'"]


def test_weights_read_past_their_layer():
    net = Net(lambda net, x: F.linear(net.a(x), net.b.weight))
    flow = trace(net, torch.randn(2, 6))
    assert not flow.runs("b")
    assert all(reader.kind == "function" for reader in flow.state["b.weight"].readers)
    assert flow.state["b.weight"].readers


def test_computed_weights_belong_to_their_layer():
    net = Net(lambda net, x: net.b(net.a(x)))
    parametrizations.weight_norm(net.b)
    assert readers(net) == ["module 'b'"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_and_compiled_parts():
    @torch.jit.script
    def swish(x):
        return x * torch.sigmoid(x)

    assert readers(Net(lambda net, x: net.b(swish(net.a(x))))) == ["function 'sigmoid'", "function 'mul'"]
    net = Net(lambda net, x: net.b(net.a(x)))
    net.b = torch.jit.script(nn.Linear(6, 6))
    assert readers(net) == ["function 't'", "function 'addmm'"] or len(readers(net)) == 1


def test_arguments_hidden_from_torch_count():
    """A module may hand its argument to a foreign kernel; then only the call tells."""

    class Foreign(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.numpy() * 2)

    net = Net(lambda net, x: net.c(net.foreign(net.a(x))) + 1)
    net.foreign = Foreign()
    assert "module 'foreign'" in readers(net)


def test_batches_of_every_kind():
    class Two(Net):
        def forward(self, x, scale, more=None):
            return self.b(self.a(x) * scale)

    x = torch.randn(3, 6)
    for batch in ({"x": x, "scale": x}, (x, x), [x, x, "label"]):
        assert readers(Two(None), example=batch) == ["function 'mul'"]
    with pytest.raises(OctavoError, match="needs 2"):
        trace(Two(None), (x,))
    flow = trace(Two(None), {"odd": x}, call=lambda model, batch: model(batch["odd"], 2.0))
    assert len(flow.runs("b")) == 1


@pytest.mark.parametrize("family", models.FAMILIES)
def test_transformers(family):
    """Every linear layer that runs is fed by something, and norms feed what the code says."""
    model = models.FAMILIES[family]()
    ids = torch.randint(3, 100, (2, 8))
    example = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        example["decoder_input_ids"] = ids
    flow = trace(model, example)
    ran = [step for step in flow.steps if step.kind == "module"]
    assert len(ran) > 10 and all(step.reads for step in ran if step.shape is not None)
    if family == "llama":
        [norm] = flow.runs("model.layers.1.input_layernorm")
        names = [f"module 'model.layers.1.self_attn.{x}_proj'" for x in "qkv"]
        assert [str(x) for x in norm.readers] == names
        [norm] = flow.runs("model.layers.1.post_attention_layernorm")
        assert {str(x) for x in norm.readers} == {f"module 'model.layers.1.mlp.{x}_proj'" for x in ("gate", "up")}


def test_torch_transformer_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    flow = trace(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 3, 8))
    assert flow.steps[-1].reads


def test_nothing_changes():
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), Net(lambda net, x: x + torch.rand(1)))

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            self.last = x[0].detach()
            return x

    net.append(Counter())
    net.train()
    net[1].eval()
    modes = [m.training for m in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    trace(net, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_an_error_inside_leaves_nothing_behind():
    def fail(net, x):
        net.a(x)
        raise ZeroDivisionError

    net = Net(fail).train()
    with pytest.raises(ZeroDivisionError):
        trace(net, torch.randn(2, 6))
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.ones(1).add(1) == 2  # the mode is off


def test_activations_are_not_kept():
    alive = []

    def forward(net, x):
        y = net.a(x)
        alive.append(weakref.ref(y))
        z = net.b(y)
        del y
        gc.collect()
        assert alive[0]() is None
        return z

    flow = trace(Net(forward), torch.randn(2, 6))
    assert flow.runs("b")


def test_hooks_of_others_stand_outside():
    net = Net(lambda net, x: net.b(net.a(x)))
    seen = []
    net.a.register_forward_hook(lambda module, args, y: y * 2)
    assert readers(net) == ["function 'mul'"]
    net = Net(lambda net, x: net.b(net.a(x)))
    net.a.register_forward_hook(lambda module, args, y: seen.append(y))
    assert readers(net) == ["module 'b'", "output"]


def test_lazy_modules_are_refused():
    net = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(OctavoError, match=r"0\.weight has no shape yet"):
        trace(net, torch.randn(2, 6))
    with pytest.raises(OctavoError, match="lazy"):
        trace_symbolically(net)


@pytest.mark.parametrize("forward", [twice, residual])
def test_symbolically(forward):
    net = Net(forward)
    [run] = trace_symbolically(net).runs("a")
    assert [str(x) for x in run.readers] == CASES[forward]
    assert run.shape is None and [str(x) for x in run.reads] == ["state 'a.weight'", "state 'a.bias'"]


def test_what_fx_cannot_follow():
    with pytest.raises(OctavoError, match="give an example"):
        trace_symbolically(Net(inspected))


def test_what_only_a_cycle_keeps_is_no_result():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            kept = [self.first(x)]
            kept.append(kept)
            return {"found": self.second(kept[0])}

    ends = trace(Loop(), torch.randn(2, 3)).steps[-1]
    assert [step.name for step in ends.inputs] == ["second"]


def test_a_result_within_other_objects():
    class Holder:
        def __init__(self, value):
            self.held = {"deep": [value]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x)
            return Holder(y), self.second(y)

    ends = trace(Model(), torch.randn(2, 3)).steps[-1]
    assert {step.name for step in ends.inputs} == {"first", "second"}
