"""Let one layer do the work of two: BatchNorm inside the weights before it, ReLU inside the 8-bit layer before it.

In eval mode a BatchNorm multiplies every channel by a number and adds another. A linear layer just before it can do
that in its own weight and bias, so that nothing is left to run, and the weights that are quantized are the ones that
count (Jacob et al., 1712.05877, §3.2). A clamp such as ReLU changes no weight, but an 8-bit layer can apply it to the
sums it has at hand, which saves a pass over its output.

Both need to know that the one's result goes to the other and nowhere else; ``octavo.nn.trace`` does.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octavo.calibration.batches import Call
from octavo.nn import swap
from octavo.nn.conv import QuantizedConv
from octavo.nn.layer import QuantizedLayer
from octavo.nn.linear import QuantizedLinear
from octavo.nn.trace import Step, Trace, is_atom, sharing, trace, trace_symbolically

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Fused:
    """What became of every BatchNorm or activation, by names: pairs (layer, what it took over), and why others stay."""

    pairs: list[tuple[str, str]]
    left: dict[str, str]

    def __str__(self) -> str:
        done = [f"{layer} took over {taken}" for layer, taken in self.pairs]
        return "\n".join(done + [f"{name} stays: {why}" for name, why in self.left.items()])


@torch.no_grad()
def fold_batch_norms_(model: nn.Module, example: Any = None, call: Call | None = None) -> Fused:
    """Fold every BatchNorm that can be into the convolution or linear layer before it, in place.

    A folded BatchNorm becomes ``nn.Identity``; in eval mode the model computes the same function, up to the rounding of
    the new weights to their dtype. Frozen BatchNorms (those of detection models) fold too. What stays is named, with
    the reason: a BatchNorm in train mode, a layer that runs twice or whose result goes elsewhere too, …

    ``example``: a batch as for calibration, on which the model runs once (``call`` as there). Without one, ``torch.fx``
    must be able to follow the model, else ``OctavoError``; and BatchNorms after linear layers stay, because the axis
    they normalize depends on the shape.
    """
    norms = {name: module for name, module in model.named_modules() if _is_batch_norm(module)}
    flow = _flow(model, example, call) if norms else Trace([], {})
    fused = Fused([], {})
    for name, norm in norms.items():
        try:
            source = _sole_source(model, flow, name)
            layer = model.get_submodule(source.name)
            weight, bias = _folded(layer, norm, source.shape)
            if (why_not := sharing(model, flow, source)) is not None:
                raise _Stays(why_not)
        except _Stays as why:
            fused.left[name] = str(why)
            continue
        _store(layer, "weight", weight)
        _store(layer, "bias", bias)
        _remove(model, norm)
        fused.pairs.append((source.name, name))
    return fused


def fuse_relu_(model: nn.Module, example: Any = None, call: Call | None = None) -> Fused:
    """Let 8-bit layers apply the ReLU, ReLU6 or Hardtanh behind them, in place and with the same results.

    An activation that is taken over becomes ``nn.Identity``, and the layer's ``clamp`` says what it does. One module
    that is called in several places stays. ``example`` and ``call`` as in ``fold_batch_norms_``.
    """
    activations = {name: m for name, m in model.named_modules() if clamp_of(m) is not None}
    flow = _flow(model, example, call) if activations else Trace([], {})
    fused = Fused([], {})
    for name, activation in activations.items():
        try:
            source = _sole_source(model, flow, name)
            layer = model.get_submodule(source.name)
            if not isinstance(layer, QuantizedLinear | QuantizedConv):
                raise _Stays(f"its input comes from {source.name}, {_a(layer)}, not from an 8-bit layer that can clamp")
            if layer.clamp is not None:
                raise _Stays(f"{source.name} has taken over another activation")
        except _Stays as why:
            fused.left[name] = str(why)
            continue
        layer.clamp = clamp_of(activation)
        _remove(model, activation)
        fused.pairs.append((source.name, name))
    return fused


def clamp_of(module: nn.Module) -> tuple[float, float] | None:
    """The range to which an activation clamps and does nothing else, or None for every other module."""
    if "forward" in vars(module):
        return None
    if type(module).forward is nn.ReLU.forward:
        return 0.0, float("inf")
    if isinstance(module, nn.Hardtanh) and type(module).forward is nn.Hardtanh.forward:  # ReLU6 is one
        return float(module.min_val), float(module.max_val)
    return None


class _Stays(Exception):
    """Why something cannot be taken over."""


def _flow(model: nn.Module, example: Any, call: Call | None) -> Trace:
    return trace_symbolically(model) if example is None else trace(model, example, call)


def _sole_source(model: nn.Module, flow: Trace, name: str) -> Step:
    """The one run of the layer that feeds the module and nothing else."""
    module, runs = model.get_submodule(name), flow.runs(name)
    if isinstance(module, torch.jit.ScriptModule):
        raise _Stays("it is scripted; fold first, then torch.jit.script")
    if not is_atom(module):  # such as a BatchNorm and its activation in one
        inside = " and ".join(child for child, _ in module.named_children())
        raise _Stays(f"{_a(module)} holds other modules ({inside}) and does more than one thing")
    if len(runs) != 1:
        raise _Stays(f"it runs {len(runs)} times in a pass" if runs else "the example does not reach it")
    inputs = runs[0].inputs
    if len(inputs) != 1:
        raise _Stays(f"it reads {' and '.join(map(str, inputs)) or 'an input of the model'}")
    source = inputs[0]
    if source.kind != "module":
        raise _Stays(f"its input comes from the {source}")
    layer = model.get_submodule(source.name)
    if len(flow.runs(source.name)) != 1:
        raise _Stays(f"{source.name}, before it, runs {len(flow.runs(source.name))} times in a pass")
    others = [str(reader) for reader in source.readers if reader is not runs[0]]
    if others:
        raise _Stays(f"the result of {source.name} also goes to the {' and '.join(others)}")
    if layer._forward_hooks or module._forward_pre_hooks:
        raise _Stays(f"a hook stands between it and {source.name}")
    return source


def _folded(layer: nn.Module, norm: nn.Module, shape: torch.Size | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the BatchNorm inside, in float64. ``shape``: of the layer's result."""
    kind = next((kind for kind in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED) if isinstance(layer, kind)), None)
    if isinstance(layer, QuantizedLayer):
        raise _Stays("the layer before it is in 8 bits already; fold first, then quantize")
    if kind is None:
        raise _Stays(f"its input comes from {_a(layer)}")
    own = [getattr(type(layer), method, None) for method in ("forward", "_conv_forward")]
    if own != [getattr(kind, method, None) for method in ("forward", "_conv_forward")] or "forward" in vars(layer):
        raise _Stays(f"{_a(layer)} before it has a forward of its own")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise _Stays(
            "the weight before it is computed (weight_norm, pruning, parametrization); make it permanent first"
        )
    if weight.is_meta or any(tensor.is_meta for tensor in (*norm.parameters(), *norm.buffers())):
        raise _Stays("it holds no numbers (meta device); load the weights first")
    if kind is nn.Linear and shape is None:
        raise _Stays("after a linear layer the axis it normalizes depends on the shape; give an example batch")
    rank = 2 if kind is nn.Linear else weight.ndim
    if shape is not None and len(shape) != rank:
        raise _Stays(f"it normalizes another axis than the layer's channels: the result is {list(shape)}")
    scale, shift = _affine(norm, rank)
    wide = weight.to("cpu", torch.float64)
    if isinstance(layer, TRANSPOSED):  # [in, out / groups, …]: groups along the first axis, channels along the second
        factors = scale.view(layer.groups, 1, -1, *[1] * (wide.ndim - 2))
        folded = (wide.unflatten(0, (layer.groups, -1)) * factors).flatten(0, 1)
    else:
        folded = wide * scale.view(-1, *[1] * (wide.ndim - 1))
    stored = layer._parameters["bias"]
    bias = shift if stored is None else shift + scale * stored.to("cpu", torch.float64)
    if not all(x.to(weight.dtype).isfinite().all() for x in (folded, bias)):
        raise _Stays(f"the folded weights would not be finite numbers of {str(weight.dtype).removeprefix('torch.')}")
    return folded, bias


def _is_batch_norm(module: nn.Module) -> bool:
    """BatchNorm of any rank, or what keeps the same statistics (frozen ones are classes of their own everywhere)."""
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return isinstance(module, _BatchNorm) or all(isinstance(x, Tensor) and x.ndim == 1 for x in statistics)


def _affine(norm: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """What the BatchNorm multiplies each channel by and adds to it, in float64."""
    frozen = not isinstance(norm, _BatchNorm)
    if norm.training and not frozen:
        raise _Stays("it is in train mode, where it uses each batch's own statistics; call model.eval() first")
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (
        None if x is None else x.to("cpu", torch.float64) for x in (getattr(norm, name, None) for name in names)
    )
    if mean is None or var is None:
        raise _Stays("it keeps no running statistics (track_running_stats=False) and depends on the batch")
    scale = torch.rsqrt(var + float(getattr(norm, "eps", 1e-5)))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    if not type(norm).__module__.startswith("torch.nn.") or frozen or "forward" in vars(norm):
        _check_affine(norm, scale, shift, rank)  # a class of somebody's own: it may do more, or other things
    return scale, shift


def _check_affine(norm: nn.Module, scale: Tensor, shift: Tensor, rank: int) -> None:
    """Try on numbers whether the module does just that."""
    x = torch.randn(2, len(scale), *[3] * (rank - 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    channels = (1, -1, *[1] * (rank - 2))
    try:
        y = copy.deepcopy(norm).to("cpu", torch.float64).eval()(x)
    except Exception as error:  # it wants something else
        raise _Stays(f"{_a(norm)} cannot be tried: {type(error).__name__}: {error}") from error
    expected = x * scale.view(channels) + shift.view(channels)
    if (
        not isinstance(y, Tensor)
        or y.shape != x.shape
        or not torch.allclose(y.double(), expected, rtol=1e-6, atol=1e-6)
    ):
        raise _Stays(f"{_a(norm)} computes something else than a BatchNorm in eval mode")


def _store(layer: nn.Module, name: str, values: Tensor) -> None:
    """Into the parameter that there is, so that whoever holds it sees it change, or a new one like the weight."""
    parameter, weight = layer._parameters[name], layer._parameters["weight"]
    assert weight is not None
    if parameter is None:
        parameter = nn.Parameter(torch.empty(values.shape).to(weight), weight.requires_grad)
        layer.register_parameter(name, parameter)
    parameter.copy_(values)


def _remove(model: nn.Module, module: nn.Module) -> None:
    names = tuple(name for name, other in model.named_modules(remove_duplicate=False) if other is module)
    swap.replace(model, swap.Layer(names, module, None), nn.Identity())


def _a(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
