"""Small convolutional networks of several families, with batch norms whose statistics look trained."""

import torch
import transformers
from torch import nn


def trained(model):
    """Give every BatchNorm statistics and parameters as training leaves them, and switch to eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.5)
            nn.init.uniform_(module.running_var, 0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


class Residual(nn.Module):
    """The usual block: one ReLU for both places, the shortcut convolved where the width changes."""

    def __init__(self, width, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or width != out:
            self.shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)


def resnet():
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Residual(8, 8),
            Residual(8, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
    )


class Separable(nn.Module):
    """MobileNet's: widen, filter every channel on its own, narrow, add."""

    def __init__(self, width, kernel=3):
        super().__init__()
        inner = 3 * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, width, 1),
            nn.BatchNorm2d(width, affine=False),
        )

    def forward(self, x):
        return x + self.layers(x)


def mobilenet():
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardtanh(-1, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 5)]
    return trained(nn.Sequential(*stem, Separable(8), Separable(8, 5), *head))


def decoder():
    """Up again, with groups along both axes."""
    return trained(
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 3, stride=2, output_padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 12, (3, 2), groups=4, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 3, 3, groups=3),
        )
    )


def perceptron():
    layers = [nn.Flatten(), nn.Linear(3 * 8 * 8, 33), nn.BatchNorm1d(33), nn.ReLU()]
    layers += [nn.Linear(33, 20, bias=False), nn.BatchNorm1d(20, affine=False), nn.ReLU(), nn.Linear(20, 5)]
    return trained(nn.Sequential(*layers))


def hf_resnet():
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck", num_labels=5
    )
    return trained(transformers.ResNetForImageClassification(config))


def hf_mobilenet():
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=5, min_depth=4)
    return trained(transformers.MobileNetV2ForImageClassification(config))


NETWORKS = {f.__name__: f for f in (resnet, mobilenet, decoder, perceptron, hf_resnet, hf_mobilenet)}


def images(number=4, seed=0):
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def output(model, x):
    """Logits, or what the model returns."""
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits
