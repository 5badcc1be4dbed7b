"""Octavo: eight-bit numbers for PyTorch. Choose a format, quantize, and ship, INT8 or FP8, with the evidence.

Names are loaded when they are first used, so that ``import octavo`` and ``octavo --help`` answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo import analysis, calibration, cli, core, io, nn, ops, ptq
    from octavo.analysis.bias_window import BiasWindow, bias_window
    from octavo.analysis.choice import Choice
    from octavo.analysis.choose import choose
    from octavo.analysis.compare import compare
    from octavo.analysis.comparison import Candidate, Comparison
    from octavo.analysis.outliers import find_outliers
    from octavo.analysis.perplexity import perplexity
    from octavo.calibration.run import Calibration, CalibrationInterrupted
    from octavo.core import accumulate, formats, requantize, schemes
    from octavo.core.cast import Cast, cast, cast_, decode, encode, quantize, quantize_scaled, sqnr
    from octavo.core.fake_quantize import fake_quantize, fake_quantize_
    from octavo.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
    from octavo.core.matmul import matmul
    from octavo.core.qtensor import QTensor
    from octavo.core.records import from_json, to_json
    from octavo.core.scaling import Constant, Current, Static
    from octavo.core.schemes import Scheme
    from octavo.errors import OctavoError, OctavoWarning
    from octavo.io.checkpoint import load, save
    from octavo.io.integer import load_integer, save_integer
    from octavo.io.stream import quantize_checkpoint
    from octavo.nn.attention import quantize_attention_ as quantize_attention_
    from octavo.nn.attention import restore_attention_ as restore_attention_
    from octavo.nn.kv_cache import KVCache as KVCache
    from octavo.nn.kv_calibration import calibrate_kv_cache_ as calibrate_kv_cache_
    from octavo.ptq.batch_norm import retune_batch_norms_
    from octavo.ptq.bias_correction import correct_biases_, correct_biases_without_data_, expected_inputs
    from octavo.ptq.convert import dequantize_, recast_
    from octavo.ptq.fold import fold_batch_norms_, fuse_relu_
    from octavo.ptq.integer import integer_only
    from octavo.ptq.quantize import Summary, calibrate, quantize_
    from octavo.ptq.rules import Rule, read_rules, write_rules
    from octavo.ptq.smooth import Smoothing, smooth_

__version__ = "0.1.0"

#: These import transformers, which may not be there: so ``from octavo import *`` leaves them out.
_WITH_TRANSFORMERS = {
    "octavo.nn.attention": ("quantize_attention_", "restore_attention_"),
    "octavo.nn.kv_cache": ("KVCache",),
    "octavo.nn.kv_calibration": ("calibrate_kv_cache_",),
}
#: Where each public name lives; a name that is a module's own stands for the module.
_HOMES = {
    "octavo": ("analysis", "calibration", "cli", "core", "io", "nn", "ops", "ptq"),
    "octavo.analysis.bias_window": ("BiasWindow", "bias_window"),
    "octavo.analysis.outliers": ("find_outliers",),
    "octavo.analysis.choice": ("Choice",),
    "octavo.analysis.choose": ("choose",),
    "octavo.analysis.compare": ("compare",),
    "octavo.analysis.comparison": ("Candidate", "Comparison"),
    "octavo.analysis.perplexity": ("perplexity",),
    "octavo.calibration.run": ("Calibration", "CalibrationInterrupted"),
    "octavo.core": ("accumulate", "formats", "requantize", "schemes"),
    "octavo.core.cast": ("Cast", "cast", "cast_", "decode", "encode", "quantize", "quantize_scaled", "sqnr"),
    "octavo.core.fake_quantize": ("fake_quantize", "fake_quantize_"),
    "octavo.core.granularity": ("PerBlock", "PerChannel", "PerGroup", "PerTensor", "PerToken"),
    "octavo.core.matmul": ("matmul",),
    "octavo.core.qtensor": ("QTensor",),
    "octavo.core.records": ("from_json", "to_json"),
    "octavo.core.scaling": ("Constant", "Current", "Static"),
    "octavo.core.schemes": ("Scheme",),
    "octavo.errors": ("OctavoError", "OctavoWarning"),
    "octavo.io.checkpoint": ("load", "save"),
    "octavo.io.integer": ("load_integer", "save_integer"),
    "octavo.io.stream": ("quantize_checkpoint",),
    **_WITH_TRANSFORMERS,
    "octavo.ptq.batch_norm": ("retune_batch_norms_",),
    "octavo.ptq.bias_correction": ("correct_biases_", "correct_biases_without_data_", "expected_inputs"),
    "octavo.ptq.convert": ("dequantize_", "recast_"),
    "octavo.ptq.fold": ("fold_batch_norms_", "fuse_relu_"),
    "octavo.ptq.integer": ("integer_only",),
    "octavo.ptq.quantize": ("Summary", "calibrate", "quantize_"),
    "octavo.ptq.rules": ("Rule", "read_rules", "write_rules"),
    "octavo.ptq.smooth": ("Smoothing", "smooth_"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {"octavo", "octavo.core"}

__all__ = [
    "BiasWindow",
    "Calibration",
    "CalibrationInterrupted",
    "Candidate",
    "Cast",
    "Choice",
    "Comparison",
    "Constant",
    "Current",
    "OctavoError",
    "OctavoWarning",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QTensor",
    "Rule",
    "Scheme",
    "Smoothing",
    "Static",
    "Summary",
    "accumulate",
    "analysis",
    "bias_window",
    "calibrate",
    "calibration",
    "cast",
    "cast_",
    "choose",
    "cli",
    "compare",
    "core",
    "correct_biases_",
    "correct_biases_without_data_",
    "decode",
    "dequantize_",
    "encode",
    "expected_inputs",
    "fake_quantize",
    "fake_quantize_",
    "find_outliers",
    "fold_batch_norms_",
    "formats",
    "from_json",
    "fuse_relu_",
    "integer_only",
    "io",
    "load",
    "load_integer",
    "matmul",
    "nn",
    "ops",
    "perplexity",
    "ptq",
    "quantize",
    "quantize_",
    "quantize_checkpoint",
    "quantize_scaled",
    "read_rules",
    "recast_",
    "requantize",
    "retune_batch_norms_",
    "save",
    "save_integer",
    "schemes",
    "smooth_",
    "sqnr",
    "to_json",
    "write_rules",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    found = import_module(f"{home}.{name}") if home in _MODULES else getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, *(name for names in _WITH_TRANSFORMERS.values() for name in names), "__version__"]
