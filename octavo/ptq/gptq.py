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

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.core.cast import Cast, quantize_scaled
from octavo.core.granularity import PerChannel, expand_blocks
from octavo.core.qtensor import QTensor
from octavo.errors import OctavoError

BLOCK = 128  # columns that are corrected one by one; those behind them in one product


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
        self.square += x.mT @ x
        if exact is not None and exact.shape == x.shape:
            lost = exact.to(x.dtype) - x
            related = lost.square().sum(1, keepdim=True) < x.square().sum(1, keepdim=True)
            self.cross += x.mT @ lost.where(related, 0)


class Inverse:
    """The damped Hessian of ``Moments`` as ``U`` with ``H⁻¹ = Uᵀ U``, columns in the order they are rounded in."""

    def __init__(self, moments: Moments, damping: float, ordered: bool = True) -> None:
        diagonal = moments.square.diagonal()
        dead = diagonal == 0  # inputs that are always 0: their columns have nothing to answer for
        usual = torch.arange(len(dead), device=diagonal.device)
        self.order = torch.argsort(diagonal, descending=True, stable=True) if ordered else usual
        damped = moments.square.clone()
        damped.diagonal().add_(damping * diagonal + dead.to(diagonal))
        damped = damped[self.order][:, self.order]
        # H = R Rᵀ with R upper triangular, so that U = R⁻¹: one factorization of H turned round
        root, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) or not bool(root.isfinite().all()):
            raise OctavoError("its inputs are too nearly dependent to factorize; use more damping")
        identity = torch.eye(len(dead), dtype=root.dtype, device=root.device)
        self.upper = torch.linalg.solve_triangular(root.flip(0, 1), identity, upper=True)

    def solve(self, rows: Tensor) -> Tensor:
        """``rows @ H⁻¹`` of [N, K] in float64."""
        solved: Tensor = rows[:, self.order] @ self.upper.mT @ self.upper
        return solved[:, torch.argsort(self.order)]

    def round(self, target: Tensor, nearest: QTensor, how: Cast) -> QTensor:
        """``target`` [N, K] in the format of ``nearest``, with its scales, column after column."""
        rows, columns = target.shape
        work = torch.float64 if target.dtype == torch.float64 else torch.float32
        upper = (self.upper / self.upper.diagonal()[:, None]).to(work)
        column = Cast(how.format, PerChannel(0), how.scale, how.rounding, how.affine)
        scales, zeros = (
            None if t is None else expand_blocks(t, (rows, columns), nearest.block).expand(rows, columns)
            for t in (nearest.scale, nearest.zero_point)
        )
        assert scales is not None
        codes = torch.empty_like(nearest.codes)
        left = target.to(work).mT[self.order].contiguous()  # a row a column, in the order they are rounded
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            errors = torch.empty(stop - start, rows, dtype=work, device=target.device)
            for i in range(start, stop):
                at = int(self.order[i])
                point = None if zeros is None else zeros[:, at : at + 1]
                q = quantize_scaled(left[i][:, None], column, scales[:, at : at + 1], point)
                codes[:, at] = q.codes[:, 0]
                error = left[i] - q.dequantize()[:, 0]
                errors[i - start] = error
                left[i + 1 : stop] -= upper[i, i + 1 : stop, None] * error
            left[stop:] -= upper[start:stop, stop:].mT @ errors
        return QTensor(codes, nearest.scale, nearest.zero_point, nearest.format, nearest.block, nearest.dtype)


class Rounder:
    """What two halves of a layer's inputs have shown, ready to move and to round weights that read them."""

    def __init__(self, halves: tuple[Moments, Moments], how: GPTQ = GPTQ()) -> None:
        whole = halves[0] + halves[1]
        self.rows, self._how = whole.rows, how
        self._inverse = Inverse(whole, how.damping, how.ordered)
        self._moments = (whole, *halves) if how.follow and bool(whole.cross.any()) else ()
        self._regressions = [Inverse(part, how.follow_damping, False) for part in self._moments]

    def target(self, weight: Tensor) -> Tensor:
        """The floats [N, K] whose product with the inputs in 8 bits comes near to the float model's, as far as shown.

        With ``Δ`` the step of one half's regression, the other half's loss falls by ``2a ⟨Δ, W Dᵀ⟩ − a² ⟨Δ, Δ H⟩`` over
        ``a`` times the step (``D = X̂ᵀ (X − X̂)``); the best ``a`` for both is taken.
        """
        if not self._moments:
            return weight
        exact = weight.double()
        missing = [exact @ part.cross.mT for part in self._moments]  # W (X − X̂)ᵀ X̂
        step, *steps = (inverse.solve(rows) for inverse, rows in zip(self._regressions, missing, strict=True))
        gained = needed = 0.0
        for own, moments, lacking in zip(steps, reversed(self._moments[1:]), reversed(missing[1:]), strict=True):
            gained += float((own * lacking).sum())
            needed += float((own @ moments.square * own).sum())
        most = 1 + self._how.follow_damping  # which undoes the damping where inputs are independent
        share = min(most, max(0.0, gained / needed)) if needed > 0 else 0.0
        return (exact + share * step).to(weight.dtype)

    def round(self, target: Tensor, nearest: QTensor, how: Cast) -> QTensor:
        """``target`` as ``Inverse.round`` does it."""
        return self._inverse.round(target, nearest, how)
