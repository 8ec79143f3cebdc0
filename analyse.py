"""What kinds of errors a transcription makes: `python evaluate.py ckpt.pt --analyse`.

Notes are matched as for the note score: same pitch, onsets within 50 ms. A reference note without a partner is *missed*, an
estimated note without one is *extra*. Each of these is of exactly one kind, the first of the list that holds, so the kinds
sum to the errors. "The other side" is what the model heard when a missed note is looked at, and what was played when an
extra one is.

1. *wrong time*: what is left over on both sides, matched again with onsets within 200 ms; a missed and an extra note each.
2. *merged* (missed): the key was struck again, and heard as one note with the strike before. *split* (extra): a held
   note was heard as struck again. The onset lies more than 50 ms inside a note of this pitch on the other side, and that
   note has a partner.
3. *octave*: within 50 ms of the onset the other side has an onset 12 semitones away. A missed note was swallowed by its octave, or
   written as it; an extra one was heard into its octave.
4. *harmonic*: the same with the intervals of the third to eighth harmonic (19, 24, 28, 31, 34, 36 semitones), up or down.
5. *plain*: none of these.

Kinds 3 and 4 name an interval, not a cause: in chords an octave or a twelfth also comes about by chance.

The offset of a found note is *right* within 50 ms or 20 % of the reference's duration, else *too short* or *too long*. What ended
the reference note is told beside it: the *pedal*, when it sounded on after its key was released, or the *key*. MIDI files
without any pedal event (CC64) cannot say; lists of notes such as those of MAPS tell of no pedal.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from constants import MAX_MIDI, MIN_MIDI
from dataset import Recording
from files import written_whole
from notes import Notes, keys_of, open_midi

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONSET_TOLERANCE = 0.05  # seconds, Bay et al. 2009 and MIREX
OFFSET_RATIO = 0.2      # of the note's duration, or ONSET_TOLERANCE if that is more
WRONG_TIME = 0.2        # seconds; notes further apart are not taken for one event
ROUNDING = 5e-5         # seconds; mir_eval rounds to 0.1 ms before it compares
HARMONICS = {round(12 * np.log2(n)) for n in range(3, 9)}  # semitones from a fundamental
MISSED = ("wrong time", "merged", "octave", "harmonic", "plain")
EXTRA = ("wrong time", "split", "octave", "harmonic", "plain")
OFFSETS = ("right", "too short", "too long")
ENDERS = ("key", "pedal", "not known")
# the first value of each band, and its name
OCTAVES = {MIN_MIDI: "A0-B0", **{12 * n + 12: f"C{n}-B{n}" for n in range(1, 8)}, MAX_MIDI: "C8"}
VELOCITIES = {max(1, low): f"{max(1, low)}-{low + 15}" for low in range(0, 128, 16)}
POLYPHONIES = {1: "1", 2: "2", 3: "3-4", 5: "5-8", 9: "9-16", 17: "17 and more"}

Counts = dict[str, Any]  # numbers, or more Counts


@dataclass(frozen=True)
class Comparison:
    """What became of each of the N reference and M estimated notes of a recording; words of the module's docstring.

    Attributes:
        partner: (N,) int64, which estimated note found this reference note; -1 where it was missed.
        missed: (N,) str, one of MISSED, or "" where it was found.
        extra: (M,) str, one of EXTRA, or "" where it found one.
        offset: (N,) str, one of OFFSETS, or "" where it was missed.
        ender: (N,) str, one of ENDERS.
        polyphony: (N,) int64, reference notes that sound at this onset or are struck within 50 ms after it, itself included.
    """

    ref: Notes
    est: Notes
    partner: np.ndarray
    missed: np.ndarray
    extra: np.ndarray
    offset: np.ndarray
    ender: np.ndarray
    polyphony: np.ndarray


def held_by_pedal(recording: Recording) -> np.ndarray | None:
    """(N,) bool, whether each note of a recording sounded on after its key was released; None where its MIDI file has no pedal.

    Raises:
        OSError, ValueError: as open_midi does.
    """
    if recording.midi_path is None:
        return None
    keys, pedal, _ = keys_of(open_midi(recording.midi_path))
    if not pedal:
        return None
    released: dict[tuple[int, float], float] = {}
    for pitch, (onset, offset) in zip(keys.pitches.tolist(), keys.intervals.tolist()):
        released[pitch, onset] = max(offset, released.get((pitch, onset), offset))
    return np.array([offset > released[pitch, onset] + ROUNDING
                     for pitch, (onset, offset) in zip(recording.notes.pitches.tolist(), recording.notes.intervals.tolist())], dtype=bool)


def match(ref: Notes, est: Notes, tolerance: float = ONSET_TOLERANCE, offset_ratio: float | None = None) -> np.ndarray:
    """(P, 2) int64, the most pairs of reference and estimated notes of one pitch with onsets within `tolerance` seconds.

    With `offset_ratio` offsets too have to lie within that share of the reference's duration, or within 50 ms. mir_eval compares each
    note with every other, which takes 2 GB of memory for 8,000 notes; given one pitch at a time it finds as many pairs in hardly any.
    """
    import mir_eval  # brings scipy along, a second that transcribing and --help can do without
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for pitch in np.intersect1d(ref.pitches, est.pitches):
        ours, theirs = (np.flatnonzero(side.pitches == pitch) for side in (ref, est))
        found = mir_eval.transcription.match_notes(
            ref.intervals[ours], np.ones(len(ours)), est.intervals[theirs], np.ones(len(theirs)),  # any frequency, for it is the same
            onset_tolerance=tolerance, offset_ratio=offset_ratio)
        found = np.array(found, dtype=np.int64).reshape(-1, 2)
        pairs.append(np.stack([ours[found[:, 0]], theirs[found[:, 1]]], axis=1))
    return np.concatenate(pairs)


def kinds_of(notes: Notes, lone: np.ndarray, shifted: np.ndarray, others: Notes, paired: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """The kind of error of each note of one side.

    Args:
        lone: (N,) bool, notes without a partner.
        shifted: (N,) bool, those of them that have one at the wrong time.
        others: the M notes of the other side.
        paired: (M,) bool, which of those have a partner, be it at the wrong time.
        names: MISSED or EXTRA.

    Returns:
        (N,) str, "" for a note with a partner.
    """
    wrong_time, repeated, octave, harmonic, plain = names
    kinds = np.full(len(notes), "", dtype="<U10")
    onsets, offsets = others.intervals.T
    for i in np.flatnonzero(lone):
        onset, pitch = notes.intervals[i, 0], notes.pitches[i]
        first, last = np.searchsorted(onsets, [onset - ONSET_TOLERANCE - ROUNDING, onset + ONSET_TOLERANCE + ROUNDING])
        away = set(np.abs(others.pitches[first:last] - pitch).tolist())
        around = paired & (others.pitches == pitch) & (onsets < onset - ONSET_TOLERANCE) & (offsets > onset + ONSET_TOLERANCE)
        if shifted[i]:
            kinds[i] = wrong_time
        elif around.any():
            kinds[i] = repeated
        else:
            kinds[i] = octave if 12 in away else harmonic if away & HARMONICS else plain
    return kinds


def compare(ref: Notes, est: Notes, held: np.ndarray | None = None) -> Comparison:
    """Match estimated with reference notes and name every error.

    Args:
        held: (N,) bool from held_by_pedal, or None where it is not known.
    """
    pairs = match(ref, est)
    partner, used = np.full(len(ref), -1), np.zeros(len(est), dtype=bool)
    partner[pairs[:, 0]], used[pairs[:, 1]] = pairs[:, 1], True
    missed, extra = partner < 0, ~used
    left = [Notes(side.intervals[lone], side.pitches[lone], side.velocities[lone]) for side, lone in ((ref, missed), (est, extra))]
    shifted = match(*left, WRONG_TIME)
    ref_shifted, est_shifted = np.zeros(len(ref), dtype=bool), np.zeros(len(est), dtype=bool)
    ref_shifted[np.flatnonzero(missed)[shifted[:, 0]]] = True
    est_shifted[np.flatnonzero(extra)[shifted[:, 1]]] = True

    found = partner >= 0
    error = np.zeros(len(ref))
    error[found] = np.round(est.intervals[partner[found], 1] - ref.intervals[found, 1], 4)  # as mir_eval does
    tolerance = np.maximum(OFFSET_RATIO * np.diff(ref.intervals)[:, 0], ONSET_TOLERANCE)
    offset = np.where(error < -tolerance, "too short", np.where(error > tolerance, "too long", "right"))
    began = np.searchsorted(ref.intervals[:, 0], ref.intervals[:, 0] + ONSET_TOLERANCE, side="right")
    ended = np.searchsorted(np.sort(ref.intervals[:, 1]), ref.intervals[:, 0], side="right")
    return Comparison(
        ref, est, partner, kinds_of(ref, missed, ref_shifted, est, used | est_shifted, MISSED),
        kinds_of(est, extra, est_shifted, ref, found | ref_shifted, EXTRA), np.where(found, offset, ""),
        np.full(len(ref), "not known") if held is None else np.where(held, "pedal", "key"), began - ended)


def tally(values: np.ndarray, names: tuple[str, ...]) -> Counts:
    """How often each name occurs."""
    return {name: int(np.sum(values == name)) for name in names}


def tally_bands(bands: dict[int, str], comparison: Comparison, ref: np.ndarray, est: np.ndarray | None = None) -> Counts:
    """Counts of each band: its reference notes, those found, the missed by kind.

    Args:
        bands: name by first value.
        ref: (N,) int, the value of each reference note.
        est: (M,) int, that of each estimated note, where they have one: they are counted too, and the extra ones by kind.
    """
    edges, counts = list(bands), {}
    for low, high in zip(edges, [*edges[1:], np.inf]):
        inside = (low <= ref) & (ref < high)
        row = {"reference": int(inside.sum()), "found": int(np.sum(comparison.partner[inside] >= 0)),
               "missed": tally(comparison.missed[inside], MISSED)}
        if est is not None:
            inside = (low <= est) & (est < high)
            row |= {"estimated": int(inside.sum()), "extra": tally(comparison.extra[inside], EXTRA)}
        counts[bands[low]] = row
    return counts


def count(comparison: Comparison) -> Counts:
    """The numbers of one recording, plain data for JSON; every kind and band is there, be it zero."""
    ref, est = comparison.ref, comparison.est
    return {
        "reference": len(ref), "estimated": len(est), "found": int(np.sum(comparison.partner >= 0)),
        "missed": tally(comparison.missed, MISSED), "extra": tally(comparison.extra, EXTRA),
        "offsets": {ender: tally(comparison.offset[comparison.ender == ender], OFFSETS) for ender in ENDERS},
        "by_octave": tally_bands(OCTAVES, comparison, ref.pitches, est.pitches),
        "by_velocity": tally_bands(VELOCITIES, comparison, ref.velocities),
        "by_polyphony": tally_bands(POLYPHONIES, comparison, comparison.polyphony)}


def add(counts: list[Counts]) -> Counts:
    """The sum of several recordings' numbers."""
    return {name: add([each[name] for each in counts]) if isinstance(value, dict) else sum(each[name] for each in counts)
            for name, value in counts[0].items()}


def share(part: int, whole: int) -> str:
    """A fraction for the eye; nothing of nothing is a dash."""
    return f"{part / whole:.3f}" if whole else "-"


def filled(bands: Counts) -> Counts:
    """The bands with any notes."""
    return {name: row for name, row in bands.items() if row["reference"] or row.get("estimated")}


def format_errors(counts: Counts) -> str:
    """The tables on the screen; bands without notes are left out."""
    def line(*cells: object) -> str:
        return f"{cells[0]:<15}" + "".join(f"{cell!s:>11}" for cell in cells[1:])

    n_found = counts["found"]
    n_missed, n_extra = counts["reference"] - n_found, counts["estimated"] - n_found
    lines = [line("errors", "missed", "share", "extra", "share")]
    for (missed, a), (extra, b) in zip(counts["missed"].items(), counts["extra"].items()):
        lines.append(line(missed if missed == extra else f"{missed} / {extra}", a, share(a, n_missed), b, share(b, n_extra)))
    lines += [line("all", n_missed, share(n_missed, n_missed), n_extra, share(n_extra, n_extra)), "",
              line("offset of found", *(f"by {ender}" if ender != "not known" else ender for ender in ENDERS))]
    lines += [line(name, *(counts["offsets"][ender][name] for ender in ENDERS)) for name in OFFSETS]
    lines.append(line("share right", *(share(row["right"], sum(row.values())) for row in counts["offsets"].values())))
    for name in ("octave", "velocity", "polyphony"):
        bands = filled(counts[f"by_{name}"])
        extra = ("estimated", "precision") if name == "octave" else ()
        lines += ["", line(name, "reference", "recall", *extra, "missed:", *MISSED)]
        for band, row in bands.items():
            cells = (row["estimated"], share(row["found"], row["estimated"])) if extra else ()
            lines.append(line(band, row["reference"], share(row["found"], row["reference"]), *cells, sum(row["missed"].values()),
                              *row["missed"].values()))
    return "\n".join(lines)


def errors_figure(counts: Counts, title: str) -> "Figure":
    """One picture: errors by kind, offsets, and what is missed by octave, velocity and polyphony."""
    from matplotlib.figure import Figure  # slow to import; Figure alone needs no screen
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    figure.suptitle(title.encode(errors="backslashreplace").decode(), parse_math=False)  # in file names any byte may stand
    kinds, offsets, octave, velocity, polyphony = figure.subplot_mosaic("AAABBB;CCDDEE").values()

    place = np.arange(len(MISSED))
    for shift, name, color in ((-0.2, "missed", "tab:red"), (0.2, "extra", "tab:blue")):
        kinds.bar_label(kinds.bar(place + shift, list(counts[name].values()), 0.4, color=color, label=name))
    kinds.set_xticks(place, [a if a == b else f"{a} / {b}" for a, b in zip(MISSED, EXTRA)])
    kinds.margins(y=0.12)  # room for the numbers
    kinds.set(ylabel="notes", title="errors by kind")
    kinds.legend()

    base = np.zeros(len(OFFSETS))
    for ender, color in zip(ENDERS, ("tab:orange", "tab:purple", "tab:gray")):
        values = np.array(list(counts["offsets"][ender].values()))
        if values.any():
            offsets.bar_label(offsets.bar(OFFSETS, values, bottom=base, color=color, label=ender), label_type="center")
            base += values
    offsets.set(ylabel="found notes", title="offsets of the found notes, by what ended them")
    if base.any():
        offsets.legend()

    colors = dict(zip(MISSED, ("tab:green", "tab:cyan", "tab:orange", "tab:olive", "tab:red")))
    for axes, name in ((octave, "octave"), (velocity, "velocity"), (polyphony, "polyphony")):
        bands = filled(counts[f"by_{name}"])
        whole = np.array([row["reference"] for row in bands.values()], dtype=int)
        base = np.zeros(len(bands))
        for kind in MISSED:
            values = 100 * np.array([row["missed"][kind] for row in bands.values()]) / np.maximum(whole, 1)
            axes.bar(list(bands), values, bottom=base, color=colors[kind], label=kind)
            base += values
        for x, (height, n) in enumerate(zip(base, whole)):
            axes.annotate(f"{n}", (x, height), ha="center", va="bottom", fontsize=8)
        axes.set(xlabel=name, ylabel="% of reference notes", title=f"missed, by {name} (of so many)", ylim=(0, 109))
        axes.tick_params(axis="x", labelrotation=30)
    bands = filled(counts["by_octave"])
    octave.plot(list(bands), [100 * sum(row["extra"].values()) / row["estimated"] if row["estimated"] else np.nan for row in bands.values()],
                "kD", markersize=5, label="extra, % of estimated")
    octave.legend(fontsize=8)
    return figure


def draw_errors(path: Path, counts: Counts, title: str) -> None:
    """Write errors_figure as PNG; raises OSError."""
    with written_whole(path) as temporary:
        errors_figure(counts, title).savefig(temporary, dpi=100)
