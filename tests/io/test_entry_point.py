"""Models, data and measures that live in the user's Python code."""

import sys
import textwrap

import pytest
import torch
from torch import nn

from octavo.errors import OctavoError
from octavo.io import entry_point

CODE = """
    import torch
    from torch import nn

    class Inside:
        @staticmethod
        def net():
            return nn.Sequential(nn.Linear(4, 2))

    def net():
        return nn.Sequential(nn.Linear(4, 2)).train()

    def both():
        return net(), [torch.zeros(1, 4)]

    ready = nn.Sequential(nn.Linear(4, 2))
    listed = [torch.zeros(1, 4)]
    number = 3

    def batches():
        return (torch.zeros(1, 4) for _ in range(2))

    def tensor():
        return torch.zeros(1, 4)

    def nothing():
        return None

    def fails():
        raise ValueError("no such disk")

    def needs(argument):
        return net()

    def score(model):
        return torch.tensor(0.5)

    def text(model):
        return "0.5"

    def many(model):
        return torch.zeros(3)

    def nan(model):
        return float("nan")

    def true(model):
        return True
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with a module, a package, and some that fail."""
    (tmp_path / "visionary.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/__init__.py").write_text("")
    (tmp_path / "packed/inner.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "crooked.py").write_text("def f(:")
    (tmp_path / "raising.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("visionary", "packed", "broken", "crooked", "raising"):
            del sys.modules[name]


@pytest.mark.parametrize("text", ["a:b", "a.b.c:d", "a:b.c", "_x1:_y"])
def test_reads_as_one(text):
    assert entry_point.is_entry_point(text)


@pytest.mark.parametrize(
    "text", ["", "demo", "a:", ":b", "a.b", "org/model", "a:b:c", "a b:c", "1a:b", "C:\\x", "./a:b"]
)
def test_does_not(text):
    assert not entry_point.is_entry_point(text)


def test_a_file_of_that_name_goes_first(place):
    (place / "a:b").mkdir()
    assert not entry_point.is_entry_point("a:b")


@pytest.mark.parametrize("text", ["visionary:net", "visionary:ready", "packed.inner:net", "visionary:Inside.net"])
def test_models(place, text):
    model, batches = entry_point.model(text)
    assert isinstance(model, nn.Sequential)
    assert not model.training
    assert batches is None


def test_models_with_data(place):
    model, batches = entry_point.model("visionary:both")
    assert isinstance(model, nn.Module)
    assert len(batches) == 1


def test_data(place):
    assert len(list(entry_point.data("visionary:listed"))) == 1
    assert len(list(entry_point.data("visionary:batches"))) == 2


def test_measures(place):
    score = entry_point.measure("visionary:score")(nn.Identity())
    assert (type(score), score) == (float, 0.5)


@pytest.mark.parametrize(
    ("use", "text", "message"),
    [
        (entry_point.model, "visionari:net", "there is no module visionari. Did you mean visionary?"),
        (entry_point.model, "qwzx:net", "there is no module qwzx. Modules are looked for in"),
        (entry_point.model, "packed.iner:net", "there is no module packed.iner. Did you mean packed.inner?"),
        (entry_point.model, "visionary.net:net", "visionary.net cannot be imported"),
        (entry_point.model, "visionary:nett", "visionary has no nett. Did you mean net?"),
        (entry_point.model, "visionary:Inside.nett", "has no Inside.nett. Did you mean net?"),
        (entry_point.model, "visionary", "not of the form package.module:function"),
        (entry_point.model, "visionary:nothing", "returned None, not an nn.Module"),
        (entry_point.model, "visionary:listed", "is a list, not a function"),
        (entry_point.model, "visionary:fails", "visionary:fails failed with ValueError: no such disk"),
        (entry_point.model, "visionary:needs", "failed with TypeError: needs() missing 1 required"),
        (entry_point.model, "visionary:tensor", "returned a Tensor, not an nn.Module"),
        (entry_point.model, "broken:net", "failed with ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        (entry_point.model, "crooked:net", "importing crooked failed with SyntaxError"),
        (entry_point.model, "raising:net", "importing raising failed with ZeroDivisionError"),
        (entry_point.data, "visionary:tensor", "gave a Tensor for data, not an iterable of batches"),
        (entry_point.data, "visionary:number", "gave a int for data"),
        (entry_point.data, "visionary:nothing", "gave None for data"),
        (entry_point.measure, "visionary:number", "is a int, not a function that takes the model"),
    ],
)
def test_errors_name_what_is_missing(place, use, text, message):
    with pytest.raises(OctavoError) as caught:
        use(text)
    assert message in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "returned a str, not one number"),
        ("many", "returned a Tensor, not one number"),
        ("true", "returned a bool, not one number"),
        ("nan", "returned NaN"),
        ("net", "failed with TypeError"),
    ],
)
def test_measures_that_are_none(place, name, message):
    judge = entry_point.measure(f"visionary:{name}")
    with pytest.raises(OctavoError, match=message):
        judge(nn.Identity())


def test_the_current_folder_goes_first(place):
    assert entry_point.find("visionary:number") == 3
    assert sys.path[0] == str(place)
    assert torch.is_tensor(entry_point.find("visionary:listed")[0])
