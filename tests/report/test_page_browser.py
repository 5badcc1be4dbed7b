"""The page of a comparison in a real browser: narrow and wide, dark and light, by keyboard, without scripts."""

import pytest

from octavo.report.comparison import page
from tests.report import browser, samples
from tests.report.test_comparison import HOSTILE, outliers

pytestmark = pytest.mark.skipif(browser.binary() is None, reason="no Chromium here: apt-get install chromium")
SIZES = {"phone": (360, 800), "desktop": (1280, 900)}

# Every text's contrast with the nearest opaque colour behind it; texts of folded parts are looked at too.
CONTRAST = """(() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d',
    {willReadFrequently: true});
  const rgba = colour => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data; };
  const light = c => { const [r, g, b] = [0, 1, 2].map(i => { const v = c[i] / 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const bad = [], known = new Map();
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['TITLE', 'DESC', 'STYLE'].includes(element.tagName.toUpperCase())) continue;
    const style = getComputedStyle(element), text = element.closest('svg') ? style.fill : style.color;
    let behind = element, back = null;
    while (behind && !back) {
      const colour = getComputedStyle(behind).backgroundColor;
      if (rgba(colour)[3] === 255) back = colour;
      behind = behind.parentElement;
    }
    const key = text + back;
    if (!known.has(key)) {
      const [a, b] = [light(rgba(text)), light(rgba(back || 'white'))].sort((x, y) => y - x);
      known.set(key, (a + 0.05) / (b + 0.05));
      if (known.get(key) < 4.5)
        bad.push(`${element.tagName} ${element.className.baseVal ?? element.className}: `
          + `${element.textContent.slice(0, 40)} ${text} on ${back}: ${known.get(key)}`);
    }
  }
  return [known.size, bad]; })()"""
REACHABLE = "a[href], summary, [tabindex='0'], input, button, select"
OVERFLOW = "[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A whole page with a choice, and one of a comparison alone that has hostile names."""
    place = tmp_path_factory.mktemp("pages")
    names = samples.llama(8)
    compared = samples.comparison(names)
    made = {
        "whole": page(
            compared, samples.choice(compared), samples.magnitudes(names), outliers(names), command="octavo " * 40
        )
    }
    odd = [f"{HOSTILE}.{i}.{'w' * 90}" for i in range(4)]
    hostile = samples.comparison(odd, model=HOSTILE + "m" * 120, data=HOSTILE + "d" * 200, machine="x" * 200)
    made["hostile"] = page(hostile, samples.choice(hostile), samples.magnitudes(odd), outliers(odd), command=HOSTILE)
    for name, content in made.items():
        (place / f"{name}.html").write_bytes(content)
    return place


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["whole", "hostile"])
def test_looks(chromium, pages, tmp_path, name, size, scheme):
    file = pages / f"{name}.html"
    chromium.open(file, *SIZES[size], scheme)
    chromium.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    document, body, window = chromium.ask(OVERFLOW)
    assert document <= window and body <= window
    looked, bad = chromium.ask(CONTRAST)
    assert looked > 4 and bad == []
    assert chromium.ask("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    shown = chromium.ask(
        "[...document.querySelectorAll('svg.plot')].filter(s => s.getBoundingClientRect().width).length"
    )
    assert shown == (1 + (9 if name == "whole" else 4) + 1)
    small = "Math.min(...[...document.querySelectorAll('svg.plot text')].map(t => t.getBoundingClientRect()"
    assert chromium.ask(f"{small}).filter(b => b.width).map(b => Math.max(b.width, b.height)))") >= 5
    chromium.picture(tmp_path / f"{name}-{size}-{scheme}.png")
    assert (tmp_path / f"{name}-{size}-{scheme}.png").stat().st_size > 50_000
    requests = [
        e["params"]["request"]["url"] for e in chromium.events if e.get("method") == "Network.requestWillBeSent"
    ]
    assert requests == [file.as_uri()]
    loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
    assert [e for e in chromium.events if e.get("method") in loud] == []


def test_text_of_plots_is_legible_on_a_phone(chromium, pages):
    chromium.open(pages / "whole.html", 360, 800)
    sizes = chromium.ask(
        "[...document.querySelectorAll('svg.plot')].filter(s => s.getBoundingClientRect().width).map(s => "
        "[...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize) "
        "* s.getBoundingClientRect().width / s.viewBox.baseVal.width)).flat()"
    )
    assert min(sizes) >= 8


def test_by_keyboard(chromium, pages):
    """Tab comes to every control in the page's order, Enter opens a fold, arrows scroll a table."""
    chromium.open(pages / "whole.html", 360, 800)
    visible = "getClientRects().length && !e.closest('details:not([open]) > :not(summary)')"
    wanted = f'[...document.querySelectorAll("{REACHABLE}")].filter(e => e.{visible})'
    expected = chromium.ask(f"(window.wanted = {wanted}).length")
    reached = []
    for _ in range(expected):
        chromium.press("Tab", 9)
        reached.append(chromium.ask("window.wanted.indexOf(document.activeElement)"))
    assert reached == list(range(expected))
    outlined = chromium.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert outlined != "none"
    chromium.ask("document.querySelector('main summary').focus()")
    chromium.press("Enter", 13)
    assert chromium.ask("document.querySelector('main details').open")
    shown = "e.scrollWidth > e.clientWidth && !e.closest('details:not([open]) > :not(summary)')"
    chromium.ask(f"(window.region = [...document.querySelectorAll('.wide')].find(e => {shown})).focus()")
    chromium.press("ArrowRight", 39)
    moved = "new Promise(done => { let n = 0; const look = () => window.region.scrollLeft || n++ > 100 "
    moved += "? done(window.region.scrollLeft) : setTimeout(look, 50); look(); })"
    assert chromium.ask(moved) > 0


def test_names_for_those_who_cannot_see(chromium, pages):
    """Every plot, table and control has a name; headings do not skip a level."""
    chromium.open(pages / "whole.html", 1280, 900)
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in nodes:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert all(roles["image"]) and len(roles["image"]) >= 2
    assert all(roles["region"]) and all(roles["link"]) and all(roles["DisclosureTriangle"])
    assert "main" in roles and "navigation" in roles and "contentinfo" in roles
    assert roles["rowheader"] and roles["columnheader"]


def test_on_paper(chromium, pages):
    chromium.open(pages / "whole.html", 1280, 900, "dark")
    printed = chromium.call("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert len(printed) > 50_000


def test_without_scripts(chromium, pages, tmp_path):
    """The very same picture."""
    for name, scripts in (("with", True), ("without", False)):
        chromium.open(pages / "whole.html", 360, 800, scripts=scripts)
        chromium.picture(tmp_path / name)
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()
