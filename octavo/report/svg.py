"""Matplotlib's drawings as SVG that belongs to a page: its fonts, and its colours, whichever they are at the moment.

A figure is drawn in placeholder colours, each of which becomes a CSS variable of the page; a page that turns dark turns
its plots with it. Text stays text, in the page's font. Ids are made the plot's own, so that many plots fit in one page.
"""

import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.report.plots import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Placeholder colours, and the CSS variables that take their places.
VARIABLES = {
    "#fe01f0": "--paper",
    "#fe01f1": "--ink",
    "#fe01f2": "--soft",
    "#fe01f3": "--line",
    "#fe01f4": "--accent",
    "#fe01f5": "--band",
    **{f"#fe02f{i}": f"--series-{i}" for i in range(8)},
}
COLOUR = {variable.removeprefix("--"): placeholder for placeholder, variable in VARIABLES.items()}
PAGE = Theme(COLOUR["paper"], COLOUR["ink"], COLOUR["line"], tuple(COLOUR[f"series-{i}"] for i in range(8)))


def style(size: float = 10) -> dict[str, Any]:
    """Settings for ``matplotlib.rc_context``: a page's plots have no frame, and text of ``size`` points."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "octavo",
        "text.parse_math": False,  # a layer's name is no formula
        "font.size": size,
        "text.color": COLOUR["ink"],
        "axes.edgecolor": COLOUR["line"],
        "axes.labelcolor": COLOUR["soft"],
        "xtick.color": COLOUR["line"],
        "ytick.color": COLOUR["line"],
        "xtick.labelcolor": COLOUR["soft"],
        "ytick.labelcolor": COLOUR["soft"],
        "grid.color": COLOUR["line"],
        "grid.linewidth": 0.6,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }


def matplotlib() -> Any:
    """The library. Raises ``OctavoError`` where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise OctavoError("the plots need matplotlib: pip install 'octavo[cli]'") from None
    return matplotlib


def inline(figure: "Figure", name: str, title: str, description: str, classes: str = "") -> str:
    """The figure as an ``<svg>`` element; ``name`` is its own on the page, ``description`` says what the plot shows."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts will have it
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # points too close to be told apart
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = _own_ids(text, name)
    text = _page_fonts(text)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _short, text)
    text = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", text)
    text = re.sub(r">\s+<", ">\n<", text).strip()
    box = re.search(r'viewBox="[^"]*"', text)
    head = (
        f'<svg class="plot {classes}" {box[0] if box else ""} role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    )
    return re.sub(r"^<svg.*?>", lambda _: head, text, count=1, flags=re.DOTALL)


def _short(found: "re.Match[str]") -> str:
    """Coordinates to a tenth of a point."""
    return re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), found[0])


def _own_ids(text: str, name: str) -> str:
    """Ids that something points to get the plot's name, all others go."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    return text.replace("xlink:href", "href")


def _page_fonts(text: str) -> str:
    """Sizes stay, families are the page's."""
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return re.sub(r"font: ((?:[a-z]+ |\d{3} )*)([\d.]+px) [^;\"]*", _font, text)


def _font(found: "re.Match[str]") -> str:
    weight = re.search(r"bold|\d{3}", found[1])
    return f"font-size: {found[2]}" + (f"; font-weight: {weight[0]}" if weight else "")
