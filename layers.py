"""Layers that torch has too, made faster on CPUs, smaller in memory, or fit for several processes.

Shapes: B batch, C channels, T frames, M mel bands, H hidden units.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from devices import has_avx2_alone, keeps_bfloat16, rank_and_world

LONG_FRAMES = 1024  # from which on recurrent layers infer piece by piece, half a minute
SAMPLES = 2          # that a convolution in training makes float32 at a time
CHUNK_PLACES = 2048  # of features at most that one thread multiplies at a time for a convolution's gradient, so that they stay in its cache


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over every dimension but the second that, under DistributedDataParallel, sees the joint batch of all ranks.

    nn.SyncBatchNorm does this on GPUs alone; the gradients of several CPU processes have to equal one process's as well.
    Ioffe & Szegedy, ICML 2015.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and rank_and_world()[1] > 1):
            return super().forward(x)
        y, mean, var = JointlyNormalised.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = dist.get_world_size() * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / max(count - 1, 1), self.momentum)
        return y


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over all processes that train together; `x` itself where there is only one."""
    if (world := rank_and_world()[1]) == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world


class JointlyNormalised(torch.autograd.Function):
    """Batch norm by the moments of all ranks' batches, which are equally large; gives them too. The work is done by torch's own
    batch norm, of one rank, and what its gradient lacks is a line for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        _, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)  # of this rank
        mean, square = mean_over_ranks(torch.stack([mean, inverse**-2 - eps + mean.square()]))
        var = (square - mean.square()).clamp(min=0)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        x_grad, *sums = torch.ops.aten.native_batch_norm_backward(grad, x, scale, None, None, mean, inverse, True, ctx.eps, [True] * 3)
        own = torch.stack(sums)                                               # (2, C): of grad x normalised x, and of grad
        slope, level = (own - mean_over_ranks(own)) * scale * inverse * x.shape[1] / x.numel()
        slope = slope * inverse
        shape = [1, -1] + [1] * (x.dim() - 2)
        x_grad += x * slope.to(x.dtype).view(shape) + (level - slope * mean).to(x.dtype).view(shape)
        return x_grad, *([None, None] if weight is None else sums), None


class Conv2d(nn.Conv2d):
    """nn.Conv2d. On CPUs that multiply float32 faster than bfloat16 it does so, but what it learns from and gives in training is bfloat16: that
    takes half of the memory and, since less has to be moved, no longer. Strides, groups and padding by anything but a number of zeros are torch's."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dim() == 4 and self.stride == (1, 1) and self.groups == 1 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        short = (plain and self.training and keeps_bfloat16(x.device) and not torch.is_autocast_enabled(x.device.type)
                 and self.weight.dtype == torch.float32)
        return Convolved.apply(x, self.weight, self.bias, self.padding, self.dilation) if short else super().forward(x)


def conv_and_norm(inputs: int, outputs: int, kernel: int | tuple[int, int], padding: int | tuple[int, int], dilation: int | tuple[int, int] = 1) -> tuple[Conv2d, BatchNorm]:
    """A convolution and batch norm. The bias stays as it is: batch norm takes it away again, so its gradient would be rounding and nothing else."""
    conv = Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation)
    conv.bias.requires_grad_(False)
    return conv, BatchNorm(outputs)


class Convolved(torch.autograd.Function):
    """A convolution (B, C, T, M) -> (B, C', T', M') of float32, whose input and output may be bfloat16. A few samples at a time are made float32, which stay in the cache.

    With AVX2 alone oneDNN takes up to four times as long for the gradient of the weights in channels-last memory as for the rest, so that is made by `weight_gradient`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = padding, dilation
        size = [n + 2 * edge - step * (k - 1) for n, edge, step, k in zip(x.shape[2:], padding, dilation, weight.shape[2:])]
        y = torch.empty(len(x), len(weight), *size, dtype=torch.bfloat16, memory_format=torch.channels_last)
        for some, its_y in zip(x.split(SAMPLES), y.split(SAMPLES)):
            its_y.copy_(torch.conv2d(some.float(), weight, bias, 1, padding, dilation))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        by_taps = has_avx2_alone() and x.shape[1] > 1
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_grad = weight_gradient(x, grad, weight.shape[2:], *ctx.how) if by_taps else torch.zeros_like(weight)
        wanted = [x_grad is not None, not by_taps, False]  # the bias's own would be made with that of the weights, wanted or not
        for start in range(0, len(x) if any(wanted) else 0, SAMPLES):
            some = slice(start, start + SAMPLES)
            parts = torch.ops.aten.convolution_backward(grad[some].float(), x[some].float(), weight, None, [1, 1], *ctx.how, False, [0, 0], 1, wanted)
            if x_grad is not None:
                x_grad[some] = parts[0]
            if not by_taps:
                weight_grad += parts[1]
        return x_grad, weight_grad, grad.sum(dim=(0, 2, 3)).float() if ctx.needs_input_grad[2] else None, None, None


def weight_gradient(x: Tensor, grad: Tensor, kernel: torch.Size, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Of a convolution's input (B, C, T, M) and its output's gradient (B, C', T', M') -> (C', C, *kernel) float32: a matrix product for each tap, for what a tap reads
    of a padded and flattened input lies as far from the output everywhere, so both are matrices as they are, and nothing is gathered."""
    (high, wide), (inputs, outputs) = (size + 2 * edge for size, edge in zip(x.shape[2:], padding)), (x.shape[1], grad.shape[1])
    taps = [i * dilation[0] * wide + j * dilation[1] for i in range(kernel[0]) for j in range(kernel[1])]  # how far on each reads
    threads = torch.get_num_threads()
    chunks = -(-high * wide // (CHUNK_PLACES * threads))
    rows = -(-high * wide // (chunks * threads))
    padded, flat = torch.zeros(chunks * threads * rows + taps[-1], inputs), torch.zeros(chunks * threads * rows, outputs)
    inside = padded[: high * wide].view(high, wide, -1)[padding[0] : high - padding[0], padding[1] : wide - padding[1]]
    corner = flat[: high * wide].view(high, wide, -1)[: grad.shape[2], : grad.shape[3]]
    total = torch.zeros(len(taps), threads, outputs, inputs)
    for one, its_grad in zip(x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)):
        inside.copy_(one)
        corner.copy_(its_grad)
        for start in range(0, len(flat), threads * rows):
            left = flat[start : start + threads * rows].view(threads, rows, -1).transpose(1, 2)          # (threads, C', rows)
            for tap, part in zip(taps, total):
                part.baddbmm_(left, padded[start + tap :][: threads * rows].view(threads, rows, -1))     # @ (threads, rows, C)
    return total.sum(dim=1).unflatten(0, tuple(kernel)).permute(2, 3, 0, 1)


def as_multiplied(x: Tensor, layer: nn.Module) -> Tensor:
    """Features as `layer` multiplies them: what convolutions gave in bfloat16 in the dtype of its weights, unless autocast sees to it."""
    return x if x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type) else x.to(layer.weight.dtype)


class Dropout(nn.Module):
    """Dropout (Srivastava et al., JMLR 2014) that on a CPU spends one random byte on each feature.

    The random numbers that nn.Dropout draws there took a quarter of a training step. p counts in steps of 1/256.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = round(256 * p) / 256

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors(torch.empty_like(x)) if self.training and self.p else x

    def factors(self, out: Tensor) -> Tensor:
        """Fill `out`, dense in any memory layout, with what features are multiplied by: 0, or 1 / (1 - p)."""
        if out.device.type != "cpu":  # where random numbers cost nothing
            return out.bernoulli_(1 - self.p).div_(1 - self.p)
        words = torch.empty(-(-out.numel() // 8), dtype=torch.int64)
        drawn = words.random_(-2**63, None).view(torch.uint8)[: out.numel()]
        torch.ge(drawn, round(256 * self.p), out=out.as_strided((out.numel(),), (1,)))  # in the order of memory
        return out.mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class PoolRectifyDrop(Dropout):
    """The larger of every two neighbouring mel bands, rectified, and dropout: (B, C, T, M) -> (B, C, T, M // 2).

    In one, because for the gradient each would keep its own copy: together they save a third of training's memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return torch.maximum(*pairs(x)).relu_()
        factors = self.factors(torch.empty_like(x[..., : x.shape[3] // 2])) if self.p else None
        return PooledRectifiedDropped.apply(x, factors, 1 / (1 - self.p))


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, T, M) -> the even and the odd mel bands, (B, C, T, M // 2) each."""
    even = x.shape[3] // 2 * 2
    return x[..., 0:even:2], x[..., 1:even:2]


class PooledRectifiedDropped(torch.autograd.Function):
    """What PoolRectifyDrop does in training, with the factors that dropout drew, 0 or `scale`, or None. Of two equal bands
    the first has the gradient. Which features passed is read off the output, which the next layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor | None, scale: float) -> Tensor:
        left, right = pairs(x)
        y = torch.maximum(left, right).relu_()
        if factors is not None:
            y.mul_(factors)
        is_left = torch.ge(left, right, out=torch.empty_like(y))
        ctx.save_for_backward(is_left, y)
        ctx.like, ctx.scale = torch.empty_like(x, device="meta"), scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        is_left, y = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        if ctx.scale != 1:
            grad.mul_(ctx.scale)
        whole = torch.empty_like(ctx.like, dtype=grad.dtype, device=grad.device)
        left, right = pairs(whole)
        torch.mul(grad, is_left, out=left)
        torch.sub(grad, left, out=right)
        whole[..., grad.shape[3] * 2 :] = 0  # the last of an odd number of bands is in no pair
        return whole, None, None


def in_context(features: Tensor, lstm: nn.RNNBase, output: nn.Linear) -> Tensor:
    """(B, T, C) -> `output` of what recurrent layers hear, (B, T, K). These compute in float32 on CUDA, for autocast would make float16 of it there, too coarse for the gradients."""
    in_pieces = isinstance(lstm, nn.LSTM) and lstm.bidirectional and lstm.bias and not lstm.proj_size  # others read all at once
    with torch.autocast("cuda", enabled=False):
        features = features.float() if features.is_cuda else features
        if in_pieces and is_long(features):
            for layer in range(lstm.num_layers - 1):
                features = layer_in_pieces(features, lstm, layer)
            return last_layer_in_pieces(features, lstm, output)
        heard = lstm(features)[0]
    return output(heard)


def is_long(features: Tensor) -> bool:
    """Whether recurrent layers shall read (B, T, C) in pieces; only in inference mode, for gradients need the whole."""
    return torch.is_inference_mode_enabled() and features.shape[1] > LONG_FRAMES


def layer_in_pieces(features: Tensor, lstm: nn.LSTM, layer: int) -> Tensor:
    """(B, T, C) -> (B, T, 2H)."""
    kind = features.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype  # of what the layer gives
    heard = features.new_empty(*features.shape[:2], 2 * lstm.hidden_size, dtype=dtype)
    halves = heard.chunk(2, dim=2)
    read_in_pieces(lstm, layer, features.shape[1], lambda where: features[:, where],
                   lambda way, where, piece: halves[way][:, where].copy_(piece), LONG_FRAMES)
    return heard


def last_layer_in_pieces(features: Tensor, lstm: nn.LSTM, output: nn.Linear) -> Tensor:
    """(B, T, C) -> (B, T, K). What the layer hears is not kept, for of three hours it would be 0.7 GB in `onf`."""
    said, one_at_a_time = features.new_zeros(*features.shape[:2], output.out_features, dtype=torch.float32), threading.Lock()
    halves = output.weight.chunk(2, dim=1)

    def keep(way: int, where: slice, piece: Tensor) -> None:
        part = nn.functional.linear(piece, halves[way], None if way else output.bias)
        with one_at_a_time:
            said[:, where] += part

    read_in_pieces(lstm, lstm.num_layers - 1, features.shape[1], lambda where: features[:, where], keep, LONG_FRAMES)
    return said.to(features.dtype)


def read_in_pieces(lstm: nn.LSTM, layer: int, n_frames: int, read: Callable[[slice], Tensor],
                   keep: Callable[[int, slice, Tensor], Any], at_a_time: int) -> None:
    """One layer of an LSTM in inference, piece by piece, each beginning with the state in which the one before it
    ended: in one, 20 minutes of `onf` take 0.3 GB more. The two directions run side by side.

    Args:
        read: gives the features (B, t, C) of a slice of the frames.
        keep: is given the direction (0, or 1 for backwards), the slice, and what was heard in it, (B, t, H).
        at_a_time: how many frames a piece has.
    """
    starts = range(0, n_frames, at_a_time)

    def run(way: int) -> None:
        one, state = one_direction(lstm, layer, way), None
        for start in reversed(starts) if way else starts:
            where = slice(start, min(start + at_a_time, n_frames))
            piece = read(where)
            piece, state = one(piece.flip(1) if way else piece, state)
            keep(way, where, piece.flip(1) if way else piece)

    side_by_side(run, range(2), lstm.weight_hh_l0.device.type)


def one_direction(lstm: nn.LSTM, layer: int, way: int) -> nn.LSTM:
    """One layer of an LSTM in one direction, 0 or 1 for backwards, by itself: on CUDA weights lie in one block for each nn.LSTM, and
    some of a larger one's would be copied for every piece."""
    weights = {f"{name}_l0": getattr(lstm, f"{name}_l{layer}{('', '_reverse')[way]}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    one = nn.LSTM(weights["weight_ih_l0"].shape[1], lstm.hidden_size, batch_first=True, device="meta", dtype=lstm.weight_hh_l0.dtype).to_empty(device=lstm.weight_hh_l0.device)
    one.load_state_dict(weights)
    return one


def side_by_side(work: Callable[[int], None], numbers: range, kind: str) -> None:
    """Call `work` with every number, in inference mode; on a CPU two calls at a time, each with half of the threads.

    For two cores make one direction of a recurrent layer hardly faster, and wait for each other in every convolution.
    """
    threads = torch.get_num_threads()
    at_a_time = 2 if kind == "cpu" and threads > 1 and len(numbers) > 1 else 1
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)  # which a new thread does not know of

    def run(number: int) -> None:
        with torch.inference_mode(), torch.autocast(kind, dtype, enabled):
            work(number)

    try:
        with ThreadPoolExecutor(at_a_time, initializer=torch.set_num_threads, initargs=(threads // at_a_time,)) as pool:
            list(pool.map(run, numbers))
    finally:
        torch.set_num_threads(threads)  # which is also that of threads to come
