"""Tables, the cache, and segments that a seed reproduces."""

import csv
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import play, random_notes, write_tones

import dataset
from audio import audio_to_int16
from constants import HOP_SIZE, MIN_MIDI, SAMPLE_RATE
from dataset import COLUMNS, Recording, Segments, allow_files, find_audio, load_recording, load_split, read_table
from files import write_json
from notes import ONSET_PLACES, Notes, notes_to_rolls

HOP_SECONDS = HOP_SIZE / SAMPLE_RATE
NO_NOTES = Notes([], [], [])


def numbered(*frame_counts: int) -> list[Recording]:
    """Recordings whose every sample tells its recording and its frame: hundreds and units."""
    return [Recording(str(number), (number * 100 + np.arange(count).repeat(HOP_SIZE)).astype(np.int16), NO_NOTES)
            for number, count in enumerate(frame_counts)]


def place_of(item: dict) -> tuple[int, int]:
    """(recording, first frame) of a segment of `numbered` recordings, read off its audio."""
    return divmod(round(float(item["audio"][0]) * 32768), 100)


def places(recordings: list[Recording], frames: int, seed: int, count: int) -> list[tuple[int, int]]:
    segments = Segments(recordings, frames * HOP_SIZE, seed)
    return [place_of(segments[index]) for index in range(count)]


# --- segments ---

def test_a_segment_depends_on_its_seed_and_number_alone():
    recordings = numbered(90, 60, 80)
    first, again = Segments(recordings, 4 * HOP_SIZE, seed=3), Segments(recordings, 4 * HOP_SIZE, seed=3)
    _ = [again[index] for index in range(7)]  # what was drawn before does not matter
    for index in (0, 5, 1_000_000):
        assert all(torch.equal(torch.as_tensor(first[index][key]), torch.as_tensor(again[index][key])) for key in first[index])


def test_seeds_and_numbers_differ():
    recordings = numbered(90, 60, 80)
    runs = [places(recordings, 4, seed, 50) for seed in range(4)]
    assert len({tuple(run) for run in runs}) == 4
    assert all(len(set(run)) > 30 for run in runs)  # of 50 draws from 221 places
    assert runs[0][1:] != runs[1][:-1]  # seed 1 is not seed 0 one step later


def test_every_place_is_drawn_equally_often():
    """Seven frames hold four places for a segment of four; one of exactly four, or fewer, holds one."""
    counts = Counter(places(numbered(7, 4, 2, 5), 4, seed=0, count=1600))
    assert set(counts) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0), (3, 1)}
    assert min(counts.values()) > 150 and max(counts.values()) < 250  # 200 expected, standard deviation 13


def test_a_recording_shorter_than_a_segment_is_followed_by_silence():
    audio = np.full(2 * HOP_SIZE + 100, 16384, np.int16)
    item = Segments([Recording("short", audio, Notes([[0, 9]], [60], [80]))], 5 * HOP_SIZE, seed=0)[0]
    assert item["audio"].dtype == item["onset"].dtype == item["frame"].dtype == torch.float32
    assert (item["audio"][: len(audio)] == 0.5).all() and (item["audio"][len(audio) :] == 0).all()
    assert item["frame"][:, 60 - MIN_MIDI].tolist() == [1, 1, 0, 0, 0]  # the MIDI file's note is longer than the audio
    assert item["onset"].sum() == 1


def test_a_recording_without_a_whole_frame_is_a_silent_segment():
    item = Segments([Recording("tiny", np.full(1, 16384, np.int16), NO_NOTES)], 2 * HOP_SIZE, seed=0)[0]
    assert item["audio"].tolist() == [0.5] + [0] * 1023
    assert item["frame"].shape == (2, 88) and item["frame"].sum() == 0


@pytest.mark.parametrize("midi_seconds", [1.0, 5.0])
def test_midi_shorter_or_longer_than_its_audio(midi_seconds):
    audio = np.zeros(60 * HOP_SIZE + 17, np.int16)  # 1.92 s
    notes = Notes([[0, midi_seconds], [midi_seconds - 0.1, midi_seconds]], [60, 62], [80, 80])
    segments = Segments([Recording("r", audio, notes)], 10 * HOP_SIZE, seed=0)
    assert len(segments) == 51
    for start in (0, 27, 50):
        item = segments.cut(0, start)
        assert item["audio"].shape == (10 * HOP_SIZE,) and item["frame"].shape == item["onset"].shape == (10, 88)
    sounding = 60 if midi_seconds > 2 else int(np.ceil(midi_seconds / HOP_SECONDS))
    rolls = torch.cat([segments.cut(0, start)["frame"] for start in range(0, 60, 10)])
    assert rolls[:, 60 - MIN_MIDI].sum() == sounding


@pytest.mark.parametrize("shape", ONSET_PLACES)
def test_audio_and_labels_of_a_segment_belong_together(shape):
    notes = random_notes(0, 4.0, 12)
    recording = Recording("r", audio_to_int16(play(notes, 4.0)), notes)
    onset, frame = notes_to_rolls(notes, recording.n_frames, 0, shape)
    for start in (0, 33, recording.n_frames - 20):
        item = Segments([recording], 20 * HOP_SIZE, seed=0, onset_target=shape).cut(0, start)
        np.testing.assert_array_equal(item["onset"].numpy(), onset[start : start + 20])
        np.testing.assert_array_equal(item["frame"].numpy(), frame[start : start + 20])
        expected = recording.to_float()[start * HOP_SIZE : (start + 20) * HOP_SIZE]
        assert torch.equal(item["audio"], expected)


def test_the_beginning_of_a_recording():
    recording = Recording("r", np.arange(3 * SAMPLE_RATE, dtype=np.int32).astype(np.int16), Notes([[0, 2], [1.5, 2]], [60, 61], [80, 80]))
    short = recording.until(1.0)
    assert len(short.audio) == SAMPLE_RATE and short.n_frames == 31 and short.name == "r"
    assert short.notes.intervals.tolist() == [[0, 1]]


# --- tables ---

ROWS = [{"canonical_composer": "Frédéric Chopin", "canonical_title": "Ballade, No. 1", "split": split, "year": "2009",
         "midi_filename": f"2009/{split}.midi", "audio_filename": f"2009/{split}.wav", "duration": 1.5}
        for split in ("train", "validation", "test")]


def write_table(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(COLUMNS))
            table.writeheader()
            table.writerows(rows)
    elif "v3" in path.name:  # {column: {row number: value}}
        write_json(path, {column: {str(number): row[column] for number, row in enumerate(rows)} for column in COLUMNS})
    else:
        write_json(path, rows)


@pytest.mark.parametrize("name", ["data.json", "maestro-v1.0.0.csv", "maestro-v2.0.0.csv", "maestro-v3.0.0.csv",
                                  "maestro-v1.0.0.json", "maestro-v2.0.0.json", "maestro-v3.0.0.json"])
def test_every_shape_of_table_gives_the_same_rows(tmp_path, name):
    write_table(tmp_path / name, ROWS)
    assert read_table(tmp_path) == ROWS


@pytest.mark.parametrize("name", ["data.json", "maestro-v3.0.0.csv"])
def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path, name):
    write_table(tmp_path / name, ROWS)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert read_table(tmp_path) == ROWS


def test_a_made_table_comes_before_an_official_one(tmp_path):
    write_table(tmp_path / "maestro-v2.0.0.csv", ROWS)
    write_table(tmp_path / "data.json", ROWS[:1])
    assert read_table(str(tmp_path)) == ROWS[:1]


def test_there_is_no_folder(tmp_path):
    with pytest.raises(OSError, match=r"lost: is no folder; `python prepare\.py demo .*lost`"):
        read_table(tmp_path / "lost")


def test_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither data\.json nor maestro-v"):
        read_table(tmp_path)


@pytest.mark.parametrize("content, message", [
    ("[{", "is not a table"), ("[]", "names no recordings"), ("3", "is not a table"), ('["a", "b"]', "is not a table"),
    ('{"a": {"0": 1}}', "is not a table"), (json.dumps([{**ROWS[0], "duration": "long"}]), "is not a table"),
    (json.dumps([{key: value for key, value in ROWS[0].items() if key != "split"}]), "lacks the column split"),
    (json.dumps([ROWS[0], {key: value for key, value in ROWS[1].items() if key != "audio_filename"}]), "lacks the column audio_filename"),
    (json.dumps([{key: value for key, value in ROWS[0].items() if key != "duration"}]), "lacks the column duration"),
    (json.dumps([{**ROWS[0], "audio_filename": None}]), "is not a table")])
def test_a_broken_table_is_named(tmp_path, content, message):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=rf"data\.json: {message}"):
        read_table(tmp_path)


def test_a_csv_with_an_open_quote_is_named(tmp_path):
    (tmp_path / "maestro-v3.0.0.csv").write_text(",".join(COLUMNS) + '\n"' + "Chopin," * 20000)
    with pytest.raises(ValueError, match=r"maestro-v3\.0\.0\.csv: is not a table of recordings \(Error: field larger"):
        read_table(tmp_path)


def test_an_empty_csv_is_named(tmp_path):
    (tmp_path / "maestro-v3.0.0.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(ValueError, match=r"maestro-v3\.0\.0\.csv: names no recordings"):
        read_table(tmp_path)


# --- recordings ---

def test_a_split_is_loaded_in_order(data_folder):
    recordings = load_split(data_folder, "train")
    assert [recording.name for recording in recordings] == ["r0.flac", "r1.flac", "r2.flac"]
    assert [len(recording.audio) / SAMPLE_RATE for recording in recordings] == [2.0, 2.5, 3.0]
    assert all(recording.audio.dtype == np.int16 and len(recording.notes) == 8 for recording in recordings)
    assert [recording.name for recording in load_split(data_folder, "train", limit=2)] == ["r0.flac", "r1.flac"]
    assert len(load_split(data_folder, "test")) == 2


def test_several_folders_are_one(data_folder, tmp_path):
    """In the order given; a folder without the split adds nothing; every recording has a name of its own."""
    more = Path(shutil.copytree(data_folder, tmp_path / "more"))
    write_json(more / "data.json", [row for row in read_table(data_folder) if row["split"] == "train"])
    parent = os.path.commonpath([more, data_folder])
    names = [f"{os.path.relpath(folder, parent)}/r{number}.flac" for folder in (more, data_folder) for number in range(6)]
    both, alone = load_split([more, data_folder], "train"), load_split(data_folder, "train") * 2
    assert [recording.name for recording in both] == names[:3] + names[6:9]
    assert [len(recording.audio) for recording in both] == [len(recording.audio) for recording in alone]
    assert [recording.notes.pitches.tolist() for recording in both] == [recording.notes.pitches.tolist() for recording in alone]
    assert [recording.name for recording in load_split([more, data_folder], "train", limit=4)] == names[:3] + names[6:7]
    assert [recording.name for recording in load_split([more, data_folder], "test")] == names[10:]


def test_a_folder_is_not_given_twice(data_folder, monkeypatch):
    monkeypatch.chdir(data_folder)
    with pytest.raises(ValueError, match="^.: is given twice$"):
        load_split([".", data_folder], "train")


def test_a_split_that_no_folder_has(data_folder, tmp_path):
    write_json(tmp_path / "data.json", [row for row in read_table(data_folder) if row["split"] == "train"])
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "data.json", read_table(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path}, {other}: no recordings in the test split$"):
        load_split([tmp_path, other], "test")
    with pytest.raises(OSError, match="lost: is no folder"):
        load_split([data_folder, tmp_path / "lost"], "train")


def test_the_course_says_wav_where_the_disk_has_flac(tmp_path):
    write_tones(tmp_path, "a", random_notes(0, 2.0, 4), 2.0)
    write_json(tmp_path / "data.json", [{**ROWS[0], "midi_filename": "a.midi", "audio_filename": "a.wav"}])
    assert len(load_split(tmp_path, "train")[0].audio) == 2 * SAMPLE_RATE
    assert find_audio(tmp_path, "a.wav").name == "a.flac"


def test_the_name_in_the_table_comes_first(tmp_path):
    for name in ("Op.27 No.2.wav", "Op.27 No.2.flac"):
        (tmp_path / name).touch()
    assert find_audio(tmp_path, "Op.27 No.2.wav").name == "Op.27 No.2.wav"


def test_what_a_table_names_and_the_disk_lacks(tmp_path):
    tones = write_tones(tmp_path, "a", random_notes(0, 2.0, 4), 2.0)
    write_json(tmp_path / "data.json", [{**ROWS[0], "midi_filename": "a.midi", "audio_filename": "b.wav"}])
    with pytest.raises(OSError, match=r"b\.wav: is named in the table and not on the disk, nor as \.flac"):
        load_split(tmp_path, "train")
    write_json(tmp_path / "data.json", [{**ROWS[0], "midi_filename": "b.midi", "audio_filename": "a.flac"}])
    with pytest.raises(OSError, match=r"b\.midi: cannot be read \(No such file"):
        load_split(tmp_path, "train")
    with pytest.raises(ValueError, match="no recordings in the test split"):
        load_split(tmp_path, "test")
    write_json(tmp_path / "data.json", [{**ROWS[0], "midi_filename": "a.midi", "audio_filename": "a.flac"}])
    tones.audio.write_text("words")
    with pytest.raises(ValueError, match=r"a\.flac: holds no audio"):
        load_split(tmp_path, "train")


# --- the cache ---

@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The audio files decoded so far."""
    read, load_audio = [], dataset.load_audio
    monkeypatch.setattr(dataset, "load_audio", lambda path: (read.append(path), load_audio(path))[1])
    return read


def assert_same(one: Recording, other: Recording) -> None:
    np.testing.assert_array_equal(one.audio, other.audio)
    assert one.name == other.name
    for field in ("intervals", "pitches", "velocities"):
        np.testing.assert_array_equal(getattr(one.notes, field), getattr(other.notes, field))


def test_the_second_time_comes_from_the_cache(own_cache, reads, tones):
    first, second = (load_recording("tones", tones.audio, tones.midi) for _ in range(2))
    assert reads == [tones.audio]
    assert_same(first, second)
    np.testing.assert_allclose(second.to_float().numpy(), play(tones.notes, 2.0), atol=2 / 32768)
    assert isinstance(second.audio, np.memmap)


def test_a_changed_file_is_read_again(own_cache, reads, tones):
    load_recording("tones", tones.audio, tones.midi)
    write_tones(tones.audio.parent, "tones", Notes([[0.2, 0.4]], [72], [90]), 2.0)
    for path in (tones.audio, tones.midi):
        os.utime(path, (1, 1))  # the clock need not have moved on
    changed = load_recording("tones", tones.audio, tones.midi)
    assert changed.notes.pitches.tolist() == [72] and len(reads) == 2
    os.utime(tones.midi, (2, 2))
    load_recording("tones", tones.audio, tones.midi)
    assert len(reads) == 3


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, reads, tones):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    first, second = (load_recording("tones", tones.audio, tones.midi) for _ in range(2))
    assert len(reads) == 2 and len(first.audio) == 2 * SAMPLE_RATE
    assert_same(first, second)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nonsense"])
def test_a_broken_cache_is_made_again(own_cache, reads, tones, suffix, content):
    """A power cut can leave an empty file under a name that was renamed in time."""
    first = load_recording("tones", tones.audio, tones.midi)
    (broken,) = own_cache.glob(f"**/*.{suffix}")
    broken.unlink()  # `first` maps the old one
    broken.write_bytes(content)
    assert_same(first, load_recording("tones", tones.audio, tones.midi))
    assert_same(first, load_recording("tones", tones.audio, tones.midi))
    assert len(reads) == 2


def test_what_cannot_be_read_leaves_no_cache(own_cache, tones):
    tones.audio.write_bytes(tones.audio.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"tones\.flac"):
        load_recording("tones", tones.audio, tones.midi)
    assert not list(own_cache.glob("**/*.np*"))


@pytest.mark.parametrize("name", ["/etc/passwd", "../elsewhere.wav", "a/../../b.flac"])
def test_names_stay_in_the_folder(tmp_path, name):
    """Results are written by these names too, and must not land on other files."""
    row = {"canonical_composer": "a", "canonical_title": "b", "split": "train", "year": 1, "midi_filename": "a.midi",
           "audio_filename": name, "duration": 1}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r"data\.json: is not a table of recordings .*lies outside the folder"):
        read_table(tmp_path)


def test_segments_of_a_mapped_file_are_those_of_memory(tmp_path):
    audio = np.random.default_rng(0).integers(-30000, 30000, 40 * HOP_SIZE + 77, dtype=np.int16)
    np.save(tmp_path / "audio.npy", audio)
    mapped = Segments([Recording("mapped", np.load(tmp_path / "audio.npy", mmap_mode="r"), NO_NOTES)], 7 * HOP_SIZE, 0)
    held = Segments([Recording("held", audio, NO_NOTES)], 7 * HOP_SIZE, 0)
    for start in (0, 1, 20, 33, 39, 40, 41, 60):  # the last ones reach past the end, or begin there
        assert torch.equal(mapped.cut(0, start)["audio"], held.cut(0, start)["audio"])


def test_a_process_may_have_a_file_open_for_each_of_many_recordings():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_files(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, before[1])
        allow_files(500)  # never fewer than there were
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
