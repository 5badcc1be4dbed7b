"""8-bit embedding tables against torch's own on the dequantized table, alone and in models that share them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import octavo as ov
from octavo import Cast, OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Rule, Scheme
from octavo.core import schemes
from octavo.core.cast import quantize_unchecked
from octavo.nn import swap
from octavo.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag, multiplier_of
from tests.nn import models

GRANULARITIES = [PerChannel(0), PerChannel(1), PerTensor(), PerGroup(4), PerBlock(5, 3), PerToken()]
SCHEMES = [
    *(Scheme(Cast("INT8", granularity)) for granularity in GRANULARITIES),
    Scheme(Cast("INT8", PerBlock(4, 4), affine=True)),
    Scheme(Cast("UINT8", affine=True)),
    *(Scheme(Cast("E4M3FN", granularity)) for granularity in GRANULARITIES),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def table_of(layer, scheme):
    return quantize_unchecked(layer.weight.detach(), scheme.weight, layer.weight.dtype).dequantize()


def twin_of(layer, scheme):
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(table_of(layer, scheme), requires_grad=False)
    return twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_of_the_dequantized_table(scheme, dtype):
    layer = nn.Embedding(23, 10, padding_idx=3).to(dtype)
    ours = QuantizedEmbedding.from_float(layer, scheme)
    assert torch.equal(ours.weight, table_of(layer, scheme))
    twin = twin_of(layer, scheme)
    for indices in (
        torch.randint(23, (4, 7)),
        torch.randint(23, (5,), dtype=torch.int32),
        torch.tensor(22),
        torch.arange(23)[None].T,
        torch.empty(0, 3, dtype=torch.int64),
    ):
        y = ours(indices)
        assert y.dtype == dtype
        assert torch.equal(y, twin(indices))
    assert not ours(torch.tensor([3])).any()  # the padding row


def test_sizes_at_the_edge():
    for rows, dim in ((1, 1), (7, 0), (0, 5), (300, 1)):
        layer = nn.Embedding(rows, dim)
        for scheme in SCHEMES:
            ours = QuantizedEmbedding.from_float(layer, scheme)
            indices = torch.arange(rows).view(1, -1)
            assert torch.equal(ours(indices), twin_of(layer, scheme)(indices))


def test_indices_that_do_not_fit():
    ours = QuantizedEmbedding.from_float(nn.Embedding(5, 4), schemes.INT8_WEIGHT_ONLY)
    for index in (5, -1):
        with pytest.raises(IndexError, match="out of range"):
            ours(torch.tensor([index]))
    with pytest.raises(RuntimeError, match="indices"):
        ours(torch.tensor([1.0]))


@st.composite
def bags(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    rows, mode = draw(st.integers(1, 9)), draw(st.sampled_from(["sum", "mean", "max"]))
    last = draw(st.booleans())
    padding = draw(st.sampled_from([None, 0, rows - 1, -1]))
    layer = nn.EmbeddingBag(rows, 6, mode=mode, include_last_offset=last, padding_idx=padding)
    nn.init.normal_(layer.weight, generator=generator)
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    if draw(st.booleans()) and not last:
        indices, offsets = (
            torch.randint(rows, (draw(st.integers(0, 4)), draw(st.integers(1, 5))), generator=generator),
            None,
        )
    else:
        lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
        indices = torch.randint(rows, (sum(lengths),), generator=generator)
        offsets = torch.tensor([0, *lengths]).cumsum(0)[: len(lengths) + last].to(dtype)
    weights = torch.randn(indices.shape, generator=generator) if mode == "sum" and draw(st.booleans()) else None
    return layer, indices.to(dtype), offsets, weights


@settings(max_examples=150, deadline=None)
@given(bags(), st.sampled_from(SCHEMES))
def test_bags_of_the_dequantized_table(case, scheme):
    layer, indices, offsets, weights = case
    ours = QuantizedEmbeddingBag.from_float(layer, scheme)
    expected = twin_of(layer, scheme)(indices, offsets, weights)
    torch.testing.assert_close(ours(indices, offsets, weights), expected, rtol=1e-6, atol=1e-6)


def test_bags_in_sixteen_bits():
    layer = nn.EmbeddingBag(30, 8, mode="sum", padding_idx=2).bfloat16()
    ours = QuantizedEmbeddingBag.from_float(layer, schemes.FP8_WEIGHT_ONLY)
    indices = torch.randint(30, (4, 5))
    y = ours(indices, per_sample_weights=torch.rand(4, 5).bfloat16())
    assert y.dtype == torch.bfloat16
    assert ov.sqnr(layer(indices), ours(indices)) > 20


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_an_obstacle(make):
    model = nn.ModuleDict({"table": make(8, 4, max_norm=1.0), "out": nn.Linear(4, 4)})
    with pytest.raises(OctavoError, match="table: max_norm changes its weight"):
        ov.quantize_(model, {"table": "int8-dynamic"})
    ov.quantize_(nn.Sequential(make(8, 4, sparse=True)), {"0": "int8-dynamic"})


def test_the_scheme_is_that_of_the_weight():
    """Row numbers have no scale: dynamic and static schemes mean the same here, and need no data."""
    for name in ("int8-dynamic", "int8-static", "int8-affine-static", "int8-weight-only", "w8a16"):
        model = nn.Sequential(nn.Embedding(50, 16))
        summary = ov.quantize_(model, {"0": name})
        assert summary.quantized[0].scheme == "int8-weight-only"
        assert model[0].scheme == schemes.INT8_WEIGHT_ONLY
    with pytest.raises(OctavoError, match="0: INT16 is no 8-bit format"):
        ov.quantize_(nn.Sequential(nn.Embedding(50, 16)), {"0": "w16a8"})


def test_recommenders_tables_in_half_the_memory():
    model = nn.ModuleDict({"users": nn.EmbeddingBag(1000, 64), "films": nn.Embedding(500, 64)}).bfloat16()
    summary = ov.quantize_(model, [Rule("fp8-dynamic", type="Embedding"), Rule("int8-dynamic", type="EmbeddingBag")])
    assert summary.bytes_before == 1500 * 64 * 2
    assert summary.bytes_after == 1500 * (64 + 4)  # codes, and a scale a row
    assert all(layer.sqnr > 30 for layer in summary.quantized)


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        return self.out(self.items(x)) @ self.items.weight.T


def test_only_by_name_or_type():
    left = ov.quantize_(Recommender(), "int8-dynamic").left
    assert [(x.name, x.reason) for x in left] == [
        ("items", "embedding, left in float unless a rule gives its exact name or its type")
    ]
    assert [x.name for x in ov.quantize_(Recommender(), {"*": "int8-dynamic"}).quantized] == ["out"]
    assert [x.name for x in ov.quantize_(Recommender(), {"it*": "fp8-dynamic", "*": "int8-dynamic"}).left] == ["items"]
    for rules in (
        {"items": "int8-dynamic", "*": "int8-dynamic"},
        {"*": "int8-dynamic", "items": "int8-dynamic"},  # an exact name goes before patterns
        [Rule("int8-dynamic", type="Embedding"), Rule("int8-dynamic")],
    ):
        model = Recommender()
        expected = model(torch.arange(50))
        assert len(ov.quantize_(model, rules).quantized) == 2
        assert isinstance(model.items, QuantizedEmbedding)
        assert ov.sqnr(expected, model(torch.arange(50))) > 30  # which reads the table past its forward, too


class Offset(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


class Remembering(nn.Embedding):
    """One row is another than in the table."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.special = 7

    def forward(self, input):
        return super().forward(input) * (1 + (input == self.special).float()[..., None])


class Soft(nn.Embedding):
    """Ovis's: takes probabilities too."""

    def forward(self, input):
        return input @ self.weight if input.is_floating_point() else super().forward(input)


class Doubling(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input) if self.training else super().forward(input)


class Normed(nn.Embedding):
    def forward(self, input):
        return F.layer_norm(super().forward(input), (self.embedding_dim,))


class Extended(nn.Embedding):
    """IDEFICS's: rows of a second table."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Embedding(*sizes)

    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize("kind", [Offset, Remembering, Soft, Doubling, Normed, Extended])
def test_subclasses_that_do_something_else(kind):
    assert swap.layers(nn.Sequential(kind(70, 8)))[0].obstacle == (
        f"{kind.__name__} overrides Embedding.forward with something else"
    )


def test_positions_are_no_rows():
    assert swap.layers(nn.Sequential(BartLearnedPositionalEmbedding(70, 8)))[0].obstacle is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.1, math.sqrt(1152.0), -3.0])
@pytest.mark.parametrize("kind", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_scaled_word_embeddings(kind, scale, dtype):
    model = nn.Sequential(kind(90, 48, padding_idx=80, embed_scale=scale)).to(dtype)
    layer, indices = model[0], torch.randint(90, (3, 7))
    twin = twin_of(layer, schemes.INT8_WEIGHT_ONLY)
    on_meta = swap.layers(copy.deepcopy(model).to("meta"))[0]
    assert on_meta.obstacle is None
    ov.quantize_(model, {"0": "int8-dynamic"})
    assert torch.equal(model[0](indices), twin(indices))
    assert f"multiplier={model[0].multiplier:g}" in repr(model) or scale == 1


def test_multiplier_does_not_touch_the_layer():
    layer = Gemma3TextScaledWordEmbedding(90, 8, 0, 5.5)
    before, state = layer.weight, torch.random.get_rng_state()
    assert multiplier_of(layer) == 5.5
    assert layer.weight is before
    assert layer.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert multiplier_of(nn.Embedding(3, 3)) == 1


def test_codes_and_scales_survive():
    layer = nn.Embedding(30, 8)
    ours = QuantizedEmbedding.from_float(layer, schemes.FP8_WEIGHT_ONLY)
    indices = torch.arange(30)
    assert ours.bfloat16()(indices).dtype == torch.bfloat16
    assert ours.scale.dtype == torch.float32
    assert torch.equal(ours.float()(indices), table_of(layer, schemes.FP8_WEIGHT_ONLY))
    assert not list(ours.parameters())
    assert repr(ours) == "QuantizedEmbedding(30, 8, fp8-weight-only)"
    bag = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(30, 8, padding_idx=2), schemes.FP8_WEIGHT_ONLY)
    assert repr(bag) == "QuantizedEmbeddingBag(30, 8, padding_idx=2, fp8-weight-only, mode='mean')"


@torch.no_grad()
def test_a_table_that_the_output_head_shares():
    indices = torch.randint(models.VOCABULARY, (2, 9))
    name = "model.embed_tokens"

    float_model = models.tied_llama()
    expected, size = float_model(indices).logits, sum(p.nbytes for p in float_model.parameters())
    model = copy.deepcopy(float_model)
    summary = ov.quantize_(model, {name: "int8-dynamic"})
    assert summary.notes == [f"{name} shared its weight with lm_head, which keeps its own copy in float"]
    assert ov.sqnr(expected, model(indices).logits) > 30
    assert summary.bytes_after > size  # as the note says

    model = copy.deepcopy(float_model)
    summary = ov.quantize_(model, {name: "int8-dynamic", "lm_head": "int8-dynamic"})
    assert not summary.notes
    assert model.lm_head.codes is model.get_input_embeddings().codes
    assert ov.sqnr(expected, model(indices).logits) > 25
    table = model.lm_head.codes.numel()
    assert summary.bytes_after == summary.bytes_before - 4 * table + table + 4 * len(model.lm_head.codes)

    model = copy.deepcopy(float_model)
    summary = ov.quantize_(model, {name: "int8-dynamic", "lm_head": "fp8-dynamic"})
    assert summary.notes == [f"lm_head shared its weight with {name}, which keeps its own copy in INT8"]
    assert ov.sqnr(expected, model(indices).logits) > 20

    model = copy.deepcopy(float_model)
    summary = ov.quantize_(model, {"lm_head": "fp8-dynamic"})
    assert summary.notes == [f"lm_head shared its weight with {name}, which keeps its own copy in float"]


@torch.no_grad()
def test_an_encoder_and_a_decoder_share_one_table():
    model, indices = models.t5(), torch.randint(models.VOCABULARY, (2, 9))
    expected = model(input_ids=indices, decoder_input_ids=indices).logits
    tables = [name for name, module in model.named_modules() if getattr(module, "weight", None) is model.shared.weight]
    assert {"shared", "encoder.embed_tokens", "decoder.embed_tokens"} < set(tables)
    summary = ov.quantize_(model, dict.fromkeys(tables, "int8-dynamic"))
    assert not summary.notes
    assert len({id(model.get_submodule(name).codes) for name in tables}) == 1
    assert ov.sqnr(expected, model(input_ids=indices, decoder_input_ids=indices).logits) > 30
