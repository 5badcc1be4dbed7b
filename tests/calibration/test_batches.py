"""How batches of every kind enter a model, and what the model is like before and after."""

from collections import UserDict

import pytest
import torch
from torch import nn

from octavo import OctavoError
from octavo.calibration.batches import enter, evaluating, several


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout()

    def forward(self, a, b, c=0):
        return a + 10 * b + 100 * c


class Open(nn.Module):
    def forward(self, **kwargs):
        return sorted(kwargs)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((ONE, 2 * ONE), 21),
        ([ONE, 2 * ONE, "label"], 21),
        ({"a": ONE, "b": ONE, "c": 3}, 311),
        (UserDict(b=ONE, a=2 * ONE), 12),
    ],
)
def test_kinds_of_batches(batch, expected):
    assert enter(Sum(), batch) == expected


def test_tensors_open_signatures_and_own_calls():
    assert enter(nn.ReLU(), -ONE) == 0
    assert enter(nn.ReLU(), (-ONE, "label")) == 0
    assert enter(Open(), {"anything": 1, "goes": 2}) == ["anything", "goes"]
    assert enter(Sum(), "7", lambda model, batch: model(int(batch), 0)) == 7


def test_wrappers_take_what_is_within():
    for wrapper in (nn.DataParallel(Sum()), torch.compile(Sum(), backend="eager")):
        assert enter(wrapper, (ONE, 2 * ONE, "label")) == 21
        with pytest.raises(OctavoError, match="has labels, which"):
            enter(wrapper, {"a": ONE, "labels": ONE})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((ONE,), "has 1 parts, Sum.forward needs 2"),
        ({"a": ONE, "labels": ONE}, r"has labels, which Sum.forward does not take \(a, b, c\)"),
        ("text", "not str; say how to call"),
        (None, "not NoneType"),
    ],
)
def test_batches_that_do_not_fit(batch, message):
    with pytest.raises(OctavoError, match=message):
        enter(Sum(), batch)


def test_batches_go_to_the_model():
    model = nn.Linear(2, 2, device="meta")
    x = torch.ones(3, 2)
    assert enter(model, x).is_meta and enter(model, {"input": x}).is_meta and enter(model, (x, "label")).is_meta


def test_one_batch_is_not_several():
    data = [ONE]
    assert several(data) is data
    for wrong in (ONE, {"a": ONE}, UserDict(a=ONE), None, 3):
        with pytest.raises(OctavoError, match="put it into a list"):
            several(wrong)


def test_modes_come_back():
    model = Sum().train()
    model.inner.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / model.training
    assert model.training and not model.inner.training
