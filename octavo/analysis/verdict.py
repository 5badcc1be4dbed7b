"""A choice in a sentence or two, for people."""

import math
from collections import Counter

from octavo.analysis.choice import Choice
from octavo.analysis.comparison import AS_IT_IS


def verdict(choice: Choice, perplexity: bool, noise: bool = False) -> str:
    """The choice in a sentence or two; ``noise``: the outputs are judged, for there is no loss."""
    kinds = Counter(decision.candidate for decision in choice.decisions)
    eight = sum(count for name, count in kinds.items() if name != AS_IT_IS)
    parts = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    times = f"{choice.bytes_before / max(1, choice.bytes_after):.1f} times smaller"
    if choice.seconds_before and choice.seconds_after:
        speed = choice.seconds_before / choice.seconds_after
        times += f" and {speed:.1f} times as fast" if speed >= 1 else f", but slower here ({speed:.2f} times as fast)"
    cost = amount(choice.increase, perplexity, noise)
    if not eight:
        word = "faster" if choice.objective == "time" else "smaller"
        return f"The model stays as it is: for {choice.engine} no scheme makes any of its layers {word}."
    kept = "within" if choice.met else "above"
    if not choice.met and choice.increase <= choice.budget:  # what was measured is, what it may be wrong by is not
        kept = f"give or take {_short(choice.error, perplexity)}, which is not surely within"
    words = f"{eight} of {len(choice.decisions)} layers in 8 bits ({parts}): these layers are {times}, and {cost}, "
    words += f"{kept} the budget of {_short(choice.budget, perplexity)}."
    if choice.met:
        return words
    tried = f"No mix that was tried, of {len(choice.steps)}, keeps the budget; the best has"
    return f"{tried} {words} The costliest: {', '.join(choice.costliest)}."


def amount(increase: float, perplexity: bool, noise: bool = False) -> str:
    """An increase of the loss in words, or where there is none the noise."""
    if perplexity:
        return f"perplexity changes by {100 * math.expm1(min(increase, 50.0)):+.2f} %".replace("-0.00", "+0.00")
    if noise:
        return f"noise in the outputs is {increase:.2g} of their power"
    return f"the loss changes by {increase:+.3g}"


def _short(budget: float, perplexity: bool) -> str:
    return f"{100 * math.expm1(budget):.2g} %" if perplexity else f"{budget:.2g}"
