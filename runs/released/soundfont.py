"""Make a SoundFont of the Salamander Grand Piano V3, for `prepare.py render`: `python runs/released/soundfont.py SAMPLES OUT.sf2`.

A Yamaha C5 under two microphones, sampled by Alexander Holm (CC BY 3.0). The samples, `A0v1.ogg` and so on, come with npm packages:

    for v in 1 3 5 7 9 11 13 16; do npm pack @audio-samples/piano-velocity$v@1.0.5; done
    for archive in *.tgz; do tar xf $archive; done      # into package/audio

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
SEMITONES = {"C": 0, "D#": 3, "F#": 6, "A": 9}
SECONDS = 15          # of a sample at most
LEAD = 0.004          # seconds of a sample before its sound has risen to a tenth of its peak
RELEASE = 0.5         # seconds until a damped string has fallen by 100 dB
UNDAMPED = (90, 8.0)  # the key from which a grand piano has no dampers, and those seconds there
SOFTER = 500          # cB, amount of the attenuation by velocity, where the specification has 960: the layers differ by 18 dB themselves
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


def soundfont_of(folder: Path) -> bytes:
    """A SoundFont with one piano, of the samples of LAYERS in a folder; raises ValueError where some are missing."""
    sounds, headers, generators, bags = [], [], [], []
    position = n_generators = 0
    matches = (re.fullmatch(rf"({'|'.join(SEMITONES)})(\d)v(\d+)", path.stem) for path in folder.glob("*.ogg"))
    notes = sorted({(match[1], int(match[2])) for match in matches if match})
    if not notes:
        raise ValueError(f"{folder}: holds no samples like A0v1.ogg")
    for (name, octave), layer in itertools.product(notes, LAYERS):
        key, path = 12 * (octave + 1) + SEMITONES[name], folder / f"{name}{octave}v{layer}.ogg"
        audio, rate = read_sample(path)
        release = UNDAMPED[1] if key >= UNDAMPED[0] else RELEASE
        zone = [struct.pack("<HBB", 43, key - 1, key + 1),                                # keyRange: a sample every third key
                struct.pack("<HBB", 44, *LAYERS[layer]),                                  # velRange
                struct.pack("<Hh", 38, round(1200 * math.log2(release))),                 # releaseVolEnv
                struct.pack("<HH", 53, len(headers))]                                     # sampleID, last
        bags.append(struct.pack("<HH", n_generators, len(bags)))                          # with one modulator each
        n_generators += len(zone)
        generators += zone
        end = position + len(audio)
        headers.append(struct.pack("<20sIIIIIBbHH", path.stem.encode(), position, end, position + 8, end - 8, rate, key, 0, 0, 1))
        sounds.append(np.pad(audio, (0, SILENCE)).tobytes())
        position = end + SILENCE
    louder = struct.pack("<HHhHH", 0x0502, 48, SOFTER, 0, 0)                              # note-on velocity to initialAttenuation
    presets = [struct.pack("<20sHHHIII", name, 0, 0, bag, 0, 0, 0) for name, bag in ((b"Salamander", 0), (b"EOP", 1))]
    instruments = [struct.pack("<20sH", name, bag) for name, bag in ((b"Salamander", 0), (b"EOI", len(bags)))]
    pdta = [chunk(b"phdr", *presets), chunk(b"pbag", struct.pack("<HHHH", 0, 0, 1, 0)), chunk(b"pmod", bytes(10)),
            chunk(b"pgen", struct.pack("<HHHH", 41, 0, 0, 0)),                            # instrument
            chunk(b"inst", *instruments), chunk(b"ibag", *bags, struct.pack("<HH", n_generators, len(bags))),
            chunk(b"imod", louder * len(bags), bytes(10)), chunk(b"igen", *generators, bytes(4)),
            chunk(b"shdr", *headers, struct.pack("<20s26x", b"EOS"))]
    info = [chunk(b"ifil", struct.pack("<HH", 2, 1)), chunk(b"isng", b"EMU8000\0"), chunk(b"INAM", b"Salamander\0\0"),
            chunk(b"ICOP", b"Salamander Grand Piano V3 by Alexander Holm, CC BY 3.0\0\0")]
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
