"""The convolution stacks in 8-bit integers: for inference on CPUs. The convolutions take little more than half of
bfloat16's time, where there is no bfloat16 all of inference takes half to four fifths of float32's, and the scores stay.

Weights are whole multiples of a step, one for each output channel, and so are features, one for each of theirs; products and
sums are those of whole numbers (Jacob et al., CVPR 2018). How large features get is not measured on music but known from batch norm,
which gives each channel's mean and standard deviation (Nagel et al., ICCV 2019).

Shapes: B batch, T frames, M mel bands, C channels, K keys.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from layers import pairs

RANGE = 24.0   # standard deviations above its mean at which a feature saturates: those of onsets are rare and far from the rest
LARGEST = 255  # of an unsigned byte
HALF = 127     # of features that are added, whose sum is a byte too; so these are told half as far
SMALLEST_STEP = 1e-5  # of a channel that batch norm keeps below zero


def steps_of(*norms: nn.Module) -> Tensor:
    """(C,) steps in which bytes tell the rectified features that batch norms give; where they are added, of the larger ones."""
    return torch.stack([norm.bias + RANGE * norm.weight.abs() for norm in norms]).amax(dim=0).div(LARGEST).detach().clamp(min=SMALLEST_STEP)


def told_in(step: Tensor, conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """A convolution with its batch norm whose features come out in steps."""
    conv = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
    conv.weight /= step[:, None, None, None]
    conv.bias /= step
    return conv


class Int8Conv:
    """A convolution of unsigned bytes, whose steps are `read`, to rectified ones: (B, C, T, K) -> (B, C', T, K)."""

    def __init__(self, conv: nn.Conv2d, read: Tensor) -> None:
        weight, self.scale = in_steps(conv.weight * read[:, None, None])
        self.how = [1, 1], list(conv.padding), list(conv.dilation), 1
        self.packed = torch.ops.onednn.qconv_prepack(weight, self.scale, 1.0, 0, *self.how, None)
        self.bias = conv.bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(x, 1.0, 0, self.packed, self.scale, None, self.bias, *self.how, 1.0, 0,
                                                  torch.uint8, "relu", [], "")


def in_bytes(x: Tensor) -> Tensor:
    """Features in steps, rectified and rounded. Torch's quantiser does it to floats in one pass over memory; its bytes are used
    as they are, where `int_repr` would copy them."""
    quantised = torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(quantised.untyped_storage(), 0, quantised.shape, quantised.stride())


class Int8ConvStack(nn.Module):
    """What a ConvStack of `model.py` computes in eval mode, given in `dtype`. Only its first layer, which has a single channel to read, multiplies floats."""

    def __init__(self, stack: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        steps = [steps_of(stack.cnn[number + 1]) for number in (0, 3, 8)]
        self.first, *others = (told_in(step, *stack.cnn[number : number + 2]) for step, number in zip(steps, (0, 3, 8)))
        self.convolutions = [Int8Conv(conv, read) for conv, read in zip(others, steps)]
        linear = stack.fc[0]
        # the weights know features in the order (C, M // 4), and they come as (M // 4, C)
        weight, self.scale = in_steps((linear.weight.detach().unflatten(1, (len(steps[-1]), -1)) * steps[-1][:, None]).transpose(1, 2).flatten(1))
        self.linear, self.bias = torch.ops.onednn.qlinear_prepack(weight, None), linear.bias.detach()

    def forward(self, mel: Tensor) -> Tensor:
        """(B, T, M) -> (B, T, fc_unit)."""
        with torch.autocast("cpu", enabled=False):
            x = in_bytes(self.first(mel.float().unsqueeze(1)))                # (B, 1, T, M) -> (B, C, T, M)
        for conv in self.convolutions:
            x = torch.maximum(*pairs(conv(x)))                                # (B, C, T, M) -> (B, C, T, M // 2)
        x = x.permute(0, 2, 3, 1).flatten(2)                                  # -> (B, T, M // 4 * C)
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, self.linear, self.scale, None, self.bias, 1.0, 0, self.dtype,
                                                  "none", [], "")


class Int8HarmonicStack(nn.Module):
    """What a HarmonicStack of `model.py` computes in eval mode, its first layer and what it gives in `dtype`. Features that are added have common steps."""

    def __init__(self, stack: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        first, second, octaves, later, last = (
            part[i : i + 2] for part in stack.children() for i, layer in enumerate(part) if isinstance(layer, nn.Conv2d))  # with its norm
        begin, near, self.step = steps_of(first[1]), steps_of(second[1], octaves[1]), steps_of(later[1], last[1])
        self.first = told_in(begin, *first).to(dtype)
        self.second, self.octaves = Int8Conv(told_in(near, *second), begin), Int8Conv(told_in(near, *octaves), near)
        self.later, self.last = Int8Conv(told_in(self.step, *later), near), Int8Conv(told_in(self.step, *last), self.step)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, K) -> (B, units, T, K)."""
        x = self.second(in_bytes(self.first(x.to(self.dtype)))).clamp_(max=HALF)
        x = self.later(self.octaves(x).clamp_(max=HALF).add_(x)).clamp_(max=HALF)
        return self.last(x).clamp_(max=HALF).add_(x) * self.step.to(self.dtype)[:, None, None]


def in_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, …) float -> the same in whole steps of each of its N rows, int8, and those steps (N,)."""
    step = weight.flatten(1).abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / step.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), step
