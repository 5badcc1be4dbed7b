"""``y = x Wᵀ + b`` in one call: what a layer's Casts tell the operators that do all of it at once.

Most schemes run so: 8-bit weights in blocks, inputs left alone, or cast in rows, groups, or with one scale for all.
The others (16-bit integers, zero points of weights, groups that do not nest) go the long way, by ``quantize`` and
``multiply``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import ops
from octavo.core.cast import Cast, row_format
from octavo.core.formats import FloatFormat, Format, IntegerFormat
from octavo.core.granularity import PerGroup, PerTensor, PerToken
from octavo.core.matmul import LONGEST
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Constant, Current, Static, compute_scale


@dataclass(frozen=True)
class Plan:
    """The numbers of one call, beside its tensors: ``ops.linear`` if inputs are cast, else ``ops.linear_weight_only``.

    ``rows`` and ``columns``: the weight's block. ``group`` neighbours of an input's row share a scale; ``whole``: all
    of its rows do, and the scale is not calibrated, see ``scale_of_all``.
    """

    rows: int
    columns: int
    group: int = 0
    numbers: ops.RowFormat | None = None
    affine: bool = False
    power_of_two: bool = False
    whole: bool = False


class Constants(NamedTuple):
    """The tensors of one call that follow from the scheme: a layer has them as buffers, which move where it goes.

    ``table`` and ``input_table``: what codes stand for (see ``ops.Weight``). ``input_constant``: the scale of inputs.
    """

    table: Tensor | None = None
    input_table: Tensor | None = None
    input_constant: Tensor | None = None


def plan(weight: QTensor, how: Cast | None) -> tuple[Plan, Constants] | None:
    """How a weight [N, K] multiplies inputs cast by ``how`` in one call; None if it takes more than one."""
    (n, k), (rows, columns) = weight.shape, weight.block
    if weight.zero_point is not None or not _bytes(weight.format) or 0 in (n, k):
        return None
    device = weight.device
    if how is None:
        exact = weight.format.exact_in_bfloat16
        return (Plan(rows, columns), Constants(_table(weight.format, device))) if exact else None
    numbers = row_format(how.format, how.affine) if how.rounding == "nearest-even" else None
    rowwise = isinstance(how.granularity, PerToken | PerGroup) and isinstance(how.scale, Current)
    whole = isinstance(how.granularity, PerTensor) and not isinstance(how.scale, Static)
    if numbers is None or not (rowwise or whole or isinstance(how.scale, Static)):
        return None
    constant = None
    if isinstance(how.scale, Constant):
        if how.affine:
            return None
        constant = compute_scale(torch.zeros(1, 1, device=device), (1, 1), how.format, how.scale, False)[0].reshape(1)
    group = how.granularity.block((1, k))[1]
    sizes = [size for size in (columns, group) if size < k]
    if any(size % min(*sizes, LONGEST) for size in sizes):
        return None
    table = input_table = None
    if not (isinstance(how.format, IntegerFormat) and isinstance(weight.format, IntegerFormat)):
        if how.affine or not (how.format.exact_in_bfloat16 and weight.format.exact_in_bfloat16):
            return None
        table, input_table = _table(weight.format, device), _table(how.format, device)
    elif not weight.format.signed:
        return None
    power_of_two = bool(getattr(how.scale, "power_of_two", False))
    made = Plan(rows, columns, group, numbers, how.affine, power_of_two, whole)
    return made, Constants(table, input_table, constant)


def scale_of_all(x: Tensor, how: Cast) -> tuple[Tensor | None, Tensor | None]:
    """The one scale, and zero point, of all rows of ``x`` […, K]; None where a row is alone and has its own."""
    if x.numel() <= x.shape[-1] and not torch.compiler.is_compiling():  # there it would be a graph of its own
        return None, None
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    scale, zero = compute_scale(rows, tuple(rows.shape), how.format, how.scale, how.affine)
    return scale.reshape(1), None if zero is None else zero.reshape(1)


def _bytes(fmt: Format) -> bool:
    return fmt.bits <= 8 and fmt.code_dtype in (torch.int8, torch.uint8)


def _table(fmt: Format, device: torch.device) -> Tensor:
    """The bfloat16 that each byte stands for."""
    if isinstance(fmt, FloatFormat):
        known = fmt.table_in(torch.bfloat16, device)
        return known if len(known) == 256 else torch.cat([known, known.new_zeros(256 - len(known))])
    return torch.arange(256, dtype=torch.uint8).view(fmt.code_dtype).to(device, torch.bfloat16)
