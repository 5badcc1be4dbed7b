"""How a batch of example data enters a model, and in which state the model meets it."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import OctavoError

#: Wraps an iterable to show progress: (items, what is being done) → the same items.
Track = Callable[[Any, str], Iterable[Any]]
#: How a batch enters a model, where ``enter`` cannot know it.
Call = Callable[[nn.Module, Any], Any]


def enter(model: nn.Module, batch: Any, call: Call | None = None) -> Any:
    """The model's result for a batch, which is moved to the model's device first.

    A batch is a tensor, a dict of arguments, or a tuple, of which the model gets as many as it requires, so that labels
    stay out; for anything else ``call(model, batch)``. Raises ``OctavoError`` for a batch that does not fit.
    """
    batch = _to(batch, _device(model))
    if call is not None:
        return call(model, batch)
    parameters = _parameters(model)
    if isinstance(batch, Mapping):
        names = {p.name for p in parameters}
        unknown = [key for key in batch if key not in names]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise OctavoError(
                f"the batch has {', '.join(map(str, unknown[:3]))}, which {type(model).__name__}.forward does not take "
                f"({', '.join(sorted(names))}); leave it out, or say how to call the model: call=lambda model, batch: …"
            )
        return model(**batch)
    if isinstance(batch, tuple | list):
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = max(1, sum(p.default is p.empty for p in positional))
        if len(batch) < needed:
            raise OctavoError(f"the batch has {len(batch)} parts, {type(model).__name__}.forward needs {needed}")
        return model(*batch[:needed])
    if isinstance(batch, Tensor):
        return model(batch)
    raise OctavoError(
        f"a batch is a tensor, a dict or a tuple, not {type(batch).__name__}; say how to call the model with it: call=…"
    )


def several(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches themselves; one batch alone, which would be taken for many, is an ``OctavoError``."""
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise OctavoError(f"the data is an iterable of batches, not one {type(batches).__name__}; put it into a list")
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; afterwards every module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """The model without ``torch.compile`` for a while: compiled code may pass over hooks that came later."""
    if not any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """What ``forward`` takes; of a wrapper that passes on all it gets (DataParallel, torch.compile), what is within."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    within = getattr(model, "_orig_mod", getattr(model, "module", None))
    passes_on = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return _parameters(within) if passes_on and isinstance(within, nn.Module) else parameters


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and type(batch) in (tuple, list):
        return type(batch)(_to(value, device) for value in batch)
    return batch
