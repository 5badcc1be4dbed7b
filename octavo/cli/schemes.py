"""What the command line says of schemes, and how its flags become rules.

The names are repeated here in words, because help must not wait for torch; a test holds them to ``octavo.schemes``.
"""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.core.cast import Cast
    from octavo.core.formats import Format
    from octavo.core.schemes import Scheme
    from octavo.ptq.rules import Rule

DEFAULT = "int8-dynamic"
SCHEMES = {
    "int8-dynamic": "INT8 weights and inputs, a scale a channel and a token: fast nearly everywhere",
    "fp8-dynamic": "FP8 (E4M3FN) weights and inputs, the same scales: fast on new GPUs",
    "int8-weight-only": "INT8 weights; inputs and arithmetic stay as they are: safest, saves memory only",
    "fp8-weight-only": "FP8 weights; inputs and arithmetic stay as they are",
    "fp8-block": "FP8 as in DeepSeek-V3: a scale for 128 × 128 weights and 128 inputs",
    "int8-group64": "INT8 with a scale for every 64 numbers: the accurate one",
    "e3m4-int8-group64": "INT8 weights, E3M4 inputs, a scale for every 64: for inputs with outliers",
    "llm-int8": "INT8, but input columns with a number above 6 in 16 bits: LLM.int8(), for outliers",
    "smoothquant-o1": "INT8, one scale a weight and one a token: SmoothQuant's O1, for --smooth",
    "smoothquant-o2": "INT8, one scale a weight and one an input: its O2",
    "smoothquant-o3": "INT8, one scale a weight, one calibrated scale an input: its O3",
    "int8-static": "INT8 weights and inputs, one input scale a layer, found by calibration",
    "int8-affine-static": "the same, inputs from 0 to 255 with a zero point: finer after a ReLU",
    "fp8-static": "FP8 (E4M3FN), one input scale a layer, found by calibration",
    "fp8-cscale": "FP8 (E4M3FNUZ), one constant scale for the whole model: Graphcore's CSCALE",
    "w8a16": "INT8 weights, INT16 inputs with a scale a token",
    "w16a8": "INT16 weights, INT8 inputs with a scale a token",
    "e5m2-dynamic": "E5M2 (wide range, 2 bits of precision), for experiments",
    "e3m4-dynamic": "E3M4 (4 bits of precision), for experiments",
    "e2m5-dynamic": "E2M5 (5 bits of precision), for experiments",
    "e5m2-weight-only": "E5M2 weights",
    "e3m4-weight-only": "E3M4 weights",
    "e2m5-weight-only": "E2M5 weights",
    "e5m2-static": "E5M2 with calibrated input scales",
    "e3m4-static": "E3M4 with calibrated input scales",
    "e2m5-static": "E2M5 with calibrated input scales",
}
SCHEMES_HELP = "schemes, what becomes of a layer:\n" + "\n".join(f"  {k:<18}  {v}" for k, v in SCHEMES.items())
NONE, AUTO = "none", "auto"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags that say which layer becomes what."""
    group = parser.add_argument_group("what becomes of the layers")
    group.add_argument(
        "--scheme",
        metavar="NAME",
        help="for all layers but embeddings and the output head; 'auto' chooses one for every layer (default, unless "
        f"other flags say what becomes of layers: then {DEFAULT}); 'none' leaves it to --rule",
    )
    group.add_argument(
        "--weights", metavar="FORMAT", help="another number format for the weights, see `octavo formats`"
    )
    group.add_argument("--inputs", metavar="FORMAT", help="another one for the inputs, or 'none': weights only")
    group.add_argument("--weight-group", type=positive, metavar="N", help="a scale for every N weights of a row")
    group.add_argument("--input-group", type=positive, metavar="N", help="a scale for every N inputs of a token")
    group.add_argument(
        "--rule",
        dest="rules",
        action="append",
        default=[],
        type=_rule,
        metavar="'NAMES=SCHEME'",
        help="another scheme, or 'none', for layers whose name fits, as '*.down_proj=fp8-dynamic'; may be repeated, "
        "the first that fits decides. The output head becomes 8-bit only by its exact name: 'lm_head=int8-dynamic'",
    )
    group.add_argument(
        "--skip",
        dest="rules",
        action="append",
        type=lambda pattern: (pattern, NONE),
        metavar="NAMES",
        help="leave the layers whose name fits alone, as '*.layers.0.*'; short for --rule 'NAMES=none'",
    )
    group.add_argument(
        "--rules",
        dest="rules_file",
        metavar="FILE",
        help="take all of it from a JSON file: a list of objects such as "
        '{"name": "*.down_proj", "scheme": "int8-dynamic", "smooth": 0.5}, of which the first that fits decides',
    )
    group.add_argument(
        "--smooth",
        type=_alpha,
        metavar="ALPHA",
        help="SmoothQuant: move outliers of the inputs into weights, before anything is quantized, by so much of them "
        "(0 to 1; 0.5 is usual), or 'search': what serves each pair of layers best. Looks at the data for calibration",
    )
    group.add_argument(
        "--round",
        choices=("nearest", "gptq"),
        default="nearest",
        help="how weights are rounded: each to the nearest, or by GPTQ, so that later columns of a weight make up for "
        "the errors of earlier ones on the data for calibration (default: nearest)",
    )


def settle(arguments: argparse.Namespace) -> None:
    """Say which scheme no ``--scheme`` means. Raises ``OctavoError`` for flags that do not go with ``auto``."""
    given = [*_changes(arguments), *(["--rule"] if arguments.rules else [])]
    given += ["--rules"] if arguments.rules_file else []
    given += ["--smooth"] if arguments.smooth is not None else []
    given += ["--round"] if arguments.round != "nearest" else []
    given += ["--stream"] if arguments.stream else []
    static = ("calibrate", "calibrate_weights", "save_calibration", "calibration", "allow_uncalibrated")
    given += [f"--{flag.replace('_', '-')}" for flag in static if getattr(arguments, flag)]
    if arguments.scheme is None:
        arguments.scheme = DEFAULT if given else AUTO
    elif arguments.scheme.lower() == AUTO and given:
        raise OctavoError(f"--scheme auto chooses for every layer by itself, without {given[0]}. Leave one out")


def rules(arguments: argparse.Namespace) -> "list[Rule]":
    """The rules that the flags describe, the general scheme last. Raises ``OctavoError`` before any model is opened."""
    from octavo.core import schemes
    from octavo.ptq.rules import Rule, read_rules

    if arguments.rules_file is not None:
        scheme = ["--scheme"] if arguments.scheme != DEFAULT else []
        given = [*scheme, *(["--rule"] if arguments.rules else []), *_changes(arguments)]
        given += [] if arguments.smooth is None else ["--smooth"]
        given += [] if arguments.round == "nearest" else ["--round"]
        if given:
            raise OctavoError(
                f"{given[0]} and --rules both say what becomes of layers. Leave one out, or edit the file"
            )
        return read_rules(arguments.rules_file)
    by_data: dict[str, Any] = {"smooth": arguments.smooth, "rounding": arguments.round}
    made = [
        Rule(None, pattern) if name == NONE else Rule(schemes.get(name), pattern, **by_data)
        for pattern, name in arguments.rules
    ]
    if arguments.scheme.lower() != NONE:
        return [*made, Rule(changed(schemes.get(arguments.scheme), arguments), **by_data)]
    if given := _changes(arguments):
        raise OctavoError(f"{given[0]} changes the general scheme, and --scheme none says there is none")
    if all(rule.scheme is None for rule in made):
        raise OctavoError("--scheme none leaves every layer alone; say which become what: --rule 'NAMES=SCHEME'")
    return made


def changed(base: "Scheme", arguments: argparse.Namespace) -> "Scheme":
    """The scheme with another format or another group, as the flags say."""
    from octavo.core import schemes
    from octavo.core.cast import Cast
    from octavo.core.granularity import PerBlock, PerToken

    given = _changes(arguments)
    if not given:
        return base
    if isinstance(base.weight.granularity, PerBlock):
        raise OctavoError(
            f"{given[0]} does not go with --scheme {arguments.scheme}, whose scales lie in tiles. "
            "Leave it out, or begin with int8-dynamic or fp8-dynamic"
        )

    weight = _changed(base.weight, arguments.weights, arguments.weight_group)
    if arguments.inputs.lower() == NONE if arguments.inputs else base.input is None:
        if arguments.input_group is not None:
            raise OctavoError(
                "--input-group groups inputs in 8 bits, and here they stay in float. Name --inputs FORMAT"
            )
        if base.outliers is not None:
            raise OctavoError(f"--scheme {arguments.scheme} takes outliers out of 8-bit inputs; --inputs none has none")
        return schemes.Scheme(weight)
    like_weights = base.input is None or base.input.format == base.weight.format
    inputs = base.input or Cast(weight.format, PerToken())
    named = arguments.inputs or (weight.format if like_weights else None)
    return schemes.Scheme(weight, _changed(inputs, named, arguments.input_group), base.outliers)


def _changed(how: "Cast", fmt: "Format | str | None", group: int | None) -> "Cast":
    from octavo.core import formats
    from octavo.core.granularity import PerGroup

    granularity = how.granularity if group is None else PerGroup(group)
    return replace(how, format=how.format if fmt is None else formats.get(fmt), granularity=granularity)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def _alpha(text: str) -> "float | Literal['search']":
    if text == "search":
        return "search"
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, or 'search', not {text!r}")
    return alpha


def _changes(arguments: argparse.Namespace) -> list[str]:
    flags = ("weights", "inputs", "weight_group", "input_group")
    return [f"--{flag.replace('_', '-')}" for flag in flags if getattr(arguments, flag) is not None]


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, scheme = text.rpartition("=")
    if not (equals and pattern.strip() and scheme.strip()):
        raise argparse.ArgumentTypeError(f"is NAMES=SCHEME or NAMES=none, as '*.down_proj=fp8-dynamic', not {text!r}")
    return pattern.strip(), scheme.strip().lower()
