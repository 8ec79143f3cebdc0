"""Small real recordings, made on the spot and read back by the project's own readers."""

import dataclasses
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from audio import save_audio
from constants import SAMPLE_RATE
from files import write_json
from model import Sizes, build_model, save_checkpoint
from notes import Notes, write_midi

ROOT = Path(__file__).resolve().parent.parent

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers everywhere; test_cuda.py looks at GPUs
torch.set_num_threads(1)  # these models are so small that threads only wait for each other


@dataclass
class Tones:
    audio: Path
    midi: Path
    notes: Notes


def play(notes: Notes, seconds: float) -> np.ndarray:
    """Decaying tones with three partials, (S,) float32 at SAMPLE_RATE; silent from each note's offset on."""
    audio = np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)
    for (onset, offset), pitch, velocity in zip(notes.intervals, notes.pitches, notes.velocities):
        first, last = round(onset * SAMPLE_RATE), min(round(offset * SAMPLE_RATE), len(audio))
        time = np.arange(max(0, last - first)) / SAMPLE_RATE
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        tone = sum(np.sin(2 * np.pi * hertz * n * time) / n for n in (1, 2, 3) if hertz * n < SAMPLE_RATE / 2)
        audio[first : first + len(time)] += (velocity / 127 * 0.2 * np.exp(-3 * time) * tone).astype(np.float32)
    return np.clip(audio, -1, 1)


def write_tones(folder: Path, name: str, notes: Notes, seconds: float) -> Tones:
    tones = Tones(folder / f"{name}.flac", folder / f"{name}.midi", notes)
    save_audio(tones.audio, [play(notes, seconds)])
    write_midi(tones.midi, notes)
    return tones


def random_notes(seed: int, seconds: float, count: int) -> Notes:
    """Notes on different keys, so that none ends another."""
    random = np.random.default_rng(seed)
    onsets = np.sort(random.uniform(0.05, seconds - 0.4, count))
    return Notes(np.stack([onsets, onsets + random.uniform(0.1, 0.35, count)], axis=1),
                 random.permutation(np.arange(40, 90))[:count], random.integers(40, 120, count))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or fills the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tones(tmp_path: Path) -> Tones:
    """Two seconds, three notes."""
    notes = Notes(np.array([[0.1, 0.5], [0.6, 1.0], [1.1, 1.8]]), [60, 64, 67], [100, 80, 60])
    return write_tones(tmp_path, "tones", notes, 2.0)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of six short recordings: three train, one validation, two test."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number, split in enumerate(["train"] * 3 + ["validation"] + ["test"] * 2):
        seconds = 2.0 + 0.5 * number
        write_tones(folder, f"r{number}", random_notes(number, seconds, 8), seconds)
        rows.append({"canonical_composer": "tester", "canonical_title": f"piece {number}", "split": split, "year": 2024,
                     "midi_filename": f"r{number}.midi", "audio_filename": f"r{number}.flac", "duration": seconds})
    write_json(folder / "data.json", rows)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained onf, weights only."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    save_checkpoint(path, build_model("onf", Sizes(4, 8, 8)))
    return path


class Touch:
    """Unpickling one creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def broken(tmp_path: Path, kind: str) -> Path:
    """A file at tmp_path/m.pt that is no checkpoint, in one of many ways."""
    path = tmp_path / "m.pt"
    save_checkpoint(path, build_model("rnn", Sizes(4, 8, 8)))
    state = torch.load(path, weights_only=True)
    changes = {"code": {"thresholds": Touch(tmp_path / "touched")}, "no thresholds": {"thresholds": {}},
               "constants": {"constants": {**state["constants"], "HOP_SIZE": 256}}, "no constants": {"constants": {}},
               "unknown model": {"model": "transformer"}, "wrong class": {"model": "onf"},
               "wrong sizes": {"sizes": dataclasses.asdict(Sizes(4, 8, 9))}, "unknown size": {"sizes": {**state["sizes"], "heads": 8}},
               "not numbers": {"weights": {name: value * torch.nan if value.is_floating_point() else value for name, value in state["weights"].items()}}}
    contents = {"empty": b"", "text": b"I am a letter, and no checkpoint.\n" * 5, "truncated": path.read_bytes()[: path.stat().st_size // 2],
                "pickle": pickle.dumps(Touch(tmp_path / "touched"), protocol=2)}
    others = {"tensor": torch.zeros(3), "dictionary": {"a": 1}}
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind in ("missing", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    else:
        torch.save(others[kind] if kind in others else {**state, **changes[kind]}, path)
    return path


BROKEN = {"missing": "cannot be read", "empty": "not a checkpoint", "text": "not a checkpoint", "truncated": "not a whole one",
          "folder": "cannot be read", "code": "holds code", "pickle": "holds code", "constants": "HOP_SIZE = 256",
          "no constants": "= None", "tensor": "not a checkpoint of train.py", "dictionary": "not a checkpoint of train.py",
          "unknown model": "'transformer'", "wrong sizes": "does not fit", "wrong class": "does not fit", "unknown size": "does not fit",
          "no thresholds": "does not fit", "not numbers": "not numbers"}
