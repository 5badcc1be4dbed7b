"""Which scheme for which layer: an ordered list of rules, the first that matches decides.

A single scheme means: everything but the output head. With rules of your own, the output head is quantized only if a
rule gives its exact name: rounding the logits' layer costs most and saves least. A rule that matches nothing is an
error, because it is nearly always a misspelt name.

In a file, rules are a list of objects that leave out what is as usual, and schemes go by their names:
``[{"name": "*.down_proj", "scheme": "int8-dynamic", "smooth": 0.5}, {"scheme": "fp8-dynamic"}]``.
"""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from octavo.core import records, schemes
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn.swap import Layer

HEAD_NAMES = ("lm_head", "embed_out")
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Rule:
    """Layers whose dotted name fits the shell pattern ``name`` and whose class is called ``type`` get ``scheme``.

    ``scheme=None`` leaves them alone. Patterns know ``*``, ``?`` and ``[…]``; ``*`` also crosses dots. ``smooth`` is
    SmoothQuant's α from 0 to 1 or "search" (see ``smooth_``), ``rounding`` how weights are rounded: each to the
    nearest, or so that later ones make up for the errors of earlier ones ("gptq"). Both look at data.
    """

    scheme: Scheme | str | None
    name: str = "*"
    type: str | None = None
    smooth: float | Literal["search"] | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        number = isinstance(self.smooth, int | float) and not isinstance(self.smooth, bool)
        if not (self.smooth in (None, "search") or (number and 0 <= float(self.smooth or 0) <= 1)):
            raise OctavoError(f"rule {self}: smooth is a number from 0 to 1, 'search' or None, not {self.smooth!r}")
        if self.rounding not in get_args(Rounding):
            raise OctavoError(f"rule {self}: rounding is {' or '.join(get_args(Rounding))}, not {self.rounding!r}")
        if self.scheme is None and (self.smooth is not None or self.rounding != "nearest"):
            raise OctavoError(f"rule {self} leaves its layers alone; smooth and rounding need a scheme")

    def matches(self, layer: Layer) -> bool:
        """Whether the rule speaks of this layer, under any of its names."""
        kinds = {cls.__name__ for cls in type(layer.module).__mro__}
        return any(fnmatchcase(n, self.name) for n in layer.names) and (self.type is None or self.type in kinds)

    def __str__(self) -> str:
        return f"name={self.name!r}" + (f", type={self.type!r}" if self.type else "")


Rules = Scheme | str | Sequence[Rule] | Mapping[str, "Scheme | str | None"]


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """A scheme, its name, a list of rules, or ``{name pattern: scheme}`` as a tuple of rules with schemes resolved."""
    if isinstance(rules, Scheme | str):
        rules = [Rule(rules)]
    if isinstance(rules, Mapping):
        rules = [Rule(scheme, name) for name, scheme in rules.items()]
    wrong = [rule for rule in rules if not isinstance(rule, Rule)] if isinstance(rules, Sequence) else [rules]
    if wrong:
        raise OctavoError(f"rules are octavo.Rule(scheme, name=…, type=…), not {wrong[0]!r}")
    if not rules:
        raise OctavoError("the list of rules is empty; nothing would be quantized")
    return tuple(_resolved(rule) for rule in rules)


def _resolved(rule: Rule) -> Rule:
    """The rule with a scheme for a name. A name of SmoothQuant's says that layers are smoothed, too."""
    if rule.scheme is None or isinstance(rule.scheme, Scheme):
        return rule
    smooth = schemes.alpha(rule.scheme) if rule.smooth is None else rule.smooth
    return replace(rule, scheme=schemes.get(rule.scheme), smooth=smooth)


def rules_to_json(rules: Rules) -> list[dict[str, Any]]:
    """Rules as a list of objects for ``json.dumps``; see above."""
    written = []
    for rule in as_rules(rules):
        usual = {f.name: f.default for f in fields(rule) if f.name not in ("scheme", "name")}
        content = {key: value for key, value in asdict(rule).items() if key in usual and value != usual[key]}
        scheme = rule.scheme
        if isinstance(scheme, Scheme):
            name = schemes.describe(scheme)
            scheme = name if name in schemes.NAMES else records.to_json(scheme)
        written.append({"name": rule.name, "scheme": scheme, **content})
    return written


def rules_from_json(data: Any) -> list[Rule]:
    """What ``rules_to_json`` was given, or a person wrote. Raises ``OctavoError`` that says which rule does not fit."""
    if not isinstance(data, list):
        raise OctavoError(f"rules are a list of objects such as {{'name': '*', 'scheme': …}}, not {str(data)[:100]}")
    known = [f.name for f in fields(Rule)]
    read = []
    for number, content in enumerate(data, 1):
        if not isinstance(content, dict) or "scheme" not in content:
            raise OctavoError(f"rule {number} is not an object with a scheme (null leaves alone): {str(content)[:100]}")
        if unknown := [key for key in content if key not in known]:
            raise OctavoError(f"rule {number} has {unknown[0]!r}, which is none of {', '.join(known)}")
        texts = {"name": str, "type": str | None}
        if wrong := [key for key, kind in texts.items() if not isinstance(content.get(key, ""), kind)]:
            raise OctavoError(f"the {wrong[0]} of rule {number} is text, not {content[wrong[0]]!r}")
        try:
            scheme = records.from_json(content["scheme"])
            read.append(Rule(**{**content, "scheme": None if scheme is None else schemes.get(scheme)}))
        except OctavoError as error:
            raise OctavoError(f"rule {number} ({content.get('name', '*')}): {error}") from error
    return read


def write_rules(rules: Rules, path: str | os.PathLike[str]) -> None:
    """Write rules to a file, one a line, which a person can read and edit and ``read_rules`` reads."""
    lines = ",\n".join(json.dumps(rule, ensure_ascii=False) for rule in rules_to_json(rules))
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_rules(path: str | os.PathLike[str]) -> list[Rule]:
    """The rules in a file. Raises ``OctavoError`` that names the file, and the rule that does not fit."""
    try:
        return rules_from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise OctavoError(f"{os.fspath(path)} cannot be read as JSON: {error}") from error
    except OctavoError as error:
        raise OctavoError(f"{os.fspath(path)}: {error}") from error


def assign(model: nn.Module, found: Sequence[Layer], rules: Rules) -> dict[Layer, Scheme | str]:
    """For each layer its scheme, or in words why it is left alone. Raises ``OctavoError`` on a rule without a match."""
    return {layer: decision[0] for layer, decision in _decide(model, found, rules).items()}


def deciding(model: nn.Module, found: Sequence[Layer], rules: Rules) -> dict[Layer, Rule]:
    """For each layer that gets a scheme the rule that gave it, by which it is also smoothed and rounded."""
    decided = _decide(model, found, rules)
    return {layer: rule for layer, (verdict, rule) in decided.items() if isinstance(verdict, Scheme) and rule}


def _decide(model: nn.Module, found: Sequence[Layer], rules: Rules) -> dict[Layer, tuple[Scheme | str, Rule | None]]:
    ordered = as_rules(rules)
    heads = output_heads(model, found)
    used: set[Rule] = set()
    verdict: dict[Layer, Scheme | str] = {}
    decided_by: dict[Layer, Rule | None] = {}
    for layer in found:
        matching = [rule for rule in ordered if rule.matches(layer)]
        rule = matching[0] if matching else None
        table = layer.obstacle is None and layer.eight_bit.by_name_only
        if table or layer.module in heads:  # a rule with its exact name goes before patterns
            rule = next((r for r in matching if r.name in layer.names), rule)
        decided_by[layer] = rule
        if rule is not None and (layer.obstacle is None or rule.scheme is None):
            used.add(rule)
        if layer.obstacle is not None:
            verdict[layer] = layer.obstacle
        elif rule is None:
            verdict[layer] = "no rule matches"
        elif rule.scheme is None:
            verdict[layer] = f"rule {rule}"
        elif layer.module in heads and rule.name not in layer.names:
            verdict[layer] = "output head, left in float unless a rule gives its exact name"
        elif table and rule.name not in layer.names and rule.type is None:
            verdict[layer] = "embedding, left in float unless a rule gives its exact name or its type"
        else:
            assert isinstance(rule.scheme, Scheme)
            refusal = layer.refusal(rule.scheme)
            if refusal is not None and not catches_all(rule):
                raise OctavoError(f"{layer.name}: {refusal}")
            verdict[layer] = refusal or layer.eight_bit.runs(rule.scheme)
    for rule in ordered:
        if rule not in used and not catches_all(rule):  # a catch-all may well find nothing left to decide
            raise _unmatched(rule, ordered, found)
    if not any(isinstance(v, Scheme) for v in verdict.values()):
        raise _nothing(ordered, verdict)
    return {layer: (verdict[layer], decided_by[layer]) for layer in found}


def catches_all(rule: Rule) -> bool:
    """Whether the rule speaks of every layer, and so of none in particular."""
    return rule.name == "*" and rule.type is None


def output_heads(model: nn.Module, found: Sequence[Layer]) -> set[nn.Module]:
    """The layers that make logits: transformers' output embeddings, or those that share an embedding's weight."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = [x for x in found if x.obstacle is None and not isinstance(x.module, nn.Embedding)]
    heads = {x.module for x in linears if id(x.owner) in tables}
    heads |= {x.module for x in found if any(n.rpartition(".")[2] in HEAD_NAMES for n in x.names)}
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter) and isinstance(head := getter(), nn.Module):
        heads.add(head)
    return heads


def _unmatched(rule: Rule, ordered: Sequence[Rule], found: Sequence[Layer]) -> OctavoError:
    for layer in found:
        earlier = next((r for r in ordered if r.matches(layer)), rule)
        if layer.obstacle is None and rule.matches(layer) and earlier is not rule:
            return OctavoError(f"the rule {rule} never decides: {earlier} comes before it, for {layer.name}; swap them")
    blocked = [x for x in found if rule.matches(x)]
    if blocked:
        why = "; ".join(f"{x.name}: {x.obstacle}" for x in blocked[:3])
        return OctavoError(f"the rule {rule} matches only layers that cannot be quantized ({why})")
    names = [x.name for x in found if x.obstacle is None]
    near = difflib.get_close_matches(rule.name, names, n=3, cutoff=0.3) or names[:3]
    return OctavoError(f"the rule {rule} matches no layer; there are, for example, {', '.join(near) or 'none at all'}")


def _nothing(rules: Sequence[Rule], verdict: Mapping[Layer, Scheme | str]) -> OctavoError:
    reasons: dict[str, list[str]] = {}
    for layer, why in verdict.items():
        reasons.setdefault(str(why), []).append(layer.name or "the model itself")
    listed = "; ".join(f"{why}: {', '.join(xs[:3])}{' …' if len(xs) > 3 else ''}" for why, xs in reasons.items())
    return OctavoError(f"nothing to quantize: {listed or 'the model has no parameters'}")
