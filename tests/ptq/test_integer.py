"""Whole models on integers: equal to their simulation, near the float model, refused by name where they cannot be."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.calibration.percentile import Percentile
from octavo.core.cast import Cast, sqnr
from octavo.core.granularity import PerChannel, PerToken
from octavo.core.scaling import Current, Static
from octavo.errors import OctavoError
from octavo.io.integer import load_integer, save_integer
from octavo.nn.integer.elementwise import Clamp, Lookup
from octavo.ptq.integer import integer_only
from octavo.ptq.quantize import quantize_
from tests.nn.test_integer import NoFloats


@pytest.fixture(autouse=True)
def _one_thread():
    """These tensors are tiny: on a busy machine several threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(nn.Module):
    """A forward function and the modules and parameters it uses."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Residual(nn.Module):
    """A depthwise-separable residual block."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu6(self.norm1(self.depthwise(x)))
        return F.relu(x + self.norm2(self.pointwise(y)))


class Net(nn.Module):
    """A small residual network with all kinds of pools."""

    def __init__(self, channels=12):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.a, self.b = Residual(channels), Residual(2 * channels)
        self.pool, self.dropout, self.fc = nn.MaxPool2d(2), nn.Dropout(0.1), nn.Linear(2 * channels, 10)

    def forward(self, x):
        y = self.pool(self.a(self.stem(x)))
        y = self.b(torch.cat([y, F.avg_pool2d(y, 3, 1, 1)], 1))
        return self.fc(self.dropout(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)))


def shuffle(model, x):
    n, c, h, w = x.shape
    return model.conv(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def pieces(model, x):
    a, b, c = model.conv(x).split([2, 2, 2], 1)
    return {"mean": (a * b - c).mean((2, 3)), "max": (c.amax(1), [b]), "stack": F.relu(torch.stack([a, b, a], -1))}


def excite(model, x):
    y = model.conv(x)
    y = y * torch.sigmoid(model.gate(F.adaptive_avg_pool2d(y, 1)))
    return y * F.relu6(y + 3) / 6  # hard-swish by hand: a function of one tensor


def affine(model, x):
    y = model.fc((x - model.mean) / model.deviation + model.position)
    return x @ model.matrix + y


MODELS = {
    "mlp": (nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 5)), (3, 4, 4)),
    "sequence": (nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 5)), (7, 16)),
    "conv1d": (
        nn.Sequential(
            nn.Conv1d(3, 8, 5, 2, 2, dilation=2),
            *(nn.BatchNorm1d(8), nn.PReLU(8), nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 2, 1)),
            *(nn.Conv1d(8, 4, 3, groups=4), nn.AdaptiveAvgPool1d(3)),
        ),
        (3, 40),
    ),
    "conv3d": (
        nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.AvgPool3d(2, 1, 1, count_include_pad=False)),
        (2, 6, 6, 6),
    ),
    "transposed": (
        nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
            *(nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, stride=3, dilation=2)),
        ),
        (4, 5, 5),
    ),
    "pools": (
        nn.Sequential(
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            *(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, 1, divisor_override=3)),
            *(nn.AdaptiveAvgPool2d((3, None)), nn.AdaptiveMaxPool2d((2, 1))),
        ),
        (3, 24, 23),
    ),
    "padding": (
        nn.Sequential(
            nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)),
            *(nn.Hardtanh(-0.5, 0.7), nn.Conv2d(4, 12, 3, padding=1, padding_mode="reflect"), nn.PixelShuffle(2)),
            *(nn.ZeroPad2d((1, 2, 0, -1)), nn.Hardswish(), nn.Upsample(scale_factor=2)),
        ),
        (3, 9, 9),
    ),
    "preactivation": (
        Model(
            lambda m, x: torch.cat([x, m.conv(F.relu(m.norm(x))), F.relu(x)], 1),
            norm=nn.BatchNorm2d(3),
            conv=nn.Conv2d(3, 4, 3, padding=1),
        ),
        (3, 8, 8),
    ),
    "shuffle": (Model(shuffle, conv=nn.Conv2d(4, 4, 3, groups=2)), (4, 8, 6)),
    "chunk": (
        Model(lambda m, x: torch.cat([y + 1 for y in m.conv(x).chunk(3, 1)[::-1]], 1), conv=nn.Conv2d(3, 8, 3)),
        (3, 8, 8),
    ),
    "fill": (
        Model(lambda m, x: m.conv(F.pad(m.conv(x), (1, 0, 2, 0), value=-9.0)), conv=nn.Conv2d(3, 3, 3)),
        (3, 8, 8),
    ),
    "lowest": (
        Model(lambda m, x: F.max_pool2d(F.pad(m.conv(x), (1, 0, 1, 0), value=-1e9), 2), conv=nn.Conv2d(3, 4, 3)),
        (3, 8, 8),
    ),
    "sum pool": (
        Model(lambda m, x: F.avg_pool2d(m.conv(x), 2, divisor_override=1), conv=nn.Conv2d(3, 4, 3)),
        (3, 8, 8),
    ),
    "pieces": (Model(pieces, conv=nn.Conv2d(3, 6, 3)), (3, 8, 8)),
    "excite": (Model(excite, conv=nn.Conv2d(3, 4, 3), gate=nn.Conv2d(4, 4, 1)), (3, 8, 8)),
    "affine": (
        Model(
            affine,
            **{
                "fc": nn.Linear(8, 4),
                "mean": nn.Parameter(torch.randn(8)),
                "deviation": nn.Parameter(torch.rand(1) + 1),
            },
            **{"position": nn.Parameter(torch.randn(1, 5, 8)), "matrix": nn.Parameter(torch.randn(8, 4))},
        ),
        (5, 8),
    ),
    "parametrized": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Softsign()), (8,)),
    "net": (Net(), (1, 8, 8)),
}


def leaves(result):
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def settled(model, shape):
    """The model in eval mode, its BatchNorms with statistics."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(8):
            model.train()(torch.randn(8, *shape) * 2 + 0.5)
    return model.eval()


def check_equal(integer, x):
    """Integers and simulation agree bit for bit, and no float lies between input and output."""
    codes = integer.quantize(x)
    with NoFloats():
        integer.run(codes)
    result, simulated = leaves(integer(x)), leaves(integer.simulate(x))
    assert len(result) == len(simulated) > 0
    assert all(map(torch.equal, result, simulated))
    return result


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_their_simulation_and_are_near_the_float_model(name, tmp_path):
    model, shape = MODELS[name]
    model = settled(model, shape)
    batches = [torch.randn(6, *shape) * 2 + 0.5 for _ in range(3)]
    activation = [Cast("INT8", scale=Static(), affine=True), Cast("INT8"), Cast("UINT8", affine=True)]
    integer = integer_only(model, batches, activation=activation[len(name) % 3])
    x = torch.cat(batches)
    with torch.no_grad():
        exact = leaves(model(x))
    for mine, float_result in zip(check_equal(integer, x), exact, strict=True):
        assert mine.shape == float_result.shape
        assert sqnr(float_result, mine) > 25
    check_equal(integer, torch.randn(3, *shape) * 50)  # saturates everywhere
    check_equal(integer, torch.zeros(1, *shape))  # another batch size
    save_integer(integer, tmp_path / "model")
    loaded = load_integer(tmp_path / "model")
    assert all(map(torch.equal, leaves(loaded(x)), leaves(integer(x))))
    assert type(loaded(x)) is type(integer(x))
    assert loaded.names == integer.names and loaded.encodings == integer.encodings


@pytest.mark.parametrize("seed", range(5))
def test_random_networks_equal_their_simulation(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, layers = rng.choice([2, 3, 4]), []
    first = channels
    for _ in range(rng.randint(3, 7)):
        groups = channels if rng.random() < 0.4 else 1
        out = channels * rng.choice([1, 2]) if groups > 1 else rng.randint(1, 6)
        conv = nn.Conv2d(
            channels, out, rng.choice([1, 3]), rng.choice([1, 1, 2]), 2, bias=rng.random() < 0.7, groups=groups
        )
        conv.weight.data *= 10 ** rng.uniform(-4, 3)
        conv.weight.data[0] *= rng.choice([0, 1e-8, 1])  # channels that are zero, or next to it, beside a bias
        if rng.random() < 0.2:
            conv.weight.data.zero_()
        after = [
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.ReLU6(),
            nn.SiLU(),
            nn.AvgPool2d(2, 1),
            nn.MaxPool2d(2, 1),
            nn.Identity(),
        ]
        layers += [conv, *rng.sample(after, 2)]
        channels = out
    body = nn.Sequential(*layers)
    model = Model(lambda m, x: m.body(x) + 0.1 * x.mean() if seed % 4 == 0 else m.body(x), body=body).eval()
    shape = (first, 7, 8)
    activation = rng.choice(
        [Cast("INT8", affine=True), Cast("UINT8", affine=True), Cast("INT8"), Cast("INT4", affine=True)]
    )
    weight = rng.choice(
        [Cast("INT8", PerChannel(0)), Cast("INT8"), Cast("INT4", PerChannel(0), Current(power_of_two=True))]
    )
    integer = integer_only(model, [torch.randn(3, *shape)] * 2, activation=activation, weight=weight)
    for size in (0.01, 1, 100):
        check_equal(integer, torch.randn(4, *shape) * size)


def test_accuracy_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y, order = torch.tensor(digits.target), torch.randperm(len(x))
    (x, x_test), (y, y_test) = (t[order].split([1297, 500]) for t in (x, y))
    model, steps = Net(), 240
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (48,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    integer = integer_only(model, x.split(200), observer=Percentile(99.99))

    def accuracy(logits):
        return 100 * float((logits.argmax(1) == y_test).double().mean())

    with torch.no_grad():
        exact = accuracy(model(x_test))
    assert exact > 93
    assert accuracy(check_equal(integer, x_test)[0]) >= exact - 1
    plain = integer.simulate(x_test, fixed_point=False)
    assert accuracy(plain) >= exact - 1
    assert all(d.most <= 20 for d in integer.drift(x_test))


def test_activations_become_limits_and_batch_norms_weights():
    def forward(model, x):
        y = F.relu(F.max_pool2d(model.norm(model.conv(x)), 2))  # the clamp changes places with the pool
        return F.relu6(y + model.other(y).sigmoid() * 0.5)

    model = settled(
        Model(forward, conv=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3), other=nn.Conv2d(3, 3, 1)), (2, 8, 8)
    )
    integer = integer_only(model, [torch.randn(8, 2, 8, 8)])
    kinds = [type(operation).__name__ for operation in integer.operations]
    assert kinds == ["Convolution", "MaxPool", "Convolution", "Lookup", "Add"]
    relu, add = integer.operations[0].output, integer.operations[-1].output
    assert relu.low == relu.zero_point == -128 and relu.high == 127
    assert add.values(torch.tensor(add.high)) <= 6 + add.scale / 2


def test_a_relu_without_a_sum_before_it_keeps_the_scale():
    integer = integer_only(nn.ReLU(), [torch.linspace(-2, 3, 64).reshape(4, 16)])
    (clamp,) = integer.operations
    assert isinstance(clamp, Clamp)
    assert clamp.output.scale == clamp.inputs[0].scale and clamp.output.low == clamp.output.zero_point


def test_a_function_of_one_tensor_is_one_table():
    model = Model(lambda m, x: torch.where(x > 0, x, 0.1 * x) / (1 + x.abs()) - x.clamp(-1, 1) ** 2)
    integer = integer_only(model, [torch.randn(8, 16)])
    assert sum(isinstance(operation, Lookup) for operation in integer.operations) == 1
    hard_swish = integer_only(Model(lambda m, x: x * F.relu6(x + 3) / 6), [torch.randn(8, 16)])
    assert [type(operation) for operation in hard_swish.operations] == [Lookup]
    table = integer_only(Model(lambda m, x: x * torch.sigmoid(1.702 * x)), [torch.randn(8, 16)])
    (lookup,) = table.operations
    assert lookup.table.shape == (256,)
    check_equal(table, torch.randn(4, 16))


def test_sizes_may_vary_where_the_model_allows_it():
    model = settled(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), (1, 9, 9)
    )
    integer = integer_only(model, [torch.randn(1, 1, 9, 12), torch.randn(5, 1, 20, 7)])
    x = torch.randn(3, 1, 15, 31)
    assert sqnr(model(x), check_equal(integer, x)[0]) > 20
    with pytest.raises(OctavoError, match=r"made for \[a, 1, b, c\]"):
        integer(torch.randn(3, 2, 15, 31))


def test_every_way_of_calling_a_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x, scale=None, *, y, double=False):
            z = self.fc(x) - y
            return z * 2 if double else z

    model, x, y = Two().eval(), torch.randn(8, 4), torch.randn(8, 3)
    integer = integer_only(model, [{"x": x, "y": y, "double": True}])
    assert [(i.name, i.shape) for i in integer.inputs] == [("x", ("a", 4)), ("y", ("a", 3))]
    assert sqnr(model(x, y=y, double=True), integer(y=y, x=x)) > 25
    assert torch.equal(integer(x, y), integer.simulate(x, y=y))
    by_call = integer_only(model, [[x, y]], call=lambda m, batch: m(batch[0], y=batch[1]))
    assert sqnr(model(x, y=y), by_call(x, y)) > 25
    labelled = integer_only(nn.Sequential(nn.Linear(4, 2)).double(), [(x.double(), torch.tensor(3))])
    assert labelled(x).shape == (8, 2)
    with pytest.raises(OctavoError, match="batch 1 calls the model with other arguments"):
        integer_only(model, [{"x": x, "y": y}, {"x": x, "y": y, "double": True}])
    with pytest.raises(OctavoError, match="the model was not called"):
        integer_only(model, [x], call=lambda m, batch: None)


def test_the_float_model_stays_as_it_is():
    model = settled(Net(4), (1, 8, 8)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    integer_only(model, [torch.randn(4, 1, 8, 8)])
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks


class Softmax(nn.Module):
    def forward(self, x):
        return F.softmax(x, -1)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 4), Softmax()), r"1 \(softmax\) at test_integer.py:\d+ cannot run on integers"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"1 \(layer_norm\).* cannot run on integers"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            "statistics from each batch|integers",
        ),
        (Branch(), "torch.export cannot follow Branch"),
        (Model(lambda m, x: x / x.sum(1, keepdim=True)), "cannot run on integers"),
        (Model(lambda m, x: x @ x.mT), "its second matrix depends on the input"),
        (Model(lambda m, x: x + torch.rand_like(x)), "random numbers|cannot run on integers"),
        (Model(lambda m, x: x.log()), "batch 0: log at .* are NaN"),
        (Model(lambda m, x: (x, torch.ones(3))), "does not depend on its input"),
        (Model(lambda m, x: x.max(1)), "first result"),
    ],
)
def test_what_cannot_run_on_integers_is_named(model, why):
    with pytest.raises(OctavoError, match=why):
        integer_only(model, [torch.randn(8, 4)])


def test_numbers_without_a_code():
    layer = nn.Linear(4, 3)
    layer.weight.data[1, 2] = float("nan")
    with pytest.raises(OctavoError, match=r"batch 0: linear.* are NaN"):
        integer_only(layer, [torch.randn(8, 4)])
    root = Model(lambda m, x: x.sqrt())
    with pytest.raises(OctavoError, match="its result is NaN for -"):
        integer_only(root, [torch.rand(8, 4)], activation=Cast("INT8"))
    check_equal(integer_only(root, [torch.rand(8, 4)]), torch.rand(8, 4))
    check_equal(integer_only(Model(lambda m, x: (x + 0.01).log()), [torch.rand(8, 4)]), torch.rand(8, 4))


@pytest.mark.parametrize(
    ("batches", "why"),
    [
        ([], "held no batch"),
        (torch.randn(8, 4), "not one Tensor"),
        ([torch.zeros(0, 4)], "has seen no numbers|no numbers"),
        ([torch.randn(8, 4), torch.full((8, 4), float("nan"))], "calibration batch 1: .*NaN"),
        ([torch.randn(8, 4), torch.randn(8, 5)], "calibration batch 1 does not fit"),
        ([torch.ones(8, 4).long()], "takes float tensors"),
        ([{"x": torch.randn(8, 4)}], "does not take"),
    ],
)
def test_bad_data(batches, why):
    with pytest.raises(OctavoError, match=why):
        integer_only(nn.Linear(4, 3), batches)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": Cast("E4M3FN")},
        {"activation": Cast("INT16", affine=True)},
        {"activation": Cast("INT8", PerToken())},
        {"activation": Cast("UINT8")},
        {"activation": Cast("INT8", rounding="stochastic")},
        {"weight": Cast("INT8", PerChannel(0), affine=True)},
        {"weight": Cast("UINT8", PerChannel(0))},
        {"weight": Cast("INT8", PerChannel(1))},
    ],
)
def test_casts_that_integers_cannot_have(settings):
    with pytest.raises(OctavoError):
        integer_only(nn.Linear(4, 3), [torch.randn(8, 4)], **settings)


def test_sums_beyond_int32_name_the_layer():
    model = nn.Sequential(nn.Linear(70000, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    with pytest.raises(OctavoError, match=r"0 \(linear\).*output channel 0 may reach"):
        integer_only(model, [torch.ones(2, 70000)])


@pytest.mark.parametrize("bias", [0.0, 3.0, 1e6])
def test_channels_of_zeros_keep_their_bias(bias):
    model = nn.Linear(4, 2)
    model.weight.data[1] = 0
    model.bias.data[1] = bias
    integer = integer_only(model, [torch.randn(64, 4)])
    x = torch.randn(5, 4)
    result = check_equal(integer, x)[0]
    assert (result[:, 1] - bias).abs().max() <= integer.operations[0].output.scale


def test_a_model_of_zeros():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    for layer in (model[0], model[2]):
        layer.weight.data.zero_()
    integer = integer_only(model, [torch.zeros(3, 4)])
    assert torch.equal(check_equal(integer, torch.randn(3, 4))[0], torch.zeros(3, 2))


def test_damaged_folders(tmp_path):
    integer = integer_only(nn.Sequential(nn.Linear(4, 3), nn.SiLU()), [torch.randn(8, 4)])
    save_integer(integer, tmp_path / "model")
    with pytest.raises(OctavoError, match="not empty"):
        save_integer(integer, tmp_path / "model")
    save_integer(integer, tmp_path / "model", force=True)
    with pytest.raises(OctavoError, match="no such folder"):
        load_integer(tmp_path / "modle")
    manifest = tmp_path / "model" / "octavo.json"
    whole = manifest.read_text()

    def change(act):
        content = json.loads(whole)
        act(content)
        manifest.write_text(json.dumps(content))
        with pytest.raises(OctavoError):
            load_integer(tmp_path / "model")(torch.randn(2, 4))

    change(lambda c: c.update(layout="octavo"))
    change(lambda c: c.update(version=2))
    change(lambda c: c.update(result=9))
    change(lambda c: c["operations"][0].update(op="Exec"))
    change(lambda c: c["operations"][0].update(takes=[1]))
    change(lambda c: c["operations"][1]["inputs"][0].update(zero_point=5))
    change(lambda c: c["operations"][1]["output"].update(scale="big"))
    change(lambda c: c["operations"].pop())
    change(lambda c: c["inputs"][0].update(shape=None))
    change(lambda c: c["inputs"][0]["encoding"].update(scale=0))
    change(lambda c: c["inputs"][0]["encoding"].update(scale=1e-45))
    manifest.write_text(whole)
    file = tmp_path / "model" / "octavo.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OctavoError):
        load_integer(tmp_path / "model")


def test_models_in_8_bits_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    quantize_(model, {"0": "int8-dynamic"})
    with pytest.raises(OctavoError, match="0 is in 8 bits already"):
        integer_only(model, [torch.randn(2, 4)])


def test_batches_that_do_not_fit_the_forward_are_refused():
    with pytest.raises(OctavoError, match=r"does not fit Bilinear.forward: .*'input2'"):
        integer_only(nn.Bilinear(4, 4, 2), [{"input1": torch.randn(2, 4)}])
