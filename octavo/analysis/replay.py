"""Run a model again from one layer on, with everything before that layer as it was.

To know what one layer costs, the whole model has to run with that layer changed. What comes before the layer is the
same each time, so it is remembered: while a batch runs for the first time, the results of the model's units (the
elements of its module lists, the decoder's blocks above all) are kept; when it runs again, the units that came before
the one with the changed layer answer with what they kept. Half the work is left on average, and nothing is
approximated. It holds for any model: what happens is recorded, not guessed, and a model whose results are not the very
same when replayed (it mutates inputs, or passes things on behind its modules' backs) is run in full instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Call, enter

LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
Forward = Callable[..., Any]


class Recording:
    """One batch's run through the model as it is: ``output``, and what ``run`` needs to run it again.

    ``layers``: those that may be changed. ``calls`` counts how often each ran, ``rows`` and ``shapes`` tell the largest
    input that it got: how many rows of numbers, and its shape.
    """

    def __init__(self, model: nn.Module, batch: Any, layers: Iterable[nn.Module], call: Call | None = None) -> None:
        self.model, self.batch, self.call = model, batch, call
        self.calls: dict[nn.Module, int] = {}
        self.shapes: dict[nn.Module, tuple[int, ...]] = {}
        self._first: dict[nn.Module, int] = {}  # the unit's call in which a layer runs for the first time
        self._kept: list[tuple[nn.Module, Any]] = []
        self._units = list(units(model))
        wanted = set(layers)
        handles = [layer.register_forward_pre_hook(self._watch, with_kwargs=True) for layer in wanted]
        try:
            self.output = self._enter(self._record)
        finally:
            for handle in handles:
                handle.remove()
        self.exact = self._replays()
        if not self.exact:
            self._kept = []

    def run(self, changed: Mapping[nn.Module, Forward]) -> Any:
        """The model's output with other forwards for these layers."""
        firsts = [self._first[layer] for layer in changed if layer in self._first]
        return self._from(min(firsts, default=0), changed)

    def inputs(self, layer: nn.Module) -> list[Tensor]:
        """What the layer gets in the model as it is."""
        found: list[Tensor] = []
        own = layer.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            found.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).detach().clone())
            if len(found) == self.calls[layer]:
                raise _Enough
            return own(*args, **kwargs)

        if self.calls.get(layer):
            with suppress(_Enough):
                self.run({layer: keep})
        return found

    def _from(self, start: int, changed: Mapping[nn.Module, Forward]) -> Any:
        count, inside = 0, False

        def answer(unit: nn.Module, own: Forward, *args: Any, **kwargs: Any) -> Any:
            nonlocal count, inside
            if inside:
                return own(*args, **kwargs)
            count += 1
            if count <= min(start, len(self._kept)):
                kept_of, result = self._kept[count - 1]
                if kept_of is unit and result is not _UNKNOWN:
                    return copied(result)
            inside = True
            try:
                return own(*args, **kwargs)
            finally:
                inside = False

        with forwards(changed):
            return self._enter(answer)

    def _enter(self, wrapper: Callable[..., Any]) -> Any:
        def wrapped(unit: nn.Module) -> Forward:
            own = unit.forward
            return lambda *args, **kwargs: wrapper(unit, own, *args, **kwargs)

        with forwards({unit: wrapped(unit) for unit in self._units}):
            return enter(self.model, self.batch, self.call)

    def _record(self, unit: nn.Module, own: Forward, *args: Any, **kwargs: Any) -> Any:
        if self._kept and self._kept[-1][1] is _RUNNING:
            return own(*args, **kwargs)
        self._kept.append((unit, _RUNNING))
        result = own(*args, **kwargs)
        self._kept[-1] = (unit, copied(result) if _plain(result) else _UNKNOWN)
        return result

    def _watch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self._first.setdefault(layer, max(0, len(self._kept) - 1))
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None and x.numel() >= torch.Size(self.shapes.get(layer, ())).numel() * (layer in self.shapes):
            self.shapes[layer] = tuple(x.shape)

    def _replays(self) -> bool:
        """Whether the output is the very same when all units but the last, and half of them, only answer."""
        for start in (len(self._kept) - 1, len(self._kept) // 2):
            try:
                again = self._from(start, {})
            except Exception:  # whatever a model says whose units were passed over
                return False
            if not same(again, self.output):
                return False
        return True


class _Enough(Exception):
    """The layer's inputs are known, the rest of the model need not run."""


_RUNNING, _UNKNOWN = object(), object()  # in the place of a result that is not there yet, or cannot be copied


def units(module: nn.Module) -> Iterator[nn.Module]:
    """The modules to remember: elements of the outermost module lists, and what stands beside these."""
    for child in dict.fromkeys(module.children()):
        holds_list = any(isinstance(part, LISTS) for part in child.modules())
        if isinstance(child, LISTS) or (holds_list and not isinstance(module, LISTS)):
            yield from units(child)
        else:
            yield child


@contextmanager
def forwards(changed: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules with other forwards for a while."""
    before = {module: vars(module).get("forward") for module in changed}
    try:
        for module, forward in changed.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def copied(value: Any) -> Any:
    """The value with tensors of its own, so that nobody who changes them in place changes ours."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return value


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(item) for item in value)
    if type(value) is dict:
        return all(_plain(item) for item in value.values())
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def tensors(value: Any) -> list[Tensor]:
    """The float tensors in a model's output, whatever it is."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def same(a: Any, b: Any) -> bool:
    """Whether two outputs hold the same bits."""
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(left, right, strict=True)
    )
