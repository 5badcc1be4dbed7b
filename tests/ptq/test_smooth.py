"""Smoothing against the law written out, the function before and after, and every refusal before anything changes."""

import copy
import signal

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import OctavoError, Rule
from octavo.ptq.smooth import _apply, foresee, scales, smooth_
from octavo.ptq.trial import power_of_two
from tests.nn import models


def varied(model, seed=0):
    """The model with norms that differ from 1, and some channels far larger than others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter[::17] *= 20
    return model


def batches(model, count=2):
    ids = torch.randint(3, models.VOCABULARY, (count, 2, 8), generator=torch.Generator().manual_seed(1))
    names = ["input_ids", *(["decoder_input_ids"] if model.config.is_encoder_decoder else [])]
    return [dict.fromkeys(names, part) for part in ids]


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def block(width=6, out=5, **more):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.LayerNorm(width, **more), nn.Linear(width, out), nn.Tanh())
    return varied(model).eval()


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_the_law(alpha):
    model = block()
    data = [torch.randn(7, 4), torch.randn(3, 2, 4)]
    before = copy.deepcopy(model)
    seen = torch.cat([before[:3](x).flatten(0, -2) for x in data]).detach().abs().amax(0)
    s = seen**alpha / before[3].weight.detach().abs().amax(0) ** (1 - alpha)
    made = smooth_(model, data, alpha)
    torch.testing.assert_close(model[2].weight, before[2].weight / s)
    torch.testing.assert_close(model[2].bias, before[2].bias / s)
    torch.testing.assert_close(model[3].weight, before[3].weight * s)
    assert torch.equal(model[3].bias, before[3].bias)
    pair = made.pairs[0]
    assert (pair.source, pair.readers, pair.alpha) == ("2", ("3",), alpha)
    assert pair.before == pytest.approx(float(seen.max())) and pair.after == pytest.approx(float((seen / s).max()))
    assert made.left == {"0": "it reads an input of the model"}


def test_scales():
    x, w = torch.tensor([4.0, 0.0, 1e-9, 2.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert torch.allclose(scales(x, w, 0.5), torch.tensor([2.0, 1.0, 1e-5**0.5, 1.0]))
    assert torch.equal(scales(x, w, 1.0)[2:3], torch.tensor([1e-5]))  # the floor
    assert torch.equal(power_of_two(torch.tensor([1.0, 1.4, 1.5, 0.3])), torch.tensor([1.0, 1.0, 2.0, 0.25]))


FAMILIES = [name for name in models.FAMILIES if name != "mixtral"]


SEARCHED = ("llama", "opt", "gpt2")  # norms with a bias and without, gates, ReLU, Conv1D: the others are of these kinds


@pytest.mark.parametrize(
    ("family", "alpha"), [*((name, 0.5) for name in FAMILIES), *((name, "search") for name in SEARCHED)]
)
def test_the_function_stays(family, alpha):
    model = varied(models.FAMILIES[family]()).double()  # some norms compute in float32 all the same
    expected = models.logits(model)
    made = smooth_(model, iter(batches(model)), alpha)  # one pass is enough
    assert ov.sqnr(expected, models.logits(model)) > 100
    assert made.pairs and all(pair.after <= pair.before for pair in made.pairs if pair.alpha == 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_bit_for_bit(dtype):
    model = varied(models.llama()).to(dtype)
    expected = models.logits(model)
    assert len(smooth_(model, batches(model), 0.5).pairs) == 6
    assert torch.equal(models.logits(model), expected)
    assert {x.dtype for x in model.parameters()} == {dtype}


class OnePlus(nn.RMSNorm):
    """Gemma's norm."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_one_plus_weight():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), OnePlus(6), nn.Linear(6, 5)).double()
    nn.init.normal_(model[2].weight)
    x, before = torch.randn(9, 4).double(), model[2].weight.detach().clone()
    expected = model(x)
    smooth_(model, [x])
    assert torch.allclose(model(x), expected, rtol=1e-12) and not torch.allclose(model[2].weight, before)


def test_conv1d_and_chains():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    x = torch.randn(20, 4).double()
    expected = model(x)
    assert [pair.source for pair in smooth_(model, [x]).pairs] == ["0", "2"]
    assert torch.allclose(model(x), expected, rtol=1e-12)
    gpt2 = varied(models.gpt2())
    weight = gpt2.transformer.h[0].attn.c_attn.weight.detach().clone()  # [in, out]
    norm = gpt2.transformer.h[0].ln_1.weight.detach().clone()
    smooth_(gpt2, batches(gpt2))
    s = norm / gpt2.transformer.h[0].ln_1.weight
    torch.testing.assert_close(gpt2.transformer.h[0].attn.c_attn.weight, weight * s[:, None])


def test_outliers_cost_less():
    """Planted in a norm, and taken back out of the weights: the function is what it was, eight bits are not."""
    model = models.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] *= 300
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[:, 5] /= 300
    expected, data = models.logits(model), batches(model)
    plain, smooth, sought = (copy.deepcopy(model) for _ in range(3))
    ov.quantize_(plain, "int8-dynamic")
    summary = ov.quantize_(smooth, [Rule("int8-dynamic", smooth=0.5)], data)
    ov.quantize_(sought, [Rule("int8-dynamic", smooth="search")], data)
    quality = [ov.sqnr(expected, models.logits(x)) for x in (plain, smooth, sought)]
    assert min(quality[1:]) > quality[0] + 10
    assert len(summary.smoothing.pairs) == 6 and "6 pairs are smoothed" in str(summary)
    assert summary.to_json()["smoothing"]["pairs"][0]["alpha"] == 0.5


def test_search_leaves_what_is_best_as_it_is():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 1, bias=False))
    nn.init.ones_(model[3].weight)
    before = state(model)
    made = smooth_(model, [torch.randn(50, 4)], "search", rules=[Rule("e5m2-weight-only", "3")])
    assert made.pairs[0].alpha is None and "left as it is" in str(made)  # powers of two cost nothing: no α is better
    assert same(before, state(model))


@pytest.mark.parametrize("scheme", ["int8-static", "fp8-static", "int8-affine-static", "smoothquant-o3"])
def test_static_scales_are_those_of_the_smoothed_model(scheme):
    model = varied(models.llama())
    data, twin = batches(model), copy.deepcopy(model)
    ov.quantize_(model, [Rule(scheme, smooth=0.5)], iter(data))
    smooth_(twin, data, 0.5, rules=scheme)
    ov.quantize_(twin, ov.schemes.get(scheme), data)
    assert same(state(model), state(twin))


def test_only_some_layers():
    model = varied(models.llama())
    norm = model.model.layers[0].input_layernorm.weight.detach().clone()
    made = smooth_(
        model, batches(model), None, rules=[Rule("int8-dynamic", "*down_proj", smooth=0.4), Rule("int8-dynamic")]
    )
    assert [pair.source for pair in made.pairs] == [f"model.layers.{n}.mlp.up_proj" for n in (0, 1)]
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm) and made.left == {}


def test_a_reader_in_float_follows():
    model = varied(models.llama()).double()
    expected = models.logits(model)
    made = smooth_(model, batches(model), rules={"*.q_proj": "int8-dynamic"})
    assert [len(pair.readers) for pair in made.pairs] == [3, 3]
    assert ov.sqnr(expected, models.logits(model)) > 100


def test_it_saves_and_loads(tmp_path):
    model = varied(models.llama())
    smooth_(model, batches(model))
    model.save_pretrained(tmp_path / "float")
    again = type(model).from_pretrained(tmp_path / "float")
    assert torch.equal(models.logits(model), models.logits(again))
    ov.quantize_(again, [Rule("int8-dynamic", smooth=0.5)], batches(again))
    ov.save(again, tmp_path / "small")
    assert torch.equal(models.logits(ov.load(tmp_path / "small")), models.logits(again))


def nan_norm(model):
    model.model.layers[0].input_layernorm.weight.data[3] = float("nan")


@pytest.mark.parametrize(
    ("rules", "data", "words"),
    [
        ([Rule("int8-dynamic", smooth=0.5)], None, "layers are smoothed .*there is none"),
        ([Rule("int8-dynamic", smooth=0.5)], [], "no batch"),
        ([Rule("int8-dynamic", smooth=0.5)], {"input_ids": torch.ones(1, 4)}, "iterable of batches"),
        ([Rule("int8-static", smooth=0.5)], ov.Calibration({}), "finished Calibration has kept none"),
        ([Rule("int8-dynamic", "*o_proj", smooth=0.5)], "some", "nothing to smooth: .*o_proj: its input comes from"),
        (
            [Rule("int8-dynamic", "*q_proj", smooth=0.5), Rule("int8-dynamic", smooth=0.6)],
            "some",
            r"q_proj: 0\.5, .*k_proj: 0\.6.*give these layers the same smooth",
        ),
        ([Rule("int8-dynamic", "*q_proj", smooth=0.5), Rule("int8-dynamic")], "some", r"q_proj: 0\.5, .*k_proj: none"),
    ],
)
def test_refused_before_anything_changes(rules, data, words):
    model = varied(models.llama())
    before = state(model)
    with pytest.raises(OctavoError, match=words):
        ov.quantize_(model, rules, batches(model) if data == "some" else data)
    assert same(before, state(model)) and not any("octavo" in type(m).__module__ for m in model.modules())


def test_nan_and_failing_data():
    model = varied(models.llama())
    nan_norm(model)
    before = {name: x.nan_to_num(7.0) for name, x in state(model).items()}
    with pytest.raises(OctavoError, match="NaN"):
        smooth_(model, batches(model))
    assert same(before, {name: x.nan_to_num(7.0) for name, x in state(model).items()})


def test_weights_come_back_if_calibration_fails():
    model = varied(models.llama())
    model.extra = nn.Linear(3, 3)  # which no data reaches
    before = state(model)
    with pytest.raises(OctavoError, match="saw no calibration data"):
        ov.quantize_(model, [Rule("int8-static", smooth=0.5)], batches(model))
    assert same(before, state(model))


def test_a_model_that_depends_on_chance():
    class Chance(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + float(torch.tensor(next(self.count)))

    model = Chance(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5))
    model.count = iter(range(100))
    before = state(model)
    with pytest.raises(OctavoError, match="another result when the layers' inputs are the same"):
        smooth_(model, [torch.randn(3, 4)])
    assert same(before, state(model))


def test_what_only_looks_proportional_is_refused_by_name():
    class Square(nn.Module):  # a product of a result with itself, past the trace
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x):
            y = self.a(x)
            return self.b(torch.from_numpy(y.detach().numpy() ** 2) * y)

    model = Square()
    before = state(model)
    with pytest.raises(OctavoError, match="b: scaling the result of a does more than scale its input"):
        smooth_(model, [torch.randn(3, 4)])
    assert same(before, state(model))


def test_other_layers_are_named():
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 5))
    assert smooth_(model, [torch.randn(2, 3, 1)]).left == {"0": "it is no linear layer, and only those are smoothed"}


def test_weights_that_cannot_be_written_to():
    model, data = block(), [torch.randn(7, 4)]
    with torch.inference_mode():
        model[3] = copy.deepcopy(model[3])
    before = state(model)
    with pytest.raises(OctavoError, match=r"3\.weight cannot be written to: Inplace update to inference tensor"):
        smooth_(model, data, 0.5)
    assert same(before, state(model))
    model = block()
    model[2].weight = nn.Parameter(torch.ones(1).expand(6), requires_grad=False)
    with pytest.raises(OctavoError, match=r"2\.weight cannot be written to"):
        smooth_(model, data, 0.5)


def pressing(monkeypatch, places):
    """From now on Ctrl-C is pressed before each of these changes of a weight, counted by calls of ``copy_``."""
    calls, own = [], torch.Tensor.copy_

    def copy_(x, values):
        calls.append(x)
        if len(calls) in places:
            signal.raise_signal(signal.SIGINT)
        return own(x, values)

    def apply(work):
        step = _apply(work)

        def counted():
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "copy_", copy_)
                step()

        return counted

    monkeypatch.setattr("octavo.ptq.smooth._apply", apply)
    return calls


@pytest.mark.parametrize("places", [{1}, {2}, {3}, {4}, {6}, {2, 3, 6}])
def test_an_interrupt_leaves_no_half_of_a_pair(monkeypatch, places):
    model = nn.Sequential(*block(4, 4), *block(4, 4)).eval()
    data = [torch.randn(7, 4)]
    before, whole = state(model), copy.deepcopy(model)
    smooth_(whole, data, 0.5)
    for rules in (None, [Rule("int8-static", smooth=0.5)]):
        model.load_state_dict(before)
        with monkeypatch.context() as patch:
            calls = pressing(patch, places)
            with pytest.raises(KeyboardInterrupt):
                smooth_(model, data, 0.5) if rules is None else ov.quantize_(model, rules, data)
            assert len(calls) > 6
        assert same(state(whole) if rules is None else before, state(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_foreseen_is_what_is_done(dtype):
    model = block().to(dtype)
    data = [torch.randn(7, 4, dtype=dtype), torch.randn(3, 2, 4, dtype=dtype)]
    before = state(model)
    seen = foresee(model, data, [0.3, 0.8])
    assert same(before, state(model))
    assert [pair.readers for pair in seen.pairs] == [("3",)] and "0" in seen.left
    for alpha in (0.3, 0.8):
        twin = copy.deepcopy(model)
        smooth_(twin, data, alpha)
        torch.testing.assert_close(twin[3].weight, (model[3].weight.float() * seen.scales[alpha]["3"]).to(dtype))
    with pytest.raises(OctavoError, match="no batch"):
        foresee(model, [], [0.5])


def test_nothing_is_foreseen_where_nothing_can_be_smoothed():
    seen = foresee(nn.Sequential(nn.Linear(4, 3)), [torch.randn(2, 4)], [0.5])
    assert seen.pairs == () and seen.scales == {0.5: {}} and "0" in seen.left
