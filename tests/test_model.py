"""The transcribers against the course's numbers, chunked against whole inference, checkpoints good and broken."""

import contextlib
import copy
import dataclasses
import math
import re
import threading

import numpy as np
import pytest
import torch
from conftest import BROKEN, broken
from torch import Tensor, nn

import constants
import layers
import model as model_module
from audio import load_audio
from augment import equaliser
from constants import HOP_SIZE, N_FFT, N_KEYS, N_MELS
from layers import Dropout
from model import (
    AROUND,
    CHUNK_FRAMES,
    FRAME_RATE,
    HARMONICS,
    MODELS,
    ONSET_RATE,
    RELEASED,
    ConvStack,
    LogMelSpectrogram,
    Sizes,
    Transcriber,
    build_model,
    harmonic_filters,
    load_checkpoint,
    load_ensemble,
    model_of,
    n_parameters,
    read_checkpoint,
    save_checkpoint,
    share_checkpoint,
)
from notes import VELOCITY
from recipe import RECIPES, parse_recipe

SMALL = Sizes(4, 8, 8)
DEFAULT, COURSE = RECIPES["default"], RECIPES["course"]
ATTRIBUTES = {
    "baseline": {"frame_conv_stack", "frame_fc", "onset_conv_stack", "onset_fc"},
    "rnn": {"frame_lstm", "frame_fc", "onset_lstm", "onset_fc"},
    "crnn": {"frame_conv_stack", "frame_lstm", "frame_fc", "onset_conv_stack", "onset_lstm", "onset_fc"},
    "onf": {"frame_conv_stack", "frame_fc", "onset_conv_stack", "onset_lstm", "onset_fc", "combined_lstm", "combined_fc"},
}


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(name: str, recipe: str = "default") -> Transcriber:
    """A small transcriber in eval mode whose batch norms have seen audio and whose outputs move with it."""
    torch.manual_seed(3)
    model = build_model(name, SMALL, RECIPES[recipe])
    with torch.no_grad():
        model(noise(2, 20 * HOP_SIZE))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    model.velocity[:-1] += 2 * torch.randn(len(model.velocity) - 1, generator=torch.Generator().manual_seed(3))
    return model.eval()


def logits(model: Transcriber, audio: Tensor) -> tuple[Tensor, ...]:
    return model.infer(audio)[:2]


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch):
    """Neither bfloat16 nor bytes, whatever this machine is fast at."""
    monkeypatch.setattr(model_module, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    monkeypatch.setattr(model_module, "multiplies_bytes", lambda device: False)


# --- architecture ---

@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_have_the_names_of_the_course(name):
    model = build_model(name, SMALL, COURSE)
    parts = {part for part, module in model.named_children() if n_parameters(module)}
    assert parts == ATTRIBUTES[name]
    assert isinstance(model.melspectrogram, LogMelSpectrogram)
    if "frame_conv_stack" in parts:
        assert {part for part, module in model.frame_conv_stack.named_children() if n_parameters(module)} == {"cnn", "fc"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_samples", [HOP_SIZE, HOP_SIZE + 1, 3 * HOP_SIZE - 1, 10 * HOP_SIZE, 10 * HOP_SIZE + 300])
def test_one_row_of_logits_for_each_whole_frame(name, n_samples):
    model = build_model(name, SMALL).eval()
    with torch.no_grad():
        frame, onset = model(noise(3, n_samples))
    assert frame.shape == onset.shape == (3, n_samples // HOP_SIZE, N_KEYS)
    assert torch.isfinite(frame).all() and torch.isfinite(onset).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_courses_batch_gives_two_hundred_frames(name):
    with torch.no_grad():
        frame, onset = build_model(name, SMALL).eval()(noise(2, 102400))
    assert frame.shape == onset.shape == (2, 200, 88)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_outputs_are_logits_and_no_probabilities(name):
    """An output bias of 30 comes out as about 30 from a linear last layer, and as 1 from a sigmoid."""
    model = build_model(name, SMALL).eval()
    last = model.combined_fc if name == "onf" else model.frame_fc
    with torch.no_grad():
        last.bias.fill_(30)
        model.onset_fc.bias.fill_(-30)
        frame, onset = model(noise(1, 4 * HOP_SIZE))
    assert (frame > 5).all() and (onset < -5).all()


def conv_stack_count(c: int = 48, f: int = 256) -> int:
    """Convolutions 1->c, c->c, c->2c of 3 x 3 with biases, batch norms of c, c, 2c pairs, then 57 = 229 // 4 bands * 2c -> f."""
    return (9 * c + c) + 2 * c + (9 * c * c + c) + 2 * c + (9 * c * 2 * c + 2 * c) + 4 * c + (57 * 2 * c * f + f)


def lstm_count(inputs: int, h: int = 88) -> int:
    """Two directions of two layers; each has four gates with weights for its input and its own state, and two biases."""
    return 2 * (4 * h * (inputs + h) + 8 * h) + 2 * (4 * h * (2 * h + h) + 8 * h)


def linear_count(inputs: int) -> int:
    return inputs * 88 + 88


def test_parameters_of_the_course_baseline():
    assert n_parameters(build_model("baseline", recipe=COURSE)) == 2 * (conv_stack_count() + linear_count(256)) == 2_973_840


def test_parameters_of_the_course_rnn():
    # lstm_count(229) = 2 * (352 * 317 + 704) + 2 * (352 * 264 + 704) = 411,840
    assert lstm_count(229) == 411_840
    assert n_parameters(build_model("rnn", recipe=COURSE)) == 2 * (lstm_count(229) + linear_count(176)) == 854_832


def test_parameters_of_the_course_crnn():
    expected = 2 * (conv_stack_count() + lstm_count(256) + linear_count(176))
    assert n_parameters(build_model("crnn", recipe=COURSE)) == expected == 3_821_456


def test_parameters_of_the_course_onf():
    frame = conv_stack_count() + linear_count(256) + lstm_count(176) + linear_count(176)
    onset = conv_stack_count() + lstm_count(256) + linear_count(176)
    assert n_parameters(build_model("onf", recipe=COURSE)) == frame + onset == 1_877_024 + 1_910_728


@pytest.mark.parametrize("name, passed", [("baseline", 0), ("rnn", 2 * 229), ("crnn", 2 * 256), ("onf", 256)])
def test_default_recipe_adds_only_what_it_lists(name, passed):
    """A linear path past every head's recurrent layers, but for the frame head of `onf`, where what comes before them is the path."""
    same_width = dataclasses.replace(DEFAULT, combined_unit=COURSE.combined_unit)
    assert n_parameters(build_model(name, recipe=same_width)) - n_parameters(build_model(name, recipe=COURSE)) == 88 * passed * DEFAULT.residual
    wider = lstm_count(176, 256) + linear_count(512) - lstm_count(176) - linear_count(176)
    assert n_parameters(build_model(name)) - n_parameters(build_model(name, recipe=same_width)) == wider * (name == "onf")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_output_biases_start_at_the_base_rates(name):
    model = build_model(name, SMALL, DEFAULT)
    last = model.combined_fc if name == "onf" else model.frame_fc
    np.testing.assert_allclose(torch.sigmoid(last.bias).detach(), FRAME_RATE, rtol=1e-5)
    np.testing.assert_allclose(torch.sigmoid(model.onset_fc.bias).detach(), ONSET_RATE, rtol=1e-5)
    plain = build_model(name, SMALL, COURSE)
    for layer in (plain.combined_fc if name == "onf" else plain.frame_fc, plain.onset_fc):
        assert layer.bias.std() > 0 and layer.bias.abs().max() <= 1 / math.sqrt(layer.in_features)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_frame_branch_of_onf_is_added_where_the_recipe_has_a_path(recipe):
    model = build_model("onf", SMALL, RECIPES[recipe]).eval()
    nn.init.zeros_(model.combined_fc.weight)
    nn.init.zeros_(model.combined_fc.bias)
    with torch.no_grad():
        features = model.features(model.melspectrogram(noise(2, 6 * HOP_SIZE)))
        assert torch.equal(model.recur(*features)[0], features[0] * RECIPES[recipe].residual)


def test_frame_loss_does_not_teach_the_onset_branch():
    model = build_model("onf", SMALL)
    frame, onset = model(noise(2, 6 * HOP_SIZE))
    frame.square().mean().backward(retain_graph=True)
    onset_branch = [*model.onset_conv_stack.parameters(), *model.onset_lstm.parameters(), *model.onset_fc.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in onset_branch)
    assert model.combined_lstm.weight_ih_l0.grad.any() and model.frame_conv_stack.fc[0].weight.grad.any()
    onset.square().mean().backward()
    assert all(module.weight.grad.any() for module in (model.onset_fc, model.onset_conv_stack.fc[0], model.onset_conv_stack.cnn[0]))
    assert model.onset_lstm.weight_ih_l0.grad.any()


def test_frame_branch_hears_the_onset_branch():
    """The cue is detached, and still there."""
    model = lively("onf")
    audio = noise(1, 6 * HOP_SIZE)
    with torch.no_grad():
        before = model(audio)[0]
        model.onset_fc.bias.add_(3 * torch.randn(N_KEYS))
        assert (model(audio)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["baseline", "rnn", "crnn"])
def test_other_models_have_independent_heads(name):
    model = build_model(name, SMALL)
    model(noise(2, 6 * HOP_SIZE))[0].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for part, p in model.named_parameters() if part.startswith("onset_"))


# --- the harmonic model ---

@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_of_the_harmonic_model(recipe):
    """Five convolutions of 96 channels with biases and batch norms, two linear layers, two convolutions over four octaves, one LSTM of
    64 units, and two outputs a key."""
    convolutions = sum(taps * inputs * 96 + 3 * 96 for taps, inputs in ((9, 36), (9, 96), (5, 96), (9, 96), (3, 96)))
    linear = 96 * 32 + 32 + 96 * 16 + 16
    around = 96 * 16 + 16 + 49 * 16 * 32 + 32
    lstm = 2 * (4 * 64 * (48 + 64) + 8 * 64)
    outputs = 128 * 2 + 2 * 88
    path = 2 * 32 * RECIPES[recipe].residual
    assert n_parameters(build_model("harmonic", recipe=RECIPES[recipe])) == convolutions + linear + around + lstm + outputs + path


def test_harmonic_filters_read_between_the_bands():
    filters = harmonic_filters()
    assert filters.shape == (N_MELS, N_KEYS, 36) and filters.min() == 0
    assert ((filters > 0).sum(dim=0) <= 2).all()
    weights = filters.sum(dim=0).unflatten(1, (12, 3))                                  # (K, H, P)
    hertz = 27.5 * 2 ** (torch.arange(N_KEYS) / 12)[:, None] * torch.tensor(HARMONICS)  # (K, H)
    heard = (hertz > 40) & (hertz < 7500)
    assert torch.allclose(weights[heard], torch.ones(())) and not weights[(hertz < 20) | (hertz > 8200)].any()


@pytest.mark.parametrize("pitch, harmonic", [(pitch, harmonic) for pitch in (33, 57, 69, 88, 100) for harmonic in (1, 2, 3) if (pitch, harmonic) != (33, 3)])
def test_a_tone_is_found_at_each_key_of_which_it_is_a_harmonic(pitch, harmonic):
    time = torch.arange(20 * HOP_SIZE) / constants.SAMPLE_RATE
    power = LogMelSpectrogram()(torch.sin(2 * math.pi * 440 * 2 ** ((pitch - 69) / 12) * time)[None])[0, 10].exp()
    read = (power @ harmonic_filters().flatten(1)).unflatten(0, (N_KEYS, 12, 3))[:, HARMONICS.index(harmonic), 1]
    key = pitch - constants.MIN_MIDI - round(12 * math.log2(harmonic))
    assert abs(int(read.argmax()) - key) <= (1 if pitch < 50 else 0)  # low bands are as wide as several keys


def test_outputs_of_the_harmonic_model_start_at_the_base_rates_and_are_logits():
    model = build_model("harmonic", SMALL).eval()
    rates = torch.tensor([FRAME_RATE, ONSET_RATE]).expand(N_KEYS, 2)
    torch.testing.assert_close(torch.sigmoid(model.bias.detach()), rates)
    assert not build_model("harmonic", SMALL, COURSE).bias.any()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([30.0, -30.0]))
        frame, onset = model(noise(1, 4 * HOP_SIZE))
    assert (frame > 5).all() and (onset < -5).all()


def test_keys_of_the_harmonic_model_hear_the_others():
    """Through the mean over all keys, from one end of the keyboard to the other."""
    model = lively("harmonic")
    key, every = torch.zeros(1, 5, N_KEYS, 1), torch.zeros(1, 5, 1)
    with torch.no_grad():
        before = model.recur(key.flatten(2), every)[0]
        key[:, 2, 0] = 1.0
        changed = (model.recur(key.flatten(2), every)[0] - before).abs().amax(dim=(0, 1)) > 1e-4
        assert changed[0] and not changed[1:].any()
        assert ((model.recur(torch.zeros_like(key).flatten(2), every + 1)[0] - before).abs().amax(dim=(0, 1)) > 1e-4).all()


def test_keys_of_the_harmonic_model_hear_those_within_two_octaves():
    """A layer that begins with zeros: until it has learnt, and in a checkpoint that does not have it, a key hears itself."""
    model = build_model("harmonic", SMALL).eval()
    heard = torch.zeros(1, 2 * SMALL.cnn_unit, 5, N_KEYS)
    one = heard.clone()
    one[..., 40] = 1
    with torch.no_grad():
        assert not model.around(one).any()
        model.around[2].weight.copy_(torch.randn_like(model.around[2].weight))
        reached = (model.around(one) - model.around(heard)).abs().amax(dim=(0, 1, 2)) > 1e-4
    assert reached.nonzero().flatten().tolist() == list(range(40 - AROUND, 40 + AROUND + 1))


# --- convolutions ---

def test_conv_stack_halves_the_bands_twice_and_keeps_time():
    stack = ConvStack(N_MELS, 4, 8)
    assert stack.cnn(noise(2, 1, 7, N_MELS)).shape == (2, 8, 7, 57)
    assert stack(noise(2, 7, N_MELS)).shape == (2, 7, 8)
    assert [layer.p for layer in stack.modules() if isinstance(layer, Dropout)] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("name", ["baseline", "crnn", "onf"])
def test_dropout_is_the_recipes(name):
    audio = noise(1, 9 * HOP_SIZE)
    for recipe, drops in (("default", False), ("course", True), ("default,dropout=0.25", True)):
        model = build_model(name, SMALL, parse_recipe(recipe))
        assert {layer.p for layer in model.modules() if isinstance(layer, Dropout)} == {model.recipe.dropout / 2, model.recipe.dropout}
        first, second = (model(audio) for _ in range(2))
        assert all(torch.equal(a, b) != drops for a, b in zip(first, second))


# --- hearing sharper, and in tune ---

def test_a_segment_can_be_heard_sharper(monkeypatch):
    """An octave up, a tone is to the layers behind the spectrogram what the tone of twice its frequency is, where that is loud."""
    model, heard = build_model("rnn", SMALL, COURSE).eval(), []
    monkeypatch.setattr(model, "features", lambda mel: heard.append(mel) or (mel,))
    time = torch.arange(20 * HOP_SIZE) / constants.SAMPLE_RATE
    low, high = (0.1 * torch.sin(2 * math.pi * hertz * time) for hertz in (440, 880))
    with torch.no_grad():
        for audio, semitones in ((low, None), (low, torch.tensor([12.0])), (high, torch.tensor([0.0]))):
            model(audio[None], semitones)
    plain, sharper, played = heard
    loud = played > played.max() - 10
    assert (sharper - played)[loud].abs().mean() < 0.2 * (plain - played)[loud].abs().mean()
    assert torch.equal(sharper.argmax(2), played.argmax(2)) and not torch.equal(plain.argmax(2), played.argmax(2))


@pytest.mark.parametrize("semitones", [-0.5, 0.3])
def test_a_piano_out_of_tune_is_heard_as_one_in_tune(semitones, monkeypatch):
    """Where its tones are loud, the layers behind the spectrogram get what they get of one in tune; in the colour, too."""
    model, seen = lively("rnn"), []
    normalise = type(model).normalise
    monkeypatch.setattr(type(model), "normalise", lambda self, mel: seen.append(mel[0, 5:-5] - self.mel_norm.running_mean) or normalise(self, mel))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    time = torch.arange(100 * HOP_SIZE) / constants.SAMPLE_RATE

    def hear(semitones: float) -> None:
        model.infer(sum(0.1 * torch.sin(2 * math.pi * 440 * 2 ** ((key + semitones) / 12) * time) for key in (3, 10, 17)))

    for played in (0.0, semitones):
        hear(played)
    monkeypatch.setattr(model_module, "tuning_of", lambda audio: torch.zeros(len(audio)))
    hear(semitones)
    in_tune, corrected, plain = seen
    loud = in_tune > in_tune.amax() - 3
    corrected, plain = ((mel - in_tune)[loud].abs().mean() for mel in (corrected, plain))
    assert corrected < 0.3 and 3 * corrected < plain, (corrected, plain)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_model_that_knows_no_level_hears_recordings_as_they_are(tones):
    audio = torch.from_numpy(load_audio(tones.audio))
    assert lively("rnn").filters_for(audio).shape == (N_FFT // 2 + 1, N_MELS)
    assert build_model("rnn", SMALL).filters_for(audio) is None and lively("rnn").filters_for(noise(9 * HOP_SIZE)) is None


# --- velocities ---

@pytest.mark.parametrize("name, recipe", [("harmonic", "default"), ("onf", "default"), ("rnn", "course")])
def test_velocities_are_read_from_strikes(name, recipe, float32):
    """At every key and frame, the last among them: what is read is weighted by the key's height."""
    model, audio = lively(name, recipe), noise(20 * HOP_SIZE)
    frames, keys = torch.cartesian_prod(torch.arange(20), torch.arange(N_KEYS)).T
    expected = (model.strikes(audio, frames, keys) @ model.velocity).clamp(1, 127).view(20, N_KEYS)
    velocity = model.infer(audio, chunk_frames=7)[2]
    assert velocity.dtype == torch.uint8 and (velocity - expected).abs().max() < 0.51 and expected.std() > 5
    assert (expected[:, 0].mean() - expected[:, -1].mean()).abs() > 1


def test_what_is_struck_is_the_loudest_of_four_frames():
    mel = torch.tensor([5.0, 1.0, 2.0, 0.0, 3.0, -1.0, -2.0])[None, :, None].repeat(2, 1, 3)
    assert Transcriber.struck(mel)[1, :, 2].tolist() == [5, 3, 3, 3, 3, -1, -2]


def test_a_model_that_learnt_no_velocities_gives_one_to_all(tmp_path):
    model = build_model("rnn", SMALL)
    assert (model.infer(noise(9 * HOP_SIZE))[2] == VELOCITY).all()
    save_checkpoint(tmp_path / "old.pt", model)
    state = read_checkpoint(tmp_path / "old.pt")
    del state["weights"]["velocity"]
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(load_checkpoint(tmp_path / "old.pt").velocity, model.velocity)


# --- inference in chunks ---

LENGTHS = (0, 1, 100, HOP_SIZE, 7 * HOP_SIZE, 8 * HOP_SIZE, 8 * HOP_SIZE + 1, 9 * HOP_SIZE - 1, 10 * HOP_SIZE, 11 * HOP_SIZE + 5,
           16 * HOP_SIZE, 19 * HOP_SIZE, 25 * HOP_SIZE + 77)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_chunked_equals_whole_equals_forward(name, recipe, float32):
    model = lively(name, recipe)
    spread = 0.0
    for n_samples in LENGTHS:
        audio = noise(n_samples, seed=n_samples)
        *chunked, velocity = model.infer(audio, chunk_frames=8)
        *whole, also = model.infer(audio, chunk_frames=1000)
        assert velocity.shape == (len(chunked[0]), N_KEYS) and (velocity.int() - also.int()).abs().max() <= 1
        padded = nn.functional.pad(audio * model.gain_for(audio), (0, max(0, HOP_SIZE - n_samples)))
        alike = copy.deepcopy(model)
        if model.recipe.normalise_mel:
            alike.mel_norm.running_mean += model.colour_of(audio, model.gain_for(audio))
        with torch.no_grad():
            forward = alike(padded[None])
        for a, b, c in zip(chunked, whole, forward):
            assert a.shape == b.shape == (max(1, n_samples // HOP_SIZE), N_KEYS)
            assert a.dtype == torch.float32
            assert (a - b).abs().max() < 1e-3 and (a - c[0]).abs().max() < 1e-3
            spread = max(spread, float(a.std(dim=0).mean()) if len(a) > 1 else 0.0)
    assert spread > 3e-3  # the logits do move with the audio: else everything equals everything


# --- level ---

def test_training_remembers_how_loud_it_is():
    """Of the first batch all, then a hundredth of each; evaluation changes nothing, nor do other levels the gradient."""
    model = build_model("rnn", SMALL)
    assert model.level == 0
    model(torch.full((2, 8 * HOP_SIZE), -0.2))
    assert model.level == pytest.approx(0.2)
    model(torch.full((2, 8 * HOP_SIZE), 0.4))
    assert model.level == pytest.approx(0.202) and not model.level.requires_grad
    model.eval()(torch.full((2, 8 * HOP_SIZE), 0.4))
    assert model.level == pytest.approx(0.202)


@pytest.mark.parametrize("times", [1e-4, 0.1, 10.0])
def test_a_recording_is_heard_alike_at_any_level(times, float32):
    model, audio = lively("harmonic"), noise(20 * HOP_SIZE)
    audio[5 * HOP_SIZE :] *= 0.3
    for a, b in zip(logits(model, audio), logits(model, times * audio)):
        assert a.std() > 0.01 and (a - b).abs().max() < 1e-3


def test_pauses_do_not_make_a_recording_louder():
    model, audio = lively("rnn"), noise(20 * HOP_SIZE)
    assert model.gain_for(0.5 * audio) == pytest.approx(2, rel=0.02)
    paused = torch.cat([audio, 1e-3 * noise(400 * HOP_SIZE)])
    assert model.gain_for(paused) == pytest.approx(float(model.gain_for(audio)), rel=1e-6)


def test_silence_and_recordings_of_a_model_that_knows_no_level_stay_as_they_are(tmp_path):
    model = lively("rnn")
    for audio in (torch.zeros(0), torch.zeros(5 * HOP_SIZE), noise(HOP_SIZE - 1)):
        assert model.gain_for(audio) == 1
    save_checkpoint(tmp_path / "model.pt", model)
    assert load_checkpoint(tmp_path / "model.pt").level == model.level > 0
    state = read_checkpoint(tmp_path / "model.pt")
    del state["weights"]["level"]  # as versions before it wrote them
    assert model_of(state, "older.pt").gain_for(noise(5 * HOP_SIZE)) == 1


# --- colour ---

ONE = torch.tensor(1.0)


def equalised(audio: Tensor, most_db: float) -> tuple[Tensor, Tensor]:
    """A recording (S,) through an equaliser, and what that does to each mel band (M,), in the unit of the log-mel."""
    torch.manual_seed(5)
    factors = equaliser(1, len(audio), most_db, torch.device("cpu"))[0]
    filters = LogMelSpectrogram().melspectrogram.mel_scale.fb
    places = (filters * torch.arange(len(filters))[:, None]).sum(dim=0) / filters.sum(dim=0) * (len(factors) - 1) / (len(filters) - 1)
    return torch.fft.irfft(torch.fft.rfft(audio) * factors, len(audio)), 2 * factors[places.round().long()].log()


def minutes_of_noise(minutes: float) -> Tensor:
    return noise(round(minutes * 60 * constants.SAMPLE_RATE) // N_FFT * N_FFT)


def test_a_minute_tells_half_of_its_colour():
    model, audio = lively("rnn"), minutes_of_noise(1)
    heard, bands = equalised(audio, 12)
    found = 2 * (model.colour_of(heard, ONE) - model.colour_of(audio, ONE))
    assert bands.std() > 1 and found.mean().abs() < 1e-3
    assert torch.corrcoef(torch.stack([found, bands]))[0, 1] > 0.95
    assert (found @ bands) / (bands - bands.mean()).square().sum() == pytest.approx(0.9, abs=0.1)


def test_the_colour_is_the_same_at_any_level_and_with_pauses():
    model, (audio, _) = lively("rnn"), equalised(minutes_of_noise(0.5), 12)
    colour = model.colour_of(audio, ONE)
    torch.testing.assert_close(model.colour_of(0.1 * audio, ONE), colour, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.colour_of(0.1 * audio, 10 * ONE), colour, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.colour_of(torch.cat([audio, torch.zeros(len(audio))]), ONE), colour, atol=1e-3, rtol=0)


def test_a_longer_recording_tells_more_of_its_colour():
    model = lively("rnn")
    short, long = (model.colour_of(equalised(minutes_of_noise(minutes), 12)[0], ONE) for minutes in (0.2, 1.8))
    assert (short @ long) / long.square().sum() == pytest.approx((0.2 / 1.2) / (1.8 / 2.8), abs=0.03)


def test_a_note_is_no_colour():
    """A note that is held all the time moves the mean of its own band by half of the difference in a minute, of colour by less than a sixth."""
    model, audio = lively("rnn"), minutes_of_noise(1)
    played = audio + 0.5 * torch.sin(2 * math.pi * 880 * torch.arange(len(audio)) / constants.SAMPLE_RATE)
    mel = LogMelSpectrogram()
    most = float((mel(played[None, :N_FFT * 20]) - mel(audio[None, :N_FFT * 20])).mean(dim=(0, 1)).max())
    assert most > 3 and (model.colour_of(played, ONE) - model.colour_of(audio, ONE)).max() < 0.15 * most


def test_recordings_of_other_colours_are_heard_more_alike(monkeypatch, float32):
    model, audio = lively("harmonic"), minutes_of_noise(3)
    model.mel_norm.running_mean += 4 / 3 * model.colour_of(audio, ONE)  # it was trained on such noise
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    heard, _ = equalised(audio, 12)

    def difference() -> Tensor:
        return torch.stack([(a - b).abs().mean() for a, b in zip(logits(model, audio), logits(model, heard))])

    here = difference()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    monkeypatch.setattr(model, "colour_of", lambda *_: torch.zeros(N_MELS))
    there = difference()
    assert (here < 0.7 * there).all() and (here > 0).all(), here / there


def test_nothing_is_known_of_the_colour_of_silence_and_of_less_than_a_window():
    model = lively("rnn")
    for audio in (torch.zeros(0), torch.zeros(5 * N_FFT), noise(N_FFT - 1)):
        assert torch.equal(model.colour_of(audio, ONE), torch.zeros(N_MELS))
    assert model.colour_of(noise(N_FFT), ONE).any()
    assert not build_model("rnn", SMALL).colour_of(noise(5 * N_FFT), ONE).any()  # which was never trained


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 13])
def test_any_chunk_gives_the_same(chunk_frames, float32):
    model, audio = lively("onf"), noise(26 * HOP_SIZE)
    for a, b in zip(model.infer(audio, chunk_frames), model.infer(audio, 1000)):
        assert (a - b).abs().max() < 1e-3


def test_default_chunks_meet_without_a_seam(float32):
    model, audio = lively("baseline"), noise((CHUNK_FRAMES + 20) * HOP_SIZE)
    for a, b in zip(model.infer(audio), model.infer(audio, 10 * CHUNK_FRAMES)):
        assert (a - b).abs().max() < 1e-3


def read_short_pieces(monkeypatch) -> None:
    monkeypatch.setattr(layers, "LONG_FRAMES", 8)
    monkeypatch.setattr(model_module, "PIECE_FRAMES", 4)


@pytest.mark.parametrize("name, n_layers", [("rnn", 4), ("onf", 4), ("harmonic", 1)])
@pytest.mark.parametrize("n_frames", [9, 16, 17])
def test_recurrent_layers_infer_piece_by_piece(name, n_layers, n_frames, float32, monkeypatch):
    model, audio = lively(name), noise(n_frames * HOP_SIZE)
    whole = logits(model, audio)
    read, calls = layers.read_in_pieces, []
    for module in (layers, model_module):
        monkeypatch.setattr(module, "read_in_pieces", lambda *args: calls.append(args) or read(*args))
    model.infer(audio)
    assert not calls
    read_short_pieces(monkeypatch)
    pieces = logits(model, audio)
    for a, b in zip(whole, pieces):
        assert a.std() > 0 and (a - b).abs().max() < 1e-5
    assert len(calls) == n_layers


@pytest.mark.parametrize("name", ["onf", "harmonic"])
def test_pieces_are_as_exact_as_the_whole_under_autocast(name, monkeypatch):
    model, audio = lively(name), noise(17 * HOP_SIZE)
    whole = logits(model, audio)
    read_short_pieces(monkeypatch)
    for a, b in zip(whole, logits(model, audio)):
        assert (a - b).abs().max() < 0.07 < a.std()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_inference_leaves_the_number_of_threads(threads, fails, float32, monkeypatch):
    """That of threads which start later, too, whose number is whichever was set last."""
    monkeypatch.setattr(layers, "LONG_FRAMES", 8)
    before, numbers = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads)
        model, audio = lively("onf"), noise(17 * HOP_SIZE)
        if fails:
            monkeypatch.setattr(layers, "one_direction", None)
        with pytest.raises(TypeError) if fails else contextlib.nullcontext():
            model.infer(audio)
        later = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *numbers] == [threads, threads]
    finally:
        torch.set_num_threads(before)


def test_long_audio_outside_inference_has_gradients(float32, monkeypatch):
    monkeypatch.setattr(layers, "LONG_FRAMES", 8)
    model = lively("onf")
    sum(logit.sum() for logit in model(noise(17 * HOP_SIZE)[None])).backward()
    assert model.combined_lstm.weight_hh_l0_reverse.grad.abs().max() > 0


def test_audio_shorter_than_a_frame_gives_one(float32):
    for n_samples in (0, 1, HOP_SIZE - 1):
        frame, onset, _ = lively("crnn").infer(torch.zeros(n_samples))
        assert frame.shape == onset.shape == (1, N_KEYS) and torch.isfinite(frame).all()


class Inverted(ConvStack):
    """What somebody may derive."""

    def forward(self, mel: Tensor) -> Tensor:
        return -super().forward(mel)


def test_a_convolution_stack_of_ones_own_infers_as_it_is():
    model, mel = lively("baseline"), torch.randn(1, 9, N_MELS)
    model.frame_conv_stack.__class__ = Inverted
    with torch.no_grad():
        torch.testing.assert_close(model_module.for_inference(model).frame_conv_stack(mel), model.frame_conv_stack(mel))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_a_number_is_no_logit(name):
    model = lively(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(ValueError, match="not a number"):
        model.infer(noise(9 * HOP_SIZE))


def test_inference_makes_no_graph_and_is_float32_under_autocast():
    frame, onset, _ = lively("onf").infer(noise(9 * HOP_SIZE), chunk_frames=4)
    assert not frame.requires_grad and frame.dtype == onset.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_learnt_makes_no_difference(name, monkeypatch):
    """The biases of convolutions before a batch norm, and nothing else."""
    monkeypatch.setattr(layers, "keeps_bfloat16", lambda device: False)
    model, audio = lively(name).train(), noise(3, 20 * HOP_SIZE)
    found = []
    for _ in range(2):
        torch.manual_seed(0)  # of dropout
        found.append(model(audio))
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter += 1
    for logit, other in zip(*found):
        torch.testing.assert_close(logit, other, rtol=1e-3, atol=1e-3)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == len(convolutions) - (2 if name == "harmonic" else 0)  # of which two have none


@pytest.mark.parametrize("name", MODELS)
def test_features_kept_in_bfloat16_teach_nearly_the_same(name, monkeypatch):
    audio, found = noise(3, 20 * HOP_SIZE), []
    for kept in (False, True):
        monkeypatch.setattr(layers, "keeps_bfloat16", lambda device, kept=kept: kept)
        model = lively(name).train()
        logits = model(audio)
        assert all(logit.dtype == torch.float32 for logit in logits)
        sum(logit.sigmoid().sum() for logit in logits).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()
    assert torch.equal(*found) == (name == "rnn")  # which has no convolutions


# --- checkpoints ---

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_is_the_same_model_again(name, recipe, tmp_path):
    model = lively(name, recipe)
    model.thresholds = {"onset": 0.3, "frame": 0.7}
    save_checkpoint(tmp_path / "new folder" / "model.pt", model)
    again = load_checkpoint(tmp_path / "new folder" / "model.pt")
    assert type(again) is type(model) and again.sizes == SMALL and again.recipe == RECIPES[recipe] and not again.training
    assert again.thresholds == {"onset": 0.3, "frame": 0.7}
    for a, b in zip(again.infer(noise(9 * HOP_SIZE)), model.infer(noise(9 * HOP_SIZE))):
        assert torch.equal(a, b)


def test_entries_that_a_checkpoint_is_older_than_are_as_in_the_course(tmp_path):
    save_checkpoint(tmp_path / "old.pt", build_model("rnn", SMALL, DEFAULT))
    state = read_checkpoint(tmp_path / "old.pt")
    for entry in ("transpose", "onset_target"):
        del state["recipe"][entry]
    torch.save(state, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").recipe == dataclasses.replace(DEFAULT, transpose=0, onset_target="one")


@pytest.mark.parametrize("path", dict.fromkeys(RELEASED), ids=lambda path: path.stem)
def test_the_released_checkpoints_load(path):
    model = load_checkpoint(path)
    assert type(model) is MODELS[path.stem] and path.stat().st_size < 20e6
    assert all(torch.isfinite(logit).all() for logit in model.infer(noise(20 * HOP_SIZE)))


def test_a_checkpoint_carries_the_constants_and_what_training_adds(tmp_path):
    save_checkpoint(tmp_path / "m.pt", build_model("rnn", SMALL), step=12, best=0.25)
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert state["constants"] == {"SAMPLE_RATE": 16000, "HOP_SIZE": 512, "N_FFT": 2048, "N_MELS": 229, "F_MIN": 30, "F_MAX": 8000,
                                  "MIN_MIDI": 21, "MAX_MIDI": 108, "N_KEYS": 88}
    assert (state["step"], state["best"], state["model"]) == (12, 0.25, "rnn")
    assert state["versions"]["torch"] == str(torch.__version__)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_says_what_it_is(kind, tmp_path):
    path = broken(tmp_path, kind)
    with pytest.raises(OSError if kind in ("missing", "folder") else ValueError, match=re.escape(BROKEN[kind])) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", sorted(constants.__dict__.keys() & {"SAMPLE_RATE", "HOP_SIZE", "N_FFT", "N_MELS", "F_MIN", "F_MAX", "MAX_MIDI"}))
def test_other_constants_are_named(name, tmp_path, monkeypatch, checkpoint):
    """The code's own constant moves away from under a good checkpoint."""
    found = getattr(constants, name)
    monkeypatch.setattr(constants, name, found + 1)
    with pytest.raises(ValueError, match=f"{name} = {found}, and constants.py says {found + 1}"):
        read_checkpoint(checkpoint)


def test_a_checkpoint_of_the_course_loads_as_its_baseline(tmp_path):
    made = lively("baseline", "course")
    torch.save({"model_state_dict": made.state_dict(), "cnn_unit": 4, "fc_unit": 8, "step": 5000}, tmp_path / "course.pt")
    model = load_checkpoint(tmp_path / "course.pt")
    assert type(model) is MODELS["baseline"] and model.recipe == COURSE and model.thresholds == {"onset": 0.5, "frame": 0.5}
    assert read_checkpoint(tmp_path / "course.pt")["step"] == 5000
    for a, b in zip(model.infer(noise(5 * HOP_SIZE)), made.infer(noise(5 * HOP_SIZE))):
        assert torch.equal(a, b)


def test_the_state_of_the_course_baseline_has_the_courses_names():
    names = set(build_model("baseline", SMALL, COURSE).state_dict())
    assert {"frame_conv_stack.cnn.0.weight", "frame_conv_stack.cnn.1.running_mean", "frame_conv_stack.cnn.3.weight",
            "frame_conv_stack.cnn.8.weight", "frame_conv_stack.cnn.9.running_var", "frame_conv_stack.fc.0.weight", "frame_fc.weight",
            "onset_conv_stack.cnn.0.weight", "onset_fc.bias"} <= names
    heads = ("frame_conv_stack.", "frame_fc.", "onset_conv_stack.", "onset_fc.", "melspectrogram.", "level", "velocity")
    assert all(name.startswith(heads) for name in names)


def test_the_seed_draws_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return build_model("onf", SMALL).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["onset_lstm.weight_hh_l0"], other["onset_lstm.weight_hh_l0"])


def test_a_shared_checkpoint_is_half_as_large_and_only_weights(tmp_path):
    model = build_model("onf", SMALL)
    where = {"data": ["/home/me/maps"], "onset_data": ["/home/me/asap"], "weights": "/home/me/first.pt"}
    save_checkpoint(tmp_path / "whole.pt", model, optimizer={"much": torch.zeros(1000)}, step=5, arguments={**where, "seed": 3},
                    data={"folders": where["data"], "onset_folders": where["onset_data"], "minutes": {"train": 9.0}})
    share_checkpoint(tmp_path / "shared.pt", read_checkpoint(tmp_path / "whole.pt"))
    shared = read_checkpoint(tmp_path / "shared.pt")
    assert shared["arguments"] == {"seed": 3} and shared["data"] == {"minutes": {"train": 9.0}}
    assert "optimizer" not in shared and shared["step"] == 5 and shared["thresholds"] == model.thresholds
    assert all(value.dtype in (torch.float16, torch.int64) for value in shared["weights"].values())
    loaded = load_checkpoint(tmp_path / "shared.pt")
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert theirs.dtype == ours.dtype and torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-6), name


def test_harmonic_keeps_little_of_what_it_infers_from():
    """In an hour there are 2816 features of each of 112,500 frames."""
    model = build_model("harmonic").eval()
    mel = torch.randn(1, 8, N_MELS)
    exact, _ = model.convolve(mel)
    with torch.inference_mode():
        kept, _ = model.convolve(mel)
    assert exact.dtype == torch.float32 and kept.dtype == torch.float16
    torch.testing.assert_close(kept.float(), exact, rtol=1e-3, atol=1e-3)


# --- several models at once ---

def test_an_ensemble_hears_the_mean_of_its_members(tmp_path):
    audio, members = noise(16000), []
    for seed, name in enumerate(("crnn", "harmonic")):
        torch.manual_seed(seed)
        members.append(build_model(name, SMALL).eval())
        members[-1].thresholds = {"onset": 0.3 + 0.3 * seed, "frame": 0.2 + 0.3 * seed}
        members[-1].velocity *= (50 + 30 * seed) / VELOCITY
        save_checkpoint(tmp_path / f"{name}.pt", members[-1])
    both = load_ensemble([tmp_path / "harmonic.pt", tmp_path / "crnn.pt", tmp_path / "harmonic.pt"])
    assert both.thresholds == pytest.approx({"onset": 0.5, "frame": 0.4})
    crnn, harmonic = (member.infer(audio) for member in members)
    for mean, one, other in zip(both.infer(audio), crnn, harmonic):
        assert mean.dtype == one.dtype and mean.shape == one.shape
        torch.testing.assert_close(mean.float(), one.float() / 3 + other.float() * 2 / 3, rtol=1e-5, atol=1e-5)
    assert both.infer(audio)[2].unique().tolist() == [70]
    assert len(both.members) == 2  # the one named twice hears once


def test_an_ensemble_of_one_is_a_model(tmp_path):
    save_checkpoint(tmp_path / "model.pt", build_model("rnn", SMALL))
    assert type(load_ensemble([tmp_path / "model.pt"])) is MODELS["rnn"]


def test_onsets_of_two_kinds_are_not_averaged(tmp_path):
    for name in RECIPES:
        save_checkpoint(tmp_path / f"{name}.pt", build_model("rnn", SMALL, RECIPES[name]))
    with pytest.raises(ValueError, match="default.pt, .*course.pt: onset targets are 'two' and 'one'"):
        load_ensemble([tmp_path / "default.pt", tmp_path / "course.pt"])
