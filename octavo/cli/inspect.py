"""``octavo inspect``: what a checkpoint holds, from its headers alone.

Or one layer's numbers, by histogram.py, or the outliers among what enters the layers, by outliers.py.
"""

import argparse
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from octavo.cli import histogram, opening, outliers
from octavo.cli.console import Screen, count, mb, table
from octavo.cli.report import pattern
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.io.huggingface import Description

HELP = (
    "what is in a checkpoint, without loading it",
    """\
Reads only the headers of a checkpoint: its family, parameters, bytes by number type, and, of an
8-bit folder, which layers have which scheme and what was left in float.

With --layer it opens the model and draws the histogram of a layer's weights, or of its inputs on
calibration data, with the range that a scheme gives them and what that clips. With --outliers it
looks for the few numbers that make 8 bits hard: outlier dimensions, massive activations, tails.""",
    """\
examples:
  octavo inspect demo
  octavo inspect small --tensors
  octavo inspect demo --outliers --html outliers.html
  octavo inspect demo --layer model.layers.0.mlp.down_proj
  octavo inspect demo --layer model.layers.0.mlp.down_proj --input --calibrate percentile=99.9""",
)
PARTS = ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "codes", "scale", "zero_point")
CODES = {"weight": 1, "codes": 1, "weight_packed": 4}  # numbers in one element


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help=opening.ANY_MODEL)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    histogram.add(parser)
    outliers.add(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Read the headers and report, or look at a layer, or for outliers."""
    if arguments.outliers:
        outliers.run(arguments, screen)
        return
    if arguments.threshold is not None:
        raise OctavoError("--threshold is for --outliers; add it, or leave the threshold out")
    if arguments.layer is not None:
        histogram.run(arguments, screen)
        return
    if given := histogram.given(arguments):
        raise OctavoError(f"{given[0]} is for the numbers of one layer; name it: --layer NAME")
    told = _describe(arguments.model)
    tensors: list[dict[str, Any]] = [{**tensor} for tensor in told["tensors"]]
    eight_bit, unread = _schemes(told["path"], told["quantization"], [t["name"] for t in tensors])
    parameters = _parameters(tensors, eight_bit)
    by_dtype: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = by_dtype.setdefault(tensor["dtype"], {"tensors": 0, "nbytes": 0})
        row["tensors"] += 1
        row["nbytes"] += tensor["nbytes"]
    by_dtype = dict(sorted(by_dtype.items(), key=lambda row: -row[1]["nbytes"]))
    left = [t["name"] for t in tensors if _owner(t["name"]) not in eight_bit and len(t["shape"]) > 1]
    if not screen.as_json:
        _say(screen, told, parameters, by_dtype)
        if eight_bit:
            _say_schemes(screen, eight_bit, left)
        elif unread:
            screen.say(f"\n{unread}", style="yellow")
        if arguments.tensors:
            _say_tensors(screen, tensors)
    screen.result(
        {
            **{key: value for key, value in told.items() if key != "tensors"},
            "parameters": parameters,
            "by_dtype": by_dtype,
            "schemes": eight_bit,
            "left_in_float": left if eight_bit else None,
            "note": unread or None,
            **({"tensors": tensors} if arguments.tensors else {}),
        }
    )


def _describe(name: str) -> "Description":
    """What the headers say; of a Python function's model, what it holds."""
    from octavo.io import entry_point, huggingface

    if not entry_point.is_entry_point(name):
        return huggingface.describe(name)
    model, _ = entry_point.model(name)
    tensors = model.state_dict()
    return {
        "name": name,
        "path": name,
        "format": "a Python object",
        "model_type": None,
        "architectures": [type(model).__name__],
        "quantization": None,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
        "tensors": [
            {
                "name": key,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "nbytes": tensor.nbytes,
                "file": "",
            }
            for key, tensor in tensors.items()
        ],
    }


def _say(screen: Screen, told: "Description", parameters: int, by_dtype: dict[str, dict[str, int]]) -> None:
    family = ", ".join([*told["architectures"][:1], *([told["model_type"]] if told["model_type"] else [])])
    screen.say(told["name"] if told["name"] == told["path"] else f"{told['name']}  ({told['path']})", style="bold")
    screen.facts(
        {
            "family": family or "not told",
            "stored as": f"{told['format']}{_method(told['quantization'])}",
            "parameters": f"{parameters:,}",
            "size": f"{mb(told['nbytes'])} MB in {count(len(told['tensors']), 'tensor')}",
        }
    )
    screen.say()
    shown = table("type", "tensors", "MB", right=("tensors", "MB"))
    for dtype, row in by_dtype.items():
        shown.add_row(dtype, f"{row['tensors']:,}", mb(row["nbytes"]))
    screen.say(shown)


def _say_tensors(screen: Screen, tensors: list[dict[str, Any]]) -> None:
    screen.say()
    listing = table("tensor", "type", "shape", "MB", right=("MB",), fold=("tensor",))
    for tensor in tensors:
        shape = " × ".join(map(str, tensor["shape"])) or "one number"
        listing.add_row(tensor["name"], tensor["dtype"], shape, mb(tensor["nbytes"]))
    screen.say(listing)


def _say_schemes(screen: Screen, eight_bit: dict[str, str], left: list[str]) -> None:
    screen.say()
    shown = table("in 8 bits", "layers", right=("layers",))
    for scheme, total in Counter(eight_bit.values()).items():
        shown.add_row(scheme, str(total), style="bold")
        for name, some in Counter(pattern(n) for n, s in eight_bit.items() if s == scheme).items():
            shown.add_row(f"  {name}", str(some))
    screen.say(shown)
    screen.say()
    names = ", ".join(dict.fromkeys(pattern(_owner(name)) for name in left))
    screen.facts({"left in float": names or "no matrix"})


def _schemes(path: str, quantization: dict[str, Any] | None, names: list[str]) -> tuple[dict[str, str], str]:
    """The scheme of every 8-bit layer in words, or else why it cannot be said."""
    from pathlib import Path

    from torch import nn

    from octavo.core.records import from_json
    from octavo.core.schemes import Scheme, describe
    from octavo.io import checkpoint, compressed_tensors, safe_files

    manifest = Path(path) / checkpoint.MANIFEST
    if manifest.is_file():
        told: Any = safe_files.read_json(manifest).get("layers")
        try:
            found = {str(name): from_json(entry["scheme"]) for name, entry in told.items()}
        except (KeyError, TypeError, AttributeError, OctavoError) as error:
            raise OctavoError(f"{manifest} is damaged: {error}") from error
        return {name: describe(s) if isinstance(s, Scheme) else "unknown" for name, s in found.items()}, ""
    if quantization is None:
        return {}, ""
    if quantization.get("quant_method") != compressed_tensors.METHOD:
        return {}, f"It is quantized by {quantization.get('quant_method', 'an unnamed method')}; Octavo cannot open it."
    like: dict[str, nn.Module] = {_owner(n): nn.Linear(1, 1) for n in names if n.endswith(".weight_scale")}
    try:
        parsed = compressed_tensors.parse(quantization, like, path)
    except OctavoError as error:
        return {}, f"Octavo cannot open it: {error}"
    return {name: describe(scheme) for name, scheme in parsed.items()}, ""


def _parameters(tensors: list[dict[str, Any]], eight_bit: dict[str, str]) -> int:
    """The numbers of the model, not those that say how they are scaled."""
    total = 0
    for tensor in tensors:
        owner, _, part = tensor["name"].rpartition(".")
        numbers = math.prod(tensor["shape"])
        if owner not in eight_bit:
            total += numbers
        else:
            total += numbers * CODES.get(part, int(part not in PARTS))
    return total


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _method(quantization: dict[str, Any] | None) -> str:
    return "" if quantization is None else f", quantized: {quantization.get('quant_method', 'by an unnamed method')}"
