"""Decoding and metrics worked by hand, against a slow decoder and against mir_eval; `evaluate.py` run on a folder."""

import csv
import dataclasses
import json
import math
import tracemalloc
from pathlib import Path
from unittest import mock

import mir_eval
import numpy as np
import pytest
import reference
import torch

import evaluate
import transcribe
from constants import HOP_SIZE, MIN_MIDI, N_KEYS, SAMPLE_RATE
from dataset import Recording, find_audio, load_recording, load_split, read_table
from evaluate import (
    estimated_notes,
    evaluate_split,
    extract_notes,
    f1_of,
    fit_velocity,
    format_table,
    logit_to_prob,
    note_metrics,
    roll_metrics,
    score,
    summarise,
    tune_thresholds,
    write_results,
)
from model import Sizes, build_model, load_checkpoint, load_ensemble, save_checkpoint
from notes import ONSET_PLACES, VELOCITY, Notes, frames_to_seconds, notes_to_rolls
from recipe import RECIPES

HOP = HOP_SIZE / SAMPLE_RATE  # seconds, 0.032
HALF = {"onset": 0.5, "frame": 0.5}
MAPS = Path(__file__).resolve().parents[2] / "shared" / "maps"


def rolls(n_frames: int, onsets: dict[int, str] | None = None, frames: dict[int, str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """An onset roll and a frame roll from strings: key -> "..X" marks frame 2."""
    drawn = np.zeros((2, n_frames, N_KEYS), dtype=np.float32)
    for roll, rows in zip(drawn, (onsets or {}, frames or {})):
        for key, row in rows.items():
            for t, mark in enumerate(row):
                roll[t, key] = mark == "X"
    return drawn[0], drawn[1]


def spans(notes: Notes) -> list[tuple[int, int, int]]:
    """(key, first frame, last frame) of each note, where a note of one frame ends half a frame after its centre."""
    first, last = (notes.intervals / HOP - 0.5).T
    return [(int(p) - MIN_MIDI, round(float(a)), int(b + 1e-6)) for p, a, b in zip(notes.pitches, first, last)]


# --- decoding ---

@pytest.mark.parametrize("onsets, frames, expected", [
    ("..X.......", "..XXXX....", [(2, 5)]),           # the plain case
    ("..XXX.....", "..XXXXX...", [(2, 6)]),           # an onset over several frames is one note
    ("..XXX.....", "....XXX...", [(2, 6)]),           # ... also where the frames come late
    ("..XX......", "..........", [(2, 3)]),           # an onset without frames lasts as long as itself
    ("..X.......", "..........", [(2, 2)]),
    ("..........", "..XXXX....", []),                 # frames without an onset are no note
    ("....X.....", "..XXXX....", [(4, 5)]),           # frames before the onset do not count
    ("..X..X....", "..XXXXXX..", [(2, 4), (5, 7)]),   # a new onset ends the note before it
    ("..XX.XX...", "..XXXXXX..", [(2, 4), (5, 7)]),
    ("..X..X....", "..XX.XX...", [(2, 3), (5, 6)]),   # a gap ends it earlier
    ("..X.X.....", "..........", [(2, 2), (4, 4)]),
    ("..X.......", "..XX.XXX..", [(2, 3)]),           # what comes back without an onset is no note
    ("X.........", "XXX.......", [(0, 2)]),           # first frame
    (".........X", ".........X", [(9, 9)]),           # last frame
    (".......X..", ".......XXX", [(7, 9)]),           # sounding to the end
    ("XXXXXXXXXX", "..........", [(0, 9)]),
])
def test_one_key_by_hand(onsets, frames, expected):
    for key in (0, 40, 87):
        notes = extract_notes(*rolls(10, {key: onsets}, {key: frames}))
        assert spans(notes) == [(key, first, last) for first, last in expected]


def test_seconds_pitch_and_velocity_of_a_note():
    """Frames 2 to 5: from the centre of the one, 0.08 s, to the centre of the other, 0.176 s."""
    notes = extract_notes(*rolls(10, {39: "..X"}, {39: "..XXXX"}))
    np.testing.assert_allclose(notes.intervals, [[0.080, 0.176]])
    assert notes.pitches.tolist() == [60]
    assert 1 <= notes.velocities[0] <= 127


def test_a_note_of_one_frame_has_a_length():
    notes = extract_notes(*rolls(10, {0: "...X"}))
    np.testing.assert_allclose(notes.intervals, [[3.5 * HOP, 4.0 * HOP]])


def test_all_keys_at_once():
    notes = extract_notes(*rolls(6, dict.fromkeys(range(88), ".X"), dict.fromkeys(range(88), ".XXX")))
    assert spans(notes) == [(key, 1, 3) for key in range(88)]
    assert notes.pitches.tolist() == list(range(21, 109))


def test_adjacent_keys_do_not_interfere():
    """The end of one key's line and the beginning of the next lie side by side in the decoder's memory."""
    assert spans(extract_notes(*rolls(6, {10: "....XX", 11: "XX...."}, {10: "....XX", 11: "XXX..."}))) == [(11, 0, 2), (10, 4, 5)]
    assert spans(extract_notes(*rolls(6, {10: ".....X"}, {10: ".....X", 11: "XXXXXX"}))) == [(10, 5, 5)]
    assert spans(extract_notes(*rolls(6, {11: "X....."}, {10: "XXXXXX", 11: "XX...."}))) == [(11, 0, 1)]
    assert spans(extract_notes(*rolls(4, {87: "...X", 0: "X..."}, {87: "...X", 0: "XXXX"}))) == [(0, 0, 3), (87, 3, 3)]


@pytest.mark.parametrize("n_frames", [0, 1, 10])
def test_silence_gives_no_notes(n_frames):
    notes = extract_notes(*rolls(n_frames))
    assert len(notes) == 0 and notes.intervals.shape == (0, 2) and notes.pitches.shape == notes.velocities.shape == (0,)


def test_rolls_of_two_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"\(5, 88\).*\(6, 88\)"):
        extract_notes(np.zeros((5, 88)), np.zeros((6, 88)))


def test_each_threshold_acts_on_its_own_roll():
    onset, frame = rolls(10, {39: "..X....X"}, {39: "..XXXX.X"})
    onset[2, 39], onset[7, 39] = 0.8, 0.4
    frame[2:6, 39] = [0.9, 0.6, 0.6, 0.3]
    assert spans(extract_notes(onset, frame)) == [(39, 2, 4)]
    assert spans(extract_notes(onset, frame, onset_threshold=0.4)) == [(39, 2, 4), (39, 7, 7)]  # from 0.4, itself included
    assert spans(extract_notes(onset, frame, onset_threshold=0.9)) == []
    assert spans(extract_notes(onset, frame, frame_threshold=0.3)) == [(39, 2, 5)]
    assert spans(extract_notes(onset, frame, frame_threshold=0.7)) == [(39, 2, 2)]
    assert spans(extract_notes(onset, frame, 0.4, 0.7)) == [(39, 2, 2), (39, 7, 7)]


@pytest.mark.parametrize("seed", range(6))
def test_decoder_agrees_with_a_loop(seed):
    random = np.random.default_rng(seed)
    onset, frame = random.random((2, 60, N_KEYS)).astype(np.float32)
    thresholds = random.uniform(0.3, 0.9, 2)
    ours, theirs = (decode(onset, frame, *thresholds) for decode in (extract_notes, reference.extract_notes))
    assert len(ours) > 300
    np.testing.assert_array_equal(ours.intervals, theirs.intervals)
    np.testing.assert_array_equal(ours.pitches, theirs.pitches)


def test_notes_of_an_hour_are_in_order():
    random = np.random.default_rng(0)
    onset = random.random((112500, N_KEYS), dtype=np.float32) ** 8
    notes = extract_notes(onset, onset, 0.97, 0.9)
    assert len(notes) > 10000 and (np.diff(notes.intervals[:, 0]) >= 0).all()
    assert (notes.intervals[:, 1] > notes.intervals[:, 0]).all()


@pytest.mark.parametrize("shape", ONSET_PLACES)
def test_the_target_rolls_tell_when_a_key_was_struck(shape):
    """All strikes of a frame look alike, and its centre is the best guess."""
    strikes = np.arange(1, 21) * 0.25 + np.linspace(0, 0.03, 20)
    notes = Notes(np.stack([strikes, strikes + 0.1], axis=1), [60] * 20, [80] * 20)
    found = extract_notes(*notes_to_rolls(notes, 200, 0, shape), onset_target=shape)
    errors = found.intervals[:, 0] - strikes
    assert len(found) == 20 and abs(errors).max() <= 0.016


@pytest.mark.parametrize("before, later, frames", [(0, 0, 0), (0.4, 0, -0.4), (0, 0.3, 0.3), (0.2, 0.2, 0)])
def test_a_strike_lies_between_frames_where_the_model_is_not_sure_which(before, later, frames):
    """(before) that it was a frame earlier, (later) that it was one later: two-frame onsets, seen in frames 3 to 6."""
    onset = np.zeros((10, 88), np.float32)
    onset[3:7, 40] = before, 1 - later, 1 - before, later
    notes = extract_notes(onset, onset, onset_target="two")
    assert notes.intervals[0, 0] == pytest.approx(frames_to_seconds(4 + frames), abs=1e-6)


@pytest.mark.parametrize("frames, last", [
    ([1, 1, 1, 1, 0, 0, 0, 0], 3),
    ([1, 1, 0.5, 0, 0, 0, 0, 0], 1.5),                    # half a frame more
    ([1, 0.9, 0.55, 0.6, 0.6, 0.1, 0, 0], 4),             # not at the first frame below the threshold
    ([1, 0.9, 0.9, 0.4, 0.45, 0.55, 0.3, 0.3], 2),        # nor at the last above it
    ([1, 0.9, 0.04, 0.9, 0.9, 0.9, 0, 0], 1),             # what has fallen silent does not come back
    ([1, 1, 1, 0.5, 0.04, 0.9, 0.9, 0.9], 2.5),           # nor does it move the end
    ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3], 1),        # after one above the threshold, or a struck one
    ([0.4, 0.4, 0.8, 0.8, 0.8, 0.1, 0, 0], 4),            # not where a strike gives way to frames that are less sure
    ([0, 0, 0, 0, 0, 0, 0, 0], 1),                        # an onset alone
    ([1, 1, 1, 1, 1, 1, 1, 1], 7),                        # sounding to the end
])
def test_a_note_ends_where_its_frames_fall_most(frames, last):
    """To a quarter of a frame, 8 ms, for what is left of a fall two frames away counts as well."""
    onset, frame = np.zeros((2, 8, 88), np.float32)
    onset[:2, 40], frame[:, 40] = 1, frames
    notes = extract_notes(onset, frame, 0.5, 0.58, "two")
    assert notes.intervals[0, 1] == pytest.approx(frames_to_seconds(last), abs=0.25 * HOP)
    alone = extract_notes(np.roll(onset, 1, axis=1), np.roll(frame, 1, axis=1), 0.5, 0.58, "two")
    both = extract_notes(onset + np.roll(onset, 1, axis=1), frame + np.roll(frame, 1, axis=1), 0.5, 0.58, "two")
    np.testing.assert_allclose(both.intervals, [notes.intervals[0], alone.intervals[0]])  # of two keys side by side neither hears the other


@pytest.mark.parametrize("n_frames", [1, 2, 3, 60])
def test_ends_of_notes_agree_with_a_loop(n_frames):
    random = np.random.default_rng(n_frames)
    onset, frame = random.random((2, n_frames, N_KEYS)).astype(np.float32)
    frame = frame ** 0.3
    found = {}
    notes = extract_notes(onset, frame, 0.9, 0.6, "two")
    assert len(notes) >= 1
    for pitch, (start, end) in zip(notes.pitches.tolist(), notes.intervals.tolist()):
        found.setdefault(pitch - MIN_MIDI, []).append((start, end))
    for key in range(N_KEYS):
        spans_of_key = found.get(key, [])
        struck = onset[:, key] >= 0.9
        starts = [t for t in range(n_frames) if struck[t] and not (t and struck[t - 1])]
        assert len(starts) == len(spans_of_key)
        for start, limit, (begin, end) in zip(starts, [*starts[1:], n_frames], spans_of_key):
            level, onsets = frame[start:limit, key].astype(float), struck[start:limit]
            silent = np.flatnonzero((level < 0.05) & ~onsets)
            level = level[: silent[0] if len(silent) else None]
            # its first frame before it, nothing after the last
            padded = np.concatenate([np.full(4, level[0]), level, np.zeros(4)])
            at = np.arange(-4, len(level) + 4)
            falls = {t: np.interp(t - 0.75, at, padded) - np.interp(t + 1.75, at, padded) for t in range(len(level)) if level[t] >= 0.6 or onsets[t]}
            last = max(falls, key=lambda t: (round(falls[t], 6), t))
            high, low = np.mean(padded[last + 2 : last + 4]), np.mean(padded[last + 6 : last + 8])
            if high > low:
                last += ((padded[last + 3 : last + 7] - low) / (high - low)).clip(0, 1).sum() - 2
            assert end == pytest.approx(max(frames_to_seconds(start + last), begin + HOP / 2), abs=1e-5)


def test_the_next_strike_does_not_move_the_one_before():
    onset = np.zeros((10, 88), np.float32)
    onset[3:7, 40] = 0.9, 0.1, 0.9, 0.9
    notes = extract_notes(onset, onset, onset_target="two")
    alone = extract_notes(np.where(np.arange(10)[:, None] < 5, onset, 0), onset, onset_target="two")
    assert len(notes) == 2 and notes.intervals[0, 0] == alone.intervals[0, 0] < frames_to_seconds(3)
    assert (notes.intervals[:, 0] < notes.intervals[:, 1]).all() and notes.intervals[0, 1] <= notes.intervals[1, 0]


@pytest.mark.parametrize("shape", ONSET_PLACES)
def test_a_model_is_scored_by_what_it_was_taught(shape, monkeypatch):
    """A model that gives its own targets back: perfect onset rolls and notes, whatever the shape of an onset."""
    recording = recording_of(Notes([[0.5, 1.0], [1.03, 1.5], [1.55, 2.5]], [60, 64, 60], [80] * 3))
    probabilities = np.clip(notes_to_rolls(recording.notes, recording.n_frames, 0, shape)[0], 1e-4, 1 - 1e-4)
    logits = sure(recording)[0], np.log(probabilities / (1 - probabilities))
    monkeypatch.setattr(evaluate, "predict", lambda *_: [logits])
    model = build_model("rnn", Sizes(4, 8, 8), dataclasses.replace(RECIPES["default"], onset_target=shape))
    (row,), heard = evaluate_split(model, [recording])
    assert row["metric/frame/onset_f1"] == row["metric/note/f1"] == row["metric/note-with-offsets/f1"] == 1
    assert abs(heard[0].intervals[:, 0] - recording.notes.intervals[:, 0]).max() <= 0.016
    notes, _, _ = transcribe.transcribe(mock.Mock(infer=lambda _: tuple(map(torch.from_numpy, logits)), thresholds=model.thresholds,
                                                  recipe=model.recipe), np.zeros(512, np.float32))
    np.testing.assert_array_equal(notes.intervals, heard[0].intervals)
    assert tune_thresholds([recording], [logits], shape)["onset"] <= 0.7


@pytest.mark.parametrize("n_frames", (1, 2, 3))
def test_strikes_at_the_edges_stay_inside(n_frames):
    notes = extract_notes(np.full((n_frames, 88), 0.9), np.zeros((n_frames, 88)), onset_target="two")
    assert len(notes) == 88 and (notes.intervals >= 0).all() and (notes.intervals[:, 1] > notes.intervals[:, 0]).all()
    assert notes.intervals[:, 0].max() <= n_frames * HOP_SIZE / SAMPLE_RATE


@pytest.mark.parametrize("target", ONSET_PLACES)
def test_velocities_are_those_of_the_frames_of_strikes(target):
    notes = Notes([[0.5, 1.0], [1.03, 1.5], [1.55, 2.5]], [60, 64, 60], [30, 90, 120])
    onset, frame = notes_to_rolls(notes, 100, 0, target)
    velocity = np.full((100, N_KEYS), 1, np.uint8)
    velocity[notes.frames[0], notes.pitches - MIN_MIDI] = notes.velocities
    assert extract_notes(onset, frame, 0.5, 0.5, target, velocity).velocities.tolist() == [30, 90, 120]
    assert set(extract_notes(onset, frame, 0.5, 0.5, target).velocities) == {VELOCITY}


# --- velocities ---

def struck(seed: int, gain: float, lowest: int = 20) -> Recording:
    """Decaying tones with overtones, 20 dB for 60 steps of velocity; random keys, one or two at a time."""
    random, seconds = np.random.default_rng(seed), np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
    onsets = np.arange(0.2, 19, 0.2)
    pitches, velocities = random.integers(40, 80, len(onsets)), random.integers(lowest, 110, len(onsets))
    audio = np.zeros(len(seconds))
    for onset, pitch, velocity in zip(onsets, pitches, velocities):
        sounding = (seconds >= onset) & (seconds < onset + 1)
        since = seconds[sounding] - onset
        tone = sum(np.sin(2 * np.pi * n * 440 * 2 ** ((pitch - 69) / 12) * since) / n for n in (1, 2, 3, 4))
        audio[sounding] += 0.05 * 10 ** ((velocity - 110) / 60) * np.exp(-6 * since) * tone
    return Recording(str(seed), (gain * audio * 32767).astype(np.int16), Notes(np.stack([onsets, onsets + 0.3], 1), pitches, velocities))


@pytest.mark.parametrize("recipe", RECIPES)
def test_velocities_are_learnt_from_strikes(recipe):
    """From recordings of three levels, for a fourth, in training mode as elsewhere; nothing else of the model changes."""
    torch.manual_seed(0)
    model = build_model("rnn", Sizes(4, 8, 8), RECIPES[recipe])
    training = [struck(seed, gain) for seed, gain in ((0, 1.0), (1, 0.3), (2, 0.1))]
    model(torch.stack([recording.to_float() for recording in training]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_velocity(model, training)
    assert model.training and {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == {"velocity"}
    new = struck(3, 0.5)
    velocity = model.infer(new.to_float())[2].numpy()
    heard = velocity[new.notes.frames[0], new.notes.pitches - MIN_MIDI]
    assert np.corrcoef(heard, new.notes.velocities)[0, 1] > 0.9 and abs(heard.mean() - 64) < 6


def test_where_velocities_do_not_differ_they_are_all_the_same():
    model = build_model("rnn", Sizes(4, 8, 8))
    flat = struck(0, 0.5)
    fit_velocity(model, [dataclasses.replace(flat, notes=Notes(flat.notes.intervals, flat.notes.pitches, np.full(len(flat.notes), 33)))])
    assert set(model.infer(flat.to_float())[2].numpy().ravel()) == {33}
    fit_velocity(model, [dataclasses.replace(flat, notes=Notes([], [], []))])
    assert set(model.infer(flat.to_float())[2].numpy().ravel()) == {33}


# --- metrics ---

def some_notes() -> Notes:
    return Notes(np.array([[0.5, 1.0], [1.0, 1.5], [1.5, 2.5], [2.0, 2.2]]), [60, 64, 67, 72], [80] * 4)


def test_f1_by_hand():
    assert f1_of(6, 8, 12) == (0.75, 0.5, pytest.approx(0.6))
    assert f1_of(0, 0, 0) == f1_of(0, 5, 0) == f1_of(0, 0, 5) == (0, 0, 0)


def test_note_metrics_by_hand():
    """Three of four onsets are hit, one of those by an offset too late; one note is invented. 60 is 30 ms early, 64 at the
    wrong pitch, 67 ends 0.5 s late where 0.2 s are allowed, 72 is exact."""
    est = Notes(np.array([[0.47, 1.0], [1.0, 1.5], [1.5, 3.0], [2.0, 2.2], [3.0, 3.1]]), [60, 65, 67, 72, 50], [80] * 5)
    row = note_metrics(some_notes(), est)
    assert row["metric/note/precision"] == pytest.approx(3 / 5) and row["metric/note/recall"] == pytest.approx(3 / 4)
    assert row["metric/note/f1"] == pytest.approx(2 * 3 / 9)
    assert row["metric/note-with-offsets/precision"] == pytest.approx(2 / 5)
    assert row["metric/note-with-offsets/recall"] == pytest.approx(2 / 4)
    assert row["metric/note-with-offsets/f1"] == pytest.approx(2 * 2 / 9)
    # shared time over the time from the first onset to the last offset, of each matched pair
    assert row["metric/note/overlap"] == pytest.approx((0.5 / 0.53 + 1.0 / 1.5 + 1) / 3)
    assert row["metric/note-with-offsets/overlap"] == pytest.approx((0.5 / 0.53 + 1) / 2)


@pytest.mark.parametrize("late, hit", [(0.04, 1), (0.0499, 1), (0.06, 0), (-0.0499, 1), (-0.06, 0)])
def test_onsets_count_within_fifty_milliseconds(late, hit):
    ref = Notes(np.array([[1.0, 2.0]]), [60], [80])
    assert note_metrics(ref, Notes(ref.intervals + late, [60], [80]))["metric/note/f1"] == hit


@pytest.mark.parametrize("end, hit", [(2.19, 1), (2.21, 0), (1.81, 1), (1.79, 0)])
def test_offsets_count_within_a_fifth_of_the_duration(end, hit):
    ref = Notes(np.array([[1.0, 2.0]]), [60], [80])
    row = note_metrics(ref, Notes(np.array([[1.0, end]]), [60], [80]))
    assert (row["metric/note/f1"], row["metric/note-with-offsets/f1"]) == (1, hit)


@pytest.mark.parametrize("end, hit", [(1.14, 1), (1.16, 0)])
def test_offsets_of_short_notes_count_within_fifty_milliseconds(end, hit):
    ref = Notes(np.array([[1.0, 1.1]]), [60], [80])  # a fifth of it would be 20 ms
    assert note_metrics(ref, Notes(np.array([[1.0, end]]), [60], [80]))["metric/note-with-offsets/f1"] == hit


@pytest.mark.parametrize("seed", range(4))
def test_note_metrics_are_mir_evals(seed):
    random = np.random.default_rng(seed)
    onsets = random.uniform(0, 20, 60)
    ref = Notes(np.stack([onsets, onsets + random.uniform(0.05, 1, 60)], 1), random.integers(50, 60, 60), [80] * 60)
    est = Notes(np.maximum(ref.intervals + random.normal(0, 0.04, (60, 2)) + [[0, 0.06]], 0)[:50], ref.pitches[:50], [80] * 50)
    est = Notes(np.stack([est.intervals[:, 0], np.maximum(est.intervals[:, 1], est.intervals[:, 0] + 0.01)], 1), est.pitches, [80] * 50)
    row = note_metrics(ref, est)
    assert list(row.values())[:8] == pytest.approx(np.ravel(reference.note_scores(ref, est)).tolist())
    assert 0.1 < row["metric/note-with-offsets/f1"] < row["metric/note/f1"] < 1


@pytest.mark.parametrize("seed", range(4))
def test_velocities_are_scored_as_mir_eval_has_it(seed):
    random = np.random.default_rng(seed)
    onsets = np.arange(60) / 4
    ref = Notes(np.stack([onsets, onsets + 0.2], 1), random.integers(50, 60, 60), random.integers(20, 110, 60))
    est = Notes(ref.intervals[5:] + 0.01, ref.pitches[5:], (ref.velocities[5:] // 2 + random.normal(40, 6, 55)).clip(1, 127))
    row = note_metrics(ref, est)
    theirs = mir_eval.transcription_velocity.precision_recall_f1_overlap(
        ref.intervals, mir_eval.util.midi_to_hz(ref.pitches), ref.velocities, est.intervals, mir_eval.util.midi_to_hz(est.pitches), est.velocities)
    assert list(row.values())[8:] == pytest.approx(list(theirs))
    assert 0.3 < row["metric/note-with-offsets-and-velocity/f1"] < 0.9 < row["metric/note-with-offsets/f1"]


def test_velocities_by_hand():
    """Half of what it is and 1 more is right; one of forty that lies 10 off the line of the others is 20 off, where a tenth of the range
    is 7.8. Of notes that are all of one velocity, and of one note, every estimate is right."""
    ref = Notes([[t, t + 0.5] for t in range(40)], [60] * 40, np.arange(20, 100, 2))
    for off, hits in ((0, 40), (10, 39)):
        row = note_metrics(ref, Notes(ref.intervals, ref.pitches, ref.velocities // 2 + 1 + off * (np.arange(40) == 20)))
        assert row["metric/note-with-offsets-and-velocity/f1"] == hits / 40 and row["metric/note-with-offsets/f1"] == 1
    flat = Notes(ref.intervals, ref.pitches, [64] * 40)
    assert note_metrics(flat, ref)["metric/note-with-offsets-and-velocity/f1"] == 1
    assert note_metrics(ref, flat)["metric/note-with-offsets-and-velocity/f1"] < 0.5
    assert note_metrics(ref.until(0.5), ref.until(0.5))["metric/note-with-offsets-and-velocity/f1"] == 1


def test_scoring_many_notes_takes_little_memory():
    random = np.random.default_rng(0)
    onsets = np.sort(random.uniform(0, 800, 8000))
    ref = Notes(np.stack([onsets, onsets + 0.3], 1), random.integers(21, 109, 8000), [80] * 8000)
    tracemalloc.start()
    row = note_metrics(ref, Notes(ref.intervals + 0.01, ref.pitches, ref.velocities))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row["metric/note/f1"] == 1
    assert peak < 50e6  # 8,000 x 8,000 distances would be 500 MB


@pytest.mark.parametrize("ref, est", [(True, False), (False, True), (False, False)])
def test_nothing_to_find_or_nothing_found_scores_zero(ref, est):
    none = Notes([], [], [])
    row = note_metrics(some_notes() if ref else none, some_notes() if est else none)
    assert len(row) == 12 and set(row.values()) == {0.0}


@pytest.mark.parametrize("seed", range(3))
def test_roll_metrics_are_mir_evals_multipitch(seed):
    random = np.random.default_rng(seed)
    ref, est = random.random((2, 80, N_KEYS)) < 0.1
    est |= ref & (random.random(ref.shape) < 0.6)
    times = np.arange(80) * HOP
    hertz = mir_eval.util.midi_to_hz(np.arange(N_KEYS) + MIN_MIDI)
    precision, recall, *_ = mir_eval.multipitch.metrics(times, [hertz[row] for row in ref], times, [hertz[row] for row in est])
    row = roll_metrics("frame", ref, est)
    assert row["metric/frame/frame_precision"] == pytest.approx(precision)
    assert row["metric/frame/frame_recall"] == pytest.approx(recall)
    assert row["metric/frame/frame_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_roll_metrics_of_empty_rolls():
    nothing, something = np.zeros((5, N_KEYS), bool), np.ones((5, N_KEYS), bool)
    for ref, est in ((nothing, something), (something, nothing), (nothing, nothing)):
        assert set(roll_metrics("onset", ref, est).values()) == {0.0}
    assert roll_metrics("onset", something, something)["metric/frame/onset_f1"] == 1


def recording_of(notes: Notes, seconds: float = 4.0, name: str = "hand") -> Recording:
    return Recording(name, np.zeros(round(seconds * SAMPLE_RATE), dtype=np.int16), notes)


def sure(recording: Recording, notes: Notes | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Frame and onset logits of a model that is sure of `notes`, by default of the right ones."""
    onset, frame = notes_to_rolls(notes if notes is not None else recording.notes, recording.n_frames)
    return 20 * frame.astype(np.float32) - 10, 20 * onset.astype(np.float32) - 10


@pytest.mark.parametrize("reference", ["midi", "roll"])
def test_perfect_logits_score_one(reference):
    row = score(recording_of(some_notes()), sure(recording_of(some_notes())), HALF, "one", reference)
    for name in ("frame/frame_f1", "frame/notes_f1", "frame/onset_f1", "note/f1", "note-with-offsets/f1"):
        assert row[f"metric/{name}"] == 1
    assert 0 < row["metric/loss/frame_loss"] < 1e-3


def test_each_head_has_its_own_loss():
    """One sounding note of 4 frames, struck once. Frame logits all 0: ln 2. Onset logits all 1: ln(1 + e) where there is no
    onset, which is everywhere but in one place, and ln(1 + 1/e) there."""
    recording = recording_of(Notes(np.array([[0.5 * HOP, 3.5 * HOP]]), [60], [80]), 10 * HOP)
    row = score(recording, (np.zeros((10, 88), np.float32), np.ones((10, 88), np.float32)), HALF, "one")
    assert row["metric/loss/frame_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert row["metric/loss/onset_loss"] == pytest.approx((879 * math.log(1 + math.e) + math.log(1 + 1 / math.e)) / 880, rel=1e-5)
    row = score(recording, (np.ones((10, 88), np.float32), np.zeros((10, 88), np.float32)), HALF, "one")
    assert row["metric/loss/frame_loss"] == pytest.approx((876 * math.log(1 + math.e) + 4 * math.log(1 + 1 / math.e)) / 880, rel=1e-5)
    assert row["metric/loss/onset_loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_each_roll_is_scored_against_its_own_head():
    recording = recording_of(some_notes())
    frame, onset = sure(recording)
    row = score(recording, (frame, np.full_like(onset, -10)), HALF, "one")
    assert (row["metric/frame/frame_f1"], row["metric/frame/onset_f1"], row["metric/note/f1"]) == (1, 0, 0)
    row = score(recording, (np.full_like(frame, -10), onset), HALF, "one")
    assert (row["metric/frame/frame_f1"], row["metric/frame/onset_f1"], row["metric/note/f1"]) == (0, 1, 1)
    assert row["metric/note-with-offsets/f1"] < 1


def test_frames_that_no_onset_begins_are_none_of_the_notes():
    """One note of 20 frames is heard with its onset, one of 10 without, and of another of 20 nothing."""
    recording = recording_of(Notes(np.array([[10.5 * HOP, 30 * HOP], [50.5 * HOP, 70 * HOP]]), [60, 62], [80, 80]))
    frame, onset = sure(recording, Notes(recording.notes.intervals[:1], [60], [80]))
    frame[80:90, 30] = 10
    for target in ONSET_PLACES:
        row = score(recording, (frame, onset), HALF, target)
        assert row["metric/frame/frame_precision"] == pytest.approx(20 / 30) and row["metric/frame/frame_recall"] == 0.5
        assert row["metric/frame/notes_precision"] == 1 and row["metric/frame/notes_recall"] == 0.5


def test_references_differ_where_quantisation_hides_an_error():
    """Struck at the very end of frame 10, heard in frame 12: 48 ms after the true onset, 64 ms after the frame's centre."""
    recording = recording_of(Notes(np.array([[10.99 * HOP, 40 * HOP]]), [60], [80]))
    heard = sure(recording, Notes(np.array([[12.5 * HOP, 40 * HOP]]), [60], [80]))
    assert score(recording, heard, HALF, "one", "midi")["metric/note/f1"] == 1
    assert score(recording, heard, HALF, "one", "roll")["metric/note/f1"] == 0


def test_references_differ_where_rolls_merge_a_repetition():
    """One key struck in frames 10 and 11 is two notes in the MIDI file and one in its roll."""
    recording = recording_of(Notes(np.array([[10.5 * HOP, 11.2 * HOP], [11.6 * HOP, 30 * HOP]]), [60, 60], [80, 80]))
    heard = sure(recording)
    assert score(recording, heard, HALF, "one", "roll")["metric/note/f1"] == 1
    midi = score(recording, heard, HALF, "one", "midi")
    assert (midi["metric/note/precision"], midi["metric/note/recall"]) == (1, 0.5)


def test_a_recording_without_notes_is_scored():
    recording = recording_of(Notes([], [], []))
    row = score(recording, sure(recording), HALF, "one")
    assert row["metric/note/f1"] == 0 and row["metric/loss/frame_loss"] < 1e-3
    assert all(math.isfinite(value) for value in row.values())


def test_thresholds_are_used_in_scoring():
    recording = recording_of(some_notes())
    frame, onset = sure(recording)
    unsure = np.where(frame > 0, -0.5, -3).astype(np.float32), np.where(onset > 0, -1, -3).astype(np.float32)  # 0.38 and 0.27
    assert score(recording, unsure, HALF, "one")["metric/frame/frame_f1"] == 0
    lower = score(recording, unsure, {"onset": 0.25, "frame": 0.35}, "one")
    for name in ("frame/frame_f1", "frame/onset_f1", "note/f1", "note-with-offsets/f1"):
        assert lower[f"metric/{name}"] == 1


def logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability / (1 - probability)).astype(np.float32)


def test_logit_to_prob_is_the_sigmoid():
    np.testing.assert_allclose(logit_to_prob(np.array([0.0, math.log(3), -math.log(3)])), [0.5, 0.75, 0.25])
    with np.errstate(over="raise"):
        np.testing.assert_allclose(logit_to_prob(np.array([-1e4, 1e4], np.float32)), [0, 1])


def test_tuned_thresholds_are_better():
    """True onsets at 0.35 among false ones at 0.15; each note's frames at 0.45, and a tail of 0.25 after every one."""
    recording = recording_of(some_notes())
    onset_roll, frame_roll = notes_to_rolls(recording.notes, recording.n_frames)
    onset, frame = np.full((2, recording.n_frames, N_KEYS), 0.01)
    onset[5::20, 3] = 0.15
    onset[onset_roll > 0] = 0.35
    for key in recording.notes.pitches - MIN_MIDI:
        last = np.flatnonzero(frame_roll[:, key])[-1]
        frame[last : last + 20, key] = 0.25
    frame[frame_roll > 0] = 0.45
    logits = [(logit(frame), logit(onset))]
    tuned = tune_thresholds([recording], logits, "one")
    assert 0.15 < tuned["onset"] <= 0.35 and 0.25 < tuned["frame"] <= 0.45
    assert note_metrics(recording.notes, estimated_notes(logits[0], HALF, "one"))["metric/note-with-offsets/f1"] == 0
    assert note_metrics(recording.notes, estimated_notes(logits[0], tuned, "one"))["metric/note-with-offsets/f1"] == 1


def test_thresholds_stay_in_the_middle_where_nothing_is_found():
    recording = recording_of(some_notes())
    nothing = np.full((recording.n_frames, N_KEYS), -20, np.float32)
    assert tune_thresholds([recording], [(nothing, nothing)], "one") == HALF


def test_summary_by_hand():
    summary = summarise([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, {"a": 0.5, "b": 0.3}])
    assert summary["a"] == (pytest.approx(0.5), pytest.approx(math.sqrt(0.5 / 3)))
    assert summary["b"] == (pytest.approx(0.1), pytest.approx(math.sqrt(0.02)))
    lines = format_table(summary).splitlines()
    assert [line.split() for line in lines] == [["a", ":", "0.5000", "+-", "0.4082"], ["b", ":", "0.1000", "+-", "0.1414"]]


# --- files and the command ---

def test_results_are_written_for_every_recording(tmp_path):
    rows = [{"metric/note/f1": 0.5, "metric/loss/frame_loss": 1.5}, {"metric/note/f1": 1.0, "metric/loss/frame_loss": 0.5}]
    recordings = [recording_of(some_notes(), name=name) for name in ("2004/a, b.wav", "é.flac")]
    write_results(tmp_path / "out" / "scores.json", recordings, rows, {"onset": 0.4, "frame": 0.3}, split="test")
    written = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert written["split"] == "test"
    assert written["means"]["metric/note/f1"] == {"mean": 0.75, "std": 0.25}
    assert written["recordings"] == [{"recording": "2004/a, b.wav", **rows[0]}, {"recording": "é.flac", **rows[1]}]
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["recording"] for row in table] == ["2004/a, b.wav", "é.flac"]
    assert [float(row["metric/note/f1"]) for row in table] == [0.5, 1.0]


@pytest.mark.parametrize("reference", ["midi", "roll"])
def test_the_command_scores_a_folder(reference, data_folder, checkpoint, tmp_path, capsys):
    argv = [str(checkpoint), "--data", str(data_folder), "--reference", reference, "--save_path", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / f"small_test_{reference}.json").read_text())
    expected, _ = evaluate_split(load_checkpoint(checkpoint), load_split(data_folder, "test"), reference)
    assert [row.pop("recording") for row in written["recordings"]] == ["r4.flac", "r5.flac"]
    assert written["recordings"] == [pytest.approx(row) for row in expected]
    assert written["reference"] == reference and written["split"] == "test"
    for name, (mean, std) in summarise(expected).items():
        assert f"{name:47}: {mean:.4f} +- {std:.4f}\n" in out
    with open(tmp_path / "out" / f"small_test_{reference}.csv", newline="") as file:
        assert [row["recording"] for row in csv.DictReader(file)] == ["r4.flac", "r5.flac"]
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert f"reference: {reference}" in out and str(tmp_path / "out") in out


def test_the_command_scores_several_checkpoints_as_one(data_folder, checkpoint, tmp_path, capsys):
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    save_checkpoint(other, build_model("crnn", Sizes(4, 8, 8)))
    paths = [str(checkpoint), str(other), str(other)]
    assert evaluate.main([*paths, "--data", str(data_folder), "--save_path", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{checkpoint} + {other} + {other}, 2 test recordings")
    written = json.loads((tmp_path / "small+other+other_test_midi.json").read_text())
    expected, _ = evaluate_split(load_ensemble(paths), load_split(data_folder, "test"))
    assert [row.pop("recording") for row in written["recordings"]] == ["r4.flac", "r5.flac"]
    assert written["recordings"] == [pytest.approx(row) for row in expected] and written["checkpoint"] == "small.pt + other.pt + other.pt"
    assert list(tmp_path.glob("*.csv")) == [tmp_path / "small+other+other_test_midi.csv"]
    with pytest.raises(SystemExit):
        evaluate.main([*paths, "--share", str(tmp_path / "shared.pt"), "--data", str(data_folder)])
    assert "--share writes one checkpoint" in capsys.readouterr().err and not (tmp_path / "shared.pt").exists()


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    """And what was written of one alone stays."""
    one, other, best = (tmp_path / name for name in ("a/model-best.pt", "b/model-best.pt", "b/best.pt"))
    assert evaluate.names_of([one, other, other, best]) == ["a-model-best", "b-model-best", "b-model-best", "best"]
    assert evaluate.names_of([one, one]) == ["model-best", "model-best"] and evaluate.names_of([one]) == ["model-best"]


def test_a_recording_that_cannot_be_heard_is_named(data_folder, checkpoint, monkeypatch):
    model, recordings = load_checkpoint(checkpoint), load_split(data_folder, "test")
    for error, kind in ((ValueError("not a number"), ValueError), (RuntimeError("CUDA out of memory. Tried"), MemoryError)):
        monkeypatch.setattr(model, "infer", mock.Mock(side_effect=error))
        with pytest.raises(kind, match=r"^r4\.flac: not "):
            evaluate_split(model, recordings)


def test_the_command_scores_another_split(data_folder, checkpoint, tmp_path):
    assert evaluate.main([str(checkpoint), "--data", str(data_folder), "--split", "train", "--save_path", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "small_train_midi.json").read_text())
    assert [row["recording"] for row in written["recordings"]] == ["r0.flac", "r1.flac", "r2.flac"]


def test_the_checkpoint_knows_its_data_and_its_folder(data_folder, checkpoint, tmp_path):
    """What the file knows no flag has to repeat: data folder, thresholds, where the results belong."""
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "data": {"folders": [str(data_folder)]}, "thresholds": {"onset": 0.125, "frame": 0.25}}, tmp_path / "known.pt")
    assert evaluate.main([str(tmp_path / "known.pt")]) == 0
    written = json.loads((tmp_path / "known_test_midi.json").read_text())
    assert written["thresholds"] == {"onset": 0.125, "frame": 0.25} and len(written["recordings"]) == 2


def test_scores_are_written_though_nobody_reads_them(checkpoint, data_folder, tmp_path, monkeypatch):
    """`evaluate.py … | head` closes the pipe before all is printed."""
    def print_into_nowhere(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "print", print_into_nowhere, raising=False)
    with pytest.raises(BrokenPipeError):
        evaluate.run(evaluate.parse_args([str(checkpoint), "--data", str(data_folder), "--save_path", str(tmp_path)]))
    assert (tmp_path / "small_test_midi.csv").is_file()


@pytest.mark.skipif(not (MAPS / "data.json").is_file(), reason="needs the real recordings in ../shared/maps")
def test_a_real_recording_is_scored():
    """The reference rolls of a real performance, read as if a model had heard them, must score nearly everything."""
    row = min((row for row in read_table(MAPS) if row["split"] == "test"), key=lambda row: row["duration"])
    recording = load_recording(row["audio_filename"], find_audio(MAPS, row["audio_filename"]), MAPS / row["midi_filename"]).until(20)
    assert len(recording.notes) > 30 and recording.n_frames == 625
    assert np.abs(recording.audio).max() > 1000
    scores = score(recording, sure(recording), HALF, "one")
    assert scores["metric/note/f1"] > 0.97 and scores["metric/note-with-offsets/f1"] > 0.95
    assert scores["metric/frame/frame_f1"] == scores["metric/frame/onset_f1"] == 1
    onset_energy = np.abs(recording.audio[: 625 * HOP_SIZE].astype(float)).reshape(625, HOP_SIZE).mean(axis=1)
    first = int(recording.notes.intervals[0, 0] / HOP)
    assert onset_energy[first + 1 : first + 8].mean() > 3 * onset_energy[: max(1, first - 2)].mean()  # sound starts with the notes


def test_a_shared_checkpoint_is_scored_as_it_is_shared(checkpoint, data_folder, tmp_path, monkeypatch, capsys):
    shared = tmp_path / "shared.pt"
    assert evaluate.main([str(checkpoint), "--share", str(shared), "--data", str(data_folder), "--split", "validation"]) == 0
    assert capsys.readouterr().out.startswith(f"{shared}, ")
    first = json.loads((tmp_path / "shared_validation_midi.json").read_text())
    monkeypatch.setattr(evaluate, "RELEASED", [shared])  # what is used where none is named
    assert evaluate.main(["--data", str(data_folder), "--split", "validation"]) == 0
    assert json.loads((tmp_path / "shared_validation_midi.json").read_text()) == first


def test_a_checkpoint_that_cannot_be_scored_is_not_shared(checkpoint, data_folder, tmp_path, capsys):
    shared, before = tmp_path / "shared.pt", checkpoint.read_bytes()
    shared.write_bytes(b"the good one")
    assert evaluate.main([str(checkpoint), "--share", str(shared), "--data", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: is no folder" in capsys.readouterr().err and shared.read_bytes() == b"the good one"
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(checkpoint), "--share", str(checkpoint.parent / "." / checkpoint.name), "--data", str(data_folder)])
    assert caught.value.code == 2 and checkpoint.read_bytes() == before


@pytest.mark.parametrize("where", ["load_split", "evaluate_split"])
def test_ctrl_c_says_so_in_a_line(checkpoint, data_folder, tmp_path, monkeypatch, capsys, where):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, where, interrupted)
    assert evaluate.main([str(checkpoint), "--data", str(data_folder), "--save_path", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "evaluate.py: interrupted; what is written is whole\n" and not list(tmp_path.iterdir())
