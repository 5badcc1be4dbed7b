"""`octavo doctor --matrix`."""

import pytest

from octavo.analysis import machine, support
from octavo.cli.matrix import WIDTH, WORDS


@pytest.fixture
def here(monkeypatch):
    """A machine with an A100 and AVX2, measured in no time."""

    def measure(rows, size, repeats, device, wanted):
        return [machine.Rate(what, rows, size, 1234567.0, 2.0) for what in wanted if what != "FP16"]

    monkeypatch.setattr(machine, "measure", measure)
    monkeypatch.setattr(support, "present", lambda: {"avx2", "sm_80"})


def test_matrix(octavo, here):
    said = octavo("doctor", "--matrix")
    assert said.code == 0
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.split("  ")[0] for line in lines if line.startswith("> ")][:1] == ["> A100 (Ampere)"]
    marked = [i for i, line in enumerate(lines) if line.startswith(("> A100", "> x86 AVX2"))]
    assert len(marked) == 2
    for i in marked:
        assert lines[i + 1].startswith(">   measured")
        assert f"{lines[i + 1]} ".count(" 1,235 ") == len(support.MEASURED) - 1
    for row in (*support.load().hardware.rows, *support.load().software.rows):
        assert any(line[2:].startswith(f"{row.name} ") for line in lines)
    for source in support.load().sources.values():
        assert f"   {source.url}" in lines


def test_matrix_without_a_known_machine(octavo, monkeypatch):
    monkeypatch.setattr(support, "present", set)
    said = octavo("doctor", "--matrix", "--quick")
    assert said.code == 0
    assert "measured" not in said.out
    assert octavo("doctor", "--matrix", "--json").json["here"] == []


def test_matrix_as_json(octavo, here):
    told = octavo("doctor", "--matrix", "--json").json
    assert set(told) == {"checked", "meanings", "hardware", "software", "sources", "here"}
    for part in ("hardware", "software"):
        for row in told[part]["rows"]:
            assert set(row["cells"]) == set(told[part]["columns"])
            for cell in row["cells"].values():
                assert cell["status"] in WORDS
                assert set(cell["sources"]) <= set(told["sources"])
    assert {place["row"] for place in told["here"]} == {"A100 (Ampere)", "x86 AVX2"}
    assert told["here"][0]["rates"]["int8"]["gops"] == 1234567.0


def test_words_are_those_of_the_data():
    assert set(WORDS) == set(support.load().meanings)
