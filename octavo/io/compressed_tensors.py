"""The compressed-tensors layout, which vLLM and transformers load: names, dtypes and the config that describes them.

A linear of [O, I] becomes ``weight`` (F8_E4M3 or I8) and ``weight_scale`` in the model's dtype, which multiplies. A
scale of its input that does not come from the input itself is ``input_scale`` [1]; affine inputs, which we count from
0 to 255 and the layout from −128 to 127, have an ``input_zero_point`` [1] as int8 as well. 8-bit weights without 8-bit
inputs are packed four to an int32 (``weight_packed``, ``weight_shape``). The layout knows INT8 and E4M3FN only;
whatever it cannot say is refused before anything is written, with the layer's name.
"""

import operator
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo.core import formats
from octavo.core.cast import Cast
from octavo.core.formats import Format
from octavo.core.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Constant, Current, Static
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn.linear import QuantizedLinear, is_conv1d

METHOD = "compressed-tensors"
FORMATS: dict[str, Format] = {"float": formats.E4M3FN, "int": formats.INT8}
TYPES: dict[Format, str] = {fmt: name for name, fmt in FORMATS.items()}
MIXED = "mixed-precision"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OFFSET = 128  # from the layout's integers to UINT8


def obstacle(scheme: Scheme, in_features: int, transposed: bool) -> str | None:
    """Why a layer of that scheme cannot be written in the layout, or None."""
    weight, how = scheme.weight, scheme.input
    if scheme.outliers is not None:
        return "the layout has no outliers that are multiplied apart, as LLM.int8() does"
    if transposed:
        return "it is a transformers Conv1D, which no loader of the layout knows"
    if weight.format not in TYPES:
        return f"the layout has INT8 and E4M3FN weights, not {weight.format.name}"
    if weight.affine:
        return "the layout's engines reject zero points"
    match weight.granularity:
        case PerChannel(axis) if axis % 2 == 1:
            return "the layout has weight scales per output channel, not per input channel"
        case PerGroup(size) if in_features % size:
            return f"groups of {size} do not divide its {in_features} inputs"
    if how is None:
        if in_features % 4 and weight.format is formats.INT8:
            return f"four weights are packed to a word, and {in_features} inputs are not a multiple of 4"
        return None if not isinstance(weight.granularity, PerBlock) else "weights in blocks need inputs in 8 bits"
    kind = _kind(how)
    if kind is None:
        return f"the layout has INT8 and E4M3FN inputs, not {how.format.name}"
    if kind != TYPES[weight.format]:
        return f"the layout's engines multiply like with like, not {weight.format.name} with {how.format.name}"
    if how.rounding != "nearest-even":
        return f"the layout rounds inputs to the nearest, not {how.rounding}"
    if isinstance(how.scale, Current):
        if how.affine or how.scale.power_of_two:
            return "the layout's dynamic inputs are symmetric, with scales of any size"
    elif not isinstance(how.granularity, PerTensor):
        return f"the layout's static inputs have one scale for all, not {how.granularity}"
    match how.granularity:
        case PerToken() | PerTensor():
            return None
        case PerGroup(size) if in_features % size == 0:
            return None
        case PerGroup(size):
            return f"groups of {size} do not divide its {in_features} inputs"
    return f"the layout has no inputs {how.granularity}"


def obstacle_for(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a float layer could not be written in the layout once it has that scheme, or None."""
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"the layout has linear layers, not {type(module).__name__}"
    return obstacle(scheme, QuantizedLinear.matrix(module).shape[1], is_conv1d(module))


def tensors(name: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    """The layer's tensors as the layout names and stores them."""
    weight = layer.quantized_weight
    whole = layer.scheme.weight.granularity == PerTensor()  # then the layout has one dimension
    content = {f"{name}.weight_scale": short(weight.scale.reshape(1) if whole else weight.scale, weight.dtype)}
    if (how := layer.scheme.input) is not None and not isinstance(how.scale, Current):
        scale, zero_point = layer.input_scale, layer.input_zero_point
        if isinstance(how.scale, Constant):
            scale = weight.scale.new_full((1,), how.scale.value)
            zero_point = torch.zeros_like(scale, dtype=torch.int32) if how.affine else None
        assert scale is not None
        content[f"{name}.input_scale"] = short(scale, weight.dtype)
        if zero_point is not None:
            unsigned = how.format is formats.UINT8
            content[f"{name}.input_zero_point"] = (zero_point - OFFSET * unsigned).to(torch.int8)
    if layer.bias is not None:
        content[f"{name}.bias"] = layer.bias
    if _packed(layer.scheme):
        from_zero = weight.codes.contiguous().view(torch.uint8) ^ 128  # the code + 128, in one pass
        content[f"{name}.weight_packed"] = from_zero.view(torch.int32)
        content[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    else:
        is_int = weight.format is formats.INT8
        content[f"{name}.weight"] = weight.codes if is_int else weight.codes.view(torch.float8_e4m3fn)
    return content


def config(layers: dict[str, QuantizedLinear], model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` for these layers of the model: a group a scheme, all other linears ignored."""
    groups: dict[Scheme, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.scheme, []).append(name)
    ignored = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    styles = {_style(scheme) for scheme in groups}
    described = {}
    for index, (scheme, names) in enumerate(groups.items()):
        described[f"group_{index}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": _side(scheme.weight, dynamic=False),
            "input_activations": None if (how := scheme.input) is None else _side(how, isinstance(how.scale, Current)),
            "output_activations": None,
            "format": _style(scheme),
        }
    return {
        "quant_method": METHOD,
        "format": styles.pop() if len(styles) == 1 else MIXED,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": described,
    }


def parse(told: dict[str, Any], linears: Mapping[str, nn.Module], where: str) -> dict[str, Scheme]:
    """The scheme of every linear that a ``quantization_config`` quantizes, by module name."""
    groups, ignore = told.get("config_groups"), told.get("ignore") or []
    if not isinstance(groups, dict) or not groups or not isinstance(ignore, list):
        raise OctavoError(f"{where}: quantization_config has no config_groups; the file is incomplete")
    if told.get("transform_config") or (told.get("sparsity_config") or {"format": "dense"}) != {"format": "dense"}:
        raise OctavoError(f"{where}: the weights are transformed or sparse, which Octavo does not undo")
    schemes: dict[str, Scheme] = {}
    for key, group in groups.items():
        try:
            inputs = group.get("input_activations")
            scheme = Scheme(_weight_cast(group["weights"]), None if inputs is None else input_cast(inputs))
            schemes |= {str(entry): scheme for entry in group["targets"]}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise OctavoError(f"{where}: config group {key!r} is not one Octavo can run: {error}") from error
    # whose target decides: a name before a pattern before a class, as the library has it
    targets = sorted(schemes, key=lambda target: ("re:" in target, target))
    result: dict[str, Scheme] = {}
    try:
        for name, module in linears.items():
            hits = [t for t in targets if _named(t, name)] + [t for t in targets if _of_class(t, module)]
            if hits and not any(_named(str(e), name) or _of_class(str(e), module) for e in ignore):
                result[name] = schemes[hits[0]]
    except re.error as error:
        raise OctavoError(f"{where}: a target or an ignored name is no regular expression: {error}") from error
    if not result:
        raise OctavoError(f"{where}: the config groups of quantization_config match no linear layer of the model")
    return result


def stored_names(name: str, scheme: Scheme) -> list[str]:
    """The tensors that the layer's weight, and the static scale of its input, are stored in."""
    tail = ["weight_packed", "weight_shape", "weight_scale"] if _packed(scheme) else ["weight", "weight_scale"]
    if scheme.input is not None and scheme.static:
        tail += ["input_scale", "input_zero_point"] if scheme.input.affine else ["input_scale"]
    return [f"{name}.{part}" for part in tail]


def weight(name: str, found: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> QTensor:
    """The layer's weight [O, I] of its stored tensors. Raises ``OctavoError`` where they do not fit."""
    check, how = partial(_checked, name, found), scheme.weight
    if _packed(scheme):
        words = check("weight_packed", (torch.int32,), (shape[0], -(-shape[1] // 4)))
        codes = (words.contiguous().view(torch.uint8).short() - 128).to(torch.int8)[:, : shape[1]].contiguous()
    elif how.format is formats.INT8:
        codes = check("weight", (torch.int8,), shape)
    else:
        codes = check("weight", (torch.float8_e4m3fn,), shape).view(torch.uint8)
    block = how.granularity.block(shape)
    counts = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    flat = [(1,), ()] if counts == (1, 1) else ([counts[:1]] if counts[1] == 1 else [])
    scale = check("weight_scale", FLOATS, counts, *flat)
    if not bool(scale.isfinite().all()):
        raise OctavoError(f"{name}.weight_scale holds NaN or Inf: the checkpoint is damaged")
    return QTensor(codes, scale.float().reshape(counts), None, how.format, block, dtype)


def input_scales(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The static scale of the layer's input and its zero point, those that it has, as layers keep them.

    Raises ``OctavoError`` where they are none.
    """
    one: tuple[tuple[int, ...], ...] = ((1,), ())
    parts = {}
    if "input_scale" in found:
        parts["input_scale"] = _checked(name, found, "input_scale", FLOATS, *one).float().reshape(1)
    if "input_zero_point" in found:
        zero_point = _checked(name, found, "input_zero_point", (torch.int8,), *one)
        parts["input_zero_point"] = zero_point.int().reshape(1) + OFFSET
    return parts


def _checked(
    name: str, found: dict[str, Tensor], part: str, dtypes: tuple[torch.dtype, ...], *expected: tuple[int, ...]
) -> Tensor:
    tensor = found[part]
    if tuple(tensor.shape) not in expected or tensor.dtype not in dtypes:
        raise OctavoError(
            f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}; the config says "
            f"{' or '.join(str(d) for d in dtypes)} {' or '.join(str(list(e)) for e in expected)}"
        )
    return tensor


def short(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the model's dtype, unless it cannot hold them because the model was converted since."""
    short = scale if dtype == torch.float64 else scale.to(dtype)
    return short if scale.is_meta or torch.equal(short.float(), scale) else scale


def _kind(how: Cast) -> str | None:
    """What the layout calls an input's numbers; with a zero point, all 256 integers are the same."""
    affine_static = how.affine and not isinstance(how.scale, Current)
    return "int" if how.format is formats.UINT8 and affine_static else TYPES.get(how.format)


def _packed(scheme: Scheme) -> bool:
    return scheme.input is None and scheme.weight.format is formats.INT8


def _style(scheme: Scheme) -> str:
    if scheme.input is None:
        return "pack-quantized" if _packed(scheme) else "naive-quantized"
    return f"{TYPES[scheme.weight.format]}-quantized"


def _side(how: Cast, dynamic: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"num_bits": 8, "type": _kind(how), "symmetric": not how.affine, "dynamic": dynamic}
    match how.granularity:
        case PerTensor():
            return told | {"strategy": "tensor"}
        case PerChannel():
            return told | {"strategy": "channel"}
        case PerToken():  # of a weight, whose rows are its channels, the layout does not say so
            return told | {"strategy": "token" if dynamic else "channel"}
        case PerGroup(size):
            return told | {"strategy": "group", "group_size": size}
        case PerBlock(rows, cols):
            return told | {"strategy": "block", "block_structure": [rows, cols]}


def _weight_cast(told: dict[str, Any]) -> Cast:
    if told.get("dynamic", False) is not False or told.get("symmetric", True) is not True:
        raise OctavoError(f"only symmetric weights with static scales: {told}")
    return Cast(_format(told), _granularity(told))


def input_cast(told: dict[str, Any]) -> Cast:
    """How the layout's words for an activation's numbers cast it. Raises ``OctavoError`` for what cannot be run."""
    fmt, granularity = _format(told), _granularity(told)
    dynamic, affine = told.get("dynamic", False), told.get("symmetric", True) is not True
    if not isinstance(dynamic, bool) or (affine and (dynamic or fmt is not formats.INT8)):
        raise OctavoError(f"only symmetric dynamic inputs, or static ones: {told}")
    if not dynamic and not isinstance(granularity, PerTensor):
        raise OctavoError(f"only one scale for a static input: {told}")
    return Cast(formats.UINT8 if affine else fmt, granularity, Current() if dynamic else Static(), affine=affine)


def _format(told: dict[str, Any]) -> Format:
    if told.get("num_bits") != 8 or told.get("type") not in FORMATS or told.get("actorder"):
        raise OctavoError(f"only 8-bit numbers of type int or float, in their own order, not {told}")
    return FORMATS[told["type"]]


def _granularity(told: dict[str, Any]) -> Granularity:
    strategy = told.get("strategy") or ("group" if told.get("group_size") else "tensor")
    if strategy == "block":
        rows, cols = map(operator.index, told["block_structure"])
        return PerBlock(rows, cols)
    if strategy == "group":
        return PerGroup(operator.index(told["group_size"]))
    plain: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(0), "token": PerToken()}
    if strategy not in plain:
        raise OctavoError(f"unknown strategy {strategy!r}")
    return plain[strategy]


def _named(target: str, name: str) -> bool:
    if not target.startswith("re:"):
        return target == name
    pattern = target[3:]
    # a file may come from anybody: no repeated group, few repeats, so that matching always ends soon
    if len(pattern) > 300 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 6:
        raise OctavoError(f"the target {target[:80]!r} is too intricate a pattern to be tried safely; name the layers")
    return re.match(pattern, name) is not None


def _of_class(target: str, module: nn.Module) -> bool:
    return any(cls.__name__ == target for cls in type(module).__mro__)
