"""Where the numbers of a model's tensors lie: against what torch and transformers do with real numbers."""

import pytest
import torch
import transformers

from octavo import OctavoError
from octavo.io import lineage
from tests.nn import models

OPERATIONS = {
    "stack": lambda a, b, c: torch.stack([a, b]),
    "stack inside": lambda a, b, c: torch.stack([a, b], 1),
    "stack last": lambda a, b, c: torch.stack([a, b], -1),
    "cat": lambda a, b, c: torch.cat([a, c]),
    "cat inside": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "cat twice": lambda a, b, c: torch.cat([torch.cat([a, c]), a]),
    "a chunk": lambda a, b, c: torch.chunk(c, 3)[1],
    "a row": lambda a, b, c: c[2],
    "reshaped": lambda a, b, c: c.reshape(4, 3, 2).clone(),
    "chunks of a cat": lambda a, b, c: torch.chunk(torch.cat([a, b, c]), 3)[2],
    "nothing": lambda a, b, c: torch.cat([a, b])[:0],
}
COMPUTED = {
    "turned": lambda a, b, c: a.T,
    "turned and laid out": lambda a, b, c: a.T.contiguous(),
    "columns": lambda a, b, c: torch.chunk(a, 2, dim=1)[1],
    "joined of something computed": lambda a, b, c: torch.cat([a, b + 1]),
    "added": lambda a, b, c: a + b,
}
SHAPES = {"a": (2, 4), "b": (2, 4), "c": (6, 4)}


def watched(operation):
    sources = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    with lineage._Watch(sources) as watch:
        result = operation(*sources.values())
        return watch.pieces_of(result)


@pytest.mark.parametrize("name", OPERATIONS)
def test_pieces_are_what_torch_does(name):
    real = {source: torch.randn(shape) for source, shape in SHAPES.items()}
    pieces = watched(OPERATIONS[name])
    found = [real[source].flatten()[first : first + count] for source, first, count in pieces]
    expected = OPERATIONS[name](*real.values())
    assert torch.equal(torch.cat([torch.empty(0), *found]), expected.flatten())


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_has_no_pieces(name):
    assert watched(COMPUTED[name]) is None


@pytest.mark.parametrize("family", models.FAMILIES)
def test_models_of_transformers(family, tmp_path):
    model = models.FAMILIES[family]().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    traced = lineage.trace(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    assert [(n, t.dtype, t.shape) for n, t in traced.model.state_dict().items()] == [
        (n, t.dtype, t.shape) for n, t in opened.state_dict().items()
    ]
    for name, tensor in opened.state_dict().items():
        stored = traced.of(name)
        data = b"".join(run.file.read_bytes()[run.offset : run.offset + run.nbytes] for run in stored.runs)
        assert torch.equal(torch.frombuffer(bytearray(data), dtype=stored.dtype).view(tensor.shape), tensor)
    if family == "mixtral":  # experts are stacked, gate above up
        assert max(len(stored.runs) for stored in traced.stored.values()) > 1


def test_generation_config(tmp_path):
    model = models.llama()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    model.save_pretrained(tmp_path)
    assert lineage.trace(tmp_path).model.generation_config.temperature == 0.3
    (tmp_path / "generation_config.json").unlink()
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path).generation_config
    assert lineage.trace(tmp_path).model.generation_config.to_dict() == expected.to_dict()


def test_a_tensor_without_a_place_is_named(tmp_path):
    models.llama().save_pretrained(tmp_path)
    with pytest.raises(OctavoError, match=r"some\.weight is no tensor of the files.*opened whole"):
        lineage.trace(tmp_path).of("some.weight")
