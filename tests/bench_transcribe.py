"""Time and peak memory of `transcribe.py` as recordings grow: `python tests/bench_transcribe.py ckpt.pt [--minutes 3 60]`.

Each length runs in a process of its own, from the file on disk to all results written.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  # after the path
import torch  # noqa: E402

from audio import save_audio  # noqa: E402
from constants import SAMPLE_RATE  # noqa: E402


def write_recording(path: Path, minutes: float) -> None:
    """Decaying tones on random keys, four a second, in blocks of ten seconds."""
    random = np.random.default_rng(0)
    seconds = np.arange(10 * SAMPLE_RATE) / SAMPLE_RATE

    def blocks():
        for _ in range(round(minutes * 6)):
            block = np.zeros(len(seconds), dtype=np.float32)
            for onset in np.arange(0, 10, 0.25):
                since = seconds[seconds >= onset] - onset
                hertz = 27.5 * 2 ** (random.integers(20, 70) / 12)
                block[len(block) - len(since) :] += (0.1 * np.exp(-3 * since) * np.sin(2 * np.pi * hertz * since)).astype(np.float32)
            yield np.clip(block, -1, 1)

    save_audio(path, blocks())


def measure(command: list[str], folder: str) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a process."""
    start, peak = time.perf_counter(), Path(folder) / "peak"
    subprocess.run([sys.executable, "-c", "import resource, subprocess, sys, json\n"
                    "subprocess.run(json.loads(sys.argv[1]), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
                    "open(sys.argv[2], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))",
                    json.dumps(command), str(peak)], check=True)
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB here
    return time.perf_counter() - start, int(peak.read_text()) * unit / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 60], help="lengths of the recordings")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'minutes':>8} {'wall s':>8} {'x real time':>12} {'peak GB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for minutes in args.minutes:
            audio = Path(folder) / f"{minutes:g}.flac"
            write_recording(audio, minutes)
            wall, peak = measure([sys.executable, str(ROOT / "transcribe.py"), str(args.checkpoint), str(audio), "--save_path", folder], folder)
            print(f"{minutes:8g} {wall:8.1f} {60 * minutes / wall:12.0f} {peak:8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
