"""Folders of models with convolutions and embedding tables in 8 bits: the same model again, bit for bit."""

import pytest
import torch
import transformers
from torch import nn

import octavo as ov
from octavo import Cast, OctavoError, PerGroup, PerTensor, PerToken, Rule, Scheme
from octavo.io import checkpoint
from octavo.nn.conv import QuantizedConv, QuantizedConvTranspose
from octavo.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from octavo.nn.layer import QuantizedLayer

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(24).view(2, 12) + 3
SCHEMES = {
    "int8-dynamic": "int8-dynamic",
    "fp8-weight-only": "fp8-weight-only",
    "int8-affine-static": "int8-affine-static",
    "groups": Scheme(Cast("INT8", PerGroup(5), affine=True), Cast("E4M3FN", PerGroup(7))),
    "affine": Scheme(Cast("E3M4", PerTensor()), Cast("UINT8", PerToken(), affine=True)),
}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config), {"pixel_values": IMAGES}


def vit():
    sizes = dict(image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1)
    return transformers.ViTForImageClassification(config), {"pixel_values": IMAGES}


def wav2vec2():
    """Convolutions in one dimension, one of them with weight norm and groups."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        vocab_size=20,
    )
    return transformers.Wav2Vec2ForCTC(config), {"input_values": SOUND}


def bart():
    """A table that is multiplied, and serves as the output head too."""
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=32,
        scale_embedding=True,
    )
    return transformers.BartForConditionalGeneration(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def gemma():
    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return transformers.Gemma3ForCausalLM(config), {"input_ids": TOKENS}


def rules_for(model, scheme):
    """Everything, tables too."""
    tables = {kind for kind in (nn.Embedding, nn.EmbeddingBag) for m in model.modules() if isinstance(m, kind)}
    return [*(Rule(scheme, type=kind.__name__) for kind in tables), Rule(scheme)]


@torch.no_grad()
def outputs(model, inputs):
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model(**given).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-affine-static"])
@pytest.mark.parametrize("family", [resnet, vit, wav2vec2, bart, gemma], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:.*tied weights mapping:octavo.OctavoWarning")
def test_families(family, scheme, dtype, tmp_path):
    torch.manual_seed(0)
    model, inputs = family()
    model = model.to(dtype).eval()
    data = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}] if "static" in scheme else None
    expected = outputs(model, inputs)
    summary = ov.quantize_(model, rules_for(model, scheme), data)
    assert {"Conv1d", "Conv2d", "Embedding"} & {x.kind.replace("Parametrized", "") for x in summary.quantized} or (
        "ScaledWordEmbedding" in " ".join(x.kind for x in summary.quantized)
    )
    y = outputs(model, inputs)
    assert ov.sqnr(expected, y) > 10
    checkpoint.save(model, tmp_path / "out", layout="octavo")
    again = checkpoint.load(tmp_path / "out")
    a, b = model.state_dict(), again.state_dict()
    assert set(a) == set(b)
    assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(outputs(again, inputs), y)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 12, padding_idx=0)
        self.bag = nn.EmbeddingBag(20, 12, mode="sum", padding_idx=1)
        self.conv = nn.Conv1d(12, 12, 3, padding="same", padding_mode="circular")
        self.depthwise = nn.Conv1d(12, 12, 4, 2, 3, groups=12, bias=False)
        self.up = nn.ConvTranspose1d(12, 6, 4, 2, 1, groups=3)
        self.out = nn.Linear(6, 4)

    def forward(self, ids):
        x = self.table(ids) + self.bag(ids)[:, None]
        return self.out(self.up(self.depthwise(self.conv(x.mT)).relu()).mT)


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEMES)
def test_a_model_of_ones_own(name, tmp_path):
    ids = torch.randint(20, (3, 9))
    model, fresh = Everything().eval(), Everything()
    data = [ids] if "static" in name else None
    ov.quantize_(model, rules_for(model, SCHEMES[name]), data)
    kinds = {type(m) for m in model.modules() if isinstance(m, QuantizedLayer)}
    assert {QuantizedConv, QuantizedConvTranspose, QuantizedEmbedding, QuantizedEmbeddingBag} < kinds
    checkpoint.save(model, tmp_path / "out", layout="octavo")
    assert torch.equal(checkpoint.load(tmp_path / "out", fresh)(ids), model(ids))


def test_a_weight_that_is_computed(tmp_path):
    def build():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), nn.Conv1d(4, 4, 1))

    model, x = build(), torch.randn(2, 4, 9)
    ov.quantize_(model, "int8-dynamic")
    checkpoint.save(model, tmp_path / "out", layout="octavo")
    assert torch.equal(checkpoint.load(tmp_path / "out", build())(x), model(x))
    del model
    halved = build()
    ov.quantize_(halved, {"1": "int8-dynamic"})
    checkpoint.save(halved, tmp_path / "half", layout="octavo")
    with pytest.raises(OctavoError, match=r"lacks 0\.weight"):
        checkpoint.load(tmp_path / "half", nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1)))


def test_the_public_layout_has_linear_layers_only(tmp_path):
    for name in ("conv", "table"):
        model = Everything()
        ov.quantize_(model, {name: "int8-dynamic"})
        with pytest.raises(OctavoError, match=f"{name}: the layout has linear layers.*layout='octavo'"):
            checkpoint.save(model, tmp_path / "out")
        assert checkpoint.layout_for(model)[0] == "octavo"


def test_another_architecture(tmp_path):
    model = Everything()
    ov.quantize_(model, rules_for(model, "int8-dynamic"))
    checkpoint.save(model, tmp_path / "out", layout="octavo")
    other = Everything()
    other.conv = nn.Conv1d(12, 12, 5, padding="same")
    with pytest.raises(OctavoError, match=r"conv\.codes is torch\.int8 \[12, 36\]"):
        checkpoint.load(tmp_path / "out", other)
    other = Everything()
    del other.table
    with pytest.raises(OctavoError, match="Everything has no layer table"):
        checkpoint.load(tmp_path / "out", other)
