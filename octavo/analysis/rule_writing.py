"""Rules that say, as shortly as a person would, what became of every layer.

Layers are told apart by families: names that differ in numbers only. What most layers get is the last rule and needs
no name; a family that gets something else as a whole is one rule, ``*.down_proj`` for short where that means no other
layer; single layers come first, by their names. The rules are checked against what they were made from.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from octavo.analysis.comparison import Candidate
from octavo.errors import OctavoError
from octavo.nn.swap import Layer
from octavo.ptq.rules import Rule, deciding


def family(name: str) -> str:
    """A layer's name with ``*`` for the numbers in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def rules_for(model: nn.Module, layers: Sequence[Layer], decided: Mapping[str, Candidate]) -> list[Rule]:
    """Rules by which ``decided``, a candidate for every one of the layers by its name, comes about.

    Raises ``OctavoError`` if that cannot be said in rules.
    """
    names = [layer.name for layer in layers]
    parameters = {layer.name: layer.weight.numel() for layer in layers}
    most = _most(names, decided, parameters)
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    single: list[Rule] = []
    common: list[Rule] = []
    for pattern, members in families.items():
        usual = _most(members, decided, Counter(members))
        # an exception is cheaper to name than a family whose usual is not the model's
        single += [_rule(decided[name], name) for name in members if decided[name] != usual]
        if usual != most:
            alike = [name for name in members if decided[name] == usual]
            short = _short(pattern, members, names)
            common += [_rule(usual, name) for name in (alike if short is None else [short])]
    rules = [*single, *common, _rule(most, "*")]
    _check(model, rules, decided)
    return rules


def _most(names: Sequence[str], decided: Mapping[str, Candidate], weight: Mapping[str, int]) -> Candidate:
    count: Counter[Candidate] = Counter()
    for name in names:
        count[decided[name]] += weight[name]
    return count.most_common(1)[0][0]


def _rule(candidate: Candidate, name: str) -> Rule:
    return Rule(candidate.scheme, name, smooth=candidate.smooth, rounding=candidate.rounding)


def _short(pattern: str, members: Sequence[str], names: Sequence[str]) -> str | None:
    """The shortest ending of the pattern that means these layers and no others; None if even all of it means more."""
    if len(members) == 1:
        return members[0]
    parts = pattern.split(".")
    endings = ["*." + ".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1)]
    fitting = (e for e in [*endings, pattern] if {name for name in names if fnmatchcase(name, e)} == set(members))
    return next(fitting, None)


def _check(model: nn.Module, rules: Sequence[Rule], decided: Mapping[str, Candidate]) -> None:
    from octavo.nn import swap

    if all(candidate.scheme is None for candidate in decided.values()):
        return  # nothing to decide: quantize_ would say so
    found = {layer.name: rule for layer, rule in deciding(model, swap.layers(model), rules).items()}
    for name, candidate in decided.items():
        rule = found.get(name)
        got = Candidate(None) if rule is None else Candidate(rule.scheme, rule.smooth, rule.rounding)  # type: ignore[arg-type]
        if got != candidate:
            raise OctavoError(f"{name}: the rules give it {got.name}, not {candidate.name}; its name is too unusual")
