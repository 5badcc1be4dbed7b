"""What ``analysis.outliers`` found, as tables and as pictures."""

import math

from octavo.analysis.experiment import Plot, Series, Table
from octavo.analysis.outliers import Input, Outliers

GROUP = 12.0  # the crest factor up to which INT8 beats E4M3


def tables(found: Outliers) -> tuple[Table, ...]:
    """The outlier dimensions, the massive activations, and every input of a layer."""
    dimensions = [
        (d.index, d.layers, 100 * d.tokens, d.largest, "yes" if d.systematic else "no") for d in found.dimensions
    ]
    massive = [
        (m.name, "-" if m.position is None else m.position, m.dimension, m.value, m.ratio, m.times)
        for m in found.massive
    ]
    inputs = [
        (described(x), x.width, x.largest, x.crest, x.token_crest, x.kurtosis, x.dimensions, 100 * x.affected)
        for x in found.inputs
    ]
    return (
        Table(
            "dimensions",
            f"Dimensions of the hidden state (of {found.width}) with magnitudes above {found.threshold:g}",
            ("dimension", f"layers (of {found.blocks})", "% of tokens", "largest", "LLM.int8()'s outlier"),
            tuple(dimensions),
        ),
        Table(
            "massive",
            "Massive activations: beyond 100 and a thousand medians",
            ("entering", "position", "dimension", "value", "medians", "times"),
            tuple(massive),
        ),
        Table(
            "inputs",
            "What enters the layers",
            ("entering", "width", "largest", "crest", "token's crest", "kurtosis", "dimensions", "% of tokens"),
            tuple(inputs),
        ),
    )


def plots(found: Outliers) -> tuple[Plot, ...]:
    """In how many layers each dimension is an outlier; how large numbers are along the model; how heavy their tails."""
    known = {d.index: d for d in found.dimensions}
    places = tuple(range(found.width))
    layers = tuple(100 * known[i].layers / found.blocks if i in known else 0.0 for i in places)
    tokens = tuple(100 * known[i].tokens if i in known else 0.0 for i in places)
    stream = [x for x in found.inputs if x.kind == "norm"] or list(found.of_layers)
    along = tuple(range(len(stream)))
    order = tuple(range(len(found.of_layers)))
    return (
        Plot(
            "dimensions",
            f"Dimensions of the hidden state above {found.threshold:g}",
            "dimension",
            "%",
            (Series("of the layers", places, layers), Series("of the tokens there", places, tokens)),
            "steps",
        ),
        Plot(
            "stream",
            "Magnitudes along the model, " + ("before each norm" if stream[0].kind == "norm" else "before each layer"),
            "place in the model",
            "magnitude",
            (
                Series("largest", along, tuple(_positive(x.largest) for x in stream)),
                Series("root mean square", along, tuple(_positive(x.rms) for x in stream)),
                Series("median", along, tuple(_positive(x.median) for x in stream)),
            ),
            y_scale="log10",
        ),
        Plot(
            "tails",
            "Crest factors of what enters the layers: INT8 beats E4M3 below about 12",
            "place in the model",
            "largest over root mean square",
            (
                Series("of a token", order, tuple(_positive(x.token_crest) for x in found.of_layers)),
                Series("of all numbers", order, tuple(_positive(x.crest) for x in found.of_layers)),
                Series("12", order, (GROUP,) * len(order), dashed=True),
            ),
            y_scale="log10",
        ),
    )


def described(one: Input) -> str:
    """The layers that an input enters, in a few words."""
    first, *others = one.names
    return f"{first} and {len(others)} more" if others else first


def _positive(x: float) -> float:
    """A number for a logarithmic axis, which leaves gaps where there is none."""
    return x if x > 0 else math.nan
