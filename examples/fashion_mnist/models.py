"""Two small networks, of the two kinds that 8-bit formats treat differently.

``resnet``: residual blocks of full convolutions (He et al., 1512.03385). Sums over hundreds of products smooth the
rounding errors, and channels are of one size: nearly any 8-bit format will do.

``mobilenet``: inverted residual blocks around depthwise convolutions (Sandler et al., 1801.04381). A channel is summed
over 9 products only, and BatchNorm makes some channels a hundred times larger than others: known to be hard, above all
with one scale for a whole weight (Nagel et al., 1906.04721).
"""

from torch import Tensor, nn


class Residual(nn.Module):
    """``activation(x + body(x))``, with a 1 × 1 convolution on ``x`` where the shape changes."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.body(x))


def resnet(width: int = 16) -> nn.Sequential:
    """Four stages of ``width`` to ``4 · width`` channels; pictures [N, 1, H, W] to scores [N, 10]."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        changes = stride != 1 or inputs != outputs
        shortcut = nn.Sequential(*_convolution(inputs, outputs, 1, stride)) if changes else nn.Identity()
        first = _convolution(inputs, outputs, 3, stride)
        body = nn.Sequential(*first, nn.ReLU(), *_convolution(outputs, outputs, 3))
        return Residual(body, shortcut, nn.ReLU())

    return nn.Sequential(
        *_convolution(1, width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        block(width, width, 1),
        block(width, 2 * width, 2),
        block(2 * width, 2 * width, 1),
        block(2 * width, 4 * width, 2),
        block(4 * width, 4 * width, 1),
        *_head(4 * width),
    )


def mobilenet(width: int = 16) -> nn.Sequential:
    """Five inverted residual blocks, four times as wide inside; pictures [N, 1, H, W] to scores [N, 10]."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        inside = 4 * inputs
        expand = [*_convolution(inputs, inside, 1), nn.ReLU6()]
        depthwise = [*_convolution(inside, inside, 3, stride, groups=inside), nn.ReLU6()]
        body = nn.Sequential(*expand, *depthwise, *_convolution(inside, outputs, 1))
        same = stride == 1 and inputs == outputs
        return Residual(body, nn.Identity(), nn.Identity()) if same else body

    return nn.Sequential(
        *_convolution(1, width, 3, 2),
        nn.ReLU6(),
        block(width, width, 1),
        block(width, 2 * width, 2),
        block(2 * width, 2 * width, 1),
        block(2 * width, 4 * width, 2),
        block(4 * width, 4 * width, 1),
        *_head(4 * width),
    )


MODELS = {"resnet": resnet, "mobilenet": mobilenet}


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and the BatchNorm that will be folded into it."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
