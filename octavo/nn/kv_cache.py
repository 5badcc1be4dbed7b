"""What a language model remembers, its keys and values, in 8 bits: a cache for transformers' ``generate``.

8-bit codes take half the memory of bfloat16. Keys and values are quantized once, when they come, and are numbers in the
model's dtype again when attention asks for them, so every attention implementation works. The first pass over a prompt
already sees the rounded ones: what is generated does not depend on how the text was cut up.

A scale a token and head (``PerToken``) adapts to what comes and needs no data. Static scales, one a tensor or a head,
are what engines keep in a checkpoint: see ``octavo.nn.kv_scales``. KIVI (2402.02750) and KVQuant (2401.18079) show what
makes keys the harder half: a few channels that are large in every token.
"""

import inspect
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from torch import nn

try:
    from transformers.cache_utils import (
        Cache,
        DummyLayer,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        EncoderDecoderCache,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
        LinearAttentionLayer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f"octavo.KVCache is a cache for a recent transformers ({error}): pip install -U transformers"
    ) from error

from octavo.core import formats
from octavo.core.cast import Cast
from octavo.core.granularity import PerToken
from octavo.core.scaling import Static
from octavo.errors import OctavoError
from octavo.nn.kv_layers import QuantizedDynamicLayer, QuantizedHybridLayer, QuantizedSlidingWindowLayer
from octavo.nn.kv_scales import KVScales, Part
from octavo.nn.token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INT8_PER_TOKEN = Cast(formats.INT8, PerToken())


class KVCache(DynamicCache):  # type: ignore[misc]  # transformers comes without types
    """An 8-bit cache for one batch: ``model.generate(**inputs, past_key_values=octavo.KVCache(model))``.

    ``keys`` and ``values``: how each is cast, as tensors [batch, heads, tokens, dim]; ``None`` keeps it in the model's
    dtype. Left out, they are what the model was calibrated for (``calibrate_kv_cache_``), else INT8 with a scale a
    token and head; values go with the keys. Static Casts need the model itself and its calibration.

    Sliding windows are kept short, recurrent states as they are; an encoder-decoder gets an ``EncoderDecoderKVCache``.
    Raises ``OctavoError`` for a model that keeps no keys and values, and for Casts that cannot hold them.
    """

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> "KVCache":
        """The class that fits the model, as ``pathlib.Path`` does for its system."""
        if cls is KVCache and getattr(getattr(model, "config", model), "is_encoder_decoder", False):
            cls = EncoderDecoderKVCache
        made: KVCache = super().__new__(cls)
        return made

    def __init__(
        self,
        model: "PreTrainedModel | PreTrainedConfig",
        keys: Cast | EllipsisType | None = ...,
        values: Cast | EllipsisType | None = ...,
    ) -> None:
        Cache.__init__(self, layers=_layers(model, keys, values, "self"))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values with their scales, and of the room made for tokens to come."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)


class EncoderDecoderKVCache(EncoderDecoderCache, KVCache):  # type: ignore[misc]
    """Two caches: of what the decoder has written, and of what it sees of the encoder."""

    def __init__(
        self,
        model: "PreTrainedModel | PreTrainedConfig",
        keys: Cast | EllipsisType | None = ...,
        values: Cast | EllipsisType | None = ...,
    ) -> None:
        halves = []
        part: Part
        for part in ("self", "cross"):
            half = KVCache.__new__(KVCache)
            Cache.__init__(half, layers=_layers(model, keys, values, part))
            halves.append(half)
        EncoderDecoderCache.__init__(self, *halves)

    @property
    def nbytes(self) -> int:
        """Bytes of both caches."""
        return int(self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes)


def decoder_config(model: Any) -> Any:
    """The settings of the stack that keeps keys and values. Raises ``OctavoError`` if there is none."""
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise OctavoError(f"a KV cache is for a transformers model or its config, not {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        config = model.get_decoder().config  # it may have another number of layers than the encoder
    text = config.get_text_config(decoder=True)
    encoder = not text.is_encoder_decoder and not getattr(text, "is_decoder", True)
    if encoder and text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # GPT-NeoX is no decoder either, in its words
        raise OctavoError(
            f"{type(model).__name__} looks at all tokens at once and keeps no keys and values; a decoder of its kind "
            "is made with config.is_decoder = True"
        )
    if isinstance(model, nn.Module) and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise OctavoError(f"{type(model).__name__} keeps no keys and values from call to call; it takes no cache")
    return text


def _layers(model: Any, keys: Cast | EllipsisType | None, values: Cast | EllipsisType | None, part: Part) -> list[Any]:
    """The cache's layers: those that transformers would make, with 8 bits where they hold keys and values."""
    config = decoder_config(model)
    found = [m for m in model.modules() if isinstance(m, KVScales)] if isinstance(model, nn.Module) else []
    calibrated = {m.index: m for m in found if m.part == part}
    layers: list[Any] = []
    for index, like in enumerate(DynamicCache(config=config).layers):
        kind = type(like)
        if kind is DummyLayer or kind is LinearAttentionLayer:
            layers.append(like)
            continue
        stores = _stores(index, part, keys, values, calibrated.get(index))
        sliding = kind in (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)
        layer = QuantizedSlidingWindowLayer(*stores, like.sliding_window) if sliding else QuantizedDynamicLayer(*stores)
        if kind in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(layer)
        elif kind in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
            layers.append(QuantizedHybridLayer(layer, like.number_of_states))
        else:
            raise OctavoError(
                f"layer {index} of {config.model_type} is cached by a {kind.__name__}, which keeps more than keys and "
                "values; there is no 8-bit one"
            )
    return layers


def _stores(
    index: int,
    part: Part,
    keys: Cast | EllipsisType | None,
    values: Cast | EllipsisType | None,
    calibrated: KVScales | None,
) -> tuple[TokenStore, TokenStore]:
    if keys is ...:
        keys = INT8_PER_TOKEN if calibrated is None else calibrated.keys
    if values is ...:
        values = keys if calibrated is None else calibrated.values
    cross = "cross-attention " if part == "cross" else ""
    sides = (("keys", keys, "k"), ("values", values, "v"))
    stores = []
    for side, how, letter in sides:
        name = f"the {cross}{side} of layer {index}"
        if how is not None and not isinstance(how, Cast):
            raise OctavoError(f"{side} is a Cast, or None to leave them alone, not {how!r}")
        scale = zero_point = None
        if how is not None and isinstance(how.scale, Static):
            if calibrated is None:
                raise OctavoError(
                    f"{name}: a static scale needs a calibrated model: octavo.calibrate_kv_cache_(model, data, …), "
                    "then KVCache(model)"
                )
            if how != getattr(calibrated, side):
                raise OctavoError(
                    f"{name} are calibrated for {getattr(calibrated, side)}, not for {how}; leave {side} out, or "
                    "calibrate again"
                )
            scale, zero_point = getattr(calibrated, f"{letter}_scale"), getattr(calibrated, f"{letter}_zero_point")
        stores.append(TokenStore(name, how, scale, zero_point))
    return stores[0], stores[1]
