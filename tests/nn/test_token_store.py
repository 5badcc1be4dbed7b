"""Tokens that come a few at a time, against numpy, ml_dtypes, and quantizing them all at once."""

import ml_dtypes
import numpy as np
import pytest
import torch

from octavo.core import formats
from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked
from octavo.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.scaling import Constant, Current, Static
from octavo.errors import OctavoError
from octavo.nn.token_store import STEP, Growing, TokenStore

SHAPE = (2, 3, 40, 16)
DYNAMIC = [
    Cast("int8", PerToken()),
    Cast("int8", PerToken(), affine=True),
    Cast("uint8", PerToken(), affine=True),
    Cast("int8", PerGroup(5)),
    Cast("e4m3fn", PerToken()),
    Cast("e5m2", PerGroup(8)),
    Cast("e3m4", PerBlock(1, 4)),
    Cast("e4m3fnuz", PerToken(), Current(power_of_two=True)),
    Cast(formats.float_format(4, 3, 7.5), PerToken()),
    Cast("int4", PerToken()),
    Cast("int8", PerTensor(), Constant(0.05)),
    Cast("e4m3fn", PerToken(), Constant(1.0)),
    Cast("uint8", PerTensor(), Constant(0.05), affine=True),
]


def tokens(dtype=torch.float32, shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(how, x, sizes=(7, 1, 1, 20), **scales):
    store = TokenStore("the keys of layer 0", how, **scales)
    for part in x.split([*sizes, x.shape[2] - sum(sizes)], 2):
        store.append(part)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", DYNAMIC, ids=repr)
def test_equals_quantizing_all_at_once(how, dtype):
    x = tokens(dtype)
    expected = quantize_unchecked(x, how, x.dtype).dequantize(dtype)
    store = filled(how, x)
    assert store.read().dtype == dtype
    assert torch.equal(store.read(), expected)
    assert torch.equal(store.read(last=5), expected[:, :, -5:])


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerChannel(3), PerChannel(-3)], ids=repr)
@pytest.mark.parametrize("fmt", ["int8", "e4m3fn"])
def test_static_scales(fmt, granularity):
    how = Cast(fmt, granularity, Static())
    x = tokens(torch.bfloat16)
    counts = {PerTensor(): (1, 1, 1, 1), PerChannel(3): (1, 1, 1, 16)}.get(granularity, (1, 3, 1, 1))
    for scale in (torch.rand(counts) / 50 + 0.01, (torch.rand(counts) / 50 + 0.01).bfloat16().float().squeeze()):
        expected = quantize_scaled(x, how, scale).dequantize()
        assert torch.equal(filled(how, x, scale=scale).read(), expected)


def test_affine_static_scales():
    how = Cast("uint8", PerChannel(1), Static(), affine=True)
    scale, zero_point = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([100, 128, 140], dtype=torch.int32)
    expected = quantize_scaled(tokens(), how, scale, zero_point).dequantize()
    assert torch.equal(filled(how, tokens(), scale=scale, zero_point=zero_point).read(), expected)


def test_int8_per_token_is_what_numpy_says():
    x = tokens()
    a = x.numpy()
    scale = np.abs(a).max(-1, keepdims=True) / np.float32(127)
    expected = np.clip(np.rint(a / scale), -127, 127).astype(np.float32) * scale
    assert np.array_equal(filled(Cast("int8", PerToken()), x).read().numpy(), expected)


def test_fp8_per_token_is_what_ml_dtypes_says():
    x = tokens(torch.bfloat16)
    a = x.float().numpy()
    scale = (np.abs(a).max(-1, keepdims=True) / np.float32(448)).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(a / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = (codes * scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(filled(Cast("e4m3fn", PerToken()), x).read().float().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", DYNAMIC[:5], ids=repr)
def test_the_largest_numbers_stay_finite(how, dtype):
    x = tokens(dtype)
    x[0, 0, 30] = torch.finfo(dtype).max
    x[1, 2, 3] = torch.finfo(dtype).tiny
    expected = quantize_unchecked(x, how, x.dtype).dequantize(dtype)
    read = filled(how, x).read()
    assert torch.equal(read, expected)
    assert read.isfinite().all()


def test_none_keeps_tokens_as_they_are():
    x = tokens(torch.bfloat16)
    assert torch.equal(filled(None, x).read(), x)


def test_memory():
    x = tokens(torch.bfloat16, (1, 2, 4096, 64))
    for how, bytes_a_token in [(Cast("int8", PerToken()), 66), (Cast("uint8", PerToken(), affine=True), 67)]:
        store = TokenStore("keys", how)
        store.append(x)
        assert store.nbytes == 2 * 4096 * bytes_a_token
        store.append(x[:, :, :1])
        assert store.nbytes == 2 * (4096 + 1 + STEP) * bytes_a_token
    store = TokenStore("keys", Cast("e4m3fn", PerChannel(1), Static()), torch.ones(2))
    store.append(x)
    assert store.nbytes == x.nbytes // 2 + 2 * 4


def test_growing_does_not_copy_for_every_token():
    growing = Growing(torch.empty(1, 1, 0, 4))
    rooms = set()
    for i in range(1000):
        growing.append(torch.full((1, 1, 1, 4), float(i)))
        rooms.add(growing.room.shape[2])
    assert len(rooms) <= 1000 // STEP + 1
    assert torch.equal(growing.live[0, 0, :, 0], torch.arange(1000.0))
    growing.keep_last(10)
    assert growing.room.shape[2] == 10
    assert torch.equal(growing.live[0, 0, :, 0], torch.arange(990.0, 1000.0))


def test_a_window_moves_in_bounded_room():
    growing = Growing(torch.empty(1, 1, 0, 1))
    for i in range(1000):
        growing.append(torch.full((1, 1, 1, 1), float(i)))
        growing.keep_last(100)
        assert growing.room.shape[2] <= 100 + 2 * STEP
        assert torch.equal(growing.live.flatten(), torch.arange(max(0.0, i - 99), i + 1.0))


def test_select_and_drop():
    how = Cast("int8", PerToken(), affine=True)
    x = tokens()
    expected = quantize_unchecked(x, how).dequantize()
    store = filled(how, x)
    store.drop_last(4)
    store.select(torch.tensor([1, 0, 1]))
    assert torch.equal(store.read(), expected[[1, 0, 1], :, :-4])
    store.append(x[[0, 0, 1], :, :2])
    assert torch.equal(store.read(last=2), expected[[0, 0, 1], :, :2])
    store.select(torch.tensor([True, False, True]))
    assert len(store) == 38 and store.batch == 2
    store.drop_last(100)
    assert len(store) == 0
    store.append(x[:, :, :0])
    assert len(store) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("how", "scale"), [(DYNAMIC[0], None), (DYNAMIC[-1], None), (Cast("int8", scale=Static()), torch.ones(1))]
)
def test_what_is_not_finite_is_an_error_with_a_name(how, scale, value):
    x = tokens()
    x[1, 1, 1, 1] = value
    with pytest.raises(OctavoError, match="the keys of layer 3: 1 of 3840 new numbers"):
        TokenStore("the keys of layer 3", how, scale).append(x)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Cast("int16", PerToken()), "at most 8 bits"),
        (Cast("bf16", PerToken()), "at most 8 bits"),
        (Cast("uint8", PerToken()), "drops negative numbers"),
        (Cast("int8"), "shares a scale between tokens"),
        (Cast("int8", PerChannel(1)), "shares a scale between tokens"),
        (Cast("int8", PerChannel(2)), "shares a scale between tokens"),
        (Cast("int8", PerBlock(2, 4)), "shares a scale between tokens"),
        (Cast("int8", PerToken(), Static()), "serves all tokens"),
        (Cast("int8", PerChannel(0), Static()), "serves all tokens"),
        (Cast("int8", PerChannel(7)), "does not fit"),
        (Cast("int8", scale=Static()), "needs a scale"),
    ],
    ids=repr,
)
def test_casts_that_cannot_hold_tokens(how, words):
    with pytest.raises(OctavoError, match=words):
        TokenStore("keys", how)


def test_tokens_that_do_not_fit():
    store = filled(Cast("int8", PerToken()), tokens())
    for other in (tokens()[:1], tokens()[..., :8], tokens(torch.bfloat16), tokens()[0], tokens().int()):
        with pytest.raises(OctavoError, match="the keys of layer 0"):
            store.append(other)
    with pytest.raises(OctavoError, match=r"the keys of layer 0: .*has scales"):
        TokenStore("the keys of layer 0", Cast("int8", PerChannel(1), Static()), torch.ones(7)).append(tokens())
    with pytest.raises(OctavoError, match="only a static Cast"):
        TokenStore("keys", Cast("int8", PerToken()), torch.ones(1))
