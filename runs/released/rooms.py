"""Play a data folder's recordings in rooms: `python runs/released/rooms.py DATA OUT --split validation`, after `pip install pyroomacoustics`.

Each recording is heard in a shoebox room of its own, by a microphone some metres from the piano, with a little noise. The rooms are those of
the image source method (Allen & Berkley, JASA 1979; Scheibler et al., ICASSP 2018), with a direct sound and single early reflections, so
they are unlike the ones that `augment.py` draws in training. As in a real recording, the sound comes as late as its way is long.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from scipy.signal import fftconvolve

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from audio import load_audio, save_audio  # noqa: E402  # after the path
from constants import SAMPLE_RATE  # noqa: E402
from dataset import SPLITS, find_audio, read_table  # noqa: E402
from files import written_whole  # noqa: E402
from prepare import run_jobs, seconds_of  # noqa: E402

SIDES = ((5, 14), (4, 10), (2.6, 6))  # metres: length, width, height
RT60 = (0.35, 1.3)        # seconds until the reverberation has fallen by 60 dB
SNR_DB = (25, 40)         # of added pink noise
PEAK = 0.3                # of the recording
ORDER = 25                # reflections that a sound has behind it at most
FILTER = 40               # samples by which pyroomacoustics delays everything


def impulse_response(random: np.random.Generator) -> np.ndarray:
    """(S,) of a room, a piano near one wall and a microphone 2 m or more from it."""
    import pyroomacoustics
    sides = np.array([random.uniform(*bounds) for bounds in SIDES])
    seconds = random.uniform(*RT60)
    while True:
        try:
            absorption, order = pyroomacoustics.inverse_sabine(seconds, sides)
            break
        except ValueError:  # so large a room cannot be so dry
            seconds *= 1.2
    room = pyroomacoustics.ShoeBox(sides, fs=SAMPLE_RATE, materials=pyroomacoustics.Material(absorption),
                                   max_order=min(order, ORDER), air_absorption=True)
    piano = np.array([random.uniform(1, 0.4 * sides[0]), random.uniform(1, sides[1] - 1), 1])
    microphone = np.array([min(piano[0] + random.uniform(2, 0.6 * sides[0]), sides[0] - 0.5),
                           np.clip(piano[1] + random.uniform(-2, 2), 0.5, sides[1] - 0.5), 1.6])
    room.add_source(piano)
    room.add_microphone(microphone)
    room.compute_rir()
    return room.rir[0][0][FILTER:]


def in_room(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(S,) float -> (S,) float, in a room and with pink noise."""
    heard = fftconvolve(audio, impulse_response(random))[: len(audio)]
    heard *= PEAK / max(abs(heard).max(), 1e-9)
    hertz = np.fft.rfftfreq(len(heard), 1 / SAMPLE_RATE).clip(min=20)
    noise = np.fft.irfft(np.fft.rfft(random.standard_normal(len(heard))) / np.sqrt(hertz), len(heard))
    return heard + noise * np.sqrt(np.mean(heard**2) / np.mean(noise**2)) * 10 ** (-random.uniform(*SNR_DB) / 20)


def play_in_room(audio: Path, midi: Path, source_audio: Path, source_midi: Path, number: int) -> float:
    """Make a recording in room `number`, as `run_jobs` wants it made; returns its seconds."""
    save_audio(audio, [in_room(load_audio(source_audio), np.random.default_rng(number))])
    with written_whole(midi) as temporary:
        shutil.copyfile(source_midi, temporary)
    return seconds_of(audio)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("out", type=Path, help="data folder to write")
    parser.add_argument("--split", choices=SPLITS, help="only this one's recordings")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        import pyroomacoustics  # noqa: F401  # before any recording is begun
        jobs = []
        for number, row in enumerate(row for row in read_table(args.data) if args.split in (None, row["split"])):
            files = {"audio_filename": str(Path(row["audio_filename"]).with_suffix(".flac"))}
            sources = find_audio(args.data, row["audio_filename"]), args.data / row["midi_filename"]
            jobs.append((play_in_room, (*sources, number), {**row, **files}))
        if not jobs:
            raise ValueError(f"{args.data}: no recordings in the {args.split} split")
        return run_jobs(args.out, jobs, os.cpu_count() or 1)
    except (ImportError, OSError, ValueError) as error:
        print(f"rooms.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
