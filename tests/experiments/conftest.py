import json
import sys
from pathlib import Path

import pytest

from octavo.analysis import experiment

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def module():
    """The module of an experiment's run.py, by name."""

    def load(name):
        return sys.modules[experiment.load(name, FOLDER).function.__module__]

    return load


RUN = """
from octavo.analysis.experiment import Plot, Result, Series, Table

def run(quick=False, seed=0, track=lambda items, label: items, factor=1.0):
    values = {"half": 0.5 * factor, "two": 2.0, "seed": seed}
    for _ in track([1, 2], "counting"):
        pass
    return Result(values, [Table("t", "A <table>", ("name", "x"), [("a", 1.5)])],
                  [Plot("p", "A plot", "x", "y", [Series("s", [1, 2], [3.0, 4.0])])], ["a note"])
"""
EXPECTED = {"groups": [{"source": "published", "absolute": 0.1, "values": {"half": 0.55, "two": 2}}]}


@pytest.fixture
def make(tmp_path):
    def build(name="small-one", run=RUN, expected=EXPECTED, readme="# A small one\n\nIt is\nhalf.\n\nMore."):
        folder = tmp_path / "experiments" / name
        folder.mkdir(parents=True)
        (folder / "run.py").write_text(run)
        (folder / "expected.json").write_text(expected if isinstance(expected, str) else json.dumps(expected))
        (folder / "README.md").write_text(readme)
        return tmp_path / "experiments"

    return build
