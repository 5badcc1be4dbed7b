"""The page of a comparison: what it says, that it is self-contained, and that nothing odd breaks it."""

import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from octavo.analysis.comparison import AS_IT_IS, Candidate, Comparison, Outcome
from octavo.analysis.outliers import Dimension, Input, Massive, Outliers
from octavo.core import formats, schemes
from octavo.report import blocks, heat, number_lines, numbers, outcomes
from octavo.report.comparison import page
from tests.report import samples

VOID = {"meta", "br", "wbr", "img", "hr", "input", "path", "use", "rect", "source", "link"}
HOSTILE = '<script>alert("x")</script>&"\'$a_b$\\n{}'


class Checker(HTMLParser):
    """Whether elements close in order; which there are, with their attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(made):
    """A page, checked: well-formed, self-contained, ids unique, links and labels lead somewhere."""
    text = made.decode()
    found = Checker(text)
    assert not found.all("script") and not found.all("link") and not found.all("iframe") and not found.all("img")
    assert not re.search(r"@import|url\((?!#)|(?:src|srcset)=|\son[a-z]+=", text)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in ids and attributes["href"].startswith("#")
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
    assert found.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in found.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all("scope" in attributes for attributes in found.all("th"))
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in found.all("svg"))
    return text, found


def outliers(names, width=576):
    inputs = tuple(
        Input((name,), "layers", width, 64, 40.0, 0.3, 1.0, 30.0, 40.0, 9.0, 2, 0.5, ((3, 40.0), (99 + i, 7.0)))
        for i, name in enumerate(names)
    )
    dimensions = (Dimension(3, 2, 0.5, 40.0, True), Dimension(100, 1, 0.01, 7.0, False))
    massive = (Massive(names[0], 0, 3, -812.0, 2100.0, 4), Massive(names[0], None, 3, 300.0, math.inf, 1))
    return Outliers(6.0, width, 2, inputs, dimensions, massive)


def test_page_says_what_was_found():
    compared = samples.comparison(samples.llama(2))
    chosen = samples.choice(compared)
    names = samples.llama(2)
    made = page(
        compared, chosen, samples.magnitudes(names), outliers(names), command="octavo quantize X", facts={"Seen": "<b>"}
    )
    text, found = read(made)
    words = " ".join(" ".join(found.words).split())
    for said in (
        chosen.verdict,
        compared.data,
        compared.machine,
        "octavo quantize X",
        "within the budget of 0.30 %",
        '"scheme": "int8-dynamic"',
        "chosen mix",
        "14 of 15",
        "How to read this page",
        "the output head: rounding it costs 12 times",
        "28 layers in int8-group64 instead",
        "Massive activations",
    ):
        assert said in words, said
    assert "prefers-color-scheme: dark" in text and "@media print" in text and 'name="viewport"' in text
    assert text.count("<b></dd>") == 0
    assert len(found.all("svg")) == 2 + 3 + 2  # two of the trade-off, one of each block, two of the outliers
    assert text.count("★ ") >= len(names)
    assert "a group of 64 does not divide 40 columns" in words


def test_two_pages_are_equal():
    compared = samples.comparison(samples.llama(1))
    assert page(compared) == page(compared)


def test_names_are_text():
    names = [f"{HOSTILE}.{i}.{HOSTILE}" for i in range(3)] + [HOSTILE, "x" * 300, "a.\x00b", "ä.0.日本"]
    compared = samples.comparison(names, model=HOSTILE, data=HOSTILE, machine=HOSTILE, notes=(HOSTILE,))
    cells = tuple(replace(c, excluded=HOSTILE) if i % 3 else c for i, c in enumerate(compared.cells))
    compared = replace(
        compared, cells=cells, outcomes=(*compared.outcomes[:-1], Outcome("e3m4-dynamic", excluded=HOSTILE))
    )
    chosen = samples.choice(compared, verdict=HOSTILE, notes=(HOSTILE,), engine=HOSTILE)
    _, found = read(page(compared, chosen, samples.magnitudes(names), outliers(names), command=HOSTILE))
    assert any('alert("x")' in words for words in found.words)


def test_names_of_formats_are_text():
    names = ["layers.0.a", "layers.1.a"]
    scheme = schemes.dynamic(replace(formats.E4M3FN, name=HOSTILE))
    compared = replace(samples.comparison(names), candidates=(Candidate(None), Candidate(scheme)))
    assert HOSTILE not in number_lines.section(compared, samples.magnitudes(names))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, 0.0, -1e-9, 1e30])
def test_odd_numbers(value):
    compared = samples.comparison(samples.llama(1))
    odd = {"weight_sqnr": value, "output_sqnr": value, "loss": value, "divergence": value, "seconds": value}
    cells = tuple(replace(c, **odd) if c.candidate != AS_IT_IS else c for c in compared.cells)
    whole = tuple(replace(o, loss=value, divergence=value, seconds=value, error=value) for o in compared.outcomes)
    compared = replace(compared, cells=cells, outcomes=whole, loss=value, perplexity=value)
    read(page(compared))
    number = 0.0 if value is None else value
    chosen = samples.choice(
        compared, increase=number, budget=number, error=number, seconds_before=value, predicted=number
    )
    decisions = tuple(replace(d, cost=number, seconds=value) for d in chosen.decisions)
    read(page(compared, replace(chosen, decisions=decisions)))


@pytest.mark.parametrize("language", [True, False])
def test_tiny(language):
    """One layer, one scheme; no choice, no numbers, perhaps no perplexity."""
    compared = samples.comparison(["0"], ("int8-dynamic",), language=language)
    text, _ = read(page(compared))
    assert ("perplexity</th>" in text) == language
    assert ("increase of the loss</th>" in text) != language
    read(page(compared, samples.choice(compared), samples.magnitudes(["0"])))


def test_nothing_at_all():
    empty = Comparison("m", "", "", None, None, None, 0, (), (Candidate(None),), (), ())
    text, _ = read(page(empty))
    assert "No scheme was judged" in text
    read(page(samples.comparison([], ())))


def test_huge():
    """80 blocks of 7 linears under 12 schemes: folded, small and quick."""
    names = samples.llama(80)
    compared = samples.comparison(names, tuple(schemes.NAMES)[:12])
    chosen, few = samples.choice(compared), samples.magnitudes(names[:21])
    started = time.process_time()
    made = page(compared, chosen, [replace(few[i % 21], layer=name) for i, name in enumerate(names)])
    assert time.process_time() - started < 40
    assert len(made) < 5e6
    read(made)


def test_a_rounded_language_model_is_said_in_percent():
    unit = numbers.units(samples.comparison(["a"]))
    assert unit.said(0.0024) == "+0.24 %"
    assert unit.said(0.0024, 0.0007) == "+0.24 ± 0.07 %"
    assert unit.said(-0.0002) == "−0.02 %"
    assert unit.said(None) == "–"
    assert unit.said(math.inf) == "∞"


def test_a_loss_is_said_in_its_own_unit_and_where_there_is_none_the_noise():
    loss = numbers.units(samples.comparison(["a"], language=False))
    assert [loss.said(x) for x in (0.0024, -3.1e-5, 0.0, 25.0, 1234.5)] == ["+0.0024", "−3.1e-05", "0", "+25", "+1,234"]
    assert loss.said(0.0024, 2e-4) == "+0.0024 ± 0.0002"
    assert loss.whole == "increase of the loss"
    words = "noise in the outputs, a share of their power"
    compared = samples.comparison(["a"], language=False, loss=None, divergence=words)
    noise = numbers.units(compared)
    assert noise.whole == "noise in the outputs" and noise.said(3.1e-5) == "3.1e-05"
    read = page(compared, samples.choice(compared, budget=0.001, increase=3.1e-5, error=0.0)).decode()
    assert "3.1e-05" in read and "within the budget of 0.001" in read and "increase of the loss" not in read


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0004, "<0.001"),
        (-0.0004, ">−0.001"),
        (0.0123, "0.01"),
        (1.26, "1.3"),
        (-140.4, "−140"),
        (2e7, "2e07"),
    ],
)
def test_short_numbers(value, text):
    assert numbers.short(value) == text.replace("e07", "e7")


def test_blocks():
    names = ["model.layers.0.mlp.up", "model.layers.0.q", "model.layers.1.q", "lm_head", "model.embed"]
    found = blocks.blocks(names)
    assert found == {
        "model.layers.0": names[:2],
        "model.layers.1": names[2:3],
        "": ["lm_head", "model.embed"],
    }
    assert blocks.titles(found) == {"model.layers.0": "layers.0", "model.layers.1": "layers.1", "": "other layers"}
    assert blocks.split("0") == ("", "0") and blocks.split("a.1.b") == ("a.1", "b")
    assert blocks.titles(["encoder.1", "decoder.1"]) == {"encoder.1": "encoder.1", "decoder.1": "decoder.1"}


def test_ramp():
    ramp = heat.Ramp.over([1.0, 0.1, math.inf, math.nan])
    assert [ramp.level(c) for c in (1.0, 0.32, 0.31, 0.1, 0.0, -1.0, math.nan, math.inf, 1e-9)] == [
        6,
        6,
        5,
        4,
        0,
        0,
        0,
        6,
        0,
    ]
    assert heat.Ramp.over([]).level(1.0) == 0


def test_cheapest_first():
    order = outcomes.cheapest_first(samples.comparison(["a"]))
    assert order[0] == AS_IT_IS and order[-1] == "int8-dynamic"


def test_share_that_becomes_zero():
    """Counted by hand: INT8 drops what is below 1/254 of the largest, E4M3FN what is below 2**-10 / 448."""
    import torch

    from octavo.analysis.magnitudes import of

    x = torch.ones(4, 1000)
    x[:, 1:251] = 2.0**-9  # below 1/254
    x[:, 251:501] = 2.0**-7
    found = of(x)
    assert number_lines.zeroed(found, formats.INT8) == pytest.approx(0.25)
    assert number_lines.zeroed(found, formats.E4M3FN) == 0.0
