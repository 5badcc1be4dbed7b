"""One self-contained HTML page: no scripts, no links to fetch, pictures inside, light and dark, narrow and wide."""

import base64
import re
from html import escape

from octavo.analysis.experiment import Check, Outcome, Plot, Table
from octavo.report import plots as pictures
from octavo.report.files import number

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2933; --soft: #5c6975; --line: #d9dee3; --band: #f4f6f8;
  --good: #00704f; --bad: #b3261e; --link: #00609a; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --ink: #dfe5ec; --soft: #9aa7b4; --line: #343c46;
  --band: #1d242d; --good: #2ec99b; --bad: #ff7b72; --link: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.35rem; margin-top: 3rem; padding-top: 1rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
a { color: var(--link); } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad);
  font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; margin: .3rem 0 1rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, td.words, th.words { text-align: left; }
td:first-child { min-width: 7rem; } td.words { min-width: 11rem; }
.contents td, .contents th, .contents td.words { min-width: 0; padding: .25rem .4rem; }
tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; border-radius: 4px; }
code { background: var(--band); padding: .05rem .3rem; border-radius: 3px; font-size: .9em; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; border-radius: 4px; } pre code { padding: 0; }
details { margin: 1rem 0; border-left: 3px solid var(--line); padding-left: 1rem; } summary { cursor: pointer;
  color: var(--soft); }
"""


def page(outcomes: list[Outcome], about: str) -> bytes:
    """All outcomes on one page; ``about`` says where and with what they were made."""
    title = "Octavo: published results, recomputed" if len(outcomes) != 1 else outcomes[0].title
    contents = [_contents(outcomes)] if len(outcomes) > 1 else []
    return _whole(title, about, contents + [_section(outcome) for outcome in outcomes])


def sheet(title: str, about: str, plots: tuple[Plot, ...] = (), tables: tuple[Table, ...] = ()) -> bytes:
    """Some pictures and tables on one page."""
    found = [f"<h3>{escape(table.title)}</h3>{_table(table)}" for table in tables]
    return _whole(title, about, [_figure(plot) for plot in plots] + found)


def _whole(title: str, about: str, parts: list[str]) -> bytes:
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(about)}</p>',
    ]
    return "\n".join([*head, *parts, "</body></html>\n"]).encode()


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
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, table.columns, strict=True))
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
    head = "".join(f"<th>{name}</th>" for name in ("target", "value", "tolerance", "ours", "unit", "verdict"))
    head += '<th class="words">source, or why</th>'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def inline(text: str) -> str:
    """Code, bold and links of one paragraph of Markdown; everything else is escaped."""
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\((https?://[^)\s]+)\)", r'<a href="\2">\1</a>', text)


def markdown(text: str) -> str:
    """The Markdown that READMEs here are written in: headings, paragraphs, lists, fenced code."""
    parts: list[str] = []
    for index, block in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
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
