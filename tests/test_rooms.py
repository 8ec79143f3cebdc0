"""The rooms in which part of the released checkpoint's validation set is played, around recordings of our own."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from audio import load_audio, save_audio
from constants import SAMPLE_RATE
from dataset import COLUMNS
from notes import Notes, write_midi

sys.path.insert(0, str(ROOT / "runs" / "released"))  # for the processes that play, too

import rooms  # noqa: E402  # after the path

CLICK = SAMPLE_RATE // 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two validation recordings and one of test, a click each."""
    rows = []
    for name, split in (("a", "validation"), ("b", "validation"), ("c", "test")):
        audio = np.zeros(SAMPLE_RATE + 77, np.float32)
        audio[CLICK] = 0.5
        save_audio(tmp_path / "data" / "piano" / f"{name}.wav", [audio])
        write_midi(tmp_path / "data" / "piano" / f"{name}.midi", Notes([[0.5, 0.9]], [60], [80]))
        rows.append({**dict.fromkeys(COLUMNS, ""), "split": split, "duration": 1.0,
                     "audio_filename": f"piano/{name}.wav", "midi_filename": f"piano/{name}.midi"})
    (tmp_path / "data" / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data"


@pytest.fixture
def echo(monkeypatch):
    """Instead of a room one echo after 0.1 s."""
    response = np.zeros(SAMPLE_RATE // 10 + 1)
    response[[0, -1]] = 1, 0.5
    monkeypatch.setattr(rooms, "impulse_response", lambda random: response)


def test_sound_keeps_its_time_and_its_length_and_noise_is_where_it_should_be(echo):
    audio = np.zeros(2 * SAMPLE_RATE)
    audio[:: SAMPLE_RATE // 4] = 1
    heard = [rooms.in_room(audio, np.random.default_rng(seed)) for seed in range(20)]
    clean = np.zeros_like(audio)
    clean[:: SAMPLE_RATE // 4] = rooms.PEAK
    clean[SAMPLE_RATE // 10 :: SAMPLE_RATE // 4] = rooms.PEAK / 2
    ratios = [10 * np.log10(np.sum(clean**2) / np.sum((each - clean) ** 2)) for each in heard]
    assert all(len(each) == len(audio) for each in heard)
    assert rooms.SNR_DB[0] - 1e-6 < min(ratios) < 30 < 35 < max(ratios) < rooms.SNR_DB[1] + 1e-6


def test_silence_stays_silent(echo):
    assert not rooms.in_room(np.zeros(1000), np.random.default_rng(0)).any()


def test_a_recording_keeps_its_notes_and_has_its_own_noise(echo, data, tmp_path):
    heard = []
    for number in (0, 0, 1):
        audio, midi = tmp_path / "out" / f"{len(heard)}.flac", tmp_path / "out" / f"{len(heard)}.midi"
        assert rooms.play_in_room(audio, midi, data / "piano" / "a.wav", data / "piano" / "a.midi", number) == pytest.approx(1, abs=0.01)
        assert midi.read_bytes() == (data / "piano" / "a.midi").read_bytes()
        heard.append(load_audio(audio))
        assert len(heard[-1]) == SAMPLE_RATE + 77 and np.argmax(abs(heard[-1])) == CLICK
    assert (heard[0] == heard[1]).all() and (heard[0] != heard[2]).any()


def test_a_folder_is_played_split_by_split_and_what_is_there_is_kept(data, tmp_path, capsys):
    pytest.importorskip("pyroomacoustics")
    assert rooms.main([str(data), str(tmp_path / "out"), "--split", "validation"]) == 0
    assert "2 recordings (0 train, 2 validation, 0 test)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "data.json").read_text())
    assert [row["audio_filename"] for row in rows] == ["piano/a.flac", "piano/b.flac"]
    assert rooms.main([str(data), str(tmp_path / "out"), "--split", "validation"]) == 0
    assert "2 were there" in capsys.readouterr().out


@pytest.mark.parametrize("kind, message", [("folder", "is no folder"), ("split", "no recordings in the train split"),
                                           ("audio", "a.wav"), ("library", "pyroomacoustics")])
def test_what_is_missing_is_named_in_one_line(kind, message, data, tmp_path, capsys, monkeypatch):
    if kind == "audio":
        (data / "piano" / "a.wav").unlink()
    library = None if kind == "library" else types.ModuleType("pyroomacoustics")
    monkeypatch.setitem(sys.modules, "pyroomacoustics", library)
    arguments = {"folder": [str(tmp_path / "none")], "split": [str(data), "--split", "train"]}.get(kind, [str(data)])
    assert rooms.main([arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_in_a_room_the_direct_sound_comes_as_late_as_its_way_is_long_and_the_rest_fades(monkeypatch):
    library, spots = pytest.importorskip("pyroomacoustics"), []

    def noting(add: Callable) -> Callable:
        return lambda self, spot: (spots.append(spot), add(self, spot))

    for name in ("add_source", "add_microphone"):
        monkeypatch.setattr(library.ShoeBox, name, noting(getattr(library.ShoeBox, name)))
    for seed in range(4):
        spots.clear()
        response = rooms.impulse_response(np.random.default_rng(seed))
        metres = np.linalg.norm(np.subtract(*spots))
        assert np.array_equal(response, rooms.impulse_response(np.random.default_rng(seed)))
        first = np.flatnonzero(abs(response) > 0.3 * abs(response).max())[0]
        assert metres >= 2 and abs(first - metres / library.constants.get("c") * SAMPLE_RATE) <= 2
        early, late = (np.mean(response[begin : begin + SAMPLE_RATE // 10] ** 2) for begin in (0, SAMPLE_RATE // 4))
        assert late < 0.2 * early
