"""Text: two halves that share nothing, and windows of tokens."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import OctavoError
from octavo.io.text import default_text, read_text, split, windows


class Words:
    """A tokenizer: every word is its length."""

    def __call__(self, text, add_special_tokens=True, return_attention_mask=True):
        return {"input_ids": [len(word) for word in text.split()] + [0] * add_special_tokens}


def paragraphs(text):
    return [p for p in text.split("\n\n") if p.strip()]


def test_default_text_is_prose_and_repeatable():
    text = default_text()
    assert len(text) > 200_000
    assert text == default_text() == read_text()


def test_split_is_even_disjoint_and_repeatable():
    text = default_text()
    calibration, evaluation = split(text)
    assert (calibration, evaluation) == split(text)
    assert not set(paragraphs(calibration)) & set(paragraphs(evaluation))
    assert 0.6 < len(evaluation) / len(calibration) < 1.1
    assert len(calibration) + len(evaluation) > 0.8 * len(text)
    for part in (calibration, evaluation):  # representative: from the beginning, the middle and the end
        where = [text.index(p) / len(text) for p in paragraphs(part) if len(p) > 80]
        assert min(where) < 0.05
        assert max(where) > 0.95


@pytest.mark.parametrize(
    "text",
    [
        "\n\n".join(f"Paragraph {i} says {i * i}." for i in range(10)),
        "\n".join(f"Line {i} of a file without blank lines says {i * i}." for i in range(100)),
        " ".join(f"word{i}" for i in range(1000)),
        "One long paragraph. " * 2 + "\n\n" + "Another one.",
    ],
    ids=["paragraphs", "lines", "one line", "two"],
)
def test_split_of_other_shapes(text):
    calibration, evaluation = split(text)
    assert not set(calibration.split("\n")) & set(evaluation.split("\n")) - {""}
    assert set((calibration + " " + evaluation).split()) == set(text.split())


@pytest.mark.parametrize("text", ["", "short", "the same\n\n" * 100])
def test_text_without_two_parts(text):
    with pytest.raises(OctavoError, match="Use some pages"):
        split(text)


@given(st.text(alphabet="ab \n", max_size=400))
def test_split_never_overlaps(text):
    try:
        calibration, evaluation = split(text)
    except OctavoError:
        return
    assert not set(paragraphs(calibration)) & set(paragraphs(evaluation))


def test_windows():
    text = " ".join("x" * n for n in range(1, 12))
    rows = windows(Words(), text, 3)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert windows(Words(), text, 3, limit=2).tolist() == rows[:2].tolist()
    assert windows(Words(), text, 3, limit=99).shape == (3, 3)
    with pytest.raises(OctavoError, match=r"11 tokens.*window of 12.*longer text or shorter windows"):
        windows(Words(), text, 12)
    for length, limit in ((0, None), (-1, None), (3, 0)):
        with pytest.raises(OctavoError, match="at least 1"):
            windows(Words(), text, length, limit)


def test_long_texts_are_tokenized_without_a_warning(caplog, tmp_path):
    import logging

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4)
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert windows(tokenizer, "a " * 100, 10).shape == (10, 10)
    finally:
        root.removeHandler(caplog.handler)
    assert not caplog.records


def test_read_text(tmp_path):
    good = tmp_path / "good.txt"
    good.write_bytes("\ufeffZeile\r\nÄpfel".encode())
    assert read_text(good) == "Zeile\nÄpfel"
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin1"))
    (tmp_path / "utf16.txt").write_bytes("Äpfel".encode("utf-16"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, words in {
        "latin.txt": "not UTF-8 .byte 0 is 0xc4.*iconv",
        "utf16.txt": "UTF-16.*iconv",
        "image.png": "binary",
        "empty.txt": "empty",
        "god.txt": "Did you mean .*good.txt",
        ".": "is a folder",
        "a\0b": "cannot be read",
    }.items():
        with pytest.raises(OctavoError, match=words):
            read_text(tmp_path / name)
