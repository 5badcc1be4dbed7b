"""Pages and files for people."""

import math
import os
import re

import pytest

from octavo.analysis.experiment import Check, Outcome, Plot, Result, Series, Table, Target
from octavo.errors import OctavoError
from octavo.report import files, html, markdown, plots

LINE = Plot("line", "A & B", "x, m", "y, dB", [Series("<s>", [1, 2, 4], [1.0, 2.0, 3.0], [0.0] * 3, [4.0] * 3)])
BARS = Plot("bars", "Bars", "", "n", [Series("a", ["x", "y"], [1, 2]), Series("b", ["y"], [3])], kind="bars")
STROKES = Plot("strokes", "Lines", "value", "", [Series("f", [0, 1, 2, 4])], kind="strokes", x_scale="log2")
MARKED = Plot("marked", "Marks", "x", "y", [Series("", [1, 10], [1, 100])], "steps", "log10", "log2", ((3.0, "here"),))
README = """\
# Title

Words with `code` & **bold**, [a link](https://arxiv.org/abs/1).

## More

- one
  and on
- two

```
a < b

c
```
"""


def outcome(name="small", title="Small <script>alert(1)</script>", verdict="pass"):
    target = Target("a|b <i>", 1.0, "published", "figure 1", "dB", absolute=0.1)
    table = Table("t", "Table & more", ("name", "x"), [("<b>", math.pi), ("n", math.nan), ("big", 123456)])
    result = Result({"a": 1.0}, [table], [LINE, BARS, STROKES, MARKED], ["a <note>"])
    checks = (Check(target, 1.05, verdict, "because" if verdict == "MISS" else ""),)
    return Outcome(name, title, "A claim with `code`.", README, 0, False, 1.0, result, checks)


@pytest.mark.parametrize("plot", [LINE, BARS, STROKES, MARKED], ids=lambda plot: plot.name)
def test_pictures(plot):
    light, dark = plots.png(plot), plots.png(plot, plots.DARK)
    assert light.startswith(b"\x89PNG")
    assert light != dark
    assert light == plots.png(plot)  # the same bytes again


def test_page_is_self_contained():
    page = html.page([outcome(), outcome("other", "Other", "MISS")], "about & so").decode()
    for source in re.findall(r"(?:src|srcset|poster|data)=\"([^\"]*)\"", page):
        assert source.startswith("data:image/png;base64,")
    for link in re.findall(r"href=\"([^\"]*)\"", page):
        assert link.startswith(("#", "https://arxiv.org/"))
    lower = page.lower()
    assert not any(word in lower for word in ("<script", "<link", "@import", "url(", "<iframe"))
    assert page.count("<picture>") == 8
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "<i>" not in page
    assert "A claim with <code>code</code>." in page
    assert 'class="bad">MISS' in page
    assert 'href="#other"' in page


def test_markdown_of_readmes():
    made = html.markdown(README)
    assert "<h3>Title</h3>" in made
    assert '<a href="https://arxiv.org/abs/1">a link</a>' in made
    assert "<li>one and on</li><li>two</li>" in made
    assert "<pre><code>a &lt; b\n\nc</code></pre>" in made


def test_links_that_do_something_stay_text():
    assert "<a" not in html.inline("[x](javascript:alert(1))")


def test_results_page():
    page = markdown.page([outcome(verdict="MISS")], "About.")
    assert "| a\\|b <i> | 1 | ±0.1 | 1.050 | dB | MISS | published, figure 1. because |" in page
    assert "| [small](#small) | 0 of 1 | 0 | 1.0 |" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.14159, "3.142"),
        (448.0, "448"),
        (0.5, "0.5000"),
        (65504.0, "65,504"),
        (63487, "63,487"),
        (2.0**-24, "5.960e-08"),
        (3.4e38, "3.400e+38"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "NaN"),
        (0.0, "0"),
        ("word", "word"),
        (None, "–"),
        (-12.3456, "-12.35"),
    ],
)
def test_numbers(value, text):
    assert files.number(value) == text


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write(tmp_path, {"a": b"old", "b/c": b"old"})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OctavoError, match="No space left"):
        files.write(tmp_path, {"a": b"new", "b/c": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["a", "b/c"]


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OctavoError, match="cannot be written"):
        files.check_folder(tmp_path / "file" / "below")
    files.check_folder(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
