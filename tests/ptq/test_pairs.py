"""Which pairs a trace shows in models of many families, and every reason to leave one alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.ptq.pairs import find
from tests.nn import models


def batch(model):
    ids = torch.randint(3, models.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def sources(pairs, ends=""):
    """By the last part of the source's name the last parts of the readers'."""
    last = [(p.source.split(".")[-1], {r.split(".")[-1] for r in p.readers}) for p in pairs if p.source.endswith(ends)]
    return dict(last)


GATED = {
    "input_layernorm": {"q_proj", "k_proj", "v_proj"},
    "post_attention_layernorm": {"gate_proj", "up_proj"},
    "up_proj": {"down_proj"},
}


@pytest.mark.parametrize(
    ("family", "expected", "left"),
    [
        ("llama", {**GATED, "norm": {"lm_head"}}, {"o_proj"}),
        ("tied_llama", GATED, {"o_proj", "lm_head"}),
        ("qwen2", {**GATED, "norm": {"lm_head"}}, {"o_proj"}),
        (
            "opt",
            {"self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"}, "final_layer_norm": {"fc1"}, "fc1": {"fc2"}},
            {"out_proj", "lm_head"},
        ),
        ("gpt2", {"ln_1": {"c_attn"}, "ln_2": {"c_fc"}}, {"c_proj", "lm_head"}),
        ("mixtral", {"input_layernorm": {"q_proj", "k_proj", "v_proj"}, "norm": {"lm_head"}}, {"o_proj"}),
        ("bert", {"LayerNorm": {"dense"}}, {"query", "key", "value", "dense", "classifier"}),
    ],
)
def test_families(family, expected, left):
    model = models.FAMILIES[family]()
    pairs, others = find(model, batch(model))
    assert sources(pairs) == expected
    assert {name.split(".")[-1] for name in others} == left
    assert [pair.kind for pair in pairs] == [
        "linear" if "proj" in p.source or "fc" in p.source else "norm" for p in pairs
    ]


def test_t5():
    model = models.t5()
    pairs, left = find(model, batch(model))
    assert len(pairs) == 14 and sources(pairs, ".wi") == {"wi": {"wo"}}
    assert "final_layer_norm also goes to the output" in left["decoder.block.0.layer.1.EncDecAttention.k"]
    assert left["lm_head"] == "lm_head shares its weights with shared"


def test_why_not():
    left = find(model := models.gpt2(), batch(model))[1]
    assert "'transformer.h.0.mlp.act', a NewGELU" in left["transformer.h.0.mlp.c_proj"]
    assert "scaled_dot_product" in left["transformer.h.0.attn.c_proj"]
    left = find(model := models.bert(), batch(model))[1]
    why = "the result of bert.embeddings.LayerNorm also goes to the function 'add'"
    assert left["bert.encoder.layer.0.attention.self.query"] == why


class OnePlus(nn.Module):
    """Gemma's norm."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


class Squared(OnePlus):
    """No norm that can be smoothed."""

    def forward(self, x):
        return x * self.weight.square()


class Net(nn.Module):
    """A norm, four linear layers, and whatever the test does with them."""

    def __init__(self, run, norm=None, act=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(6)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.act, self.run = act or nn.ReLU(), run

    def forward(self, x):
        return self.run(self, x)


def net_of(run, **parts):
    """The net without the layers that do not run: they might read anything."""
    net = Net(run, **parts).eval()
    ran = set()
    for name in "abcd":
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
    net(torch.randn(5, 6))
    for name in "abcd":
        net.get_submodule(name)._forward_hooks.clear()
        if name not in ran:
            delattr(net, name)
    return net


def search(run, **parts):
    pairs, left = find(net_of(run, **parts), torch.randn(5, 6))
    return {pair.source: (set(pair.readers), pair.plus) for pair in pairs}, left


@pytest.mark.parametrize(
    ("norm", "plus"),
    [
        (nn.LayerNorm(6), 0),
        (nn.LayerNorm(6, bias=False), 0),
        (nn.RMSNorm(6), 0),
        (OnePlus(6), 1),
        (nn.BatchNorm1d(6), 0),
    ],
)
def test_norms(norm, plus):
    found, left = search(lambda net, x: net.b(net.a(net.norm(x)).sin()), norm=norm)
    assert found == {"norm": ({"a"}, plus)}
    assert left["b"] == "its input comes from the function 'sin'"


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (Squared(6), "the result of norm, a Squared, is not proportional to its weight"),
        (nn.LayerNorm(6, elementwise_affine=False), "its input comes from the module 'norm', a LayerNorm"),
        (nn.PReLU(6), "the result of norm, a PReLU, is not proportional to its weight"),
    ],
)
def test_what_is_no_norm(norm, words):
    found, left = search(lambda net, x: net.a(net.norm(x)), norm=norm)
    assert found == {} and left["a"] == words


@pytest.mark.parametrize(
    ("act", "fits"),
    [
        *((act, True) for act in (nn.ReLU(), nn.LeakyReLU(0.1), nn.Identity(), nn.Dropout(0.5))),
        *((act, False) for act in (nn.GELU(), nn.ReLU6(), nn.SiLU(), nn.Hardtanh(), nn.Softmax(-1))),
    ],
)
def test_activations(act, fits):
    found, left = search(lambda net, x: net.b(net.act(net.a(x))), act=act)
    assert found == ({"a": ({"b"}, 0)} if fits else {})
    assert fits or f"the module 'act', a {type(act).__name__}" in left["b"]


def gated(net, x):
    return net.c(F.silu(net.a(x)) * net.b(x))


def reshaped(net, x):
    return net.b(net.a(x)[None].transpose(0, 1).reshape(-1, 6))


def bilinear(net, x):
    return net.c(net.a(x) * net.b(x))


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (gated, {"b": ({"c"}, 0)}),
        (reshaped, {"a": ({"b"}, 0)}),
        (bilinear, {"a": ({"c"}, 0)}),
        (lambda net, x: net.c(net.b(net.a(x))), {"a": ({"b"}, 0), "b": ({"c"}, 0)}),
        (lambda net, x: net.b(y := net.norm(x)) + net.c(y), {"norm": ({"b", "c"}, 0)}),
    ],
)
def test_linear_sources(run, expected):
    assert search(run)[0] == expected


REFUSED = {
    (lambda net, x: net.b(y := net.norm(x)) + y): "the result of norm also goes to the function 'add'",
    (lambda net, x: (net.b(y := net.norm(x)), y)): "also goes to the output",
    (lambda net, x: net.b(net.norm(x)) + net.c(net.norm(x)).sin()): "norm runs 2 times in a pass",
    (lambda net, x: net.b(y := net.norm(x)) + net.b(y.relu())): "b runs 2 times",
    (lambda net, x: net.b(net.norm(x)) + net.norm.weight): "the weight of norm is also read by the function 'add'",
    (lambda net, x: net.b(net.norm(x)) + net.b.weight.sum()): "the weight of b is also read by",
    (lambda net, x: net.b((y := net.norm(x)) * y.relu())): "also goes to the function 'mul'",
}


@pytest.mark.parametrize("run", REFUSED, ids=REFUSED.values())
def test_refused(run):
    found, left = search(run)
    assert found == {} and REFUSED[run] in left["b"]


def test_shared_and_hooked():
    net = net_of(lambda net, x: net.b(net.norm(x)) + net.c(x))
    net.c.weight = net.b.weight
    assert find(net, torch.randn(5, 6))[1]["b"] == "b shares its weights with c"
    net = net_of(lambda net, x: net.b(net.norm(x)))
    net.b.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    assert "hook" in find(net, torch.randn(5, 6))[1]["b"]
    net = net_of(lambda net, x: net.b(net.norm(x)))
    nn.utils.parametrizations.weight_norm(net.b)
    assert "the weight of b is computed" in find(net, torch.randn(5, 6))[1]["b"]


class Experts(nn.Module):
    """A router that sends all tokens to one expert or the other."""

    def __init__(self):
        super().__init__()
        self.norm, self.experts = nn.RMSNorm(6), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        y = self.norm(x)
        return x + self.experts[int(x.sum() > 0)](y)


def test_an_expert_that_the_example_does_not_reach():
    pairs, left = find(Experts(), torch.ones(3, 6))
    assert pairs == []
    assert left["experts.1"] == "the example does not reach experts.0, which may read the result of norm too"
