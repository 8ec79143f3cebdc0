"""Augmentation on the fly: what other microphones and rooms would have made of a batch of segments.

All of it is one multiplication between a Fourier transform and its inverse. Every parameter is drawn for each segment by itself
from torch's own random numbers, on the batch's device. Ranges follow those that Onsets and Frames (Hawthorne et al., ICLR
2019) and Transkun (Yan & Duan, ISMIR 2024) train with.
"""

import torch
from torch import Tensor

from constants import F_MAX, F_MIN, SAMPLE_RATE

BANDS = 8                  # of the equaliser, at equal distances in log-frequency
REVERBERATION = (0.15, 1.2)  # seconds until it has decayed by 60 dB
DIRECT_DB = (-3.0, 15.0)   # energy of the direct sound over that of the reverberation
PREDELAY = (0.002, 0.02)   # seconds from the direct sound to the first reflection
DAMPING = (1000.0, 8000.0)  # Hz, above which the reverberation is darker than the sound
SNR_DB = (15.0, 50.0)      # of the noise
NOISE_SLOPE = (0.0, 1.0)   # its power falls with frequency to this power: from white to pink


def uniform(like: Tensor, low: float, high: float) -> Tensor:
    """(B, S) -> (B, 1), a number for each segment."""
    return torch.empty(len(like), 1, device=like.device).uniform_(low, high)


def log_uniform(like: Tensor, low: float, high: float) -> Tensor:
    return (uniform(like, 0, 1) * torch.tensor(high / low).log()).exp() * low


def equaliser(audio: Tensor, hertz: Tensor, range_db: float) -> Tensor:
    """Gain at each frequency, (B, F): up to `range_db` up or down in each band, and straight lines between them."""
    gains = torch.empty(len(audio), BANDS, device=audio.device).uniform_(-range_db, range_db)
    place = (hertz.clamp(F_MIN, F_MAX) / F_MIN).log() / torch.tensor(F_MAX / F_MIN).log() * (BANDS - 1)
    below = place.long().clamp(max=BANDS - 2)
    decibels = torch.lerp(gains[:, below], gains[:, below + 1], place - below)
    return 10 ** (decibels / 20)


def room(audio: Tensor, hertz: Tensor, probability: float) -> Tensor:
    """Frequency response of a made-up room, (B, F) complex: the direct sound at once, then noise that decays exponentially.

    The model of a diffuse field in Moorer, "About this reverberation business", 1979.
    """
    n = 2 * (len(hertz) - 1)
    seconds = torch.arange(round(REVERBERATION[1] * SAMPLE_RATE), device=audio.device) / SAMPLE_RATE
    tail = torch.randn(len(audio), len(seconds), device=audio.device) * (seconds >= uniform(audio, *PREDELAY))
    tail = torch.fft.rfft(tail * 10 ** (-3 * seconds / log_uniform(audio, *REVERBERATION)), n)
    tail = tail / (1 + (hertz / log_uniform(audio, *DAMPING)) ** 2)
    energy = tail.abs().square().mean(1, keepdim=True)  # Parseval; that of the direct sound is 1
    loudness = (10 ** (-uniform(audio, *DIRECT_DB) / 10) / energy).sqrt() * (uniform(audio, 0, 1) < probability)
    return 1 + loudness * tail


def noise(spectrum: Tensor, hertz: Tensor, probability: float) -> Tensor:
    """Spectrum of noise, (B, F) complex, at a random distance from the energy of `spectrum`."""
    slope = (hertz.clamp(min=F_MIN) / F_MIN) ** (-uniform(spectrum, *NOISE_SLOPE) / 2)
    drawn = torch.view_as_complex(torch.randn(*spectrum.shape, 2, device=spectrum.device)) * slope
    ratio = spectrum.abs().square().sum(1, keepdim=True) / drawn.abs().square().sum(1, keepdim=True)
    loudness = (ratio * 10 ** (-uniform(spectrum, *SNR_DB) / 10)).sqrt()
    return drawn * loudness * (uniform(spectrum, 0, 1) < probability)


@torch.no_grad()
def augment(audio: Tensor, equaliser_db: float, room_probability: float, noise_probability: float) -> Tensor:
    """Every segment as through another microphone, in another room, with another noise.

    Args:
        audio: (B, S) float32; silence stays silent.
        equaliser_db: gain of each band of the equaliser, up or down at most.
        room_probability, noise_probability: how often a segment is reverberant, and noisy.

    Returns:
        (B, S) float32. The direct sound stays where it is in time.
    """
    if not (equaliser_db or room_probability or noise_probability):
        return audio
    n_samples = audio.shape[1]
    n = 1 << (n_samples + round(REVERBERATION[1] * SAMPLE_RATE) - 1).bit_length()  # nothing comes round to the beginning
    hertz = torch.arange(n // 2 + 1, device=audio.device) * (SAMPLE_RATE / n)
    spectrum = torch.fft.rfft(audio, n) * (equaliser(audio, hertz, equaliser_db) * room(audio, hertz, room_probability))
    hiss = noise(spectrum, hertz, noise_probability) * (n / n_samples) ** 0.5  # of which the segment is only a part
    return torch.fft.irfft(spectrum + hiss, n)[:, :n_samples]
