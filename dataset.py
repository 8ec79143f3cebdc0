"""Recordings on disk: tables of MAESTRO's shape, audio and notes kept in a cache, segments cut for training."""

import contextlib
import csv
import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from audio import INT16, audio_to_int16, load_audio
from constants import HOP_SIZE, N_KEYS, SAMPLE_RATE
from files import written_whole
from notes import Notes, notes_to_rolls, read_midi

SPLITS = ("train", "validation", "test")
COLUMNS = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration")
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".mp3")  # tried in this order where a table's own name is not on the disk
CACHE_VERSION = "3"  # part of every cache name: a change of what load_audio or read_midi give needs a new one


@dataclass(frozen=True)
class Recording:
    """One performance: its `name`, see load_split, `audio` (S,) int16 at SAMPLE_RATE, its `notes`, pedal included, the MIDI
    file they were read from, for those who ask for more than notes, and whether training shall believe its offsets."""

    name: str
    audio: np.ndarray
    notes: Notes
    midi_path: Path | None = None
    has_offsets: bool = True

    @property
    def n_frames(self) -> int:
        return len(self.audio) // HOP_SIZE  # a shorter rest at the end belongs to no frame

    def until(self, seconds: float) -> "Recording":
        """Its first `seconds`."""
        return replace(self, audio=self.audio[: round(seconds * SAMPLE_RATE)], notes=self.notes.until(seconds))

    def to_float(self) -> Tensor:
        """(S,) float32 in [-1, 1]."""
        audio = torch.from_numpy(self.audio.astype(np.float32) / INT16)
        forget_pages(self.audio)
        return audio


def fetch_pages(audio: np.ndarray, first: int, last: int) -> None:
    """Ask for samples first to last of a mapped file at once; page by page a disk is twenty times slower."""
    mapping = getattr(audio, "_mmap", None)
    if first < last and mapping is not None and hasattr(mapping, "madvise"):
        begin, end = (audio.offset % mmap.ALLOCATIONGRANULARITY + number * audio.itemsize for number in (first, last))
        begin -= begin % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, begin, end - begin)


def forget_pages(audio: np.ndarray) -> None:
    """Let go of what was read of a mapped file; else all of a large data set would come to count as this process's memory."""
    mapping = getattr(audio, "_mmap", None)
    if mapping is not None and hasattr(mapping, "madvise"):  # Windows has none, and trims mapped files by itself
        mapping.madvise(mmap.MADV_DONTNEED)


def find_table(folder: str | Path) -> Path | None:
    """The table of a data folder, if there is one."""
    folder = Path(folder)
    tables = [folder / "data.json", *sorted(folder.glob("maestro-v*.csv")), *sorted(folder.glob("maestro-v*.json"))]
    return next((table for table in tables if table.is_file()), None)


def read_table(folder: str | Path) -> list[dict[str, Any]]:
    """Read the table of a data folder: `data.json`, or the `maestro-v*.csv` or `.json` of an official download.

    Returns:
        A row a recording, with the keys of COLUMNS.

    Raises:
        OSError: there is no folder, or its table cannot be opened.
        ValueError: the folder holds no table, or one that does not have these columns.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder}: is no folder; `python prepare.py demo {folder}` would make a small data set there")
    path = find_table(folder)
    if path is None:
        raise ValueError(f"{folder}: holds neither data.json nor maestro-v*.csv; make a data folder with prepare.py, or name another")
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:  # some editors begin with a byte order mark
                rows = list(csv.DictReader(file))
        else:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(rows, dict):  # MAESTRO v3: {column: {row number: value}}
                rows = [{column: cells[number] for column, cells in rows.items()} for number in rows["split"]]
        missing = [column for column in COLUMNS if any(column not in row for row in rows)]
        rows = [{**row, "duration": float(row.get("duration", 0))} for row in rows]
        for name in (row.get(column, "") for row in rows for column in ("midi_filename", "audio_filename")):
            if Path(name).is_absolute() or ".." in Path(name).parts:  # what is named after a recording stays in its folder
                raise ValueError(f"{name} lies outside the folder")
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path}: is not a table of recordings ({type(error).__name__}: {error})") from error
    if missing or not rows:
        raise ValueError(f"{path}: {'lacks the column ' + missing[0] if missing else 'names no recordings'}")
    return rows


def find_audio(folder: str | Path, name: str) -> Path:
    """The audio file of a row. The course's table says `.wav` where the disk has `.flac`; either is found.

    Raises:
        OSError: there is none.
    """
    path = Path(folder) / name
    for candidate in [path, *(path.with_suffix(suffix) for suffix in AUDIO_SUFFIXES)]:
        if candidate.is_file():
            return candidate
    raise OSError(f"{path}: is named in the table and not on the disk, nor as {', '.join(AUDIO_SUFFIXES)}")


def cache_folder() -> Path:
    """Where decoded recordings are kept: 115 MB an hour of music. May be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "piano_transcription"


def load_recording(name: str, audio_path: Path, midi_path: Path) -> Recording:
    """Decode a recording, or map the one in the cache when neither file has changed since.

    Raises:
        OSError, ValueError: as load_audio and read_midi do.
    """
    try:
        facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (audio_path, midi_path)]
    except OSError as error:
        raise OSError(f"{error.filename}: cannot be read ({error.strerror})") from error
    key = hashlib.sha1(repr((CACHE_VERSION, SAMPLE_RATE, facts)).encode()).hexdigest()
    audio_cache, notes_cache = cache_folder() / f"{key}.npy", cache_folder() / f"{key}.npz"
    try:
        audio = np.load(audio_cache, mmap_mode="r")  # pages come from disk as segments need them, shared by all workers
        with np.load(notes_cache) as arrays:
            return Recording(name, audio, Notes(arrays["intervals"], arrays["pitches"], arrays["velocities"]), midi_path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or left broken by a power cut
    notes, audio = read_midi(midi_path), audio_to_int16(load_audio(audio_path))
    try:
        with written_whole(notes_cache) as temporary:
            np.savez(temporary, intervals=notes.intervals, pitches=notes.pitches, velocities=notes.velocities)
        with written_whole(audio_cache) as temporary:
            np.save(temporary, audio)
        audio = np.load(audio_cache, mmap_mode="r")
    except OSError:
        pass  # no room for a cache: the recording stays in memory
    return Recording(name, audio, notes, midi_path)


def allow_files(most: int = 10240) -> None:
    """Let this process have so many files open, where the system does: each mapped recording is one, and many allow 1024 or 256."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # Windows has neither it nor the limit
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def load_split(data: str | Path | Sequence[str | Path], split: str, limit: int | None = None) -> list[Recording]:
    """Load the recordings of one split of a data folder, or of several one after the other; the first `limit` of them.

    A folder that lacks the split gives none. A recording is called what its table calls it; where there are several
    folders, the part of the folder's path that tells it from the others comes before that.

    Raises:
        OSError, ValueError: a file is missing or broken, the message names it; or the split is empty, or a folder given twice.
    """
    allow_files()
    folders = [str(data)] if isinstance(data, (str, Path)) else [str(folder) for folder in data]
    paths = [os.path.abspath(folder) for folder in folders]
    parent = os.path.commonpath(paths)
    found = []  # (name, audio, MIDI)
    for folder, path in zip(folders, paths):
        if paths.count(path) > 1:
            raise ValueError(f"{folder}: is given twice")
        prefix = f"{os.path.relpath(path, parent)}/" if len(folders) > 1 else ""
        for row in read_table(folder):
            if row["split"] == split and len(found) != limit:
                found.append((prefix + row["audio_filename"], find_audio(folder, row["audio_filename"]), Path(folder) / row["midi_filename"]))
    if not found:
        raise ValueError(f"{', '.join(folders)}: no recordings in the {split} split")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # libsndfile decodes outside Python's lock
        results = pool.map(lambda paths: load_recording(*paths), found)  # where one fails, those to come are left out
        return list(tqdm(results, f"loading {split}", len(found), unit="recording", leave=False, disable=None))


class Segments(torch.utils.data.Dataset):
    """Random segments of recordings; segment i of a run is drawn from (seed, i) alone.

    So nothing has to be remembered: workers, epochs, a resumed run and the ranks of a distributed one draw just what one
    long single run would. Every frame at which a whole segment fits is drawn with equal probability, so longer recordings
    come proportionally more often; a recording shorter than a segment has one place, and silence after it.
    """

    def __init__(self, recordings: list[Recording], sequence_length: int, seed: int, onset_target: str = "one") -> None:
        """
        Args:
            sequence_length: samples in a segment, a multiple of HOP_SIZE.
            onset_target: as for `notes_to_rolls`.
        """
        self.recordings, self.sequence_length, self.seed, self.onset_target = recordings, sequence_length, seed, onset_target
        self.n_frames = sequence_length // HOP_SIZE
        self.places = np.cumsum([max(1, recording.n_frames - self.n_frames + 1) for recording in recordings])

    def __len__(self) -> int:
        """How many different segments there are; any number of them may be drawn."""
        return int(self.places[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """audio (S,) float32, onset and frame (T, 88) float32, whether its offsets count, and the number of the recording."""
        random = np.random.default_rng((self.seed, index))
        place = random.integers(len(self))
        number = int(np.searchsorted(self.places, place, side="right"))
        start = int(place - (self.places[number - 1] if number else 0))
        return {"recording": number, **self.cut(number, start)}

    def cut(self, number: int, start: int) -> dict[str, Tensor]:
        """The segment of recording `number` that begins with frame `start`; beyond the end of the audio all is silent.

        Returns:
            audio (S,), onset and frame (T, 88), all float32, and has_offsets, a bool without dimensions.
        """
        recording = self.recordings[number]
        audio = np.zeros(self.sequence_length, dtype=np.float32)
        first, last = start * HOP_SIZE, min(start * HOP_SIZE + self.sequence_length, len(recording.audio))
        fetch_pages(recording.audio, first, last)
        piece = recording.audio[first:last]
        np.multiply(piece, np.float32(1 / INT16), out=audio[: len(piece)])
        forget_pages(recording.audio)
        rolls = np.zeros((2, self.n_frames, N_KEYS), dtype=np.float32)
        inside = min(self.n_frames, recording.n_frames - start)
        if inside > 0:
            rolls[0, :inside], rolls[1, :inside] = notes_to_rolls(recording.notes, inside, start, self.onset_target)
        return {"audio": torch.from_numpy(audio), "onset": torch.from_numpy(rolls[0]), "frame": torch.from_numpy(rolls[1]),
                "has_offsets": torch.tensor(recording.has_offsets)}
