"""From a trained float model to one that runs on integers alone (Jacob et al., 1712.05877).

The model is exported as a graph of torch's operators (``ptq.export``), every operator becomes one on codes
(``ptq.lowering``), and calibration data shows the range of every tensor that has a scale of its own.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from octavo.calibration.batches import Call, Track, several
from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer
from octavo.core.cast import Cast
from octavo.core.formats import INT8, IntegerFormat
from octavo.core.granularity import PerChannel, PerTensor
from octavo.core.scaling import Static
from octavo.errors import OctavoError
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.model import IntegerModel
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.export import arguments, export, where
from octavo.ptq.lowering import Plan, encoding_of

ACTIVATION = Cast(INT8, PerTensor(), Static(), affine=True)
WEIGHT = Cast(INT8, PerChannel(0))


@torch.no_grad()
def integer_only(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observer: Observer | None = None,
    activation: Cast = ACTIVATION,
    weight: Cast = WEIGHT,
    call: Call | None = None,
    track: Track | None = None,
) -> IntegerModel:
    """A model that computes on 8-bit codes with int32 sums, multipliers and shifts only. The float one stays as it is.

    ``batches``: example data as for ``calibrate``, with ``call`` and ``track`` as there. ``observer``: which range of
    what it sees a tensor's codes should span; all of it by default. ``activation``: the codes between layers, affine or
    symmetric, of at most 8 bits, one scale a tensor. ``weight``: symmetric codes, one scale a tensor or output channel.

    Raises ``OctavoError`` for an operation that cannot run on integers, naming it and the line it comes from, for sums
    that int32 may not hold, for NaN or Inf in the data or the weights, and for no data.
    """
    _check_casts(activation, weight)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            raise OctavoError(f"{name} is in 8 bits already; integer_only takes the float model (see dequantize_)")
    observer = MinMax() if observer is None else observer
    plan: Plan | None = None
    shown = several(batches)
    for number, batch in enumerate(track(shown, "calibrating") if track else shown):
        tensors, others = arguments(model, batch, call)
        if plan is None:
            plan = _follow(model, tensors, others, weight, activation)
            observers = {node: observer.fresh(PerTensor()) for node in plan.observed}
        if others != plan.others or tensors.keys() != plan.exported.inputs.keys():
            raise OctavoError(f"batch {number} calls the model with other arguments than the first batch")
        _show(plan, tensors, observers, number)
    if plan is None:
        raise OctavoError("the calibration data held no batch; a generator can be read only once")
    return plan.build({node: _encoding(seen, activation, where(node)) for node, seen in observers.items()})


def _follow(
    model: nn.Module, tensors: dict[str, Tensor], others: dict[str, Any], weight: Cast, activation: Cast
) -> Plan:
    with suppress(OctavoError):  # sizes that vary may be in the way
        return Plan(export(model, tensors, others), others, weight, activation)
    return Plan(export(model, tensors, others, only_batch=True), others, weight, activation)


def _show(plan: Plan, tensors: dict[str, Tensor], observers: dict[fx.Node, Observer], number: int) -> None:
    try:
        _Watch(plan.exported.module, observers).run(*plan.exported.arguments(tensors))
    except OctavoError as error:
        raise OctavoError(f"calibration batch {number}: {error}") from error
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise OctavoError(
            f"calibration batch {number} does not fit the model as it was with the first batch: {shapes} ({error})"
        ) from error


class _Watch(fx.Interpreter):
    """Runs the float graph and shows tensors to observers."""

    def __init__(self, module: fx.GraphModule, observers: dict[fx.Node, Observer]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, seen."""
        result = super().run_node(n)
        if n in self.observers:
            try:
                self.observers[n].update(result)
            except OctavoError as error:
                raise OctavoError(f"{where(n)}: {error}") from error
        return result


def _encoding(seen: Observer, how: Cast, name: str) -> Encoding:
    """The codes for a range that was seen."""
    how = seen.settle(how)
    fmt = how.format
    if not isinstance(fmt, IntegerFormat):
        raise OctavoError(f"the observer chose {fmt.name} for {name}; integer-only inference takes integers")
    try:
        scale, zero_point = seen.scale(how)
    except OctavoError as error:
        raise OctavoError(f"{name}: {error}") from error
    return encoding_of(fmt, float(scale), None if zero_point is None else int(zero_point))


def _check_casts(activation: Cast, weight: Cast) -> None:
    for what, how in (("activation", activation), ("weight", weight)):
        if not isinstance(how.format, IntegerFormat) or how.format.bits > 8:
            raise OctavoError(
                f"integer-only inference takes {what}s of at most 8 bits, integers, not {how.format.name}"
            )
        if how.rounding == "stochastic":
            raise OctavoError(f"integer-only inference rounds its {what}s the same way each time, not stochastically")
    if activation.granularity != PerTensor():
        raise OctavoError(f"the codes between layers have one scale a tensor, not {activation.granularity}")
    if not activation.affine and not activation.format.signed:
        raise OctavoError(f"{activation.format.name} without a zero point holds no negative numbers; use affine=True")
    if weight.affine or not weight.format.signed:
        raise OctavoError("integer-only inference takes weights without a zero point, in a signed format")
    if weight.granularity not in (PerTensor(), PerChannel(0)):
        raise OctavoError(f"weights have one scale a tensor or output channel, not {weight.granularity}")
