"""BatchNorm re-tuning: statistics of the quantized model in the place of the float model's.

Rounding moves the means and variances of what a BatchNorm sees. Its running statistics belong to the float model and no
longer normalize; new ones are a few batches away, without labels or gradients (HFP8: Sun et al., NeurIPS 2019).

Only for BatchNorms that are still there: one that is folded into its layer has no statistics left. There bias
correction (``octavo.ptq.bias_correction``) takes care of the means.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from octavo.calibration.batches import Call, Track, enter, evaluating, several
from octavo.errors import OctavoError, OctavoWarning


def retune_batch_norms_(
    model: nn.Module, batches: Iterable[Any], *, call: Call | None = None, track: Track | None = None
) -> list[str]:
    """Replace the running statistics of every BatchNorm by their averages over ``batches``, in place.

    Every batch counts once, as with torch's ``momentum=None``. BatchNorms run in train mode, so that each sees what
    those before it have normalized, and all else (dropout) in eval mode; modes and momenta are restored. ``batches``
    and ``call`` as for calibration; ``track`` shows progress. Returns the names of the BatchNorms; those that no batch
    reached keep their statistics and are named by an ``OctavoWarning``.

    Raises ``OctavoError`` for a model without BatchNorms, for no data, for a batch that shows a BatchNorm only one
    number a channel, and for NaN or Inf. After this or any other error the old statistics are back.
    """
    several(batches)
    tuned = [_Tuned(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm) and _statistics(m)]
    if not tuned:
        raise OctavoError(
            f"{type(model).__name__} has no BatchNorm with running statistics to re-tune; folded ones have none, and "
            "correct_biases_ is for them"
        )
    momenta = {x.norm: x.norm.momentum for x in tuned}
    handles = [x.norm.register_forward_pre_hook(x.look) for x in tuned]
    handles += [x.norm.register_forward_hook(x.add) for x in tuned]
    done = 0
    try:
        with evaluating(model), torch.no_grad():
            for x in tuned:
                x.norm.train()
                x.norm.momentum = 1.0  # the running statistics are those of the batch; the sums are kept here
            for batch in track(batches, "re-tuning") if track else batches:
                enter(model, batch, call)
                done += 1
    except BaseException as error:
        for x in tuned:
            x.restore()
        if isinstance(error, OctavoError):
            raise OctavoError(f"re-tuning, batch {done}: {error}") from error
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if done == 0:
        raise OctavoError("the data held no batch; a generator can be read only once")
    for x in tuned:
        x.settle()
    if unreached := [x.name for x in tuned if x.count == 0]:
        warnings.warn(
            OctavoWarning(f"no batch reached {', '.join(unreached)}; their old statistics stay"), stacklevel=2
        )
    return [x.name for x in tuned if x.count > 0]


def _statistics(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


class _Tuned:
    """One BatchNorm: its old statistics, and the sums of the new ones in float64."""

    def __init__(self, name: str, norm: _BatchNorm) -> None:
        self.name, self.norm = name, norm
        self.buffers = {key: buffer for key, buffer in norm._buffers.items() if buffer is not None}
        self.before = {key: buffer.clone() for key, buffer in self.buffers.items()}
        self.sums = {
            key: torch.zeros(buffer.shape, dtype=torch.float64)
            for key, buffer in self.buffers.items()
            if key in ("running_mean", "running_var")
        }
        self.count = 0

    def look(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the BatchNorm runs."""
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.ndim > 1 and x.numel() == x.shape[1]:
            raise OctavoError(
                f"{self.name} sees one number a channel ({list(x.shape)}), which has no variance; use larger batches"
            )

    def add(self, norm: nn.Module, args: Any, y: Any) -> None:
        """After it has run, when its running statistics are those of this batch."""
        for key, total in self.sums.items():
            new = self.buffers[key].to("cpu", torch.float64)
            if not new.isfinite().all():
                raise OctavoError(f"the input of {self.name} holds NaN or Inf")
            total += new
        self.count += 1

    def settle(self) -> None:
        """Put the averages in place; without data, what was there."""
        if self.count == 0:
            return self.restore()
        for key, total in self.sums.items():
            self.buffers[key].copy_(total / self.count)
        if "num_batches_tracked" in self.buffers:
            self.buffers["num_batches_tracked"].fill_(self.count)

    def restore(self) -> None:
        for key, buffer in self.buffers.items():
            buffer.copy_(self.before[key])
