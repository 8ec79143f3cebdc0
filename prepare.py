"""Make data folders in the layout that `dataset.py` reads: `python prepare.py demo|maestro|maps|render|hold-out|check …`.

Every command can be stopped and started again: a recording that was finished is not made twice.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pretty_midi
import soundfile
from tqdm import tqdm

from audio import default_soundfont, has_fluidsynth, load_audio, open_sound, render_midi, save_audio
from commands import Help, exit_status_of, positive
from constants import MAX_MIDI, MIN_MIDI, SAMPLE_RATE
from dataset import SPLITS, find_audio, find_table, read_table
from files import write_json, written_whole
from notes import SUSTAIN_PEDAL, Notes, keys_of, notes_to_midi, open_midi, read_midi, write_midi

DEMO_SECONDS = 30
DEMO_COUNTS = {"train": 10, "validation": 3, "test": 3}
MAPS_TEST_PIANOS = ("ENSTDkAm", "ENSTDkCl")  # the Disklavier, near and far: test in Hawthorne et al. 2018
HELD_OUT = 10           # one composition in this many is validation, and of what is rendered another test, where a source has no split of its own
MATCH_SECONDS = 0.05    # as far apart a MAPS note list and its MIDI file may put one note
PEDALS = (SUSTAIN_PEDAL, 66, 67)  # and sostenuto and soft pedal: controllers of MIDI 1.0
CHORD_SECONDS = 0.05    # strikes so close are of one chord
NO_VELOCITY = 64        # for a note of a list that its MIDI file lacks
SLACK_SECONDS = 1.0     # by which a recording's length may miss its table's, or its MIDI file's

Row = dict[str, Any]


def rank_of(text: str) -> str:
    """A hash to sort names by: a pseudo-random order that is always the same, whichever other names there are."""
    return hashlib.sha1(os.fsencode(text)).hexdigest()


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are no fork of this one: FluidSynth's OpenMP would hang in a fork of a process that has rendered.

    Raises:
        OSError: a process was killed, most likely for memory.
    """
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(["prepare"])
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else the processes would outlive this one
    try:
        yield pool
    except BrokenProcessPool as error:
        raise OSError("a process was killed, out of memory? Go on with the same command and fewer --num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the recordings at hand and no others
        signal.signal(signal.SIGTERM, before)


def run_jobs(out: Path, jobs: list[tuple[Callable[..., float], tuple, Row]], workers: int, settings: dict[str, Any] | None = None) -> int:
    """Make the recordings of `jobs` in several processes, write OUT/data.json, and say in one line what came of it.

    Args:
        jobs: for each recording a function, its arguments after the audio's and the MIDI's path, and its row; the function
            makes both files and returns the audio's seconds.
        settings: what else the recordings depend on, such as the size of each SoundFont; kept in OUT/settings.json.

    Returns:
        The exit status: 1 if a recording failed. It is named, the others are kept.

    Raises:
        OSError: the table or the settings cannot be written.
        ValueError: two recordings would have one name, or the folder holds others or was made with other settings.
    """
    rows, n_kept, n_failed = [], 0, 0
    if len({row["audio_filename"] for _, _, row in jobs}) < len(jobs):
        raise ValueError(f"{out}: two recordings would have one name; rename one of the sources")
    check_holds_only(out, [row for _, _, row in jobs])
    if settings:
        path = out / "settings.json"
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); delete it or choose another folder") from error
        for name, value in settings.items():
            if found.get(name, value) != value:
                raise ValueError(f"{out}: was made with another {name} ({found[name]}, not {value}); choose another folder")
        write_json(path, {**found, **settings})
    with process_pool(workers) as pool:
        results = []
        for function, arguments, row in jobs:
            audio, midi = out / row["audio_filename"], out / row["midi_filename"]
            done = audio.is_file() and midi.is_file()
            n_kept += done
            results.append((row, pool.submit(seconds_of, audio) if done else pool.submit(function, audio, midi, *arguments)))
        for row, result in tqdm(results, out.name, unit="recording", disable=None):
            try:
                rows.append({**row, "duration": round(result.result(), 3)})
            except (OSError, ValueError) as error:
                n_failed += 1
                tqdm.write(f"prepare.py: {error}", file=sys.stderr)
    if rows:
        write_json(out / "data.json", rows)
    print(f"{summary_of(out, rows)}; {n_kept} were there, {n_failed} failed")
    return 1 if n_failed or not rows else 0


def summary_of(folder: Path, rows: list[Row]) -> str:
    counts = Counter(row["split"] for row in rows)
    return (f"{folder}: {len(rows)} recordings ({', '.join(f'{counts[split]} {split}' for split in SPLITS)}), "
            f"{sum(row['duration'] for row in rows) / 60:.1f} minutes")


def check_holds_only(out: Path, rows: list[Row]) -> None:
    """Raise ValueError if a folder is to be made where there is one with other recordings than those of `rows`."""
    others = {row["midi_filename"] for row in (read_table(out) if find_table(out) else [])} - {row["midi_filename"] for row in rows}
    if others:
        raise ValueError(f"{out}: its table names {len(others)} recordings that this command does not make, such as {min(others)}; choose another folder")


def seconds_of(audio: Path) -> float:
    """The length of a file that was made before; raises ValueError where it is broken."""
    try:
        with open_sound(audio) as file:
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{audio}: is broken, delete it and run again") from error


# --- demo ---

def demo_texture(random: np.random.Generator, start: float) -> list[tuple[float, float, int]]:
    """A few seconds of one kind of piano writing: (onset, offset, pitch) each."""
    root, step = int(random.integers(36, 73)), float(random.uniform(0.09, 0.3))
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12, 14, 16, 17, 19, 21, 23, 24])
    chord = np.array([0, 4, 7, 12, 16, 19, 24]) - np.array([0, random.integers(2), 0, 0, 0, 0, 0])
    length = step * float(random.uniform(0.4, 1.1))
    match random.integers(5):
        case 0:  # chords
            beats = start + np.arange(4) * 3 * step
            return [(beat + random.uniform(0, 0.02), beat + 2.7 * step, root + shift + int(tone))
                    for beat, shift in zip(beats, random.integers(-5, 8, 4)) for tone in random.permutation(chord)[:4]]
        case 1:  # a scale, up or down
            run = scale if random.random() < 0.5 else scale[::-1]
            return [(start + i * step, start + i * step + length, root + int(tone)) for i, tone in enumerate(run)]
        case 2:  # a broken chord
            return [(start + i * step, start + i * step + 2 * length, root + int(chord[(i * 3) % len(chord)])) for i in range(16)]
        case 3:  # one key again and again
            return [(start + i * step, start + i * step + min(length, 0.8 * step), root) for i in range(10)]
        case _:  # a melody over slow low notes
            melody = [(start + i * 2 * step, start + (i * 2 + 1.7) * step, root + 12 + int(random.choice(scale))) for i in range(8)]
            return melody + [(start + i * 8 * step, start + (i * 8 + 7.5) * step, root - 12 + 5 * i) for i in range(2)]


def demo_piece(seed: int) -> pretty_midi.PrettyMIDI:
    """Half a minute of generated piano music, soft to loud, half of it pedalled."""
    random = np.random.default_rng(seed)
    midi = pretty_midi.PrettyMIDI(resolution=960)
    piano = pretty_midi.Instrument(program=0)
    start = 0.3
    while start < DEMO_SECONDS - 4:
        notes = demo_texture(random, start)
        loudness = random.uniform(35, 105)
        free: dict[int, float] = {}  # when each key comes up
        for onset, offset, pitch in sorted(notes):
            if MIN_MIDI <= pitch <= MAX_MIDI and onset > free.get(pitch, -1):
                velocity = int(np.clip(loudness + random.normal(0, 8), 15, 127))
                piano.notes.append(pretty_midi.Note(velocity, pitch, onset, offset))
                free[pitch] = offset + 0.02
        end = max(offset for _, offset, _ in notes)
        if random.random() < 0.5:
            piano.control_changes += [pretty_midi.ControlChange(SUSTAIN_PEDAL, 127, start),
                                      pretty_midi.ControlChange(SUSTAIN_PEDAL, 0, end + 0.3)]
            end += 0.35
        start = end + random.uniform(0.05, 0.4)
    midi.instruments.append(piano)
    return midi


def make_demo_recording(audio: Path, midi: Path, seed: int, with_fluidsynth: bool) -> float:
    piece = demo_piece(seed)
    with written_whole(midi) as temporary:
        piece.write(str(temporary))
    if with_fluidsynth:
        save_audio(audio, render_midi(open_midi(midi)))
    else:  # pretty_midi's synthesis knows no pedal, so the notes are held for it
        samples = notes_to_midi(read_midi(midi)).synthesize(SAMPLE_RATE)
        save_audio(audio, [samples / max(1.0, 4 * float(np.abs(samples).max()))])
    return seconds_of(audio)


def make_demo(out: Path, workers: int | None = None) -> int:
    """A small set of generated pieces, rendered on the spot. Returns the exit status."""
    if not (with_fluidsynth := has_fluidsynth()):
        print("prepare.py: libfluidsynth is missing (apt-get install fluidsynth), so the demo set gets plain synthetic tones")
    jobs, seed = [], 0
    for split, count in DEMO_COUNTS.items():
        for _ in range(count):
            name = f"{split}/demo{seed:02d}"
            row = {"canonical_composer": "demo", "canonical_title": f"piece {seed}", "split": split, "year": 0,
                   "midi_filename": f"{name}.midi", "audio_filename": f"{name}.flac"}
            jobs.append((make_demo_recording, (seed, with_fluidsynth), row))
            seed += 1
    return run_jobs(out, jobs, workers or os.cpu_count())


# --- maestro ---

def choose_maestro(rows: list[Row], counts: dict[str, int]) -> list[Row]:
    """A fixed choice of so many recordings a split, the years in turn; without the chamber music that v2 holds."""
    chosen = []
    for split, count in counts.items():
        years = defaultdict(list)
        for row in sorted(rows, key=lambda row: rank_of(row["midi_filename"])):
            text = f"{row['canonical_title']} {row['midi_filename']}".lower()
            if row["split"] == split and "chamber" not in text:
                years[str(row["year"])].append(row)
        turns = [(turn, year, row) for year, queue in years.items() for turn, row in enumerate(queue)]
        chosen += [row for _, _, row in sorted(turns, key=lambda item: item[:2])[:count]]
    return chosen


def make_maestro(source: Path, out: Path, counts: dict[str, int] | None, workers: int) -> int:
    """The course's subset, or all, of an official MAESTRO download, as 16 kHz mono FLAC."""
    rows = read_table(source)
    rows = choose_maestro(rows, counts) if counts else rows
    jobs = []
    for row in rows:
        target = {**row, "audio_filename": str(Path(row["audio_filename"]).with_suffix(".flac"))}
        jobs.append((convert_maestro, (source, row), target))
    print(f"{len(rows)} recordings chosen; a choice of the same has the fingerprint {rank_of(' '.join(sorted(row['midi_filename'] for row in rows)))[:12]}")
    return run_jobs(out, jobs, workers)


def convert_maestro(audio: Path, midi: Path, source: Path, row: Row) -> float:
    """Audio to 16 kHz mono, the MIDI file as it is."""
    samples = load_audio(find_audio(source, row["audio_filename"]))
    read_midi(source / row["midi_filename"])  # a broken one is worth knowing about now
    save_audio(audio, [samples])
    with written_whole(midi) as temporary:
        shutil.copyfile(source / row["midi_filename"], temporary)
    return len(samples) / SAMPLE_RATE


# --- maps ---

def read_maps_list(path: Path, midi: Path) -> Notes:
    """A MAPS note list (OnsetTime, OffsetTime, MidiPitch), its velocities taken from the MIDI file beside it.

    The lists are the reference of Emiya et al., IEEE TASLP 2010; their offsets are meant to include the sustain pedal, and most lie where the key goes up.
    """
    try:
        table = np.loadtxt(path, skiprows=1, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: is not a MAPS note list ({error})") from error
    if table.shape[1:] != (3,):
        raise ValueError(f"{path}: is not a MAPS note list of three columns")
    played = read_midi(midi)
    velocities, known = [], np.append(played.velocities, NO_VELOCITY)  # the last where no note is near
    for onset, _, pitch in table:
        apart = np.where(played.pitches == pitch, np.abs(played.intervals[:, 0] - onset), np.inf)
        velocities.append(known[np.argmin(np.append(apart, MATCH_SECONDS))])
    keep = table[:, 1] > table[:, 0]
    return Notes(table[keep, :2], table[keep, 2], np.array(velocities)[keep])


def convert_maps(audio: Path, midi: Path, from_audio: Path) -> float:
    notes = read_maps_list(from_audio.with_suffix(".txt"), from_audio.with_suffix(".mid"))
    samples = load_audio(from_audio)
    save_audio(audio, [samples])
    write_midi(midi, notes)
    return len(samples) / SAMPLE_RATE


def make_maps(source: Path, out: Path, workers: int) -> int:
    """The MAPS database with the split of Hawthorne et al. 2018: the Disklavier is test, the others train on other pieces."""
    found = []
    for path in sorted(Path(os.path.abspath(source)).glob("**/MUS/*.wav")):  # of "." the piano's name could not be told, nor of where a link leads
        piano = path.parent.parent.name
        composition = path.stem.removeprefix("MAPS_MUS-").removesuffix(f"_{piano}")
        found.append((path, piano, composition))
    if not found:
        raise ValueError(f"{source}: holds no PIANO/MUS/*.wav")
    tested = {composition for _, piano, composition in found if piano in MAPS_TEST_PIANOS}
    jobs = []
    for path, piano, composition in found:
        if piano not in MAPS_TEST_PIANOS and composition in tested:
            continue
        held_out = int(rank_of(composition), 16) % HELD_OUT == 0
        split = "test" if piano in MAPS_TEST_PIANOS else "validation" if held_out else "train"
        row = {"canonical_composer": composition.split("_")[0].split("-")[0], "canonical_title": composition, "split": split,
               "year": piano, "midi_filename": f"{piano}/{path.stem}.midi", "audio_filename": f"{piano}/{path.stem}.flac"}
        jobs.append((convert_maps, (path,), row))
    return run_jobs(out, jobs, workers)


# --- render ---

def legato_pedal(onsets: np.ndarray, end: float, random: np.random.Generator) -> list[tuple[float, int]]:
    """A sustain pedal made up for strikes at `onsets` (N,) in seconds: (seconds, CC64 value); the last may come up to 15 s after `end`.

    In three of four passages of 3 to 15 s it goes up with a chord and down again before the next, every second or so, as
    pianists hold harmonies (legato pedalling).
    """
    onsets = np.sort(onsets)
    chords = onsets[np.diff(onsets, prepend=-1) > CHORD_SECONDS]
    changes, start = [], 0.0
    while start < end:
        stop, every, down = start + random.uniform(3, 15), random.uniform(0.3, 2), None
        for chord in chords[(chords >= start) & (chords < stop)] if random.random() < 0.75 else ():
            if down is None or chord - down >= every * random.uniform(0.7, 1.3):
                if down is not None:
                    changes.append((chord + random.uniform(-0.02, 0.05), 0))
                down = chord + random.uniform(0.06, 0.2)
                changes.append((down, 127))
        if down is not None:
            changes.append((max(down + 0.1, stop - random.uniform(0, 0.5)), 0))
        start = max(stop, changes[-1][0]) if changes else stop
    return changes


def put_on_one_piano(midi: pretty_midi.PrettyMIDI) -> pretty_midi.Instrument:
    """Make one of all staves, with the notes of `keys_of`: a key that two of them hold is struck twice and released once."""
    (piano,) = notes_to_midi(keys_of(midi)[0]).instruments
    piano.control_changes = [change for staff in midi.instruments if not staff.is_drum for change in staff.control_changes]
    midi.instruments = [piano, *(staff for staff in midi.instruments if staff.is_drum)]
    return piano


def render_file(audio: Path, midi: Path, source: Path, soundfont: Path, pedals: str) -> float:
    """Play a performance with its `own` pedals, with `none`, or with one that is heard but `unlisted`: made up, and not in the MIDI
    file, where notes end with their keys, as in MAPS. It is the same whenever this SoundFont plays a file of this name."""
    performance = open_midi(source)
    if pedals != "own":
        for instrument in performance.instruments:
            instrument.control_changes = [change for change in instrument.control_changes if change.number not in PEDALS]
    with written_whole(midi) as temporary:
        if pedals == "own":
            shutil.copyfile(source, temporary)
        else:
            performance.write(str(temporary))
    piano = put_on_one_piano(performance)
    if pedals == "unlisted":
        random = np.random.default_rng(int(rank_of(f"{soundfont.stem} {source.name}"), 16))
        onsets = np.array([note.start for note in piano.notes])
        piano.control_changes += [pretty_midi.ControlChange(SUSTAIN_PEDAL, value, max(0, seconds))
                                  for seconds, value in legato_pedal(onsets, performance.get_end_time(), random)]
    save_audio(audio, render_midi(performance, soundfont))
    return seconds_of(audio)


def performances_of(source: Path, out: Path, split: str | None) -> list[tuple[Path, Row]]:
    """What there is to render: MIDI files, and each one's row but for what the SoundFont decides.

    A data folder's performances keep their splits, `split` takes those of one; what several pianos play there from the
    same MIDI file, as in MAPS, is one performance. In a plain folder of MIDI files a piece, that is the folder a file lies
    in, or the file where it lies at the top, goes whole into one split, or all pieces into `split`.

    Raises:
        OSError, ValueError: there is none, or the table is broken.
    """
    if find_table(source):
        rows = [row for row in read_table(source) if split in (None, row["split"])]
        if not rows:
            raise ValueError(f"{source}: no recordings in the {split} split")
        paths = [source / row["midi_filename"] for row in rows]
        contents = [path.read_bytes() if path.is_file() else b"" for path in paths]  # a missing one is named when its turn comes
        return [(path, row) for number, (path, row) in enumerate(zip(paths, rows)) if not contents[number] or contents[number] not in contents[:number]]
    performances = []
    made = out.resolve() if source.resolve() in out.resolve().parents else None  # a folder in the source, whose renderings are no performances
    for path in sorted(path for path in source.glob("**/*") if path.suffix.lower() in (".mid", ".midi") and made not in path.resolve().parents):
        name = path.relative_to(source)
        piece = str(name.parent) if len(name.parts) > 1 else name.stem
        place = {0: "validation", 1: "test"}.get(int(rank_of(piece), 16) % HELD_OUT, "train")
        performances.append((path, {"canonical_composer": Path(piece).parts[0], "canonical_title": piece, "split": split or place, "midi_filename": str(name)}))
    if not performances:
        raise ValueError(f"{source}: holds no .mid or .midi files")
    return performances


def make_render(source: Path, out: Path, soundfonts: list[Path], split: str | None, deal: bool, pedals: str, workers: int) -> int:
    """Every MIDI performance of a folder, played on every SoundFont; or, dealt, on one of them in turn; `pedals` as for `render_file`."""
    if not has_fluidsynth():
        raise ValueError("libfluidsynth is missing: apt-get install fluidsynth")
    performances = performances_of(source, out, split)
    for soundfont in soundfonts:
        if not soundfont.is_file():
            raise OSError(f"{soundfont}: no such SoundFont")
    jobs = []
    for number, (path, row) in enumerate(performances):
        for soundfont in [soundfonts[number % len(soundfonts)]] if deal else soundfonts:
            target = Path(soundfont.stem) / row["midi_filename"]
            files = {"midi_filename": str(target.with_suffix(".midi")), "audio_filename": str(target.with_suffix(".flac"))}
            jobs.append((render_file, (path, soundfont, pedals), {**row, "year": soundfont.stem, **files}))
    return run_jobs(out, jobs, workers, {"pedals": pedals, **{soundfont.name: soundfont.stat().st_size for soundfont in soundfonts}})


# --- hold out ---

def hold_out(source: Path, out: Path, pianos: list[str]) -> int:
    """Two data folders of one: OUT/unseen, for validation on pianos that were not trained on, and OUT/rest with all others.

    A piano is what a table's audio names begin with, as in MAPS and after `render`. OUT/unseen has, as validation, what
    these pianos have in train and validation, but no piece that OUT/rest trains on. Test recordings stay in OUT/rest,
    whatever their piano. Both hold links to the source's files, or copies where there can be no links.

    Raises:
        OSError, ValueError: as read_table does; a file is missing; there is no such piano, or nothing of it is left; one of the two
            folders is there and holds other recordings.
    """
    rows = read_table(source)
    piano_of = {row["audio_filename"]: Path(row["audio_filename"]).parts[0] for row in rows if row["split"] in ("train", "validation")}
    for piano in pianos:
        if piano not in piano_of.values():
            raise ValueError(f"{source}: has no {piano} in train or validation, there are {', '.join(sorted(set(piano_of.values())))}")
    chosen = [row for row in rows if piano_of.get(row["audio_filename"]) in pianos]
    rest = [row for row in rows if piano_of.get(row["audio_filename"]) not in pianos]
    trained = {(row["canonical_composer"], row["canonical_title"]) for row in rest if row["split"] == "train"}
    unseen = [{**row, "split": "validation"} for row in chosen if (row["canonical_composer"], row["canonical_title"]) not in trained]
    if not trained or not unseen:
        raise ValueError(f"{source}: nothing is left to train on without {', '.join(pianos)}" if not trained else
                         f"{source}: all that {', '.join(pianos)} plays is also trained on with others, nothing is left to validate on")
    folders = {out / "rest": rest, out / "unseen": unseen}
    for folder in folders:
        if folder.resolve() == source.resolve():
            raise ValueError(f"{folder}: is the source itself, choose another folder")
        check_holds_only(folder, rows)
    for folder, some in folders.items():
        linked = []
        for row in some:
            audio = find_audio(source, row["audio_filename"])
            linked.append({**row, "audio_filename": str(audio.relative_to(source))})
            link_file(audio, folder / audio.relative_to(source))
            link_file(source / row["midi_filename"], folder / row["midi_filename"])
        write_json(folder / "data.json", linked)
        print(summary_of(folder, linked))
    print(f"left out: {len(chosen) - len(unseen)} recordings of {', '.join(pianos)} whose pieces {out / 'rest'} trains on")
    return 0


def link_file(source: Path, target: Path) -> None:
    """Make `target` a link to `source`, or a copy where the system has or allows no links. Raises OSError."""
    if not source.is_file():
        raise OSError(f"{source}: is named in the table and not on the disk")
    with written_whole(target) as temporary:
        try:
            temporary.symlink_to(source.resolve())
        except (OSError, NotImplementedError):
            shutil.copyfile(source, temporary)


# --- check ---

def faults_of(folder: Path, row: Row) -> list[str]:
    """What is wrong with one recording."""
    try:
        audio = load_audio(find_audio(folder, row["audio_filename"]))
        notes = read_midi(folder / row["midi_filename"])
    except (OSError, ValueError) as error:
        return [str(error)]
    seconds, faults = len(audio) / SAMPLE_RATE, []
    if row["split"] not in SPLITS:
        faults.append(f"its split {row['split']!r} is none of {', '.join(SPLITS)}")
    if abs(seconds - row["duration"]) > SLACK_SECONDS:
        faults.append(f"lasts {seconds:.1f} s, the table says {row['duration']:.1f} s")
    if not np.any(audio):
        faults.append("the audio is silent")
    if not len(notes):
        faults.append("the MIDI file has no notes")
    elif notes.intervals[-1, 0] > seconds + SLACK_SECONDS:
        faults.append(f"its last note begins at {notes.intervals[-1, 0]:.1f} s, the audio ends at {seconds:.1f} s")
    return [f"{row['audio_filename']}: {fault}" for fault in faults]


def check(folder: Path, workers: int) -> int:
    """Read every recording of a data folder and name the bad ones. Returns 1 if there are any."""
    rows = read_table(folder)
    with process_pool(workers) as pool:
        results = [pool.submit(faults_of, folder, row) for row in rows]
        faults = [result.result() for result in tqdm(results, str(folder), unit="recording", disable=None)]
    splits = defaultdict(set)
    for row in rows:
        splits[row["canonical_composer"], row["canonical_title"]].add(row["split"])
    crossing = [" / ".join(map(str, piece)) for piece, found in splits.items() if len(found) > 1]
    for line in [line for lines in faults for line in lines] + [f"{piece}: is in more than one split" for piece in crossing]:
        print(line)
    n_bad = sum(bool(lines) for lines in faults)
    print(f"{folder}: {len(rows)} recordings read, {n_bad} bad, {len(crossing)} pieces in more than one split")
    return 1 if n_bad or crossing else 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a data folder: audio at 16 kHz, MIDI files, and the data.json that names them.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, *paths: tuple[str, str], workers: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        for path, meaning in paths:
            sub.add_argument(path, type=Path, help=meaning)
        if workers:
            sub.add_argument("--num_workers", type=positive(int), default=os.cpu_count(), help="processes")
        return sub

    out = ("out", "the data folder to make")
    demo = command("demo", "a small set of generated pieces, rendered on the spot", out)
    demo.set_defaults(work=lambda args: make_demo(args.out, args.num_workers))
    maestro = command("maestro", "the course's subset of an official MAESTRO download", ("source", "the unpacked download"), out)
    for split, number in (("train", 100), ("validation", 20), ("test", 50)):
        maestro.add_argument(f"--{split}", type=positive(int), default=number, help=f"recordings of the {split} split")
    maestro.add_argument("--all", action="store_true", help="the whole set")
    maestro.set_defaults(work=lambda args: make_maestro(
        args.source, args.out, None if args.all else {split: getattr(args, split) for split in SPLITS}, args.num_workers))
    maps = command("maps", "the MAPS database, ENSTDkAm and ENSTDkCl as test", ("source", "the folder with the pianos' folders"), out)
    maps.set_defaults(work=lambda args: make_maps(args.source, args.out, args.num_workers))
    render = command("render", "MIDI performances, played on SoundFonts", ("source", "a folder of MIDI files, or a data folder"), out)
    render.add_argument("--soundfont", type=Path, nargs="+", default=[default_soundfont()], help="each plays everything")
    render.add_argument("--deal", action="store_true", help="each performance is played on one of the SoundFonts, in turn")
    render.add_argument("--pedals", choices=("own", "none", "unlisted"), default="own", help="those of the MIDI file; none, so that every note ends "
                        "with its key; or a made-up sustain pedal that is heard and not in the new MIDI file, as in MAPS")
    render.add_argument("--split", choices=SPLITS, help="put all into this split; of a data folder, take this split; "
                        "by default one piece in ten is validation, one test, and a data folder keeps its splits")
    render.set_defaults(work=lambda args: make_render(args.source, args.out, args.soundfont, args.split, args.deal, args.pedals, args.num_workers))
    hold = command("hold-out", "a data folder parted by piano: OUT/rest to train on, OUT/unseen to validate on pianos it has not heard",
                   ("source", "a data folder"), ("out", "the folder to make the two in"), workers=False)
    hold.add_argument("--piano", nargs="+", required=True, default=argparse.SUPPRESS, help="the pianos to hold out, by the folders of their audio files")
    hold.set_defaults(work=lambda args: hold_out(args.source, args.out, args.piano))
    command("check", "read everything and name what is bad", ("folder", "a data folder")).set_defaults(
        work=lambda args: check(args.folder, args.num_workers))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status_of("prepare.py", lambda: args.work(args), "the same command goes on", OSError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
