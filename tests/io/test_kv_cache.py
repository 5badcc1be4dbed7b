"""Static scales of a KV cache, saved and loaded: the same numbers here, the same logits in transformers."""

import json
import math
import shutil
from functools import partial

import pytest
import safetensors.torch
import torch
import transformers

import octavo as ov
from octavo import Cast, OctavoError, OctavoWarning, PerChannel, PerTensor, PerToken, Static
from octavo.io import checkpoint, kv_cache
from octavo.nn.kv_cache import KVCache
from octavo.nn.kv_calibration import calibrate_kv_cache_
from octavo.nn.kv_scales import KVScales
from tests.nn import models

CT = "compressed-tensors"
IDS = torch.randint(3, models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))
E4M3, INT8 = Cast("E4M3FN", PerTensor(), Static()), Cast("INT8", PerTensor(), Static())
A_HEAD = Cast("INT8", PerChannel(1), Static())
AFFINE = Cast("UINT8", PerChannel(3), Static(), affine=True)
NAME = "model.layers.0.self_attn"


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def calibrated(model, keys, values, scheme="fp8-weight-only"):
    ov.quantize_(model, scheme)
    data = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {})}
    calibrate_kv_cache_(model, [data], keys, values)
    return model


def cached(model):
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, past_key_values=KVCache(model), **more).logits


def scales(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, KVScales)}


def same(model, again):
    ours, theirs = scales(model), scales(again)
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        other = theirs[name]
        assert (one.part, one.index, one.keys, one.values) == (other.part, other.index, other.keys, other.values)
        for a, b in zip(one.buffers(), other.buffers(), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    assert torch.equal(cached(model), cached(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("keys", "values", "fits"),
    [
        (E4M3, E4M3, True),
        (INT8, INT8, True),
        (A_HEAD, A_HEAD, True),
        (E4M3, INT8, False),
        (E4M3, None, False),
        (INT8, Cast("INT8", PerToken()), False),
        (AFFINE, AFFINE, False),
        (Cast("E5M2", PerTensor(), Static()), Cast("E5M2", PerTensor(), Static()), False),
    ],
    ids=["E4M3FN", "INT8", "a head", "unlike", "keys", "dynamic values", "affine", "E5M2"],
)
def test_there_and_back(keys, values, fits, dtype, tmp_path):
    model = calibrated(models.llama().to(dtype), keys, values)
    layout, why = checkpoint.layout_for(model)
    assert (layout == CT) == fits
    for each in {"octavo", layout}:
        ov.save(model, tmp_path / each, layout=each)
        same(model, ov.load(tmp_path / each))
    if not fits:
        assert why.startswith(f"{NAME}: the layout")
        with pytest.raises(OctavoError, match=rf"{NAME}: the layout"):
            ov.save(model, tmp_path / "refused")


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2", "t5"])
def test_families(family, tmp_path):
    model = calibrated(models.FAMILIES[family](), INT8, AFFINE)
    ov.save(model, tmp_path / "out", layout="octavo")
    same(model, ov.load(tmp_path / "out"))
    assert len(scales(model)) == (4 if family == "t5" else 2)


def test_cross_attention_is_not_in_the_public_layout(tmp_path):
    model = calibrated(models.t5(), E4M3, E4M3)
    with pytest.raises(OctavoError, match=r"EncDecAttention: .* not for that of cross-attention"):
        ov.save(model, tmp_path / "out")


def test_a_config_that_the_library_cannot_use(tmp_path):
    model = calibrated(models.opt(), E4M3, E4M3)
    assert checkpoint.layout_for(model)[0] == "octavo"
    with pytest.raises(OctavoError, match="num_key_value_heads"):
        ov.save(model, tmp_path / "out")


@pytest.mark.parametrize("how", [E4M3, INT8, A_HEAD], ids=["E4M3FN", "INT8", "INT8 a head"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers(family, how, tmp_path):
    model = calibrated(models.FAMILIES[family](), how, how)
    ov.save(model, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert told["strategy"] == ("attn_head" if how is A_HEAD else "tensor")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    for name, one in scales(model).items():
        module = theirs.get_submodule(name.removesuffix(".kv_scales"))
        assert torch.equal(module.k_scale.flatten(), one.k_scale.flatten())
        assert torch.equal(module.v_scale.flatten(), one.v_scale.flatten())
    with torch.no_grad():
        assert ov.sqnr(theirs(IDS).logits, cached(model)) > 60 > ov.sqnr(model(IDS).logits, cached(model))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    for layout in checkpoint.LAYOUTS:
        ov.save(calibrated(models.llama(), E4M3, E4M3), root / layout, layout=layout)
    ov.save(calibrated(models.llama(), AFFINE, AFFINE), root / "affine", layout="octavo")
    return root


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda which: shutil.copytree(folders / which, tmp_path / which)


def edited(folder, change_json=None, change_tensors=None, file="octavo.json"):
    if change_json is not None:
        content = json.loads((folder / file).read_text())
        change_json(content)
        (folder / file).write_text(json.dumps(content))
    if change_tensors is not None:
        weights = next(iter(folder.glob("*.safetensors")))
        tensors = safetensors.torch.load_file(weights)
        change_tensors(tensors)
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    return folder


OWN, PUBLIC = f"{NAME}.kv_scales.k_scale", f"{NAME}.k_scale"
NUMBERS = {
    "NaN": lambda t: t * math.nan,
    "infinite": lambda t: t / 0,
    "zero": torch.zeros_like,
    "negative": lambda t: -t,
    "two": lambda t: torch.cat([t, t]),
    "none": lambda t: t[:0],
    "integers": lambda t: t.int(),
}


@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_damaged_scales(layout, what, copy_of):
    name = OWN if layout == "octavo" else PUBLIC
    folder = edited(copy_of(layout), change_tensors=lambda t: t.__setitem__(name, NUMBERS[what](t[name])))
    with pytest.raises(OctavoError, match=rf"{name} is no (scale|tensor) for"):
        ov.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(OWN),
        lambda t: t.pop(OWN.replace("k_scale", "k_zero_point")),
        lambda t: t.__setitem__(f"{NAME}.kv_scales.q_scale", torch.ones(1)),
        lambda t: t[OWN.replace("k_scale", "k_zero_point")].fill_(256),
        lambda t: t[OWN.replace("k_scale", "k_zero_point")].fill_(-1),
        lambda t: t.__setitem__(OWN, t[OWN].flatten()),
        lambda t: t.__setitem__(OWN, t[OWN].transpose(1, 3).contiguous()),
    ],
)
def test_damaged_tensors(change, copy_of):
    folder = edited(copy_of("affine"), change_tensors=change)
    with pytest.raises(OctavoError):
        ov.load(folder)


def record(manifest):
    return manifest["kv_cache"][NAME]


MANIFESTS = {
    "a list": lambda m: m.update(kv_cache=[1]),
    "null": lambda m: m.update(kv_cache=None),
    "a word": lambda m: m.update(kv_cache={NAME: "x"}),
    "no module": lambda m: m["kv_cache"].update({"model.layers.9": record(m)}),
    "forgotten": lambda m: m["kv_cache"].pop(NAME),
    "another part": lambda m: record(m).update(part="other"),
    "part is a list": lambda m: record(m).update(part=["self"]),
    "index is a word": lambda m: record(m).update(index="0"),
    "index is true": lambda m: record(m).update(index=True),
    "no keys": lambda m: record(m).pop("keys"),
    "keys are a scheme": lambda m: record(m).update(keys=ov.to_json(ov.schemes.INT8_DYNAMIC)),
    "keys are null": lambda m: record(m).update(keys=None),
    "keys of 16 bits": lambda m: record(m)["keys"].update(format={"type": "Format", "name": "INT16"}),
    "keys a token": lambda m: record(m)["keys"].update(granularity={"type": "PerToken"}),
    "keys from anywhere": lambda m: record(m)["keys"].update(type="os.system"),
    "dynamic keys": lambda m: record(m).update(keys=ov.to_json(Cast("INT8", PerToken()))),
    "a negative index": lambda m: record(m).update(index=-1),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_hostile_manifests(what, copy_of):
    folder = edited(copy_of("octavo"), MANIFESTS[what])
    with pytest.raises(OctavoError):
        ov.load(folder)


def test_manifests_of_before_know_no_cache(tmp_path):
    model = models.llama()
    ov.quantize_(model, "int8-dynamic")
    ov.save(model, tmp_path / "out", layout="octavo")
    again = ov.load(edited(tmp_path / "out", lambda m: m.pop("kv_cache")))
    assert torch.equal(models.logits(model), models.logits(again))


def cache(config):
    return config["quantization_config"]["kv_cache_scheme"]


CONFIGS = {
    "a word": lambda c: c["quantization_config"].update(kv_cache_scheme="fp8"),
    "four bits": lambda c: cache(c).update(num_bits=4),
    "another type": lambda c: cache(c).update(type="posit"),
    "type is a list": lambda c: cache(c).update(type=["int"]),
    "zero points": lambda c: cache(c).update(type="int", symmetric=False),
    "a channel": lambda c: cache(c).update(strategy="channel"),
    "no strategy": lambda c: cache(c).pop("strategy"),
    "forgotten": lambda c: c["quantization_config"].pop("kv_cache_scheme"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_hostile_configs(what, copy_of):
    folder = edited(copy_of(CT), CONFIGS[what], file="config.json")
    with pytest.raises(OctavoError):
        ov.load(folder)


def test_scales_that_the_files_lack(tmp_path):
    model = models.llama()
    ov.quantize_(model, "fp8-dynamic")
    ov.save(model, tmp_path / "out")
    told = kv_cache.public_scheme(scales(calibrated(models.llama(), E4M3, E4M3)))
    change = partial(edited, file="config.json")
    change(tmp_path / "out", lambda c: c["quantization_config"].update(kv_cache_scheme=told))
    with pytest.raises(OctavoError, match="lack k_scale and v_scale"):
        ov.load(tmp_path / "out")
    change(tmp_path / "out", lambda c: c["quantization_config"].update(kv_cache_scheme={**told, "dynamic": True}))
    with pytest.warns(OctavoWarning, match="kv_cache_scheme is dynamic"):
        assert scales(ov.load(tmp_path / "out")) == {}
