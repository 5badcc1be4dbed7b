"""What a reader who has never met an 8-bit number needs to know: how to read the page, and what its words mean."""

from collections.abc import Container
from html import escape

from octavo.report.html import fold

#: A paragraph, and the section of the page that it is about.
READING = (
    (
        "",
        "A model is a list of layers, and a layer mostly multiplies its <b>inputs</b> by its <b>weights</b>. As "
        "trained, each of these numbers takes 16 or 32 bits. In 8 bits they take a half or a quarter of the memory, "
        "and many processors multiply them faster. But 8 bits hold only 256 different values, so every number is "
        "rounded, and the model’s answers change a little. How little depends on the format, and on the layer.",
    ),
    (
        "trade-off",
        "<b>Trade-off:</b> every point is a scheme, a way to run the whole model in 8 bits. The lower it stands, the "
        "less the model suffers; the further left, the smaller or the faster it is. Bottom left is best.",
    ),
    (
        "chosen",
        "<b>Choice:</b> a mix gives every layer the cheapest scheme that it can bear, within a budget for the whole "
        "model. The table says why each layer got what it has.",
    ),
    (
        "layers",
        "<b>Layers:</b> each cell is one layer in one scheme, all others untouched. The stronger its colour, the more "
        "it costs.",
    ),
    (
        "numbers",
        "<b>Numbers:</b> how large a layer’s numbers are, above the numbers that a format has. Where a curve stands "
        "over wide gaps rounding is coarse; left of a format’s first stroke everything becomes zero.",
    ),
    (
        "outliers",
        "<b>Outliers:</b> which input dimensions are far larger than the others, and in which layers: they widen the "
        "scale that all numbers share, and the small ones are rounded away.",
    ),
)

GLOSSARY: dict[str, str] = {
    "INT8": "whole numbers from −128 to 127 in 8 bits, evenly spaced. Precise for large numbers, blind to small ones.",
    "FP8": "floating-point numbers in 8 bits: a sign, a few bits of exponent (how large) and of mantissa (how exact). "
    "Numbers lie densely around zero and sparsely far out, so large and small ones survive together.",
    "E4M3, E5M2, E3M4, E2M5": "kinds of FP8, by their bits of exponent and of mantissa: more exponent reaches further, "
    "more mantissa is finer. Current processors run E4M3 (E4M3FN) and E5M2 fast.",
    "scale": "the number that all values of a group are divided by before rounding, so that they fill the format’s "
    "range. One a channel (row of the weight), one a token (row of the input), or one for every group of 64 or 128.",
    "dynamic, static": "whether the scale of the inputs is made anew for every input, or fixed beforehand on example "
    "data (calibration), which is faster and less exact.",
    "weight-only": "only the weights are in 8 bits; inputs and arithmetic stay as they were. Saves memory, and time "
    "only where reading the weights takes most of it.",
    "scheme": "a way to run a layer: the formats of weights and inputs, and how many numbers share a scale.",
    "mix": "a scheme for every layer, not the same for all.",
    "SmoothQuant": "moves large inputs’ size into the weights, without changing the product, so that both are easier "
    "to round. Its α says how much of it is moved (2211.10438).",
    "GPTQ": "rounds weights one after another so that later ones make up for the errors of earlier ones (2210.17323).",
    "LLM.int8()": "runs INT8 but takes the few input columns with very large numbers out and multiplies them in 16 "
    "bits (2208.07339).",
    "outlier": "an input dimension whose numbers are much larger than the others’. It widens the scale, and everything "
    "small is rounded away.",
    "loss, perplexity": "how badly a model predicts held-back text. Perplexity, the exponential of the loss, is among "
    "how many next words it hesitates, so to speak; one per cent more is hardly noticed, ten are.",
    "divergence": "how far the rounded model’s predictions are from the original’s (Kullback-Leibler, in nats): 0 is "
    "the same. A thousandth of a nat is roughly a tenth of a per cent of perplexity.",
    "noise in the outputs": "of models that are judged by no loss: the power of what the rounding changes, as a share "
    "of the outputs’ power. 0.0001 is a change by a hundredth, on average.",
    "SQNR": "signal-to-quantization-noise ratio, in decibels: how much larger the numbers are than their rounding "
    "errors. 20 dB: the errors are a tenth; 40 dB: a hundredth. Every 6 dB are worth one bit.",
    "budget": "by how much the loss may grow at most. The search looks for the fastest, or smallest, mix within it.",
    "16 bits, float": "the numbers a model comes in: FP32, FP16 or BF16. A layer “as it is” keeps them.",
    "MB": "a million bytes.",
}


def reading(sections: Container[str]) -> str:
    """The paragraphs for a newcomer, folded: those about sections that there are."""
    told = "".join(f"<p>{part}</p>" for section, part in READING if not section or section in sections)
    return fold(
        "New to 8-bit numbers? How to read this page", f'{told}<p>More in <a href="#words">the glossary</a>.</p>'
    )


def glossary() -> str:
    """All words."""
    entries = (f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in GLOSSARY.items())
    return f"<dl>{''.join(entries)}</dl>"
