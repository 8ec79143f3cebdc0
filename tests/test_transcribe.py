"""Recordings of every kind to files; the command run on files and folders."""

import io
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import play

import model as model_module
import transcribe
from audio import has_fluidsynth, load_audio
from constants import HOP_SIZE, SAMPLE_RATE
from evaluate import note_metrics
from model import RELEASED, Sizes, build_model, load_checkpoint, load_ensemble, save_checkpoint
from notes import Notes, read_midi
from recipe import RECIPES
from transcribe import find_recordings

NOTES = Notes(np.array([[0.1, 0.5], [0.6, 1.0], [1.1, 1.8]]), [60, 64, 67], [100, 80, 60])
ENDINGS = {".npz", ".midi", ".png"} | ({".wav"} if has_fluidsynth() else set())


@pytest.fixture(scope="module")
def lively(tmp_path_factory) -> Path:
    """An untrained model whose probabilities move with the audio, so that notes come out and two recordings differ."""
    torch.manual_seed(1)
    model = build_model("crnn", Sizes(4, 8, 8), RECIPES["course"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    path = tmp_path_factory.mktemp("lively") / "lively.pt"
    save_checkpoint(path, model)
    return path


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(model_module, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    monkeypatch.setattr(model_module, "multiplies_bytes", lambda device: False)


@pytest.fixture
def plain(monkeypatch):
    """Neither picture nor sound, which take the most time."""
    monkeypatch.setattr(transcribe, "draw", lambda *_: None)
    monkeypatch.setattr(transcribe, "has_fluidsynth", lambda: False)


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def run(checkpoint: Path, out: Path, *audio: Path) -> int:
    return transcribe.main([str(checkpoint), *map(str, audio), "--save_path", str(out), "--device", "cpu"])


def probabilities(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        return np.concatenate([arrays["frame"], arrays["onset"]], axis=1).astype(np.float32)


# --- what is written ---

def test_four_files_that_agree(lively, tones, tmp_path, capsys):
    assert run(lively, tmp_path / "out", tones.audio) == 0
    assert written(tmp_path / "out") == {f"tones_transcribed{ending}" for ending in ENDINGS}
    base = tmp_path / "out" / "tones_transcribed"
    with np.load(base.with_suffix(".npz")) as arrays:
        assert set(arrays) == {"onset", "frame", "intervals", "pitches", "velocities", "hop_seconds"}
        assert arrays["onset"].shape == arrays["frame"].shape == (2 * SAMPLE_RATE // HOP_SIZE, 88)
        assert arrays["onset"].min() >= 0 and arrays["onset"].max() <= 1 and arrays["hop_seconds"] == 0.032
        notes = Notes(arrays["intervals"], arrays["pitches"], arrays["velocities"])
    assert len(notes) > 5
    midi = read_midi(base.with_suffix(".midi"))
    assert midi.pitches.tolist() == notes.pitches.tolist() and midi.velocities.tolist() == notes.velocities.tolist()
    np.testing.assert_allclose(midi.intervals, notes.intervals, atol=0.001)
    expected, onset, frame = transcribe.transcribe(load_checkpoint(lively), load_audio(tones.audio))
    np.testing.assert_allclose(probabilities(base.with_suffix(".npz")), np.concatenate([frame, onset], axis=1), atol=1e-3)
    assert expected.pitches.tolist() == notes.pitches.tolist()
    assert f"{len(notes)} notes" in capsys.readouterr().out


def test_the_picture_can_be_opened(lively, tones, tmp_path):
    from matplotlib.image import imread
    assert run(lively, tmp_path / "out", tones.audio) == 0
    picture = imread(tmp_path / "out" / "tones_transcribed.png")
    assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05


@pytest.mark.skipif(not has_fluidsynth(), reason="needs libfluidsynth")
def test_the_sound_is_that_of_the_notes(lively, tones, tmp_path):
    assert run(lively, tmp_path / "out", tones.audio) == 0
    sound, rate = soundfile.read(tmp_path / "out" / "tones_transcribed.wav")
    assert rate == SAMPLE_RATE and 1.5 < len(sound) / rate < 6 and np.abs(sound).max() > 0.001


def test_without_fluidsynth_one_line_says_so(lively, tones, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transcribe, "has_fluidsynth", lambda: False)
    assert run(lively, tmp_path / "out", tones.audio) == 0
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("transcribe.py: libfluidsynth is missing")
    assert written(tmp_path / "out") == {f"tones_transcribed{ending}" for ending in (".npz", ".midi", ".png")}


def test_the_thresholds_of_the_checkpoint_are_used(lively, tones, tmp_path, plain):
    strict = load_checkpoint(lively)
    strict.thresholds = {"onset": 0.999999, "frame": 0.5}
    save_checkpoint(tmp_path / "strict.pt", strict)
    assert run(tmp_path / "strict.pt", tmp_path / "out", tones.audio) == 0
    assert len(read_midi(tmp_path / "out" / "tones_transcribed.midi")) == 0


def test_several_checkpoints_are_heard_as_one(lively, tones, tmp_path, plain):
    torch.manual_seed(2)
    other = tmp_path / "other.pt"
    save_checkpoint(other, build_model("rnn", Sizes(4, 8, 8), RECIPES["course"]))
    assert transcribe.main([str(lively), str(other), str(tones.audio), "--save_path", str(tmp_path)]) == 0
    _, onset, frame = transcribe.transcribe(load_ensemble([lively, other]), load_audio(tones.audio))
    np.testing.assert_allclose(probabilities(tmp_path / "tones_transcribed.npz"), np.concatenate([frame, onset], axis=1), atol=1e-3)


# --- what is read ---

def write(path: Path, audio: np.ndarray, rate: int, channels: int = 1, subtype: str | None = None) -> Path:
    soundfile.write(path, np.repeat(audio[:, None], channels, axis=1), rate, subtype=subtype)
    return path


@pytest.mark.parametrize("n_samples", [1, 100, HOP_SIZE, HOP_SIZE + 1])
def test_a_recording_of_a_moment(n_samples, lively, tmp_path):
    path = write(tmp_path / "moment.wav", np.zeros(n_samples, dtype=np.float32), SAMPLE_RATE)
    assert run(lively, tmp_path / "out", path) == 0
    assert written(tmp_path / "out") == {f"moment_transcribed{ending}" for ending in ENDINGS}
    assert probabilities(tmp_path / "out" / "moment_transcribed.npz").shape == (1, 176)


def test_a_recording_is_heard_to_its_end(checkpoint, tmp_path, plain):
    """And not for its first half minute alone."""
    path = write(tmp_path / "long.wav", np.zeros(40 * SAMPLE_RATE, np.float32), SAMPLE_RATE)
    assert run(checkpoint, tmp_path / "out", path) == 0
    with np.load(tmp_path / "out" / "long_transcribed.npz") as arrays:
        assert arrays["frame"].shape == arrays["onset"].shape == (40 * SAMPLE_RATE // HOP_SIZE, 88)


def test_silence_has_no_notes_and_all_its_files(checkpoint, tmp_path):
    path = write(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE, dtype=np.float32), SAMPLE_RATE)
    assert run(checkpoint, tmp_path / "out", path) == 0
    assert written(tmp_path / "out") == {f"silence_transcribed{ending}" for ending in ENDINGS}
    assert len(read_midi(tmp_path / "out" / "silence_transcribed.midi")) == 0
    with np.load(tmp_path / "out" / "silence_transcribed.npz") as arrays:
        assert arrays["intervals"].shape == (0, 2) and arrays["onset"].shape == (31, 88)


# --- which files ---

def test_a_folder_keeps_its_subfolders(checkpoint, tmp_path, plain):
    for name in ("a.wav", "year 2004/b.FLAC", "year 2004/deep/b.ogg", "notes.txt", "old_transcribed.wav"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no music")
        else:
            soundfile.write(path, play(NOTES, 0.5), SAMPLE_RATE, format=path.suffix[1:].upper())
    single = write(tmp_path / "single.wav", play(NOTES, 0.5), SAMPLE_RATE)
    assert run(checkpoint, tmp_path / "out", tmp_path / "in", single) == 0
    bases = ("a_transcribed", "year 2004/b_transcribed", "year 2004/deep/b_transcribed", "single_transcribed")
    assert written(tmp_path / "out") == {f"{base}{ending}" for base in bases for ending in (".npz", ".midi")}


def test_results_lie_in_the_working_folder_by_default(checkpoint, tones, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert transcribe.main([str(checkpoint), str(tones.audio)]) == 0
    assert written(tmp_path / "here") == {f"tones_transcribed{ending}" for ending in ENDINGS}


def test_a_name_with_dots_is_kept_whole(checkpoint, tmp_path):
    path = write(tmp_path / "Sonata Op.27 No.2.flac", play(NOTES, 0.5), SAMPLE_RATE)
    assert run(checkpoint, tmp_path / "out", path) == 0
    assert written(tmp_path / "out") == {f"Sonata Op.27 No.2_transcribed{ending}" for ending in ENDINGS}


def test_names_that_differ_after_a_dot_do_not_meet(checkpoint, tmp_path, plain):
    paths = [write(tmp_path / f"No.{number}.wav", play(NOTES, 0.3 + 0.1 * number), SAMPLE_RATE) for number in (1, 2)]
    assert run(checkpoint, tmp_path / "out", *paths) == 0
    assert written(tmp_path / "out") == {f"No.{number}_transcribed{ending}" for number in (1, 2) for ending in (".npz", ".midi")}
    assert len(probabilities(tmp_path / "out" / "No.1_transcribed.npz")) == 12


def test_names_that_differ_in_their_ending_keep_it(checkpoint, tones, tmp_path, plain):
    (tmp_path / "in").mkdir()
    for name in ("song.wav", "song.flac", "other.wav"):
        write(tmp_path / "in" / name, play(NOTES, 0.5), SAMPLE_RATE)
    assert run(checkpoint, tmp_path / "out", tmp_path / "in") == 0
    assert {name for name in written(tmp_path / "out") if name.endswith(".midi")} == {
        "song.wav_transcribed.midi", "song.flac_transcribed.midi", "other_transcribed.midi"}


def test_an_output_that_cannot_be_written_is_noticed_before_the_work(checkpoint, tones, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transcribe, "load_audio", lambda path: pytest.fail("it worked for nothing"))
    (tmp_path / "file").write_text("no folder")
    assert run(checkpoint, tmp_path / "file", tones.audio) == 1
    assert run(checkpoint, tmp_path / "file" / "below", tones.audio) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1:] for line in said] == [[str(tmp_path / "file"), "cannot be written (Not a directory)"],
                                                       [str(tmp_path / "file" / "below"), "cannot be written (Not a directory)"]]


def test_two_recordings_of_one_name_are_refused(checkpoint, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "song.wav", play(NOTES, 0.5), SAMPLE_RATE)
    assert run(checkpoint, tmp_path / "out", tmp_path / "a", tmp_path / "b" / "song.wav") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "would both write" in error and "song.wav" in error
    assert not (tmp_path / "out").exists()


def test_folders_are_searched_in_order(tmp_path):
    for name in ("b.wav", "a.flac", "c/a.mp3", "c/x.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(target) for _, target in find_recordings([tmp_path])] == ["a_transcribed", "b_transcribed", "c/a_transcribed"]
    assert find_recordings([tmp_path / "c" / "x.pdf"]) == [(tmp_path / "c" / "x.pdf", Path("x_transcribed"))]  # named, so taken


def test_what_is_hidden_or_a_folder_is_no_recording(tmp_path):
    """The temporary file of a killed program, what macOS puts beside a file, and a folder with a sound's name."""
    for name in (".a_transcribed.123.tmp.wav", "._a.wav", "b.wav"):
        (tmp_path / name).touch()
    (tmp_path / "take.aif").mkdir()
    assert [path.name for path, _ in find_recordings([tmp_path])] == ["b.wav"]


@pytest.mark.parametrize("during", ["load_ensemble", "transcribe"])
def test_ctrl_c_says_so_in_a_line(during, checkpoint, tones, tmp_path, plain, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(transcribe, during, interrupted)
    assert run(checkpoint, tmp_path / "out", tones.audio) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "transcribe.py: interrupted; what is written is whole"
    assert not (tmp_path / "out").exists()


def test_names_that_the_terminal_cannot_show_stop_nothing(checkpoint, tones, tmp_path, plain, monkeypatch):
    for name in ("a Ω", "b"):
        shutil.copy(tones.audio, tmp_path / f"{name}.wav")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert run(checkpoint, tmp_path / "out", tmp_path / "a Ω.wav", tmp_path / "b.wav") == 0
    assert b"a \\u03a9.wav" in sys.stdout.buffer.getvalue() and "b_transcribed.midi" in written(tmp_path / "out")


def test_a_failed_file_does_not_stop_the_others(checkpoint, tones, tmp_path, plain, capsys):
    bad = tmp_path / "bad.flac"
    bad.write_text("dear diary")
    last = write(tmp_path / "last.wav", play(NOTES, 0.5), SAMPLE_RATE)
    missing = tmp_path / "missing.flac"
    assert run(checkpoint, tmp_path / "out", bad, tones.audio, missing, last) == 1
    assert written(tmp_path / "out") == {f"{stem}_transcribed{ending}" for stem in ("tones", "last") for ending in (".npz", ".midi")}
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "libfluidsynth" not in line]
    assert [line.startswith(f"transcribe.py: {path}: ") for line, path in zip(errors, (bad, missing), strict=True)] == [True, True]
    assert captured.out.count("->") == 2


def test_a_recording_too_long_for_the_memory_does_not_stop_the_others(checkpoint, tones, tmp_path, plain, monkeypatch, capsys):
    last, whole = write(tmp_path / "last.wav", play(NOTES, 0.5), SAMPLE_RATE), transcribe.transcribe

    def hear(model, audio):
        if len(audio) > SAMPLE_RATE:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return whole(model, audio)

    monkeypatch.setattr(transcribe, "transcribe", hear)
    assert run(checkpoint, tmp_path / "out", tones.audio, last) == 1
    assert f"transcribe.py: {tones.audio}: not enough memory; shorter recordings" in capsys.readouterr().err
    monkeypatch.setattr(transcribe, "load_audio", mock.Mock(side_effect=MemoryError("Unable to allocate 9 GiB for an array")))
    assert run(checkpoint, tmp_path / "none", tones.audio) == 1
    assert f"transcribe.py: {tones.audio}: not enough memory; shorter recordings" in capsys.readouterr().err
    assert "last_transcribed.midi" in written(tmp_path / "out")


@pytest.mark.parametrize("paths", [RELEASED[:1], RELEASED[-1:], RELEASED], ids=["harmonic", "onf", "both"])
def test_the_released_checkpoints_hear_notes(paths, tones):
    """Plain tones are no piano, and yet all are found, and not much else."""
    notes, _, _ = transcribe.transcribe(load_ensemble(paths), load_audio(tones.audio))
    scores = note_metrics(tones.notes, notes, ("note",))
    assert scores["metric/note/recall"] == 1 and scores["metric/note/precision"] >= 0.5


def test_without_a_checkpoint_the_released_one_is_used(checkpoint, tones, tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "RELEASED", [checkpoint])
    assert transcribe.main([str(tones.audio), "--save_path", str(tmp_path)]) == 0
    assert (tmp_path / f"{tones.audio.stem}_transcribed.midi").is_file()


def test_a_checkpoint_alone_is_no_recording(checkpoint, capsys):
    with pytest.raises(SystemExit) as left:
        transcribe.main([str(checkpoint)])
    assert left.value.code == 2 and "no recordings are named" in capsys.readouterr().err
