"""Q·Kᵀ and P·V in 8 bits, inside transformers' models, against numpy and ml_dtypes."""

import copy
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

import octavo as ov
from octavo.calibration.percentile import Percentile
from octavo.core.cast import Cast, quantize_unchecked, sqnr
from octavo.core.granularity import PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.matmul import matmul
from octavo.core.scaling import Constant, Static
from octavo.errors import OctavoError
from octavo.nn.attention import (
    OPERANDS,
    PROBABILITIES,
    AttentionSummary,
    QuantizedProducts,
    product,
    quantize_attention_,
    restore_attention_,
)
from octavo.nn.kv_cache import KVCache
from tests.nn import models
from tests.nn.test_kv_cache import FAMILIES as DECODERS
from tests.nn.test_kv_cache import IDS, SMALL, make

INT8 = Cast("int8", PerToken())
WIDE = {k: v for k, v in SMALL.items() if "key_value" not in k}
PICTURES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
OWN_ATTENTION = ("falcon", "bloom")
FAMILIES = {
    **{name: family for name, family in DECODERS.items() if name not in OWN_ATTENTION},
    "bert": partial(transformers.BertForMaskedLM, transformers.BertConfig(**models.COMMON, **WIDE)),
    "modernbert": partial(
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig(**models.COMMON, **WIDE, local_attention=8, deterministic_flash_attn=False),
    ),
    "gemma2": partial(make, "Gemma2ForCausalLM", "Gemma2Config", **SMALL, head_dim=16, sliding_window=8),  # soft caps
    "gpt_oss": partial(  # sinks
        make,
        "GptOssForCausalLM",
        "GptOssConfig",
        **SMALL,
        head_dim=16,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "vit": partial(transformers.ViTForImageClassification, transformers.ViTConfig(**PICTURES)),
    "clip": partial(
        transformers.CLIPModel,
        transformers.CLIPConfig(
            text_config={**models.COMMON, **WIDE},
            vision_config=PICTURES,
        ),
    ),
}


def inputs(model):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    words = {"input_ids": IDS, "attention_mask": mask}
    pictures = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    if model.main_input_name == "pixel_values":
        return pictures
    if isinstance(model, transformers.CLIPModel):
        return words | pictures
    return words | ({"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {})


def result(model):
    with torch.no_grad():
        out = model(**inputs(model))
    found = out.logits_per_image if isinstance(model, transformers.CLIPModel) else out.logits
    if found.ndim == 3 and found.shape[1] == IDS.shape[1]:
        return found[:, 4:]  # without the padding, of which nobody expects anything
    return found


def built(name):
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """Unquantized it is the model's own attention; INT8 is near it; static FP8 is calibrated; undoing is exact."""
    model = built(name)
    before, implementation = result(model), model.config._attn_implementation
    summary = quantize_attention_(model, None, None, None, None)
    assert summary.quantized and not summary.left
    torch.testing.assert_close(result(model), before, rtol=1e-4, atol=1e-5)
    restore_attention_(model)
    summary = quantize_attention_(model)
    assert 15 < sqnr(before, result(model)) < 100
    restore_attention_(model)
    static = Cast("e4m3fn", PerChannel(1), Static())
    quantize_attention_(model, static, static, PROBABILITIES, static, [inputs(model)])
    assert 10 < sqnr(before, result(model)) < 100
    restore_attention_(model)
    assert torch.equal(result(model), before)
    assert model.config._attn_implementation == implementation
    assert not any(isinstance(m, QuantizedProducts) for m in model.modules())


def layer(heads=4, kv_heads=2, **how):
    """One attention of a Llama, without its projections: what it multiplies is what it is given."""
    model = models.llama(num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads)
    quantize_attention_(model, **how)
    return model.model.layers[0].self_attn


def attended(module, q, k, v, mask=None, scaling=0.25):
    interface = transformers.AttentionInterface()["octavo"]
    return interface(module, q, k, v, mask, scaling=scaling)[0]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def int8(x, dims):
    scale = np.abs(x).max(dims, keepdims=True) / np.float32(127)
    return np.clip(np.rint(x / scale), -127, 127), scale.astype(np.float64)


def test_int8_is_what_numpy_says():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 16, generator=generator)
    k, v = (torch.randn(2, 2, 9, 16, generator=generator) for _ in range(2))
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    per_head, unsigned = Cast("int8", PerChannel(1)), Cast("uint8", scale=Constant(1 / 255))
    module = layer(query=INT8, key=INT8, probabilities=unsigned, value=per_head)
    got = attended(module, q, k, v, mask).numpy()

    a, b, c = q.numpy(), k.numpy().repeat(2, 1), v.numpy().repeat(2, 1)
    (qc, qs), (kc, ks), (vc, vs) = int8(a, -1), int8(b, -1), int8(c, (0, 2, 3))
    scores = (qc @ kc.swapaxes(-1, -2) * qs * ks.swapaxes(-1, -2)) * 0.25 + mask.numpy()
    p = np.clip(np.rint(softmax(scores) / np.float32(1 / 255)), 0, 255)
    expected = (p @ vc) * vs / 255
    near_ties = 2 / 255 * np.abs(c).max()  # a probability on the other side of a tie moves a result by one step of p
    assert np.abs(got - expected.swapaxes(1, 2)).max() < near_ties
    assert (np.abs(got - expected.swapaxes(1, 2)) < 1e-5).mean() > 0.97


def test_fp8_is_what_ml_dtypes_says():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 7, 16, generator=generator) for _ in range(3))
    one = Cast("e4m3fn", scale=Constant(1.0))
    module = layer(2, 2, query=one, key=one, probabilities=PROBABILITIES, value=one)
    got = attended(module, q, k, v).numpy()

    def fp8(x):
        return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    scores = fp8(q.numpy()) @ fp8(k.numpy()).swapaxes(-1, -2) * 0.25
    p = fp8((softmax(scores) * 448).astype(np.float32)) / 448
    expected = (p @ fp8(v.numpy())).swapaxes(1, 2)
    assert (
        np.abs(got - expected).max() < 0.07 * np.abs(v.numpy()).max()
    )  # a tie that fell otherwise: half a step of 2**-3
    assert (np.abs(got - expected) < 1e-5).mean() > 0.9


CASTS = [
    INT8,
    Cast("int8", PerChannel(1)),
    Cast("int8"),
    Cast("uint8", PerToken(), affine=True),
    Cast("e5m2", PerGroup(16)),
    Cast("int8", PerChannel(3)),
    None,
]


@pytest.mark.parametrize("left", CASTS, ids=repr)
@pytest.mark.parametrize("right", CASTS, ids=repr)
def test_products_are_those_of_matmul(left, right):
    """Also where a scale a token runs along the sum, and the law would sum stretches of one number."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 3, 5, 32, generator=generator), torch.randn(2, 3, 32, 6, generator=generator)
    x = a if left is None else quantize_unchecked(a, left)
    y = b if right is None else quantize_unchecked(b, right)
    torch.testing.assert_close(product(x, y), matmul(x, y), rtol=1e-5, atol=1e-4)


def test_the_scale_of_a_token_is_its_own():
    """Generation with scales a token equals one pass over all of it."""
    model = DECODERS["llama"]()
    quantize_attention_(model)
    tokens = model.generate(IDS, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        at_once = model(input_ids=tokens[:, :-1]).logits[:, IDS.shape[1] - 1 :]
    assert torch.equal(at_once.argmax(-1), tokens[:, IDS.shape[1] :])


def test_with_an_8_bit_cache():
    model = DECODERS["mistral"]()
    quantize_attention_(model)
    tokens = model.generate(IDS, past_key_values=KVCache(model), max_new_tokens=12, do_sample=False)
    assert tokens.shape == (2, 23)


def test_an_even_grid_loses_small_probabilities():
    """Why 1/255 is not the default: of 4096 equal probabilities it keeps none."""
    q, k, v = torch.zeros(1, 4, 1, 16), torch.randn(1, 2, 4096, 16), torch.ones(1, 2, 4096, 16)
    kept = {}
    for how in (Cast("uint8", scale=Constant(1 / 255)), Cast("uint8", PerToken()), PROBABILITIES):
        kept[how] = attended(layer(probabilities=how), q, k, v).mean().item()
    assert [round(x, 2) for x in kept.values()] == [0.0, 1.0, 1.0]


def test_static_scales_are_those_of_the_data():
    model = DECODERS["llama"]()
    how = Cast("int8", PerTensor(), Static())
    seen = []

    def look(module, query, key, value, mask, **kwargs):
        seen.append((query.abs().max(), key.abs().max(), value.abs().max()))
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, mask, **kwargs
        )

    transformers.AttentionInterface.register("looking", look)
    try:
        model.set_attn_implementation("looking")
        result(model)
        model.set_attn_implementation("sdpa")
    finally:
        del transformers.AttentionInterface._global_mapping["looking"]
    quantize_attention_(model, how, how, Cast("uint8", scale=Static()), how, [inputs(model)])
    products = model.model.layers[0].self_attn.quantized_products
    for operand, largest in zip(("query", "key", "value"), seen[0], strict=True):
        scale = products.get_submodule(operand).scale
        torch.testing.assert_close(scale.squeeze(), largest / 127, rtol=1e-4, atol=0)
    assert products.probabilities.scale.item() == pytest.approx(1 / 255)  # the first token sees only itself


def test_other_models_are_not_touched():
    model = DECODERS["llama"]()
    other = type(model)(model.config).eval()  # of the very same config
    before = result(other)
    quantize_attention_(model)
    torch.testing.assert_close(result(other), before, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    assert torch.equal(result(twin), result(model))
    restore_attention_(twin)
    assert sqnr(result(twin), result(model)) < 100


def test_scales_keep_their_dtype_and_stay_out_of_checkpoints():
    model = DECODERS["llama"]()
    how = Cast("e4m3fn", scale=Static())
    quantize_attention_(model, key=how, data=[inputs(model)])
    operand = model.model.layers[0].self_attn.quantized_products.key
    scale = operand.scale.clone()
    model.bfloat16()
    assert torch.equal(operand.scale, scale)
    assert result(model).dtype == torch.bfloat16
    assert not any("quantized_products" in name for name in model.state_dict())
    assert "E4M3FN" in repr(model)


def test_with_quantized_layers():
    model = DECODERS["llama"]()
    ov.quantize_(model, "int8-dynamic")
    before = result(model)
    quantize_attention_(model)
    assert 20 < sqnr(before, result(model)) < 100


def test_calibration_obeys_the_observer():
    scales = []
    for observer in (None, Percentile(90.0)):
        model = built("llama")
        quantize_attention_(model, query=Cast("int8", scale=Static()), data=[inputs(model)], observer=observer)
        scales.append(model.model.layers[0].self_attn.quantized_products.query.scale)
    assert scales[1] < scales[0]


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_an_attention_of_their_own(name):
    model = DECODERS[name]()
    with pytest.raises(OctavoError, match=r"AttentionInterface \((Falcon|Bloom)Attention multiplies by itself\)"):
        quantize_attention_(model)


class Odd(torch.nn.Module):
    """An attention that no interface knows."""


def test_what_was_left_is_named():
    model = DECODERS["llama"]()
    model.OwnAttention = type("OwnAttention", (Odd,), {})()
    summary = quantize_attention_(model)
    assert list(summary.left) == ["OwnAttention"]
    assert "OwnAttention does not go through" in str(summary)
    assert str(AttentionSummary(["a"], {})) == "1 attention modules in 8 bits, 0 left"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"query": "int8"}, "query is a Cast"),
        ({"key": Cast("uint8", PerToken())}, "key: UINT8 drops negative numbers"),
        ({"value": Cast("int8", PerChannel(9))}, "value: PerChannel"),
        ({"key": Cast("int8", PerToken(), Static()), "data": [{}]}, "key: a static scale serves all tokens"),
        ({"key": Cast("int8", scale=Static())}, "pass data=batches"),
        ({"key": Cast("int8", scale=Static()), "data": []}, "no batch"),
        ({"key": Cast("int8", scale=Static()), "data": [{"input_ids": IDS}, 3]}, "a batch is a tensor"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_leaves_the_model_as_it_was(how, words):
    model = DECODERS["llama"]()
    before = result(model)
    with pytest.raises(OctavoError, match=words):
        quantize_attention_(model, **how)
    assert torch.equal(result(model), before)
    assert not any(isinstance(m, QuantizedProducts) for m in model.modules())
    quantize_attention_(model)


def test_data_that_misses_a_tower():
    model = built("clip")
    static = Cast("int8", scale=Static())
    vision = [{"pixel_values": inputs(model)["pixel_values"]}]
    with pytest.raises(OctavoError, match=r"no data reached text_model.*quantized_products\.query"):
        quantize_attention_(model, query=static, data=vision, call=lambda m, b: m.get_image_features(**b))
    assert model.config.text_config._attn_implementation != "octavo"


def test_twice_and_never():
    model = DECODERS["llama"]()
    with pytest.raises(OctavoError, match="no attention in 8 bits"):
        restore_attention_(model)
    with pytest.raises(OctavoError, match="not a transformers model"):
        quantize_attention_(torch.nn.Linear(2, 2))
    quantize_attention_(model)
    with pytest.raises(OctavoError, match="already"):
        quantize_attention_(model)
    model.train()
    with pytest.raises(OctavoError, match=r"model\.eval"):
        result(model)


def test_an_attention_with_other_products_is_an_error():
    module = layer()
    module.quantized_products.plain = lambda module, q, k, v, mask, **_: (q @ k.mT @ v @ v.mT, None)
    with pytest.raises(OctavoError, match="has 3 matrix products"):
        attended(module, *(torch.randn(1, 4, 6, 6) for _ in range(3)))
    assert set(dict(module.quantized_products.named_children())) == set(OPERANDS)
