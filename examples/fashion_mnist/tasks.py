"""What `octavo quantize` asks of a network of one's own: the function that makes it, its data, its judge.

``octavo quantize examples.fashion_mnist.tasks:resnet --data examples.fashion_mnist.tasks:calibration --evaluate
examples.fashion_mnist.tasks:accuracy --scheme int8-static --out resnet-int8``
"""

from functools import cache

from torch import Tensor, nn

import octavo as ov
from examples.fashion_mnist import data
from examples.fashion_mnist.train import BATCH, scores, trained


def resnet() -> nn.Module:
    """The trained residual network, BatchNorms folded; trained now if it is not yet."""
    return folded("resnet")


def mobilenet() -> nn.Module:
    """The trained network of depthwise convolutions, BatchNorms folded."""
    return folded("mobilenet")


def calibration() -> list[Tensor]:
    """Pictures that were neither trained on nor are judged by."""
    return list(pictures().calibration[0].split(BATCH))


def accuracy(model: nn.Module) -> float:
    """Percent of the test pictures that the model puts into their class."""
    images, labels = pictures().test
    return 100 * float((scores(model, images).argmax(1) == labels).double().mean())


def folded(name: str) -> nn.Module:
    """A trained network as it is quantized: its BatchNorms are part of the convolutions before them."""
    model = trained(name, pictures())
    ov.fold_batch_norms_(model, pictures().calibration[0][:1])
    return model


@cache
def pictures() -> data.Pictures:
    """Read once a process."""
    return data.load()
