"""Calibrate the static scales of a KV cache: let observers see the keys and values that a model hands to its cache.

The model runs with an ordinary cache that shows everything new to an observer first. Which attention module it came
from is whichever module is at work at that moment: no class of attention has to be known.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, EncoderDecoderCache

from octavo.calibration.batches import Call, Track, enter
from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer
from octavo.calibration.run import Calibration
from octavo.core.cast import Cast
from octavo.core.scaling import Static
from octavo.errors import OctavoError
from octavo.nn.kv_cache import decoder_config
from octavo.nn.kv_scales import KVScales, Part
from octavo.nn.token_store import check


def calibrate_kv_cache_(
    model: nn.Module,
    data: Iterable[Any],
    keys: Cast | None,
    values: Cast | None,
    observer: Observer | None = None,
    *,
    call: Call | None = None,
    track: Track | None = None,
) -> None:
    """Find static scales for keys and values [batch, heads, tokens, dim], and keep them in the model.

    ``data``: batches as every calibration takes them, token ids or dicts of arguments. ``observer`` (``MinMax()``) says
    how ranges are chosen; their granularity is that of each Cast. From then on ``KVCache(model)`` casts as given here.
    Raises ``OctavoError`` where no Cast is static, for a layer that saw no data, and for NaN or Inf.
    """
    config = decoder_config(model)
    casts = {"keys": keys, "values": values}
    for side, how in casts.items():
        if how is not None:
            check(side, how)
    static = {side: how for side, how in casts.items() if how is not None and isinstance(how.scale, Static)}
    if not static:
        raise OctavoError("neither keys nor values have static scales; a cache that makes its own needs no calibration")
    parts = get_args(Part) if model.config.is_encoder_decoder else ("self",)  # type: ignore[union-attr]
    like = DynamicCache(config=config).layers
    layers = [(part, index) for part in parts for index, x in enumerate(like) if isinstance(x, CacheLayerMixin)]
    observe = MinMax() if observer is None else observer
    observers = {
        _tap(part, side, index): observe.fresh(how.granularity)
        for part, index in layers
        for side, how in static.items()
    }
    rig = _Rig(model, list(observers))
    calibration = Calibration(observers)
    with rig.watching(config, parts):
        calibration.run(rig, data, call=lambda rig, batch: enter(model, batch, call), track=track)
    if calibration.unreached:
        raise OctavoError(
            f"no data reached {', '.join(calibration.unreached[:3])}; an encoder-decoder needs decoder_input_ids or "
            "labels"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made: dict[nn.Module, KVScales] = {}
    for part, index in layers:
        settled = dict(casts)
        scales: dict[str, tuple[Tensor | None, Tensor | None]] = {"keys": (None, None), "values": (None, None)}
        for side, how in static.items():
            seen = observers[_tap(part, side, index)]
            settled[side] = to = seen.settle(how)
            scales[side] = seen.scale(to, dtype)
        owner = rig.owners[part, index]
        if owner in made:
            raise OctavoError(
                f"one {type(owner).__name__} fills layers {made[owner].index} and {index} of the cache, and has room "
                "for the static scales of one; take PerToken(), which needs none"
            )
        made[owner] = KVScales(part, index, settled["keys"], settled["values"], *scales.values())
    for owner, found in made.items():
        owner.kv_scales = found


class _Rig(nn.Module):
    """The model beside what its keys and values pass through, a module for each, so that a calibration sees them."""

    def __init__(self, model: nn.Module, taps: list[str]) -> None:
        super().__init__()
        self.model = model
        self.taps = taps
        for name in taps:
            self.add_module(name, nn.Identity())
        self.at_work: list[nn.Module] = []
        self.owners: dict[tuple[Part, int], nn.Module] = {}

    def show(self, part: Part, index: int, keys: Tensor, values: Tensor) -> None:
        """Let the new keys and values of a layer be seen, and remember whose they are."""
        self.owners[part, index] = self.at_work[-1]
        for side, x in (("keys", keys), ("values", values)):
            if (name := _tap(part, side, index)) in self.taps:
                self.get_submodule(name)(x)

    @contextmanager
    def watching(self, config: Any, parts: tuple[Part, ...]) -> Iterator[None]:
        """While this lasts, every call of the model gets a cache of its own that shows what it is given."""

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self.at_work.clear()
            caches = [_Shown(config, self, part) for part in parts]
            cache = caches[0] if len(caches) == 1 else EncoderDecoderCache(*caches)
            return args, {**kwargs, "past_key_values": cache, "use_cache": True}

        def enters(module: nn.Module, args: Any) -> None:
            self.at_work.append(module)

        def leaves(module: nn.Module, args: Any, result: Any) -> None:
            self.at_work.pop()

        handles = [self.model.register_forward_pre_hook(begin, with_kwargs=True)]
        for module in self.model.modules():
            handles += [module.register_forward_pre_hook(enters), module.register_forward_hook(leaves)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Shown(DynamicCache):  # type: ignore[misc]  # transformers comes without types
    """An ordinary cache that shows what it is given."""

    def __init__(self, config: Any, rig: _Rig, part: Part) -> None:
        super().__init__(config=config)
        self.rig, self.part = rig, part

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.rig.show(self.part, layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _tap(part: Part, side: str, index: int) -> str:
    return f"{'cross_' if part == 'cross' else ''}{side}_{index}"
