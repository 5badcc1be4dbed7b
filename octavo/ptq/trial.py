"""Whether a scale that moves between layers leaves a model as it is, tried on an example before anything is changed.

Hooks divide what a module makes and multiply what linear layers read of it, by powers of two: if nothing else takes
part, every layer then reads what it read before, bit for bit. The powers are about as large as the scale, but never 1
and not alike: a scale of nearly 1 would show nothing, and one alike for all channels not where channels are mixed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from octavo.calibration.batches import Call, eagerly, enter, evaluating
from octavo.errors import OctavoError
from octavo.nn.trace import undisturbed

TRIED = 64  # rows of every layer's input that are compared
SLACK = 1e-3  # relative; the numbers are exact but for sums in another order


@dataclass(frozen=True, eq=False)
class Move:
    """Channels of ``source``'s result are divided by ``scale``, and multiplied by it before ``readers``, by name."""

    source: nn.Module
    readers: Mapping[str, nn.Module]
    scale: Tensor


def unfit(model: nn.Module, moves: Iterable[Move], example: Any, call: Call | None) -> list[Move]:
    """The moves that do more than they should, each found with those before it that fit.

    Raises ``OctavoError`` for a model whose result changes all the same.
    """
    moves, wrong = list(moves), []
    expected, result = _run(model, moves, example, call, scaled=False)
    while moves:
        seen, moved = _run(model, moves, example, call, scaled=True)
        odd = [m for m in moves if not all(name in seen and _close(expected[name], seen[name]) for name in m.readers)]
        if odd:  # those behind it may only be its victims
            moves.remove(odd[0])
            wrong.append(odd[0])
        elif all(map(_close, result, moved)):
            break
        else:
            raise OctavoError(
                f"{type(model).__name__} gives another result when the layers' inputs are the same; nothing was "
                "changed. Does it depend on chance, or on what ran before?"
            )
    return wrong


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest power of two to each positive number."""
    return torch.exp2(scale.log2().round())


def _telling(scale: Tensor) -> Tensor:
    """Powers of two near a scale, 2 to 16 times as far from 1, by turns that a rearrangement will hardly repeat."""
    near = scale.log2().round().cpu()
    further = torch.randint(1, 5, near.shape, generator=torch.Generator().manual_seed(1))
    return torch.exp2(near + further.where(near >= 0, -further))


def _run(
    model: nn.Module, moves: Iterable[Move], example: Any, call: Call | None, scaled: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Rows of what the readers read, and the model's result."""
    rows: dict[str, Tensor] = {}
    handles = []

    def reading(name: str, factor: Tensor | None) -> Callable[..., Any]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            x = x if factor is None else x * factor.to(x)
            rows[name] = x.detach().reshape(-1, x.shape[-1])[:TRIED].clone()
            return ((x, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): x})

        return look

    def making(factor: Tensor) -> Callable[..., Any]:
        return lambda module, args, y: y / factor.to(y)

    with evaluating(model), eagerly(model), undisturbed(model), torch.no_grad():
        try:
            for move in moves:
                factor = _telling(move.scale) if scaled else None
                if factor is not None:
                    handles.append(move.source.register_forward_hook(making(factor)))
                for name, module in move.readers.items():
                    handles.append(module.register_forward_pre_hook(reading(name, factor), with_kwargs=True))
            result = enter(model, example, call)
        finally:
            for handle in handles:
                handle.remove()
    return rows, [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def _close(expected: Tensor, seen: Tensor) -> bool:
    if expected.shape != seen.shape:
        return False
    most = float(expected.abs().max()) if expected.numel() else 0.0
    # what a power of two made subnormal on its way, as float16 often is, has lost bits
    slack = max(SLACK * 1e-3, 4 * torch.finfo(expected.dtype).eps)
    return torch.allclose(seen, expected, rtol=SLACK, atol=slack * most, equal_nan=True)
