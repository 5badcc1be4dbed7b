"""Bias correction: what rounding adds to a layer's result on average, the bias takes away.

The error of quantized weights and inputs is not zero on average: its mean over the data, one number a channel, moves
everything behind the layer, and it can be subtracted for free (Nagel et al., 1906.04721, §4.2).

With data, float and quantized model run side by side, and each quantized layer's mean follows the float layer's. The
correction is in effect as soon as it is known, so that what a layer answers for is left over by the corrected layers
before it. One pass of both models does what the paper does with a pass a layer, and takes the memory of the means. Over
few samples a mean is partly chance; that part, estimated from how the samples scatter, is taken off (James and Stein,
1961), so that layers whose error has no mean to speak of are left as they are.

Without data, the mean of a layer's input is known where a BatchNorm, with or without a clamp like ReLU, makes it: the
BatchNorm's bias and weight are mean and standard deviation of its result, which is taken for normal (ibid., app. C).
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octavo.calibration.batches import Call, Track, enter, evaluating, several
from octavo.core.cast import sqnr
from octavo.errors import OctavoError, OctavoWarning
from octavo.nn.conv import QuantizedConv
from octavo.nn.linear import QuantizedLinear
from octavo.nn.trace import Step, trace
from octavo.ptq.fold import clamp_of


def correct_biases_(
    model: nn.Module,
    float_model: nn.Module,
    batches: Iterable[Any],
    *,
    new_biases: bool = True,
    call: Call | None = None,
    track: Track | None = None,
) -> dict[str, Tensor]:
    """Correct the bias of every 8-bit linear layer and convolution of ``model`` so that its mean result is the float's.

    ``float_model``: the same model before quantization, with its BatchNorms folded if ``model``'s are. ``batches``,
    without labels if the model needs none, and ``call`` as for calibration. A layer without a bias gets one, unless
    ``new_biases`` is off: an engine that builds the model from its config has no place for them. Returns by layer what
    was added [out]. A layer that fewer than two samples reached, or other numbers of rows in the two models, stays and
    is named by an ``OctavoWarning``.

    Raises ``OctavoError`` if the models are not the same, for no data, and for NaN or Inf; nothing is changed then, nor
    if the data raises.
    """
    several(batches)
    followers = [_Follower(*pair) for pair in _pairs(model, float_model, new_biases)]
    handles = [x.exact.register_forward_hook(x.note) for x in followers]
    handles += [x.layer.register_forward_hook(x.follow) for x in followers]
    clamps = {x.layer: x.layer.clamp for x in followers}
    done = 0
    try:
        for layer in clamps:
            layer.clamp = None  # the hook clamps, after it has corrected
        with evaluating(model), evaluating(float_model), torch.no_grad():
            for batch in track(batches, "correcting biases") if track else batches:
                for x in followers:
                    x.expected.clear()
                enter(float_model, batch, call)
                enter(model, batch, call)
                done += 1
    finally:
        for handle in handles:
            handle.remove()
        for layer, clamp in clamps.items():
            layer.clamp = clamp
    if done == 0:
        raise OctavoError("the data held no batch; a generator can be read only once")
    if unmatched := [x.name for x in followers if x.count < 2]:
        warnings.warn(
            OctavoWarning(
                f"no two samples ran {', '.join(unmatched)} on as many rows in both models; their biases stay"
            ),
            stacklevel=2,
        )
    return _add({x.layer: (x.name, x.shift()) for x in followers if x.count > 1})


def correct_biases_without_data_(
    model: nn.Module, float_model: nn.Module, inputs: Mapping[str, Tensor], *, new_biases: bool = True
) -> dict[str, Tensor]:
    """Correct biases by what rounding the weights does to the mean input, ``inputs`` by layer, in place.

    ``float_model`` and ``new_biases`` as for ``correct_biases_``; ``inputs`` come from ``expected_inputs``. Rounding of
    inputs is not known without data, and counts as zero on average. Returns by layer what was added [out]; layers whose
    mean input is unknown stay. Raises ``OctavoError`` as ``correct_biases_`` does.
    """
    shifts = {}
    for name, layer, exact in _pairs(model, float_model, new_biases):
        if name in inputs:
            twin = copy.deepcopy(exact).to("cpu", torch.float64).eval()
            x = inputs[name].to("cpu", torch.float64)
            with torch.no_grad():
                before = twin(x)
                twin.get_parameter("weight").copy_(layer.weight)
                shifts[layer] = (name, _sample_means(layer, before - twin(x))[0])
    return _add(shifts)


def expected_inputs(model: nn.Module, example: Any, call: Call | None = None) -> dict[str, Tensor]:
    """The mean input of every module that a BatchNorm feeds, straight or through a ReLU, ReLU6 or Hardtanh.

    For a float ``model`` before its BatchNorms are folded. ``example``: a batch as for calibration, of which only the
    shapes matter. The means have the shape [1, channels, …] of the module's input and float64.
    """
    means = {}
    for step in trace(model, example, call).steps:
        if step.kind == "module" and (source := _sole_module(step)) is not None:
            low, high = -math.inf, math.inf
            clamp = clamp_of(model.get_submodule(source.name))
            if clamp is not None:
                (low, high), below = clamp, _sole_module(source)
                if below is None:
                    continue
                source = below
            norm = model.get_submodule(source.name)
            if isinstance(norm, _BatchNorm) and type(norm).__module__.startswith("torch.nn.") and source.shape:
                means[step.name] = _mean_behind(norm, low, high, source.shape)
    return means


class _Follower:
    """One layer of the quantized model, which follows the mean result of its float twin."""

    def __init__(self, name: str, layer: QuantizedLinear | QuantizedConv, exact: nn.Module) -> None:
        self.name, self.layer, self.exact = name, layer, exact
        self.clamp = layer.clamp
        self.expected: deque[tuple[torch.Size, Tensor]] = deque()  # of the runs in this batch
        self.count = 0  # samples so far, their errors [out] summed, and the squares of these
        self.sum = torch.zeros(())
        self.squares = torch.zeros(())

    def note(self, module: nn.Module, args: Any, y: Tensor) -> None:
        """After the float layer."""
        self.expected.append((y.shape, _sample_means(self.layer, y)))

    def follow(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        """After the quantized layer: learn from what it did, and correct what it gives."""
        shape, expected = self.expected.popleft() if self.expected else (None, None)
        if expected is not None and shape == y.shape and y.numel() > 0:
            errors = expected.to(y.device) - _sample_means(self.layer, y)
            self.count += len(errors)
            self.sum = self.sum.to(errors) + errors.sum(0)
            self.squares = self.squares.to(errors) + errors.square().sum()
        if self.count > 1:
            y = y + self.shift().to(y).view(-1, *[1] * _spatial(self.layer))
        return y if self.clamp is None else y.clamp_(*self.clamp)

    def shift(self) -> Tensor:
        """The mean error so far [out], less what may be chance in it."""
        mean = self.sum / self.count
        found = mean.square().sum()
        chance = (self.squares / self.count - found) / (self.count - 1)
        return mean * (1 - chance / found).clamp(0, 1) if found > 0 else mean


def _pairs(
    model: nn.Module, float_model: nn.Module, new_biases: bool
) -> list[tuple[str, QuantizedLinear | QuantizedConv, nn.Module]]:
    """The 8-bit layers and the float layers that they were."""
    norms = [{name for name, m in x.named_modules() if isinstance(m, _BatchNorm)} for x in (model, float_model)]
    if odd := sorted(norms[0] ^ norms[1]):
        raise OctavoError(
            f"{odd[0]} is a BatchNorm in one model only; fold them in both (fold_batch_norms_), or in none"
        )
    found: list[tuple[str, QuantizedLinear | QuantizedConv, nn.Module]] = []
    others = dict(float_model.named_modules(remove_duplicate=False))
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear | QuantizedConv) or (layer.bias is None and not new_biases):
            continue
        exact = others.get(name)
        weight = getattr(exact, "weight", None)
        if exact is None or not isinstance(weight, Tensor) or isinstance(exact, QuantizedLinear | QuantizedConv):
            raise OctavoError(f"float_model has no float layer {name}; keep a copy.deepcopy of the model to quantize")
        if weight.shape != layer.weight.shape or not sqnr(weight.detach(), layer.weight.to(weight.device)) > 0:
            raise OctavoError(
                f"the weight of {name} in float_model is not what was quantized; float_model is a copy of the model "
                "made just before quantize_"
            )
        found.append((name, layer, exact))
    if not found:
        raise OctavoError(
            f"{type(model).__name__} has no 8-bit layer whose bias could be corrected; quantize_ it first"
        )
    return found


def _add(shifts: Mapping[QuantizedLinear | QuantizedConv, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Add to the biases, all or none."""
    for name, shift in shifts.values():
        if not shift.isfinite().all():
            raise OctavoError(f"the results of {name} hold NaN or Inf, in float or in 8 bits; no bias was changed")
    for layer, (_, shift) in shifts.items():
        old = torch.zeros_like(shift, dtype=layer.dtype) if layer.bias is None else layer.bias
        layer.bias = (old.double().to(shift.device) + shift).to(layer.codes.device, old.dtype)
    return dict(shifts.values())


def _spatial(layer: QuantizedLinear | QuantizedConv) -> int:
    """How many dimensions of the result stand behind the channels."""
    return len(layer.kernel_size) if isinstance(layer, QuantizedConv) else 0


def _sample_means(layer: QuantizedLinear | QuantizedConv, y: Tensor) -> Tensor:
    """Means [samples, out] of a result over everything in between; a result without a first dimension is one sample."""
    channels = y.ndim - 1 - _spatial(layer)
    if channels == 0:
        y, channels = y[None], 1
    y = y.unsqueeze(-1)  # so that there is something to average, even of one row
    return y.mean([dim for dim in range(1, y.ndim) if dim != channels], dtype=torch.float64)


def _sole_module(step: Step) -> Step | None:
    """The module whose result is all that the step reads."""
    return step.inputs[0] if len(step.inputs) == 1 and step.inputs[0].kind == "module" else None


def _mean_behind(norm: _BatchNorm, low: float, high: float, shape: torch.Size) -> Tensor:
    """The mean of a normal variable that is clamped, for every channel."""
    center = torch.zeros(norm.num_features) if norm.bias is None else norm.bias.detach()
    spread = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach().abs()
    center, spread = center.to("cpu", torch.float64), spread.to("cpu", torch.float64).clamp_min(1e-30)
    below, above = (low - center) / spread, (high - center) / spread
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    density = ((-0.5 * below**2).exp() - (-0.5 * above**2).exp()) / math.sqrt(2 * math.pi)
    mean = center * inside + spread * density
    if math.isfinite(low):
        mean = mean + low * torch.special.ndtr(below)
    if math.isfinite(high):
        mean = mean + high * torch.special.ndtr(-above)
    row: Tensor = mean.view(1, -1, *[1] * (len(shape) - 2))
    return row.expand(1, *shape[1:])
