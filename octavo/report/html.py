"""One self-contained HTML page: no scripts, no links to fetch, pictures inside, light and dark, narrow and wide."""

import base64
import re
from collections.abc import Container, Iterable, Sequence
from html import escape
from importlib.resources import files

from octavo.analysis.experiment import Check, Outcome, Plot, Table
from octavo.report import plots as pictures
from octavo.report.files import number

STYLE = files("octavo.report").joinpath("page.css").read_text(encoding="utf-8")


def page(outcomes: list[Outcome], about: str) -> bytes:
    """All outcomes on one page; ``about`` says where and with what they were made."""
    title = "Octavo: published results, recomputed" if len(outcomes) != 1 else outcomes[0].title
    contents = [_contents(outcomes)] if len(outcomes) > 1 else []
    return _titled(title, about, contents + [_section(outcome) for outcome in outcomes])


def sheet(title: str, about: str, plots: tuple[Plot, ...] = (), tables: tuple[Table, ...] = ()) -> bytes:
    """Some pictures and tables on one page."""
    found = [f"<h3>{escape(table.title)}</h3>{_table(table)}" for table in tables]
    return _titled(title, about, [_figure(plot) for plot in plots] + found)


def whole(title: str, parts: list[str]) -> bytes:
    """A page of these parts."""
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
    ]
    return "\n".join([*head, *parts, "</body></html>\n"]).encode()


class Markup(str):
    """Text that is HTML already."""


def text(words: str) -> str:
    """Words as HTML."""
    return words if isinstance(words, Markup) else escape(words)


def name(words: str) -> Markup:
    """A name that may be broken after its dots, dashes and slashes, where a line is too short for it."""
    return Markup(re.sub(r"(?<=[^./_-][./_-])(?=[^./_-])", "<wbr>", escape(words)))


def scrolling(table: str, label: str, kind: str = "") -> str:
    """A table that scrolls within itself, which the keyboard can do as well."""
    return f'<div class="wide {kind}" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'


def grid(
    label: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    prose: Container[int] = (),
    chosen: Container[int] = (),
) -> str:
    """A scrolling table whose first column names its rows; ``prose``: columns of words, ``chosen``: marked rows."""
    kinds = [' class="words"' if i in prose else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{text(h)}</th>' for h, kind in zip(heads, kinds, strict=True))
    body = []
    for index, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        mark = ' class="chosen"' if index in chosen else ""
        body.append(f'<tr{mark}><th scope="row"{kinds[0]}>{text(first)}</th>{cells}</tr>')
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>", label, "stay")


def fold(summary: str, body: str, opened: bool = False) -> str:
    """A part that opens when it is asked to."""
    return f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{body}</details>"


def code(words: str) -> Markup:
    """A name from a program."""
    return Markup(f"<code>{name(words)}</code>")


def _titled(title: str, about: str, parts: list[str]) -> bytes:
    return whole(title, [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(about)}</p>', *parts])


def _contents(outcomes: list[Outcome]) -> str:
    rows = [
        f'<tr><td><a href="#{escape(o.name)}">{escape(o.name)}</a></td><td class="words">{escape(o.title)}</td>'
        f"<td>{_score(o)}</td><td>{o.seconds:.1f}</td></tr>"
        for o in outcomes
    ]
    head = '<tr><th>experiment</th><th class="words">about</th><th>targets met</th><th>seconds</th></tr>'
    return f'<div class="wide contents"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _score(outcome: Outcome) -> str:
    checked = outcome.met + len(outcome.missed)
    return f'<span class="{"bad" if outcome.missed else "good"}">{outcome.met} of {checked}</span>'


def _section(outcome: Outcome) -> str:
    result = outcome.result
    parts = [
        f'<h2 id="{escape(outcome.name)}">{escape(outcome.title)}</h2>',
        f"<p>{inline(outcome.claim)}</p>",
        f'<p class="soft">{escape(outcome.name)} · seed {outcome.seed} · {outcome.seconds:.1f} s'
        f"{' · quick' if outcome.quick else ''} · targets met: {_score(outcome)}</p>",
    ]
    parts += [_figure(plot) for plot in result.plots]
    parts += [f"<h3>{escape(table.title)}</h3>{_table(table)}" for table in result.tables]
    parts += [f"<p>{inline(note)}</p>" for note in result.notes]
    if outcome.checks:
        parts.append(f"<h3>Targets</h3>{_checks(outcome.checks)}")
    parts.append(f"<details><summary>README</summary>{markdown(outcome.readme)}</details>")
    return "\n".join(parts)


def _figure(plot: Plot) -> str:
    light, dark = (base64.b64encode(pictures.png(plot, theme)).decode() for theme in (pictures.LIGHT, pictures.DARK))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{light}"></picture></figure>'
    )


def _table(table: Table) -> str:
    words = [all(isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]
    kinds = [' class="words"' if w and i else "" for i, w in enumerate(words)]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, table.columns, strict=True))
    rows = "".join(
        "<tr>"
        + "".join(f"<td{k}>{escape(number(c, table.digits))}</td>" for k, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _checks(checks: tuple[Check, ...]) -> str:
    rows = []
    for check in checks:
        target = check.target
        colour = {"pass": "good", "MISS": "bad"}.get(check.verdict, "soft")
        where = f"{target.source}{f', {target.where}' if target.where else ''}"
        rows.append(
            f"<tr><td>{escape(target.name)}</td><td>{number(target.value)}</td><td>{escape(target.tolerance)}</td>"
            f'<td>{number(check.ours)}</td><td>{escape(target.unit)}</td><td class="{colour}">{check.verdict}</td>'
            f'<td class="words soft">{inline(check.reason or where)}</td></tr>'
        )
    head = "".join(f"<th>{head}</th>" for head in ("target", "value", "tolerance", "ours", "unit", "verdict"))
    head += '<th class="words">source, or why</th>'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def inline(words: str) -> str:
    """Code, bold and links of one paragraph of Markdown; everything else is escaped."""
    words = escape(words, quote=False)
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", words)
    words = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", words)
    return re.sub(r"\[([^\]]+)\]\((https?://[^)\s]+)\)", r'<a href="\2">\1</a>', words)


def markdown(words: str) -> str:
    """The Markdown that READMEs here are written in: headings, paragraphs, lists, fenced code."""
    parts: list[str] = []
    for index, block in enumerate(re.split(r"^```.*$", words, flags=re.MULTILINE)):
        if index % 2:
            parts.append(f"<pre><code>{escape(block.strip(chr(10)))}</code></pre>")
            continue
        for paragraph in re.split(r"\n\s*\n", block.strip()):
            lines = paragraph.splitlines()
            if not lines:
                continue
            if lines[0].startswith("#"):
                parts.append(f"<h3>{inline(lines[0].lstrip('# '))}</h3>")
                lines = lines[1:]
            if lines and lines[0].startswith("- "):
                items = re.split(r"\n- ", "\n".join(lines)[2:])
                parts.append("<ul>" + "".join(f"<li>{inline(' '.join(i.split()))}</li>" for i in items) + "</ul>")
            elif lines:
                parts.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(parts)
