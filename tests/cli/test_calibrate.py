"""``octavo quantize`` with static schemes, and with models from Python functions."""

import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import octavo as ov
from octavo.calibration.run import Calibration
from octavo.cli import calibrate
from octavo.errors import OctavoError

FEW = ("--windows", 2, "--window", 32)
STATIC = ("--scheme", "int8-static", "--calibration-windows", 6)
VISION = ("quantize", "vision:net", "--scheme", "int8-static")


@pytest.fixture
def vision(place, monkeypatch):
    """The current folder also holds vision.py."""
    shutil.copy(Path(__file__).with_name("vision.py"), place / "vision.py")
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    sys.modules.pop("vision", None)
    yield place
    sys.modules.pop("vision", None)


def written(place):
    return sorted(
        p.name for p in place.iterdir() if p.name not in ("llama", "gpt2", "bert", "vision.py", "__pycache__")
    )


def test_observers_by_name():
    for name, known in calibrate.OBSERVERS.items():
        made = calibrate.observer(name)
        assert type(made) is getattr(import_module(f"octavo.calibration.{known.home}"), known.kind)
        if known.setting:
            assert str(getattr(made, known.setting)) == known.default
            assert calibrate.observer(f"{name}={known.default}").settings() == made.settings()
    assert calibrate.observer("PERCENTILE=99.5").percent == 99.5
    assert calibrate.observer("moving_average=0.5").momentum == 0.5
    assert calibrate.observer("line-search=flexible-bias").mode == "flexible-bias"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("percentil", "did you mean percentile"),
        ("", "no range is called ''"),
        ("minmax=3", "minmax takes no value, so leave out =3"),
        ("percentile=high", "'high' is not a number; as percentile=99.99"),
        ("percentile=101", "at most 100"),
        ("moving-average=1", "from 0 to below 1"),
        ("line-search=loose", "'loose'"),
    ],
)
def test_observers_that_are_none(text, message):
    with pytest.raises(OctavoError, match=message.replace("(", r"\(")):
        calibrate.observer(text)


def test_the_whole_way(place, octavo):
    said = octavo("quantize", "llama", "--out", "small", *STATIC, "--calibrate", "percentile=99.9", *FEW)
    assert (said.code, said.err) == (0, "")
    told = " ".join(said.out.split())
    assert "int8-static 14 Linear" in told
    assert "calibrated percentile=99.9, over 3 batches of Python's language reference, the part not judged by" in told
    told = octavo("quantize", "llama", "--out", "small", "--force", *STATIC, *FEW, "--json").json
    assert told["calibration"] == {
        "range": "minmax",
        "batches": 3,
        "source": "Python's language reference, the part not judged by",
    }
    assert [*told["seconds"]] == ["load", "evaluate before", "calibrate", "quantize", "evaluate after", "save"]
    assert octavo("evaluate", "small", *FEW, "--json").json["perplexity"] == told["perplexity"]["after"]


def test_bert_too(place, octavo):
    said = octavo("quantize", "bert", "--out", "small", *STATIC)
    assert said.code == 0
    assert "int8-static" in said.out


def test_text_that_is_not_judged_by(place, octavo):
    (place / "novel.txt").write_text("\n\n".join(f"Chapter {i}. It was a dark and stormy night." for i in range(60)))
    words = ("--scheme", "fp8-static", "--no-evaluate", "--calibration-text", "novel.txt", "--calibration-windows", 500)
    said = octavo("quantize", "llama", "--out", "small", *words)
    assert said.code == 0
    assert "note: novel.txt, the part not judged by holds" in said.err
    seen = octavo("quantize", "llama", "--out", "other", "--scheme", "int8-static", "--text", "novel.txt", *FEW)
    assert "of novel.txt, the part not judged by" in " ".join(seen.out.split())


def test_saved_and_taken_up(place, octavo):
    said = octavo("quantize", "llama", "--save-calibration", "c", *STATIC, "--calibrate", "mse")
    assert (said.code, written(place)) == (0, ["c"])
    assert "written c" in " ".join(said.out.split())
    seen = Calibration.load("c")
    assert (seen.batches, len(seen.observers), seen.unreached) == (3, 14, [])
    quiet = ("--scheme", "int8-static", "--no-evaluate")
    once = octavo("quantize", "llama", "--out", "a", *quiet, "--calibration-windows", 6, "--calibrate", "mse")
    again = octavo("quantize", "llama", "--out", "b", *quiet, "--calibration", "c")
    assert (once.code, again.code) == (0, 0)
    a, b = (ov.load(name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "as saved, over 3 batches of c" in " ".join(again.out.split())
    other = octavo("quantize", "llama", "--out", "d", *quiet, "--calibration", "c", "--calibrate", "minmax")
    assert other.code == 0
    name = "model.layers.0.mlp.down_proj.input_scale"
    assert ov.load("d").state_dict()[name] >= a[name]


def test_several_files_are_merged(place, octavo):
    for name in ("a", "b"):
        (place / f"{name}.txt").write_text("\n\n".join(f"{name * 9} part {i} of the tale of {name}" for i in range(80)))
        said = octavo(*("quantize", "llama", "--save-calibration", name, "--calibration-text", f"{name}.txt", *STATIC))
        assert said.code == 0
    words = ("--calibration", "a", "b", "--scheme", "int8-static", "--no-evaluate", "--save-calibration", "both")
    assert octavo("quantize", "llama", "--out", "small", *words).code == 0
    a, b, both = (Calibration.load(name) for name in ("a", "b", "both"))
    for name, observer in both.observers.items():
        parts = a.observers[name].state_dict(), b.observers[name].state_dict()
        assert torch.equal(observer.state_dict()["high"], torch.maximum(parts[0]["high"], parts[1]["high"]))
    assert both.batches == a.batches + b.batches


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("llama", "--calibrate", "minmax"), "--calibrate is for static scales, and no scheme here has one"),
        (("llama", "--allow-uncalibrated"), "--allow-uncalibrated is for static scales"),
        (("llama", "--scheme", "int8-static", "--calibrate", "entropi"), "did you mean entropy"),
        (("llama", "--calibrate-weights", "ms"), "did you mean mse"),
        (("llama", *STATIC, "--calibration-text", "no.txt"), "no.txt does not exist"),
        (("llama", *STATIC, "--calibration", "c"), "--calibration-windows names data, and --calibration what was seen"),
        (("llama", "--scheme", "int8-static", "--calibration", "c"), "c: no such file"),
        (("llama", "--scheme", "int8-static", "--calibration", "llama/config.json"), "not a calibration that Octavo"),
        (("llama", "--scheme", "int8-static", "--save-calibration", "no/c"), "there is no folder no"),
        (("llama", "--scheme", "int8-static", "--save-calibration", "bert"), "no name for a file"),
        (("llama", *STATIC, "--data", "vision:pictures"), "--calibration-windows and --data name two kinds of data"),
        (("llama", "--scheme", "int8-static", "--data", "vison:pictures"), "Did you mean vision?"),
        (("llama", "--scheme", "int8-static", "--data", "vision:net"), "gave a Net for data"),
        (("vision:net", "--scheme", "int8-static"), "vision:net reads no text, so name the data to calibrate with"),
        (("vision:net", "--scheme", "int8-static", "--calibration-windows", 3), "is for language models"),
        (("vision:net", "--dtype", "bfloat16"), "--dtype is for checkpoints"),
        (
            ("vision:net", "--scheme", "int8-dynamic", "--layout", "compressed-tensors"),
            "Net is not a transformers model",
        ),
        (("vision:nett",), "vision has no nett. Did you mean net?"),
        (("vision:pictures",), "returned a list, not an nn.Module"),
        (("vision:net", "--evaluate", "vision:likenes"), "Did you mean likeness?"),
        (("vision:net", "--evaluate", "vision:likeness", "--windows", 3), "--windows is for perplexity"),
        (("vision:net", "--evaluate", "vision:likeness", "--no-evaluate"), "--no-evaluate that nothing is"),
        (("vision:net", "--scheme", "int8-dynamic", "--evaluate", "vision:pictures"), "failed with TypeError"),
        (
            ("vision:net", "--scheme", "int8-static", "--data", "vision:pictures"),
            "1 layers saw no calibration data: unused",
        ),
        (
            ("vision:net", "--scheme", "int8-static", "--data", "vision:not_numbers"),
            "batch 1: the input of layer features.0",
        ),
        (("vision:net", "--scheme", "int8-static", "--data", "vision:tires"), "OSError: the disk went away"),
    ],
)
def test_bad_requests(vision, octavo, words, message):
    said = octavo("quantize", *words, "--out", "x")
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert written(vision) == []


def test_dry_run_keeps_nothing(place, octavo):
    said = octavo("quantize", "llama", "--dry-run", "--scheme", "int8-static", "--save-calibration", "c")
    assert (said.code, "--dry-run runs no data" in said.err) == (2, True)
    assert octavo("quantize", "llama", "--dry-run", "--scheme", "int8-static").code == 0
    assert written(place) == []


def test_a_network_of_ones_own(vision, octavo):
    words = ("--data", "vision:pictures", "--allow-uncalibrated", "--evaluate", "vision:likeness", "--out", "small")
    said = octavo(*VISION, *words)
    assert said.code == 0
    assert "in Octavo's own layout, which only octavo.load opens: Net is not a transformers model" in said.err
    told = " ".join(said.out.split())
    assert "likeness 1 → 0.9" in told
    assert "minmax, over 3 batches of vision:pictures" in told
    assert "saw no calibration data: unused" in told
    assert 'octavo.load("small", model=vision.net())' in said.out
    told = octavo(*VISION, *words, "--force", "--json").json
    assert told["score"]["name"] == "likeness"
    import vision as module

    assert module.likeness(ov.load("small", model=module.net())) == told["score"]["after"]
    judged = ("evaluate", "small", "--architecture", "vision:net", "--evaluate", "vision:likeness")
    assert octavo(*judged, "--json").json["score"] == {"name": "likeness", "value": told["score"]["after"]}
    assert "Net with int8-static" in octavo(*judged).out
    assert octavo("evaluate", "vision:net", "--evaluate", "vision:likeness", "--json").json["score"]["value"] == 1
    said = octavo("evaluate", "small", "--evaluate", "vision:likeness")
    assert (said.code, "--architecture MODULE:FUNCTION" in said.err) == (2, True)
    said = octavo("evaluate", "llama", "--architecture", "vision:net")
    assert (said.code, "--architecture is for 8-bit folders, and llama is none" in said.err) == (2, True)
    said = octavo("evaluate", "vision:net")
    assert (said.code, "no --evaluate MODULE:FUNCTION says by what" in said.err) == (2, True)


def test_data_that_comes_with_the_model(vision, octavo):
    said = octavo(
        "quantize", "vision:with_data", "--scheme", "int8-static", "--allow-uncalibrated", "--out", "x", "--json"
    )
    assert said.json["calibration"]["source"] == "vision:with_data"
    assert said.json["perplexity"]["not_measured"] == "no --evaluate MODULE:FUNCTION says by what"


def test_ranges_of_weights(vision, octavo):
    found = {}
    for name in ("minmax", "percentile=50"):
        words = ("quantize", "vision:net", "--scheme", "int8-weight-only", "--calibrate-weights", name, "--force")
        assert octavo(*words, "--out", "x").code == 0
        import vision as module

        found[name] = ov.load("x", model=module.net()).head.scale
    assert (found["percentile=50"] < found["minmax"]).all()


def test_the_format_may_be_searched(place, octavo):
    words = ("--scheme", "fp8-static", "--calibration-windows", 4, "--calibrate", "line-search", "--no-evaluate")
    told = octavo("quantize", "llama", "--out", "small", *words, "--json").json
    assert told["layout"] == "octavo"
    assert isinstance(ov.load("small"), torch.nn.Module)


@pytest.mark.parametrize("data", ["vision:tires", "vision:not_numbers"])
def test_what_was_seen_before_an_error_is_kept(vision, octavo, data):
    said = octavo(*VISION, "--data", data, "--save-calibration", "c", "--out", "x")
    assert (said.code, written(vision)) == (2, ["c"])
    assert "stopped in batch 1" in said.err
    assert "until then is in c; use it with --calibration" in said.err
    assert Calibration.load("c").batches == 1
    words = ("--calibration", "c", "--allow-uncalibrated", "--out", "x")
    assert octavo(*VISION, *words).code == 0


def test_interrupted(vision, octavo):
    words = (*VISION, "--data", "vision:interrupted", "--out", "x")
    said = octavo(*words)
    assert (said.code, written(vision)) == (130, [])
    assert said.err.endswith("error: interrupted; nothing was written\n")
    said = octavo(*words, "--save-calibration", "c")
    assert (said.code, written(vision)) == (130, ["c"])
    assert said.err.endswith("error: interrupted; c is written\n")
    assert Calibration.load("c").batches == 1


def test_the_ranges_of_the_help(octavo):
    said = octavo("quantize", "--help")
    assert all(name in said.out for name in calibrate.OBSERVERS)
