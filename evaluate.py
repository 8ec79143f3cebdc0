"""From logits to notes, and how good those notes are: `python evaluate.py [ckpt.pt …]`."""

import argparse
import copy
import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from analyse import OFFSET_RATIO, add, compare, count, draw_errors, format_errors, held_by_pedal, match
from commands import Help, errors_of, exit_status_of
from constants import HOP_SIZE, MIN_MIDI, SAMPLE_RATE
from dataset import SPLITS, Recording, load_split
from devices import keep_pages, pick_device
from files import write_json, written_whole
from model import RELEASED, Ensemble, Transcriber, load_ensemble, read_checkpoint, share_checkpoint
from notes import ONSET_PLACES, VELOCITY, Notes, frames_to_seconds, notes_to_rolls, seconds_to_frames

THRESHOLDS = np.arange(1, 10) / 10  # what tune_thresholds tries
SILENT = 0.05  # probability below which a note is over, whatever comes after; 0.02 to 0.1 score alike
VELOCITY_TOLERANCE = 0.1  # of the range of velocities in the reference
RIDGE = 0.01   # of the least squares behind velocities
REACH = 1.25   # frames, 0.5 to 1.5, to either side of a note's end over which its fall is measured; 40 ms, of the 50 that scores allow

Heard = tuple[np.ndarray, ...]  # frame logits, onset logits and, where they are known, velocities, (T, 88) each, as a model's `infer` gives them


def extract_notes(onset: np.ndarray, frame: np.ndarray, onset_threshold: float = 0.5, frame_threshold: float = 0.5,
                  onset_target: str = "one", velocity: np.ndarray | None = None) -> Notes:
    """Read notes off two piano rolls: a key starts at a rising onset and lasts while its frames do.

    Source: Hawthorne et al., "Onsets and Frames", ISMIR 2018. An onset over several frames is one note, and these
    count as sounding, whether or not the frame roll agrees; our own rule is that a new onset ends the note before it. Where an
    onset spans several frames, the centre of mass of its probability tells the strike more finely than the first of them:
    Kong et al. 2021 work it out from three of them, here up to four count, from the one before the first. The end is then read
    as finely, see `ends_of_notes`.

    Args:
        onset: (T, 88), probability that the key is struck in frame t.
        frame: (T, 88), probability that the key sounds in frame t.
        onset_threshold, frame_threshold: probability from which each counts, in (0, 1).
        onset_target: what `onset` tells of a strike, as for `notes_to_rolls`.
        velocity: (T, 88), that of a key struck in frame t; without it all notes have VELOCITY.

    Returns:
        Notes in order of onset. With the onset target "one" they begin at the centre of their first frame and end at that of
        their last; with "two" they begin up to a frame earlier or a frame and a half later, and may end between two frames. They last
        half a frame at least.
        Silence gives zero notes, with intervals of shape (0, 2).

    Raises:
        ValueError: the rolls differ in shape.
    """
    if onset.shape != frame.shape:
        raise ValueError(f"onset roll {onset.shape} and frame roll {frame.shape} differ in shape")
    n_frames, n_keys = onset.shape
    # one line of T + 1 places a key, so that the last, silent place parts it from the next key
    struck = np.zeros((n_keys, n_frames + 1), dtype=bool)
    sounds = np.zeros_like(struck)
    struck[:, :-1] = onset.T >= onset_threshold
    sounds[:, :-1] = frame.T >= frame_threshold
    sounds |= struck
    struck, sounds = struck.ravel(), sounds.ravel()
    starts = np.flatnonzero(struck & ~np.roll(struck, 1))
    keys, first = np.divmod(starts, n_frames + 1)
    limits = np.append(starts[1:], struck.size)  # where each note ends at the latest: at the next strike, if only of another key
    if onset_target == "one":
        last = first + stops_of(sounds, starts, limits) - 1 - starts
    else:
        last = first + ends_of_notes(frame, struck, sounds, starts, limits)
        first = first + shift_of_strikes(onset, first, keys, limits - starts, onset_target)
    onsets = frames_to_seconds(first)
    offsets = np.maximum(frames_to_seconds(last), onsets + 0.5 * HOP_SIZE / SAMPLE_RATE)
    velocities = np.full(len(keys), VELOCITY) if velocity is None else velocity[seconds_to_frames(onsets).clip(0, n_frames - 1), keys]
    return Notes(np.stack([onsets, offsets], axis=1), keys + MIN_MIDI, velocities)


def stops_of(sounds: np.ndarray, starts: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(N,) the first places at which nothing sounds, after `starts` (N,) at which something does, and not after `limits` (N,)."""
    lasts = np.flatnonzero(sounds & ~np.roll(sounds, -1))
    return np.minimum(lasts[np.searchsorted(lasts, starts)] + 1, limits)


def ends_of_notes(frame: np.ndarray, struck: np.ndarray, sounds: np.ndarray, starts: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(N,) how many frames after its first a note's last one lies, in fractions too: where the probability that it sounds falls most.

    There the offset lies most probably, within what a score allows it to be off. Where a model hears that a note ends on this
    beat or on the next, the first frame below a threshold can be somewhere in the middle, where it surely does not end. This
    rule is our own.

    Args:
        frame: (T, K), probability that the key sounds in frame t.
        struck, sounds: (P,) at places as `extract_notes` has them, T + 1 of each key; notes end after one that sounds.
        starts, limits: (N,) places at which notes begin, in order, and before which they end.
    """
    if not len(starts):
        return np.zeros(0)
    level = np.zeros((frame.shape[1], len(frame) + 1), dtype=frame.dtype)
    level[:, :-1] = frame.T
    level = level.ravel()
    stops = stops_of((level >= SILENT) | struck, starts, limits)
    places = np.flatnonzero(sounds)
    note = np.searchsorted(starts, places, side="right") - 1
    inside = (note >= 0) & (places < stops[note])
    places, note = places[inside], note[inside]

    def left(step: int) -> np.ndarray:
        """The probability so many frames from `places` on; before the note that of its first frame, after it 0."""
        there = np.maximum(places + step, starts[note])
        return np.where(there < stops[note], level.take(there, mode="clip"), 0)

    # a place ends half a frame after its centre; between centres the probability runs straight
    fall = (REACH - 0.5) * (left(-1) - left(2)) + (1.5 - REACH) * (left(0) - left(1))
    notes = np.arange(len(starts))
    steepest = np.flatnonzero(fall == np.maximum.reduceat(fall, np.searchsorted(note, notes))[note])
    steepest = steepest[np.searchsorted(note[steepest], notes, side="right") - 1]  # of equal ones the last
    places, note = places[steepest], note[steepest]
    around = [left(step) for step in range(-2, 4)]
    high, low = (around[0] + around[1]) / 2, (around[4] + around[5]) / 2
    # of what falls within two frames to either side, the mean
    sounding = sum(((x - low) / np.where(high > low, high - low, 1)).clip(0, 1) for x in around[1:5])
    return places - starts + np.where(high > low, sounding - 2, 0)


def shift_of_strikes(onset: np.ndarray, first: np.ndarray, keys: np.ndarray, room: np.ndarray, onset_target: str) -> np.ndarray:
    """(N,) frames by which strikes lie after the frames `first` in which their onsets rise, see `extract_notes`; `room` (N,) is
    how many frames they have before the next strike of their key."""
    places = np.arange(-1, 3)
    frames = first[:, None] + places                                                                    # (N, 4)
    inside = (frames >= 0) & (frames < len(onset)) & (places < room[:, None])
    near = onset[frames.clip(0, len(onset) - 1), keys[:, None]] * inside
    return near @ places / near.sum(axis=1) - np.mean(ONSET_PLACES[onset_target])


def f1_of(true: float, n_est: float, n_ref: float) -> tuple[float, float, float]:
    """Precision, recall and F1 from counts; nothing estimated or nothing to find scores zero, as in mir_eval."""
    precision, recall = true / max(n_est, 1), true / max(n_ref, 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if true else 0.0


def roll_metrics(name: str, ref: np.ndarray, est: np.ndarray) -> dict[str, float]:
    """Frame-wise scores of a boolean (T, 88) roll, counted over all its places (Bay et al., ISMIR 2009)."""
    precision, recall, f1 = f1_of(np.sum(ref & est), est.sum(), ref.sum())
    return {f"metric/frame/{name}_precision": precision, f"metric/frame/{name}_recall": recall, f"metric/frame/{name}_f1": f1}


def note_metrics(ref: Notes, est: Notes, names: tuple[str, ...] = ("note", "note-with-offsets")) -> dict[str, float]:
    """Note scores by mir_eval: onset within 50 ms and pitch within a quarter tone; then offsets within 50 ms or 20 % too; and with these
    velocities, see `same_velocity`.

    A recording without reference notes, or without any found, scores zero, as mir_eval has it.
    """
    import mir_eval  # brings scipy along, a second that transcribing and --help can do without
    rows = {}
    for name in names:
        pairs = match(ref, est, offset_ratio=OFFSET_RATIO if name == "note-with-offsets" else None)
        found = {name: pairs}
        if name == "note-with-offsets":
            found["note-with-offsets-and-velocity"] = pairs[same_velocity(ref.velocities, ref.velocities[pairs[:, 0]], est.velocities[pairs[:, 1]])]
        for kind, pairs in found.items():
            scores = *f1_of(len(pairs), len(est), len(ref)), mir_eval.transcription.average_overlap_ratio(ref.intervals, est.intervals, pairs)
            rows |= {f"metric/{kind}/{key}": float(score) for key, score in zip(("precision", "recall", "f1", "overlap"), scores)}
    return rows


def same_velocity(whole: np.ndarray, ref: np.ndarray, est: np.ndarray) -> np.ndarray:
    """(P,) bool, whether the velocities of pairs, `ref` (P,) and `est` (P,), agree: within a tenth of the range that those of the `whole`
    reference (N,) have, once `est` is scaled to fit best. As in Hawthorne et al. 2018: recordings tell of differences, not of a level."""
    if not len(ref):
        return np.zeros(0, dtype=bool)
    line = np.stack([est, np.ones(len(est))], axis=1)
    off = line @ np.linalg.lstsq(line, ref.astype(float), rcond=None)[0] - ref
    return np.abs(off) < VELOCITY_TOLERANCE * max(1, np.ptp(whole))


def predict(model: Transcriber | Ensemble, recordings: list[Recording]) -> Iterator[Heard]:
    """What `infer` hears in whole recordings; one at a time, for an hour of it takes 89 MB.

    Raises:
        ValueError, MemoryError: as `infer` does, with the recording's name.
    """
    for recording in tqdm(recordings, "listening", unit="recording", leave=False, disable=None):
        with errors_of(recording.name):
            heard = model.infer(recording.to_float())
        yield tuple(part.numpy() for part in heard)


def logit_to_prob(logit: np.ndarray) -> np.ndarray:
    """The sigmoid."""
    return 0.5 * (1 + np.tanh(0.5 * logit))


def estimated_notes(heard: Heard, thresholds: dict[str, float], onset_target: str) -> Notes:
    """The notes in what was heard; a model's `thresholds`, and the `onset_target` of its recipe."""
    frame_logit, onset_logit, *velocity = heard
    return extract_notes(logit_to_prob(onset_logit), logit_to_prob(frame_logit), thresholds["onset"], thresholds["frame"], onset_target, *velocity)


def score(recording: Recording, heard: Heard, thresholds: dict[str, float], onset_target: str, reference: str = "midi") -> dict[str, float]:
    """All metrics of one recording; losses, frame and onset scores against what the model was taught.

    `metric/frame/frame_*` are of all frames above the threshold; `metric/frame/notes_*` of those in which the estimated notes
    sound, which is the frame score of Hawthorne et al. 2018, and higher where a model takes for frames what no onset begins.

    Args:
        heard, thresholds, onset_target: as for `estimated_notes`.
        reference: "midi" scores against the MIDI file's own seconds, as published tables do; "roll" against notes read
            off the quantised rolls, as the course does, which hides up to 32 ms of error and has no velocities to score.
    """
    frame_logit, onset_logit = heard[:2]
    n_frames = len(frame_logit)
    target, frame_roll = notes_to_rolls(recording.notes, n_frames, 0, onset_target)
    est = estimated_notes(heard, thresholds, onset_target)
    ref = recording.notes if reference == "midi" else extract_notes(*notes_to_rolls(recording.notes, n_frames))
    notes = {name: value for name, value in note_metrics(ref, est).items() if reference == "midi" or "velocity" not in name}
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    losses = {f"metric/loss/{name}_loss": float(bce(torch.from_numpy(logit), torch.from_numpy(roll).float()))
              for name, logit, roll in (("frame", frame_logit, frame_roll), ("onset", onset_logit, target))}
    return {**losses, **roll_metrics("frame", frame_roll > 0, logit_to_prob(frame_logit) >= thresholds["frame"]),
            **roll_metrics("notes", frame_roll > 0, notes_to_rolls(est, n_frames)[1] > 0),
            **roll_metrics("onset", target > 0, logit_to_prob(onset_logit) >= thresholds["onset"]), **notes}


def tune_thresholds(recordings: list[Recording], heard: list[Heard], onset_target: str) -> dict[str, float]:
    """The onset threshold with the best mean note F1, then the frame threshold with the best mean of frame F1 and
    note-with-offsets F1, for both rest on it; of THRESHOLDS."""
    best = {"onset": 0.5, "frame": 0.5}
    rolls = [(notes_to_rolls(recording.notes, len(frame))[1] > 0, logit_to_prob(frame), logit_to_prob(onset))
             for recording, (frame, onset, *_) in zip(recordings, heard)]
    for head, name in (("onset", "note"), ("frame", "note-with-offsets")):
        means = []
        for threshold in THRESHOLDS:
            tried, f1s = {**best, head: float(threshold)}, []
            for recording, (ref, frame, onset) in zip(recordings, rolls):
                est = extract_notes(onset, frame, tried["onset"], tried["frame"], onset_target)
                f1s.append(note_metrics(recording.notes, est, (name,))[f"metric/{name}/f1"])
                if head == "frame":
                    f1s[-1] += roll_metrics("frame", ref, frame >= threshold)["metric/frame/frame_f1"]
            means.append(np.mean(f1s))
        if max(means) > 0:
            best[head] = float(THRESHOLDS[int(np.argmax(means))])
    return best


def fit_velocity(model: Transcriber, recordings: list[Recording]) -> None:
    """Learn how velocities are read, `model.velocity`, by least squares over all strikes.

    What counts are the differences between strikes of one recording: how loud it is as a whole tells more of its microphone than of
    its pianist, so only the constant, at last, is chosen for the means. This method is our own.
    """
    still, sums, means = copy.deepcopy(model).eval(), [], []
    for recording in recordings:
        frames = recording.notes.frames[0]
        inside = frames < recording.n_frames
        if inside.any():
            keys = torch.from_numpy(recording.notes.pitches[inside] - MIN_MIDI).long()
            x = still.strikes(recording.to_float(), torch.from_numpy(frames[inside]).long(), keys).double()
            y = torch.from_numpy(recording.notes.velocities[inside]).double()
            means.append((x.mean(dim=0), y.mean()))
            x, y = x - x.mean(dim=0), y - y.mean()
            sums.append((x.T @ x, x.T @ y, len(y)))
    if sums:
        squares, products, n = (sum(column) for column in zip(*sums))
        weights = torch.linalg.solve(squares + RIDGE * n * torch.eye(len(squares)), products)
        weights[len(weights) // 2 - 1] = sum(y - x @ weights for x, y in means) / len(means)  # so far 0, for it is the constant's
        model.velocity.copy_(weights)


def evaluate_split(model: Transcriber | Ensemble, recordings: list[Recording], reference: str = "midi") -> tuple[list[dict[str, float]], list[Notes]]:
    """The metrics of each recording, with the model's own thresholds, and the notes heard in it."""
    rows, notes = [], []
    for recording, parts in zip(recordings, predict(model, recordings)):
        rows.append(score(recording, parts, model.thresholds, model.recipe.onset_target, reference))
        notes.append(estimated_notes(parts, model.thresholds, model.recipe.onset_target))
    return rows, notes


def summarise(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each metric over recordings."""
    return {name: (float(np.mean([row[name] for row in rows])), float(np.std([row[name] for row in rows]))) for name in rows[0]}


def format_table(summary: dict[str, tuple[float, float]]) -> str:
    """One line a metric: name, mean +- standard deviation."""
    return "\n".join(f"{name:47}: {mean:.4f} +- {std:.4f}" for name, (mean, std) in summary.items())


def write_results(path: Path, recordings: list[Recording], rows: list[dict[str, float]], thresholds: dict[str, float],
                  **about: Any) -> None:
    """Write `path` with the suffixes .json and .csv: every metric of every recording. Raises OSError."""
    named = [{"recording": recording.name, **row} for recording, row in zip(recordings, rows)]
    means = {name: {"mean": mean, "std": std} for name, (mean, std) in summarise(rows).items()}
    write_json(path.with_suffix(".json"), {**about, "sustain_extended": True, "thresholds": thresholds, "means": means, "recordings": named})
    with written_whole(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.DictWriter(file, list(named[0]))
        table.writeheader()
        table.writerows(named)


def names_of(checkpoints: list[Path]) -> list[str]:
    """What results call them: their files' names, with those of their folders where different ones have the same."""
    files = Counter(path.stem for path in {path.resolve() for path in checkpoints})
    return [f"{path.resolve().parent.name}-{path.stem}" if files[path.stem] > 1 else path.stem for path in checkpoints]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a checkpoint on whole recordings; per-recording results go to JSON and CSV.",
                                     formatter_class=Help)
    parser.add_argument("checkpoints", type=Path, nargs="*", metavar="checkpoint",
                        help="a model-*.pt of train.py; of several the mean is scored, in which one named twice counts twice; "
                        f"by default {' '.join(path.name for path in RELEASED)}, which come with this project")
    parser.add_argument("--data", nargs="+", help="data folders; by default those that a run's checkpoint was trained on, or data")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which recordings")
    parser.add_argument("--reference", choices=("midi", "roll"), default="midi",
                        help="notes to find: the MIDI file's own, as in published tables, or those of its rolls, as in the course")
    parser.add_argument("--analyse", action="store_true", help="tell what kinds of errors are made: as tables, in the JSON and as a picture")
    parser.add_argument("--share", type=Path, metavar="PATH", help="first write the checkpoint's weights alone, in half precision, and score these")
    parser.add_argument("--save_path", type=Path, help="folder for the results; by default the checkpoint's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    args.checkpoints = args.checkpoints or RELEASED
    if args.analyse and args.reference != "midi":
        parser.error("--analyse looks at the MIDI file's own notes; leave --reference out")
    if args.share and len(args.checkpoints) > 1:
        parser.error("--share writes one checkpoint; name that alone")
    if args.share and args.share.resolve() == args.checkpoints[0].resolve():
        parser.error("--share writes another file than the checkpoint, which would lose what more training needs")
    return args


def run(args: argparse.Namespace) -> int:
    """Score a checkpoint as the command line says. Returns the exit status; raises OSError and ValueError."""
    keep_pages()
    device = pick_device(args.device)
    state = read_checkpoint(args.checkpoints[0])
    model = load_ensemble(args.checkpoints, device)
    folders = args.data or state.get("data", {}).get("folders", ["data"])
    recordings = load_split(folders, args.split)
    to_analyse = recordings if args.analyse else []
    held = [held_by_pedal(recording) for recording in tqdm(to_analyse, "reading pedals", unit="recording", leave=False, disable=None)]
    if args.share:
        share_checkpoint(args.share, state)
        args.checkpoints = [args.share]
        model = load_ensemble(args.checkpoints, device)
    rows, heard = evaluate_split(model, recordings, args.reference)
    named = " + ".join(map(str, args.checkpoints))
    path = (args.save_path or args.checkpoints[0].parent) / f"{'+'.join(names_of(args.checkpoints))}_{args.split}_{args.reference}.json"
    said = [f"{named}, {len(rows)} {args.split} recordings of {' '.join(folders)}, reference: {args.reference}, "
            f"sustain-extended: yes, thresholds: onset {model.thresholds['onset']:.2f}, frame {model.thresholds['frame']:.2f}",
            format_table(summarise(rows))]
    analysis = {}
    if args.analyse:
        counts = [count(compare(recording.notes, notes, pedal)) for recording, notes, pedal in zip(recordings, heard, held)]
        total = add(counts)
        analysis = {"analysis": {"total": total, "recordings": [{"recording": recording.name, **each} for recording, each in zip(recordings, counts)]}}
        said.append(f"\nall notes of the {len(rows)} recordings together\n{format_errors(total)}\n")
    try:
        write_results(path, recordings, rows, model.thresholds, checkpoint=" + ".join(f"{name}.pt" for name in names_of(args.checkpoints)), data=folders,
                      split=args.split, reference=args.reference, **analysis)
        if args.analyse:
            draw_errors(path.with_suffix(".png"), total, f"{named}, {len(rows)} {args.split} recordings of {' '.join(folders)}")
        said.append(f"per recording: {path} and .csv" + (f"; errors: {path} and .png" if args.analyse else ""))
        status = 0
    except OSError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        status = 1
    print("\n".join(said))  # after the files, for who reads it may close the pipe early
    return status


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status_of("evaluate.py", lambda: run(args), "what is written is whole", OSError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
