"""GPTQ: weights rounded one column after another, each taking back what the columns before it got wrong.

A layer answers for ``X Wᵀ``, not for ``W``. Rounding a column of the weight changes the result; the columns that are
still floats can undo most of that, because inputs are correlated (Frantar et al., 2210.17323). What is known of the
inputs is ``H = Xᵀ X``, and a row of the Cholesky factor of its inverse says how far each later column moves. The scales
are settled beforehand, so that a column is cast to any format as nearest rounding would cast it, and a checkpoint looks
the same.

Inputs in 8 bits, or of layers in 8 bits, are not ``X`` but ``X̂``. Then what is wanted is the least of ``‖X̂ Ŵᵀ − X
Wᵀ‖²``, whose floats are a regression, ``W + W (X − X̂)ᵀ X̂ H⁻¹`` with ``H = X̂ᵀ X̂``: those are what is rounded. (GPTAQ,
2504.02692, reaches the same column by column.) Most of ``X − X̂`` is chance, which a regression over few rows learns by
heart. So each half of the data says how far the other half's regression helps, and weights go that far and no farther.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo import ops
from octavo.core.cast import Cast, quantize_scaled, row_format
from octavo.core.granularity import PerGroup, expand_blocks
from octavo.core.qtensor import QTensor
from octavo.errors import OctavoError

BLOCK = 32  # columns that are corrected one by one; those behind them in one product
STRIP = 192  # columns of XᵀX that are multiplied together, with themselves and those behind them


@dataclass(frozen=True)
class GPTQ:
    """How weights are rounded.

    ``damping`` is added to the diagonal of ``H``, as a share of each of its elements, which keeps few or dependent
    inputs from moving weights far. ``follow`` rounds towards the float model's results on inputs in 8 bits, rather than
    towards the same weight's; ``follow_damping`` belongs to that regression. ``ordered`` begins with the columns whose
    inputs are largest.
    """

    damping: float = 0.01
    follow_damping: float = 0.5
    follow: bool = True
    ordered: bool = True

    def __post_init__(self) -> None:
        for damping in (self.damping, self.follow_damping):
            if not 0 < damping < float("inf"):
                raise OctavoError(f"damping is a positive share of the Hessian's diagonal, not {damping}")


class Moments:
    """What the inputs of a layer have shown: ``X̂ᵀ X̂`` and ``X̂ᵀ (X − X̂)``, both [K, K] in float64, over ``rows``."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.rows = 0
        self.square = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.square)

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(len(self.square), self.square.device)
        total.rows = self.rows + other.rows
        total.square, total.cross = self.square + other.square, self.cross + other.cross
        return total

    def update(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add inputs ``x`` [T, K] as the layer multiplies them, and the float model's in their place.

        Rows that are nearer to 0 than to their counterpart are not the same token (an expert's may differ): they count
        as exact.
        """
        x = x if x.dtype == torch.float64 else x.float()
        self.rows += x.shape[0]
        self.square += _gram(x)
        if exact is not None and exact.shape == x.shape:
            lost = exact.to(x.dtype) - x
            related = lost.square().sum(1, keepdim=True) < x.square().sum(1, keepdim=True)
            self.cross += x.mT @ lost.where(related, 0)


class Inverse:
    """The damped Hessian of ``Moments`` as ``U`` with ``H⁻¹ = Uᵀ U``, columns in the order they are rounded in."""

    def __init__(self, moments: Moments, damping: float, ordered: bool = True) -> None:
        diagonal = moments.square.diagonal()
        usual = torch.arange(len(diagonal), device=diagonal.device)
        self.order = torch.argsort(diagonal, descending=True, stable=True) if ordered else usual
        damped = _damped(moments, damping)[self.order][:, self.order]
        # H = R Rᵀ with R upper triangular, so that U = R⁻¹: one factorization of H turned round
        root = _factor(damped.flip(0, 1)).flip(0, 1)
        identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
        self.upper = torch.linalg.solve_triangular(root, identity, upper=True)

    def round(self, target: Tensor, nearest: QTensor, how: Cast) -> QTensor:
        """``target`` [N, K] in the format of ``nearest``, with its scales, column after column."""
        shape = target.shape
        work = torch.float64 if target.dtype == torch.float64 else torch.float32
        upper = (self.upper / self.upper.diagonal()[:, None]).to(work)
        scales, zeros = (
            None if t is None else expand_blocks(t, shape, nearest.block).expand(shape).mT[self.order].contiguous()
            for t in (nearest.scale, nearest.zero_point)
        )
        assert scales is not None
        left = target.to(work).mT[self.order].contiguous()  # a row a column, in the order they are rounded
        rounded = _rounding(how, scales, zeros, work)
        for start in range(0, len(left), BLOCK):
            stop = min(start + BLOCK, len(left))
            errors = torch.empty_like(left[start:stop])
            for i in range(start, stop):
                number = rounded(left[i : i + 1], i)
                error = torch.sub(left[i : i + 1], number, out=errors[i - start : i - start + 1])
                left[i : i + 1] = number
                left[i + 1 : stop].addr_(upper[i, i + 1 : stop], error[0], alpha=-1)
            left[stop:].addmm_(upper[start:stop, stop:].mT, errors, alpha=-1)
        # these are numbers of the format already: whatever the rounding was, the nearest are themselves
        settled = replace(how, granularity=PerGroup(1), rounding="nearest-even")
        codes = quantize_scaled(left, settled, scales, zeros).codes
        codes = codes[torch.argsort(self.order)].mT.contiguous()
        return QTensor(codes, nearest.scale, nearest.zero_point, nearest.format, nearest.block, nearest.dtype)


def _gram(x: Tensor) -> Tensor:
    """``Xᵀ X``, of which little more than the upper half is multiplied; the other one is the same."""
    width = x.shape[1]
    product = x.new_empty(width, width)
    for start in range(0, width, STRIP):
        stop = min(start + STRIP, width)
        product[start:stop, start:] = x[:, start:stop].mT @ x[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].mT
    return product


def _damped(moments: Moments, damping: float) -> Tensor:
    """``H`` with its diagonal raised. Inputs that are always 0 get 1: their columns have nothing to answer for."""
    damped = moments.square.clone()
    diagonal = moments.square.diagonal()
    damped.diagonal().add_(damping * diagonal + (diagonal == 0).to(diagonal))
    return damped


def _factor(damped: Tensor) -> Tensor:
    """The lower Cholesky factor."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(root.isfinite().all()):
        raise OctavoError("its inputs are too nearly dependent to factorize; use more damping")
    return root


def _rounding(how: Cast, scales: Tensor, zeros: Tensor | None, work: torch.dtype) -> Callable[[Tensor, int], Tensor]:
    """What makes of numbers [1, N] those of the format, by row ``i`` of the scales: in one pass where there is one."""
    numbers = row_format(how.format, how.affine) if how.rounding == "nearest-even" and work == torch.float32 else None
    single = replace(how, granularity=PerGroup(1))

    def rounded(x: Tensor, i: int) -> Tensor:
        scale, points = scales[i : i + 1], None if zeros is None else zeros[i : i + 1]
        if numbers is None:
            return quantize_scaled(x, single, scale, points).dequantize()
        return ops.fake_quantize(x, 1, numbers, scale, points, how.affine)

    return rounded


class Rounder:
    """What two halves of a layer's inputs have shown, ready to move and to round weights that read them."""

    def __init__(self, halves: tuple[Moments, Moments], how: GPTQ = GPTQ()) -> None:
        whole = halves[0] + halves[1]
        self.rows, self._how = whole.rows, how
        self._inverse = Inverse(whole, how.damping, how.ordered)
        self._halves = halves if how.follow and bool(whole.cross.any()) else ()
        moments = (*self._halves, whole) if self._halves else ()
        self._factors = [_factor(_damped(part, how.follow_damping)) for part in moments]

    def target(self, weight: Tensor) -> Tensor:
        """The floats [N, K] whose product with the inputs in 8 bits comes near to the float model's, as far as shown.

        With ``Δ`` the step of one half's regression, the other half's loss falls by ``2a ⟨Δ, W Dᵀ⟩ − a² ⟨Δ, Δ H⟩`` over
        ``a`` times the step (``D = X̂ᵀ (X − X̂)``); the best ``a`` for both is taken.
        """
        if not self._halves:
            return weight
        work = torch.float64 if weight.dtype == torch.float64 else torch.float32  # enough, as it is damped well
        exact = weight.to(work)
        missing = [exact @ half.cross.to(work).mT for half in self._halves]  # W (X − X̂)ᵀ X̂
        missing.append(missing[0] + missing[1])
        *steps, step = (
            torch.cholesky_solve(rows.mT, factor.to(work)).mT
            for rows, factor in zip(missing, self._factors, strict=True)
        )
        gained = needed = 0.0
        for own, half, lacking in zip(steps, reversed(self._halves), reversed(missing[:2]), strict=True):
            gained += float((own * lacking).sum())
            needed += float((own @ half.square.to(work) * own).sum())
        most = 1 + self._how.follow_damping  # which undoes the damping where inputs are independent
        share = min(most, max(0.0, gained / needed)) if needed > 0 else 0.0
        return (exact + share * step).to(weight.dtype)

    def round(self, target: Tensor, nearest: QTensor, how: Cast) -> QTensor:
        """``target`` as ``Inverse.round`` does it."""
        return self._inverse.round(target, nearest, how)
