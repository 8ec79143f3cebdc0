"""Every kind of error worked by hand, sums that hold whatever was heard, and `evaluate.py --analyse` run on a folder."""

import json
from pathlib import Path

import numpy as np
import pretty_midi
import pytest
from conftest import random_notes, write_tones

import evaluate
from analyse import ENDERS, EXTRA, MISSED, OCTAVES, OFFSETS, add, compare, count, draw_errors, errors_figure, format_errors, held_by_pedal
from constants import MAX_MIDI, MIN_MIDI, SAMPLE_RATE
from dataset import Recording, load_recording, load_split
from evaluate import evaluate_split, note_metrics
from files import write_json
from model import load_checkpoint
from notes import SUSTAIN_PEDAL, Notes

NONE = Notes([], [], [])


def played(*notes: tuple[float, float, int]) -> Notes:
    """(onset, offset, pitch) each."""
    return Notes([note[:2] for note in notes], [note[2] for note in notes], [80] * len(notes))


def many(seed: int) -> tuple[Notes, Notes]:
    """A crowd of notes on few keys, and what a bad model made of them."""
    random = np.random.default_rng(seed)
    onsets = random.uniform(0, 30, 300)
    ref = Notes(np.stack([onsets, onsets + random.uniform(0.05, 2, 300)], 1), random.integers(40, 80, 300), random.integers(1, 128, 300))
    kept = random.random(300) < 0.7
    heard = ref.intervals[kept] + random.normal(0, 0.05, (kept.sum(), 2))
    onsets = random.uniform(0, 30, 100)
    intervals = np.concatenate([np.maximum(heard, heard[:, :1] + [0, 0.01]), np.stack([onsets, onsets + 0.3], 1)])
    return ref, Notes(intervals, np.concatenate([ref.pitches[kept], random.integers(40, 100, 100)]), [80] * len(intervals))


# --- kinds of errors ---

@pytest.mark.parametrize("ref, est, missed, extra", [
    # nothing wrong, nothing there
    ([(1, 2, 60)], [(1.05, 2, 60)], [""], [""]),
    ([(1, 2, 60)], [], ["plain"], []),
    ([], [(1, 2, 60)], [], ["plain"]),
    ([(1, 2, 60)], [(1, 2, 61)], ["plain"], ["plain"]),
    # the right key at the wrong time, by more than 50 and up to 200 ms
    ([(1, 2, 60)], [(1.051, 2, 60)], ["wrong time"], ["wrong time"]),
    ([(1, 2, 60)], [(0.8, 2, 60)], ["wrong time"], ["wrong time"]),
    ([(1, 2, 60)], [(0.79, 2, 60)], ["plain"], ["plain"]),
    ([(1, 1.1, 60)], [(1.1, 2, 60), (1.15, 2, 60)], ["wrong time"], ["wrong time", "plain"]),  # one note is late once
    # struck again and heard as one
    ([(1, 1.5, 60), (1.5, 2, 60)], [(1, 2, 60)], ["", "merged"], [""]),
    ([(1, 1.5, 60), (1.5, 2, 60)], [(1, 1.54, 60)], ["", "plain"], [""]),               # the first one only ended a little late
    ([(1, 1.5, 60), (1.5, 2, 60)], [(1.1, 2, 60)], ["wrong time", "merged"], ["wrong time"]),
    ([(1.5, 2, 60)], [(1, 2, 60)], ["plain"], ["plain"]),                               # sounds around it, but found nothing itself
    ([(1, 1.5, 60), (1.5, 2, 61)], [(1, 2, 60)], ["", "plain"], [""]),
    # held and heard as struck again
    ([(1, 2, 60)], [(1, 1.5, 60), (1.5, 2, 60)], [""], ["", "split"]),
    ([(1, 2, 60)], [(1, 1.5, 60), (1.951, 2.1, 60)], [""], ["", "plain"]),              # the held one was about to end
    ([(1, 2, 60)], [(1, 1.2, 60), (1.3, 1.5, 60), (1.6, 2, 60)], [""], ["", "split", "split"]),
    ([(1, 2, 60)], [(1.5, 2, 60)], ["plain"], ["plain"]),
    ([(1, 2, 60)], [(1.1, 1.5, 60), (1.6, 2, 60)], ["wrong time"], ["wrong time", "split"]),
    # octaves: swallowed, added, and written for one another
    ([(1, 2, 60), (1, 2, 72)], [(1, 2, 60)], ["", "octave"], [""]),
    ([(1, 2, 60)], [(1, 2, 48), (1, 2, 60), (1, 2, 72)], [""], ["octave", "", "octave"]),
    ([(1, 2, 60)], [(1, 2, 72)], ["octave"], ["octave"]),
    ([(1, 2, 60)], [(1.05, 2, 72)], ["octave"], ["octave"]),
    ([(1, 2, 60)], [(1.051, 2, 72)], ["plain"], ["plain"]),
    ([(0, 2, 60)], [(0, 2, 60), (1, 2, 72)], [""], ["", "plain"]),                      # that octave was struck long ago
    ([(1, 2, 60)], [(1, 2, 73)], ["plain"], ["plain"]),
    # the harmonics above them, up and down
    *[([(1, 2, 50)], [(1, 2, 50 + step)], ["harmonic"], ["harmonic"]) for step in (19, 24, 28, 31, 34, 36, -19, -24, -28)],
    *[([(1, 2, 50)], [(1, 2, 50 + step)], ["plain"], ["plain"]) for step in (7, 16, 20, 35, 38, -16)],
    ([(1, 2, 36), (1, 2, 72)], [(1, 2, 36), (1, 2, 60), (1, 2, 72)], ["", ""], ["", "octave", ""]),  # 24 above one, 12 below another
    # of several kinds the first counts
    ([(0, 2, 72), (1, 2, 60)], [(0, 1, 72), (1, 2, 60), (1, 2, 72)], ["", ""], ["", "", "split"]),
    ([(1, 2, 60), (1, 2, 72)], [(1, 2, 60), (1.1, 2, 72)], ["", "wrong time"], ["", "wrong time"]),
])
def test_kinds_by_hand(ref, est, missed, extra):
    comparison = compare(played(*ref), played(*est))
    assert (comparison.missed.tolist(), comparison.extra.tolist()) == (missed, extra)


@pytest.mark.parametrize("end, expected", [
    (2.0, "right"), (2.2, "right"), (1.8, "right"), (2.21, "too long"), (1.79, "too short")])
def test_offsets_by_hand(end, expected):
    comparison = compare(played((1, 2, 60), (5, 6, 60)), played((1, end, 60)))
    assert comparison.offset.tolist() == [expected, ""] and comparison.partner.tolist() == [0, -1]


@pytest.mark.parametrize("end, expected", [(1.15, "right"), (1.16, "too long"), (1.05, "right"), (1.04, "too short")])
def test_offsets_of_short_notes_by_hand(end, expected):
    assert compare(played((1, 1.1, 60)), played((1, end, 60))).offset.tolist() == [expected]


def test_polyphony_by_hand():
    """A chord of three, 30 ms from first to last, over a held note; one that ends as another begins; one alone."""
    ref = played((0, 3, 40), (1.0, 1.5, 60), (1.01, 1.5, 64), (1.03, 1.5, 67), (1.5, 2, 60), (2.0, 2.1, 70), (2.051, 2.2, 75), (4, 5, 50))
    assert compare(ref, NONE).polyphony.tolist() == [1, 4, 4, 4, 2, 2, 3, 1]


@pytest.mark.parametrize("seed", range(4))
def test_kinds_sum_to_the_errors_and_the_errors_to_the_score(seed):
    ref, est = many(seed)
    held = np.random.default_rng(seed).random(len(ref)) < 0.5
    comparison = compare(ref, est, held)
    counts = count(comparison)
    assert all(counts["missed"].values()) and all(counts["extra"].values()) and min(counts["offsets"]["pedal"].values()) > 0
    assert (counts["reference"], counts["estimated"]) == (len(ref), len(est))
    assert counts["found"] + sum(counts["missed"].values()) == len(ref)
    assert counts["found"] + sum(counts["extra"].values()) == len(est)
    assert counts["missed"]["wrong time"] == counts["extra"]["wrong time"]
    assert sum(sum(row.values()) for row in counts["offsets"].values()) == counts["found"]
    metrics = note_metrics(ref, est, ("note",))
    assert counts["found"] == pytest.approx(metrics["metric/note/recall"] * len(ref)) == pytest.approx(metrics["metric/note/precision"] * len(est))
    for name in ("by_octave", "by_velocity", "by_polyphony"):
        assert sum(row["reference"] for row in counts[name].values()) == len(ref)
        assert add([{"missed": row["missed"]} for row in counts[name].values()])["missed"] == counts["missed"]
        assert all(row["found"] + sum(row["missed"].values()) == row["reference"] for row in counts[name].values())
    octaves = counts["by_octave"].values()
    assert sum(row["estimated"] for row in octaves) == len(est)
    assert all(row["found"] + sum(row["extra"].values()) == row["estimated"] for row in octaves)


@pytest.mark.parametrize("ref, est", [(0, 0), (0, 2), (2, 0), (1, 1)])
def test_silence_and_single_notes(ref, est):
    notes = played((1, 2, 60), (3, 4, 64))
    counts = count(compare(notes.until(2 * ref), notes.until(2 * est), np.zeros(ref, dtype=bool)))
    assert (counts["reference"], counts["estimated"], counts["found"]) == (ref, est, min(ref, est))
    assert (counts["missed"]["plain"], counts["extra"]["plain"]) == (max(0, ref - est), max(0, est - ref))
    assert "nan" not in format_errors(counts)
    errors_figure(counts, "").draw_without_rendering()


# --- bands, sums, tables ---

def test_bands_by_hand():
    """B3 and C4 lie in different octaves, velocities 15 and 16 in different bands; C4 was missed, an F4 heard besides."""
    ref = Notes([(1, 2), (3, 4), (5, 6), (5, 6), (5, 6), (7, 8)], [59, 60, MIN_MIDI, 72, MAX_MIDI, 65], [15, 16, 127, 79, 80, 1])
    est = Notes(ref.intervals[[0, 2, 3, 4, 5]] + [[0, 0]], ref.pitches[[0, 2, 3, 4, 5]], [80] * 5)
    est = Notes(np.concatenate([est.intervals, [[9, 10]]]), [*est.pitches, 65], [80] * 6)
    counts = count(compare(ref, est))
    octaves = {name: (row["reference"], row["found"], row["estimated"]) for name, row in counts["by_octave"].items() if row["reference"]}
    assert octaves == {"A0-B0": (1, 1, 1), "C3-B3": (1, 1, 1), "C4-B4": (2, 1, 2), "C5-B5": (1, 1, 1), "C8": (1, 1, 1)}
    assert counts["by_octave"]["C4-B4"]["missed"]["plain"] == counts["by_octave"]["C4-B4"]["extra"]["plain"] == 1
    velocities = {name: (row["reference"], row["found"]) for name, row in counts["by_velocity"].items() if row["reference"]}
    assert velocities == {"1-15": (2, 2), "16-31": (1, 0), "64-79": (1, 1), "80-95": (1, 1), "112-127": (1, 1)}
    polyphonies = {name: (row["reference"], row["found"]) for name, row in counts["by_polyphony"].items() if row["reference"]}
    assert polyphonies == {"1": (3, 2), "3-4": (3, 3)}


def test_every_key_lies_in_an_octave():
    keys = Notes([(i, i + 0.5) for i in range(88)], range(MIN_MIDI, MAX_MIDI + 1), [80] * 88)
    rows = count(compare(keys, NONE))["by_octave"]
    assert [rows[name]["reference"] for name in OCTAVES.values()] == [3, *[12] * 7, 1]


def test_recordings_are_added():
    one, two = (count(compare(*many(seed), None)) for seed in (0, 1))
    both = add([one, two])
    assert both["found"] == one["found"] + two["found"]
    assert both["by_octave"]["C4-B4"]["missed"]["plain"] == sum(each["by_octave"]["C4-B4"]["missed"]["plain"] for each in (one, two))
    assert add([one]) == one


def test_the_table_by_hand():
    """Four played: found by key, found by pedal and cut short, an octave swallowed, a repetition merged; one split."""
    ref = played((0, 1, 60), (2, 3, 60), (2, 3, 72), (5, 5.5, 64), (5.5, 6, 64))
    est = played((0, 1, 60), (2, 2.5, 60), (2.6, 3, 60), (5, 6, 64))
    lines = format_errors(count(compare(ref, est, np.array([False, True, True, False, False])))).splitlines()
    assert [line.split() for line in lines[1:7]] == [
        ["wrong", "time", "0", "0.000", "0", "0.000"], ["merged", "/", "split", "1", "0.500", "1", "1.000"],
        ["octave", "1", "0.500", "0", "0.000"], ["harmonic", "0", "0.000", "0", "0.000"], ["plain", "0", "0.000", "0", "0.000"],
        ["all", "2", "1.000", "1", "1.000"]]
    assert [line.split()[-3:] for line in lines[9:13]] == [["1", "0", "0"], ["0", "1", "0"], ["1", "0", "0"], ["0.500", "0.000", "-"]]
    (row,) = [line.split() for line in lines if line.startswith("C4-B4")]
    assert row == ["C4-B4", "4", "0.750", "4", "0.750", "1", "0", "1", "0", "0", "0"]
    assert [line for line in lines if line.startswith("C5-B5")] and not [line for line in lines if line.startswith("C3-B3")]


# --- the pedal ---

def write_performance(path: Path, notes: list[tuple[float, float, int]], pedal: list[tuple[float, int]]) -> Recording:
    midi = pretty_midi.PrettyMIDI(resolution=1000)
    piano = pretty_midi.Instrument(program=0)
    piano.notes = [pretty_midi.Note(80, pitch, onset, offset) for onset, offset, pitch in notes]
    piano.control_changes = [pretty_midi.ControlChange(SUSTAIN_PEDAL, value, time) for time, value in pedal]
    midi.instruments.append(piano)
    midi.write(str(path.with_suffix(".midi")))
    write_tones(path.parent, path.stem + "_sound", played(*notes), 8.0)
    return load_recording(path.stem, path.parent / f"{path.stem}_sound.flac", path.with_suffix(".midi"))


@pytest.mark.parametrize("again", ["read", "cached"])
def test_the_pedal_held_what_sounds_longer_than_its_key(tmp_path, again):
    """Released before the pedal; under it; under it and struck again before it goes up; held beyond it; after it."""
    notes = [(0, 0.5, 60), (1, 1.5, 62), (1, 1.5, 64), (2, 4, 64), (1, 4, 65), (5, 6, 67)]
    for _ in range(1 + (again == "cached")):
        recording = write_performance(tmp_path / "p", notes, [(0.8, 100), (3, 0)]) if not (tmp_path / "p.midi").exists() else load_recording(
            "p", tmp_path / "p_sound.flac", tmp_path / "p.midi")
    assert recording.notes.pitches.tolist() == [60, 62, 64, 65, 64, 67]
    assert held_by_pedal(recording).tolist() == [False, True, True, False, False, False]
    beginning = recording.until(1.4)  # cut off before any key was released
    assert held_by_pedal(beginning).tolist() == [False] * 4
    assert compare(recording.notes, NONE, held_by_pedal(recording)).ender.tolist() == ["key", "pedal", "pedal", "key", "key", "key"]


def test_a_pedal_that_stays_up_holds_nothing(tmp_path):
    assert held_by_pedal(write_performance(tmp_path / "p", [(0, 1, 60)], [(0.0, 0)])).tolist() == [False]


def test_without_pedal_events_nothing_is_known_of_it(tmp_path):
    assert held_by_pedal(write_performance(tmp_path / "p", [(0, 1, 60)], [])) is None
    assert held_by_pedal(Recording("r", np.zeros(SAMPLE_RATE, np.int16), played((0, 1, 60)))) is None
    counts = count(compare(played((0, 1, 60)), played((0, 1, 60))))
    assert counts["offsets"] == {"key": dict.fromkeys(OFFSETS, 0), "pedal": dict.fromkeys(OFFSETS, 0),
                                 "not known": {"right": 1, "too short": 0, "too long": 0}}


def test_two_notes_of_one_strike_count_as_held_by_the_longer(tmp_path):
    """Two tracks double one note; the key is up when the later of them lets go."""
    midi = pretty_midi.PrettyMIDI(resolution=1000)
    for end in (2.0, 1.0):
        midi.instruments.append(pretty_midi.Instrument(program=0))
        midi.instruments[-1].notes.append(pretty_midi.Note(80, 60, 0.5, end))
    midi.instruments[0].control_changes = [pretty_midi.ControlChange(SUSTAIN_PEDAL, 0, 0.0)]
    midi.write(str(tmp_path / "p.midi"))
    write_tones(tmp_path, "sound", played((0.5, 2, 60)), 3.0)
    assert held_by_pedal(load_recording("p", tmp_path / "sound.flac", tmp_path / "p.midi")).tolist() == [False]


# --- the picture and the command ---

def test_the_picture_shows_the_numbers():
    counts = count(compare(*many(0), np.arange(300) % 2 == 0))
    kinds, offsets, octave, *_ = errors_figure(counts, "a title").axes
    heights = [round(bar.get_height()) for bars in kinds.containers for bar in bars]
    assert heights == [*counts["missed"].values(), *counts["extra"].values()]
    assert sum(bar.get_height() for bars in offsets.containers for bar in bars) == counts["found"]
    row = counts["by_octave"]["C4-B4"]
    place = [label.get_text() for label in octave.get_xticklabels()].index("C4-B4")
    assert sum(bars[place].get_height() for bars in octave.containers) == pytest.approx(100 - 100 * row["found"] / row["reference"])


def test_a_title_is_no_formula(tmp_path):
    draw_errors(tmp_path / "errors.png", count(compare(Notes([], [], []), Notes([], [], []))), "runs/$a_$/Fr\udce9d.pt")  # neither mathematics nor Unicode
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_analyses_a_folder(data_folder, checkpoint, tmp_path, capsys):
    argv = [str(checkpoint), "--data", str(data_folder), "--save_path", str(tmp_path), "--device", "cpu"]
    assert evaluate.main(argv) == 0
    plain, plain_out = json.loads((tmp_path / "small_test_midi.json").read_text()), capsys.readouterr().out
    assert evaluate.main([*argv, "--analyse"]) == 0
    out, written = capsys.readouterr().out, json.loads((tmp_path / "small_test_midi.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"small_test_midi.{suffix}" for suffix in ("csv", "json", "png")]
    assert (tmp_path / "small_test_midi.png").read_bytes().startswith(b"\x89PNG")
    recordings = load_split(data_folder, "test")
    _, heard = evaluate_split(load_checkpoint(checkpoint), recordings)
    expected = [count(compare(recording.notes, notes)) for recording, notes in zip(recordings, heard)]
    analysis = written.pop("analysis")
    assert analysis == {"total": add(expected), "recordings": [{"recording": name, **each} for name, each in zip(["r4.flac", "r5.flac"], expected)]}
    assert analysis["total"]["reference"] == 16
    assert written == plain and format_errors(analysis["total"]) in out and "errors" not in plain_out


@pytest.mark.parametrize("n_notes", [0, 1, 5])
def test_the_command_analyses_a_perfect_hearing(n_notes, checkpoint, tmp_path, monkeypatch, capsys):
    """Logits that are sure of the notes: every one found, or nothing to find."""
    write_tones(tmp_path, "r", random_notes(0, 4.0, n_notes), 4.0)
    write_json(tmp_path / "data.json", [{"canonical_composer": "", "canonical_title": "", "split": "test", "year": 0, "midi_filename": "r.midi",
                                         "audio_filename": "r.flac", "duration": 4.0}])

    def predict(_, recordings):
        for recording in recordings:
            onset, frame = evaluate.notes_to_rolls(recording.notes, recording.n_frames)
            yield 20 * frame.astype(np.float32) - 10, 20 * onset.astype(np.float32) - 10

    monkeypatch.setattr(evaluate, "predict", predict)
    assert evaluate.main([str(checkpoint), "--data", str(tmp_path), "--save_path", str(tmp_path / "out"), "--analyse"]) == 0
    total = json.loads((tmp_path / "out" / "small_test_midi.json").read_text())["analysis"]["total"]
    assert total["reference"] == total["estimated"] == total["found"] == n_notes
    assert total["missed"] == dict.fromkeys(MISSED, 0) and total["extra"] == dict.fromkeys(EXTRA, 0)
    assert sum(total["offsets"][ender]["right"] for ender in ENDERS) == n_notes
    assert "nan" not in capsys.readouterr().out


def test_a_midi_file_that_went_bad_is_named(data_folder, checkpoint, tmp_path, capsys, monkeypatch):
    def broken(path):
        raise ValueError(f"{path}: is not a whole MIDI file (gone bad)")

    monkeypatch.setattr("analyse.open_midi", broken)
    assert evaluate.main([str(checkpoint), "--data", str(data_folder), "--save_path", str(tmp_path / "out"), "--analyse"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"evaluate.py: {data_folder / 'r4.midi'}: is not a whole MIDI file (gone bad)"
    assert not (tmp_path / "out").exists()


def test_rolls_are_not_analysed(checkpoint, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(checkpoint), "--analyse", "--reference", "roll"])
    assert stopped.value.code == 2 and "--analyse looks at the MIDI file's own notes" in capsys.readouterr().err
