"""Audio of every kind comes in at the right pitch and time, or is refused by name; MIDI sounds when it should."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretty_midi
import pytest
import soundfile
import soxr

import audio
from audio import BLOCK, TAIL_SECONDS, audio_to_int16, default_soundfont, has_fluidsynth, load_audio, render_midi, save_audio
from constants import SAMPLE_RATE
from notes import Notes, notes_to_midi

CLICK = 0.5      # seconds
HERTZ = 880.0    # of the tone in the second second
needs_fluidsynth = pytest.mark.skipif(not has_fluidsynth(), reason="libfluidsynth is not installed")
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def click_and_tone(rate: int, channels: int) -> np.ndarray:
    """Two seconds, (S, channels): a click at CLICK and from 1 s on a tone."""
    samples = np.zeros(2 * rate)
    samples[round(CLICK * rate)] = 0.9
    samples[rate:] = 0.3 * np.sin(2 * np.pi * HERTZ * np.arange(rate) / rate)
    return np.repeat(samples[:, None], channels, axis=1)


def noise(seconds: float = 2.0) -> np.ndarray:
    """What no codec can make small, so that a part of the file is a part of the sound."""
    return 0.1 * np.random.default_rng(0).standard_normal(round(seconds * SAMPLE_RATE)).clip(-3, 3)


def assert_click_and_tone(samples: np.ndarray, longer: int = 2) -> None:
    assert samples.dtype == np.float32 and samples.ndim == 1 and abs(samples).max() <= 1
    assert abs(len(samples) - 2 * SAMPLE_RATE) <= longer
    assert abs(int(abs(samples[: SAMPLE_RATE * 3 // 4]).argmax()) - CLICK * SAMPLE_RATE) <= 3
    tone = samples[SAMPLE_RATE : 2 * SAMPLE_RATE]
    assert abs(abs(np.fft.rfft(tone)).argmax() - HERTZ) <= 1  # one second: a bin a hertz
    assert 0.27 < abs(tone[1000:-1000]).max() < 0.33


# --- reading ---

@pytest.mark.parametrize("name, rate, channels, subtype", [
    ("six channels.wav", 96000, 6, "PCM_24"), ("eight bits.wav", 44100, 1, "PCM_U8"), ("float.wav", 48000, 2, "FLOAT"),
    ("a.mp3", 44100, 2, None), ("a.ogg", 48000, 2, None), ("a.flac", 44100, 2, None), ("a.aiff", 44100, 2, None),
    ("odd.wav", 11025, 1, "PCM_16"), ("half.flac", 22050, 1, None), ("low.wav", 8000, 1, None), ("as it is.flac", 16000, 1, None)])
def test_any_format_and_rate_keeps_pitch_and_time(tmp_path, name, rate, channels, subtype):
    soundfile.write(tmp_path / name, click_and_tone(rate, channels), rate, subtype=subtype)
    assert_click_and_tone(load_audio(tmp_path / name))


@needs_ffmpeg
def test_m4a_comes_through_ffmpeg(tmp_path):
    soundfile.write(tmp_path / "a.wav", click_and_tone(44100, 2), 44100)
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / "a.m4a"], check=True)
    assert_click_and_tone(load_audio(tmp_path / "a.m4a"), longer=1024)  # AAC fills up its last frame


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile([0.5, -0.25, 0.125], (100, 1)), SAMPLE_RATE)
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), np.full(100, 0.125), atol=1e-4)


def test_blocks_join_without_a_seam(tmp_path):
    """Longer than a block at 44.1 kHz: the pieces equal one resampling of the whole."""
    whole = np.random.default_rng(0).uniform(-0.5, 0.5, BLOCK + 20_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", whole, 44100, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), soxr.resample(whole, 44100, SAMPLE_RATE), atol=1e-3)


def test_a_float_file_beyond_full_scale_is_made_softer(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.5, 1.5, -3.0]) * 32768, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "loud.wav"), [1 / 6, 0.5, -1.0], atol=1 / 32768)


def test_int16_is_full_scale_and_does_not_wrap():
    assert audio_to_int16(np.array([0, 0.5, -1, 1, 1.5, -1.5])).tolist() == [0, 16384, -32768, 32767, 32767, -32768]


@pytest.mark.parametrize("name, rate", [("a.ogg", 16000), ("a.mp3", 44100), ("a.wav", 48000)])
def test_audio_is_the_same_from_the_file_and_from_the_cache(tmp_path, name, rate):
    """Which keeps 16 bits."""
    soundfile.write(tmp_path / name, click_and_tone(rate, 2) + 1e-6, rate, subtype="FLOAT" if name == "a.wav" else None)
    audio = load_audio(tmp_path / name)
    assert np.array_equal(audio, audio_to_int16(audio) / np.float32(32768))


def test_one_sample_is_audio(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), SAMPLE_RATE)
    assert load_audio(tmp_path / "one.wav").tolist() == [0.5]


# --- refusing ---

@pytest.mark.parametrize("name, content, message", [
    ("empty.wav", b"", "is empty"), ("words.flac", b"these are the words of a song\n" * 20, "holds no audio"),
    ("bytes.wav", bytes(range(256)) * 8, "holds no audio")])
def test_what_is_no_audio_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load_audio(tmp_path / name)


def test_without_ffmpeg_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(audio.shutil, "which", lambda name: None)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    with pytest.raises(ValueError, match=r"a\.m4a: holds no audio that libsndfile reads .*ffmpeg, which reads M4A and more, is not installed"):
        load_audio(tmp_path / "a.m4a")


def test_a_talkative_ffmpeg_does_not_hang(tmp_path, monkeypatch):
    """A broken film makes ffmpeg write more to its error pipe than a pipe holds; nobody reading it, both would wait."""
    tool = tmp_path / "ffmpeg"
    tool.write_text("#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' x >&2\necho >&2; echo no such codec >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(audio.shutil, "which", lambda name: str(tool))
    (tmp_path / "a.m4a").write_bytes(b"no audio")

    def give_up(*_):
        raise AssertionError("ffmpeg waits for a reader of its errors")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    try:
        with pytest.raises(ValueError, match=r"a\.m4a: holds no audio .*\(no such codec\)"):
            load_audio(tmp_path / "a.m4a")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize("suffix", ["flac", "ogg", "opus", "mp3", "wav", "aiff", "au", "w64", "rf64"])
def test_a_truncated_file_is_refused(tmp_path, suffix, part):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(), SAMPLE_RATE, **({"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}))
    whole = path.read_bytes()
    assert abs(len(load_audio(path)) - 2 * SAMPLE_RATE) <= 2
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: (is truncated|is broken|holds no)"):
        load_audio(path)


@pytest.mark.parametrize("n_bytes", [5, 6, 26, 27])
def test_an_ogg_cut_within_the_head_of_its_last_page_is_refused(tmp_path, n_bytes):
    soundfile.write(tmp_path / "a.ogg", noise(), SAMPLE_RATE)
    whole = (tmp_path / "a.ogg").read_bytes()
    (tmp_path / "a.ogg").write_bytes(whole[: whole.rfind(b"OggS") + n_bytes])
    with pytest.raises(ValueError, match=r"a\.ogg: (is truncated|is broken|holds no)"):
        load_audio(tmp_path / "a.ogg")


def test_raw_samples_are_refused(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"a\.raw: holds no audio"):
        load_audio(tmp_path / "a.raw")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg", "mp3"])
def test_names_are_any_bytes(tmp_path, suffix):
    path = tmp_path / os.fsdecode(b"Fr\xe9d." + suffix.encode())
    save_audio(path, [noise()])
    assert abs(len(load_audio(path)) - 2 * SAMPLE_RATE) <= 2
    assert os.listdir(os.fsencode(tmp_path)) == [b"Fr\xe9d." + suffix.encode()]


@needs_ffmpeg
def test_a_truncated_m4a_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(), SAMPLE_RATE)
    for options in ([], ["-movflags", "faststart"]):  # the table of contents last, or first as on the web
        path = tmp_path / "a.m4a"
        subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", tmp_path / "a.wav", *options, path], check=True)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"a\.m4a: "):
            load_audio(path)


@pytest.mark.parametrize("mode, level", [("CONSTANT", 0.2), ("VARIABLE", 0.9)])
@pytest.mark.parametrize("tag", [0, 200, 70000])
def test_an_mp3_without_a_length_is_read_to_its_end(tmp_path, mode, level, tag):
    """What is cut from a stream lacks the first frame, which would tell its length; before it may be a tag of any size."""
    path, quiet = tmp_path / "a.mp3", np.zeros(3 * SAMPLE_RATE, np.float32)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, bitrate_mode=mode, compression_level=level) as file:
        file.write(np.concatenate([quiet, noise(), quiet, noise()]))
    whole = path.read_bytes()
    first = whole.index(b"\xff\xf3")
    assert len(load_audio(path)) == 10 * SAMPLE_RATE and any(name in whole[first : first + 500] for name in (b"Xing", b"Info"))
    head = b"ID3\4\0\0" + bytes(tag >> shift & 127 for shift in (21, 14, 7, 0)) + b"Xing".ljust(tag, b"\0") if tag else b""
    path.write_bytes(head + whole[whole.index(b"\xff\xf3", first + 2) :])
    heard = load_audio(path)
    assert 0 <= len(heard) - 10 * SAMPLE_RATE < 5000  # what the encoder put before and after the sound
    assert np.std(heard[-2 * SAMPLE_RATE :]) > 0.9 * np.std(noise())


@needs_ffmpeg
def test_a_flac_from_a_pipe_promises_no_length(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(), SAMPLE_RATE)
    with open(tmp_path / "piped.flac", "wb") as file:
        made = subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-f", "flac", "-"], check=True, capture_output=True)
        file.write(made.stdout)
    np.testing.assert_allclose(load_audio(tmp_path / "piped.flac"), noise(), atol=1e-4)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_promises_no_length(tmp_path, size):
    """A program that writes to a pipe cannot go back to the header, and leaves its sizes at the most there is: the file is whole."""
    path = tmp_path / "piped.wav"
    soundfile.write(path, noise(), SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    assert content[36:40] == b"data"
    content[4:8] = content[40:44] = size.to_bytes(4, "little")
    path.write_bytes(content)
    np.testing.assert_allclose(load_audio(path), noise(), atol=1e-4)


@pytest.mark.parametrize("suffix, size", [("wav", 2_200_000_000), ("wav", 3_000_000_000), ("aiff", 3_000_000_000), ("au", 3_000_000_000),
                                          ("w64", 3_000_000_000), ("w64", 30_000_000_000), ("rf64", 3_000_000_000), ("rf64", 30_000_000_000)])
def test_gigabytes_that_are_missing_are_missed(tmp_path, suffix, size):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(), SAMPLE_RATE)
    whole = path.read_bytes()
    n_bytes = 2 * len(noise())
    where, order = {"wav": (40, "little"), "aiff": (whole.find(b"SSND") + 4, "big"), "au": (8, "big" if whole[:4] == b".snd" else "little"),
                    "w64": (16, "little"), "rf64": (20, "little")}[suffix]
    width = 8 if suffix in ("w64", "rf64") else 4
    assert 0 <= int.from_bytes(whole[where : where + width], order) - n_bytes <= 104  # W64 and RF64 count heads in
    path.write_bytes(whole[:where] + size.to_bytes(width, order) + whole[where + width :])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: (is truncated|holds no samples)"):
        load_audio(path)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["wav", "w64", "au", "aiff"])
def test_what_ffmpeg_writes_to_a_pipe_is_whole(tmp_path, kind):
    soundfile.write(tmp_path / "a.wav", noise(), SAMPLE_RATE)
    made = subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-f", kind, "-"], check=True, capture_output=True)
    (tmp_path / f"piped.{kind}").write_bytes(made.stdout)
    np.testing.assert_allclose(load_audio(tmp_path / f"piped.{kind}"), noise(), atol=1e-4)


def test_a_header_may_count_its_own_bytes(tmp_path):
    """Some programs write the size of the whole file where that of the samples belongs: nothing is missing."""
    path = tmp_path / "counted.wav"
    soundfile.write(path, noise(), SAMPLE_RATE)
    content = bytearray(path.read_bytes())
    content[40:44] = len(content).to_bytes(4, "little")
    path.write_bytes(content)
    np.testing.assert_allclose(load_audio(path), noise(), atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44100])
def test_nan_is_refused(tmp_path, value, rate):
    soundfile.write(tmp_path / "a.wav", np.array([0, 0.1, value, 0.1] * 100), rate, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav: holds samples that are not numbers"):
        load_audio(tmp_path / "a.wav")


def test_no_samples_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), SAMPLE_RATE)
    with pytest.raises(ValueError, match=r"a\.wav: holds no samples"):
        load_audio(tmp_path / "a.wav")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(OSError, match=r"lost\.wav: cannot be read \(No such file or directory\)"):
        load_audio(tmp_path / "lost.wav")
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(OSError, match=r"folder\.wav: cannot be read \(Is a directory\)"):
        load_audio(tmp_path / "folder.wav")


# --- writing ---

@pytest.mark.parametrize("suffix, kind", [("wav", "WAV"), ("flac", "FLAC")])
def test_saved_audio_survives_the_disk(tmp_path, suffix, kind):
    path = tmp_path / "new" / f"a.{suffix}"
    save_audio(path, [noise()[:1000], noise()[1000:]])
    about = soundfile.info(path)
    assert (about.format, about.subtype, about.samplerate, about.channels) == (kind, "PCM_16", SAMPLE_RATE, 1)
    np.testing.assert_allclose(load_audio(path), noise(), atol=1 / 32768)


def test_a_long_ogg_can_be_saved(tmp_path):
    save_audio(tmp_path / "a.ogg", [np.zeros(3 * BLOCK)])  # libsndfile crashes where it is written at once
    assert soundfile.info(tmp_path / "a.ogg").frames == 3 * BLOCK


def test_what_is_too_loud_is_clipped_and_does_not_wrap(tmp_path):
    save_audio(tmp_path / "a.wav", [np.array([1.5, -1.5])])
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), [1, -1], atol=1e-4)


def test_a_source_that_fails_leaves_nothing(tmp_path):
    def blocks():
        yield np.zeros(100)
        raise ValueError("the source is broken")

    with pytest.raises(ValueError, match="the source is broken"):
        save_audio(tmp_path / "a.flac", blocks())
    assert list(tmp_path.iterdir()) == []


def test_audio_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "a.flac").mkdir()
    with pytest.raises(OSError, match=r"a\.flac: cannot be written"):
        save_audio(tmp_path / "a.flac", [np.zeros(100)])


# --- playing MIDI ---

def played(midi: pretty_midi.PrettyMIDI, soundfont: Path | None = None) -> np.ndarray:
    return np.concatenate(list(render_midi(midi, soundfont)))


def loudness(samples: np.ndarray, start: float, stop: float) -> float:
    return float(np.sqrt(np.mean(samples[int(start * SAMPLE_RATE) : int(stop * SAMPLE_RATE)] ** 2)))


@needs_fluidsynth
@pytest.mark.parametrize("onset", [0.5, 0.7373])
def test_a_note_sounds_from_its_onset(onset):
    samples = played(notes_to_midi(Notes([[onset, onset + 0.5]], [72], [110])))
    assert abs(len(samples) - (onset + 0.5 + TAIL_SECONDS) * SAMPLE_RATE) < 20
    assert samples.dtype == np.float32 and 0.02 < abs(samples).max() <= 1
    first = np.flatnonzero(abs(samples) > 0.05 * abs(samples).max())[0] / SAMPLE_RATE
    assert -0.001 < first - onset < 0.01
    spectrum = abs(np.fft.rfft(samples[int((onset + 0.05) * SAMPLE_RATE) :][:6400]))
    assert abs(spectrum.argmax() * SAMPLE_RATE / 6400 / 523.25 - 1) < 0.01


@needs_fluidsynth
def test_the_pedal_prolongs_the_sound_until_it_goes_up():
    def with_pedal(value: int) -> np.ndarray:
        midi = notes_to_midi(Notes([[0.2, 0.5]], [60], [100]))
        midi.instruments[0].control_changes = [pretty_midi.ControlChange(64, value, 0.1), pretty_midi.ControlChange(64, 0, 1.8)]
        return played(midi)

    held, damped = with_pedal(127), with_pedal(0)
    assert loudness(held, 1.4, 1.8) > 5 * loudness(damped, 1.4, 1.8)
    assert loudness(held, 1.4, 1.8) > 5 * loudness(held, 2.8, 3.2)


@needs_fluidsynth
def test_the_pedal_catches_a_key_that_comes_up_as_it_goes_down():
    """As it does in the labels, see `hold_with_pedal`."""
    midi = notes_to_midi(Notes([[0.2, 0.5]], [60], [100]))
    midi.instruments[0].control_changes = [pretty_midi.ControlChange(64, 127, 0.5), pretty_midi.ControlChange(64, 0, 1.8)]
    held, alone = played(midi), played(notes_to_midi(Notes([[0.2, 1.8]], [60], [100])))
    assert loudness(held, 1.4, 1.8) == pytest.approx(loudness(alone, 1.4, 1.8), rel=0.1)


@needs_fluidsynth
def test_a_repeated_note_is_struck_again():
    """Where a note ends as the next of its key begins, the key goes up first."""
    samples = played(notes_to_midi(Notes([[0.2, 1.2], [1.2, 2.2]], [60, 60], [100, 100])))
    assert loudness(samples, 1.25, 1.45) > 1.2 * loudness(samples, 0.95, 1.15)


@needs_fluidsynth
def test_drums_are_silent():
    midi = notes_to_midi(Notes([[0.2, 0.5]], [60], [100]))
    midi.instruments[0].is_drum = True
    assert abs(played(midi)).max() < 1e-3


@needs_fluidsynth
def test_a_soundfont_without_a_piano_is_named(tmp_path):
    """Else every recording would be silent, and named by none."""
    content = bytearray(default_soundfont().read_bytes())
    presets = content.index(b"phdr")  # SoundFont 2.01, 7.2: 38 bytes each, after the name of 20 its program and bank
    size = int.from_bytes(content[presets + 4 : presets + 8], "little")
    for place in range(presets + 28, presets + 8 + size, 38):
        if content[place : place + 4] == bytes(4):
            content[place] = 1
    (tmp_path / "organ.sf2").write_bytes(content)
    with pytest.raises(ValueError, match=r"organ\.sf2: has no piano"):
        played(notes_to_midi(Notes([[0.2, 0.5]], [60], [100])), tmp_path / "organ.sf2")


@needs_fluidsynth
def test_what_is_no_soundfont_is_named(tmp_path):
    (tmp_path / "piano.sf2").write_text("no SoundFont")
    with pytest.raises(ValueError, match=r"piano\.sf2: is not a SoundFont"):
        played(notes_to_midi(Notes([[0.2, 0.5]], [60], [100])), tmp_path / "piano.sf2")


@needs_fluidsynth
def test_a_soundfont_that_cannot_be_read_is_named_and_not_the_output(tmp_path):
    with pytest.raises(ValueError, match=r"lost\.sf2: cannot be read \(No such file or directory\)"):
        save_audio(tmp_path / "a.wav", render_midi(notes_to_midi(Notes([[0.2, 0.5]], [60], [100])), tmp_path / "lost.sf2"))


def test_the_soundfont_comes_with_pretty_midi():
    assert default_soundfont().read_bytes()[:4] == b"RIFF"
