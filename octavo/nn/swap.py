"""Find the layers of a model that can become 8 bits, and put others in their place.

A layer is what ``named_modules`` finds under one or several names; all names of one layer are swapped together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from octavo.core.schemes import Scheme
from octavo.nn.conv import QuantizedConv, QuantizedConvTranspose
from octavo.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from octavo.nn.layer import QuantizedLayer, tables_of
from octavo.nn.linear import QuantizedLinear, is_conv1d

#: Which 8-bit layer stands in for which float one; a subclass counts where it computes the same.
KINDS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), QuantizedConv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), QuantizedConvTranspose),
    nn.Embedding: QuantizedEmbedding,
    nn.EmbeddingBag: QuantizedEmbeddingBag,
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that owns weights: all its names, and why it cannot be quantized (``None`` if it can)."""

    names: tuple[str, ...]
    module: nn.Module
    obstacle: str | None

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def kind(self) -> str:
        """The class's name."""
        return type(self.module).__name__

    @property
    def weight(self) -> Tensor:
        """The weight as stored."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def owner(self) -> nn.Module | Tensor:
        """What layers that share their weight have in common: its parameter, or the module that computes it."""
        stored = dict(self.module.named_parameters(recurse=False)).get("weight")
        return self.module if stored is None else stored

    @property
    def eight_bit(self) -> type[QuantizedLayer]:
        """What would stand in its place."""
        found = eight_bit(self.module)
        assert found is not None
        return found

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix with a row an output channel."""
        return self.eight_bit.matrix(self.module)

    def refusal(self, scheme: Scheme) -> str | None:
        """Why the layer cannot run under this scheme, or None."""
        return self.eight_bit.obstacle(self.module, scheme)

    @property
    def nbytes(self) -> int:
        """Bytes of the module's own parameters and buffers, those that a weight is computed from included."""
        inner = parametrize.is_parametrized(self.module)
        own = [*self.module.parameters(recurse=inner), *self.module.buffers(recurse=inner)]
        tables = tables_of(self.module)
        return sum(t.nbytes for t in own if id(t) not in tables)


def layers(model: nn.Module) -> list[Layer]:
    """Every module of the model that owns a parameter or codes, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    readers = _read_by_their_parent(model)
    computed = [module.get_submodule("parametrizations") for module in names if _computed(module)]
    within = {part for parametrizations in computed for part in parametrizations.modules()}
    found = []
    for module, known_as in names.items():
        if module in within:
            continue
        if isinstance(module, QuantizedLayer):
            found.append(Layer(tuple(known_as), module, "already quantized"))
        elif next(module.parameters(recurse=False), None) is not None:
            alone = "the model is this one layer; put it into nn.Sequential" if module is model else None
            found.append(Layer(tuple(known_as), module, readers.get(module) or _obstacle(module) or alone))
        elif isinstance(module, tuple(KINDS)):  # parametrized: its parameters live one level below
            found.append(Layer(tuple(known_as), module, _obstacle(module)))
    return found


def replace(model: nn.Module, layer: Layer, new: nn.Module) -> None:
    """Put ``new`` under every name of the layer, with its mode and its forward hooks."""
    new.train(layer.module.training)
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        setattr(new, hooks, getattr(layer.module, hooks))  # the very dicts, so that handles still remove their hooks
    for name in layer.names:
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, attribute, new)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # torch's way to say: no fused path, which would read the float weight
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors only serve that fused path


def eight_bit(module: nn.Module) -> type[QuantizedLayer] | None:
    """The kind of layer that would stand in for this module, or None."""
    if is_conv1d(module):
        return QuantizedLinear
    return next((new for kind, new in KINDS.items() if isinstance(module, kind)), None)


def _obstacle(module: nn.Module) -> str | None:
    if is_conv1d(module):
        return None
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return "its parameters have no shape yet; run the model once on real data first"
    kind = next((kind for kind in KINDS if isinstance(module, kind)), None)
    if kind is None:
        matrix = any(p.ndim >= 2 for p in module.parameters(recurse=False))
        return f"{type(module).__name__} has no 8-bit form" if matrix else "no matrix"
    methods = KINDS[kind].computes
    if any(method in vars(module) for method in methods):
        return "somebody put another forward into this very module"
    if "weight" not in module._parameters and not _computed(module):
        return "a hook computes its weight (weight_norm, pruning); make it permanent first"
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or torch.finfo(weight.dtype).bits < 16:
        return f"its weight is {weight.dtype}".replace("torch.", "")
    changed = [method for method in methods if getattr(type(module), method) is not getattr(kind, method)]
    if changed and not KINDS[kind].same(module):
        return f"{type(module).__name__} overrides {kind.__name__}.{changed[0]} with something else"
    return None


def _computed(module: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize computes the layer's weight, so that reading it gives the right one."""
    return isinstance(module, tuple(KINDS)) and parametrize.is_parametrized(module, "weight")


def _read_by_their_parent(model: nn.Module) -> dict[nn.Module, str]:
    return {
        module.out_proj: "nn.MultiheadAttention reads its weight directly"
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
