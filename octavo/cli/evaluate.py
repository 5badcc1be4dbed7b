"""``octavo evaluate``: the perplexity of a float or an 8-bit model."""

import argparse
from pathlib import Path
from typing import Any

from octavo.cli import measure
from octavo.cli.console import Screen
from octavo.errors import OctavoError

HELP = (
    "how well a model predicts text: its perplexity",
    """\
Measures perplexity, the number of next tokens that a language model hesitates between: 1 is
certainty, lower is better. Takes float models and folders that `octavo quantize` wrote; two
figures compare if text, windows and tokenizer are the same.""",
    """\
examples:
  octavo evaluate demo
  octavo evaluate small --text novel.txt --windows 32""",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face or 8-bit folder, .gguf file, hub name, or 'demo'"
    )
    measure.dtype_flag(parser)
    measure.add(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> None:
    """Open, measure, report."""
    text = measure.read(arguments)
    with screen.phase("load", f"opening {arguments.model}"):
        model, tokenizer, scheme = _open(arguments)
    if why := measure.obstacle(model, tokenizer):
        raise OctavoError(f"{arguments.model} has no perplexity to measure: {why}")
    tokens = measure.windows(arguments, text, model, tokenizer)
    found = measure.perplexity(model, tokens, screen, "evaluate")
    seconds = screen.seconds["evaluate"]
    screen.facts({"model": f"{arguments.model}: {scheme}"})
    screen.facts({"perplexity": f"{found.value:.3f}"}, "bold")
    screen.facts(
        {"over": measure.on(tokens, text), "speed": f"{tokens.numel() / seconds:,.0f} tokens/s, {seconds:.1f} s"}
    )
    screen.result(
        {
            "model": arguments.model,
            "numbers": scheme,
            "perplexity": found.value,
            "loss": found.loss,
            "tokens": found.tokens,
            "windows": tokens.shape[0],
            "window": tokens.shape[1],
            "text": text.source,
            "tokens_per_second": tokens.numel() / seconds,
            "seconds": screen.seconds,
        }
    )


def _open(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model, its tokenizer, and its numbers in words."""
    from octavo.io import checkpoint, huggingface, loading

    path = huggingface.locate(arguments.model)
    if not is_eight_bit(path):
        source = huggingface.open_model(arguments.model, measure.dtype(arguments.dtype))
        return source.model, source.tokenizer, f"{type(source.model).__name__} in {str(source.model.dtype)[6:]}"
    if arguments.dtype != "auto":
        raise OctavoError(f"{path} is an 8-bit folder and has its dtype; --dtype is for float models")
    transformers = loading.require("transformers")
    model = checkpoint.load(path)
    with loading.transformers_on(f"the tokenizer in {path}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return model, tokenizer, f"{type(model).__name__} with {_schemes(model)}"


def is_eight_bit(path: Path) -> bool:
    """Whether this is a folder that ``octavo.load`` opens."""
    from octavo.io import checkpoint, compressed_tensors, safe_files

    config = path / checkpoint.CONFIG
    if (path / checkpoint.MANIFEST).exists():
        return True
    told = safe_files.read_json(config).get("quantization_config") if config.is_file() else None
    return isinstance(told, dict) and told.get("quant_method") == compressed_tensors.METHOD


def _schemes(model: Any) -> str:
    from octavo.core.schemes import describe
    from octavo.nn.layer import QuantizedLayer

    return ", ".join(dict.fromkeys(describe(m.scheme) for m in model.modules() if isinstance(m, QuantizedLayer)))
