"""What ``MODEL`` stands for, opened: a checkpoint as its users have it, an 8-bit folder, or a Python function."""

import argparse
from dataclasses import dataclass
from typing import Any

from octavo.cli import measure
from octavo.errors import OctavoError

MODEL = "a Hugging Face folder, .gguf file, hub name, 'demo', or a Python function package.module:function"
ANY_MODEL = "a Hugging Face or 8-bit folder, .gguf file, hub name, 'demo', or a Python function package.module:function"


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, its numbers in words, and what came with it."""

    model: Any
    tokenizer: Any
    numbers: str
    batches: Any = None


def architecture_flag(parser: argparse.ArgumentParser) -> None:
    """Into which model an 8-bit folder goes that cannot say so itself."""
    parser.add_argument(
        "--architecture",
        metavar="MODULE:FUNCTION",
        help="for an 8-bit folder of a Python function's model: that function",
    )


def float_model(arguments: argparse.Namespace) -> Opened:
    """The model to quantize."""
    from octavo.io import entry_point, huggingface

    if entry_point.is_entry_point(arguments.model):
        if arguments.dtype != "auto":
            raise OctavoError(f"--dtype is for checkpoints; {arguments.model} makes its model in the dtype it wants")
        model, batches = entry_point.model(arguments.model)
        return Opened(model, None, _numbers(model), batches)
    source = huggingface.open_model(arguments.model, measure.dtype(arguments.dtype))
    return Opened(source.model, source.tokenizer, _numbers(source.model))


def any_model(arguments: argparse.Namespace) -> Opened:
    """The model, float or 8-bit."""
    from octavo.io import checkpoint, entry_point, huggingface

    path = None if entry_point.is_entry_point(arguments.model) else huggingface.locate(arguments.model)
    if path is None or not huggingface.is_eight_bit(path):
        if arguments.architecture is not None:
            raise OctavoError(f"--architecture is for 8-bit folders, and {arguments.model} is none. Leave it out")
        return float_model(arguments)
    if arguments.dtype != "auto":
        raise OctavoError(f"{path} is an 8-bit folder and has its dtype; --dtype is for float models")
    if arguments.architecture is not None:
        into, batches = entry_point.model(arguments.architecture)
        model = checkpoint.load(path, into)
        return Opened(model, None, _numbers(model), batches)
    if not (path / checkpoint.CONFIG).exists():
        raise OctavoError(
            f"{path} does not say what model its numbers belong to: name the function that makes it, "
            "--architecture MODULE:FUNCTION"
        )
    model = checkpoint.load(path)
    return Opened(model, huggingface.tokenizer_or_warning(path), _numbers(model))


def _numbers(model: Any) -> str:
    """The model's class, and its schemes or its dtype."""
    from octavo.core.schemes import describe
    from octavo.nn.layer import QuantizedLayer

    schemes = dict.fromkeys(describe(m.scheme) for m in model.modules() if isinstance(m, QuantizedLayer))
    if schemes:
        return f"{type(model).__name__} with {', '.join(schemes)}"
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in model.parameters())
    own = getattr(model, "dtype", None)
    return f"{type(model).__name__} in {str(own)[6:] if own is not None else ' and '.join(dtypes) or 'no numbers'}"
