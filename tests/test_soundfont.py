"""The SoundFonts that part of the released checkpoint's data was played on, made of samples of our own and played."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT

from audio import has_fluidsynth, render_midi
from constants import SAMPLE_RATE
from notes import Notes, notes_to_midi

specification = importlib.util.spec_from_file_location("soundfont", ROOT / "runs" / "released" / "soundfont.py")
soundfont = importlib.util.module_from_spec(specification)
specification.loader.exec_module(soundfont)

RATE = 48000
KEYS = {"A4": 69, "D#5": 75, "C8": 108}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Sines that begin after 30 ms of silence; the loudest layer has a second partial."""
    folder = tmp_path / "samples"
    folder.mkdir()
    time = np.arange(RATE) / RATE
    for name, key in KEYS.items():
        for layer in soundfont.LAYERS:
            partials = [0.4, 0.2] if layer == 16 else [0.05 * 8 ** (layer / 16)]  # 18 dB between the softest and the loudest
            hertz = 440 * 2 ** ((key - 69) / 12)
            tone = sum(size * np.sin(2 * np.pi * n * hertz * time) for n, size in enumerate(partials, 1))
            soundfile.write(folder / f"{name}v{layer}.ogg", np.pad(tone, (RATE * 3 // 100, 0))[:, None].repeat(2, axis=1), RATE)
    (folder / "A4v2.ogg").write_text("of a layer that is not used")
    return folder


def played(notes: Notes, path: Path) -> np.ndarray:
    return np.concatenate(list(render_midi(notes_to_midi(notes), path)))


def partials(audio: np.ndarray, start: float, hertz: float, numbers: tuple[int, int] = (1, 2)) -> tuple[float, float]:
    """The level of a tone and of its octave, or of other partials, in the 0.4 s from `start`."""
    spectrum = abs(np.fft.rfft(audio[round(start * SAMPLE_RATE) :][: SAMPLE_RATE * 2 // 5] * np.hanning(SAMPLE_RATE * 2 // 5)))
    return tuple(float(spectrum[round(0.4 * n * hertz) - 3 : round(0.4 * n * hertz) + 4].max()) for n in numbers)


@pytest.mark.skipif(not has_fluidsynth(), reason="libfluidsynth is missing")
def test_keys_play_the_nearest_sample_of_their_layer_at_their_pitch(samples, tmp_path):
    assert soundfont.main([str(samples), str(tmp_path / "out.sf2")]) == 0
    pitches, velocities = [68, 69, 70, 74, 75, 76], [20, 120]
    levels = {}
    notes = [(pitch, velocity) for pitch in pitches for velocity in velocities]
    onsets = 0.5 + np.arange(len(notes))
    audio = played(Notes(np.stack([onsets, onsets + 0.45], axis=1), *zip(*notes)), tmp_path / "out.sf2")
    for onset, (pitch, velocity) in zip(onsets, notes):
        tone, octave = partials(audio, onset, 440 * 2 ** ((pitch - 69) / 12))
        levels[velocity] = tone
        assert (0.3 < octave / tone < 0.7) == (velocity == 120) and (octave / tone < 0.05) == (velocity == 20)
        first = np.flatnonzero(abs(audio[round(onset * SAMPLE_RATE) :]) > 0.3 * abs(audio[round(onset * SAMPLE_RATE) :][:4000]).max())[0]
        assert 0 <= first / SAMPLE_RATE < 0.01  # the silence before the tone is cut off
    assert 20 < 20 * np.log10(levels[120] / levels[20]) < 40
    assert abs(audio[round(1.2 * SAMPLE_RATE) : round(1.45 * SAMPLE_RATE)]).max() < 0.1 * abs(audio[round(0.5 * SAMPLE_RATE) :][:4000]).max()


@pytest.mark.skipif(not has_fluidsynth(), reason="libfluidsynth is missing")
def test_the_highest_strings_have_no_dampers(samples, tmp_path):
    assert soundfont.main([str(samples), str(tmp_path / "out.sf2")]) == 0
    audio = played(Notes([[0.2, 0.4], [2.2, 2.4]], [69, 108], [120, 120]), tmp_path / "out.sf2")
    after = [abs(audio[round(second * SAMPLE_RATE) :][:1600]).max() for second in (0.7, 2.7)]
    assert after[1] > 10 * after[0]


@pytest.mark.skipif(not has_fluidsynth(), reason="libfluidsynth is missing")
def test_of_a_single_layer_soft_notes_are_softer_and_duller(tmp_path):
    (tmp_path / "samples").mkdir()
    time = np.arange(RATE) / RATE
    for name, hertz in (("G4", 392.0), ("Gs4", 415.3), ("A4", 440.0)):
        soundfile.write(tmp_path / "samples" / f"{name}.wav", 0.3 * np.sin(2 * np.pi * hertz * time) + 0.3 * np.sin(16 * np.pi * hertz * time), RATE)
    assert soundfont.main([str(tmp_path / "samples"), str(tmp_path / "out.sf2")]) == 0
    pitches, velocities = [67, 68, 69, 72], [20, 120]
    notes = [(pitch, velocity) for pitch in pitches for velocity in velocities]
    onsets = 0.5 + np.arange(len(notes))
    audio = played(Notes(np.stack([onsets, onsets + 0.45], axis=1), *zip(*notes)), tmp_path / "out.sf2")
    levels = []
    for onset, (pitch, _) in zip(onsets, notes):
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        levels.append(partials(audio, onset, hertz, (1, 8)))
        assert levels[-1][0] > 10 * max(partials(audio, onset, hertz * beside)[0] for beside in (0.95, 1.05))  # at its own pitch
    for (soft, soft_eighth), (loud, loud_eighth) in zip(levels[::2], levels[1::2]):
        assert 20 < 20 * np.log10(loud / soft) < 40
        assert soft_eighth / soft < 0.7 * loud_eighth / loud


@pytest.mark.parametrize("kind, message", [("empty", "holds no samples like A0v1.ogg"), ("missing", "holds no samples"),
                                           ("broken", "A4v1.ogg: cannot be read"), ("short", "A4v1.ogg: is shorter"),
                                           ("incomplete", "there is no layer 1 beside it")])
def test_bad_samples_are_named_and_nothing_is_written(kind, message, samples, tmp_path, capsys):
    folder = tmp_path / kind if kind in ("empty", "missing") else samples
    if kind == "empty":
        folder.mkdir()
    elif kind == "broken":
        (samples / "A4v1.ogg").write_text("no music")
    elif kind == "short":
        soundfile.write(samples / "A4v1.ogg", np.zeros((100, 2)), RATE)
    elif kind == "incomplete":
        (samples / "A4v1.ogg").unlink()
    assert soundfont.main([str(folder), str(tmp_path / "out.sf2")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out.sf2").exists()
