"""How far a changed model's results are from those of the model as it is.

For a causal language model: by how much the loss of the next token grows, and the Kullback-Leibler divergence from the
distribution that it was, both in nats a token. With a loss of the user's: by how much that grows. For all other models:
the share of the outputs' power that is noise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from octavo.analysis import perplexity
from octavo.analysis.replay import tensors
from octavo.errors import OctavoError

#: A user's loss: (the model's output, the batch) → one number, of which less is better.
Loss = Callable[[Any, Any], "float | Tensor"]


@dataclass(frozen=True)
class Shift:
    """Sums over ``count`` predictions: of the loss's increase, of its square, and of the divergence."""

    count: int = 0
    loss: float | None = None
    squares: float = 0.0
    divergence: float | None = None

    def __add__(self, other: "Shift") -> "Shift":
        if self.count == 0 or other.count == 0:
            return self if other.count == 0 else other
        loss = None if self.loss is None or other.loss is None else self.loss + other.loss
        known = self.divergence is not None and other.divergence is not None
        divergence = (self.divergence or 0.0) + (other.divergence or 0.0) if known else None
        return Shift(self.count + other.count, loss, self.squares + other.squares, divergence)

    @property
    def increase(self) -> float | None:
        """The mean increase of the loss."""
        return None if self.loss is None or not self.count else self.loss / self.count

    @property
    def distance(self) -> float | None:
        """The mean divergence; below zero only by rounding, and then zero."""
        return None if self.divergence is None or not self.count else max(0.0, self.divergence / self.count)

    @property
    def error(self) -> float:
        """The standard error of ``increase``."""
        if self.loss is None or self.count < 2:
            return 0.0
        variance = max(0.0, self.squares / self.count - (self.loss / self.count) ** 2)
        return math.sqrt(variance / (self.count - 1))

    @property
    def finite(self) -> bool:
        """Whether it says anything: NaN and Inf do not."""
        return all(math.isfinite(value) for value in (self.loss or 0.0, self.squares, self.divergence or 0.0))


class Judge(Protocol):
    """What ``reference`` keeps of the model's output as it is, ``shift`` compares another output with."""

    divergence: str | None  # in words what the divergence is, if there is one
    nats: bool  # whether the loss is in nats a token, so that there is a perplexity

    def reference(self, output: Any, batch: Any) -> Any:
        """What is needed of an output of the model as it is."""

    def loss(self, reference: Any) -> tuple[float, int] | None:
        """The sum of its loss, and over how many predictions; None if it has none."""

    def shift(self, reference: Any, output: Any, batch: Any) -> Shift:
        """How far another output is from it."""


@dataclass(frozen=True)
class _Words:
    """Log-probabilities [predictions, vocabulary], and what came."""

    log: Tensor
    targets: Tensor


class NextToken:
    """Causal language models; tokens under an attention mask of 0 are neither given nor predicted."""

    divergence: str | None = "KL divergence of the next token, nats"
    nats = True

    def reference(self, output: Any, batch: Any) -> _Words:
        """The distributions of the next tokens, and which tokens came."""
        chosen, targets = self._predicted(batch)
        return _Words(torch.log_softmax(output.logits[:, :-1][chosen].float(), -1), targets)

    def loss(self, reference: _Words) -> tuple[float, int]:
        """The negative log-likelihood in nats."""
        taken = reference.log.gather(1, reference.targets[:, None])
        return -float(taken.double().sum()), len(reference.targets)

    def shift(self, reference: _Words, output: Any, batch: Any) -> Shift:
        """Both figures, from the differences of the logits: where these are small nothing is lost by cancellation."""
        chosen, targets = self._predicted(batch)
        rows = output.logits[:, :-1][chosen]
        total = Shift()
        for log, logits, target in zip(reference.log.split(256), rows.split(256), targets.split(256), strict=True):
            moved = logits.float() - log  # up to a constant a row, which falls out
            probability = log.exp()
            whole = probability.sum(-1, keepdim=True)  # 1 but for rounding
            for _ in range(2):  # the second time takes what rounding left of large constants
                moved = moved - (probability * moved).sum(-1, keepdim=True) / whole
            divergence = torch.log1p((probability * torch.expm1(moved)).sum(-1) / whole[:, 0])
            if not bool(divergence.isfinite().all()):  # exp overflowed
                divergence = torch.logsumexp(log + moved, -1)
            increase = (divergence - moved.gather(1, target[:, None])[:, 0]).double()
            total += Shift(
                len(target), float(increase.sum()), float(increase.square().sum()), float(divergence.double().sum())
            )
        return total

    @staticmethod
    def _predicted(batch: Any) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"] if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        chosen = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        if mask is not None:
            chosen = (mask[:, 1:] * mask[:, :-1]) != 0
        return chosen, ids[:, 1:][chosen]


class UserLoss:
    """The loss that a user's function gives for an output and its batch."""

    divergence: str | None = None
    nats = False

    def __init__(self, call: Loss) -> None:
        self.call = call

    def reference(self, output: Any, batch: Any) -> float:
        """The loss of the model as it is. Raises ``OctavoError`` if it is no number."""
        value = self._value(output, batch)
        if not math.isfinite(value):
            raise OctavoError(f"the loss of the model as it is is {value}; nothing can be compared with that")
        return value

    def loss(self, reference: float) -> tuple[float, int]:
        """The loss itself; every batch counts once."""
        return reference, 1

    def shift(self, reference: float, output: Any, batch: Any) -> Shift:
        """The increase."""
        increase = self._value(output, batch) - reference
        return Shift(1, increase, increase * increase)

    def _value(self, output: Any, batch: Any) -> float:
        value = self.call(output, batch)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise OctavoError(f"loss(output, batch) gives one number, not a tensor {list(value.shape)}")
        return float(value)


class Noise:
    """The power of the difference of all outputs as a share of the outputs' power: 0.01 are 20 dB."""

    divergence: str | None = "noise in the outputs, a share of their power"
    nats = False

    def reference(self, output: Any, batch: Any) -> list[Tensor]:
        """All float tensors of the output. Raises ``OctavoError`` if there are none."""
        found = [tensor.detach().double() for tensor in tensors(output)]
        if not found:
            raise OctavoError("the output holds no float tensor; say by what to judge: loss=lambda output, batch: …")
        if not any(tensor.numel() for tensor in found):
            raise OctavoError("a batch is empty: the model's output for it holds no number. Leave it out")
        if not all(bool(tensor.isfinite().all()) for tensor in found):
            raise OctavoError("the output of the model as it is holds NaN or Inf; nothing can be compared with that")
        return found

    def loss(self, reference: list[Tensor]) -> None:
        """There is none."""

    def shift(self, reference: list[Tensor], output: Any, batch: Any) -> Shift:
        """The noise; every batch counts once."""
        power = sum(float(tensor.square().sum()) for tensor in reference)
        noise = sum(
            float((after.double() - before).square().sum())
            for before, after in zip(reference, tensors(output), strict=True)
        )
        return Shift(1, None, 0.0, noise / power if power else noise)


def judge_for(model: nn.Module, batch: Any, loss: Loss | None) -> Judge:
    """What fits the model and its data."""
    if loss is not None:
        return UserLoss(loss)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) else batch
    tokens = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.ndim == 2 and ids.shape[1] > 1
    return NextToken() if tokens and perplexity.obstacle(model) is None else Noise()
