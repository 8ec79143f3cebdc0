"""Time, pedal and piano rolls."""

from pathlib import Path

import numpy as np
import pretty_midi
import pytest
import torch
from conftest import random_notes

from constants import HOP_SIZE, MAX_MIDI, MIN_MIDI, SAMPLE_RATE
from evaluate import extract_notes
from model import LogMelSpectrogram
from notes import (
    ONSET_PLACES,
    Notes,
    frames_to_seconds,
    hold_with_pedal,
    keys_of,
    notes_to_midi,
    notes_to_rolls,
    open_midi,
    read_midi,
    seconds_to_frames,
    write_midi,
)

HOP_SECONDS = HOP_SIZE / SAMPLE_RATE


def scattered_notes(count: int, seed: int = 0) -> Notes:
    """Short notes at random times within their frames, at least 0.25 s apart."""
    random = np.random.default_rng(seed)
    onsets = 0.3 + np.cumsum(random.uniform(0.25, 0.35, count))
    return Notes(np.stack([onsets, onsets + random.uniform(0.02, 0.12, count)], axis=1),
                 random.integers(50, 90, count), random.integers(30, 127, count))


def frames_after(notes: Notes) -> int:
    return int(seconds_to_frames(notes.intervals[-1, 1])) + 10


def write_tracks(path: Path, tracks: list[tuple[list[tuple], list[tuple]]], drum: bool = False) -> Path:
    """A MIDI file of (notes, pedal) tracks: (onset, offset, pitch) and (seconds, CC64 value)."""
    midi = pretty_midi.PrettyMIDI(resolution=960)
    for notes, pedal in tracks:
        track = pretty_midi.Instrument(program=0, is_drum=drum)
        track.notes = [pretty_midi.Note(80, pitch, onset, offset) for onset, offset, pitch in notes]
        track.control_changes = [pretty_midi.ControlChange(64, value, seconds) for seconds, value in pedal]
        midi.instruments.append(track)
    midi.write(str(path))
    return path


def listed(notes: Notes) -> list[tuple]:
    return [(round(onset, 3), round(offset, 3), pitch) for (onset, offset), pitch in zip(notes.intervals.tolist(), notes.pitches.tolist())]


# --- time ---

def test_frames_at_their_borders():
    borders = np.arange(100_000) * HOP_SIZE / SAMPLE_RATE  # 53 minutes, and floats err at many of them
    assert seconds_to_frames(borders).tolist() == list(range(100_000))
    assert seconds_to_frames(borders[1:] - 1 / SAMPLE_RATE).tolist() == list(range(99_999))
    assert seconds_to_frames(3.2) == 100
    assert frames_to_seconds(np.array([0, 100])).tolist() == pytest.approx([0.016, 3.216])
    assert seconds_to_frames(frames_to_seconds(np.arange(1000))).tolist() == list(range(1000))


def test_onsets_from_perfect_rolls_are_unbiased(tmp_path):
    notes = scattered_notes(300)
    found = extract_notes(*notes_to_rolls(notes, frames_after(notes)))
    write_midi(tmp_path / "found.midi", found)
    for name, est in (("decoded", found), ("read back", read_midi(tmp_path / "found.midi"))):
        assert est.pitches.tolist() == notes.pitches.tolist(), name
        error = est.intervals[:, 0] - notes.intervals[:, 0]
        assert abs(error.mean()) < 0.004, name
        assert abs(error).max() < 0.5 * HOP_SECONDS + 0.001, name


def test_clicks_peak_in_the_log_mel_where_their_labels_are():
    """A window that is centred half a frame off would move every second click to a neighbour frame."""
    notes = scattered_notes(240, seed=1)
    n_frames = frames_after(notes)
    audio = np.zeros(n_frames * HOP_SIZE, dtype=np.float32)
    samples = np.round(notes.intervals[:, 0] * SAMPLE_RATE).astype(int)
    audio[samples] = 0.9
    power = LogMelSpectrogram()(torch.from_numpy(audio)[None])[0].exp().sum(1).numpy()
    labels, keys = np.nonzero(notes_to_rolls(notes, n_frames)[0])
    assert len(power) == n_frames and keys.tolist() == (notes.pitches - MIN_MIDI).tolist()
    peaks = np.array([label - 3 + power[label - 3 : label + 4].argmax() for label in labels])
    assert abs(peaks - labels).max() <= 1
    inside = abs(samples % HOP_SIZE - HOP_SIZE / 2) < HOP_SIZE / 2 - 16  # 1 ms from a border two windows hear a click alike
    assert inside.sum() > 200
    assert (peaks == labels)[inside].all()


def test_midi_survives_the_disk(tmp_path):
    notes = scattered_notes(300, seed=3)
    write_midi(tmp_path / "song.midi", notes)
    again = read_midi(tmp_path / "song.midi")
    assert again.pitches.tolist() == notes.pitches.tolist()
    assert again.velocities.tolist() == notes.velocities.tolist()
    np.testing.assert_allclose(again.intervals, notes.intervals, atol=0.001)


def test_repeated_notes_survive_the_disk(tmp_path):
    notes = Notes([[0, 0.5], [0.5, 1], [1, 1.2]], [60, 60, 60], [50, 60, 70])
    write_midi(tmp_path / "song.midi", notes)
    assert listed(read_midi(tmp_path / "song.midi")) == [(0, 0.5, 60), (0.5, 1, 60), (1, 1.2, 60)]


def test_an_overlap_on_one_key_survives_the_disk(tmp_path):
    """In MIDI the first note-off would end both notes: the file has to say where the first was cut."""
    write_midi(tmp_path / "song.midi", Notes([[0, 1], [0.5, 1.5]], [60, 60], [50, 60]))
    assert listed(read_midi(tmp_path / "song.midi")) == [(0, 0.5, 60), (0.5, 1.5, 60)]


def test_no_notes_survive_the_disk(tmp_path):
    write_midi(tmp_path / "song.midi", Notes([], [], []))
    assert read_midi(tmp_path / "song.midi").intervals.shape == (0, 2)


# --- the sustain pedal ---

PEDAL = {
    "a pedal holds until it goes up":
        ([(0.5, 1, 60)], [(0.75, 127), (2, 0)], [(0.5, 2, 60)]),
    "a strike of the same key ends what the pedal held":
        ([(0.5, 1, 60), (1.5, 1.75, 60)], [(0.75, 127), (2, 0)], [(0.5, 1.5, 60), (1.5, 2, 60)]),
    "a strike of another key does not":
        ([(0.5, 1, 60), (1.5, 1.75, 61)], [(0.75, 127), (2, 0)], [(0.5, 2, 60), (1.5, 2, 61)]),
    "a pedal still down holds to the end of the file":
        ([(0.5, 1, 60), (1, 3, 72)], [(0.75, 127)], [(0.5, 3, 60), (1, 3, 72)]),
    "63 is up":
        ([(0.5, 1, 60)], [(0.75, 63), (2, 0)], [(0.5, 1, 60)]),
    "64 is down":
        ([(0.5, 1, 60)], [(0.75, 64), (2, 0)], [(0.5, 2, 60)]),
    "a half pedal that stays at 64 goes on holding, 63 lets go":
        ([(0.5, 1, 60)], [(0.75, 127), (1.5, 64), (2, 63), (3, 0)], [(0.5, 2, 60)]),
    "a pedal after the key is up comes too late":
        ([(0.5, 1, 60)], [(1.25, 127), (2, 0)], [(0.5, 1, 60)]),
    "a pedal that goes up before the key changes nothing":
        ([(0.5, 2, 60)], [(0.75, 127), (1, 0)], [(0.5, 2, 60)]),
    "only the first time the pedal goes up counts":
        ([(0.5, 1, 60)], [(0.75, 127), (1.25, 0), (1.5, 127), (3, 0)], [(0.5, 1.25, 60)]),
    "a pedal pressed before the note":
        ([(0.5, 1, 60)], [(0.25, 127), (2, 0)], [(0.5, 2, 60)]),
    "no pedal":
        ([(0.5, 1, 60), (1, 1.5, 60)], [], [(0.5, 1, 60), (1, 1.5, 60)]),
}


@pytest.mark.parametrize("case", PEDAL)
def test_pedal(tmp_path, case):
    notes, pedal, expected = PEDAL[case]
    assert listed(read_midi(write_tracks(tmp_path / "song.midi", [(notes, pedal)]))) == expected


def test_keys_are_read_as_they_were_held(tmp_path):
    path = write_tracks(tmp_path / "k.midi", [([(0.5, 1.0, 60)], [(0.25, 127), (2.0, 0)])])
    keys, pedal, end = keys_of(open_midi(path))
    assert listed(keys) == [(0.5, 1.0, 60)] and pedal == [(0.25, 127), (2.0, 0)] and end == 2.0
    assert listed(read_midi(path)) == [(0.5, 2.0, 60)]


def test_pedal_events_need_no_order():
    notes = Notes([[0.5, 1]], [60], [80])
    assert listed(hold_with_pedal(notes, [(2, 0), (0.75, 127)], 3)) == [(0.5, 2, 60)]


def test_a_key_struck_while_it_sounds_ends_the_note_before():
    notes = Notes([[0.5, 2], [1, 1.5], [1, 1.25]], [60, 60, 60], [80, 70, 60])  # the last two: one strike, told twice
    assert listed(hold_with_pedal(notes, [], 3)) == [(0.5, 1, 60), (1, 1.5, 60)]


def test_two_staves_are_one_keyboard(tmp_path):
    right, left = [(0.5, 2, 60), (2.25, 2.5, 64)], [(1, 1.5, 60), (2.25, 3, 64), (0.25, 0.5, 40)]
    notes = read_midi(write_tracks(tmp_path / "song.midi", [(right, []), (left, [])]))
    assert listed(notes) == [(0.25, 0.5, 40), (0.5, 1, 60), (1, 1.5, 60), (2.25, 3, 64)]


def test_two_staves_have_one_pedal(tmp_path):
    """A piano has one sustain pedal, and render_midi plays it so: it holds the notes of every staff."""
    notes = read_midi(write_tracks(tmp_path / "song.midi", [([(0.5, 1, 72)], []), ([(0.5, 1, 48)], [(0.75, 127), (2, 0)])]))
    assert listed(notes) == [(0.5, 2, 48), (0.5, 2, 72)]


def test_keys_off_the_keyboard_and_drums_are_left_out(tmp_path):
    edge = [(0.5, 1, 20), (0.5, 1, MIN_MIDI), (0.5, 1, MAX_MIDI), (0.5, 1, 109)]
    assert read_midi(write_tracks(tmp_path / "song.midi", [(edge, [])])).pitches.tolist() == [21, 108]
    assert len(read_midi(write_tracks(tmp_path / "drums.midi", [([(0.5, 1, 60)], [])], drum=True))) == 0


# --- notes and rolls ---

def test_notes_are_kept_in_order_of_onset_then_pitch():
    notes = Notes([[2, 3], [1, 2], [1, 4]], [60, 65, 50], [1, 2, 3])
    assert notes.pitches.tolist() == [50, 65, 60] and notes.velocities.tolist() == [3, 2, 1]
    assert notes.intervals.tolist() == [[1, 4], [1, 2], [2, 3]]


def test_the_beginning_of_notes():
    notes = Notes([[0, 1], [1, 3], [2, 4]], [60, 61, 62], [1, 2, 3]).until(2.0)
    assert listed(notes) == [(0, 1, 60), (1, 2, 61)]


def test_rolls_by_hand():
    # 0.1 s is in frame 3, 0.5 s in frame 15; 0.32 s and 0.64 s are the starts of frames 10 and 20
    onset, frame = notes_to_rolls(Notes([[0.1, 0.5], [0.32, 0.64]], [MIN_MIDI, MAX_MIDI], [80, 80]), 30)
    assert onset.shape == frame.shape == (30, 88)
    assert [place.tolist() for place in np.nonzero(onset)] == [[3, 10], [0, 87]]
    assert np.flatnonzero(frame[:, 0]).tolist() == list(range(3, 16))
    assert np.flatnonzero(frame[:, 87]).tolist() == list(range(10, 20))
    assert frame[:, 1:87].sum() == 0


def test_a_note_shorter_than_a_frame_has_an_onset_and_a_frame():
    onset, frame = notes_to_rolls(Notes([[0.1, 0.1005], [0.2, 0.20001]], [60, 62], [80, 80]), 10)
    for key, place in ((60, 3), (62, 6)):
        assert np.flatnonzero(onset[:, key - MIN_MIDI]).tolist() == np.flatnonzero(frame[:, key - MIN_MIDI]).tolist() == [place]


def test_notes_past_the_end_are_cut_off_or_left_out():
    onset, frame = notes_to_rolls(Notes([[0.1, 99], [0.32, 0.4], [50, 51]], [60, 61, 62], [80, 80, 80]), 10)
    assert np.flatnonzero(frame[:, 60 - MIN_MIDI]).tolist() == list(range(3, 10))
    assert onset.sum() == 1 and frame[:, [61 - MIN_MIDI, 62 - MIN_MIDI]].sum() == 0  # 0.32 s is frame 10, the first beyond


def test_a_note_that_began_earlier_sounds_without_an_onset():
    onset, frame = notes_to_rolls(Notes([[0.1, 0.5]], [60], [80]), n_frames=10, start=10)  # frames 3 to 15
    assert onset.sum() == 0
    assert np.flatnonzero(frame[:, 60 - MIN_MIDI]).tolist() == list(range(6))


# --- onset targets ---

@pytest.mark.parametrize("shape, expected", [("one", [0, 0, 1, 0, 0]), ("two", [0, 0, 1, 1, 0])])
@pytest.mark.parametrize("seconds", [0.02, 9])
def test_onset_targets_by_hand(shape, expected, seconds):
    """An onset over two frames is as long for a note shorter than that."""
    onset = 2.5 * HOP_SECONDS + 0.008
    targets = notes_to_rolls(Notes([[onset, onset + seconds]], [60], [80]), 5, 0, shape)[0]
    assert targets.shape == (5, 88) and targets[:, 60 - MIN_MIDI].tolist() == expected
    assert targets.sum() == targets[:, 60 - MIN_MIDI].sum()


@pytest.mark.parametrize("shape", ONSET_PLACES)
def test_onset_targets_are_the_same_cut_or_built(shape):
    """What lies before a segment or behind it reaches in, and the frame roll knows nothing of it."""
    notes = Notes(*(np.concatenate(parts) for parts in zip(*((n.intervals, n.pitches, n.velocities)
                                                             for n in (random_notes(seed, 3.0, 30) for seed in range(5))))))
    for seconds in (notes.intervals, notes.intervals[:, :1] + [0, 1e-6]):
        notes = Notes(seconds, notes.pitches, notes.velocities)
        whole = np.stack(notes_to_rolls(notes, 90, 0, shape))
        np.testing.assert_array_equal(whole[1], notes_to_rolls(notes, 90)[1])
        for length in (1, 2, 7, 45):
            cut = [np.stack(notes_to_rolls(notes, length, start, shape)) for start in range(0, 90, length)]
            np.testing.assert_array_equal(np.concatenate(cut, axis=1)[:, :90], whole)


def test_two_strikes_in_a_row_overlap():
    notes = Notes([[3.5 * HOP_SECONDS, 9], [4.5 * HOP_SECONDS, 9]], [60, 60], [80, 80])
    assert notes_to_rolls(notes, 8, 0, "two")[0][:, 60 - MIN_MIDI].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("shape", ONSET_PLACES)
def test_no_notes_no_onset_targets(shape):
    assert notes_to_rolls(Notes([], [], []), 4, 0, shape)[0].shape == (4, 88)
    assert notes_to_rolls(Notes([[9, 10]], [60], [80]), 4, 0, shape)[0].sum() == 0


@pytest.mark.parametrize("hours", [1.4, 1.5, 3.0, 12.0])
def test_hours_of_music_can_be_read_again(hours, tmp_path):
    """pretty_midi takes a file of more than ten million ticks for a broken one."""
    notes = Notes([[1.0, 1.5], [3600 * hours - 0.5, 3600 * hours]], [60, 64], [80, 90])
    write_midi(tmp_path / "long.midi", notes)
    notes_to_midi(notes).write(str(tmp_path / "theirs.midi"))
    for name in ("long.midi", "theirs.midi"):
        np.testing.assert_allclose(read_midi(tmp_path / name).intervals, notes.intervals, atol=0.0003 if hours < 1.44 else 0.0003 * hours)


# --- broken files ---

def test_a_missing_midi_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"lost\.midi: cannot be read \(No such file or directory\)"):
        read_midi(tmp_path / "lost.midi")


@pytest.mark.parametrize("content", [b"", b"these are words and no music",
                                     b"MThd\0\0\0\x06\0\x01\0\x02\0\xdcMTrk\0\0\0\x04\xff\xff\xff\xff"],
                         ids=["empty", "text", "nonsense in a track"])
def test_what_is_no_midi_is_named(tmp_path, content):
    (tmp_path / "song.midi").write_bytes(content)
    with pytest.raises(ValueError, match=r"song\.midi: is not a whole MIDI file \(\w"):
        read_midi(tmp_path / "song.midi")


def test_a_truncated_midi_file_is_named_and_says_why(tmp_path):
    write_midi(tmp_path / "song.midi", random_notes(0, 4.0, 20))
    whole = (tmp_path / "song.midi").read_bytes()
    for part in (0.05, 0.5, 0.95):
        (tmp_path / "song.midi").write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=r"song\.midi: is not a whole MIDI file \(\w"):
            read_midi(tmp_path / "song.midi")


def test_midi_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "song.midi").mkdir()
    with pytest.raises(OSError, match=r"song\.midi: cannot be written"):
        write_midi(tmp_path / "song.midi", random_notes(0, 1.0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["song.midi"]


@pytest.mark.parametrize("pitch, velocity, name", [(128, 80, "pitches"), (-1, 80, "pitches"), (60, 200, "velocities")])
def test_what_midi_cannot_say_is_not_written(tmp_path, pitch, velocity, name):
    path = tmp_path / "song.midi"
    with pytest.raises(ValueError, match=f"song.midi: {name} in MIDI are 0 to 127"):
        write_midi(path, Notes([[0, 1], [1, 2]], [60, pitch], [80, velocity]))
    assert not path.exists()


@pytest.mark.parametrize("interval", [[-0.1, 1], [0, np.nan], [np.nan, 1]])
def test_what_is_no_time_is_not_written(tmp_path, interval):
    with pytest.raises(ValueError, match=r"song.midi: a note would begin or end before 0 s"):
        write_midi(tmp_path / "song.midi", Notes([interval, [1, 2]], [60, 60], [80, 80]))
    assert not list(tmp_path.iterdir())


def test_a_note_shorter_than_a_tick_is_written_and_ends(tmp_path):
    write_midi(tmp_path / "short.midi", Notes([[0.5, 0.5001], [1.0, 1.5], [1.5, 2.0]], [60, 60, 60], [80, 70, 60]))
    notes = read_midi(tmp_path / "short.midi")
    assert np.allclose(notes.intervals, [[0.5, 0.5], [1.0, 1.5], [1.5, 2.0]], atol=1e-3) and (notes.velocities == [80, 70, 60]).all()
