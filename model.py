"""The transcribers: log-mel front end, convolution stack, recurrent layers; and the checkpoint that carries one.

Shapes: B batch, S samples, T frames, M mel bands, C channels, H hidden units, K = 88 keys.
"""

import copy
import dataclasses
import io
import math
import platform
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import constants
from constants import F_MAX, F_MIN, HOP_SIZE, MIN_MIDI, N_FFT, N_KEYS, N_MELS, SAMPLE_RATE
from devices import autocast, multiplies_bytes
from files import written_whole
from int8 import Int8ConvStack, Int8HarmonicStack
from layers import (
    BatchNorm,
    Conv2d,
    Dropout,
    PoolRectifyDrop,
    as_multiplied,
    conv_and_norm,
    in_context,
    is_long,
    mean_over_ranks,
    read_in_pieces,
    side_by_side,
)
from notes import VELOCITY
from recipe import RECIPES, Recipe
from spectrogram import SIDE, LogMelSpectrogram, hertz_to_mel, power_without_pauses, shifted_filters, tuning_of, whole_parts

# Base rates per frame and key (of onsets, as many as there are strikes), from MAESTRO v2: 7.13 M notes in 201.2 h; keys sound in about 3 % of all places.
ONSET_RATE = 0.0036
FRAME_RATE = 0.03
# where a key is read by the model `harmonic`, and its velocity by all: at these multiples of its frequency (half of it tells octaves apart) and PLACES semitones beside each; checkpoints depend on them
HARMONICS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0)
PLACES = (-1 / 3, 0.0, 1 / 3)
HEIGHTS = torch.linspace(-1, 1, N_KEYS)  # of the keys; by it weights of velocities differ
AROUND = 24         # semitones to either side in which it hears what other keys do
CONTEXT = 3         # frames that three 3 x 3 convolutions see to either side
RELEASED = [Path(__file__).parent / "runs" / "released" / f"{name}.pt" for name in ("harmonic", "harmonic", "onf")]  # what is used where nothing else is named, see Ensemble
LEVEL_RATE = 0.01   # weight of the latest batch in the level that training hears
COLOUR_BANDS = 8    # mel bands over which a recording's colour is smoothed, a third of an octave at 440 Hz
COLOUR_SECONDS = 60  # of a recording, that count as much for its colour as all training
CHUNK_FRAMES = 352  # frames convolved at a time, 11 s: big enough to be fast, small enough for flat memory; a CPU has two such chunks at work at once
PIECE_FRAMES = 128  # that `harmonic` reads at a time in a long recording, all keys at once


@dataclass(frozen=True)
class Sizes:
    """Every number a transcriber's constructor takes; the course's defaults."""

    cnn_unit: int = 48   # channels of the first two convolutions; the third has twice as many, and so have all of `harmonic`
    fc_unit: int = 256   # features of a frame after the convolution stack; `harmonic` has a quarter as many hidden units, and an eighth as many features of each key
    lstm_unit: int = 88  # hidden units in each direction; `harmonic` makes no use of it


class ConvStack(nn.Module):
    """The acoustic model of Kelz et al., ISMIR 2016 (their ConvNet), in the form of Hawthorne et al. 2018."""

    def __init__(self, n_mels: int, cnn_unit: int, fc_unit: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            *conv_and_norm(1, cnn_unit, 3, 1), nn.ReLU(inplace=True),
            *conv_and_norm(cnn_unit, cnn_unit, 3, 1), PoolRectifyDrop(dropout / 2),
            nn.Identity(), nn.Identity(),  # so that layers have the numbers they have in the course's checkpoints
            *conv_and_norm(cnn_unit, cnn_unit * 2, 3, 1), PoolRectifyDrop(dropout / 2))
        self.fc = nn.Sequential(nn.Linear(cnn_unit * 2 * (n_mels // 4), fc_unit), Dropout(dropout))

    def forward(self, mel: Tensor) -> Tensor:
        """(B, T, M) -> (B, T, fc_unit)."""
        x = self.cnn(mel.unsqueeze(1))                                    # (B, 1, T, M) -> (B, C, T, M // 4)
        linear, dropout = self.fc
        # the weights know features in the order (C, M // 4); in channels-last memory they lie as (M // 4, C), and moving
        # the weights instead is a thousandth of the work
        weight = linear.weight.unflatten(1, (x.shape[1], x.shape[3])).transpose(1, 2).flatten(1)
        x = x.permute(0, 2, 3, 1).flatten(2)                              # (B, C, T, M // 4) -> (B, T, M // 4 * C)
        return dropout(nn.functional.linear(as_multiplied(x, linear), weight, linear.bias))  # -> (B, T, fc_unit)


def bi_lstm(inputs: int, units: int) -> nn.LSTM:
    """Two layers, both directions: (B, T, inputs) -> (B, T, 2 * units)."""
    return nn.LSTM(inputs, units, num_layers=2, batch_first=True, bidirectional=True)


def recurrent_head(features: Tensor, lstm: nn.LSTM, output: nn.Linear, path: nn.Linear | None) -> Tensor:
    """(B, T, C) -> logits (B, T, K)."""
    logit = in_context(features, lstm, output)                            # (B, T, C) -> (B, T, 2H) -> (B, T, K)
    return logit if path is None else logit + path(features)


class Transcriber(nn.Module):
    """What the transcribers share. A new one gives `convolve` and `recur`, and a row in MODELS.

    `convolve` looks at most CONTEXT frames to either side, so a long recording goes through it in chunks; `recur` sees the
    whole. `thresholds` are the probabilities from which an onset and a frame count, `level` is the root mean square of what
    training lately heard, 0 before any, and `velocity` are the weights by which velocities are read, at first VELOCITY for all; the three
    travel in the checkpoint.
    """

    def __init__(self, sizes: Sizes, recipe: Recipe) -> None:
        super().__init__()
        self.sizes, self.recipe = sizes, recipe
        self.thresholds = {"onset": 0.5, "frame": 0.5}
        self.register_buffer("level", torch.tensor(0.0))
        self.register_buffer("harmonics", harmonic_filters(), persistent=False)
        self.register_buffer("velocity", nn.functional.one_hot(torch.tensor(self.harmonics.shape[2] + 1), 2 * self.harmonics.shape[2] + 4).float() * VELOCITY)
        self.melspectrogram = LogMelSpectrogram()
        self.mel_norm = BatchNorm(N_MELS, affine=False) if recipe.normalise_mel else nn.Identity()

    def conv_stack(self) -> ConvStack:
        return ConvStack(N_MELS, self.sizes.cnn_unit, self.sizes.fc_unit, self.recipe.dropout)

    def path(self, inputs: int) -> nn.Linear | None:
        """A head's linear path past its recurrent layers, where the recipe has it; the head's output layer has the bias."""
        return nn.Linear(inputs, N_KEYS, bias=False) if self.recipe.residual else None

    def output(self, inputs: int, rate: float) -> nn.Linear:
        """The last layer of a head; in the default recipe it starts by saying the base rate of its events everywhere."""
        layer = nn.Linear(inputs, N_KEYS)
        if self.recipe.base_rate_bias:
            nn.init.constant_(layer.bias, math.log(rate / (1 - rate)))
        return layer

    def convolve(self, mel: Tensor) -> tuple[Tensor, ...]:
        """(B, T, M) -> features of every branch, (B, T, C) each."""
        raise NotImplementedError

    def recur(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, C) -> frame logits and onset logits, (B, T, K) each."""
        raise NotImplementedError

    def normalise(self, mel: Tensor) -> Tensor:
        return self.mel_norm(mel.transpose(1, 2)).transpose(1, 2)

    def features(self, mel: Tensor) -> tuple[Tensor, ...]:
        return self.convolve(self.normalise(mel))

    def forward(self, audio: Tensor, semitones: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, S) float in [-1, 1] -> frame logits and onset logits, (B, S // HOP_SIZE, K) each; `semitones` (B,) sharper."""
        filters = None if semitones is None else shifted_filters(semitones)
        if self.training:
            heard = mean_over_ranks(audio.detach().float().square().mean()).sqrt()
            self.level.copy_(torch.where(self.level > 0, self.level.lerp(heard, LEVEL_RATE), heard))
        return self.recur(*self.features(self.melspectrogram(audio, filters)))

    def gain_for(self, audio: Tensor) -> Tensor:
        """What brings a recording (S,) to the level that training heard: a model of soft recordings mistakes the loud ones.

        Its level is that of its sound without pauses. Silence, less than a frame, and all that a model whose `level` is unknown
        hears, stay as they are.
        """
        power = power_without_pauses(whole_parts(audio, HOP_SIZE))
        power = power[power > 0]
        return self.level.cpu() / power.mean().sqrt() if len(power) and self.level else torch.tensor(1.0)

    def filters_for(self, audio: Tensor) -> Tensor | None:
        """(F, M) mel filters that hear a recording (S,) as if its piano were tuned to A4 = 440 Hz: half a semitone off, a model cannot
        tell which key it hears. None, the plain ones, where nothing is known of its tuning, or where a model's `level` is unknown."""
        semitones = tuning_of(audio[None]) if self.level else torch.zeros(1)
        return shifted_filters(-semitones)[0].to(self.level.device) if semitones.any() else None

    def colour_of(self, audio: Tensor, gain: Tensor, filters: Tensor | None = None) -> Tensor:
        """(M,) by how much more each mel band has in a recording (S,), times its gain, than in training: its microphone, room and piano.

        After Li et al., "Revisiting Batch Normalization for Practical Domain Adaptation", ICLR workshop 2017: a recording's own means
        stand in for those of training. Here they do so the more the longer it is, and smoothed over bands, so that the notes it has count
        little; its level does not count, for there is `gain_for`. Nothing is known, 0, of silence, of what is shorter than a Fourier
        window, and where a model's `level` is unknown.
        """
        windows = whole_parts(audio, N_FFT)
        loud = power_without_pauses(windows).nonzero()[:, 0]
        if not len(loud) or not self.level:
            return torch.zeros_like(self.mel_norm.running_mean)
        louder = -self.mel_norm.running_mean
        for some in loud.split(CHUNK_FRAMES):  # not all at once, which would be a copy of the recording
            mel = self.melspectrogram.of_padded((windows[some] * gain).to(louder.device), filters)      # (N, 1, M)
            louder = louder + mel.sum(dim=(0, 1)) / len(loud)
        bands = torch.arange(N_MELS, device=louder.device)
        near = torch.exp(-((bands[:, None] - bands) / COLOUR_BANDS).square() / 2)
        louder = near @ louder / near.sum(dim=1)
        seconds = len(loud) * N_FFT / SAMPLE_RATE
        return (louder - louder.mean()) * seconds / (seconds + COLOUR_SECONDS)

    @staticmethod
    def struck(mel: Tensor) -> Tensor:
        """(B, T, M) -> the same, each band the loudest that it is in a frame and the three after it: how the key sounds that is struck there."""
        return nn.functional.max_pool1d(nn.functional.pad(mel.transpose(1, 2), (0, 3), value=-math.inf), 4, 1).transpose(1, 2)

    @torch.inference_mode()
    def strikes(self, audio: Tensor, frames: Tensor, keys: Tensor) -> Tensor:
        """What velocities are read from, in eval mode: strikes of `keys` (N,) in `frames` (N,) of a recording (S,) -> (N, 2 * (C + 2)),
        the loudest log-mel at the key's harmonics, that of all bands, and 1; and these times the key's place in HEIGHTS. On the CPU."""
        device, gain, filters = self.velocity.device, self.gain_for(audio), self.filters_for(audio)
        mel = self.melspectrogram((audio * gain).to(device)[None], filters)
        if self.recipe.normalise_mel:
            mel = mel - self.colour_of(audio, gain, filters)
        heard = self.struck(self.normalise(mel))[0].cpu()[frames]                                    # (N, M)
        parts = torch.einsum("nm,mnc->nc", heard, self.harmonics.cpu()[:, keys])
        parts = torch.cat([parts, heard.mean(dim=1, keepdim=True), torch.ones(len(keys), 1)], dim=1)
        return torch.cat([parts, parts * HEIGHTS[keys, None]], dim=1)

    def velocity_map(self) -> tuple[Tensor, Tensor]:
        """(M, K) and (K,), what `struck` bands are multiplied by and added to: the velocity of each key if it is struck there."""
        middle, higher = self.velocity.unflatten(0, (2, -1))
        weights = middle + HEIGHTS[:, None].to(middle.device) * higher                               # (K, C + 2)
        parts, whole, constant = weights.split([self.harmonics.shape[2], 1, 1], dim=1)
        return (self.harmonics * parts).sum(dim=2) + whole[:, 0] / N_MELS, constant[:, 0]

    @torch.inference_mode()
    def infer(self, audio: Tensor, chunk_frames: int = CHUNK_FRAMES) -> tuple[Tensor, Tensor, Tensor]:
        """What is heard in one recording of any length and level: the convolutions in chunks, the recurrent layers over the whole.

        Args:
            audio: (S,) float in [-1, 1]; less than a frame of it is padded to one.
            chunk_frames: how many frames are convolved at a time. It changes speed and memory, not the result.

        Returns:
            Frame logits and onset logits, (T, K) float32 each, and the velocity of each key if it is struck in a frame, (T, K) uint8; on the CPU.

        Raises:
            ValueError: the logits are not all numbers.
        """
        device = next(self.parameters()).device
        with autocast(device):
            fast = for_inference(self)
        n_frames, gain, filters = max(1, len(audio) // HOP_SIZE), self.gain_for(audio), self.filters_for(audio)
        if self.recipe.normalise_mel:
            fast.mel_norm.running_mean += self.colour_of(audio, gain, filters)
        whole: list[Tensor] = []  # what convolve gives, and velocities, of all chunks; filled in place, because many small pieces fragment memory
        one_at_a_time = threading.Lock()
        bands, constant = self.velocity_map()

        def listen(start: int) -> None:
            stop = min(start + chunk_frames, n_frames)
            low, high = max(0, start - CONTEXT), min(n_frames, stop + CONTEXT)
            first, last = low * HOP_SIZE - SIDE, high * HOP_SIZE + SIDE             # the samples those frames see
            chunk = (audio[max(0, first) : last] * gain).to(device)
            chunk = nn.functional.pad(chunk, (max(0, -first), 0))
            chunk = nn.functional.pad(chunk, (0, last - first - len(chunk)))
            mel = fast.normalise(fast.melspectrogram.of_padded(chunk[None], filters))          # (1, T', M)
            velocity = (self.struck(mel) @ bands + constant).round().clamp(1, 127).byte()      # (1, T', K)
            heard = *fast.convolve(mel), velocity                                              # (1, T', C) each
            with one_at_a_time:
                if not whole:
                    whole.extend(part.new_empty(1, n_frames, part.shape[2]) for part in heard)
            for kept, part in zip(whole, heard):
                kept[:, start:stop] = part[:, start - low : stop - low]

        with autocast(device):
            side_by_side(listen, range(0, n_frames, chunk_frames), device.type)
            logits = fast.recur(*whole[:-1])
        logits = tuple(logit[0].float().cpu() for logit in logits)
        if not all(logit.sum().isfinite() for logit in logits):
            raise ValueError("what the model makes of a recording is not a number (NaN or infinity)")
        return *logits, whole[-1][0].cpu()


class Baseline(Transcriber):
    """ConvStack and a linear layer for each head (Kelz et al. 2016)."""

    def __init__(self, sizes: Sizes, recipe: Recipe) -> None:
        super().__init__(sizes, recipe)
        self.frame_conv_stack, self.onset_conv_stack = (self.conv_stack() for _ in range(2))
        self.frame_fc = self.output(sizes.fc_unit, FRAME_RATE)
        self.onset_fc = self.output(sizes.fc_unit, ONSET_RATE)

    def convolve(self, mel: Tensor) -> tuple[Tensor, ...]:
        return self.frame_conv_stack(mel), self.onset_conv_stack(mel)

    def recur(self, frame: Tensor, onset: Tensor) -> tuple[Tensor, Tensor]:
        return self.frame_fc(frame), self.onset_fc(onset)


class RNN(Transcriber):
    """Two bidirectional LSTM layers straight on the log-mel for each head (cf. Boeck & Schedl, ICASSP 2012)."""

    def __init__(self, sizes: Sizes, recipe: Recipe) -> None:
        super().__init__(sizes, recipe)
        self.frame_lstm, self.onset_lstm = bi_lstm(N_MELS, sizes.lstm_unit), bi_lstm(N_MELS, sizes.lstm_unit)
        self.frame_path, self.onset_path = self.path(N_MELS), self.path(N_MELS)
        self.frame_fc = self.output(2 * sizes.lstm_unit, FRAME_RATE)
        self.onset_fc = self.output(2 * sizes.lstm_unit, ONSET_RATE)

    def convolve(self, mel: Tensor) -> tuple[Tensor, ...]:
        return (mel,)

    def recur(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        return (recurrent_head(mel, self.frame_lstm, self.frame_fc, self.frame_path),
                recurrent_head(mel, self.onset_lstm, self.onset_fc, self.onset_path))


class CRNN(Transcriber):
    """ConvStack and two bidirectional LSTM layers for each head: Hawthorne et al. 2018 without the onset cue."""

    def __init__(self, sizes: Sizes, recipe: Recipe) -> None:
        super().__init__(sizes, recipe)
        self.frame_conv_stack, self.onset_conv_stack = self.conv_stack(), self.conv_stack()
        self.frame_lstm, self.onset_lstm = (bi_lstm(sizes.fc_unit, sizes.lstm_unit) for _ in range(2))
        self.frame_path, self.onset_path = self.path(sizes.fc_unit), self.path(sizes.fc_unit)
        self.frame_fc = self.output(2 * sizes.lstm_unit, FRAME_RATE)
        self.onset_fc = self.output(2 * sizes.lstm_unit, ONSET_RATE)

    def convolve(self, mel: Tensor) -> tuple[Tensor, ...]:
        return self.frame_conv_stack(mel), self.onset_conv_stack(mel)

    def recur(self, frame: Tensor, onset: Tensor) -> tuple[Tensor, Tensor]:
        return (recurrent_head(frame, self.frame_lstm, self.frame_fc, self.frame_path),
                recurrent_head(onset, self.onset_lstm, self.onset_fc, self.onset_path))


class OnsetsAndFrames(Transcriber):
    """Hawthorne et al., ISMIR 2018, figure 1, less the first sigmoid: the frame branch is told what the onset branch heard.

    The cue is detached: the frame loss must not teach the onset branch. Where the recipe has a path past the recurrent layers, it
    is the frame branch's own answer, which these correct.
    """

    def __init__(self, sizes: Sizes, recipe: Recipe) -> None:
        super().__init__(sizes, recipe)
        self.frame_conv_stack, self.onset_conv_stack = self.conv_stack(), self.conv_stack()
        self.onset_lstm, self.onset_path = bi_lstm(sizes.fc_unit, sizes.lstm_unit), self.path(sizes.fc_unit)
        self.onset_fc = self.output(2 * sizes.lstm_unit, ONSET_RATE)
        self.frame_fc = nn.Linear(sizes.fc_unit, N_KEYS)
        self.combined_lstm = bi_lstm(2 * N_KEYS, recipe.combined_unit)
        self.combined_fc = self.output(2 * recipe.combined_unit, FRAME_RATE)

    def convolve(self, mel: Tensor) -> tuple[Tensor, ...]:
        return self.frame_fc(self.frame_conv_stack(mel)), self.onset_conv_stack(mel)

    def recur(self, frame: Tensor, onset: Tensor) -> tuple[Tensor, Tensor]:
        onset = recurrent_head(onset, self.onset_lstm, self.onset_fc, self.onset_path)          # (B, T, C) -> (B, T, K)
        combined = torch.cat([frame, onset.detach()], dim=-1)                                   # (B, T, 2K)
        logit = in_context(combined, self.combined_lstm, self.combined_fc)                      # -> (B, T, 2H) -> (B, T, K)
        return logit + frame if self.recipe.residual else logit, onset


def harmonic_filters() -> Tensor:
    """(M, K, C) weights that read a mel spectrogram at the harmonics of each key, C = HARMONICS x PLACES; between bands linearly."""
    keys = torch.arange(N_KEYS)[:, None, None] + torch.tensor(PLACES)                                # (K, 1, P) semitones above the lowest
    hertz = 440 * 2 ** ((keys + MIN_MIDI - 69) / 12) * torch.tensor(HARMONICS)[:, None]              # (K, H, P)
    low, high = hertz_to_mel(torch.tensor([F_MIN, F_MAX]))
    place = ((hertz_to_mel(hertz) - low) / (high - low) * (N_MELS + 1) - 1).flatten(1)                     # (K, C) among the filters' centres
    inside = (place > -0.5) & (place < N_MELS - 1)  # half a band below the first counts as that; elsewhere there is nothing, 0
    near = 1 - (place.clamp(min=0) - torch.arange(N_MELS)[:, None, None]).abs()                      # (M, K, C)
    return near.clamp(min=0) * inside


class HarmonicStack(nn.Module):
    """Convolutions over time and keys, whose channels at first are a key's harmonics; one sees keys one and two octaves away."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.near = nn.Sequential(*self.layer(inputs, units, 3, 3), *self.layer(units, units, 3, 3), Dropout(0.1))
        self.octaves = nn.Sequential(*self.layer(units, units, 1, 5, 12))
        self.later = nn.Sequential(*self.layer(units, units, 3, 3), Dropout(0.1))
        self.last = nn.Sequential(*self.layer(units, units, 1, 3))

    @staticmethod
    def layer(inputs: int, units: int, frames: int, keys: int, apart: int = 1) -> tuple[nn.Module, ...]:
        padding = (frames // 2, keys // 2 * apart)
        return *conv_and_norm(inputs, units, (frames, keys), padding, (1, apart)), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, K) -> (B, units, T, K)."""
        x = self.near(x)
        x = self.later(x + self.octaves(x))
        return x + self.last(x)


class Harmonic(Transcriber):
    """Every key by the same small network, but for its biases; it hears the key's harmonics. After HPPNet (Wei et al., ISMIR 2022).

    The spectrogram is read at each key's harmonics (as in Bittner et al., ISMIR 2017, but from the log-mel that all models
    have), so that what is learnt of one key holds for all. Convolutions over keys follow, then an LSTM which runs along
    each key by itself; it also hears what the keys within two octaves do, for a note often ends when another of its voice begins,
    and the mean over all keys. Onsets and frames are two outputs of it.
    """

    def __init__(self, sizes: Sizes, recipe: Recipe) -> None:
        super().__init__(sizes, recipe)
        units, (hidden, key_units, all_units) = 2 * sizes.cnn_unit, (math.ceil(sizes.fc_unit / share) for share in (4, 8, 16))
        self.stack = HarmonicStack(self.harmonics.shape[2], units)
        self.key_fc, self.all_fc = nn.Linear(units, key_units), nn.Linear(units, all_units)
        self.around = nn.Sequential(Conv2d(units, all_units, 1), nn.ReLU(inplace=True),
                                    Conv2d(all_units, key_units, (1, 2 * AROUND + 1), padding=(0, AROUND)))
        for parameter in self.around[2].parameters():
            nn.init.zeros_(parameter)  # at first a key hears itself
        self.lstm = nn.LSTM(key_units + all_units, hidden, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, 2, bias=False)
        self.path_fc = nn.Linear(key_units, 2, bias=False) if recipe.residual else None
        rates = torch.tensor([FRAME_RATE, ONSET_RATE])
        self.bias = nn.Parameter((rates.logit() if recipe.base_rate_bias else torch.zeros(2)).repeat(N_KEYS, 1))

    def convolve(self, mel: Tensor) -> tuple[Tensor, ...]:
        """(B, T, M) -> what is heard of each key (B, T, K * C), and of all (B, T, C')."""
        x = (mel @ self.harmonics.flatten(1)).unflatten(2, (N_KEYS, -1))       # (B, T, M) @ (M, K * C) -> (B, T, K, C)
        x = as_multiplied(self.stack(x.permute(0, 3, 1, 2)), self.key_fc)      # (B, C, T, K), channels-last memory as it is
        around, x = self.around(x).permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
        key, every = (self.key_fc(x) + around).flatten(2), self.all_fc(x.mean(dim=2))
        in_half = torch.is_inference_mode_enabled() and key.dtype == torch.float32  # of an hour it is 0.6 GB then instead of 1.3, and scores stay within .0001
        return key.half() if in_half else key, every

    def recur(self, key: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", enabled=False):  # as in_context has it
            key, every = (x.float() if x.is_cuda else x for x in (key, every))
            key = key.unflatten(2, (N_KEYS, -1))                                                        # (B, T, K, C)
            if is_long(every):
                return self.recur_in_pieces(key, every)
            logit = self.by_frames(self.fc(self.lstm(self.along_keys(key, every))[0])) + self.past_recurrent(key)
            return logit[..., 0], logit[..., 1]

    def recur_in_pieces(self, key: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
        """The same; what the LSTM says of all keys is not kept, for in an hour it would be 2 GB."""
        logit, one_at_a_time = key.new_zeros(2, *key.shape[:3], dtype=torch.float32), threading.Lock()
        halves = self.fc.weight.chunk(2, dim=1)

        def keep(way: int, where: slice, heard: Tensor) -> None:
            said = self.by_frames(nn.functional.linear(heard, halves[way])).float()
            said = said if way else said + self.past_recurrent(key[:, where])
            with one_at_a_time:
                logit[:, :, where] += said.movedim(3, 0)

        read_in_pieces(self.lstm, 0, key.shape[1], lambda where: self.along_keys(key[:, where], every[:, where]), keep, PIECE_FRAMES)
        return logit[0], logit[1]

    def past_recurrent(self, key: Tensor) -> Tensor:
        """(B, T, K, C) -> (B, T, K, 2)."""
        return self.bias if self.path_fc is None else self.path_fc(key.float() if key.dtype == torch.float16 else key) + self.bias

    def along_keys(self, key: Tensor, every: Tensor) -> Tensor:
        """(B, T, K, C) and (B, T, C') -> (B * K, T, C + C')."""
        every = every[:, :, None].expand(-1, -1, N_KEYS, -1)
        return torch.cat([key, every], dim=3).transpose(1, 2).flatten(0, 1)

    def by_frames(self, said: Tensor) -> Tensor:
        """(B * K, T, 2) -> (B, T, K, 2)."""
        return said.unflatten(0, (-1, N_KEYS)).transpose(1, 2)


class Ensemble(nn.Module):
    """Several transcribers that infer as one: what they hear is averaged, logits and velocities, and so are their thresholds.

    Models of different kinds err in different places, and their mean less than each (Hansen & Salamon, IEEE TPAMI 1990). One that
    is given twice counts twice, and hears once.
    """

    def __init__(self, members: list[Transcriber]) -> None:
        """Raises ValueError if the members were trained on different onset targets, whose logits do not mean the same."""
        super().__init__()
        self.recipe = members[0].recipe  # evaluation asks it for the onset target
        for member in members:
            if member.recipe.onset_target != self.recipe.onset_target:
                raise ValueError(f"onset targets are {self.recipe.onset_target!r} and {member.recipe.onset_target!r}; only models of one kind of onset are averaged")
        self.members = nn.ModuleList(dict.fromkeys(members))
        self.shares = [members.count(member) / len(members) for member in self.members]
        self.thresholds = {head: sum(member.thresholds[head] for member in members) / len(members) for head in members[0].thresholds}

    @torch.inference_mode()
    def infer(self, audio: Tensor, chunk_frames: int = CHUNK_FRAMES) -> tuple[Tensor, Tensor, Tensor]:
        """As `Transcriber.infer`."""
        means: list[Tensor] = []
        for member, share in zip(self.members, self.shares):
            heard = [part.float().mul_(share) for part in member.infer(audio, chunk_frames)]
            means = [mean.add_(part) for mean, part in zip(means, heard)] if means else heard
        frame, onset, velocity = means
        return frame, onset, velocity.round_().byte()


IN_BYTES = {ConvStack: Int8ConvStack, HarmonicStack: Int8HarmonicStack}  # what computes the same in 8-bit integers
MODELS = {"baseline": Baseline, "rnn": RNN, "crnn": CRNN, "onf": OnsetsAndFrames, "harmonic": Harmonic}


def build_model(name: str, sizes: Sizes = Sizes(), recipe: Recipe = RECIPES["default"]) -> Transcriber:
    """A fresh transcriber of MODELS, in channels-last memory where convolutions are fastest."""
    return MODELS[name](sizes, recipe).to(memory_format=torch.channels_last)


def for_inference(model: Transcriber) -> Transcriber:
    """A copy that only infers, and faster: convolution stacks compute in 8-bit integers on a CPU that multiplies these well; elsewhere batch
    norm is folded into the convolution before it, and where autocast multiplies in bfloat16, weights are rounded once, not at every use."""
    model = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    in_bytes = multiplies_bytes(device)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.LSTM):
                layer.flatten_parameters()  # on CUDA a copy's are scattered
            elif type(layer) in IN_BYTES and in_bytes:  # not what is derived from these, which may compute other things
                setattr(parent, name, IN_BYTES[type(layer)](layer, dtype))
            elif type(layer) in IN_BYTES:
                for part in layer.children():
                    for i, norm in enumerate(part):
                        if isinstance(norm, BatchNorm):
                            part[i - 1], part[i] = fuse_conv_bn_eval(part[i - 1], norm), nn.Identity()
                layer.to(dtype)
    return model


def n_parameters(model: nn.Module) -> int:
    """Trainable numbers; the spectrogram's filters are buffers and do not count."""
    return sum(p.numel() for p in model.parameters())


def constants_dict() -> dict[str, int]:
    return {name: value for name, value in vars(constants).items() if name.isupper()}


def save_checkpoint(path: str | Path, model: Transcriber, **training: Any) -> None:
    """Write one file that holds all that evaluation, transcription and further training need, in plain types.

    Args:
        training: what only the training loop knows: step, optimizer, scheduler, data, arguments; the seed among these and the
            step are the whole random state.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    name = next(name for name, made in MODELS.items() if type(model) is made)
    state = {"model": name, "sizes": dataclasses.asdict(model.sizes), "recipe": dataclasses.asdict(model.recipe),
             "constants": constants_dict(), "thresholds": model.thresholds, "weights": model.state_dict(),
             "versions": {"torch": torch.__version__ + "", "python": platform.python_version()}, **training}
    write_state(path, state)


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's content, whole or not at all; raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # not into the file: of a full disk torch's own writer says nothing that helps
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def share_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write what `read_checkpoint` gave for others to use: weights in half precision, and nothing that only more training
    needs, or that tells where its data lay; raises OSError."""
    weights = {name: value.half() if value.is_floating_point() else value for name, value in state["weights"].items()}
    kept = {name: value for name, value in state.items() if name not in ("optimizer", "scheduler")}
    for part, where in (("data", ("folders", "onset_folders")), ("arguments", ("data", "onset_data", "weights"))):
        kept[part] = {name: value for name, value in state.get(part, {}).items() if name not in where}
    write_state(path, {**kept, "weights": weights})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's contents and compare its constants with the code's; never runs code that a file may hold.

    The course's own files (`model_state_dict`, `cnn_unit`, `fc_unit`) are read as its baseline.

    Raises:
        OSError: there is no such file.
        ValueError: it is no checkpoint, is truncated, holds code, or was made with other constants.
    """
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(2)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # torch raises many kinds for a broken file
        holds_code = (head == b"PK" or head[:1] == b"\x80") and "weights_only" in str(error)  # a zip or a pickle, and refused
        reason = "holds code or other things than weights" if holds_code else "is not a checkpoint, or not a whole one"
        raise ValueError(f"{path}: {reason}; train.py writes such files") from error
    if isinstance(state, dict) and {"model_state_dict", "cnn_unit", "fc_unit"} <= state.keys():
        sizes = Sizes(state["cnn_unit"], state["fc_unit"])
        state = {"model": "baseline", "sizes": dataclasses.asdict(sizes), "recipe": dataclasses.asdict(RECIPES["course"]),
                 "constants": constants_dict(), "thresholds": {"onset": 0.5, "frame": 0.5}, "step": state.get("step", 0),
                 "weights": state["model_state_dict"]}
    kinds = {"model": str, "sizes": dict, "recipe": dict, "constants": dict, "thresholds": dict, "weights": dict}
    if not (isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
            and all(isinstance(state.get(name, {}), dict) for name in ("data", "arguments"))):
        raise ValueError(f"{path}: is a PyTorch file but not a checkpoint of train.py")
    for name, value in constants_dict().items():
        if (found := state["constants"].get(name)) != value:
            raise ValueError(f"{path}: was made with {name} = {found}, and constants.py says {value}")
    if state["model"] not in MODELS:
        raise ValueError(f"{path}: holds a {state['model']!r} model, known are {', '.join(MODELS)}")
    return state


def model_of(state: dict[str, Any], path: str | Path) -> Transcriber:
    """Build the transcriber that `read_checkpoint` read from `path`, in eval mode on the CPU.

    Raises:
        ValueError: its weights do not fit its sizes, or are not all numbers.
    """
    try:
        # what a recipe does not name came after it was written, and was then done as in the course's
        recipe = Recipe(**{**dataclasses.asdict(RECIPES["course"]), **state["recipe"]})
        model = build_model(state["model"], Sizes(**state["sizes"]), recipe)
        model.load_state_dict({"level": model.level, "velocity": model.velocity, **state["weights"]})  # which older ones and the course's do not have
        model.thresholds = {head: float(state["thresholds"][head]) for head in ("onset", "frame")}
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit this version of the models ({textwrap.shorten(str(error), 160)})") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError(f"{path}: holds weights that are not numbers (NaN or infinity)")
    return model.eval()


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Transcriber:
    """The transcriber in a checkpoint, in eval mode on `device`; raises as `read_checkpoint` and `model_of` do."""
    return model_of(read_checkpoint(path), path).to(device)


def load_ensemble(paths: Sequence[str | Path], device: str | torch.device = "cpu") -> Transcriber | Ensemble:
    """What several checkpoints hear together, or the one that is given; one that is named twice counts twice. Raises as `load_checkpoint` and `Ensemble` do."""
    loaded = {path: load_checkpoint(path, device) for path in dict.fromkeys(paths)}
    try:
        return Ensemble([loaded[path] for path in paths]) if len(paths) > 1 else loaded[paths[0]]
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from error
