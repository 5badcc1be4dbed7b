"""8-bit layers under torch.compile and torch.export: one graph, the same bits, any batch."""

import io
import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim

import octavo as ov
from tests.nn import models

SCHEMES = ["int8-dynamic", "fp8-dynamic", "int8-static", "int8-weight-only", "fp8-block", "int8-group64"]


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LAYERS = {
    "linear": (lambda: nn.Linear(20, 33), image(4, 20)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1), image(4, 4, 9, 9)),
    "groups": (lambda: nn.Conv1d(4, 8, 3, padding="same", groups=2), image(4, 4, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), image(4, 4, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2), image(4, 4, 9, 9)),
}
TABLES = {
    "embedding": (lambda: nn.Embedding(30, 16), torch.arange(20).view(4, 5)),
    "bags": (lambda: nn.EmbeddingBag(30, 16, padding_idx=3), torch.arange(20).view(4, 5)),
}


def quantized(make, x, scheme):
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    ov.quantize_(model, [ov.Rule(scheme, type=type(model[0]).__name__)], [x] if scheme == "int8-static" else None)
    return model


def compiled(model, **how):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager", **how)


class Together(nn.Module):
    """Several layers, each with an input of its own: compiled once."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs):
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def together(of, scheme):
    """All of these layers in 8 bits, in one model, and their inputs."""
    torch.manual_seed(0)
    model, inputs = Together([make() for make, _ in of.values()]).eval(), tuple(x for _, x in of.values())
    rules = [ov.Rule(scheme, type=kind) for kind in {type(layer).__name__ for layer in model.layers}]
    seen = ov.calibrate(model, rules, [inputs], call=lambda model, batch: model(*batch)) if "static" in scheme else None
    summary = ov.quantize_(model, rules, seen)
    assert len(summary.quantized) == len(of)
    return model, inputs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_graph_with_the_same_bits(scheme):
    model, inputs = together(LAYERS, scheme)
    with torch.no_grad():
        for name, found, expected in zip(LAYERS, compiled(model)(*inputs), model(*inputs), strict=True):
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("scheme", ["int8-weight-only", "fp8-weight-only"])
def test_tables(scheme):
    model, inputs = together(TABLES, scheme)
    with torch.no_grad():
        for name, found, expected in zip(TABLES, compiled(model)(*inputs), model(*inputs), strict=True):
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("strict", [False, True])
def test_exported_saved_and_loaded(strict):
    model, inputs = together(LAYERS, "int8-dynamic")
    shapes = {"inputs": tuple({0: Dim("batch", min=2, max=64)} for _ in inputs)}
    program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    with torch.no_grad():
        for batch in (inputs, tuple(torch.cat([x, x * 3, -x]) for x in inputs)):
            for name, found, expected in zip(LAYERS, again(*batch), model(*batch), strict=True):
                assert torch.equal(found, expected), name


def test_one_graph_serves_all_batches():
    make, x = LAYERS["linear"]
    model = quantized(make, x, "int8-dynamic")
    run = compiled(model, dynamic=True)
    with torch.no_grad():
        run(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for rows in (2, 7, 40):
                assert torch.equal(run(image(rows, 20)), model(image(rows, 20)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-weight-only"])
def test_sixteen_bits_inference_mode_autocast_and_one_thread(dtype, scheme):
    make, x = LAYERS["linear"]
    threads = torch.get_num_threads()
    model, x = quantized(make, x, scheme).to(dtype), x.to(dtype)
    run = compiled(model)
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            assert torch.equal(run(x), model(x))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(x), model(x))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-weight-only"])
@pytest.mark.parametrize("family", [models.llama, models.gpt2, models.bert])
def test_whole_models(family, scheme):
    torch.manual_seed(0)
    model = family()
    ov.quantize_(model, scheme)
    ids = torch.randint(3, models.VOCABULARY, (2, 9))
    with torch.no_grad():
        found = compiled(model)(ids, use_cache=False) if family is not models.bert else compiled(model)(ids)
        expected = model(ids, use_cache=False) if family is not models.bert else model(ids)
    assert torch.equal(found.logits, expected.logits)


def test_decoding_with_a_static_cache():
    """As transformers does it: the cache's room is made beforehand, and every step is the same graph."""
    torch.manual_seed(0)
    model = models.llama()
    ov.quantize_(model, "int8-dynamic")
    ids = torch.randint(3, models.VOCABULARY, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(ids, **settings)
    forward = model.forward
    model.forward = compiled(forward)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    make, x = LAYERS["linear"]
    model = nn.Sequential(quantized(make, x, "int8-dynamic"), nn.ReLU())
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))
