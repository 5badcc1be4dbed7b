"""The frame: folders, targets, and everything that can be wrong with them."""

import math

import pytest

from octavo.analysis import experiment
from octavo.analysis.experiment import Plot, Result, Series, Table, Target, compare
from octavo.errors import OctavoError


def test_load_and_run(make):
    one = experiment.load("small-one", make())
    assert (one.title, one.claim) == ("A small one", "It is half.")
    assert one.parameters == {"factor": 1.0}
    outcome = one.run(seed=4)
    assert (outcome.met, outcome.missed, outcome.result.values["seed"]) == (2, [], 4)
    missed = one.run(factor=3.0).missed
    assert [check.target.name for check in missed] == ["half"]
    assert missed[0].ours == 1.5
    assert missed[0].reason


def test_find_folder(make, tmp_path, monkeypatch):
    folder = make()
    (tmp_path / "deep" / "below").mkdir(parents=True)
    assert experiment.find_folder(tmp_path / "deep" / "below") == folder.resolve()
    assert "swamping" in experiment.names(experiment.find_folder(experiment.Path("/")))  # beside the package


def test_no_folder_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(OctavoError, match="no folder `experiments`"):
        experiment.find_folder(tmp_path)
    assert experiment.names(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("asked", "meant"), [("small-on", "small-one"), ("Small_One", "small-one"), ("one", "small-one")]
)
def test_unknown_name(make, asked, meant):
    with pytest.raises(OctavoError, match=f"did you mean {meant}"):
        experiment.load(asked, make())


def test_nothing_near(make):
    with pytest.raises(OctavoError, match="there are small-one"):
        experiment.load("xyz", make())


@pytest.mark.parametrize("file", ["README.md", "expected.json"])
def test_missing_file(make, file):
    folder = make()
    (folder / "small-one" / file).unlink()
    with pytest.raises(OctavoError, match=f"lacks {file}"):
        experiment.load("small-one", folder)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ("import nonsense_that_is_not_there", "does not run: ModuleNotFoundError"),
        ("def run(:", "does not run: SyntaxError"),
        ("x = 1", "has no function run"),
        ("def run(quick, seed): pass", "lacks the argument 'track'"),
    ],
)
def test_broken_run(make, run, why):
    with pytest.raises(OctavoError, match=why):
        experiment.load("small-one", make(run=run))


def test_run_without_a_result(make):
    with pytest.raises(OctavoError, match="must return a Result, not dict"):
        experiment.load("small-one", make(run="def run(quick, seed, track): return {}")).run()


def test_a_run_that_fails_says_where(make):
    folder = make(run="def run(quick, seed, track):\n    return 1 / 0\n")
    with pytest.raises(OctavoError, match=r"run.py, line 2: ZeroDivisionError: division by zero"):
        experiment.load("small-one", folder).run()


def test_readme_without_heading(make):
    with pytest.raises(OctavoError, match="must begin with a heading"):
        experiment.load("small-one", make(readme="no heading"))


def group(**fields):
    return {"groups": [{"source": "published", "absolute": 0.1, "values": {"a": 1}} | fields]}


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", 'list "groups"'),
        ({"groups": []}, 'list "groups"'),
        ({"groups": ["x"]}, "every group must be an object"),
        (group(values=[1]), "every group must be an object"),
        (group(values={"a": "1"}), "must be a finite number, not '1'"),
        (group(values={"a": True}), "must be a finite number"),
        ('{"groups": [{"source": "published", "absolute": 0.1, "values": {"a": NaN}}]}', "must be a finite number"),
        (group(source="heard"), "the source of a group"),
        (group(absolute=-1), "must be a number that is not negative"),
        (group(relative="3 %"), "must be a number that is not negative"),
        (group(side="above"), "side must be"),
        (group(tolerance=1), "unknown field 'tolerance'"),
        (group(reasons={"b": "why"}), "a reason for 'b'"),
        ({"groups": [{"source": "computed", "values": {"a": 1}}]}, "needs a tolerance"),
        ({"groups": [group()["groups"][0], group()["groups"][0]]}, "is there twice"),
    ],
)
def test_broken_expected(make, expected, why):
    with pytest.raises(OctavoError, match=why) as error:
        experiment.load("small-one", make(expected=expected))
    assert "expected.json" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "ours", "met"),
    [
        ({"absolute": 0.1}, 10.1, True),
        ({"absolute": 0.1}, 10.11, False),
        ({"absolute": 0}, 10.0, True),
        ({"relative": 0.02}, 9.8, True),
        ({"relative": 0.02}, 9.79, False),
        ({"absolute": 0.1, "relative": 0.02}, 10.15, True),
        ({"side": "at least"}, 10.0, True),
        ({"side": "at least"}, 9.99, False),
        ({"side": "at most"}, 9.0, True),
        ({"side": "at most"}, 10.01, False),
        ({"absolute": 1e9}, math.nan, False),
        ({"side": "at least"}, math.inf, False),
    ],
)
def test_tolerances(fields, ours, met):
    target = Target("x", 10.0, "published", **fields)
    assert target.met(ours) is met
    assert compare(target, {"x": ours}).verdict == ("pass" if met else "MISS")


def test_what_is_not_checked():
    tight = Target("x", 1.0, "published", absolute=0.1, quick=False)
    assert compare(tight, {"x": 9.0}, quick=True).verdict == "not in quick runs"
    assert compare(tight, {"x": 9.0}).verdict == "MISS"
    assert compare(tight, {}).reason == "the run gave no value of this name"
    elsewhere = Target("x", 1.0, "published", unchecked="needs an H100")
    assert compare(elsewhere, {}) == experiment.Check(elsewhere, None, "not checked", "needs an H100")


def test_records_check_themselves():
    with pytest.raises(OctavoError, match="a row of 1 cells under 2 columns"):
        Table("t", "t", ("a", "b"), [(1,)])
    with pytest.raises(OctavoError, match="same length"):
        Series("s", [1, 2], [1.0])
    result = Result({}, [], [Plot("p", "p", "x", "y", [])])
    assert (result.tables, result.plots[0].series) == ((), ())
