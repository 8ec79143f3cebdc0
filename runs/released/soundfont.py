"""Make a SoundFont of a sampled piano, for `prepare.py render`: `python runs/released/soundfont.py SAMPLES OUT.sf2`.

Two pianos come as npm packages. The Salamander Grand Piano V3 is a Yamaha C5 under two microphones, every third key in layers of
loudness, sampled by Alexander Holm (CC BY 3.0); its samples are called `A0v1.ogg` and so on:

    for v in 1 3 5 7 9 11 13 16; do npm pack @audio-samples/piano-velocity$v@1.0.5; done
    for archive in *.tgz; do tar xf $archive; done      # into package/audio

The piano of tonejs-instruments (collected by Nicholaus P. Brosowsky, CC BY 3.0) has every key, `As1.wav` and so on, once; a filter
makes the softer notes of it duller:

    npm pack tonejs-instrument-piano-wav@1.1.0; tar xf tonejs-instrument-piano-wav-1.1.0.tgz      # into package

The format is that of the SoundFont 2.01 specification (E-mu Systems, 1998); its names stand beside the numbers.
"""

import argparse
import itertools
import math
import re
import struct
import sys
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from files import written_whole  # noqa: E402  # after the path

LAYERS = {1: (1, 28), 3: (29, 40), 5: (41, 48), 7: (49, 60), 9: (61, 76), 11: (77, 92), 13: (93, 112), 16: (113, 127)}  # velocities
ONE_LAYER = {0: (1, 127)}
SEMITONES = dict(C=0, D=2, E=4, F=5, G=7, A=9, B=11)
SECONDS = 15          # of a sample at most
LEAD = 0.004          # seconds of a sample before its sound has risen to a tenth of its peak
RELEASE = 0.5         # seconds until a damped string has fallen by 100 dB
UNDAMPED = (90, 8.0)  # the key from which a grand piano has no dampers, and those seconds there
SOFTER = 500          # cB, attenuation by velocity of layers, which differ by 18 dB themselves; a single one has the specification's 960
CUTOFF = 12000        # cents above 8.2 Hz, 8.4 kHz: where the filter for a single layer cuts off the loudest notes
DULLER = 3600         # cents that it lies lower for the softest
SILENCE = 46          # samples between two, as the specification wants


def chunk(name: bytes, *contents: bytes) -> bytes:
    """A RIFF chunk, padded to whole words."""
    content = b"".join(contents)
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def read_sample(path: Path) -> tuple[np.ndarray, int]:
    """(S,) int16, mono, and its sample rate; raises ValueError where the file is broken or shorter than a tenth of a second."""
    try:
        stereo, rate = soundfile.read(path, always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: cannot be read ({error.error_string.strip()})") from error
    if len(stereo) < rate // 10:
        raise ValueError(f"{path}: is shorter than a tenth of a second")
    audio = stereo.mean(axis=1)
    window = rate // 100
    level = np.convolve(audio**2, np.ones(window))[: len(audio)]                          # over the last 10 ms
    start = max(0, int(np.argmax(level > 0.01 * level.max())) - round(LEAD * rate))
    audio = audio[start : start + SECONDS * rate]
    for fade in (np.linspace(0, 1, rate // 1000), np.linspace(0, 1, rate // 10)):         # in and, turned round, out
        audio[: len(fade)] *= fade[: len(audio)]
        audio = audio[::-1]
    return np.round(audio.clip(-1, 1) * 32767).astype("<i2"), rate


def samples_in(folder: Path) -> dict[int, dict[int, Path]]:
    """The samples of each key, in order, by layer, those of LAYERS or of ONE_LAYER; raises ValueError where some are missing."""
    samples: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("*")):
        match = re.fullmatch(r"([A-G])([#s]?)(\d)(?:v(\d+)\.ogg|\.wav)", path.name)
        if match:
            name, sharp, octave, layer = match.groups()
            samples.setdefault(12 * (int(octave) + 1) + SEMITONES[name] + bool(sharp), {})[int(layer or 0)] = path
    if not samples:
        raise ValueError(f"{folder}: holds no samples like A0v1.ogg or A1.wav")
    layers = ONE_LAYER if all(0 in paths for paths in samples.values()) else LAYERS
    for paths in samples.values():
        if missing := layers.keys() - paths.keys():
            raise ValueError(f"{next(iter(paths.values()))}: there is no layer {min(missing)} beside it")
    return {key: {layer: paths[layer] for layer in layers} for key, paths in sorted(samples.items())}


def soundfont_of(folder: Path) -> bytes:
    """A SoundFont with one piano, of the samples in a folder; raises ValueError where some are missing."""
    sounds, headers, generators, bags = [], [], [], []
    position = n_generators = 0
    samples = samples_in(folder)
    single = all(paths.keys() == ONE_LAYER.keys() for paths in samples.values())
    lowest = [0, *((low + high) // 2 + 1 for low, high in itertools.pairwise(samples)), 128]  # of the keys that each sample plays
    for (key, paths), low, high in zip(samples.items(), lowest, lowest[1:]):
        for layer, path in paths.items():
            audio, rate = read_sample(path)
            release = UNDAMPED[1] if key >= UNDAMPED[0] else RELEASE
            zone = [struct.pack("<HBB", 43, low, high - 1),                               # keyRange
                    struct.pack("<HBB", 44, *(ONE_LAYER if single else LAYERS)[layer]),   # velRange
                    *[struct.pack("<Hh", 8, CUTOFF)] * single,                            # initialFilterFc
                    struct.pack("<Hh", 38, round(1200 * math.log2(release))),             # releaseVolEnv
                    struct.pack("<HH", 53, len(headers))]                                 # sampleID, last
            bags.append(struct.pack("<HH", n_generators, len(bags)))                      # with one modulator each
            n_generators += len(zone)
            generators += zone
            end = position + len(audio)
            headers.append(struct.pack("<20sIIIIIBbHH", path.stem.encode(), position, end, position + 8, end - 8, rate, key, 0, 0, 1))
            sounds.append(np.pad(audio, (0, SILENCE)).tobytes())
            position = end + SILENCE
    if single:
        by_velocity = struct.pack("<HHhHH", 0x0102, 8, -DULLER, 0, 0)                     # to initialFilterFc, linear
        name, notice = b"tonejs-instruments", b"tonejs-instruments by Nicholaus P. Brosowsky, CC BY 3.0"
    else:
        by_velocity = struct.pack("<HHhHH", 0x0502, 48, SOFTER, 0, 0)                     # to initialAttenuation, concave
        name, notice = b"Salamander", b"Salamander Grand Piano V3 by Alexander Holm, CC BY 3.0"
    presets = [struct.pack("<20sHHHIII", name, 0, 0, bag, 0, 0, 0) for name, bag in ((name, 0), (b"EOP", 1))]
    instruments = [struct.pack("<20sH", name, bag) for name, bag in ((name, 0), (b"EOI", len(bags)))]
    pdta = [chunk(b"phdr", *presets), chunk(b"pbag", struct.pack("<HHHH", 0, 0, 1, 0)), chunk(b"pmod", bytes(10)),
            chunk(b"pgen", struct.pack("<HHHH", 41, 0, 0, 0)),                            # instrument
            chunk(b"inst", *instruments), chunk(b"ibag", *bags, struct.pack("<HH", n_generators, len(bags))),
            chunk(b"imod", by_velocity * len(bags), bytes(10)), chunk(b"igen", *generators, bytes(4)),
            chunk(b"shdr", *headers, struct.pack("<20s26x", b"EOS"))]
    info = [chunk(b"ifil", struct.pack("<HH", 2, 1)), chunk(b"isng", b"EMU8000\0"),
            *(chunk(what, text + bytes(2 - len(text) % 2)) for what, text in ((b"INAM", name), (b"ICOP", notice)))]
    return chunk(b"RIFF", b"sfbk", chunk(b"LIST", b"INFO", *info), chunk(b"LIST", b"sdta", chunk(b"smpl", *sounds)),
                 chunk(b"LIST", b"pdta", *pdta))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder with the samples")
    parser.add_argument("out", type=Path, help="SoundFont to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        with written_whole(args.out) as temporary:
            temporary.write_bytes(soundfont_of(args.samples))
    except (OSError, ValueError) as error:
        print(f"soundfont.py: {error}", file=sys.stderr)
        return 1
    print(f"written: {args.out}, {args.out.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
