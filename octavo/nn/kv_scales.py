"""Static scales of keys and values, found by calibration and kept on the attention modules, as engines keep them.

compressed-tensors writes them as ``k_scale`` and ``v_scale`` beside the projections of every attention module. Which
module hands its keys to which layer of the cache is not asked of its class but watched while data passes.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from octavo.core.cast import Cast

#: Which cache of an encoder-decoder: the decoder's own, or of what it sees of the encoder.
Part = Literal["self", "cross"]
NAMES = ("k_scale", "k_zero_point", "v_scale", "v_zero_point")


class KVScales(nn.Module):
    """How the keys and values of one attention module are cast; sits on the module as ``kv_scales``.

    ``index``: the cache's layer that gets them. ``k_scale``, ``v_scale``: float32 [1, 1, 1, 1] or a number a head
    [1, heads, 1, 1]; None where the Cast is not static. They are in no state dict, because float checkpoints have
    no place for them.
    """

    k_scale: Tensor | None
    k_zero_point: Tensor | None
    v_scale: Tensor | None
    v_zero_point: Tensor | None

    def __init__(
        self,
        part: Part,
        index: int,
        keys: Cast | None,
        values: Cast | None,
        k: tuple[Tensor | None, Tensor | None],
        v: tuple[Tensor | None, Tensor | None],
    ) -> None:
        super().__init__()
        self.part, self.index, self.keys, self.values = part, index, keys, values
        for name, tensor in zip(NAMES, (*k, *v), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KVScales":
        # scales follow the module to another device, but keep their dtype: rounded ones would be others
        for name in NAMES:
            before = getattr(self, name)
            if before is not None:
                setattr(self, name, before.to(fn(before).device))
        return self
