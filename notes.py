"""Notes: what a MIDI file says, what a piano roll shows, and where a frame lies in time.

The one definition of time. Frame t covers the samples [t * HOP_SIZE, (t + 1) * HOP_SIZE); what is said of a frame is said
of its centre, (t + 0.5) * HOP_SIZE / SAMPLE_RATE seconds. An onset lies in the frame that covers it, so reading it back at
the centre errs by at most 16 ms and by 0 ms on average. The spectrogram centres its window there too (`spectrogram.py`).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path

import mido
import numpy as np
import pretty_midi

from constants import HOP_SIZE, MAX_MIDI, MIN_MIDI, N_KEYS, SAMPLE_RATE
from files import written_whole

PEDAL_DOWN = 64     # CC64 from which the sustain pedal holds; the MIDI standard's switch point
SUSTAIN_PEDAL = 64  # MIDI controller number
VELOCITY = 80       # of notes of which it is not known, mezzo-forte
ONE_SAMPLE_BACK = np.array([0, 1 / SAMPLE_RATE])  # of the offset, not of the onset
ONSET_PLACES = {"one": (0,), "two": (0, 1)}  # the frames of an onset, counted from that of its strike
TICKS_PER_BEAT = 960  # at 120 BPM a tick is 0.52 ms
MOST_TICKS = 9_999_999  # pretty_midi takes a file with more for a broken one


@dataclass(frozen=True)
class Notes:
    """Notes in order of onset, then pitch.

    Attributes:
        intervals: (N, 2) float64, onset and offset in seconds.
        pitches: (N,) int32, MIDI numbers.
        velocities: (N,) int32, 1..127.
    """

    intervals: np.ndarray
    pitches: np.ndarray
    velocities: np.ndarray

    def __post_init__(self) -> None:
        intervals = np.asarray(self.intervals, dtype=np.float64).reshape(-1, 2)
        pitches = np.asarray(self.pitches, dtype=np.int32)
        order = np.lexsort((pitches, intervals[:, 0]))
        object.__setattr__(self, "intervals", intervals[order])
        object.__setattr__(self, "pitches", pitches[order])
        object.__setattr__(self, "velocities", np.asarray(self.velocities, dtype=np.int32)[order])

    def __len__(self) -> int:
        return len(self.pitches)

    @cached_property
    def frames(self) -> np.ndarray:
        """(2, N) int32: the frame of each strike, and the first in which the note is silent. Kept, and small, for every segment asks for them."""
        # one sample back: a note that ends where frame t begins does not sound in frame t
        first, last = seconds_to_frames(self.intervals - ONE_SAMPLE_BACK).T
        return np.stack([first, np.maximum(first, last) + 1]).astype(np.int32)

    def until(self, seconds: float) -> "Notes":
        """The notes that begin before `seconds`, cut off there."""
        keep = self.intervals[:, 0] < seconds
        return Notes(np.minimum(self.intervals[keep], seconds), self.pitches[keep], self.velocities[keep])


def seconds_to_frames(seconds: np.ndarray) -> np.ndarray:
    """The frame that covers each moment. Rounds to a sample first: 3.2 s is the start of frame 100, whatever floats say."""
    return np.rint(np.asarray(seconds) * SAMPLE_RATE).astype(np.int64) // HOP_SIZE


def frames_to_seconds(frames: np.ndarray) -> np.ndarray:
    """The centre of each frame in seconds."""
    return (np.asarray(frames) + 0.5) * HOP_SIZE / SAMPLE_RATE


def notes_to_rolls(notes: Notes, n_frames: int, start: int = 0, onset_target: str = "one") -> tuple[np.ndarray, np.ndarray]:
    """Draw the frames [start, start + n_frames) of a recording's notes as piano rolls.

    A key is on in the frame roll in every frame it sounds in, at least one; in the onset roll in the frame of its strike.
    A note that began before `start` sounds on without an onset, so a roll is the same cut or built.

    Args:
        start: the first frame, 0 or more.
        onset_target: "one"; or "two", which has the onset last for the next frame too (Hawthorne et al. 2018: 32 ms of onset).

    Returns:
        The onset roll and the frame roll, (n_frames, 88) uint8 each.
    """
    onset, frame = np.zeros((2, n_frames, N_KEYS), dtype=np.uint8)
    first, stop = notes.frames
    near = (stop[: first.searchsorted(start + n_frames)] >= start).nonzero()[0]  # all that can be seen; an onset reaches in by a frame
    first, stop, keys = first[near] - start, stop[near] - start, notes.pitches[near] - MIN_MIDI
    begin = np.maximum(first, 0)
    lengths = np.minimum(stop, n_frames) - begin
    # where the frames begin, begin + 1, … of every note lie in the flattened roll, one note after the other: no loop over notes
    ends = lengths.cumsum()
    places = ((begin - ends + lengths) * N_KEYS + keys).repeat(lengths)
    places += np.arange(0, len(places) * N_KEYS, N_KEYS)
    frame.ravel()[places] = 1
    strikes = first * N_KEYS + keys
    for place in ONSET_PLACES[onset_target]:
        low, high = first.searchsorted((-place, n_frames - place))
        onset.ravel()[strikes[low:high] + place * N_KEYS] = 1
    return onset, frame


def hold_with_pedal(notes: Notes, pedal: list[tuple[float, int]], end: float) -> Notes:
    """Let the sustain pedal hold notes, and let a key that is struck again end the note before it.

    A note whose key goes up while the pedal is down (CC64 >= 64) sounds until the pedal goes up, until its key is struck
    again, or until `end` when the pedal never goes up; the convention of every published table (Hawthorne et al. 2018).

    Args:
        notes: as the keys were held. Of two notes with one pitch and one onset the longer is kept: a key sounds once.
        pedal: (seconds, CC64 value) each.
        end: seconds, the end of the recording, where a pedal still down lets go.
    """
    intervals = notes.intervals.copy()
    pedal = sorted(pedal, key=lambda event: event[0])  # stable: events of one moment keep their order
    times = np.array([time for time, _ in pedal] + [end])
    down = np.array([value >= PEDAL_DOWN for _, value in pedal] + [False])
    releases = times[~down]
    if down.any():
        state = np.searchsorted(times, intervals[:, 1], side="right") - 1  # the pedal event in force at each key's release
        held = (state >= 0) & down[state]
        intervals[held, 1] = releases[np.searchsorted(releases, intervals[held, 1], side="right")]
    order = np.lexsort((-intervals[:, 1], intervals[:, 0], notes.pitches))  # by pitch, onset, the longer first
    intervals, pitches, velocities = intervals[order], notes.pitches[order], notes.velocities[order]
    same = np.diff(pitches) == 0
    keep = np.ones(len(pitches), dtype=bool)
    keep[1:] = ~same | (np.diff(intervals[:, 0]) > 0)
    intervals, pitches, velocities = intervals[keep], pitches[keep], velocities[keep]
    same = np.diff(pitches) == 0
    intervals[:-1][same, 1] = np.minimum(intervals[:-1][same, 1], intervals[1:][same, 0])
    sounds = intervals[:, 1] > intervals[:, 0]
    return Notes(intervals[sounds], pitches[sounds], velocities[sounds])


def open_midi(path: str | Path) -> pretty_midi.PrettyMIDI:
    """Parse a MIDI file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a MIDI file, or a broken one.
    """
    try:
        return pretty_midi.PrettyMIDI(str(path))
    except OSError as error:
        if error.errno is None:  # mido says "MThd not found" with a bare OSError
            raise ValueError(f"{path}: is not a whole MIDI file ({error})") from error
        raise OSError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # mido and pretty_midi raise whatever the broken bytes lead to
        raise ValueError(f"{path}: is not a whole MIDI file ({str(error) or type(error).__name__})") from error


def keys_of(midi: pretty_midi.PrettyMIDI) -> tuple[Notes, list[tuple[float, int]], float]:
    """What hands and foot did, without letting the pedal hold anything; drums and pitches off the keyboard are left out.

    Returns:
        The notes from each key's strike to its release, the sustain pedal as (seconds, CC64 value), and the file's end in seconds.
    """
    staves = [instrument for instrument in midi.instruments if not instrument.is_drum]
    notes = [note for staff in staves for note in staff.notes if MIN_MIDI <= note.pitch <= MAX_MIDI]
    # a piano has one pedal, whichever staff's track tells of it
    pedal = [(change.time, change.value) for staff in staves for change in staff.control_changes if change.number == SUSTAIN_PEDAL]
    return Notes([(note.start, note.end) for note in notes], [note.pitch for note in notes],
                 [note.velocity for note in notes]), pedal, midi.get_end_time()


def read_midi(path: str | Path) -> Notes:
    """Read the notes a MIDI file sounds, sustain pedal included; raises OSError and ValueError as open_midi does."""
    return hold_with_pedal(*keys_of(open_midi(path)))


def ticks_per_beat(notes: Notes) -> int:
    """TICKS_PER_BEAT, and less for more than 86 minutes, which would have more than MOST_TICKS: 1.1 ms a tick in three hours."""
    return min(TICKS_PER_BEAT, max(1, int(MOST_TICKS / (2 * notes.intervals.max(initial=1.0) + 1))))


def notes_to_midi(notes: Notes) -> pretty_midi.PrettyMIDI:
    """Notes as one piano track at 120 BPM."""
    midi = pretty_midi.PrettyMIDI(resolution=ticks_per_beat(notes), initial_tempo=120)
    piano = pretty_midi.Instrument(program=0, name="piano")
    notes = hold_with_pedal(notes, [], 0.0)  # in MIDI the first note-off of a key ends every note on it
    piano.notes = [pretty_midi.Note(int(velocity), int(pitch), float(onset), float(offset))
                   for (onset, offset), pitch, velocity in zip(notes.intervals, notes.pitches, notes.velocities)]
    midi.instruments.append(piano)
    return midi


def write_midi(path: str | Path, notes: Notes) -> None:
    """Write notes as a MIDI file, the piano track of `notes_to_midi`; raises OSError, and ValueError for what MIDI cannot say.

    By mido itself, for pretty_midi, which comes to the same in the end, takes three times as long; and without its checks of
    every message, two fifths of what is left, which are done at once here.
    """
    for name, values in (("pitches", notes.pitches), ("velocities", notes.velocities)):
        if (values & ~127).any():
            raise ValueError(f"{path}: {name} in MIDI are 0 to 127")
    if not (notes.intervals >= 0).all():
        raise ValueError(f"{path}: a note would begin or end before 0 s, or when is not a number")
    notes = hold_with_pedal(notes, [], 0.0)
    resolution = ticks_per_beat(notes)
    ticks = np.round(notes.intervals * (2 * resolution)).astype(np.int64)  # 120 BPM
    ticks[:, 1] = np.maximum(ticks[:, 1], ticks[:, 0] + 1)  # else a note within a tick would end before it begins
    events = sorted([*zip(ticks[:, 1].tolist(), repeat(0), notes.pitches.tolist()),  # of one moment, keys go up before others go down
                     *zip(ticks[:, 0].tolist(), notes.velocities.tolist(), notes.pitches.tolist())])
    piano = mido.MidiTrack([mido.MetaMessage("track_name", name="piano"), mido.Message("program_change", program=0)])
    now = 0
    for tick, velocity, pitch in events:
        piano.append(mido.Message("note_on", note=pitch, velocity=velocity, time=tick - now, skip_checks=True))  # velocity 0: the key goes up
        now = tick
    tempo = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(120)), mido.MetaMessage("time_signature")])
    with written_whole(path) as temporary:
        mido.MidiFile(ticks_per_beat=resolution, tracks=[tempo, piano]).save(temporary)
