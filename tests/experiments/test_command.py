"""``octavo experiment``."""

import json

import pytest

from octavo.cli.main import main
from tests.experiments.conftest import EXPECTED, RUN


def test_list(capsys):
    assert main(["experiment", "list"]) == 0
    said = capsys.readouterr().out
    assert "swamping" in said
    assert "octavo experiment run NAME" in said
    assert main(["experiment", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["experiments"]
    assert {"name", "title", "claim", "targets", "parameters"} <= set(found[0])


def test_run_one(make, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["experiment", "run", "small-one", "--from", str(make()), "--out", str(out), "--seed", "9"]) == 0
    said = capsys.readouterr().out
    assert "Seed 9;" in said
    assert "targets  2 of 2 met" in said
    names = {file.name for file in (out / "small-one").iterdir()}
    assert names == {"t.csv", "p.png", "p-plot.csv", "targets.csv", "report.html"}
    assert (out / "small-one" / "t.csv").read_text() == "name,x\na,1.5\n"
    assert (out / "small-one" / "p-plot.csv").read_text() == "series,x,y,low,high\ns,1,3.0,,\ns,2,4.0,,\n"
    assert "half,0.55,±0.1,0.5,,pass,published,\n" in (out / "small-one" / "targets.csv").read_text()


def test_missed_target_is_exit_code_1(make, tmp_path, capsys):
    folder = make(expected=json.dumps(EXPECTED).replace("0.55", "0.75"))
    assert main(["experiment", "run", "small-one", "--from", str(folder), "--out", str(tmp_path / "o"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["met"], found["missed"]) == (1, 1)
    check = found["experiments"][0]["targets"][0]
    assert (check["verdict"], check["ours"], check["value"]) == ("MISS", 0.5, 0.75)
    assert check["reason"]


def test_run_all_writes_the_results_page(make, tmp_path, capsys):
    folder = make()
    make("another", RUN.replace("0.5 * factor", "7"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").touch()
    results = tmp_path / "docs" / "results.md"
    assert main(["experiment", "run", "all", "--quick", "--from", str(folder), "--out", str(tmp_path / "o")]) == 1
    assert not results.exists()  # a quick run proves less
    assert main(["experiment", "run", "all", "--from", str(folder), "--out", str(tmp_path / "o")]) == 1
    page = results.read_text()
    assert "| half | 0.5500 | ±0.1 | 0.5000 |  | pass |" in page
    assert "| half | 0.5500 | ±0.1 | 7 |  | MISS |" in page
    assert "MISS half: 7" in capsys.readouterr().out
    assert (tmp_path / "o" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["run"], "name what to run: small-one, or all"),
        (["run", "smal-one"], "did you mean small-one?"),
        (["list", "small-one"], "octavo experiment run small-one"),
        (["run", "small-one", "--seed", "x"], "a seed is an integer"),
        (["run", "small-one", "--seed", "-1"], "a seed lies between"),
        (["run", "small-one", "--quik"], "did you mean --quick?"),
        (["walk"], "takes list or run, not 'walk'"),
        (["small-one"], "to run it: octavo experiment run small-one"),
    ],
)
def test_bad_words(make, capsys, words, why):
    assert main(["experiment", *words, "--from", str(make())]) == 2
    assert why in capsys.readouterr().err


def test_no_experiments_there(tmp_path, capsys):
    assert main(["experiment", "--from", str(tmp_path / "nowhere")]) == 2
    assert "there are no experiments in" in capsys.readouterr().err


def test_unwritable_output(make, tmp_path, capsys):
    folder = make()
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["experiment", "run", "small-one", "--from", str(folder), "--out", str(out)]) == 2
        assert "cannot be written" in capsys.readouterr().err
