"""The convolution stack in 8-bit integers: for inference on CPUs. The convolutions take little more than half of
bfloat16's time, and the scores stay.

Weights are whole multiples of a step, one for each output channel, and so are features, one for each of theirs; products and
sums are those of whole numbers (Jacob et al., CVPR 2018). How large features get is not measured on music but known from batch norm,
which gives each channel's mean and standard deviation (Nagel et al., ICCV 2019).

Shapes: B batch, T frames, M mel bands, C channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from layers import pairs

RANGE = 24.0   # standard deviations over its mean up to which a feature is told: those of onsets are rare and far from the rest
LARGEST = 255  # of an unsigned byte
SMALLEST_STEP = 1e-5  # of a channel that batch norm keeps below zero


class Int8ConvStack(nn.Module):
    """What a ConvStack of `model.py` computes in eval mode. Only its first layer, which has a single channel to read, multiplies floats."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.convolutions = []  # (packed weights, their steps, bias) each
        read = None             # the steps of the features that a layer reads
        for number in (0, 3, 8):
            norm = stack.cnn[number + 1]
            conv = fuse_conv_bn_eval(stack.cnn[number], norm).requires_grad_(False)
            step = ((norm.bias + RANGE * norm.weight.abs()) / LARGEST).detach().clamp(min=SMALLEST_STEP)
            conv.weight /= step[:, None, None, None]    # so that features come out in steps
            conv.bias /= step
            if read is None:
                self.first = conv
            else:
                weight, scale = in_steps(conv.weight * read[:, None, None])
                packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, [1, 1], [1, 1], [1, 1], 1, None)
                self.convolutions.append((packed, scale, conv.bias))
            read = step
        linear = stack.fc[0]
        # the weights know features in the order (C, M // 4), and they come as (M // 4, C)
        weight, self.scale = in_steps((linear.weight.detach().unflatten(1, (len(read), -1)) * read[:, None]).transpose(1, 2).flatten(1))
        self.linear, self.bias = torch.ops.onednn.qlinear_prepack(weight, None), linear.bias.detach()

    def forward(self, mel: Tensor) -> Tensor:
        """(B, T, M) -> (B, T, fc_unit) bfloat16."""
        with torch.autocast("cpu", enabled=False):
            x = self.first(mel.float().unsqueeze(1))                          # (B, 1, T, M) -> (B, C, T, M)
        x = x.clamp_(0, LARGEST).add_(0.5).to(torch.uint8)                    # rectified and rounded
        for packed, scale, bias in self.convolutions:
            x = torch.ops.onednn.qconv2d_pointwise(x, 1.0, 0, packed, scale, None, bias, [1, 1], [1, 1], [1, 1], 1, 1.0, 0,
                                                   torch.uint8, "relu", [], "")
            x = torch.maximum(*pairs(x))                                      # (B, C, T, M) -> (B, C, T, M // 2)
        x = x.permute(0, 2, 3, 1).flatten(2)                                  # -> (B, T, M // 4 * C)
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, self.linear, self.scale, None, self.bias, 1.0, 0, torch.bfloat16,
                                                  "none", [], "")


def in_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, …) float -> the same in whole steps of each of its N rows, int8, and those steps (N,)."""
    step = weight.flatten(1).abs().amax(dim=1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / step.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), step
