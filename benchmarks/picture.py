"""The README's picture: what each scheme costs in perplexity, and how large the model becomes."""

from pathlib import Path
from typing import Any

FLOAT, EIGHT = "#8a8f98", {"INT8": "#2f6fb3", "FP8": "#d9772b", "mixed": "#5a9e4b"}


def family(scheme: str) -> str:
    """Whose numbers a scheme uses."""
    return "mixed" if "e3m4-int8" in scheme else "INT8" if scheme.startswith("int8") else "FP8"


def draw(results: dict[str, Any], file: Path) -> None:
    """A bar a scheme, shortest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    base = results["float"]["perplexity"]
    schemes = sorted((s for s in results if s != "float"), key=lambda s: -results[s]["perplexity"])
    change = [100 * (results[s]["perplexity"] / base - 1) for s in schemes]
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    bars = axes.barh(schemes, change, color=[EIGHT[family(s)] for s in schemes])
    labels = [f" {c:+.2f} %, {results[s]['mb']:.0f} MB" for s, c in zip(schemes, change, strict=True)]
    axes.bar_label(bars, labels, fontsize=8)
    axes.margins(x=0.22)
    axes.axvline(0, color=FLOAT)
    axes.set_xlabel(f"change of perplexity against FP32 ({base:.2f}, {results['float']['mb']:.0f} MB), %")
    axes.set_title("SmolLM2-135M in 8 bits", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=[Patch(color=c, label=n) for n, c in EIGHT.items()], frameon=False, loc="upper right")
    figure.savefig(file, dpi=130)
    plt.close(figure)
