"""The page of speeds, made of tiny layers and a tiny model: every section is measured, merged and drawn."""

import argparse
import json
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import performance
from octavo.analysis.bench import roofline
from octavo.analysis.bench.race import Race, Timing, Work
from tests.nn import models


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(performance, "WEIGHTS", ((16, 24),))
    monkeypatch.setattr(performance, "ROWS", (1, 128))
    monkeypatch.setattr(performance, "NAMES", ["int8-dynamic", "int8-weight-only", "fp8-dynamic"])
    monkeypatch.setattr(performance, "NUMBERS", 1 << 8)
    monkeypatch.setattr(performance, "open_model", lambda name: SimpleNamespace(model=models.llama()))
    monkeypatch.setattr(performance, "bar", lambda items, label: items)
    monkeypatch.setattr(torch, "compile", lambda model, **told: model)  # minutes, and not what is tested
    monkeypatch.setattr(performance.Children, "apart", lambda children, entered: entered)  # nor are processes
    monkeypatch.setattr(roofline, "measure", lambda: roofline.Roofline(1e10, {"INT8": 1e12, "BF16": 1e12}))
    monkeypatch.setattr(roofline, "cache_size", lambda: 1)
    return tmp_path


def run(monkeypatch, place, *sections):
    words = ["performance", *sections, "--repeats", "1", "--no-peers", "--docs", str(place)]
    monkeypatch.setattr("sys.argv", words)
    performance.main()
    return json.loads((place / "performance.json").read_text()), (place / "performance.md").read_text()


def test_sections_merge(small, monkeypatch):
    told, _ = run(monkeypatch, small, "casts", "gemm")
    kept = told["casts"]
    told, page = run(monkeypatch, small, "model", "others", "compiled")
    assert told["casts"] == kept
    assert told["gemm"]["targets"][0]["measured"] > 0
    by = {
        target["what"]: target["measured"]
        for name in ("model", "others", "compiled")
        for target in told[name]["targets"]
    }
    assert by["int8-dynamic, prefill, to BF16"] > 0
    assert by["int8-dynamic, decode, to torchao int8-dynamic"] is None
    assert by["int8-dynamic, compiled, prefill, to BF16, compiled"] > 0
    assert len(re.findall(r"^## ", page, re.MULTILINE)) == 6  # the targets, and five sections
    assert page.index("## Gemm") < page.index("## Model") < page.index("## Casts")
    assert "| [others](#others) | int8-dynamic, decode, to torchao int8-dynamic | ≥ 5 × | – | not measured |" in page
    assert "`python -m benchmarks.performance casts`" in page
    assert "int8-dynamic, compiled, head too" in page
    assert "Measured roofline: memory" in page


def test_streaming(monkeypatch):
    found = {"bytes": 6e9, "copy_megabytes_per_second": 500.0}
    for ratio, name in zip((0.7, 0.5, 0.6), performance.streaming.SCHEMES, strict=True):
        found[name] = {"megabytes_per_second": 350.0, "ratio_to_copy": ratio, "peak_memory_bytes": 0.4e9 / (1 - ratio)}
    monkeypatch.setattr(performance.streaming, "run", lambda *_: found)
    section = performance.stream(argparse.Namespace(folder=None, gigabytes=6, repeats=None))
    assert [target.verdict for target in section.targets] == ["met", "met", "**missed**", "met", "met", "met"]
    assert section.targets[1].row[1] == "≤ 1.5 GB"
    assert performance.Target("memory", 1.5, 1.6, "GB", most=True).verdict == "**missed**"


def test_ratios_of_what_is_missing():
    race = Race("a")
    race.timings = [Timing("t", "a", Work(1, ""), seconds=[2.0]), Timing("t", "b", Work(1, ""), reason="no")]
    assert performance.ratio(race, "t", "a", "b") is None
    assert performance.ratio(race, "t", "b", "a") is None
    assert performance.ratio(race, "t", "c", "a") is None
    assert performance.ratio(race, "t", "a", "c") is None
    assert performance.ratio(race, "t", "a", "a") == 1


def test_unknown_sections(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "casts", "everything")
    assert "there is no section everything" in capsys.readouterr().err
