"""Where the pictures come from: Fashion-MNIST as Debian packs it, or scikit-learn's digits where that is not at hand.

Fashion-MNIST (Xiao et al., 1708.07747): 70,000 grey pictures of clothes, 28 × 28, in ten classes. Its four files lie in
``/usr/share/datasets/fashion-mnist`` after ``apt install dataset-fashion-mnist``; ``FASHION_MNIST`` names another
folder. The digits (1,797 of 8 × 8) come inside scikit-learn: they show that everything runs, not what it costs.
"""

import gzip
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
VARIABLE = "FASHION_MNIST"
CALIBRATION = 1000  # training pictures that are kept apart to find ranges with


@dataclass(frozen=True)
class Pictures:
    """Float pictures [N, 1, H, W] of mean 0 and variance 1, and their classes int64 [N], for each purpose.

    ``mirrored``: whether a picture's mirror image is of its class, as a shirt's is and a digit's is not.
    """

    name: str
    mirrored: bool
    train: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load() -> Pictures:
    """Fashion-MNIST if it is on this machine, else the digits, with a word about it."""
    folder = place()
    if folder is None:
        print(f"no Fashion-MNIST in {DEBIAN}, and no {VARIABLE}=FOLDER: scikit-learn's digits instead", file=sys.stderr)
    return digits() if folder is None else fashion(folder)


def place() -> Path | None:
    """The folder that holds Fashion-MNIST, or None. Raises ``FileNotFoundError`` if ``FASHION_MNIST`` names no such."""
    named = os.environ.get(VARIABLE)
    if not named:
        return DEBIAN if DEBIAN.is_dir() else None
    if not (Path(named) / "train-images-idx3-ubyte.gz").is_file():
        raise FileNotFoundError(f"{VARIABLE}={named}: no train-images-idx3-ubyte.gz is in there")
    return Path(named)


def fashion(folder: Path) -> Pictures:
    """The files of Debian's dataset-fashion-mnist, or of the original, in this folder."""
    parts = [
        (read_idx(folder / f"{part}-images-idx3-ubyte.gz"), read_idx(folder / f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    ]
    return _split("Fashion-MNIST", True, *parts)


def digits() -> Pictures:
    """scikit-learn's digits, every fifth for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ModuleNotFoundError(
            "there is no Fashion-MNIST here (apt install dataset-fashion-mnist, or FASHION_MNIST=FOLDER), and no "
            "scikit-learn, which brings the digits instead: pip install scikit-learn"
        ) from None
    found = load_digits()
    images = (torch.from_numpy(found.images) * (255 / 16)).byte()
    labels = torch.from_numpy(found.target).byte()
    test = torch.arange(len(labels)) % 5 == 0
    return _split("digits", False, (images[~test], labels[~test]), (images[test], labels[test]))


def read_idx(file: Path) -> Tensor:
    """A file of LeCun's IDX format: two zero bytes, 8 for bytes, the number of dimensions, their sizes, the data."""
    content = gzip.decompress(file.read_bytes())
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if (zeros, kind) != (0, 8) or len(content) - start != torch.Size(shape).numel():
        raise ValueError(f"{file} is no IDX file of bytes, or is cut off")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def _split(name: str, mirrored: bool, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Pictures:
    """Normalize by the training pictures, and keep the last of those apart, at most a tenth, for calibration."""
    mean, deviation = train[0].float().mean(), train[0].float().std()
    (images, labels), held_out = (
        (((images.float() - mean) / deviation).unsqueeze(1), labels.long()) for images, labels in (train, test)
    )
    apart = min(CALIBRATION, len(labels) // 10)
    return Pictures(name, mirrored, (images[:-apart], labels[:-apart]), (images[-apart:], labels[-apart:]), held_out)
