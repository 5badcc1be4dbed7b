"""The two matrix products of attention, Q·Kᵀ and P·V, in 8 bits.

transformers' models call their attention through an interface that others may extend (``AttentionInterface``). Under
its name there, ``octavo`` runs the model's own plain attention, with its masks, biases, sinks and soft caps, but
multiplies what that would give to ``torch.matmul`` as ``octavo.matmul`` does: both operands as codes and scales. How
they are cast is kept on each attention module; other models are not touched.

Queries and keys take INT8 with a scale a token, as in SageAttention (2410.02367). Probabilities lie in [0, 1] and need
no look at them: E4M3FN with the constant scale 1/448, as in SageAttention2 (2411.10958). An even grid of 1/255 fits
that range too, but over long contexts most probabilities are smaller than half its step and vanish; with a scale a row,
as INT-FlashAttention (2409.16997) has it in effect, UINT8 holds up. docs/kv-cache.md has the figures.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
except ImportError as error:
    raise ImportError(
        f"8-bit attention is for models of a recent transformers ({error}): pip install -U transformers"
    ) from error

from octavo.calibration.batches import Call, Track
from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer
from octavo.calibration.run import Calibration
from octavo.core import formats
from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked
from octavo.core.granularity import PerToken, scale_shape
from octavo.core.matmul import matmul
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Constant, Static
from octavo.errors import OctavoError

NAME = "octavo"  # in transformers' attention interface
CHILD = "quantized_products"  # what QuantizedProducts is called on an attention module
SHORTEST = 16  # stretches of equal scales along K that are worth a product of their own
MATMULS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}

INT8_PER_TOKEN = Cast(formats.INT8, PerToken())
PROBABILITIES = Cast(formats.E4M3FN, scale=Constant(1 / 448))
OPERANDS = ("query", "key", "probabilities", "value")

#: The attention of a modeling file: (module, query, key, value, mask, …) → (output, probabilities).
Plain = Callable[..., Any]


@dataclass(frozen=True)
class AttentionSummary:
    """What ``quantize_attention_`` did: the attention modules in 8 bits, and those it left with the reason why."""

    quantized: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.quantized)} attention modules in 8 bits, {len(self.left)} left"]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.left.items())])


class Operand(nn.Module):
    """One operand of a product: how it is cast, and its scale if that is static. ``None`` leaves it alone."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.how: Cast | None = None
        self.register_buffer("scale", None, persistent=False)  # float checkpoints have no place for it
        self.register_buffer("zero_point", None, persistent=False)

    def settle(self, how: Cast | None, observer: Observer | None) -> None:
        """From now on cast so, with the scale that a calibration found if it is static."""
        self.how = how
        if how is not None and observer is not None:
            self.how = observer.settle(how)
            self.scale, self.zero_point = observer.scale(self.how)

    def forward(self, x: Tensor) -> Tensor | QTensor:
        """The operand in 8 bits."""
        if self.how is None:
            return x
        if self.scale is None:
            return quantize_unchecked(x, self.how)
        return quantize_scaled(x, self.how, self.scale, self.zero_point)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Operand":
        for name in ("scale", "zero_point"):  # to another device, but not to another dtype
            if (before := getattr(self, name)) is not None:
                setattr(self, name, before.to(fn(before).device))
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return repr(self.how)


class QuantizedProducts(nn.Module):
    """How one attention module multiplies; sits on it as ``quantized_products``.

    ``plain``: the attention that its class would run; ``before``: what ``set_attn_implementation`` takes to come back.
    """

    def __init__(self, plain: Plain, before: Any) -> None:
        super().__init__()
        self.plain, self.before = plain, before
        for operand in OPERANDS:
            self.add_module(operand, Operand())

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """``query @ key`` of […, M, dim] and […, dim, N]; a key is cast as the row that it was."""
        return product(self.get_submodule("query")(query), self.get_submodule("key")(key.mT).mT)

    def mix(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """``probabilities @ value`` of […, M, N] and […, N, dim]."""
        return product(self.get_submodule("probabilities")(probabilities), self.get_submodule("value")(value))


def quantize_attention_(
    model: nn.Module,
    query: Cast | None = INT8_PER_TOKEN,
    key: Cast | None = INT8_PER_TOKEN,
    probabilities: Cast | None = PROBABILITIES,
    value: Cast | None = INT8_PER_TOKEN,
    data: Iterable[Any] | None = None,
    *,
    observer: Observer | None = None,
    call: Call | None = None,
    track: Track | None = None,
) -> AttentionSummary:
    """Multiply in 8 bits in every attention of a transformers model, in place; for inference.

    Each Cast is one of queries, keys, values [batch, heads, tokens, dim] and probabilities [batch, heads, tokens,
    tokens]; keys and values are repeated for grouped queries first. ``None`` leaves an operand alone. A value with a
    scale a token is multiplied as a dequantized number in FP32, because that scale varies along the sum; one scale a
    head (``PerChannel(1)``, static) keeps P·V on integers. ``data`` and ``observer`` (``MinMax()``): for static Casts.

    Raises ``OctavoError``, and leaves the model as it was, if it has no attention that goes through transformers'
    interface, if it is quantized already, and if calibration fails or is missing.
    """
    casts = dict(zip(OPERANDS, (query, key, probabilities, value), strict=True))
    for operand, how in casts.items():
        _check(operand, how)
    static = {operand: how for operand, how in casts.items() if how is not None and isinstance(how.scale, Static)}
    if static and data is None:
        raise OctavoError(f"the scale of {', '.join(static)} is static and comes from calibration: pass data=batches")
    found, left = _attentions(model)
    before = _implementations(model.config)
    for module, plain in found.values():
        module.add_module(CHILD, QuantizedProducts(plain, before))
    watch = MinMax() if observer is None else observer
    calibration = Calibration(
        {f"{name}.{CHILD}.{operand}": watch.fresh(how.granularity) for name in found for operand, how in static.items()}
    )
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        _check_reached(found)
        if data is not None and static:  # nothing is cast yet: the ranges are those of the model in float
            calibration.run(model, data, call=call, track=track)
        if calibration.unreached:
            raise OctavoError(f"no data reached {', '.join(calibration.unreached[:3])}; add data that does")
        for name in found:
            for operand, how in casts.items():
                place = f"{name}.{CHILD}.{operand}"
                mine = model.get_submodule(place)
                assert isinstance(mine, Operand)
                mine.settle(how, calibration.observers.get(place))
    except BaseException:
        restore_attention_(model)
        raise
    return AttentionSummary(list(found), left)


def restore_attention_(model: nn.Module) -> None:
    """Undo ``quantize_attention_``: the attention that the model had before."""
    owners = [module for module in model.modules() if CHILD in module._modules]
    if not owners:
        raise OctavoError(f"{type(model).__name__} has no attention in 8 bits to restore")
    before = owners[0].get_submodule(CHILD).before
    for module in owners:
        delattr(module, CHILD)
    model.set_attn_implementation(before)  # type: ignore[operator]


def product(a: Tensor | QTensor, b: Tensor | QTensor) -> Tensor:
    """``a @ b`` as ``octavo.matmul`` has it; where scales change with nearly every number summed, in plain FP32."""
    if isinstance(a, Tensor) or isinstance(b, Tensor) or min(a.block[-1], b.block[-2]) >= min(SHORTEST, a.shape[-1]):
        return matmul(a, b)
    return (a.dequantize(torch.float32) @ b.dequantize(torch.float32)).to(a.dtype)


def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What transformers calls: the module's plain attention with its two products in 8 bits."""
    mine = module._modules.get(CHILD)
    if not isinstance(mine, QuantizedProducts):  # another model that shares its config with a quantized one
        plain = _plain(type(module))
        if plain is None:
            raise OctavoError(f"{type(module).__name__} is not quantized and has no plain attention to fall back to")
        return plain(module, *args, **kwargs)
    if module.training:
        raise OctavoError(
            "attention in 8 bits is for inference: call model.eval(), or restore_attention_(model) to train"
        )
    with _Multiplying(mine) as products:
        result = mine.plain(module, *args, **kwargs)
    if products.count != 2:
        raise OctavoError(
            f"the attention of {type(module).__name__} has {products.count} matrix products where Q·Kᵀ and P·V were "
            "expected; restore_attention_(model) gives it back its own"
        )
    return result


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)  # masks as plain attention takes them: numbers to add


class _Multiplying(TorchFunctionMode):
    """While this lasts, the first matrix product is Q·Kᵀ and the second P·V."""

    def __init__(self, products: QuantizedProducts) -> None:
        super().__init__()
        self.products = products
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in MATMULS:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return (self.products.scores if self.count == 1 else self.products.mix)(*args)


def _attentions(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, Plain]], dict[str, str]]:
    """The attention modules that go through the interface with their plain attention, and those that do not."""
    if not hasattr(model, "set_attn_implementation"):
        raise OctavoError(f"{type(model).__name__} is not a transformers model; pass the transformers model inside it")
    found: dict[str, tuple[nn.Module, Plain]] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if CHILD in module._modules:
            raise OctavoError(f"{name} multiplies in 8 bits already; call restore_attention_(model) first")
        plain = _plain(type(module))
        if plain is not None:
            found[name] = (module, plain)
    for name, module in model.named_modules():
        around = any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in found)
        if "Attention" in type(module).__name__ and name not in found and not around and not _within(name, left):
            left[name] = f"{type(module).__name__} does not go through transformers' attention interface"
    if not found:
        kinds = {reason.split()[0] for reason in left.values()} or {type(model).__name__}
        raise OctavoError(
            f"no attention of {type(model).__name__} goes through transformers' AttentionInterface "
            f"({', '.join(kinds)} multiplies by itself); quantize its linear layers and its KV cache instead"
        )
    return found, left


def _within(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _plain(owner: type[nn.Module]) -> Plain | None:
    """The attention that a class of modules gives to the interface as its default; None if it does not use it."""
    for kind in owner.__mro__:
        for method in vars(kind).values():
            method = inspect.unwrap(method) if callable(method) else method
            names = getattr(getattr(method, "__code__", None), "co_names", ())
            if {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(names):
                plain: list[Plain] = [method.__globals__[n] for n in names if "eager" in n and n in method.__globals__]
                if len(plain) == 1:
                    return plain[0]
    return None


def _check(name: str, how: Cast | None) -> None:
    if how is None:
        return
    if not isinstance(how, Cast):
        raise OctavoError(f"{name} is a Cast, or None to leave it alone, not {how!r}")
    if not how.format.signed and not how.affine and name != "probabilities":
        raise OctavoError(f"{name}: {how.format.name} drops negative numbers; give its Cast affine=True, or use INT8")
    shape = (2, 3, 5, 7)
    try:
        counts = scale_shape(shape, how.granularity.block(shape))
    except OctavoError as error:
        raise OctavoError(f"{name}: {error}") from error
    if isinstance(how.scale, Static) and (counts[0], counts[2]) != (1, 1):
        raise OctavoError(
            f"{name}: a static scale serves all tokens: PerTensor(), or PerChannel(1) for one a head, "
            f"not {how.granularity}"
        )


def _check_reached(found: dict[str, tuple[nn.Module, Plain]]) -> None:
    for name, (module, _) in found.items():
        runs = getattr(getattr(module, "config", None), "_attn_implementation", NAME)
        if runs != NAME:
            raise OctavoError(
                f"{name} ({type(module).__name__}) stays with {runs!r}: its model does not let its attention be set"
            )


def _implementations(config: Any) -> Any:
    """What ``set_attn_implementation`` takes to come back to here, sub-models and all."""
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    own = config._attn_implementation
    return {"": own, **{key: _implementations(x) for key, x in inner.items() if x is not None}} if inner else own
