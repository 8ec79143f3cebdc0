"""How fast training, transcription and the rest are, beside a plain reference of the same model: `python tests/bench.py train`.

The reference (`reference.py`) is Onsets and Frames as a course would write it; ours is what `train.py` and `transcribe.py` run, the
default recipe, which has some layers more. Each side lives in a process of its own, and they take turns, so that what else the
machine does falls on both. A round before the first is not counted. The table has medians, and smallest and largest in
brackets; the JSON file has every number. OMP_NUM_THREADS in the environment sets the number of threads. For Linux and macOS.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  # after the path
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import model  # noqa: E402
import reference  # noqa: E402
import train  # noqa: E402
from audio import load_audio, save_audio  # noqa: E402
from constants import HOP_SIZE, N_MELS, SAMPLE_RATE  # noqa: E402
from dataset import Recording, Segments, audio_to_int16  # noqa: E402
from evaluate import estimated_notes, extract_notes  # noqa: E402
from files import write_json  # noqa: E402
from model import FRAME_RATE, ONSET_RATE, Sizes, build_model, load_checkpoint, pick_device, save_checkpoint  # noqa: E402
from notes import Notes, write_midi  # noqa: E402

NOTES_PER_HOUR = 35000   # MAESTRO v2: 7.13 M notes in 201.2 h
RECORDING_SECONDS = 600  # as long as MAESTRO's recordings are on average
TONES_SECONDS = 20       # the made-up sound repeats after so long
PEAK_SECONDS = 0.3       # how long each product is repeated to see the machine's rate

Numbers = dict[str, float]
Work = Callable[[], Numbers | None]


@dataclass
class Row:
    """A line of the table: `ours` against the `base`, in seconds unless the unit says otherwise."""

    what: str
    ours: list[float]
    base: list[float] | None = None
    base_name: str = "reference"
    unit: str = "s"
    note: str = ""


# --- taking turns ---

def serve(pipe: Any, make: Callable[[], Work]) -> None:
    """A worker process: work once for every message, and answer with what was measured."""
    work = make()
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        numbers = work()
        pipe.send({"seconds": time.perf_counter() - start, **(numbers or {})})


@contextlib.contextmanager
def worker(make: Callable[[], Work]) -> Any:
    """Start a process that makes its work; gives a function that has the work done once."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit our threads and our heap
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, make), daemon=True)
    process.start()
    theirs.close()  # so that a dead worker is the end of the pipe
    pipe.recv()

    def once() -> Numbers:
        pipe.send(True)
        return pipe.recv()

    try:
        yield once
    finally:
        process.terminate()
        process.join()


def take_turns(makers: dict[str, Callable[[], Work]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """What each maker's work measured in each round, by name; one works while the others wait."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(make)) for name, make in makers.items()}
        answers = [{name: once() for name, once in workers.items()} for _ in range(rounds + 1)][1:]
    return {name: {key: [answer[name][key] for answer in answers] for key in answers[0][name]} for name in makers}


# --- made-up music ---

@cache
def tones() -> np.ndarray:
    """(S,) float32: decaying tones on random keys, four a second."""
    random, seconds = np.random.default_rng(0), np.arange(TONES_SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    audio = np.zeros(len(seconds), dtype=np.float32)
    for onset in np.arange(0, TONES_SECONDS, 0.25):
        since = seconds[seconds >= onset] - onset
        hertz = 27.5 * 2 ** (random.integers(20, 70) / 12)
        audio[len(audio) - len(since) :] += (0.1 * np.exp(-3 * since) * np.sin(2 * np.pi * hertz * since)).astype(np.float32)
    return np.clip(audio, -1, 1)


def some_notes(seconds: float, seed: int) -> Notes:
    """As many notes as there are in music, on random keys."""
    random = np.random.default_rng(seed)
    count = round(NOTES_PER_HOUR * seconds / 3600)
    onsets = random.uniform(0, max(0.1, seconds - 2), count)
    intervals = np.stack([onsets, onsets + 0.05 + random.exponential(0.4, count).clip(max=1.9)], axis=1)
    return Notes(intervals, random.normal(64, 12, count).round().clip(21, 108), np.full(count, 80))


def some_recording(seconds: float, seed: int) -> Recording:
    audio = np.resize(audio_to_int16(tones()), round(seconds * SAMPLE_RATE))
    return Recording(f"{seed}", audio, some_notes(seconds, seed))


def write_recording(path: Path, minutes: float) -> None:
    seconds = 60 * minutes
    save_audio(path, (tones()[: round((seconds - start) * SAMPLE_RATE)] for start in range(0, int(np.ceil(seconds)), TONES_SECONDS)))


@torch.no_grad()
def listen_for_music(net: nn.Module, logits_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> nn.Module:
    """Shift an untrained model's output biases until it hears as much as there is in music: decoding needs its work."""
    audio = torch.from_numpy(tones())
    for head, layer, rate in ((1, net.onset_fc, ONSET_RATE), (0, net.combined_fc, FRAME_RATE)):  # onsets first, frames hear of them
        logit = logits_of(audio)[head]                                        # (T, K)
        layer.bias -= logit.float().cpu().quantile(1 - rate, dim=0).to(layer.bias.device)
    return net


# --- training ---

def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_training(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]], parallel: Any = nn.Identity()) -> Work:
    """A training step as train.py does it. All that this file knows of train.py's loop is here."""
    train.keep_pages()
    torch.manual_seed(0)
    device, recipe = pick_device(args.device), model.RECIPES["default"]
    net = build_model("onf", Sizes(args.cnn_unit, args.fc_unit), recipe).to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), recipe.learning_rate, fused=device.type in ("cpu", "cuda"))
    segments = Segments(make_recordings(), args.sequence_length, 0, recipe.gain_db)
    batches = train.batches(segments, args.batch_size, 1, 10000, 0, device)
    net_of_all = parallel(net)

    def step() -> Numbers:
        start = time.perf_counter()
        batch = next(batches)
        cut = time.perf_counter()
        loss = sum(train.losses_of(net_of_all, batch, device).values())
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        train.clip_gradients(net, recipe)
        optimizer.step()
        finish(device)
        return {"batch": cut - start}
    return step


def reference_training(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]]) -> Work:
    torch.manual_seed(0)
    device = pick_device(args.device)
    net = reference.OnsetsAndFrames(args.cnn_unit, args.fc_unit).to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), reference.LEARNING_RATE)
    data = reference.Recordings([(recording.audio, recording.notes) for recording in make_recordings()], args.sequence_length)
    loader = torch.utils.data.DataLoader(data, args.batch_size, shuffle=True)
    batches = (batch for _ in range(10000) for batch in loader)

    def step() -> Numbers:
        start = time.perf_counter()
        batch = {name: value.to(device) for name, value in next(batches).items()}
        cut = time.perf_counter()
        reference.training_step(net, optimizer, batch)
        finish(device)
        return {"batch": cut - start}
    return step


def machine_rate(args: argparse.Namespace) -> Work:
    """FLOP/s of a matrix product and of the second convolution's forward pass, in both precisions."""
    device = pick_device(args.device)
    side, batch = (8192, args.batch_size) if device.type == "cuda" else (2048, 4)

    def rate(flops: float, product: Callable[[], Any]) -> float:
        product()
        finish(device)
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < PEAK_SECONDS or not count:
            product()
            finish(device)
            count += 1
        return flops * count / seconds

    @torch.inference_mode()
    def work() -> Numbers:
        rates = {}
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.randn(side, side, dtype=dtype, device=device)
            x = torch.randn(batch, 48, 200, N_MELS, dtype=dtype, device=device).to(memory_format=torch.channels_last)
            conv = nn.Conv2d(48, 48, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
            name = str(dtype).removeprefix("torch.")
            rates[f"matmul {name}"] = rate(2 * side**3, lambda matrix=matrix: matrix @ matrix)
            rates[f"convolution {name}"] = rate(2 * x.numel() * 48 * 9, lambda conv=conv, x=x: conv(x))
        return rates
    return work


def forward_flops(net: nn.Module, n_frames: int = 8) -> float:
    """Multiplications and additions of one frame in the convolutions, linear layers and LSTMs of a plain model."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal total
        if isinstance(layer, nn.LSTM):
            total += 2 * n_frames * sum(weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight"))
        else:
            total += 2 * output.numel() * layer.weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, nn.LSTM))]
    with torch.inference_mode():
        net(torch.zeros(1, n_frames * HOP_SIZE))
    for hook in hooks:
        hook.remove()
    return total / n_frames


def kernel_share(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]]) -> Work:
    """On CUDA: the share of our training step that convolution and matrix product kernels take."""
    step = our_training(args, make_recordings)

    def work() -> Numbers:
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            start = time.perf_counter()
            for _ in range(5):
                step()
            seconds = time.perf_counter() - start
        busy = sum(event.self_device_time_total for event in profile.key_averages()
                   if re.search(r"conv(?!ert)|gemm|cutlass|xmma|nvjet|wgrad|dgrad|fprop", event.key, re.IGNORECASE))
        return {"share": busy / 1e6 / seconds}
    return work


def training_recordings(args: argparse.Namespace, count: int) -> list[Recording]:
    return [some_recording(RECORDING_SECONDS, seed) for seed in range(count)]


def bench_train(args: argparse.Namespace) -> list[Row]:
    recordings = partial(training_recordings, args, args.batch_size)  # the reference takes one segment from each
    makers = {"reference": partial(reference_training, args, recordings), "ours": partial(our_training, args, recordings),
              "machine": partial(machine_rate, args)}
    on_cuda = pick_device(args.device).type == "cuda"
    if on_cuda:
        makers["profile"] = partial(kernel_share, args, recordings)
    found = take_turns(makers, args.rounds)
    base, ours, rates = found["reference"], found["ours"], found["machine"]
    del rates["seconds"]
    flops = 3 * forward_flops(reference.OnsetsAndFrames(args.cnn_unit, args.fc_unit)) * args.batch_size * args.sequence_length // HOP_SIZE
    bound = flops / max(statistics.median(rate) for name, rate in rates.items() if name.startswith("convolution"))
    step = statistics.median(ours["seconds"])
    rows = [Row(f"training step, onf, {args.batch_size} x {args.sequence_length}", ours["seconds"], base["seconds"],
                note=f"{flops / 1e9:.0f} GFLOP; the convolution's rate allows {bound:.2f} s, so {bound / step:.0%} of it"),
            Row("of it, cutting the batch", ours["batch"], base["batch"]),
            Row("its arithmetic", [flops / s / 1e9 for s in ours["seconds"]], [flops / s / 1e9 for s in base["seconds"]], unit="GFLOP/s")]
    rows += [Row(f"rate of a {name}", [r / 1e9 for r in rate], unit="GFLOP/s") for name, rate in rates.items()]
    if on_cuda:
        rows.append(Row("share of the step in convolution and matmul kernels", found["profile"]["share"], unit=""))
    return rows


# --- transcription ---

def our_transcription(args: argparse.Namespace, folder: Path) -> Work:
    train.keep_pages()
    net = load_checkpoint(folder / "ours.pt", pick_device(args.device))

    def work() -> Numbers:
        times = [time.perf_counter()]
        audio = load_audio(folder / "short.flac")
        times.append(time.perf_counter())
        logits = tuple(logit.numpy() for logit in net.infer(torch.from_numpy(audio)))
        times.append(time.perf_counter())
        notes = estimated_notes(logits, net.thresholds)
        times.append(time.perf_counter())
        write_midi(folder / "ours.midi", notes)
        times.append(time.perf_counter())
        return {**dict(zip(PARTS, np.diff(times).tolist())), "notes": len(notes)}
    return work


def reference_transcription(args: argparse.Namespace, folder: Path) -> Work:
    torch.manual_seed(0)
    device = pick_device(args.device)
    net = reference.OnsetsAndFrames(args.cnn_unit, args.fc_unit).to(device).eval()
    listen_for_music(net, lambda audio: tuple(logit[0] for logit in net(audio[None].to(device))))

    @torch.no_grad()
    def work() -> Numbers:
        times = [time.perf_counter()]
        audio = reference.read_audio(folder / "short.flac")
        times.append(time.perf_counter())
        frame, onset = (torch.sigmoid(logit[0]).cpu().numpy() for logit in net(torch.from_numpy(audio)[None].to(device)))
        times.append(time.perf_counter())
        notes = reference.extract_notes(onset, frame)
        times.append(time.perf_counter())
        reference.write_midi(str(folder / "reference.midi"), notes)
        times.append(time.perf_counter())
        return {**dict(zip(PARTS, np.diff(times).tolist())), "notes": len(notes)}
    return work


PARTS = ("reading", "inference", "decoding", "MIDI writing")


def run_process(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a process. Its peak is at least ours, from which it starts, so ours stays small."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {error.decode(errors='replace')}")
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss is in bytes there, in KiB here
    return seconds, usage.ru_maxrss * unit / 1e9


def bench_transcribe(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recording(folder / "short.flac", args.minutes)
        torch.manual_seed(0)
        net = build_model("onf", Sizes(args.cnn_unit, args.fc_unit)).eval()
        save_checkpoint(folder / "ours.pt", listen_for_music(net, net.infer))
        found = take_turns({"reference": partial(reference_transcription, args, folder), "ours": partial(our_transcription, args, folder)},
                           args.rounds)
        base, ours = found["reference"], found["ours"]
        rows = [Row(f"transcription, {args.minutes:g} min", ours["seconds"], base["seconds"],
                    note=f"{60 * args.minutes / statistics.median(ours['seconds']):.0f} x real time; reference "
                         f"{60 * args.minutes / statistics.median(base['seconds']):.0f} x; notes {ours['notes'][0]} and {base['notes'][0]}"),
                *(Row(f"of it, {part}", ours[part], base[part]) for part in PARTS)]
        lengths = [*args.lengths, *([180] if args.long else [])]
        runs = {minutes: [] for minutes in lengths}
        for minutes in lengths:
            write_recording(folder / f"{minutes:g}.flac", minutes)
        for _ in range(args.processes):
            for minutes in lengths:
                runs[minutes].append(run_process(["transcribe.py", str(folder / "ours.pt"), str(folder / f"{minutes:g}.flac"),
                                                  "--save_path", name, "--device", args.device]))
        for minutes, pairs in runs.items():
            seconds, peaks = map(list, zip(*pairs))
            rows += [Row(f"python transcribe.py, {minutes:g} min", seconds, note=f"{60 * minutes / statistics.median(seconds):.0f} x real time"),
                     Row("its peak memory", peaks, unit="GB")]
    return rows


# --- decoding ---

@cache
def an_hour_of_probabilities(seconds: float = 3600) -> tuple[np.ndarray, np.ndarray]:
    """Onset and frame probabilities (T, 88) float32: differences of random walks, high as often as in music."""
    random, n_frames = np.random.default_rng(0), round(seconds * SAMPLE_RATE / HOP_SIZE)
    rolls = []
    for width, rate in ((2, ONSET_RATE), (30, FRAME_RATE)):
        walk = random.standard_normal((n_frames + width, 88)).cumsum(axis=0)
        level = walk[width:] - walk[:-width]
        rolls.append((1 / (1 + np.exp(np.quantile(level[:10000], 1 - rate) - level))).astype(np.float32))
    return tuple(rolls)


def decoding(args: argparse.Namespace, decode: Callable[..., Notes]) -> Work:
    onset, frame = an_hour_of_probabilities(60 * args.decode_minutes)
    return lambda: {"notes": len(decode(onset, frame))}


def bench_decode(args: argparse.Namespace) -> list[Row]:
    found = take_turns({"reference": partial(decoding, args, reference.extract_notes), "ours": partial(decoding, args, extract_notes)},
                       args.rounds)
    return [Row(f"decoding {args.decode_minutes:g} min", found["ours"]["seconds"], found["reference"]["seconds"],
                note=f"{found['ours']['notes'][0]} notes")]


# --- the command ---

def machine() -> dict[str, Any]:
    """What was measured on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "python": platform.python_version(),
            "torch": torch.__version__, "system": platform.platform(terse=True)}


def spread(values: list[float] | None, unit: str) -> str:
    if values is None:
        return ""
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} {unit} [{low} .. {high}]".replace("  ", " ")


def ratio(row: Row) -> float | None:
    """How many times faster ours is."""
    if not row.base:
        return None
    ours, base = statistics.median(row.ours), statistics.median(row.base)
    return base / ours if row.unit == "s" else ours / base


def format_table(rows: list[Row]) -> str:
    lines = [("what", "ours", "", "against", "ratio", "")]
    for row in rows:
        value = ratio(row)
        lines.append((row.what, spread(row.ours, row.unit), row.base_name if row.base else "", spread(row.base, row.unit),
                      f"{value:.2f}" if value else "", row.note))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


BENCHES = {"train": bench_train, "transcribe": bench_transcribe, "decode": bench_decode}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("which", nargs="?", choices=(*BENCHES, "all"), default="all", help="what to measure")
    add("--rounds", type=int, default=7, help="how often each side works")
    add("--batch_size", type=int, default=16, help="segments in a training step")
    add("--sequence_length", type=int, default=102400, help="samples in a segment")
    add("--cnn_unit", type=int, default=Sizes.cnn_unit, help="channels of the first convolutions")
    add("--fc_unit", type=int, default=Sizes.fc_unit, help="features of a frame after the convolutions")
    add("--minutes", type=float, default=3, help="length of the recording that both sides transcribe")
    add("--lengths", type=float, nargs="+", default=[3, 60], help="minutes of the recordings that transcribe.py gets as a process")
    add("--long", action="store_true", help="and one of 180 minutes")
    add("--processes", type=int, default=3, help="how often each whole process runs")
    add("--decode_minutes", type=float, default=60, help="length of the rolls to decode")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--json", type=Path, default=Path("bench.json"), help="where every number goes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    about, rows = machine(), []
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in BENCHES if args.which == "all" else [args.which]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += BENCHES[name](args)
        write_json(args.json, {"machine": about, "arguments": arguments, "rows": [{**asdict(row), "ratio": ratio(row)} for row in rows]})
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
