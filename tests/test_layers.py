"""Layers against torch's own, in one process and one piece; several processes are in test_train.py, long LSTMs in test_model.py."""

import numpy as np
import pytest
import torch
from torch import nn

import layers
from layers import BatchNorm, Conv2d, Dropout, PoolRectifyDrop, in_context


@pytest.mark.parametrize("kernel, padding, dilation", [
    ((3, 3), (1, 1), (1, 1)), ((1, 5), (0, 24), (1, 12)), ((1, 49), (0, 24), (1, 1)), ((1, 1), (0, 0), (1, 1)), ((3, 2), (0, 3), (2, 1))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("alone, threads", [(False, 2), (True, 1), (True, 2), (True, 3)])
@pytest.mark.parametrize("inputs", [1, 5])
def test_a_convolution_gives_bfloat16_and_learns_in_float32(kernel, padding, dilation, layout, alone, threads, inputs, monkeypatch):
    """On CPUs with AVX2 alone and on newer ones: torch's results, of which only those that are features are rounded."""
    torch.manual_seed(0)
    monkeypatch.setattr(layers, "CHUNK_PLACES", 100)  # so that a sample is several chunks, and no whole number of them
    monkeypatch.setattr(layers, "keeps_bfloat16", lambda device: True)
    monkeypatch.setattr(layers, "has_avx2_alone", lambda: alone)
    theirs = nn.Conv2d(inputs, 7, kernel, padding=padding, dilation=dilation)
    ours = Conv2d(inputs, 7, kernel, padding=padding, dilation=dilation)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, inputs, 13, 60).bfloat16().to(memory_format=layout)  # one sample more than are multiplied at a time
    seed = torch.Generator().manual_seed(1)
    before, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads)
        for layer, dtype in ((theirs, torch.float32), (ours, torch.bfloat16)):
            heard = x.detach().to(dtype).requires_grad_()
            y = layer(heard)
            assert y.dtype == dtype
            y.backward(torch.randn(y.shape, generator=seed.manual_seed(1)).bfloat16().to(dtype))
            assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
            found.append((y.float(), heard.grad.float(), layer.bias.grad, layer.weight.grad))
    finally:
        torch.set_num_threads(before)
    for expected, given in list(zip(*found))[:3]:
        torch.testing.assert_close(given, expected, rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(found[1][3], found[0][3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kept, learns, autocast, dtype", [(False, True, False, torch.float32), (True, False, False, torch.float32),
                                                         (True, True, True, torch.float32), (True, True, False, torch.float64)])
def test_a_convolution_is_torchs_own_elsewhere(kept, learns, autocast, dtype, monkeypatch):
    monkeypatch.setattr(layers, "keeps_bfloat16", lambda device: kept)
    layer, x = Conv2d(5, 2, 3, dtype=dtype).train(learns), torch.randn(2, 5, 4, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), nn.Conv2d.forward(layer, x)) and layer(x).dtype == (torch.bfloat16 if autocast else dtype)


@pytest.mark.parametrize("options, dtype", [({"bias": False}, torch.bfloat16), ({"padding": 2}, torch.bfloat16), ({"stride": 2}, torch.float32), ({"groups": 2}, torch.float32),
                                            ({"padding": "same"}, torch.float32), ({"padding": 1, "padding_mode": "circular"}, torch.float32)], ids=repr)
@pytest.mark.parametrize("alone", [False, True])
def test_a_convolution_takes_what_torchs_takes(options, dtype, alone, monkeypatch):
    monkeypatch.setattr(layers, "keeps_bfloat16", lambda device: True)
    monkeypatch.setattr(layers, "has_avx2_alone", lambda: alone)
    layer, x = Conv2d(4, 6, 3, **options), torch.randn(3, 4, 9, 8)
    y, expected = layer(x), nn.Conv2d.forward(layer, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-2)
    (y.float() * expected.detach()).sum().backward()
    given = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    expected.square().sum().div(2).backward()
    for ours, parameter in zip(given, layer.parameters(), strict=True):
        assert (ours - parameter.grad).norm() < 0.01 * parameter.grad.norm()


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(4000, 1000)
    layer = Dropout(p)
    y = layer(x)
    # 4,000,000 draws: the standard deviation of the share is below 0.0003
    assert abs((y == 0).float().mean().item() - layer.p) < 0.001 and abs(layer.p - p) <= 1 / 512
    np.testing.assert_allclose(y.unique(), [0, 1 / (1 - layer.p)], rtol=1e-6)
    assert abs(y.mean().item() - 1) < (0.001 if p < 0.5 else 0.002)


def test_dropout_is_the_identity_in_eval_mode_and_at_zero():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_dropout_takes_any_layout(layout):
    x = torch.rand(4, 6, 50, 10) + 3  # no zeros of its own
    x = {"contiguous": lambda: x, "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
         "transposed": lambda: x.transpose(1, 2), "sliced": lambda: x[:, ::2, 1:]}[layout]()
    torch.manual_seed(0)
    y = Dropout(0.25)(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert 0.2 < 1 - kept.float().mean().item() < 0.3
    # no pattern: every channel and every place loses about its share
    assert (kept.float().mean(dim=(0, 2, 3)) < 0.9).all()


def test_dropout_draws_anew_and_passes_gradients_of_what_it_kept():
    x = torch.ones(1000, requires_grad=True)
    layer = Dropout(0.5)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    assert not torch.equal(layer(x) == 0, y == 0)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 3, 5, 9), (1, 1, 1, 2), (1, 4, 3, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_with_its_rectifier_is_torchs_own(shape, layout):
    ours = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    layer = PoolRectifyDrop(0.0)
    y, expected = layer(ours), nn.functional.max_pool2d(theirs.relu(), (1, 2))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(y, expected) and torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.eval()(ours.detach()), expected)


def test_pooling_drops_and_scales_like_dropout():
    x = torch.rand(4, 8, 50, 40, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(0)
    y = PoolRectifyDrop(0.25)(x)
    y.sum().backward()
    kept = y > 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.allclose(y[kept], nn.functional.max_pool2d(x, (1, 2))[kept] / 0.75)
    assert torch.equal(x.grad.unflatten(3, (-1, 2)).sum(4) > 0, kept)
    assert set(x.grad.unique().tolist()) == {0.0, y.new_tensor(1 / 0.75).item()}


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 5, 7, 2)])
def test_batch_norm_is_torchs_own_in_one_process(shape):
    ours, theirs = BatchNorm(5), (nn.BatchNorm1d if len(shape) == 3 else nn.BatchNorm2d)(5)
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.weight.copy_(torch.arange(1.0, 6))
            layer.bias.copy_(torch.arange(5.0))
    for _ in range(3):
        x = 0.5 * torch.randn(shape) + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("layer", [nn.GRU(5, 4, 2, batch_first=True, bidirectional=True), nn.RNN(5, 4, batch_first=True), nn.LSTM(5, 4, batch_first=True),
                                   nn.LSTM(5, 4, bias=False, batch_first=True, bidirectional=True),
                                   nn.LSTM(5, 4, proj_size=3, batch_first=True, bidirectional=True),
                                   nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)], ids=repr)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_any_recurrent_layer_infers_what_is_long(layer, monkeypatch):
    monkeypatch.setattr(layers, "LONG_FRAMES", 8)
    features = torch.randn(2, 20, 5)
    output = nn.Linear(layer(features)[0].shape[2], 3)
    with torch.inference_mode():
        torch.testing.assert_close(in_context(features, layer, output), output(layer(features)[0]))
