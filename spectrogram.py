"""What all models hear: the log-mel spectrogram, its filters, and how a recording's level and tuning are told.

Shapes: B batch, S samples, T frames, F Fourier bins, M mel bands.
"""

import math

import torch
import torchaudio
from torch import Tensor, nn

from constants import F_MAX, F_MIN, HOP_SIZE, N_FFT, N_MELS, SAMPLE_RATE

SIDE = (N_FFT - HOP_SIZE) // 2  # samples that a Fourier window reaches past its frame on either side
TUNING_WINDOW = 4096     # samples, 0.26 s
TUNED_BY = (150, 1500)   # Hz; below, keys lie too near to each other for that window, above, partials are ever sharper
IN_COMMON = 0.5          # of their power, below which peaks have no common tuning; pianos have 0.7 to 0.98
SHARPEST = 0.4           # semitones, A4 = 450 Hz; what seems sharper is taken for flat, as pianos go that are seldom tuned


def frequencies(n: int, device: torch.device) -> Tensor:
    """(F,) in Hz, of the Fourier transform of n samples."""
    return torch.fft.rfftfreq(n, 1 / SAMPLE_RATE, device=device)


def hertz_to_mel(hertz: Tensor) -> Tensor:
    """HTK's mel scale, that of the spectrogram's filters."""
    return 2595 * torch.log10(1 + hertz / 700)


def shifted_filters(semitones: Tensor) -> Tensor:
    """(B,) semitones -> (B, F, M) mel filters that hear each segment so much sharper, and not faster.

    They are the triangles of the plain filter bank (HTK's mel scale), where the Fourier bin at f Hz counts as the one at
    f * 2 ** (semitones / 12). Hawthorne et al. 2019 detune by up to 0.1 semitones, Transkun by 0.2; whole semitones are ours.
    """
    device = semitones.device
    corners = torch.linspace(*hertz_to_mel(torch.tensor([F_MIN, F_MAX], dtype=torch.float64)).tolist(), N_MELS + 2, device=device)
    corners = 700 * (10 ** (corners / 2595) - 1)                                                        # (M + 2,) Hz
    heard = frequencies(N_FFT, device) * 2 ** (semitones[:, None] / 12)                                 # (B, F)
    slopes = (heard[..., None] - corners[:-1]) / corners.diff()                                         # (B, F, M + 1)
    return torch.minimum(slopes[..., :-1], 1 - slopes[..., 1:]).clamp(min=0)


class LogMelSpectrogram(nn.Module):
    """Audio to the natural log of its mel power, clamped at 1e-9; window t is centred where `notes.py` puts frame t."""

    def __init__(self) -> None:
        super().__init__()
        self.melspectrogram = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, N_FFT, hop_length=HOP_SIZE, f_min=F_MIN, f_max=F_MAX, n_mels=N_MELS, center=False, power=None)

    def forward(self, audio: Tensor, filters: Tensor | None = None) -> Tensor:
        """(B, S) float in [-1, 1] -> (B, S // HOP_SIZE, M); `filters` (B, F, M) or (F, M) may stand in for the mel filters."""
        return self.of_padded(nn.functional.pad(audio, (SIDE, SIDE)), filters)

    def of_padded(self, audio: Tensor, filters: Tensor | None = None) -> Tensor:
        """The same for audio that comes with SIDE samples before its first frame and after its last."""
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = self.melspectrogram.spectrogram(audio.float())                               # (B, F, T) complex
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # its magnitude, squared, would need a root
            filters = self.melspectrogram.mel_scale.fb if filters is None else filters
            return (power.transpose(1, 2) @ filters).clamp(min=1e-9).log()                          # (B, T, F) @ (F, M)


def whole_parts(audio: Tensor, samples: int) -> Tensor:
    """(S,) -> (S // samples, samples), without a copy."""
    return audio[: len(audio) // samples * samples].view(-1, samples)


def power_without_pauses(parts: Tensor) -> Tensor:
    """(N, S) stretches of a recording -> (N,) their power, 0 where it is more than 10 dB below the mean, as in ITU-R BS.1770."""
    power = torch.linalg.vector_norm(parts, dim=1).square() / parts.shape[1]
    return power * (power > power.mean() / 10)


def tuning_of(audio: Tensor) -> Tensor:
    """(B, S) recordings -> (B,) by how many semitones, from SHARPEST - 1 to SHARPEST, their pianos are sharper than A4 = 440 Hz.

    The peaks of a spectrum lie so far beside the pitches of the keys: their circular mean, each counting by its power (Dressler &
    Streich, "Tuning Frequency Estimation Using Circular Statistics", ISMIR 2007). 0 where they have hardly anything in common, as in
    noise, and of less than a window. What lies farther off is heard in tune, but on other keys.
    """
    low, high = (round(hertz * TUNING_WINDOW / SAMPLE_RATE) for hertz in TUNED_BY)
    bins, window = torch.arange(low, high, device=audio.device), torch.hann_window(TUNING_WINDOW, device=audio.device)
    count = audio.shape[1] // TUNING_WINDOW
    windows = audio[:, : count * TUNING_WINDOW].view(len(audio), count, TUNING_WINDOW)
    total, resultant = torch.zeros(len(audio), device=audio.device), torch.zeros(len(audio), device=audio.device, dtype=torch.complex64)
    for first in range(0, count, 64):  # not all at once, which would be a copy of the recording
        power = torch.fft.rfft(windows[:, first : first + 64] * window).abs().square()[..., low - 1 : high + 1]  # (B, N, F + 2)
        before, here, after = (power.clamp(min=1e-20).log()[..., start : start + len(bins)] for start in range(3))
        is_peak = (here > before) & (here >= after)
        place = bins + torch.where(is_peak, (before - after) / (before - 2 * here + after) / 2, 0)  # of the parabola through three bins
        power = power[..., 1:-1] * is_peak
        semitones = 12 * torch.log2(place * (SAMPLE_RATE / TUNING_WINDOW / 440))
        total, resultant = total + power.sum(dim=(1, 2)), resultant + torch.polar(power, 2 * math.pi * semitones).sum(dim=(1, 2))
    semitones = resultant.angle() / (2 * math.pi)                                                                # -0.5 to 0.5
    return torch.where(resultant.abs() > IN_COMMON * total, semitones - (semitones > SHARPEST).float(), 0)
