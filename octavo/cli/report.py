"""What ``octavo quantize`` has to say: the table of layers, the totals, and how to open what was written."""

import re
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from octavo.cli.console import LABEL, Screen, mb, table

if TYPE_CHECKING:
    from octavo.analysis.choice import Choice
    from octavo.cli.measure import Judge
    from octavo.cli.quantize import Plan
    from octavo.core.schemes import Scheme
    from octavo.nn.swap import Layer
    from octavo.ptq.quantize import LayerReport, Summary

#: Schemes that vLLM has kernels for; see its CompressedTensorsConfig.
VLLM = {"int8-dynamic", "fp8-dynamic", "fp8-block", "int8-weight-only", "fp8-weight-only"}


@dataclass(frozen=True)
class Result:
    """All that was done; ``judge`` says in words why there is no figure ``before`` and ``after``."""

    model: str
    kind: str
    transformers: bool
    causal: bool
    out: str
    plan: "Plan"
    summary: "Summary"
    shared: dict[str, str]
    calibrated: dict[str, Any] | None
    judge: "Judge | str"
    before: float | None
    after: float | None
    choice: "Choice | None" = None
    page: str | None = None
    with_batches: bool = False  # the function that makes the model returns data, too


def done(screen: Screen, result: Result) -> None:
    """The whole report, or the same as JSON."""
    summary = result.summary
    layers_table(screen, _with_reasons(summary.layers, result.choice), result.shared)
    screen.say()
    for name, words in _totals(screen, result).items():
        screen.facts({name: words}, "bold" if name in ("size", figure_of(result)) else None)
    if result.choice is not None:
        screen.facts({"chosen": result.choice.verdict})
    for note in summary.notes:
        screen.facts({"note": note}, "yellow")
    screen.facts({"written": f"{result.out}  ({result.plan.layout})"}, "bold green")
    if result.page is not None:
        screen.facts({"page": result.page}, "bold green")
    if result.plan.why:
        screen.facts({"": f"in Octavo's own layout, because of {result.plan.why}"}, "yellow")
    say_openers(screen, result)
    screen.result(_document(screen, result))


def calibrated(screen: Screen, model: str, file: str, told: dict[str, Any]) -> None:
    """What ``--save-calibration`` without ``--out`` did."""
    screen.facts({"calibrated": calibration_words(told)})
    screen.facts({"written": file}, "bold green")
    screen.say()
    screen.say(f"octavo quantize {model} … --calibration {file}", whole=True)
    screen.result({"model": model, "calibration": {**told, "file": file}, "seconds": screen.seconds})


def plan(screen: Screen, model: str, made: "Plan", choice: "Choice | None" = None, page: str | None = None) -> None:
    """Which layer would become what; ``page``: a file that was written nevertheless."""
    from octavo.core.schemes import Scheme, describe
    from octavo.ptq.quantize import LayerReport

    layers = [
        LayerReport(x.name, x.kind, describe(v), "", x.nbytes, 0)
        if isinstance(v, Scheme)
        else LayerReport(x.name, x.kind, None, v, x.nbytes, x.nbytes)
        for x, v in made.verdict.items()
    ]
    layers_table(screen, _with_reasons(layers, choice), shared(made.verdict), planned=True)
    screen.say()
    why = f", because of {made.why}" if made.why else ""
    written = "Nothing was changed or written." if page is None else f"Nothing was changed; only {page} is written."
    screen.say(f"{written} The layout would be {made.layout}{why}.")
    found = [{"name": x.name, "kind": x.kind, "scheme": x.scheme, "reason": x.reason or None} for x in layers]
    screen.result({"model": model, "layers": found, "layout": made.layout, "layout_reason": made.why or None})


def shared(verdict: "dict[Layer, Scheme | str]") -> dict[str, str]:
    """Layers that hold the same weight as an earlier one: their name and the other's."""
    first: dict[int, str] = {}
    weights = [(x.name, x.module.weight) for x in verdict if hasattr(x.module, "weight")]
    owners = {name: first.setdefault(id(weight), name) for name, weight in weights if weight is not None}
    return {name: owner for name, owner in owners.items() if owner != name}


def pattern(name: str) -> str:
    """A layer's name with ``*`` for the numbers in it, as a rule would name it and its likes."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def openers(result: Result) -> dict[str, str]:
    """How to open the folder, by engine; only what is known to be true of this layout and these schemes."""
    lines = {"octavo": f'octavo.load("{result.out}")'}
    if not result.transformers:
        made = f"{result.model.replace(':', '.')}(){'[0]' if result.with_batches else ''}"
        lines["octavo"] = f'octavo.load("{result.out}", model={made})'
    if result.plan.layout == "compressed-tensors":
        cls = "AutoModelForCausalLM" if result.causal else result.kind
        lines["transformers"] = f'{cls}.from_pretrained("{result.out}")'
        if result.causal and {x.scheme for x in result.summary.quantized} <= VLLM:
            lines["vLLM"] = f"vllm serve {result.out}"
    return lines


def say_openers(screen: Screen, result: Result) -> None:
    """A line an engine."""
    screen.say()
    for engine, words in openers(result).items():
        screen.say(f"{engine:<{LABEL}} {words}", whole=True)
        if engine == "transformers":
            screen.say(f"{'':<{LABEL}} (needs pip install compressed-tensors)")


def layers_table(screen: Screen, layers: "list[LayerReport]", shared: dict[str, str], planned: bool = False) -> None:
    """What became of every family of layers, or will; with the SQNR of their weights where that was measured."""
    if screen.as_json:
        return
    eight, left = _group(layers, True), _group(layers, False)
    numbers = ["layers", "MB", *([] if planned else ["→ MB"]), *(["SQNR"] if _sqnrs(layers) else [])]
    shown = table("in 8 bits", *numbers, right=numbers, fold=["in 8 bits"])
    for (scheme, kind), members in eight.items():
        shown.add_row(scheme, f"{len(members)} {kind}", *_sizes(members, planned), style="bold")
        for name, some in _families(members).items():
            shown.add_row(f"  {name}", str(len(some)), *_sizes(some, planned))
    screen.say(shown)
    if not left:
        return
    screen.say()
    rest = table("left in float", "MB", "why, and which", right=("MB",), fold=("why, and which",))
    for (reason, kind), members in left.items():
        names = ", ".join(_families(members))
        same = f" (shares the weight of {shared[members[0].name]})" if members[0].name in shared else ""
        rest.add_row(f"{len(members)} {kind}", mb(sum(x.bytes_before for x in members)), f"{reason}: {names}{same}")
    screen.say(rest)


def _with_reasons(layers: "list[LayerReport]", choice: "Choice | None") -> "list[LayerReport]":
    """The layers, saying of those that a choice left alone that it did, rather than by which of its rules."""
    if choice is None:
        return layers
    why = dict.fromkeys((decision.layer for decision in choice.decisions), "chosen to stay as it is")
    return [
        replace(x, reason=why.get(x.name, "embedding or output head: not among what is chosen from"))
        if x.scheme is None and x.reason.startswith("rule ")
        else x
        for x in layers
    ]


def _group(layers: "list[LayerReport]", eight_bit: bool) -> "dict[tuple[str, str], list[LayerReport]]":
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        if (layer.scheme is not None) == eight_bit:
            groups.setdefault((layer.what, layer.kind), []).append(layer)
    return dict(sorted(groups.items(), key=lambda group: -sum(x.bytes_before for x in group[1])))


def _families(layers: "list[LayerReport]") -> "dict[str, list[LayerReport]]":
    """The layers by the pattern of their name; one that is alone in it, by its name."""
    found: dict[str, list[LayerReport]] = {}
    for layer in layers:
        found.setdefault(pattern(layer.name), []).append(layer)
    return {some[0].name if len(some) == 1 else name: some for name, some in found.items()}


def _sizes(layers: "list[LayerReport]", planned: bool) -> list[str]:
    before, after = (mb(sum(x)) for x in ([y.bytes_before for y in layers], [y.bytes_after for y in layers]))
    measured = _sqnrs(layers)
    sizes = [before] if planned else [before, f"→ {after:>5}"]
    return [*sizes, f"{statistics.median(measured):.1f} dB"] if measured else sizes


def _sqnrs(layers: "list[LayerReport]") -> list[float]:
    return [x.sqnr for x in layers if x.sqnr is not None]


def figure_of(result: Result) -> str:
    """What the model is judged by."""
    return "perplexity" if isinstance(result.judge, str) else result.judge.name


def calibration_words(told: dict[str, Any]) -> str:
    """From what the ranges of the inputs were made."""
    several = "1 batch" if told["batches"] == 1 else f"{told['batches']:,} batches"
    return f"{told['range']}, over {several} of {told['source']}"


def unseen(result: Result) -> dict[str, str]:
    """What the page tells of the model before and after, by figures that took no part in a choice."""
    if isinstance(result.judge, str) or result.before is None or result.after is None:
        return {}
    figure, (words, over) = figure_of(result), _figures(result).values()
    if result.judge.tokens is None:
        return {f"{figure.capitalize()}, {over}": words}
    return {"Perplexity on text it has not seen": f"{words}, {over}"}


def _figures(result: Result) -> dict[str, str]:
    """Before and after, in words: a perplexity with its change in percent, a figure of the user's as it is."""
    if isinstance(result.judge, str) or result.before is None or result.after is None:
        return {figure_of(result): f"not measured: {result.judge}"}
    before, after = result.before, result.after
    if result.judge.tokens is not None:
        change = f"{100 * (after / before - 1):+.2f} %".replace("-0.00", "+0.00")
        return {"perplexity": f"{before:.3f} → {after:.3f} ({change})", "": f"over {result.judge.over}"}
    return {result.judge.name: f"{before:.6g} → {after:.6g} ({after - before:+.4g})", "": result.judge.over}


def _measured(result: Result) -> dict[str, Any]:
    if isinstance(result.judge, str) or result.before is None or result.after is None:
        return {"perplexity": {"not_measured": str(result.judge)}}
    before, after = result.before, result.after
    told: dict[str, Any] = {"before": before, "after": after}
    if result.judge.tokens is not None:
        return {"perplexity": {**told, "change_percent": 100 * (after / before - 1), "over": result.judge.over}}
    return {"score": {"name": result.judge.name, **told, "change": after - before}}


def _totals(screen: Screen, result: Result) -> dict[str, str]:
    summary = result.summary
    worst = min(summary.quantized, key=lambda x: x.sqnr if x.sqnr is not None else float("inf"))
    return {
        "size": f"{mb(summary.bytes_before)} MB → {mb(summary.bytes_after)} MB "
        f"({summary.bytes_before / summary.bytes_after:.2f} times smaller)",
        **_figures(result),
        **({} if result.calibrated is None else {"calibrated": calibration_words(result.calibrated)}),
        "weight SQNR": f"median {statistics.median(_sqnrs(summary.quantized)):.1f} dB, "
        f"worst {worst.sqnr:.1f} dB in {worst.name}",
        "seconds": ", ".join(f"{name} {seconds:.1f}" for name, seconds in screen.seconds.items()),
    }


def _document(screen: Screen, result: Result) -> dict[str, Any]:
    summary = result.summary
    worst = min(summary.quantized, key=lambda x: x.sqnr if x.sqnr is not None else float("inf"))
    return {
        "model": result.model,
        "class": result.kind,
        "out": result.out,
        "layout": result.plan.layout,
        "layout_reason": result.plan.why or None,
        "bytes_before": summary.bytes_before,
        "bytes_after": summary.bytes_after,
        **_measured(result),
        **({} if result.calibrated is None else {"calibration": result.calibrated}),
        **({} if result.choice is None else {"choice": result.choice.to_json()}),
        "weight_sqnr": {
            "median": statistics.median(_sqnrs(summary.quantized)),
            "worst": worst.sqnr,
            "worst_layer": worst.name,
        },
        "seconds": screen.seconds,
        "open_with": openers(result),
        "notes": summary.notes,
        "layers": summary.to_json()["layers"],
    }
