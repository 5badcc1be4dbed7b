"""Text to calibrate on and text to judge by, never the same.

Without a file of the user's there is still prose on every machine that has Python: the language reference that
`help()` shows. Its wording differs a little between Python versions; the tokens that come from it do too.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from octavo.errors import OctavoError
from octavo.io.folder import did_you_mean

BLOCK = 2000  # characters: a few paragraphs, so that a block is still connected text
MIN_BLOCKS = 20
LONG = 400  # characters: a paragraph up to this long stays in one piece


def default_text() -> str:
    """The Python language reference as plain text, about 460,000 characters."""
    try:
        from pydoc_data import topics
    except ImportError:
        raise OctavoError("This Python has no pydoc_data, the default text. Name a text file instead.") from None
    values: dict[str, str] = topics.topics
    return "\n\n".join(values[key] for key in sorted(values))


def read_text(path: str | os.PathLike[str] | None = None) -> str:
    """The text of a UTF-8 file, or the default text."""
    if path is None:
        return default_text()
    if Path(path).is_dir():
        raise OctavoError(f"{path} is a folder. Name one text file.")
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise OctavoError(f"{path} does not exist.{did_you_mean(path)}") from None
    except (OSError, ValueError) as error:
        raise OctavoError(f"{os.fspath(path)!r} cannot be read ({error}). Check its name and permissions.") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise OctavoError(f"{path} is UTF-16. Convert it: iconv -f utf-16 -t utf-8 {path} > text.txt")
    if b"\0" in data:
        raise OctavoError(f"{path} is binary, not text (byte {data.index(0)} is zero). Name a plain UTF-8 text file.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OctavoError(
            f"{path} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}). "
            f"Convert it, if it is Latin-1: iconv -f latin1 -t utf-8 {path} > text.txt"
        ) from None
    if not text.strip():
        raise OctavoError(f"{path} is empty. Name a file with some pages of text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split(text: str) -> tuple[str, str]:
    """Calibration and evaluation text: blocks of paragraphs dealt out in turn, none of them in both.

    Every block goes to the part that is shorter so far, which alternates for blocks of one size and keeps the halves
    even for others. A paragraph that the calibration part holds too is left out of the evaluation part.
    """
    target = min(BLOCK, max(1, len(text) // MIN_BLOCKS))
    parts: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for block in _blocks(_pieces(text, target), target):
        shorter = int(sizes[1] < sizes[0])
        parts[shorter].extend(block)
        sizes[shorter] += sum(map(len, block))
    seen = {piece.strip() for piece in parts[0]}
    calibration, evaluation = ("\n\n".join(p) for p in (parts[0], [p for p in parts[1] if p.strip() not in seen]))
    if not evaluation:
        raise OctavoError(
            f"A text of {len(text)} characters has no two different parts, one to calibrate and one to evaluate. "
            "Use some pages of text."
        )
    return calibration, evaluation


def windows(tokenizer: Any, text: str, length: int, limit: int | None = None) -> torch.Tensor:
    """`text` as rows of `length` tokens, int64 [count, length], without overlap; at most `limit` rows."""
    if length < 1 or (limit is not None and limit < 1):
        raise OctavoError(f"Windows of {length} tokens, {limit} of them, are none. Both numbers must be at least 1.")
    with _no_length_warning():
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise OctavoError(
            f"The text has {len(ids)} tokens, less than one window of {length}. Use a longer text or shorter windows."
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def _pieces(text: str, target: int) -> list[str]:
    """The paragraphs; of one too long for a block its lines, and of a long line runs of words."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        pieces.extend([paragraph] if len(paragraph) <= max(LONG, 2 * target) else _lines(paragraph, target))
    return [piece.rstrip() for piece in pieces if piece.strip()]


def _lines(paragraph: str, target: int) -> Iterator[str]:
    for line in paragraph.split("\n"):
        start = 0
        while start < len(line):
            end = line.find(" ", start + target)
            end = len(line) if end < 0 else end
            yield line[start:end]
            start = end


def _blocks(pieces: list[str], target: int) -> Iterator[list[str]]:
    """Consecutive pieces, grouped until they reach the target."""
    block: list[str] = []
    for piece in pieces:
        block.append(piece)
        if sum(map(len, block)) >= target:
            yield block
            block = []
    if block:
        yield block


@contextmanager
def _no_length_warning() -> Iterator[None]:
    """Whole texts are tokenized on purpose: longer than any model reads at once is no news."""
    logger = logging.getLogger("transformers.tokenization_utils_base")

    def keep(record: logging.LogRecord) -> bool:
        return "sequence length is longer" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
