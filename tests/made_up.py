"""Music that nobody played, for bench.py: sound, notes and probabilities as dense as in real music, at no cost of disk or time."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from audio import audio_to_int16, save_audio
from constants import HOP_SIZE, MAX_MIDI, MIN_MIDI, N_KEYS, SAMPLE_RATE
from dataset import Recording
from model import FRAME_RATE, ONSET_RATE
from notes import Notes

NOTES_PER_HOUR = 35000  # MAESTRO v2: 7.13 M notes in 201.2 h
TONES_SECONDS = 20      # after which the made-up sound repeats


@cache
def tones() -> np.ndarray:
    """(S,) float32, in steps of int16: decaying tones on random keys, four a second."""
    random, seconds = np.random.default_rng(0), np.arange(TONES_SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    audio = np.zeros(len(seconds), dtype=np.float32)
    for onset in np.arange(0, TONES_SECONDS, 0.25):
        since = seconds[seconds >= onset] - onset
        hertz = 27.5 * 2 ** (random.integers(20, 70) / 12)
        audio[len(audio) - len(since) :] += (0.1 * np.exp(-3 * since) * np.sin(2 * np.pi * hertz * since)).astype(np.float32)
    return audio_to_int16(audio) / np.float32(32768)


def write_recording(path: Path, seconds: float) -> None:
    save_audio(path, (tones()[: round((seconds - start) * SAMPLE_RATE)] for start in range(0, math.ceil(seconds), TONES_SECONDS)))


def some_notes(seconds: float, seed: int) -> Notes:
    """As many notes as there are in music, on random keys."""
    random, count = np.random.default_rng(seed), math.ceil(NOTES_PER_HOUR * seconds / 3600)
    onsets = random.uniform(0, seconds - 1, count)
    intervals = np.stack([onsets, onsets + random.exponential(0.4, count).clip(0.05, 1)], axis=1)
    return Notes(intervals, random.normal(64, 12, count).round().clip(MIN_MIDI, MAX_MIDI), np.full(count, 80))


def some_recordings(count: int, seconds: int) -> list[Recording]:
    audio = np.resize(audio_to_int16(tones()), seconds * SAMPLE_RATE)
    return [Recording(str(seed), audio.copy(), some_notes(seconds, seed)) for seed in range(count)]


def mapped_recordings(folder: Path, count: int, seconds: int) -> list[Recording]:
    """Recordings mapped like those in the cache. Their files are holes of silence: they take no room, and little of the disk's time."""
    recordings = []
    for seed in range(count):
        with open(folder / f"{seed}.int16", "ab") as file:
            file.truncate(2 * seconds * SAMPLE_RATE)
        recordings.append(Recording(str(seed), np.memmap(file.name, np.int16, "r"), some_notes(seconds, seed)))
    return recordings


@torch.no_grad()
def listen_for_music(net: nn.Module, logits_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Spread and shift an untrained model's outputs until it hears about as much as there is in music: decoding needs its work."""
    for number, head, rate in ((1, "onset", ONSET_RATE), (0, "combined", FRAME_RATE)):  # frames after the onsets they hear of
        logit = logits_of(torch.from_numpy(tones()))[number].float().cpu()              # (T, K)
        level = logit.quantile(1 - rate, dim=0)
        if head == "onset":  # an onset is a rise, and may last some frames
            rises = ((logit[1:] > level) & (logit[:-1] <= level)).sum()
            level = logit.quantile(float(1 - rate * (rate * logit.numel() / rises).clamp(max=10)), dim=0)
        spread, layer, path = 3 / logit.std(dim=0), getattr(net, f"{head}_fc"), getattr(net, f"{head}_path", None)
        for linear in (layer, path) if path else (layer,):
            linear.weight *= spread[:, None].to(linear.weight.device)
        layer.bias.copy_((layer.bias.cpu() - level) * spread)


@cache
def probabilities(minutes: float) -> tuple[np.ndarray, np.ndarray]:
    """Onset and frame probabilities (T, 88) float32: on each key a random walk less a late copy of it, high as often as in music."""
    random, n_frames = np.random.default_rng(0), round(60 * minutes * SAMPLE_RATE / HOP_SIZE)
    rolls = []
    for width, rate in ((2, ONSET_RATE), (30, FRAME_RATE)):
        walk = random.standard_normal((n_frames + width, N_KEYS)).cumsum(axis=0)
        level = walk[width:] - walk[:-width]
        rolls.append((1 / (1 + np.exp(np.quantile(level[:10000], 1 - rate) - level))).astype(np.float32))
    return rolls[0], rolls[1]
