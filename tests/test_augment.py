"""Augmented segments: what changes, what must not, at the edges too."""

import pytest
import torch

import augment
from augment import augment as applied
from constants import HOP_SIZE, SAMPLE_RATE


def noise_of(batch: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("batch, samples", [(1, HOP_SIZE), (3, 5 * HOP_SIZE), (2, 16001)])
def test_shape_and_kind_stay(batch, samples):
    heard = applied(noise_of(batch, samples), 6, 1, 1)
    assert heard.shape == (batch, samples) and heard.dtype == torch.float32 and heard.isfinite().all()


def test_nothing_asked_for_changes_nothing():
    audio = noise_of(2, 4000)
    assert applied(audio, 0, 0, 0) is audio


def test_silence_stays_silent():
    assert not applied(torch.zeros(2, 8000), 6, 1, 1).any()


def test_the_seed_alone_decides():
    audio = noise_of(2, 8000)
    torch.manual_seed(3)
    first = applied(audio, 6, 0.5, 0.5)
    torch.manual_seed(3)
    assert torch.equal(applied(audio, 6, 0.5, 0.5), first)
    assert not torch.equal(applied(audio, 6, 0.5, 0.5), first)


def test_segments_of_a_batch_differ():
    heard = applied(noise_of(1, 8000).repeat(2, 1), 6, 1, 0)
    assert not torch.allclose(heard[0], heard[1], atol=1e-3)


def test_a_room_answers_after_the_direct_sound():
    click = torch.zeros(20, 32000)
    click[:, 1000] = 1
    heard = applied(click, 0, 1, 0)
    assert heard[:, :1000].abs().max() < 0.02  # the dark tail's own smoothing
    assert (heard[:, 1000] - 1).abs().max() < 0.3 and (heard.abs().argmax(1) == 1000).all()
    after = heard[:, 1001:].square().sum(1)
    low, high = (10 ** (-db / 10) for db in reversed(augment.DIRECT_DB))
    assert (after > 0.5 * low).all() and (after < 1.5 * high).all()
    early, late = heard[:, 1000 : 1000 + 3200].square().sum(1), heard[:, -3200:].square().sum(1)
    assert (late < 0.01 * early).all()


def test_a_room_probability_of_a_half_leaves_half_alone():
    audio = noise_of(200, 2048)
    dry = (applied(audio, 0, 0.5, 0) - audio).abs().amax(1) < 1e-5
    assert 70 < dry.sum() < 130


def test_the_equaliser_stays_in_its_range():
    hertz = torch.linspace(0, SAMPLE_RATE / 2, 500)
    decibels = 20 * augment.equaliser(noise_of(50, 1), hertz, 6.0).log10()
    assert decibels.abs().max() <= 6 + 1e-3 and decibels.std() > 2
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)[None]
    heard = applied(tone.repeat(20, 1), 6, 0, 0)[:, 4000:-4000]  # a filter has an edge to swing in at
    gain = 20 * (heard.square().mean(1) / 0.5).sqrt().log10()
    assert gain.abs().max() <= 6.1 and gain.std() > 1
    lag = torch.nn.functional.cosine_similarity(heard, tone[:, 4000:-4000])
    assert lag.min() > 0.999  # it moves nothing in time


def test_noise_is_as_loud_as_drawn(monkeypatch):
    monkeypatch.setattr(augment, "SNR_DB", (20.0, 20.0))
    audio = noise_of(4, 65536)
    added = applied(audio, 0, 0, 1) - audio
    assert torch.allclose(added.square().mean(1) / audio.square().mean(1), torch.full((4,), 0.01), rtol=0.1)
