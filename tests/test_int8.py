"""The convolution stacks in 8-bit integers beside those in floats."""

import copy
import functools

import pytest
import torch
from torch import nn

from devices import multiplies_bytes
from int8 import Int8ConvStack, Int8HarmonicStack, in_bytes, in_steps
from layers import BatchNorm
from model import IN_BYTES, ConvStack, HarmonicStack, build_model

needs_bytes = pytest.mark.skipif(not multiplies_bytes(torch.device("cpu")), reason="such a CPU infers in floats")
BANDS = 23  # odd, and so are its halves


@functools.cache
def trained(kind: type[nn.Module], sizes: tuple[int, ...], heard: tuple[int, ...]) -> nn.Module:
    """A stack whose batch norm has heard what it is asked about, as after training."""
    torch.manual_seed(0)
    made = kind(*sizes)
    for layer in made.modules():
        if isinstance(layer, BatchNorm):
            nn.init.uniform_(layer.weight, 0.2, 2)
            nn.init.normal_(layer.bias)
    for _ in range(50):
        made(torch.randn(heard))
    return made.eval()


@pytest.fixture
def stack() -> ConvStack:
    torch.manual_seed(1)
    return copy.deepcopy(trained(ConvStack, (BANDS, 8, 32), (4, 40, BANDS)))


@pytest.fixture
def harmonic_stack() -> HarmonicStack:
    torch.manual_seed(1)
    return copy.deepcopy(trained(HarmonicStack, (12, 32), (4, 12, 10, 88)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bytes_are_rectified_rounded_and_capped(dtype, layout):
    told = torch.tensor([-1e9, -3, -0.4, 0, 0.4, 0.6, 1.2, 100, 254, 255, 256, 1e9], dtype=dtype).view(1, 2, 2, 3).to(memory_format=layout)
    found = in_bytes(told)
    assert found.flatten().tolist() == [0, 0, 0, 0, 0, 1, 1, 100, 254, 255, 255, 255]
    assert found.dtype == torch.uint8 and found.stride() == told.stride()
    told.fill_(7)  # nor do the bytes lie in what they came from
    assert found.flatten()[0] == 0


def relative_error(stack: ConvStack, mel: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> float:
    with torch.inference_mode():
        exact, rough = stack(mel), Int8ConvStack(stack, dtype)(mel)
    assert rough.shape == exact.shape and rough.dtype == dtype
    return float((rough - exact).norm() / exact.norm())


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_frames", [1, 2, 50])
def test_it_computes_what_the_float_stack_computes(stack, n_frames, dtype):
    assert relative_error(stack, torch.randn(2, n_frames, BANDS), dtype) < 0.05


@needs_bytes
def test_features_far_from_the_mean_are_told_too(stack):
    assert relative_error(stack, 5 * torch.randn(2, 50, BANDS)) < 0.05


@needs_bytes
def test_the_float_stack_stays_as_it_was(stack):
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    Int8ConvStack(stack, torch.float32)
    assert all(torch.equal(before[name], value) for name, value in stack.state_dict().items())


@needs_bytes
def test_channels_that_batch_norm_or_a_penalty_silenced(stack):
    """One never rises above zero, one has no weights at all, before and after batch norm."""
    for number in (1, 4, 9):
        stack.cnn[number].bias.data[0] = -1e3
        stack.cnn[number].weight.data[1], stack.cnn[number].bias.data[1] = 0, 0
        stack.cnn[number - 1].weight.data[2] = 0
    assert relative_error(stack, torch.randn(2, 50, BANDS)) < 0.05


def test_weights_in_steps():
    weight = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [2e-3, 1e-3, -2e-3]])
    whole, step = in_steps(weight)
    assert whole.tolist() == [[127, -64, 0], [0, 0, 0], [127, 64, -127]] and whole.dtype == torch.int8
    assert ((whole * step[:, None] - weight).abs() <= 0.51 * step[:, None]).all()


@needs_bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_frames", [1, 2, 50])
@pytest.mark.parametrize("silenced", [False, True])
@pytest.mark.parametrize("level", [1, 3])
def test_the_harmonic_stack_computes_what_the_float_stack_computes(harmonic_stack, n_frames, silenced, level, dtype):
    if silenced:
        for layer in harmonic_stack.modules():
            if isinstance(layer, BatchNorm):
                layer.bias.data[0] = -1e3
                layer.weight.data[1], layer.bias.data[1] = 0, 0
    x = level * torch.randn(2, 12, n_frames, 88)
    with torch.inference_mode():
        exact, rough = harmonic_stack(x), Int8HarmonicStack(harmonic_stack, dtype)(x)
    assert rough.shape == exact.shape and rough.dtype == dtype
    assert float((rough - exact).norm() / exact.norm()) < 0.05


@needs_bytes
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name, stacks", [("onf", 2), ("harmonic", 1)])
def test_transcribers_infer_with_it(monkeypatch, name, stacks, bfloat16):
    used = []
    monkeypatch.setattr("model.autocast", lambda device: torch.autocast("cpu", torch.bfloat16, enabled=bfloat16))
    monkeypatch.setattr("model.IN_BYTES", {kind: lambda *args, made=made: used.append(args) or made(*args) for kind, made in IN_BYTES.items()})
    model = build_model(name).eval()
    model.infer(torch.zeros(5120))
    assert [dtype for _, dtype in used] == [torch.bfloat16 if bfloat16 else torch.float32] * stacks
    assert not any(isinstance(part, (Int8ConvStack, Int8HarmonicStack)) for part in model.modules())
