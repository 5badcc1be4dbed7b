"""Train both networks: ``python -m examples.fashion_mnist.train``. Some minutes on two CPU cores.

SGD with momentum and one cycle of the learning rate (Smith and Topin, 1708.07120), pictures shifted and mirrored at
random, full convolutions in BF16 by autocast (depthwise ones are faster in FP32 on a CPU). The weights go to
``build/``, which git ignores; what is there is not trained again.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.fashion_mnist import data
from examples.fashion_mnist.models import MODELS

BUILD = Path(os.environ.get("OCTAVO_EXAMPLES", "build/fashion_mnist"))
EPOCHS = 10
SEED = 0
BATCH = 256  # pictures; fewer where there are so few that this would make less than 40 steps an epoch
SHIFT = 14  # pictures are moved by up to a 14th of their width


def trained(name: str, pictures: data.Pictures, epochs: int | None = None) -> nn.Module:
    """The network of that name in eval mode: from ``build/`` if it was trained there, else trained now."""
    torch.manual_seed(SEED)
    model = MODELS[name]()
    size = sum(parameter.numel() for parameter in model.parameters())  # another architecture is another file
    file = BUILD / f"{pictures.name}-{name}-{size}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    train(model, pictures, EPOCHS if epochs is None else epochs)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(file)
    return model


def train(model: nn.Module, pictures: data.Pictures, epochs: int) -> None:
    """Train in place and leave the model in eval mode; prints a line an epoch."""
    images, labels = pictures.train
    depthwise = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())
    generator = torch.Generator().manual_seed(SEED)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = max(1, min(BATCH, len(labels) // 40))
    steps = -(-len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        total = torch.zeros(())
        for rows in torch.randperm(len(labels), generator=generator).split(batch):
            x = augmented(images[rows], pictures.mirrored, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=not depthwise):
                loss = F.cross_entropy(model(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1} of {epochs}: loss {float(total) / len(labels):.4f}, {seconds:.0f} s", flush=True)
    model.eval().to(memory_format=torch.contiguous_format)


def augmented(images: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """Every picture moved a little at random, and half of them mirrored if that is allowed."""
    count, _, height, width = images.shape
    most = width // SHIFT
    padded = F.pad(images, [most] * 4, value=float(images.min())).squeeze(1)
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator)
    columns = torch.arange(width).expand(count, width)
    if mirrored:
        columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    which, rows, columns = torch.arange(count)[:, None, None], (torch.arange(height) + down), columns + right
    return (
        padded[which, rows[:, :, None], columns[:, None, :]].unsqueeze(1).contiguous(memory_format=torch.channels_last)
    )


@torch.no_grad()
def scores(model: nn.Module, images: Tensor) -> Tensor:
    """The model's scores for many pictures, [N, 10]."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def main() -> None:
    """Train what is not trained yet, and say how well it does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    pictures = data.load()
    print(f"{pictures.name}: {len(pictures.train[1]):,} pictures to train on, {len(pictures.test[1]):,} to judge by")
    for name in MODELS:
        model = trained(name, pictures, arguments.epochs)
        right = scores(model, pictures.test[0]).argmax(1) == pictures.test[1]
        print(f"{name}: {100 * float(right.float().mean()):.2f} % of the test pictures", flush=True)


if __name__ == "__main__":
    main()
