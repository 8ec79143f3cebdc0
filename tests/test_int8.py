"""The convolution stack in 8-bit integers beside the one in floats."""

import pytest
import torch
from torch import nn

from int8 import Int8ConvStack, in_steps
from layers import BatchNorm
from model import ConvStack, autocast, build_model

needs_bytes = pytest.mark.skipif(not autocast(torch.device("cpu"))._enabled, reason="such a CPU infers in float32")
BANDS = 23  # odd, and so are its halves


@pytest.fixture
def stack() -> ConvStack:
    """One whose batch norm has heard what it is asked about, as after training."""
    torch.manual_seed(0)
    made = ConvStack(BANDS, 8, 32)
    for layer in made.modules():
        if isinstance(layer, BatchNorm):
            nn.init.uniform_(layer.weight, 0.2, 2)
            nn.init.normal_(layer.bias)
    for _ in range(50):
        made(torch.randn(4, 40, BANDS))
    return made.eval()


def relative_error(stack: ConvStack, mel: torch.Tensor) -> float:
    with torch.inference_mode():
        exact, rough = stack(mel), Int8ConvStack(stack)(mel)
    assert rough.shape == exact.shape and rough.dtype == torch.bfloat16
    return float((rough - exact).norm() / exact.norm())


@needs_bytes
@pytest.mark.parametrize("n_frames", [1, 2, 50])
def test_it_computes_what_the_float_stack_computes(stack, n_frames):
    assert relative_error(stack, torch.randn(2, n_frames, BANDS)) < 0.05


@needs_bytes
def test_features_far_from_the_mean_are_told_too(stack):
    assert relative_error(stack, 5 * torch.randn(2, 50, BANDS)) < 0.05


@needs_bytes
def test_the_float_stack_stays_as_it_was(stack):
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    Int8ConvStack(stack)
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
def test_transcribers_infer_with_it_where_bfloat16_is_fast(monkeypatch):
    used = []
    monkeypatch.setattr("model.Int8ConvStack", lambda stack: used.append(stack) or Int8ConvStack(stack))
    model = build_model("onf").eval()
    model.infer(torch.zeros(5120))
    assert len(used) == 2 and type(model.frame_conv_stack) is ConvStack
