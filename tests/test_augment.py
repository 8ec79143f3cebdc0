"""Augmentation: what each part does to a click, a tone, noise and silence, measured on what comes out."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import augment as augment_module
from augment import augment, equaliser, room, transform_length, transposed
from constants import HOP_SIZE, SAMPLE_RATE

CPU = torch.device("cpu")
SECOND = SAMPLE_RATE
ALL = {"gain_db": 12, "equalise_db": 6, "room_probability": 1, "noise_probability": 1}
NONE = dict.fromkeys(ALL, 0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def augmented(audio: Tensor, **some: float) -> Tensor:
    return augment(audio, **{**NONE, **some})


def click(samples: int, place: int, batch: int = 1) -> Tensor:
    audio = torch.zeros(batch, samples)
    audio[:, place] = 1
    return audio


def tone(hertz: float, samples: int = SECOND) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(samples) / SAMPLE_RATE)[None]


def power(audio: Tensor) -> Tensor:
    return audio.square().mean(dim=-1)


def decibels_of(ratio: Tensor | float) -> np.ndarray:
    return 10 * np.log10(np.asarray(ratio, dtype=np.float64))


# --- the whole ---

@pytest.mark.parametrize("batch, samples", [(1, 1), (1, HOP_SIZE), (3, 5 * HOP_SIZE + 1), (2, 102400)])
@pytest.mark.parametrize("kind", ["silence", "constant", "full scale noise", "click"])
def test_any_audio_gives_as_much_finite_audio(batch, samples, kind):
    audio = {"silence": torch.zeros(batch, samples), "constant": torch.ones(batch, samples),
             "full scale noise": 2 * torch.rand(batch, samples) - 1, "click": click(samples, samples // 2, batch)}[kind]
    kept = audio.clone()
    made = augment(audio, **ALL)
    assert made.shape == audio.shape and made.dtype == torch.float32 and torch.isfinite(made).all()
    assert torch.equal(audio, kept)  # what came in is left as it was
    assert (made.abs().amax(dim=1) > 0).all() == (kind != "silence")


def test_asked_for_nothing_it_does_nothing():
    audio = torch.randn(2, 1000)
    state = torch.get_rng_state()
    assert torch.equal(augment(audio, **NONE), audio)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("part", ALL)
def test_the_seed_draws_it_and_each_segment_differs(part):
    audio = tone(440).repeat(3, 1)

    def made(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return augmented(audio, **{part: 1})

    assert torch.equal(made(1), made(1)) and not torch.equal(made(1), made(2))
    one, two, three = made(1)
    assert not torch.equal(one, two) and not torch.equal(two, three) and not torch.equal(one, tone(440)[0])


@pytest.mark.parametrize("place", [0, 1, 5000, 2 * SECOND - 1])
def test_without_a_room_a_click_stays_in_its_sample(place):
    made = augmented(click(2 * SECOND, place, batch=20), equalise_db=6, noise_probability=1)
    assert made.abs().argmax(dim=1).tolist() == [place] * 20


@pytest.mark.parametrize("place", [0, 1, 5000, 2 * SECOND - 300])
@pytest.mark.parametrize("direct_db, samples", [(-10, 148), (0, 47), (5, 26)])  # 3.2, 1 and 0.56 m
def test_in_a_room_a_click_is_as_late_as_its_way_is_long(monkeypatch, place, direct_db, samples):
    monkeypatch.setattr(augment_module, "DIRECT_DB", (direct_db, direct_db))
    made = augmented(click(2 * SECOND, place, batch=20), equalise_db=6, room_probability=1)
    assert made.abs().argmax(dim=1).tolist() == [place + samples] * 20


@pytest.mark.parametrize("part", ["room_probability", "noise_probability"])
def test_half_of_the_segments_are_left_alone(part):
    audio = torch.randn(200, 4 * HOP_SIZE)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(audio, augmented(audio, **{part: 0.5}))]
    assert 70 < sum(same) < 130  # 100 expected, standard deviation 7


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000, 36864, 122880, 122881, 348160])
def test_transforms_have_only_small_factors(n):
    length = transform_length(n)
    rest = length
    for factor in (2, 3, 5, 7, 11, 13):
        while rest % factor == 0:
            rest //= factor
    assert rest == 1 and n <= length <= 1.125 * n


# --- gain ---

def test_gain_makes_segments_softer_by_up_to_its_decibels():
    made = decibels_of(power(augmented(torch.full((300, HOP_SIZE), 0.5), gain_db=12)) / 0.25)
    assert -12.01 <= made.min() < -11 and -1 < made.max() <= 0.01
    assert abs(made.mean() + 6) < 0.7


# --- equaliser ---

@pytest.mark.parametrize("hertz, expected", [(1000, 6), (500, 0), (707.1, 3), (1414.2, 3), (2000, 0), (100, 0), (4000, 0), (7900, 0)])
def test_a_raised_octave_band_raises_its_tones(monkeypatch, hertz, expected):
    """6 dB at 1 kHz alone, half of it half an octave away, none from a whole octave on."""
    bands = torch.zeros(1, 9)
    bands[0, 5] = 6
    monkeypatch.setattr(augment_module, "uniform", lambda *_, **__: bands)
    middle = slice(SECOND // 4, -SECOND // 4)
    audio = tone(hertz)
    made = augmented(audio, equalise_db=6)
    assert decibels_of(power(made[:, middle]) / power(audio[:, middle])) == pytest.approx(expected, abs=0.1)


def test_the_response_spreads_over_its_range_and_has_no_steps():
    response = 20 * equaliser(200, 32000, 6, CPU).log10()
    assert response.shape == (200, 16001)
    assert -6.001 <= response.min() < -5.5 and 5.5 < response.max() <= 6.001
    assert response[:, :62].diff().abs().max() == 0  # below the lowest band as in it
    low, high = response[:, 62:200], response[:, 2000:]
    assert 0 < high.diff().abs().max() < 0.02 and low.diff().abs().max() < 0.5  # 12 dB an octave at most, and 0.5 Hz a bin


# --- room ---

WAY = 47  # samples that sound takes for CRITICAL_DISTANCE


@pytest.fixture
def one_room(monkeypatch):
    """Every room the same: 0.5 s at all frequencies, as loud as the direct sound, which is WAY samples late."""
    for name, both in (("REVERB_SECONDS", 0.5), ("DAMPING", 1.0), ("DIRECT_DB", 0.0)):
        monkeypatch.setattr(augment_module, name, (both, both))


def test_reverberation_falls_by_sixty_decibels_in_its_time(one_room):
    heard = augmented(click(2 * SECOND, 0, batch=50), room_probability=1)
    level = decibels_of(heard[:, WAY : WAY - 800].square().reshape(50, -1, 800).mean(dim=(0, 2)))  # in steps of 50 ms
    assert np.diff(level[1:9]) == pytest.approx(np.full(7, -6), abs=1)
    assert level[1] - level[9] == pytest.approx(48, abs=1.5)


def test_direct_sound_and_reverberation_have_the_drawn_ratio(one_room):
    heard = augmented(click(2 * SECOND, 0, batch=50), room_probability=1)
    direct, tail = heard[:, WAY].square(), heard[:, WAY + 1 :].square().sum(dim=1)
    assert (heard[:, WAY] > 0.65).all()  # sqrt(1 / 2), and what the crossover smears into it
    assert decibels_of(direct / tail) == pytest.approx(np.zeros(50), abs=0.7)
    torch.testing.assert_close(direct + tail, torch.ones(50), atol=0.15, rtol=0)


def test_a_room_is_silent_before_the_click_and_does_not_wrap():
    """From the last sample on there is nothing but the padding to ring in."""
    heard = augmented(click(SECOND, SECOND - 1, batch=20), room_probability=1)
    assert heard[:, : SECOND - 100].abs().max() < 1e-4
    early = augmented(click(2 * SECOND, SECOND, batch=20), room_probability=1)
    assert early[:, : SECOND - 100].abs().max() < 1e-4 < early[:, SECOND + 100 :].abs().max()


def test_late_reverberation_is_darker(one_room, monkeypatch):
    """In 0.2 s of 0.5 low frequencies lose 24 dB, high ones twice that until the low tail's rest among them is louder."""
    monkeypatch.setattr(augment_module, "DAMPING", (0.5, 0.5))
    heard = augmented(click(2 * SECOND, 0, batch=50), room_probability=1)

    def lost(first_hertz: int, last_hertz: int) -> float:
        """From 0.05 to 0.25 s, in dB, of the power between two frequencies."""
        early, late = (torch.fft.rfft(heard[:, at : at + 800]).abs().square()[:, first_hertz // 20 : last_hertz // 20].sum() for at in (800, 4000))
        return float(decibels_of(early / late))

    assert lost(100, 1000) == pytest.approx(24, abs=1.5) and 30 < lost(3500, 8000) < 48


def test_rooms_keep_the_loudness_on_average():
    audio = torch.randn(50, 4 * SECOND)
    change = decibels_of(power(augmented(audio, room_probability=1)[:, SECOND:]) / power(audio[:, SECOND:]))
    assert abs(change.mean()) < 0.3 and abs(change).max() < 2


def test_no_room_is_no_change():
    assert torch.equal(room(3, 100 + augment_module.REVERB_SAMPLES, 0, CPU).abs(), torch.ones(3, 10291))


# --- noise ---

@pytest.mark.parametrize("slope", [0.0, 1.0])
@pytest.mark.parametrize("samples", [10 * HOP_SIZE, 102400])
def test_noise_has_the_drawn_level(monkeypatch, samples, slope):
    monkeypatch.setattr(augment_module, "SNR_DB", (30.0, 30.0))
    monkeypatch.setattr(augment_module, "NOISE_SLOPE", (slope, slope))
    audio = tone(440, samples) * torch.logspace(-3, 0, 20)[:, None]  # whatever the segment's own level
    added = augmented(audio, noise_probability=1) - audio
    ratio = decibels_of(power(audio) / power(added))
    assert ratio.mean() == pytest.approx(30, abs=0.5) and abs(ratio - 30).max() < 3


@pytest.mark.parametrize("slope, expected", [(0.0, 3), (1.0, 0)])
def test_white_noise_gains_three_decibels_an_octave_and_pink_none(monkeypatch, slope, expected):
    monkeypatch.setattr(augment_module, "SNR_DB", (0.0, 0.0))
    monkeypatch.setattr(augment_module, "NOISE_SLOPE", (slope, slope))
    audio = tone(50).repeat(20, 1)
    spectrum = torch.fft.rfft(augmented(audio, noise_probability=1) - audio).abs().square().mean(dim=0)  # 1 Hz a bin
    octaves = decibels_of(torch.stack([spectrum[low : 2 * low].sum() for low in (125, 250, 500, 1000, 2000, 4000)]))
    assert np.diff(octaves) == pytest.approx(np.full(5, expected), abs=0.7)


def test_noise_levels_spread_over_their_range():
    audio = tone(440).repeat(200, 1)
    ratio = decibels_of(power(audio) / power(augmented(audio, noise_probability=1) - audio))
    low, high = augment_module.SNR_DB
    assert low - 1 < ratio.min() < low + 3 and high - 3 < ratio.max() < high + 1


# --- transposing ---

def test_transposed_rolls_lose_what_leaves_the_keyboard():
    roll = torch.zeros(3, 2, 88)
    roll[:, 0, 0], roll[:, 1, 87] = 1, 0.5
    up, same, down = transposed(roll, torch.tensor([2, 0, -2]))
    assert up.nonzero().tolist() == [[0, 2]] and up[0, 2] == 1
    assert torch.equal(same, roll[1])
    assert down.nonzero().tolist() == [[1, 85]] and down[1, 85] == 0.5
