"""Augmentation on the fly: the same performance on another piano, in another room, through another microphone.

Hawthorne et al., ICLR 2019, and after them Transkun and aria-amt train with such chains so that a transcriber holds on
recordings unlike those it learnt from. Here they are batched torch operations on the batch's device: all that changes the
spectrum is one multiplication between a Fourier transform and its inverse. Every segment gets its own random numbers, drawn
from torch's generator of that device, which training seeds for every step. Where a segment is transposed, its
labels move along the keyboard; in time they stay, but from across a room the sound comes late.

Shapes: B batch, S samples, F Fourier bins, M mel bands.
"""

import math

import torch
from torch import Tensor

from constants import SAMPLE_RATE
from spectrogram import frequencies

OCTAVE_BANDS = 9          # 31.25 Hz to 8 kHz, the bands of a graphic equaliser
REVERB_SAMPLES = 20480    # 1.28 s; a longer tail is cut off, where it has fallen by 50 dB and more
REVERB_SECONDS = (0.2, 1.5)   # until it has fallen by 60 dB (RT60); from a furnished living room to a concert hall
DAMPING = (0.3, 0.8)      # RT60 of the high frequencies by that of the low ones: air and soft walls swallow these first
CROSSOVER = 2000.0        # Hz, between the two
DIRECT_DB = (-15.0, 5.0)  # energy of the direct sound over that of the reverberation; from across the room to a microphone beside the piano
CRITICAL_DISTANCE = 1.0   # metres, where direct sound and reverberation are equally loud; it is more in a hall (Kuttruff, Room Acoustics)
SPEED_OF_SOUND = 343.0    # metres per second
LONGEST_WAY = math.ceil(10 ** (-DIRECT_DB[0] / 20) * CRITICAL_DISTANCE / SPEED_OF_SOUND * SAMPLE_RATE)  # samples
SNR_DB = (20.0, 50.0)     # of added noise
NOISE_SLOPE = (0.0, 1.0)  # power falls as 1 / f to this: white to pink
NOISE_FLAT = 20.0         # Hz, below which it falls no more


def uniform(low: float, high: float, *shape: int, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(*shape, device=device)


def decibels_to_factor(db: Tensor) -> Tensor:
    """Decibels to a factor of amplitude."""
    return torch.exp(db * (math.log(10) / 20))


def transform_length(n: int) -> int:
    """The next length from n on that is 8 to 16 times a power of two: a Fourier transform of any other can take four times as long."""
    step = 2 ** max(0, n.bit_length() - 4)
    return -(-n // step) * step


def equaliser(batch: int, n: int, most_db: float, device: torch.device) -> Tensor:
    """(B, F) factors: -most_db to most_db in each octave band, joined by straight lines over the logarithm of frequency.

    Real and positive, so without delay. Hawthorne et al. 2019 draw two bands of -10 to 5 dB, Transkun seven of +-3.
    """
    octave = (frequencies(n, device) / (SAMPLE_RATE / 2)).log2() + OCTAVE_BANDS - 1        # (F,) of bands; 0 Hz is -inf
    shares = 1 - (octave.clamp(min=0) - torch.arange(OCTAVE_BANDS, device=device)[:, None]).abs()
    return decibels_to_factor(uniform(-most_db, most_db, batch, OCTAVE_BANDS, device=device) @ shares.clamp(min=0))  # (B, 9) @ (9, F)


def room(batch: int, n: int, probability: float, device: torch.device) -> Tensor:
    """(B, F) complex transfer functions of rooms; with 1 - probability it is 1, no room at all.

    The direct sound, as late as its way is long, which its level tells: twice as far, it is half as loud. After it a diffuse tail:
    Gaussian noise that decays exponentially (Moorer, Computer Music Journal 1979; Polack 1988), faster at high frequencies. What
    comes out is on average as loud as what goes in.
    """
    longest = torch.exp(uniform(*map(math.log, REVERB_SECONDS), batch, device=device))
    seconds = torch.stack([longest, longest * uniform(*DAMPING, batch, device=device)], dim=1)[..., None]        # (B, 2, 1)
    time = torch.arange(1, REVERB_SAMPLES + 1, device=device) / SAMPLE_RATE
    tails = torch.randn(batch, 2, REVERB_SAMPLES, device=device) * decibels_to_factor(-60 * time / seconds)
    low, high = torch.fft.rfft(torch.nn.functional.pad(tails, (1, 0)), n).unbind(1)                              # (B, F) each
    share = 1 / (1 + (frequencies(n, device) / CROSSOVER) ** 4)                             # of the low tail's power
    tail = low * share.sqrt() + high * (1 - share).sqrt()
    tail = tail / tail.abs().square().mean(dim=1, keepdim=True).sqrt()                                           # of energy 1
    amount = decibels_to_factor(-uniform(*DIRECT_DB, batch, 1, device=device)) * (torch.rand(batch, 1, device=device) < probability)
    travel = (amount * CRITICAL_DISTANCE / SPEED_OF_SOUND * SAMPLE_RATE).round()  # (B, 1) samples
    phase = -2 * math.pi / SAMPLE_RATE * travel * frequencies(n, device)                                         # (B, F)
    return (1 + amount * tail) / (1 + amount.square()).sqrt() * torch.polar(torch.ones_like(phase), phase)  # exp is slower


def noise(spectrum: Tensor, n: int, samples: int, probability: float) -> Tensor:
    """(B, F) complex spectra of noise, white to pink, to be added to those of n samples, of which `samples` are not padding.

    Its power is SNR_DB below the segment's own, so silence stays silent; with 1 - probability there is none. aria-amt draws
    20 to 50 dB, Transkun 3 to 40.
    """
    batch, device = len(spectrum), spectrum.device
    slope = uniform(*NOISE_SLOPE, batch, 1, device=device)
    made = torch.randn_like(spectrum) * frequencies(n, device).clamp(min=NOISE_FLAT) ** (-slope / 2)
    signal_power, noise_power = ((x.abs().square().sum(dim=1, keepdim=True)) for x in (spectrum, made))
    level = decibels_to_factor(-uniform(*SNR_DB, batch, 1, device=device)) * (torch.rand(batch, 1, device=device) < probability)
    return made * level * (signal_power / noise_power * (n / samples)).sqrt()


def augment(audio: Tensor, gain_db: float, equalise_db: float, room_probability: float, noise_probability: float) -> Tensor:
    """Segments as another microphone might have heard them.

    Args:
        audio: (B, S) float32 in [-1, 1].
        gain_db: each segment is made softer by 0 to this many dB.
        equalise_db: each octave band is made softer or louder by up to this many dB.
        room_probability: of reverberation in a segment.
        noise_probability: of noise in a segment.

    Returns:
        (B, S) float32, which may leave [-1, 1]. With all four 0 it is the audio that came in.
    """
    batch, samples = audio.shape
    if equalise_db or room_probability or noise_probability:
        n = transform_length(samples + REVERB_SAMPLES + LONGEST_WAY)  # with room for the tail, or it would come back at the beginning
        spectrum = torch.fft.rfft(audio, n)                                                             # (B, S) -> (B, F)
        if equalise_db:
            spectrum = spectrum * equaliser(batch, n, equalise_db, audio.device)
        if room_probability:
            spectrum = spectrum * room(batch, n, room_probability, audio.device)
        if noise_probability:
            spectrum = spectrum + noise(spectrum, n, samples, noise_probability)
        audio = torch.fft.irfft(spectrum, n)[:, :samples]                                               # (B, F) -> (B, S)
    return audio * decibels_to_factor(-uniform(0, gain_db, batch, 1, device=audio.device)) if gain_db else audio


def transposed(roll: Tensor, keys: Tensor) -> Tensor:
    """(B, T, K) rolls, each moved up by so many of `keys` (B,); what leaves the keyboard is lost."""
    source = torch.arange(roll.shape[2], device=roll.device) - keys[:, None]                            # (B, K)
    inside = (source >= 0) & (source < roll.shape[2])
    return roll.gather(2, source.clamp(0, roll.shape[2] - 1)[:, None].expand_as(roll)) * inside[:, None]
