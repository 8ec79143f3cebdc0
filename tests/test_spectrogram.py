"""The spectrogram and its filters against tones and clicks, and the tuning of what is played."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from constants import HOP_SIZE, N_MELS, SAMPLE_RATE
from spectrogram import TUNING_WINDOW, LogMelSpectrogram, shifted_filters, tuning_of


def tone(hertz: float, samples: int = SAMPLE_RATE) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(samples) / SAMPLE_RATE)[None]


# --- the spectrogram ---

def test_window_t_is_centred_in_frame_t():
    """A click in the middle of frame 10 is loudest there, and equally soft in frames 9 and 11."""
    audio = torch.zeros(1, 20 * HOP_SIZE)
    audio[0, 10 * HOP_SIZE + HOP_SIZE // 2] = 1.0
    mel = LogMelSpectrogram()(audio)[0].exp().sum(dim=1)
    assert mel.shape == (20,) and int(mel.argmax()) == 10
    torch.testing.assert_close(mel[9], mel[11], rtol=1e-3, atol=0)
    assert mel[9] < mel[10] / 2 and (mel[[8, 12]] < mel[10] / 1e4).all()  # the window's edges are two frames away


def test_log_mel_of_silence_is_the_logarithm_of_the_clamp():
    mel = LogMelSpectrogram()(torch.zeros(2, 5 * HOP_SIZE))
    assert mel.shape == (2, 5, N_MELS)
    torch.testing.assert_close(mel, torch.full_like(mel, math.log(1e-9)))


def test_mel_bands_rise_with_frequency():
    time = torch.arange(20 * HOP_SIZE) / SAMPLE_RATE
    bands = [int(LogMelSpectrogram()(torch.sin(2 * math.pi * hertz * time)[None])[0, 10].argmax()) for hertz in (110, 440, 1760, 7000)]
    assert bands == sorted(set(bands)) and bands[-1] > 200


# --- filters ---

def test_without_a_shift_the_filters_are_the_spectrograms_own():
    own = LogMelSpectrogram().melspectrogram.mel_scale.fb
    torch.testing.assert_close(shifted_filters(torch.zeros(2)), own.expand(2, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("semitones", [-3, -0.2, 0.2, 1.0])
@pytest.mark.parametrize("hertz", [220, 880, 3520])
def test_a_shifted_tone_looks_like_the_tone_at_that_pitch(semitones, hertz):
    log_mel = LogMelSpectrogram()
    detuned = log_mel(tone(hertz), shifted_filters(torch.tensor([float(semitones)])))[0, 5:-5].exp()
    plain, played = (log_mel(tone(pitch))[0, 5:-5].exp() for pitch in (hertz, hertz * 2 ** (semitones / 12)))

    def middle(mel: Tensor) -> float:
        """The mean band, weighted by power."""
        return float((mel.sum(dim=0) * torch.arange(N_MELS)).sum() / mel.sum())

    assert middle(detuned) == pytest.approx(middle(played), abs=0.15)
    assert (middle(detuned) > middle(plain) + 0.05) == (semitones > 0)
    assert abs(detuned.sum() / played.sum() - 1) < 0.1


def test_every_segment_has_its_own_shift():
    asked = torch.tensor([-2.0, -0.1, 0.0, 0.2, 3.0])
    filters = shifted_filters(asked)
    assert filters.shape == (5, 1025, N_MELS) and (filters >= 0).all() and (filters <= 1).all()
    centre = (filters * torch.arange(1025)[:, None]).sum(dim=1) / filters.sum(dim=1)  # of each filter, in bins
    own = LogMelSpectrogram().melspectrogram.mel_scale.fb
    plain = (own * torch.arange(1025)[:, None]).sum(dim=0) / own.sum(dim=0)
    heard = (12 * (plain / centre).log2())[:, 100:180].mean(dim=1)  # filters moved down hear what is there as higher
    torch.testing.assert_close(heard, asked, atol=0.01, rtol=0)


# --- tuning ---

def played(pitches: list[int], semitones: float = 0.0, stiffness: float = 0.0, seconds: float = 0.5) -> Tensor:
    """Decaying notes of ten partials, one after the other, sharper by so many semitones than A4 = 440 Hz; of stiff strings the upper partials are sharper still."""
    time = torch.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    notes = []
    for pitch in pitches:
        hertz = 440 * 2 ** ((pitch - 69 + semitones) / 12)
        partials = [(n, n * hertz * math.sqrt(1 + stiffness * n**2)) for n in range(1, 11)]
        notes.append(sum(0.1 / n * torch.sin(2 * math.pi * f * time + n) for n, f in partials if f < 7500) * torch.exp(-3 * time))
    return torch.cat(notes)


@pytest.mark.parametrize("semitones", [-0.55, -0.4, -0.15, 0.0, 0.07, 0.35])
def test_the_tuning_of_a_piano_is_told(semitones):
    scale = [36, 48, 52, 55, 60, 64, 67, 72, 79, 84]
    plain, stiff = played(scale, semitones), played(scale, semitones, 3e-4)
    noisy = plain + 0.01 * torch.randn(len(plain), generator=torch.Generator().manual_seed(0))
    assert tuning_of(torch.stack([plain, stiff, noisy, 1e-4 * plain])).tolist() == pytest.approx([semitones] * 4, abs=0.02)
    assert tuning_of(played([60], semitones)[None]).item() == pytest.approx(semitones, abs=0.05)
    assert tuning_of(plain.repeat(15)[None]).item() == pytest.approx(semitones, abs=0.02)  # more than is looked at in one go


def test_recordings_have_each_their_own_tuning():
    scale, found = [48, 60, 64, 67], [-0.3, 0.2, 0.0]
    assert tuning_of(torch.stack([played(scale, semitones) for semitones in found])).tolist() == pytest.approx(found, abs=0.02)


def test_a_piano_a_semitone_off_is_in_tune():
    assert tuning_of(played([60, 64, 67], 1.0)[None]).item() == pytest.approx(0, abs=0.02)


def test_what_is_no_piano_has_no_tuning():
    random = torch.Generator().manual_seed(1)
    for seconds in (0.3, 1, 10):
        white = torch.randn(round(seconds * SAMPLE_RATE), generator=random)
        assert not tuning_of(torch.stack([white, white.cumsum(0) / 100])).any()
    for audio in (torch.zeros(0), torch.zeros(SAMPLE_RATE), played([60])[: TUNING_WINDOW - 1], torch.full((SAMPLE_RATE,), torch.nan)):
        assert tuning_of(audio[None]).tolist() == [0]
    out_of_tune = torch.cat([played([60], semitones) for semitones in np.arange(0, 1, 0.1)])
    assert tuning_of(out_of_tune[None]).tolist() == [0]
