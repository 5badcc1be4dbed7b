"""Octavo: eight-bit numbers for PyTorch. Choose a format, quantize, and ship, INT8 or FP8, with the evidence."""

from octavo.analysis.perplexity import perplexity
from octavo.core import formats, schemes
from octavo.core.cast import Cast, cast, decode, encode, fake_quantize, quantize, sqnr
from octavo.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.matmul import matmul
from octavo.core.qtensor import QTensor
from octavo.core.records import from_json, to_json
from octavo.core.scaling import Constant, Current
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError, OctavoWarning
from octavo.io.checkpoint import load, save
from octavo.ptq.quantize import Summary, quantize_
from octavo.ptq.rules import Rule

__version__ = "0.1.0"

__all__ = [
    "Cast",
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
    "Summary",
    "cast",
    "decode",
    "encode",
    "fake_quantize",
    "formats",
    "from_json",
    "load",
    "matmul",
    "perplexity",
    "quantize",
    "quantize_",
    "save",
    "schemes",
    "sqnr",
    "to_json",
]
