"""The 8-bit cache in transformers' hands, against its own caches fed with quantized keys and values."""

import copy
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

import octavo as ov
from octavo.calibration.minmax import MinMax
from octavo.calibration.percentile import Percentile
from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked
from octavo.core.granularity import PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.scaling import Static
from octavo.errors import OctavoError
from octavo.nn.kv_cache import EncoderDecoderKVCache, KVCache
from octavo.nn.kv_calibration import calibrate_kv_cache_
from octavo.nn.kv_layers import QuantizedDynamicLayer, QuantizedHybridLayer, QuantizedSlidingWindowLayer
from octavo.nn.kv_scales import KVScales
from octavo.nn.token_store import TokenStore
from tests.nn import models

INT8, E4M3 = Cast("int8", PerToken()), Cast("e4m3fn", PerToken())
SMALL = {**models.SMALL, "max_position_embeddings": 128, "num_key_value_heads": 2}
IDS = torch.randint(3, models.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


def make(kind, config, **settings):
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**models.COMMON, **settings})).eval()
    model.generation_config.eos_token_id = None  # all sequences are as long as asked for
    return model


def plain(family):
    model = family()
    model.generation_config.eos_token_id = None
    return model


FAMILIES = {
    "llama": partial(plain, models.llama),
    "gpt2": partial(plain, models.gpt2),
    "opt": partial(plain, models.opt),
    "gpt_neox": partial(
        make, "GPTNeoXForCausalLM", "GPTNeoXConfig", **{k: v for k, v in SMALL.items() if "key_value" not in k}
    ),
    "falcon": partial(
        make, "FalconForCausalLM", "FalconConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "bloom": partial(make, "BloomForCausalLM", "BloomConfig", hidden_size=64, n_layer=2, n_head=4),
    "mistral": partial(make, "MistralForCausalLM", "MistralConfig", **SMALL, sliding_window=8),
    "gemma3": partial(
        make,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **SMALL,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": partial(
        make,
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "falcon_h1": partial(
        make,
        "FalconH1ForCausalLM",
        "FalconH1Config",
        **SMALL,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_chunk_size=8,
    ),
    "t5": partial(
        make,
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": partial(
        make,
        "BartForConditionalGeneration",
        "BartConfig",
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
}
DECODERS = [name for name in FAMILIES if name not in ("t5", "bart")]


def rounded(x, how):
    return quantize_unchecked(x, how, x.dtype).dequantize()


class Rounding(DynamicCache):
    """transformers' own cache, given keys and values that are rounded already."""

    def __init__(self, config, keys, values):
        super().__init__(config=config)
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded_states = rounded(key_states, self.keys), rounded(value_states, self.values)
        return super().update(*rounded_states, layer_idx, *args, **kwargs)


def oracle(model, keys, values):
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(Rounding(config, keys, values), Rounding(config, keys, values))
    return Rounding(config, keys, values)


def logits(model, ids, cache, **more):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits


def written(model, cache, ids=IDS, tokens=12, **how):
    return model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, **how)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("keys", "values"), [(INT8, INT8), (E4M3, Cast("int8", PerGroup(8)))], ids=["int8", "mixed"])
def test_generates_as_with_rounded_keys_and_values(name, keys, values):
    model = FAMILIES[name]()
    how = {"output_scores": True, "return_dict_in_generate": True}
    mine = written(model, KVCache(model, keys, values), **how)
    other = written(model, oracle(model, keys, values), **how)
    assert torch.equal(mine.sequences, other.sequences)
    for a, b in zip(mine.scores, other.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    exact = written(model, None, **how)
    assert any(not torch.equal(a, b) for a, b in zip(mine.scores, exact.scores, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_go_on_from_the_right_keys(name):
    model = FAMILIES[name]()
    beams = {"num_beams": 3, "num_return_sequences": 3, "tokens": 8}
    mine, other = written(model, KVCache(model), **beams), written(model, oracle(model, INT8, INT8), **beams)
    assert torch.equal(mine, other)


@pytest.mark.parametrize("name", DECODERS)
def test_one_pass_and_many_are_the_same(name):
    model = FAMILIES[name]()
    tokens = written(model, KVCache(model))
    at_once = logits(model, tokens[:, :-1], KVCache(model))
    assert torch.equal(at_once[:, IDS.shape[1] - 1 :].argmax(-1), tokens[:, IDS.shape[1] :])
    cache = KVCache(model)
    parts = torch.cat([logits(model, part, cache) for part in tokens[:, :-1].split([5, 1, 9, 7], 1)], 1)
    torch.testing.assert_close(parts, at_once, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == tokens.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
def test_padding_changes_nothing(name):
    model = FAMILIES[name]()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[1:, :7]], 1)
    mask = (padded != 0).long()
    both = {"attention_mask": torch.cat([torch.ones_like(IDS[:1]), mask])}
    batch = written(model, KVCache(model), torch.cat([IDS[:1], padded]), **both)
    assert torch.equal(batch[:1], written(model, KVCache(model), IDS[:1]))
    assert torch.equal(batch[1:, 4:], written(model, KVCache(model), IDS[1:, :7]))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_goes_on_across_calls_and_can_be_copied(name):
    model = FAMILIES[name]()
    cache = KVCache(model)
    first = written(model, cache, tokens=5)
    kept = copy.deepcopy(cache)
    second = written(model, cache, first, tokens=5)
    assert torch.equal(second, written(model, KVCache(model), tokens=10))
    assert torch.equal(written(model, kept, first, tokens=5), second)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(written(model, cache, tokens=10), second)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_crop_takes_tokens_back(name):
    model = FAMILIES[name]()
    cache = KVCache(model)
    cache.activate_past_recording()
    logits(model, IDS[:, :6], cache)
    before = logits(model, IDS[:, 6:8], copy.deepcopy(cache))
    logits(model, IDS[:, 3:], cache)
    cache.crop(-(IDS.shape[1] - 3))
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(logits(model, IDS[:, 6:8], cache), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(OctavoError, match="negative"):
        cache.crop(3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_guessed_tokens_are_taken_back(name):
    """Prompt lookup guesses, checks, and crops."""
    model = FAMILIES[name]()
    ids = torch.cat([IDS[:1], IDS[:1]], 1)
    guessed = written(model, KVCache(model), ids, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, written(model, KVCache(model), ids))


@pytest.mark.parametrize("window", [None, 5, 2])
@pytest.mark.parametrize("seed", range(6))
def test_layers_do_what_transformers_layers_do(window, seed):
    """Any order of updates, crops, beams and resets leaves what transformers' own layer has of rounded tensors."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    stores = (TokenStore("keys", INT8), TokenStore("values", E4M3))
    mine = QuantizedDynamicLayer(*stores) if window is None else QuantizedSlidingWindowLayer(*stores, window)
    other = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    batch = 2
    if window is not None:
        mine.activate_past_recording()
        other.activate_past_recording()
    for _ in range(40):
        act = chance.choice(["update"] * 5 + ["crop", "reorder", "repeat", "select", "reset"])
        if act == "update":
            count = chance.choice([1, 1, 2, 7])
            k, v = (torch.randn(batch, 3, count, 8, generator=generator) for _ in range(2))
            got, expected = mine.update(k, v), other.update(rounded(k, INT8), rounded(v, E4M3))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert mine.get_mask_sizes(3) == other.get_mask_sizes(3)
        elif act == "crop" and other.is_initialized:
            removed = -chance.randint(0, min(3, other.keys.shape[-2] - 1))
            mine.crop(removed)
            other.crop(removed)
        elif act == "reorder":
            index = torch.randint(batch, (batch,), generator=generator)
            mine.reorder_cache(index)
            other.reorder_cache(index)
        elif act == "repeat" and other.get_seq_length():
            mine.batch_repeat_interleave(2)
            other.batch_repeat_interleave(2)
            batch *= 2
        elif act == "select" and other.get_seq_length():
            keep = torch.randint(batch, (2,), generator=generator)
            mine.batch_select_indices(keep)
            other.batch_select_indices(keep)
            batch = 2
        elif act == "reset":
            mine.reset()
            other.reset()
            if window is not None:  # transformers' layer is to be used for another text of any batch
                assert mine.record_past == other.record_past
        assert mine.get_seq_length() == other.get_seq_length()
        if other.get_seq_length():
            assert torch.equal(mine.keys, other.keys)
            assert torch.equal(mine.values, other.values)


def test_a_window_that_moved_on_cannot_go_back():
    model = FAMILIES["mistral"]()
    cache = KVCache(model)
    logits(model, IDS, cache)
    with pytest.raises(OctavoError, match="activate_past_recording"):
        cache.crop(-1)


def test_layers_follow_the_model():
    kinds = {name: {type(x) for x in KVCache(FAMILIES[name]()).layers} for name in DECODERS}
    assert kinds["llama"] == {QuantizedDynamicLayer}
    assert kinds["mistral"] == {QuantizedSlidingWindowLayer}
    assert kinds["gemma3"] == {QuantizedDynamicLayer, QuantizedSlidingWindowLayer}
    assert kinds["falcon_h1"] == {QuantizedHybridLayer}
    model = FAMILIES["t5"]()
    cache = KVCache(model)
    assert isinstance(cache, EncoderDecoderKVCache) and isinstance(cache, EncoderDecoderCache)
    written(model, cache)
    assert cache.nbytes == cache.self_attention_cache.nbytes + cache.cross_attention_cache.nbytes > 0


def test_a_decoder_deeper_than_its_encoder():
    settings = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 4}
    model = make("T5ForConditionalGeneration", "T5Config", **settings, decoder_start_token_id=0)
    assert written(model, KVCache(model)).shape == (2, 13)


def test_half_the_memory():
    model = FAMILIES["llama"]().bfloat16()
    model.config.max_position_embeddings = 4096
    cache, other = KVCache(model), DynamicCache(config=model.config)
    ids = IDS.repeat(1, 100)[:, :1024]
    for c in (cache, other):
        logits(model, ids, c)
    float_bytes = sum(x.keys.nbytes + x.values.nbytes for x in other.layers)
    assert cache.nbytes == float_bytes * (16 + 2) // 32  # 16 codes a head and token, and a scale
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_keys_alone_and_values_alone():
    model = FAMILIES["llama"]()
    exact = DynamicCache(config=model.config)
    logits(model, IDS, exact)
    for keys, values in ((INT8, None), (None, INT8)):
        cache = KVCache(model, keys, values)
        logits(model, IDS, cache)
        first = cache.layers[0]
        assert torch.equal(first.keys, exact.layers[0].keys) == (keys is None)
        assert torch.equal(first.values, exact.layers[0].values) == (values is None)


def test_a_config_is_enough_and_values_follow_the_keys():
    model = FAMILIES["gpt2"]()
    cache = KVCache(model.config, E4M3)
    assert [store.how for store in cache.layers[0].stores] == [E4M3, E4M3]
    assert torch.equal(written(model, cache), written(model, KVCache(model, E4M3, E4M3)))


def test_with_quantized_layers():
    model = FAMILIES["llama"]()
    ov.quantize_(model, "int8-dynamic")
    assert written(model, KVCache(model)).shape == (2, 23)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.bert, "BertForSequenceClassification looks at all tokens at once"),
        (lambda: torch.nn.Linear(2, 2), "a transformers model or its config, not Linear"),
        (
            lambda: transformers.ViTModel(
                transformers.ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
            ),
            "ViTModel keeps no keys and values",
        ),
    ],
)
def test_models_without_a_cache(model, words):
    with pytest.raises(OctavoError, match=words):
        KVCache(model())


def test_casts_that_do_not_fit():
    model = FAMILIES["llama"]()
    with pytest.raises(OctavoError, match=r"the values of layer 0: .* at most 8 bits"):
        KVCache(model, INT8, Cast("fp16", PerToken()))
    with pytest.raises(OctavoError, match=r"the keys of layer 0: .*shares a scale between tokens"):
        KVCache(model, Cast("int8"))
    with pytest.raises(OctavoError, match="keys is a Cast"):
        KVCache(model, "int8")
    with pytest.raises(OctavoError, match="needs a calibrated model"):
        KVCache(model, Cast("int8", scale=Static()))


def test_nan_names_the_layer():
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(OctavoError, match=r"the values of layer 1: .* NaN or Inf"):
        logits(model, IDS, KVCache(model))


def test_another_batch_in_the_same_cache():
    model = FAMILIES["llama"]()
    cache = KVCache(model)
    logits(model, IDS, cache)
    with pytest.raises(OctavoError, match="the keys of layer 0 were"):
        logits(model, IDS[:1], cache)


def batches_for(model):
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return [{"input_ids": IDS, **more}, {"input_ids": IDS.flip(1), **more}]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1)], ids=repr)
def test_static_scales_are_those_of_the_data(name, granularity):
    model = FAMILIES[name]()
    how = Cast("e4m3fn", granularity, Static())
    batches = batches_for(model)
    calibrate_kv_cache_(model, batches, how, how)
    config = model.config.get_text_config(decoder=True)
    caches = []
    for batch in batches:
        halves = [DynamicCache(config=config) for _ in range(2)]
        cache = EncoderDecoderCache(*halves) if model.config.is_encoder_decoder else halves[0]
        logits(model, batch["input_ids"], cache, **{k: v for k, v in batch.items() if k != "input_ids"})
        caches.append({"self": halves[0], "cross": halves[1]})
    found = {name: m for name, m in model.named_modules() if isinstance(m, KVScales)}
    assert len(found) == sum(1 for x in caches[0]["self"].layers) * (1 + model.config.is_encoder_decoder)
    for module_name, scales in found.items():
        assert "attention" in module_name.lower() or "attn" in module_name
        layers = [cache[scales.part].layers[scales.index] for cache in caches]
        if getattr(layers[0], "is_sliding", False):
            continue  # the cache has forgotten what the calibration saw
        dims = (0, 1, 2, 3) if granularity == PerTensor() else (0, 2, 3)
        keys, values = (torch.cat([getattr(x, side) for x in layers]) for side in ("keys", "values"))
        torch.testing.assert_close(scales.k_scale, keys.abs().amax(dims, keepdim=True) / 448)
        torch.testing.assert_close(scales.v_scale, values.abs().amax(dims, keepdim=True) / 448)
    cache = KVCache(model)
    written(model, cache, tokens=4)
    half = cache.cross_attention_cache if model.config.is_encoder_decoder else cache
    store = getattr(half.layers[0], "attention", half.layers[0]).stores[0]
    assert set(store.parts) == {"codes"}
    assert store.how == how


def test_static_codes_are_those_of_quantize_scaled():
    model = FAMILIES["llama"]()
    how = Cast("int8", PerChannel(1), Static(), affine=True)
    calibrate_kv_cache_(model, batches_for(model), how, INT8)
    scales = model.model.layers[1].self_attn.kv_scales
    cache, exact = KVCache(model), DynamicCache(config=model.config)
    states = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda *_: states.append(cache.layers[1].keys))
    logits(model, IDS, cache)
    hook.remove()
    logits(model, IDS, Spy(exact, states))
    expected = quantize_scaled(states[1], how, scales.k_scale, scales.k_zero_point).dequantize()
    # layer 1 sees what layer 0's rounding left: a little apart
    assert (states[0] - expected).abs().max() < 2 * scales.k_scale.max()
    assert cache.layers[1].stores[1].how == INT8


class Spy(DynamicCache):
    def __init__(self, like, states):
        super().__init__()
        self.states = states

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 1:
            self.states.append(key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def test_calibration_obeys_the_observer_and_leaves_no_trace():
    model = FAMILIES["llama"]()
    how = Cast("int8", PerTensor(), Static())
    before = logits(model, IDS, None)
    calibrate_kv_cache_(model, batches_for(model), how, None, Percentile(90.0))
    narrow = model.model.layers[0].self_attn.kv_scales.k_scale.clone()
    assert model.model.layers[0].self_attn.kv_scales.v_scale is None
    calibrate_kv_cache_(model, batches_for(model), how, None, MinMax())
    assert narrow < model.model.layers[0].self_attn.kv_scales.k_scale
    assert torch.equal(logits(model, IDS, None), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("scale" in key for key in model.state_dict())


def test_calibrated_models_are_copied_converted_and_saved(tmp_path):
    model = FAMILIES["llama"]()
    how = Cast("e4m3fn", PerChannel(1), Static())
    calibrate_kv_cache_(model, batches_for(model), how, how)
    expected = written(model, KVCache(model))
    assert torch.equal(written(copy.deepcopy(model), KVCache(model)), expected)
    scale = model.model.layers[0].self_attn.kv_scales.k_scale.clone()
    assert torch.equal(copy.deepcopy(model).bfloat16().model.layers[0].self_attn.kv_scales.k_scale, scale)
    half = copy.deepcopy(model).bfloat16()
    assert written(half, KVCache(half)).shape == expected.shape
    ov.quantize_(model, "fp8-dynamic")
    ov.save(model, tmp_path / "saved")
    assert isinstance(ov.load(tmp_path / "saved"), transformers.LlamaForCausalLM)


def test_calibration_that_cannot_be():
    model = FAMILIES["llama"]()
    static = Cast("int8", scale=Static())
    with pytest.raises(OctavoError, match="needs no calibration"):
        calibrate_kv_cache_(model, [IDS], INT8, INT8)
    with pytest.raises(OctavoError, match=r"keys: .* at most 8 bits"):
        calibrate_kv_cache_(model, [IDS], Cast("int16", scale=Static()), None)
    with pytest.raises(OctavoError, match="no batch"):
        calibrate_kv_cache_(model, [], static, static)
    with pytest.raises(OctavoError, match="batches"):
        calibrate_kv_cache_(model, IDS, static, static)
    assert not any(isinstance(m, KVScales) for m in model.modules())
    calibrate_kv_cache_(model, [IDS], static, INT8)
    with pytest.raises(OctavoError, match="are calibrated for"):
        KVCache(model, Cast("e4m3fn", scale=Static()))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(OctavoError, match="keys_1"):
        calibrate_kv_cache_(model, [IDS], static, static)


def test_importing_octavo_does_not_import_transformers():
    code = "import sys; from octavo import *; import octavo; dir(octavo); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
