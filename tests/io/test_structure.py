"""Models with folded BatchNorms and fused ReLUs, loaded into the architectures they came from."""

import json

import pytest
import torch
import transformers
from torch import nn

import octavo as ov
from octavo import OctavoError
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.fold import fold_batch_norms_, fuse_relu_

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A CNN with everything that folding and fusing may change."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.own = nn.Identity()
        self.plain = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Hardtanh(-1, 0.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.own(self.plain(self.body(self.stem(x)))).mean((2, 3)))


def build():
    model = Small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


def finished():
    model = build()
    fold_batch_norms_(model, X)
    ov.quantize_(model, {"plain*": None, "*": "int8-static"}, [X])
    fuse_relu_(model, X)
    return model


def test_there_and_back(tmp_path):
    model = finished()
    ov.save(model, tmp_path / "out", layout="octavo")
    again = ov.load(tmp_path / "out", build())
    assert torch.equal(again(X), model(X))
    assert str(again) == str(model)
    assert again.stem[0].clamp == (0.0, float("inf"))
    assert again.body[0].clamp == (0.0, 6.0)
    assert isinstance(again.plain[0], nn.Conv2d)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    fold = build()
    fold_batch_norms_(fold, X)
    assert torch.equal(ov.load(tmp_path / "out", fold)(X), model(X))


def test_transformers(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=3, num_labels=4
    )
    model = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(2, 3, 32, 32)
    fold_batch_norms_(model, x)
    ov.quantize_(model, "int8-static", [x])
    fuse_relu_(model, x)
    changed = [m for m in model.modules() if isinstance(m, QuantizedLayer) and m.bias is not None]
    assert len(changed) > 4
    ov.save(model, tmp_path / "out", layout="octavo")
    again = ov.load(tmp_path / "out")
    assert torch.equal(again(x).logits, model(x).logits)
    assert str(again) == str(model)


CHANGES = {
    "a list": lambda s: [1],
    "null": lambda s: None,
    "identities is a number": lambda s: {**s, "identities": 3},
    "no module": lambda s: {**s, "identities": ["stem.9"]},
    "a list in it": lambda s: {**s, "identities": [["stem.1"]]},
    "the model itself": lambda s: {**s, "identities": [""]},
    "a layer": lambda s: {**s, "identities": [*s["identities"], "stem.0"]},
    "a part with layers": lambda s: {**s, "identities": [*s["identities"], "stem"]},
    "a float layer": lambda s: {**s, "identities": [*s["identities"], "plain.0"]},
    "forgotten": lambda s: {**s, "identities": []},
    "clamps is a list": lambda s: {**s, "clamps": [1]},
    "clamps a float layer": lambda s: {**s, "clamps": {"plain.0": [0, 1]}},
    "clamps nothing": lambda s: {**s, "clamps": {"stem.9": [0, 1]}},
    "one end": lambda s: {**s, "clamps": {"stem.0": [0]}},
    "a word": lambda s: {**s, "clamps": {"stem.0": ["low", "high"]}},
    "upside down": lambda s: {**s, "clamps": {"stem.0": [1, 0]}},
    "NaN": lambda s: {**s, "clamps": {"stem.0": [float("nan"), 0]}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_hostile_manifests(what, tmp_path):
    ov.save(finished(), tmp_path / "out", layout="octavo")
    file = tmp_path / "out" / "octavo.json"
    manifest = json.loads(file.read_text())
    manifest["structure"] = CHANGES[what](manifest["structure"])
    file.write_text(json.dumps(manifest))
    with pytest.raises(OctavoError):
        ov.load(tmp_path / "out", build())


def test_another_architecture(tmp_path):
    ov.save(finished(), tmp_path / "out", layout="octavo")
    model = build()
    model.plain[1] = nn.LayerNorm(4)
    del model.stem[2]
    with pytest.raises(OctavoError, match="another architecture"):
        ov.load(tmp_path / "out", model)
