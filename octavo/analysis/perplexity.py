"""Perplexity: how many next tokens a language model hesitates between, ``exp(mean negative log-likelihood)``.

Windows do not overlap and each starts afresh, so its first token is not predicted.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.errors import OctavoError

T = TypeVar("T")


@dataclass(frozen=True)
class Perplexity:
    """The perplexity over ``tokens`` predicted tokens, and its logarithm, the mean loss in nats a token."""

    value: float
    loss: float
    tokens: int


def perplexity(
    model: nn.Module,
    windows: Tensor,
    batch: int = 4,
    *,
    track: "Callable[[list[Any], str], Iterable[Any]] | None" = None,
) -> Perplexity:
    """Evaluate a causal language model on token windows [count, length].

    Raises ``OctavoError`` for a model that is not a causal language model, for tokens it does not know, and for a loss
    that is NaN or infinite, then with the name of the first layer whose output is.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise OctavoError(f"windows are [count, length] with a length of 2 or more, not {list(windows.shape)}")
    if (why := obstacle(model)) is not None:
        raise OctavoError(f"perplexity is for causal language models: {why}")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise OctavoError(f"the text has token {int(windows.max())}, the model knows {vocabulary}: not its tokenizer")
    if int(windows.min()) < 0:
        raise OctavoError(f"the text has token {int(windows.min())}: padding has no place in windows")
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    batches = list(windows.split(batch))
    total = 0.0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for part in track(batches, "evaluating") if track else batches:
                loss = _loss(model, part.to(device))
                if not math.isfinite(loss):
                    raise OctavoError(f"the loss is {loss}: {_first_not_finite(model, part.to(device))}")
                total += loss
    finally:
        model.train(training)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = total / tokens
    return Perplexity(math.exp(min(mean, 700.0)), mean, tokens)


def _loss(model: nn.Module, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = [  # a window at a time: the logits in float32 are the largest tensor of all
        F.cross_entropy(window.float(), targets, reduction="sum").item()
        for window, targets in zip(logits, ids[:, 1:], strict=True)
    ]
    return math.fsum(losses)


def obstacle(model: Any) -> str | None:
    """Why a model has no perplexity, or None."""
    settings = getattr(model, "config", None)
    generates = settings is not None and callable(getattr(model, "generate", None))
    causal = generates and not getattr(settings, "is_encoder_decoder", False)
    return None if causal else f"{type(model).__name__} is not a causal language model"


def _first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """The name of the first module whose output holds NaN or Inf though its input does not."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not found and isinstance(first, Tensor) and first.is_floating_point() and not first.isfinite().all():
                found.append(f"{name} ({type(module).__name__}) is the first layer whose output is not finite")

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not any(m.children())]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no single layer's output is to blame"
