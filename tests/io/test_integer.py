"""Folders of integer-only models: ``octavo.load`` opens them, ``octavo.save`` says who writes them."""

import pytest
import torch
from torch import nn

import octavo as ov
from octavo import OctavoError


def test_load_opens_them(tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(4, 6)]
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    integers = ov.integer_only(model, batches)
    with pytest.raises(OctavoError, match="save_integer"):
        ov.save(integers, tmp_path / "model", layout="octavo")
    ov.save_integer(integers, tmp_path / "model")
    assert torch.equal(ov.load(tmp_path / "model")(batches[0]), integers(batches[0]))
