"""`octavo` itself, `inspect`, `formats`, `doctor`, and how the screen speaks."""

import io
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import octavo as ov
from octavo.cli import doctor, formats
from octavo.cli.console import Screen, strict
from octavo.cli.main import COMMANDS, build

FEW = ("--windows", 2, "--window", 16)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_version_and_help(octavo):
    assert octavo("--version").out == f"octavo {ov.__version__}\n"
    assert octavo().code == 2
    said = octavo("--help")
    assert said.code == 0
    assert all(name in said.out for name in COMMANDS)
    for name in COMMANDS:
        said = octavo(name, "--help")
        assert said.code == 0
        assert f"  octavo {name}" in said.out  # an example


@pytest.mark.parametrize(("word", "hint"), [("quantise", "did you mean quantize?"), ("xyz", "there are quantize, ")])
def test_unknown_command(octavo, word, hint):
    said = octavo(word, "demo")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: no command is called '{word}'; {hint}")


def test_help_needs_no_torch():
    """With a bare package in the place of octavo/__init__.py, the command line imports none of the heavy libraries."""
    script = (
        "import sys, types\n"
        "package = types.ModuleType('octavo')\n"
        f"package.__path__, package.__version__ = {list(ov.__path__)!r}, '0'\n"
        "sys.modules['octavo'] = package\n"
        "from octavo.cli.main import main\n"
        "codes = [main(['--help']), main(['quantize', '--help']), main(['--version']), main(['quantise'])]\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if heavy or codes != [0, 0, 0, 2] else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_as_a_module_and_into_a_closed_pipe():
    done = subprocess.run([sys.executable, "-m", "octavo", "formats", "nope"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no format is called 'nope'")
    piped = subprocess.Popen([sys.executable, "-m", "octavo", "formats", "tf32"], stdout=subprocess.PIPE, stderr=-1)
    piped.stdout.close()
    assert (piped.stderr.read(), piped.wait()) == (b"", 0)


def test_failures_of_our_own(octavo, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("the sky falls")

    monkeypatch.setattr(formats, "_catalogue", fail)
    said = octavo("formats")
    assert said.code == 1
    assert said.err == "error: RuntimeError: the sky falls (OCTAVO_DEBUG=1 shows where; please report it)\n"
    monkeypatch.setenv("OCTAVO_DEBUG", "1")
    from octavo.cli.main import main

    assert main(["formats"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_no_rich(octavo, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    said = octavo("formats")
    assert (said.code, said.out) == (2, "")
    assert "pip install 'octavo[cli]'" in said.err
    assert octavo("formats", "--json").code == 0


def test_catalogue(octavo):
    said = octavo("formats")
    assert all(fmt.name in said.out for fmt in ov.formats.CATALOGUE)
    assert max(map(len, said.out.splitlines())) <= 80
    told = {fmt["name"]: fmt for fmt in octavo("formats", "--json").json["formats"]}
    assert told["E4M3FN"]["max"] == 448
    assert told["E4M3FN"]["count"] == 253
    assert told["INT8"]["bias"] is None


@pytest.mark.parametrize("name", [fmt.name for fmt in ov.formats.CATALOGUE])
def test_close_up(octavo, name):
    said = octavo("formats", name)
    assert said.code == 0
    assert "█" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    told = octavo("formats", name, "--json").json["formats"][0]
    counted = sum((span["last"] - span["first"] + 1) * span["values"] for span in told["per_power_of_two"])
    assert counted == int((ov.formats.get(name).values() > 0).sum())
    assert ("values" in told) == (told["bits"] <= 8)


def test_described_format(octavo):
    flags = ("--exponent", 3, "--mantissa", 4, "--bias", 4.5, "--specials", "none", "--no-subnormals")
    told = octavo("formats", *flags, "--json").json["formats"][0]
    mine = ov.formats.float_format(3, 4, 4.5, "none", subnormals=False)
    assert told["values"] == mine.values().tolist()
    assert octavo("formats", "e3m4", *flags).out.count("  bits ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("e4m3fm",), "did you mean e4m3fn"),
        (("--exponent", "4"), "give both --exponent and --mantissa"),
        (("--no-subnormals",), "give both --exponent and --mantissa"),
        (("--exponent", "9", "--mantissa", "3"), "1 to 8 exponent bits"),
        (("--exponent", "4", "--mantissa", "3", "--bias", "nan"), "bias"),
        (("--exponent", "4", "--mantissa", "3", "--specials", "fun"), "invalid choice: 'fun'"),
        (("--plot", "x.txt"), "must end in .png"),
        (("--plot", "nowhere/x.png"), "there is no folder nowhere"),
    ],
)
def test_bad_formats(octavo, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    said = octavo("formats", *words)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert [*tmp_path.iterdir()] == []


def test_plot(octavo, tmp_path):
    pytest.importorskip("matplotlib")
    said = octavo("formats", "e4m3fn", "int8", "--plot", tmp_path / "x.png")
    assert said.code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_float(place, octavo):
    said = octavo("inspect", "llama", "--tensors")
    assert said.code == 0
    assert "LlamaForCausalLM, llama" in said.out
    assert "model.layers.1.mlp.down_proj.weight" in said.out
    told = octavo("inspect", "llama", "--json").json
    assert (told["schemes"], "tensors" in told) == ({}, False)
    assert told["by_dtype"]["F32"]["nbytes"] == told["nbytes"] == 4 * told["parameters"]


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic", "int8-weight-only", "int8-group64", "e3m4-dynamic"])
def test_inspect_8_bit(place, octavo, scheme):
    octavo("quantize", "llama", "--out", "small", "--no-evaluate", "--scheme", scheme, "--skip", "*.o_proj")
    floats = octavo("inspect", "llama", "--json").json
    told = octavo("inspect", "small", "--json", "--tensors").json
    assert set(told["schemes"].values()) == {scheme}
    assert len(told["schemes"]) == 12
    assert told["parameters"] == floats["parameters"]
    assert "model.layers.0.self_attn.o_proj.weight" in told["left_in_float"]
    assert {tensor["name"] for tensor in told["tensors"]} >= {"model.norm.weight"}
    if told["quantization"]["quant_method"] == "compressed-tensors":  # the same without Octavo's own notes
        (place / "small/octavo.json").unlink()
        assert octavo("inspect", "small", "--json").json["schemes"] == told["schemes"]
    said = octavo("inspect", "small")
    assert f"{scheme}" in said.out
    assert "left in float" in said.out


def test_inspect_other_folders(tmp_path, octavo):
    save_file({"weight": torch.zeros(3, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = octavo("inspect", tmp_path)
    assert said.code == 0
    assert "quantized by gptq; Octavo cannot open it" in said.out
    (tmp_path / "octavo.json").write_text('{"layers": 3}')
    assert (octavo("inspect", tmp_path).code, octavo("inspect", "nowhere").code) == (2, 2)


def test_doctor(octavo):
    said = octavo("doctor", "--quick")
    assert said.code == 0
    assert "INT8 matmul is" in said.out
    told = octavo("doctor", "--quick", "--json").json
    assert told["versions"]["torch"] == torch.__version__ == told["torch"]
    assert {rate["what"] for rate in told["rates"]} >= {"FP32", doctor.INTEGER, doctor.EXACT}
    assert told["verdict"]


@pytest.mark.parametrize(
    ("int8", "fp8", "words"),
    [(6.7, 3.0, "choose INT8"), (1.0, 2.0, "choose FP8"), (1.0, 0.9, "save memory on this machine, not time")],
)
def test_verdict(int8, fp8, words):
    from octavo.analysis.machine import Machine, Rate

    ratios = {"FP32": 1.0, "BF16": fp8, doctor.INTEGER: int8, doctor.EXACT: fp8}
    found = [Rate(what, 512, 1024, 100 * ratio, ratio) for what, ratio in ratios.items()]
    said = doctor.verdict(Machine("", 1, "", "none", "", [], found))
    assert said[0] == f"INT8 matmul is {int8:.1f}x FP32 here."
    assert "at BF16 speed" in said[1]
    assert words in said[-1]


def test_evaluate(place, octavo):
    said = octavo("evaluate", "llama", *FEW)
    assert said.code == 0
    assert "perplexity" in said.out
    assert "30 tokens (2 windows of 16) of Python's language reference" in said.out
    for file in place.glob("llama/tokenizer*"):
        file.unlink()
    assert "without a tokenizer" in octavo("evaluate", "llama").err


def test_json_is_strict():
    told = strict({"a": [math.nan, math.inf, (-math.inf, 1.5)], 3: "x"})
    assert told == {"a": ["nan", "inf", ["-inf", 1.5]], "3": "x"}
    json.dumps(told, allow_nan=False)


def test_on_a_terminal(place, monkeypatch):
    from octavo.cli.main import main

    for name, value in (("COLUMNS", "80"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    words = ["quantize", "llama", "--scheme", "int8-dynamic", "--out", "small", "--windows", "4", "--window", "16"]
    assert main(words) == 0
    plain = plain_text(sys.stdout.getvalue())
    assert max(map(len, plain.splitlines())) <= 80
    assert "\x1b[1m" in sys.stdout.getvalue()  # bold
    assert "quantizing" in sys.stderr.getvalue()  # the bar
    assert main(["formats", "nope"]) == 2
    assert "\x1b[1;31merror:\x1b[0m no format" in sys.stderr.getvalue()


def test_no_bars_into_a_pipe(capsys):
    screen = Screen()
    assert screen.track([1, 2], "counting") == [1, 2]
    with screen.phase("load", "opening"):
        pass
    assert capsys.readouterr() == ("", "")
    assert screen.seconds["load"] >= 0


def plain_text(text):
    from rich.text import Text

    return Text.from_ansi(text).plain


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_eighty_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        build().parse_args([name, "--help"])
    text = capsys.readouterr().out
    assert not [line for line in text.splitlines() if len(line) > 80 and not line.startswith("  octavo ")]
