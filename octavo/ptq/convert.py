"""From 8 bits back to floats, and from one 8-bit scheme to another: FP8 weights on a machine that has INT8 units.

The numbers that the codes stand for are all that is left of a model that was trained or shipped in 8 bits. Conversion
takes them for the truth: new scales are computed from them, and the error that is reported is measured against them.
Converting adds its error to the first one, so where the float model still exists, quantize that.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from octavo.calibration.batches import Track
from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer
from octavo.calibration.run import Calibration
from octavo.core.schemes import describe
from octavo.errors import OctavoError
from octavo.nn import swap
from octavo.nn.layer import QuantizedLayer
from octavo.nn.swap import Layer
from octavo.ptq.quantize import LayerReport, Summary, model_bytes, no_smaller, quantize_
from octavo.ptq.rules import Rules


def dequantize_(model: nn.Module) -> list[str]:
    """Put a float layer in the place of every 8-bit one, with the numbers that its codes stand for, in place.

    Returns the layers' names. The numbers have the model's dtype; biases, hooks and modes are kept, layers that shared
    their codes share their weight. Raises ``OctavoError`` if there is no 8-bit layer.
    """
    return [layer.name for layer in _swap_to_float(model)]


def recast_(
    model: nn.Module,
    rules: Rules,
    data: "Iterable[Any] | Calibration | None" = None,
    *,
    observer: Observer = MinMax(),  # noqa: B008 - only its settings are used
    weight_observer: Observer | None = None,
    allow_uncalibrated: bool = False,
    track: "Track | None" = None,
) -> Summary:
    """Give the layers of a model that is in 8 bits already the schemes of ``rules``, in place: ``quantize_`` once more.

    Arguments as for ``quantize_``. 8-bit layers count as the float layers they were: what calibration sees are the
    results of unquantized inputs. Layers that the rules leave alone stay as they are, in 8 bits or not. The summary's
    SQNR compares new weights with the old codes' numbers, and its bytes are those of the model before and after.

    Raises ``OctavoError`` as ``quantize_`` does, and if there is no 8-bit layer; the model is then as it was.
    """
    before = model_bytes(model)
    old = {layer.name: layer for layer in _swap_to_float(model)}
    try:
        summary = quantize_(
            model,
            rules,
            data,
            observer=observer,
            weight_observer=weight_observer,
            allow_uncalibrated=allow_uncalibrated,
            track=track,
        )
    except BaseException:
        _put_back(model, old.values())
        raise
    _put_back(model, [old[report.name] for report in summary.left if report.name in old])
    reports = [_compared(report, old.get(report.name)) for report in summary.layers]
    notes = [note for note in summary.notes if note not in no_smaller(summary.layers)]  # that compares with floats
    return replace(summary, layers=reports, bytes_before=before, bytes_after=model_bytes(model), notes=notes)


def _swap_to_float(model: nn.Module) -> list[Layer]:
    """Swap in float layers; what comes back are the 8-bit ones, with their names."""
    found = [layer for layer in swap.layers(model) if isinstance(layer.module, QuantizedLayer)]
    if not found:
        raise OctavoError("the model has no 8-bit layer")
    weights: dict[int, Tensor | nn.Module] = {}
    twins = []
    for layer in found:
        assert isinstance(layer.module, QuantizedLayer)
        try:
            twin = layer.module.to_float()
        except OctavoError as error:
            raise OctavoError(f"{layer.name}: {error}") from error
        twin.weight = weights.setdefault(id(layer.module.codes), twin.weight)
        twins.append(twin)
    for layer, twin in zip(found, twins, strict=True):
        swap.replace(model, layer, twin)
    return found


def _put_back(model: nn.Module, layers: Iterable[Layer]) -> None:
    for layer in layers:
        now = replace(layer, module=model.get_submodule(layer.name))
        swap.replace(model, now, layer.module)


def _compared(report: LayerReport, old: Layer | None) -> LayerReport:
    """The report on a layer that was in 8 bits before, or on one that was not."""
    if old is None:
        return report
    assert isinstance(old.module, QuantizedLayer)
    if report.scheme is not None:
        return replace(report, bytes_before=old.nbytes)
    reason = f"stays {describe(old.module.scheme)}: {report.reason}"
    return replace(report, reason=reason, bytes_before=old.nbytes, bytes_after=old.nbytes)
