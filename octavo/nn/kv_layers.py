"""Layers of a transformers cache whose keys and values are 8-bit codes.

They are ``DynamicLayer`` and ``DynamicSlidingWindowLayer`` with another place to keep things: what those promise (the
shapes, the masks, cropping, beams) holds here. Keys and values are quantized when they come; who reads gets numbers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from octavo.errors import OctavoError
from octavo.nn.token_store import TokenStore


class QuantizedDynamicLayer(DynamicLayer):  # type: ignore[misc]  # transformers comes without types
    """The keys and values of one layer, all of them."""

    record_past = False

    def __init__(self, keys: TokenStore, values: TokenStore) -> None:
        self.stores = (keys, values)
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Every key as a number [batch, heads, tokens, dim]; None before the first."""
        return _read(self.stores[0])

    @keys.setter
    def keys(self, new: Tensor | None) -> None:
        _write(self.stores[0], new)

    @property
    def values(self) -> Tensor | None:
        """Every value as a number [batch, heads, tokens, dim]; None before the first."""
        return _read(self.stores[1])

    @values.setter
    def values(self, new: Tensor | None) -> None:
        _write(self.stores[1], new)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, with the room made for tokens to come."""
        return sum(store.nbytes for store in self.stores)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Called with the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values [batch, heads, tokens, dim], and give all there are, as numbers."""
        self.append(key_states, value_states)
        return self.stores[0].read(), self.stores[1].read()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Quantize new keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for store, new in zip(self.stores, (keys, values), strict=True):
            store.append(new)

    def get_seq_length(self) -> int:
        """How many tokens there are."""
        return len(self.stores[0])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise OctavoError(f"crop takes the number of tokens to remove as a negative one, not {tokens_to_remove}")
        for store in self.stores:
            store.drop_last(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the beams go on from those of these indices."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self.batch_select_indices(torch.arange(self.stores[0].batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        for store in self.stores:
            store.select(indices)

    def offload(self) -> None:
        """Move to the CPU."""
        for store in self.stores:
            store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move back to where the model is."""
        for store in self.stores if self.is_initialized else ():
            store.to(self.device)


class QuantizedSlidingWindowLayer(QuantizedDynamicLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The keys and values of one layer that the next token's window still reaches."""

    def __init__(self, keys: TokenStore, values: TokenStore, sliding_window: int) -> None:
        self.stores = (keys, values)
        DynamicSlidingWindowLayer.__init__(self, sliding_window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values, and give all that the window of the first of them reaches."""
        self.append(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        visible = self.sliding_window - 1 + key_states.shape[-2]
        found = (self.stores[0].read(visible), self.stores[1].read(visible))
        if not self.record_past:
            self._keep_window()
        return found

    def get_seq_length(self) -> int:
        """How many tokens there were."""
        return int(self.cumulative_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens, and those that the window then leaves behind."""
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise OctavoError(
                f"the window of {self.sliding_window} tokens has moved on and what it left is forgotten; call "
                "activate_past_recording() before the tokens that crop is to take back"
            )
        before = len(self.stores[0])
        super().crop(tokens_to_remove)
        self.cumulative_length -= before - len(self.stores[0])
        self._keep_window()

    def _keep_window(self) -> None:
        for store in self.stores:
            store.keep_last(self.sliding_window - 1)


class QuantizedHybridLayer(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A recurrent state, left as it is, beside keys and values (Falcon-H1, Zamba)."""

    def __init__(self, attention: QuantizedDynamicLayer, number_of_states: int) -> None:
        self.attention = attention
        super().__init__(number_of_states=number_of_states)

    @property
    def keys(self) -> Tensor | None:
        """As of the layer of keys and values."""
        return self.attention.keys

    @keys.setter
    def keys(self, new: Tensor | None) -> None:
        self.attention.keys = new

    @property
    def values(self) -> Tensor | None:
        """As of the layer of keys and values."""
        return self.attention.values

    @values.setter
    def values(self, new: Tensor | None) -> None:
        self.attention.values = new

    @property
    def is_sliding(self) -> bool:
        """Whether there is a window."""
        return bool(self.attention.is_sliding)

    @property
    def record_past(self) -> bool:
        """Whether ``crop`` is to come, and nothing may be forgotten before it."""
        return self.attention.record_past

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        self.attention.record_past = wanted

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.attention.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values, and give all that attention needs, as numbers."""
        self.is_initialized = True
        return self.attention.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """How many tokens there were."""
        return self.attention.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        sizes: tuple[int, int] = self.attention.get_mask_sizes(query_length)
        return sizes

    def get_max_length(self) -> int:
        """The most tokens that are kept; −1 for no limit."""
        return int(self.attention.get_max_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the beams go on from those of these indices."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(beam_idx)

    def reset(self) -> None:
        """Start afresh."""
        LinearAttentionLayer.reset(self)
        self.attention.reset()

    def offload(self) -> None:
        """Move to the CPU."""
        LinearAttentionLayer.offload(self)
        self.attention.offload()

    def prefetch(self) -> None:
        """Move back to where the model is."""
        LinearAttentionLayer.prefetch(self)
        self.attention.prefetch()


def _read(store: TokenStore) -> Tensor | None:
    return store.read() if store.parts else None


def _write(store: TokenStore, new: Tensor | None) -> None:
    store.clear()
    if new is not None:
        store.append(new)
