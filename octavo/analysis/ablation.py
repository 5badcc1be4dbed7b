"""What a model loses without some dimensions of its hidden states: LLM.int8()'s test of what outliers are good for.

The paper (2208.07339) sets the outlier dimensions to zero in the inputs of layers, as many random ones for comparison,
and watches perplexity and how sure attention is: the largest probability of each row of its softmax, on average. Seven
outlier dimensions out of thousands cost several hundred percent of perplexity; seven random ones cost nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo.analysis.outliers import THRESHOLD
from octavo.calibration.batches import Track, evaluating
from octavo.errors import OctavoError

How = Literal["zero", "clip"]


@contextmanager
def without(
    model: nn.Module,
    dimensions: Mapping[str, Sequence[int]],
    how: How = "zero",
    threshold: float = THRESHOLD,
) -> Iterator[None]:
    """The model for a while without some dimensions of layers' inputs.

    ``dimensions``: by the layer's name, indices of its input's last dimension. They are set to zero, or with "clip"
    held to ±``threshold``. Raises ``OctavoError`` for layers that the model does not have, and, when it runs, for
    inputs that do not have the dimensions.
    """
    if how not in ("zero", "clip"):
        raise OctavoError(f"dimensions are taken away by 'zero' or 'clip', not {how!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in dimensions if name not in modules]:
        raise OctavoError(f"{type(model).__name__} has no layer {', '.join(missing[:3])}")

    def changing(name: str, places: Sequence[int]) -> Callable[..., Any]:
        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(x, Tensor) or not all(0 <= place < x.shape[-1] for place in places):
                raise OctavoError(f"the input of {name} does not have the dimensions {list(places)}")
            x = x.clone()
            x[..., list(places)] = x[..., list(places)].clamp(-threshold, threshold) if how == "clip" else 0.0
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

        return change

    handles = [
        modules[name].register_forward_pre_hook(changing(name, places), with_kwargs=True)
        for name, places in dimensions.items()
        if len(places)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_peak(model: nn.Module, windows: Tensor, batch: int = 4, track: Track | None = None) -> float:
    """The largest attention probability of a token, on average over tokens, heads and layers; first tokens left out.

    ``windows`` [count, length] of tokens go into a transformers model, which has to give its attention away
    (``attn_implementation="eager"``). Raises ``OctavoError`` if it does not, and for windows of less than two tokens.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise OctavoError(f"windows are [count, length] of two tokens and more, not {list(windows.shape)}")
    total, count = 0.0, 0
    parts: Iterable[Tensor] = list(windows.split(batch))
    with evaluating(model):
        for part in track(parts, "looking at attention") if track else parts:
            found = getattr(model(input_ids=part, output_attentions=True), "attentions", None)
            if not found or any(one is None for one in found):
                raise OctavoError(
                    f"{type(model).__name__} does not give its attention away; open it with attn_implementation='eager'"
                )
            for one in found:  # [batch, heads, queries, keys]; the first token sees only itself
                peaks = one[:, :, 1:].amax(-1)
                total, count = total + float(peaks.double().sum()), count + peaks.numel()
    return total / count
