"""What a hostile reading of the first release found; each stays mended."""

import math

import pytest
import torch
from torch import nn

import octavo as ov
from octavo.core.cast import quantize_unchecked

FORMATS = ov.formats


def test_a_scale_rounded_up_does_not_make_infinities():
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    layer[1].weight.data[0, 0] = 65504.0
    ov.quantize_(layer, "int8-weight-only")
    assert layer[1].weight.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.tensor([torch.finfo(dtype).max, 1.0], dtype=dtype)
        for fmt in (FORMATS.INT8, FORMATS.E4M3FN, FORMATS.E3M4):
            for scale in (ov.Current(), ov.Current(power_of_two=True)):
                assert ov.fake_quantize(x, ov.Cast(fmt, scale=scale)).isfinite().all()
    assert ov.sqnr(torch.ones(2), torch.tensor([math.inf, 1.0])) == -math.inf


@pytest.mark.parametrize("size", [1e-13, 1e-20, 1e-30])
def test_small_tensors_keep_their_precision(size):
    x = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert ov.sqnr(x, quantize_unchecked(x, ov.Cast(FORMATS.INT8, ov.PerToken())).dequantize()) > 35


def test_unsigned_numbers_are_refused_where_signs_would_be_lost():
    with pytest.raises(ov.OctavoError, match="UINT8 drops negative numbers"):
        ov.schemes.dynamic("uint8")


@pytest.mark.parametrize("rounding", ["up", "down", "toward-zero", "nearest-even", "nearest-away"])
def test_fractional_biases_round_trip(rounding):
    fmt = FORMATS.float_format(4, 3, 2.5)
    for dtype in (torch.float32, torch.float64):
        values = fmt.values().to(dtype)
        assert ov.cast(values, fmt, rounding).equal(values)


def test_unsigned_formats_have_no_negative_infinity():
    fmt = FORMATS.float_format(4, 3, 7, "ieee", signed=False)
    assert ov.cast(torch.tensor([-1.0]), fmt, overflow="nonsaturating").isnan().all()


def test_formats_of_zero_alone_cannot_be():
    with pytest.raises(ov.OctavoError, match="no number but zero"):
        FORMATS.float_format(1, 1, 0, "ieee", subnormals=False)
    with pytest.raises(ov.OctavoError, match="bit counts"):
        FORMATS.float_format(2000, 3)


def test_uneven_integers_keep_both_signs():
    fmt = FORMATS.IntegerFormat("uneven", -8, 127)
    x = torch.linspace(-1, 1, 65)
    assert ov.sqnr(x, ov.fake_quantize(x, ov.Cast(fmt))) > 20


def test_empty_matrices_in_batches():
    how = ov.Cast(FORMATS.INT8)
    assert ov.matmul(torch.randn(2, 0, 13), torch.randn(13, 4), lhs=how, rhs=how).shape == (2, 0, 4)


class Adapter(nn.Linear):
    """A fresh LoRA: its forward is a plain linear until it is trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-6, 6))


class Plain(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_only_classes_that_compute_a_linear_layer_are_replaced():
    model = nn.Sequential(Adapter(8, 8), Clamped(8, 8), Plain(8, 8))
    done = {x.name: x.scheme for x in ov.quantize_(model, "int8-dynamic").layers}
    assert done == {"0": None, "1": None, "2": "int8-dynamic"}


def test_falcon_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    model = transformers.FalconForCausalLM(config).eval()
    ov.quantize_(model, "int8-dynamic")
    ids = torch.arange(20)[None]
    for layout in ("compressed-tensors", "octavo"):
        ov.save(model, tmp_path / layout, layout=layout)
        assert torch.equal(ov.load(tmp_path / layout)(ids).logits, model(ids).logits)


def test_mixed_dtypes_come_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=96
    )
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    model.model.norm.float()
    ov.quantize_(model, "fp8-dynamic")
    ov.save(model, tmp_path / "x")
    assert ov.load(tmp_path / "x").model.norm.weight.dtype == torch.float32


def test_force_spares_what_is_not_a_checkpoint(tmp_path):
    from octavo.io.folder import check_output

    (tmp_path / "config.json").write_text("{}")
    check_output(tmp_path, force=True)
    (tmp_path / "notes.docx").write_text("precious")
    with pytest.raises(ov.OctavoError, match=r"notes\.docx"):
        check_output(tmp_path, force=True)


def test_intricate_patterns_are_refused():
    from octavo.io.compressed_tensors import _named

    assert _named(r"re:.*\.q_proj$", "model.q_proj")
    with pytest.raises(ov.OctavoError, match="too intricate"):
        _named(r"re:((\w+\.?)+)+!", "a" * 40)
