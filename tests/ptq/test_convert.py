"""Back to floats, and from one 8-bit scheme to another: the numbers, the report, and nothing lost on errors."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, PerChannel, PerGroup, PerTensor, Rule, Scheme, Static
from octavo.core import schemes
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.fold import fuse_relu_
from octavo.ptq.quantize import model_bytes
from tests.nn import models


def quantized(model):
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLayer)}


def batches(model):
    ids = torch.randint(3, models.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}]


class Everything(nn.Module):
    """Every kind of layer that has an 8-bit form, with settings that are not the usual ones."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 12, padding_idx=3)
        self.bag = nn.EmbeddingBag(20, 12, mode="sum", include_last_offset=True, padding_idx=1)
        self.line = nn.Conv1d(12, 8, 3, stride=2, padding="valid", dilation=2, groups=4, bias=False)
        self.plane = nn.Conv2d(1, 6, (3, 2), padding=(2, 1), padding_mode="circular")
        self.depthwise = nn.Conv2d(6, 6, 3, padding="same", groups=6)
        self.space = nn.Conv3d(1, 4, 2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
        self.linear = nn.Linear(12, 5)

    def forward(self, ids):
        rows = self.table(ids)
        yield self.bag(ids.flatten(), torch.tensor([0, 4, ids.numel()]))
        yield self.line(rows.mT)
        yield self.up(self.depthwise(self.plane(rows[:, None])))
        yield self.space(rows[:, None, None].expand(-1, -1, 3, -1, -1))
        yield self.linear(rows)


EVERY = {"table": "int8-weight-only", "bag": "int8-weight-only", "*": "int8-weight-only"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_kind_comes_back(dtype):
    model = Everything().eval().to(dtype)
    original = copy.deepcopy(model)
    ids = torch.randint(20, (3, 16))
    ov.quantize_(model, EVERY)
    names, before = list(quantized(model)), list(model(ids))
    assert len(names) == 8
    assert ov.dequantize_(model) == names
    for name in names:
        old, new = original.get_submodule(name), model.get_submodule(name)
        assert type(new) is type(old)
        assert str(new) == str(old)
        assert new.weight.shape == old.weight.shape
        assert new.weight.dtype == old.weight.dtype == dtype
        assert ov.sqnr(old.weight, new.weight) > 30
        assert not new.training
        assert (new.bias is None) == (old.bias is None) if hasattr(old, "bias") else True
    # in 16 bits the 8-bit linear multiplies codes, and scales the sums: there the float weights are rounded, once more
    rounds = {torch.bfloat16: 40, torch.float16: 60}
    for a, b in zip(before, model(ids), strict=True):
        assert torch.equal(a, b) or ov.sqnr(a, b) > rounds[dtype]
    assert set(model.state_dict()) == set(original.state_dict())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families(family):
    model = models.FAMILIES[family]()
    state = model.state_dict()
    ov.quantize_(model, "fp8-weight-only")
    before = models.logits(model)
    assert ov.dequantize_(model)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert ov.sqnr(before, models.logits(model)) > 100
    assert quantized(model) == {}
    assert [type(m).__name__ for m in models.FAMILIES[family]().modules()] == [
        type(m).__name__ for m in model.modules()
    ]


def test_scaled_embeddings():
    config = transformers.Gemma3TextConfig(**models.COMMON, **models.SMALL, num_key_value_heads=2, head_dim=16)
    model = transformers.Gemma3ForCausalLM(config).eval()
    name = "model.embed_tokens"
    ov.quantize_(model, {name: "int8-weight-only"})
    assert model.get_submodule(name).multiplier == 8
    before = models.logits(model)
    assert ov.dequantize_(model) == [name]
    assert torch.equal(models.logits(model), before)
    assert isinstance(model.get_submodule(name), nn.Embedding)
    ov.quantize_(model, {name: "int8-weight-only"})
    assert ov.sqnr(before, models.logits(model)) > 60


def test_sharing_hooks_and_modes_survive():
    shared, seen = nn.Linear(8, 8), []
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8), nn.Linear(8, 8))})
    model["b"][2].weight = model["b"][1].weight
    shared.register_forward_hook(lambda *_: seen.append(1))
    model.train()
    ov.quantize_(model, "int8-dynamic")
    assert ov.dequantize_(model) == ["a", "b.1", "b.2"]
    assert model["a"] is model["b"][0]
    assert model["b"][2].weight is model["b"][1].weight
    assert model["a"].training
    model["a"](torch.randn(2, 8)).sum().backward()
    assert seen == [1]
    assert model["a"].weight.grad is not None


def test_nothing_to_bring_back():
    with pytest.raises(OctavoError, match="no 8-bit layer"):
        ov.dequantize_(models.Plain())
    with pytest.raises(OctavoError, match="no 8-bit layer"):
        ov.recast_(models.Plain(), "int8-dynamic")


def test_a_layer_that_took_over_its_relu():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()).eval()
    ov.quantize_(model, "int8-dynamic")
    fuse_relu_(model, torch.randn(2, 8))
    kinds = [type(m) for m in model]
    with pytest.raises(OctavoError, match="1: it has taken over a ReLU"):
        ov.dequantize_(model)
    assert [type(m) for m in model] == kinds


@pytest.mark.parametrize("family", ["llama", "tied_llama", "opt", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("target", ["int8-dynamic", "int8-weight-only", "int8-static", "w8a16", "w16a8"])
def test_fp8_to_others(family, target):
    model = models.FAMILIES[family]()
    ov.quantize_(model, "fp8-dynamic")
    numbers = {name: layer.weight for name, layer in quantized(model).items()}
    source, before = models.logits(model), model_bytes(model)
    summary = ov.recast_(model, target, batches(model))
    assert [x.name for x in summary.quantized] == list(numbers)
    assert {x.scheme for x in summary.quantized} == {target}
    for report in summary.quantized:
        expected = ov.sqnr(numbers[report.name], model.get_submodule(report.name).weight)
        assert report.sqnr == pytest.approx(expected)
        assert expected > 30
    assert summary.bytes_before == before
    assert summary.bytes_after == model_bytes(model)
    saved = sum(layer.bytes_before - layer.bytes_after for layer in summary.layers)
    assert saved == summary.bytes_before - summary.bytes_after
    assert ov.sqnr(source, models.logits(model)) > (15 if "static" in target else 20)


def test_equals_quantizing_the_numbers():
    model = models.llama()
    ov.quantize_(model, "fp8-dynamic")
    expected = copy.deepcopy(model)
    ov.dequantize_(expected)
    ov.quantize_(expected, "int8-static", batches(model))
    ov.recast_(model, "int8-static", batches(model))
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["int8-dynamic", "fp8-dynamic", "fp8-block", "e3m4-weight-only", "w16a8", "fp8-cscale"]
)
def test_the_same_scheme_again_changes_nothing(name):
    model = models.llama()
    ov.quantize_(model, name)
    before = {n: layer.weight for n, layer in quantized(model).items()}
    summary = ov.recast_(model, name)
    assert all(ov.sqnr(before[n], layer.weight) > 100 for n, layer in quantized(model).items())
    assert len(summary.quantized) == len(before)


def test_rules_and_what_they_leave():
    model = models.llama()
    ov.quantize_(model, {"lm_head": "fp8-weight-only", "*down_proj": None, "*": "fp8-dynamic"})
    head, key = model.lm_head, model.model.layers[1].self_attn.k_proj
    summary = ov.recast_(model, {"*k_proj": None, "*": "int8-dynamic"})
    assert model.lm_head is head
    assert model.model.layers[1].self_attn.k_proj is key
    assert model.model.layers[0].mlp.down_proj.scheme == schemes.INT8_DYNAMIC
    assert model.model.layers[0].self_attn.q_proj.scheme == schemes.INT8_DYNAMIC
    reasons = {x.name: (x.reason, x.bytes_before, x.bytes_after) for x in summary.left}
    size = head.codes.nbytes + head.scale.nbytes
    assert reasons["lm_head"] == (
        "stays fp8-weight-only: output head, left in float unless a rule gives its exact name",
        size,
        size,
    )
    assert reasons["model.layers.1.self_attn.k_proj"][0] == "stays fp8-dynamic: rule name='*k_proj'"


def intact(model, rules, words, *data, **more):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises((OctavoError, RuntimeError), match=words):
        ov.recast_(model, rules, *data, **more)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state.items())


def test_nothing_changes_on_errors():
    model = models.llama()
    ov.quantize_(model, "fp8-dynamic")
    intact(model, "int9", "no scheme is called")
    intact(model, {"nothing": "int8-dynamic"}, "matches no layer")
    intact(model, "int8-static", "come from calibration")
    intact(model, "int8-static", "no batch", [])
    intact(model, [Rule(None)], "nothing to quantize")

    def stop(items, what):
        for index, item in enumerate(items):
            if index == 5:
                raise RuntimeError("no more")
            yield item

    intact(model, "int8-dynamic", "no more", track=stop)


def test_layers_without_data_stay_as_they_are():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.seldom = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.always(x)

    model = Branches()
    ov.quantize_(model, "fp8-dynamic")
    seldom = model.seldom
    intact(model, "int8-static", "seldom", [torch.randn(4, 8)])
    summary = ov.recast_(model, "int8-static", [torch.randn(4, 8)], allow_uncalibrated=True)
    assert model.seldom is seldom
    assert [x.reason for x in summary.left] == ["stays fp8-dynamic: saw no calibration data"]


def test_untied_heads_are_saved_untied(tmp_path):
    """A tied head that was quantized has numbers of its own, in 8 bits or back in float."""
    model = models.tied_llama()
    ov.quantize_(model, {"lm_head": "fp8-weight-only", "*": "fp8-dynamic"})
    ov.dequantize_(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "float")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    assert torch.equal(models.logits(again), models.logits(model))
    ov.quantize_(model, "int8-dynamic")
    ov.save(model, tmp_path / "eight")
    assert json.loads((tmp_path / "eight" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(models.logits(ov.load(tmp_path / "eight")), models.logits(model))


def test_a_static_scale_a_channel_is_refused():
    with pytest.raises(OctavoError, match=r"a static input has one scale for all of it, not PerChannel\(axis=-1\)"):
        Scheme(Cast("INT8", PerChannel(0)), Cast("INT8", PerChannel(-1), Static()))


class TestStacks:
    """Layers that engines run as one matrix share a scale for whole weights."""

    SCHEME = Scheme(Cast("E4M3FN"), Cast("E4M3FN", PerTensor(), Static()))

    @pytest.mark.parametrize("scale", [Cast("E4M3FN"), Cast("INT8")], ids=str)
    def test_scales_and_codes(self, scale):
        model = models.llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(3)
        plain = copy.deepcopy(model)
        summary = ov.quantize_(model, Scheme(scale))
        for block, old in zip(model.model.layers, plain.model.layers, strict=True):
            for parent, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
                layers = [getattr(getattr(block, parent), name) for name in names]
                whole = torch.cat([getattr(getattr(old, parent), name).weight for name in names])
                one = ov.quantize(whole, scale)
                assert all(torch.equal(layer.scale, one.scale) for layer in layers)
                assert torch.equal(torch.cat([layer.codes for layer in layers]), one.codes)
            own = old.mlp.down_proj.weight
            assert torch.equal(block.mlp.down_proj.codes, ov.quantize(own, scale).codes)
        assert summary.notes == ["10 layers share one weight scale with those that engines stack them with"]

    def test_input_scales_agree(self):
        model = models.llama()
        ov.quantize_(model, self.SCHEME, batches(model))
        block = model.model.layers[1]
        for names in ([block.self_attn.q_proj, block.self_attn.k_proj], [block.mlp.gate_proj, block.mlp.up_proj]):
            assert torch.equal(names[0].input_scale, names[1].input_scale)
            assert torch.equal(names[0].scale, names[1].scale)

    def test_only_where_the_weight_has_one_scale(self):
        for scheme in (schemes.FP8_STATIC, schemes.FP8_CSCALE, Scheme(Cast("INT8", PerGroup(16)))):
            model = models.llama()
            assert ov.quantize_(model, scheme, batches(model)).notes in (
                [],
                ["the data was not used: no layer has a static input scale"],
            )

    def test_only_those_of_one_scheme(self):
        model = models.llama()
        ov.quantize_(model, {"*k_proj": Scheme(Cast("INT8")), "*v_proj": None, "*": Scheme(Cast("E4M3FN"))})
        attention = model.model.layers[0].self_attn
        assert float(attention.q_proj.scale) != float(attention.k_proj.scale)
        assert isinstance(attention.v_proj, nn.Linear)


class TestSixteenBits:
    """W8A16 and W16A8: 16-bit integers on one side."""

    @pytest.mark.parametrize("affine", [False, True])
    @pytest.mark.parametrize("group", [None, 16, 24])
    @pytest.mark.parametrize(("left", "right"), [("INT16", "INT8"), ("INT8", "INT16"), ("INT16", "E4M3FN")])
    def test_products(self, left, right, group, affine):
        """Against float64 sums of the very codes: as near as FP32 sums can be."""
        from octavo.core.matmul import multiply

        granularity = PerChannel(0) if group is None else PerGroup(group)
        x, w = torch.randn(9, 100), torch.randn(17, 100) + 0.3
        a = ov.quantize(x, Cast(left, granularity, affine=affine))
        b = ov.quantize(w, Cast(right, granularity))
        exact = a.dequantize(torch.float64) @ b.dequantize(torch.float64).T
        size = a.dequantize(torch.float64).abs() @ b.dequantize(torch.float64).abs().T
        assert float(((multiply(a, b).double() - exact) / size).abs().max()) < 2e-6
        assert a.codes.dtype == (torch.int16 if left == "INT16" else torch.int8)
        fine = min(ov.sqnr(x, a.dequantize()) if left == "INT16" else 99, 99)
        assert fine > 85

    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
    def test_accuracy(self, family):
        """Sixteen bits on one side cost as much as not quantizing it."""
        for name, other in (("w8a16", "int8-weight-only"), ("w16a8", None)):
            model = models.FAMILIES[family]()
            plain, before = copy.deepcopy(model), models.logits(model)
            ov.quantize_(model, name)
            if other is None:
                assert ov.sqnr(before, models.logits(model)) > 30
                continue
            ov.quantize_(plain, other)
            assert ov.sqnr(models.logits(plain), models.logits(model)) > 50

    @pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.5), (torch.bfloat16, 1.0)], ids=str)
    def test_memory_is_told_as_it_is(self, dtype, share):
        model = models.llama().to(dtype)
        summary = ov.quantize_(model, "w16a8")
        for layer in summary.quantized:
            module = model.get_submodule(layer.name)
            assert layer.bytes_after == module.codes.nbytes + module.scale.nbytes
            assert layer.bytes_after == share * layer.bytes_before + module.scale.nbytes
        assert summary.bytes_after == model_bytes(model)
        assert bool(summary.notes) == (share == 1.0)
        assert all("14 layers take no less memory than before" in note for note in summary.notes)
        assert ov.quantize_(models.llama().to(dtype), "w8a16").notes == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_mixed_rules_saved_and_loaded(self, dtype, tmp_path):
        rules = {
            **{"*q_proj": "w8a16", "*down_proj": "w16a8", "*up_proj": "int8-static", "*gate_proj": "fp8-cscale"},
            **{"*k_proj": schemes.static("INT8", "INT16"), "*v_proj": None, "*": "e3m4-int8-group64"},
        }
        model = models.llama().to(dtype)
        summary = ov.quantize_(model, rules, batches(model))
        assert {x.scheme for x in summary.quantized} == {
            *{"w8a16", "w16a8", "int8-static", "fp8-cscale", "e3m4-int8-group64"},
            "INT8 × INT16/tensor/static",
        }
        ov.save(model, tmp_path / "out", layout="octavo")
        again = ov.load(tmp_path / "out")
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
        assert torch.equal(models.logits(model), models.logits(again))
        assert {n: m.scheme for n, m in quantized(again).items()} == {n: m.scheme for n, m in quantized(model).items()}
