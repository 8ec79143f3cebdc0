"""Recordings to notes: `python transcribe.py [ckpt.pt …] song.flac [more files or folders]`."""

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import has_fluidsynth, load_audio, render_midi, save_audio
from commands import Help, errors_of, exit_status_of
from constants import F_MAX, F_MIN, HOP_SIZE, MAX_MIDI, MIN_MIDI, SAMPLE_RATE
from devices import keep_pages, pick_device
from evaluate import estimated_notes, logit_to_prob
from files import written_whole
from model import RELEASED, Ensemble, LogMelSpectrogram, Transcriber, load_ensemble
from notes import Notes, notes_to_midi, write_midi

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64", ".rf64",
            ".mp2", ".m4a", ".m4b", ".mp4", ".mov", ".aac", ".wma", ".webm", ".mka", ".mkv")  # what is picked out of a folder; a named file may be called anything
MARK = "_transcribed"    # ends the stem of every file written here, which are not taken for recordings
PICTURE_SECONDS = 60     # how much of a recording its picture shows


def find_recordings(paths: list[Path]) -> list[tuple[Path, Path]]:
    """The recordings among files and folders, each with the path that its results are named by, relative to the output.

    Raises:
        ValueError: a folder holds no recordings, or two would write the same files.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
                            and not file.stem.endswith(MARK) and not file.name.startswith("."))  # hidden files: left by a killed run, or macOS's own
            if not inside:
                raise ValueError(f"{path}: holds no recordings ({', '.join(SUFFIXES)})")
            found += [(file, file.relative_to(path)) for file in inside]
        else:  # a missing one is for load_audio to report, beside the others' results
            found.append((path, Path(path.name)))
    stems = Counter(name.with_suffix("") for _, name in found)
    named = {}
    for path, name in found:
        alone = stems[name.with_suffix("")] == 1  # else song.mp3 and song.wav lie side by side
        target = name.with_name((name.stem if alone else name.name) + MARK)
        if target in named:
            raise ValueError(f"{path} and {named[target]} would both write {target}.midi; transcribe them into different folders")
        named[target] = path
    return [(path, target) for target, path in named.items()]


def draw(path: Path, audio: np.ndarray, notes: Notes, ref: Notes | None = None) -> None:
    """Draw a piano roll over the log-mel of a recording's first minute as PNG.

    Args:
        audio: (S,) float32.
        ref: notes to draw over them for comparison, as outlines.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure  # slow to import; Figure alone needs no screen
    audio = np.pad(audio[: PICTURE_SECONDS * SAMPLE_RATE], (0, max(0, HOP_SIZE - len(audio))))  # a frame at least
    seconds = len(audio) / SAMPLE_RATE
    log_mel = LogMelSpectrogram()(torch.from_numpy(audio)[None])[0].numpy()  # (T, M)
    figure = Figure(figsize=(max(10, 2 + seconds / 3), 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.imshow(log_mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, log_mel.shape[1]))
    top.set(ylabel=f"mel band, {F_MIN} to {F_MAX} Hz", title=f"log-mel, the first {seconds:.0f} s")
    bottom.set(xlabel="seconds", ylabel="MIDI pitch", xlim=(0, seconds), ylim=(MIN_MIDI - 1, MAX_MIDI + 1),
               title="notes heard" if ref is None else "notes heard (filled) and reference (outlined)")
    bottom.grid(axis="x", alpha=0.3)
    for some, style in ((notes, {"facecolors": "tab:blue", "edgecolors": "none"}),
                        (ref, {"facecolors": "none", "edgecolors": "black", "linewidths": 0.7})):
        if some is not None:
            shown = some.until(seconds)
            onset, offset = shown.intervals.T
            across, up = [onset, offset, offset, onset], [shown.pitches + side for side in (-0.4, -0.4, 0.4, 0.4)]
            bottom.add_collection(PolyCollection(np.stack([across, up]).T, **style))  # one by one took half of the time
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100)


def transcribe(model: Transcriber | Ensemble, audio: np.ndarray) -> tuple[Notes, np.ndarray, np.ndarray]:
    """Notes, and the onset and frame probabilities (T, 88) they were read from, of (S,) float32 audio; raises ValueError as `infer` does."""
    heard = tuple(part.numpy() for part in model.infer(torch.from_numpy(audio)))
    notes = estimated_notes(heard, model.thresholds, model.recipe.onset_target)
    frame, onset = (logit_to_prob(logit) for logit in heard[:2])
    return notes, onset, frame


def write_all(base: Path, audio: np.ndarray, notes: Notes, onset: np.ndarray, frame: np.ndarray, sound: bool) -> None:
    """Write `base` with .npz, .midi, .png and, if `sound`, .wav. Raises OSError."""
    def write_seen() -> None:
        with written_whole(base.with_name(base.name + ".npz")) as temporary:
            np.savez_compressed(temporary, onset=onset.astype(np.float16), frame=frame.astype(np.float16), intervals=notes.intervals,
                                pitches=notes.pitches, velocities=notes.velocities, hop_seconds=HOP_SIZE / SAMPLE_RATE)
        draw(base.with_name(base.name + ".png"), audio, notes)

    write_midi(base.with_name(base.name + ".midi"), notes)
    with ThreadPoolExecutor(1) as beside:  # beside FluidSynth, which takes longest and only one core
        seen = beside.submit(write_seen)
        if sound:
            save_audio(base.with_name(base.name + ".wav"), render_midi(notes_to_midi(notes)))
        seen.result()


def transcribe_file(model: Transcriber | Ensemble, path: Path, base: Path, sound: bool) -> int:
    """Read `path`, write all that is named after `base`, and say so in a line. Returns the exit status."""
    try:
        with errors_of(path):
            audio = load_audio(path)
            notes, onset, frame = transcribe(model, audio)
            write_all(base, audio, notes, onset, frame, sound)
    except (OSError, ValueError, MemoryError) as error:
        tqdm.write(f"transcribe.py: {error}", file=sys.stderr)
        return 1
    tqdm.write(f"{path}: {len(audio) / SAMPLE_RATE:.1f} s, {len(notes)} notes -> {base}.midi")
    return 0


def check_writable(folder: Path) -> None:
    """Raise OSError if no files can be written in a folder, or it cannot be made: better at once than after hours of work."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror})") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage="%(prog)s [options] [checkpoint.pt ...] audio [audio ...]", description="Transcribe piano recordings: NAME_transcribed.midi, .wav (the MIDI played), .png (piano "
                                     "roll) and .npz (probabilities and notes).", formatter_class=Help)
    parser.add_argument("paths", type=Path, nargs="+", metavar="audio",
                        help="recordings, or folders of them, of any length, rate and channel count; before them a model-*.pt of train.py, "
                        "or several, of which the mean is taken, in which one named twice counts twice; else these are "
                        f"{' '.join(path.name for path in RELEASED)}, which come with this project")
    parser.add_argument("--save_path", type=Path, default=Path("."), help="folder for the results; a folder's recordings keep their subfolders")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    named = list(itertools.takewhile(lambda path: path.suffix == ".pt", args.paths))
    args.checkpoints, args.audio = named or RELEASED, args.paths[len(named):]
    if not args.audio:
        parser.error("no recordings are named")
    return args


def run(args: argparse.Namespace) -> int:
    """Transcribe what the command line names. Returns the exit status; raises OSError and ValueError."""
    keep_pages()
    model = load_ensemble(args.checkpoints, pick_device(args.device))
    recordings = find_recordings(args.audio)
    check_writable(args.save_path)
    if not (sound := has_fluidsynth()):
        print("transcribe.py: libfluidsynth is missing (apt-get install fluidsynth), so no .wav is written", file=sys.stderr)
    status = 0
    for path, target in tqdm(recordings, "transcribing", unit="recording", disable=None):
        status |= transcribe_file(model, path, args.save_path / target, sound)
    return status


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_status_of("transcribe.py", lambda: run(args), "what is written is whole", OSError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
