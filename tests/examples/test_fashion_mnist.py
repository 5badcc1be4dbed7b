"""The vision example runs from data to table, on scikit-learn's digits and narrow networks."""

import gzip
import json
import struct

import pytest
import torch

import octavo as ov
from examples.fashion_mnist import data, models, quantize, tasks, train

pytest.importorskip("sklearn")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """No Fashion-MNIST, weights that go to a folder of the test's, and small networks."""
    monkeypatch.delenv(data.VARIABLE, raising=False)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(train, "BUILD", tmp_path / "build")
    monkeypatch.setattr(train, "EPOCHS", 3)
    monkeypatch.setitem(models.MODELS, "resnet", lambda: models.resnet(8))
    monkeypatch.setitem(models.MODELS, "mobilenet", lambda: models.mobilenet(4))
    tasks.pictures.cache_clear()
    yield tmp_path
    tasks.pictures.cache_clear()


def idx(array, kind=8):
    head = struct.pack(f">HBB{array.dim()}I", 0, kind, array.dim(), *array.shape)
    return gzip.compress(head + bytes(array.flatten().tolist()))


def test_fashion_as_debian_packs_it(tmp_path, monkeypatch):
    images = torch.arange(40 * 6).reshape(40, 2, 3).remainder(251).byte()
    labels = torch.arange(40).remainder(10).byte()
    for part, count in (("train", 40), ("t10k", 10)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images[:count]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels[:count]))
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    found = data.load()
    assert (found.name, found.mirrored) == ("Fashion-MNIST", True)
    assert [len(part[1]) for part in (found.train, found.calibration, found.test)] == [36, 4, 10]
    assert found.test[1].tolist() == list(range(10))
    whole = torch.cat([found.train[0], found.calibration[0]])
    assert abs(float(whole.mean())) < 1e-5
    assert abs(float(whole.std()) - 1) < 1e-3


def test_files_that_are_none(tmp_path, monkeypatch):
    file = tmp_path / "x.gz"
    file.write_bytes(idx(torch.zeros(3, 2).byte(), kind=13))
    with pytest.raises(ValueError, match="no IDX file"):
        data.read_idx(file)
    file.write_bytes(gzip.compress(gzip.decompress(idx(torch.zeros(3, 2).byte()))[:-1]))
    with pytest.raises(ValueError, match="cut off"):
        data.read_idx(file)
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no train-images"):
        data.load()


def test_augmentation_keeps_the_pictures_whole():
    image = torch.zeros(64, 1, 28, 28)
    image[:, :, 4:24, 4:24] = torch.rand(20, 20)
    moved = train.augmented(image, False, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    torch.testing.assert_close(moved.sum((1, 2, 3)), image.sum((1, 2, 3)))
    assert not torch.equal(moved, image)
    mirrored = train.augmented(image[:1].expand(64, -1, -1, -1), True, torch.Generator().manual_seed(0))
    assert len({tuple(x[0].amax(0).ne(0).tolist()) for x in mirrored}) > 1


def test_from_data_to_table(place, monkeypatch, capsys):
    monkeypatch.setattr(quantize, "FORMATS", ("INT8", "E5M2"))
    monkeypatch.setattr(quantize, "OBSERVERS", {name: quantize.OBSERVERS[name] for name in ("minmax", "mse")})
    monkeypatch.setattr("sys.argv", ["quantize", "--out", str(place)])
    quantize.main()
    told = json.loads((place / "vision.json").read_text())
    page = (place / "vision.md").read_text()
    assert page in capsys.readouterr().out
    assert told["pictures"] == "digits"
    for name in models.MODELS:
        network = told["networks"][name]
        rows = {row["scheme"]: row for row in network["static"]}
        assert rows["INT8"]["sqnr"] > rows["E5M2"]["sqnr"] + 6
        assert abs(rows["INT8"]["change"]) < 3
        assert rows["INT8"]["accuracy"] == pytest.approx(network["fp32"] + rows["INT8"]["change"])
        assert f"## {name}" in page
    assert told["networks"]["resnet"]["fp32"] > 80
    assert (place / "build").is_dir()


def test_the_functions_of_the_command_line(place, monkeypatch, capsys):
    from octavo.cli.main import main

    monkeypatch.chdir(place)
    functions = "examples.fashion_mnist.tasks"
    words = ["--data", f"{functions}:calibration", "--evaluate", f"{functions}:accuracy", "--scheme", "int8-static"]
    assert main(["quantize", f"{functions}:resnet", *words, "--out", "small"]) == 0
    assert "accuracy" in capsys.readouterr().out
    again = ov.load("small", model=tasks.resnet())
    assert tasks.accuracy(again) == pytest.approx(tasks.accuracy(tasks.resnet()), abs=3)
