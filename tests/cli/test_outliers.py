"""``octavo inspect MODEL --outliers``."""

import pytest
import torch

from octavo.analysis import outliers
from octavo.report import outliers as report
from octavo.report import plots
from tests.analysis.test_outliers import tokens
from tests.nn import models

MODEL = "tests.cli.test_outliers:large"


def large():
    """A model with an outlier dimension, and data for it."""
    model = models.llama()
    for block in model.model.layers:
        block.input_layernorm.weight.data[5] = 40.0
    return model, [{"input_ids": tokens()}]


def test_json(octavo):
    told = octavo("inspect", MODEL, "--outliers", "--json").json
    assert [d["index"] for d in told["dimensions"] if d["systematic"]] == [5]
    assert (told["threshold"], told["width"], told["blocks"]) == (6.0, 64, 3)
    assert len(told["inputs"]) == 14


def test_words_and_pictures(octavo, tmp_path):
    page, picture = tmp_path / "o.html", tmp_path / "o.png"
    said = octavo("inspect", MODEL, "--outliers", "--threshold", "7", "--html", page, "--png", picture).out
    assert "in many layers and tokens (LLM.int8()): 5" in said
    assert "model.layers.0.self_attn.q_proj and 2 more" in said
    assert "with magnitudes above 7" in said
    assert b"Crest factors" in page.read_bytes()
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["o-dimensions.png", "o-stream.png", "o-tails.png"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--threshold", "3"], "--threshold is for --outliers"),
        (["--outliers", "--input"], "does not go with --input"),
        (["--outliers", "--tensors"], "does not go with --tensors"),
        (["--outliers", "--threshold", "-1"], "positive number"),
        (["--outliers", "--png", "x.html"], "must end in .png"),
    ],
)
def test_refusals(octavo, flags, why):
    done = octavo("inspect", MODEL, *flags)
    assert done.code == 2
    assert why in done.err


def test_nothing_large_can_be_drawn():
    found = outliers.find_outliers(models.Plain(), [torch.zeros(3, 20)])
    assert report.tables(found)[0].rows == ()
    for plot in report.plots(found):
        assert plots.png(plot).startswith(b"\x89PNG")
