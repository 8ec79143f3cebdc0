"""Sound: any audio file to mono at 16 kHz, and MIDI to sound through FluidSynth."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pretty_midi
import soundfile
import soxr

from constants import SAMPLE_RATE
from files import written_whole

BLOCK = 1 << 18        # samples read or written at a time; keeps memory flat, and libsndfile crashes on one long OGG write
RENDER_RATE = 48000    # FluidSynth acts on events every 64 samples: 1.3 ms here, 4 ms at 16 kHz
HEADER_SLIP = 1024     # bytes by which a whole file's header may promise too much: some programs count their own chunks in
NO_SIZES = (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)  # bytes; a size near one of these means "not known": programs that write to a pipe put it in the header
NO_LENGTH = 1 << 50    # or more than this, in bytes or samples, where a header has room for it
INT16 = 32768.0        # int16 samples in a full scale
TAIL_SECONDS = 2.0     # what rings on after the last note of rendered MIDI


class Endless(io.FileIO):
    """A file that does not tell its size, from which libsndfile would guess an MP3's length, and read no farther."""

    far = False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.far = whence == os.SEEK_END
        return super().seek(offset, whence)

    def tell(self) -> int:
        return 1 << 60 if self.far else super().tell()


def open_sound(path: Path, *how: object) -> soundfile.SoundFile:
    """soundfile.SoundFile of a path of any bytes, for names from old archives are not always UTF-8."""
    return soundfile.SoundFile(path if os.name == "nt" else os.fsencode(path), *how)


def tells_length(path: Path) -> bool:
    """Whether the first frame of an MP3 says how many there are: a Xing, Info or VBRI header, which streams and what is cut from files lack."""
    with open(path, "rb") as file:
        head = file.read(10)
        tag = sum(size << 7 * (9 - i) for i, size in enumerate(head) if i >= 6) if head[:3] == b"ID3" else -10  # bytes after these ten, in sevens of bits
        file.seek(10 + tag)
        frame = file.read(2048)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def read_blocks(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of (S, channels) float32 and their sample rate, through libsndfile or, where that knows no way, ffmpeg."""
    with open(path, "rb") as file:  # a missing or forbidden file gets Python's own words, not libsndfile's
        if not file.read(1):
            raise ValueError(f"{path}: is empty")
    with contextlib.ExitStack() as opened:
        source, reason = None, "it does not tell its length"
        try:
            source = opened.enter_context(open_sound(path))
            if source.format == "MP3" and not tells_length(path):
                source = opened.enter_context(soundfile.SoundFile(opened.enter_context(Endless(path))))
        except (soundfile.LibsndfileError, TypeError) as error:  # the latter of a name in .raw, whose rate soundfile would have to be told
            reason = getattr(error, "error_string", str(error)).strip(" .")
        if source is None or (source.format == "FLAC" and source.frames > NO_LENGTH):  # which libsndfile opens and cannot read
            if not (ffmpeg := shutil.which("ffmpeg")):
                raise ValueError(f"{path}: holds no audio that libsndfile reads ({reason}), and ffmpeg, which reads M4A and more, is not installed")
            yield from ffmpeg_blocks(ffmpeg, path)
            return
        if is_cut_off(path, source):
            raise ValueError(f"{path}: is truncated, it is shorter than its header says")
        n_read = 0
        while len(block := source.read(BLOCK, dtype="float32", always_2d=True)):
            n_read += len(block)
            yield block, source.samplerate
        if n_read < source.frames < NO_LENGTH:
            raise ValueError(f"{path}: is truncated, {n_read} of {source.frames} samples can be read")


def is_cut_off(path: Path, source: soundfile.SoundFile) -> bool:
    """Whether a file ends too early, in the formats whose missing end libsndfile does not report: OGG, WAV and their like."""
    if source.format == "OGG":  # RFC 3533: the last page carries flag 4, end of stream, and is whole
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536 - 282))  # no page is longer
            tail = file.read()
        if (page := tail.rfind(b"OggS\0")) < 0 or len(tail) < page + 27:
            return True
        body = page + 27 + tail[page + 26]
        return not tail[page + 5] & 4 or body + sum(tail[page + 27 : body]) > len(tail)
    promise = re.search(r"^ *(?:data|SSND|riff|Riff size|Data Size) *: (\d+) \(should be (\d+)\)", source.extra_info, re.MULTILINE)  # WAV, AIFF, W64, RF64, AU
    if not promise or int(promise[1]) > NO_LENGTH or any(abs(int(promise[1]) - size) < HEADER_SLIP for size in NO_SIZES):
        return False
    return int(promise[1]) - int(promise[2]) > HEADER_SLIP


def ffmpeg_blocks(ffmpeg: str, path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """The same through ffmpeg, which brings it to mono at 16 kHz by itself."""
    command = [ffmpeg, "-v", "error", "-nostdin", "-xerror", "-i", f"file:{path}", "-vn",
               "-af", "aresample=rematrix_maxval=1.0", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "-"]
    with tempfile.TemporaryFile() as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        while data := process.stdout.read(BLOCK * 4):
            yield np.frombuffer(data, dtype="<f4")[:, None], SAMPLE_RATE
        process.wait()
        errors.seek(0)
        message = errors.read().decode(errors="replace").strip()
    if process.returncode:
        raise ValueError(f"{path}: holds no audio that libsndfile or ffmpeg reads, or is truncated ({(message or 'ffmpeg failed').splitlines()[-1]})")


def audio_to_int16(audio: np.ndarray) -> np.ndarray:
    """(S,) float in [-1, 1] -> (S,) int16."""
    return np.clip(np.round(audio * INT16), -INT16, INT16 - 1).astype(np.int16)


def load_audio(path: str | Path) -> np.ndarray:
    """Read an audio file of any rate, length and channel count.

    Memory grows with the result alone: blocks are mixed down and resampled as they are read. It is rounded to 16 bits, like all that
    models are trained and evaluated on: what lies below differs between file formats, and models hear it. A recording that goes
    beyond full scale, as files of floats may, is made softer as a whole.

    Returns:
        (S,) float32 in [-1, 1] at SAMPLE_RATE, the mean of the channels.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds no audio, is broken or truncated, or holds NaN or infinity.
    """
    path = Path(path)
    sound, resampler = io.BytesIO(), None  # which grows in place: joined from pieces, a recording would be in memory twice
    try:
        for block, rate in read_blocks(path):
            mono = block.mean(axis=1)
            if not np.isfinite(mono).all():
                raise ValueError(f"{path}: holds samples that are not numbers (NaN or infinity)")
            if rate != SAMPLE_RATE:
                resampler = resampler or soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
                mono = resampler.resample_chunk(mono)
            sound.write(mono)
        if resampler:
            sound.write(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: is broken ({error.error_string.strip()})") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror or error})") from error
    audio = np.frombuffer(sound.getbuffer(), np.float32)
    if not len(audio):
        raise ValueError(f"{path}: holds no samples")
    full_scale = max(1.0, float(audio.max()), float(-audio.min()))
    for block in np.split(audio, range(BLOCK, len(audio), BLOCK)):  # in place, for a recording may be long
        block[:] = audio_to_int16(block / full_scale) / np.float32(INT16)
    return audio


def save_audio(path: str | Path, blocks: Iterable[np.ndarray]) -> None:
    """Write blocks of (S,) float in [-1, 1] at SAMPLE_RATE as one 16-bit mono file; the format follows the suffix.

    Raises:
        OSError: the file cannot be written.
    """
    with written_whole(path) as temporary:
        try:
            with open_sound(temporary, "w", SAMPLE_RATE, 1) as file:
                for block in blocks:
                    for start in range(0, len(block), BLOCK):
                        file.write(block[start : start + BLOCK])
        except soundfile.LibsndfileError as error:
            raise OSError(f"{error.error_string.strip()} Is the disk full or the folder read-only?") from error


def default_soundfont() -> Path:
    """TimGM6mb, the small General MIDI SoundFont that pretty_midi carries."""
    return Path(pretty_midi.__file__).with_name("TimGM6mb.sf2")


def has_fluidsynth() -> bool:
    """Whether the system library behind pyfluidsynth is installed."""
    try:
        import fluidsynth  # noqa: F401  # raises where libfluidsynth is missing
    except (ImportError, OSError, AttributeError):
        return False
    return True


def render_midi(midi: pretty_midi.PrettyMIDI, soundfont: str | Path | None = None) -> Iterator[np.ndarray]:
    """Play a MIDI performance, its pedal included, on a SoundFont's first piano.

    Yields:
        Blocks of (S,) float32 in [-1, 1] at SAMPLE_RATE.

    Raises:
        ValueError: the SoundFont cannot be read, or has no piano.
        ImportError: libfluidsynth is missing.
    """
    import fluidsynth  # needs a system library, which only sound needs
    soundfont = soundfont or default_soundfont()
    try:
        with open(soundfont, "rb") as file:  # looked at first, because FluidSynth complains in its own lines
            head = file.read(12)
    except OSError as error:  # no OSError, which would be taken for one of the file that this sound is written to
        raise ValueError(f"{soundfont}: cannot be read ({error.strerror})") from error
    if head[:4] != b"RIFF" or head[8:] != b"sfbk":
        raise ValueError(f"{soundfont}: is not a SoundFont")
    # without the last setting every sample of a SoundFont is read, 490 MB for one piano of MuseScore's
    synth = fluidsynth.Synth(gain=0.5, samplerate=float(RENDER_RATE), **{"synth.dynamic-sample-loading": 1})
    try:
        font = synth.sfload(str(soundfont))
        if font == -1:
            raise ValueError(f"{soundfont}: is not a SoundFont that FluidSynth reads")
        if synth.program_select(0, font, 0, 0) == -1:
            raise ValueError(f"{soundfont}: has no piano, which is program 0 of bank 0")
        events = []  # (seconds, order within a moment, what to do): the pedal, which catches keys that come up at its moment; keys up before others go down
        for instrument in midi.instruments:
            if not instrument.is_drum:
                for note in instrument.notes:
                    events.append((note.start, 2, synth.noteon, (0, note.pitch, note.velocity)))
                    events.append((note.end, 1, synth.noteoff, (0, note.pitch)))
                for change in instrument.control_changes:
                    events.append((change.time, 0, synth.cc, (0, change.number, change.value)))
        events.sort(key=lambda event: event[:2])
        events.append((midi.get_end_time() + TAIL_SECONDS, 3, None, ()))
        resampler = soxr.ResampleStream(RENDER_RATE, SAMPLE_RATE, 1, dtype="float32")
        position = 0
        for seconds, _, act, arguments in events:
            until = round(seconds * RENDER_RATE)
            while position < until:
                n_samples = min(until - position, BLOCK)
                stereo = np.asarray(synth.get_samples(n_samples), dtype=np.float32).reshape(-1, 2)
                position += n_samples
                yield np.clip(resampler.resample_chunk((stereo[:, 0] + stereo[:, 1]) / 65536), -1, 1)
            if act:
                act(*arguments)
        yield np.clip(resampler.resample_chunk(np.zeros(0, np.float32), last=True), -1, 1)
    finally:
        synth.delete()
