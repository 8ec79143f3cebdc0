"""How fast training, transcription and the rest are, beside a plain reference of the same model: `python tests/bench.py train`.

The reference (`reference.py`) is Onsets and Frames as a course would write it. Ours is `onf` as `train.py` and `transcribe.py` run
it: a model with some layers more, and augmented audio; `harmonic` is measured beside it. Each side has a process of its own and they take turns, so that
whatever else the machine does falls on both; a first round is not counted. The table shows medians, and smallest and largest in
brackets; the JSON file has every number. OMP_NUM_THREADS in the environment sets the threads of all. For Linux and macOS.
"""

import argparse
import contextlib
import json
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  # after the path
import reference  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from made_up import listen_for_music, mapped_recordings, probabilities, some_notes, some_recordings, write_recording  # noqa: E402
from measure import Numbers, Row, Work, format_table, in_stages, machine, peak_gb, run_process, take_turns  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import layers  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from audio import load_audio  # noqa: E402
from constants import HOP_SIZE, N_MELS  # noqa: E402
from dataset import COLUMNS, Recording, Segments, load_split  # noqa: E402
from devices import autocast, pick_device  # noqa: E402
from evaluate import estimated_notes, extract_notes, note_metrics  # noqa: E402
from files import write_json  # noqa: E402
from model import Sizes, build_model, load_ensemble, save_checkpoint  # noqa: E402
from notes import Notes, notes_to_rolls, write_midi  # noqa: E402
from spectrogram import shifted_filters  # noqa: E402

SIZES = Sizes()
RECORDING_SECONDS = 600  # what MAESTRO's recordings last on average
DATA_HOURS = (1, 200)    # the small and the big training set; MAESTRO has 200 h
DRAWN = 20               # batches drawn from these in a round
LOADED = (100, 30)       # how many recordings are loaded, and their seconds
LENGTHS = [3, 60]        # minutes of the recordings that transcribe.py gets
LABELLED = 60            # minutes of music that are cut into segments
DECODED = 60             # minutes of the rolls that are decoded
SCORED = 10              # minutes of music whose notes are scored
PROCESS_ROUNDS = 3       # how often whole processes of transcribe.py and torchrun run
RATE_SECONDS = 0.3       # how long a product is repeated to see the machine's rate
SCRIPTS = ("train.py", "evaluate.py", "transcribe.py", "prepare.py")


# --- training ---

def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training(batches: Iterator[dict[str, Tensor]], learn: Callable[[dict[str, Tensor]], Any], device: torch.device) -> Work:
    """The mean training step, and how much of it is cutting the batch."""
    steps = 1 if device.type == "cpu" else 10  # train.py too waits for a GPU every ten steps only

    def work() -> Numbers:
        start, cutting = time.perf_counter(), 0.0
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(batches)
            cutting += time.perf_counter() - before
            learn(batch)
        finish(device)
        return {"seconds": (time.perf_counter() - start) / steps, "batch": cutting / steps}
    return work


def our_training(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]], recipe_name: str = "default",
                 name: str = "onf") -> Work:
    """Training as train.py does it."""
    train.keep_pages(all_blocks=True)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    device, recipe = pick_device(args.device), model.RECIPES[recipe_name]
    net = build_model(name, SIZES, recipe).to(device).train()
    optimizer = train.adam(net, recipe.learning_rate)
    segments = Segments(make_recordings(), args.sequence_length, 0, recipe.onset_target)
    wrapped = train.joined(net, device)

    def learn(batch: dict[str, Tensor]) -> None:
        losses = train.training_step(wrapped, recipe, optimizer, batch, device)
        if device.type == "cpu":
            train.any_rank(not math.isfinite(sum(losses.values()).item()))
    return training(train.batches(segments, args.batch_size, 1, 10000, None, device), learn, device)


def augmentation(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]]) -> Work:
    """What augmentation does with a batch, and with the mel filters that hear it."""
    train.keep_pages(all_blocks=True)
    device, recipe = pick_device(args.device), model.RECIPES["default"]
    segments = Segments(make_recordings(), args.sequence_length, 0, recipe.onset_target)
    batch = next(train.batches(segments, args.batch_size, 1, 1, 0, device))

    def work() -> Numbers:
        shifted_filters(train.augmented(batch, recipe)["semitones"])
        finish(device)
        return {}
    return work


def reference_training(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]]) -> Work:
    torch.manual_seed(0)
    device = pick_device(args.device)
    net = reference.OnsetsAndFrames(*astuple(SIZES)).to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), reference.LEARNING_RATE)
    loader = torch.utils.data.DataLoader(reference.Recordings(make_recordings(), args.sequence_length), args.batch_size, shuffle=True)

    def learn(batch: dict[str, Tensor]) -> None:
        reference.training_step(net, optimizer, {name: value.to(device) for name, value in batch.items()})
    return training((batch for _ in range(10000) for batch in loader), learn, device)


def machine_rates(args: argparse.Namespace) -> Work:
    """GFLOP/s of a matrix product and of the second convolution's forward pass, in float32 and in what autocast makes of it."""
    device = pick_device(args.device)
    precisions = [torch.float32]
    with autocast(device):
        if torch.is_autocast_enabled(device.type):  # elsewhere products of bfloat16 are emulated, at a hundredth of the speed
            precisions.append(torch.get_autocast_dtype(device.type))
    side, batch, at_once = (8192, args.batch_size, 20) if device.type == "cuda" else (2048, 4, 1)  # a GPU is asked in advance

    @torch.inference_mode()
    def rate(flops: float, product: Callable[[Tensor], Tensor], x: Tensor) -> float:
        product(x)
        finish(device)
        start, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < RATE_SECONDS or not count:
            for _ in range(at_once):
                product(x)
            finish(device)
            count += at_once
        return flops * count / seconds / 1e9

    def work() -> Numbers:
        rates = {}
        for dtype in precisions:
            name = str(dtype).removeprefix("torch.")
            matrix = torch.randn(side, side, dtype=dtype, device=device)
            rates[f"matmul, {name}"] = rate(2 * side**3, lambda x: x @ x, matrix)
            conv = nn.Conv2d(48, 48, 3, padding=1).to(device, dtype).to(memory_format=torch.channels_last)
            mel = torch.randn(batch, 48, 200, N_MELS, dtype=dtype, device=device).to(memory_format=torch.channels_last)
            rates[f"convolution, {name}"] = rate(2 * 9 * 48 * mel.numel(), conv, mel)
        return rates
    return work


def forward_flops(net: nn.Module, n_frames: int = 8) -> float:
    """Multiplications and additions for a frame in the convolutions, linear layers and LSTMs of the reference."""
    flops = []

    def count(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(layer, nn.LSTM):
            flops.append(2 * n_frames * sum(p.numel() for name, p in layer.named_parameters() if name.startswith("weight")))
        else:
            flops.append(2 * output.numel() * layer.weight[0].numel())

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.LSTM)):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        net(torch.zeros(1, n_frames * HOP_SIZE))
    return sum(flops) / n_frames


def kernel_share(args: argparse.Namespace, make_recordings: Callable[[], list[Recording]]) -> Work:
    """On CUDA: how much of the time of our training steps convolution and matrix product kernels take."""
    steps = our_training(args, make_recordings)
    kernels = re.compile("conv(?!ert)|gemm|cutlass|xmma|nvjet|wgrad|dgrad|fprop", re.IGNORECASE)

    def work() -> Numbers:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            start = time.perf_counter()
            steps()
            seconds = time.perf_counter() - start
        return {"share": sum(event.self_device_time_total for event in profile.key_averages() if kernels.search(event.key)) / 1e6 / seconds}
    return work


def bench_train(args: argparse.Namespace) -> list[Row]:
    recordings = partial(some_recordings, args.batch_size, RECORDING_SECONDS)  # the reference takes one segment of each
    makers = {"reference": partial(reference_training, args, recordings), "ours": partial(our_training, args, recordings),
              "course": partial(our_training, args, recordings, "course"),
              "harmonic": partial(our_training, args, recordings, name="harmonic"), "machine": partial(machine_rates, args),
              "augmentation": partial(augmentation, args, recordings)}
    if pick_device(args.device).type == "cuda":
        makers["cuda"] = partial(kernel_share, args, recordings)
    found = take_turns(args.rounds, makers)
    base, ours, rates = found["reference"], found["ours"], found["machine"]
    # backwards each layer is multiplied twice more: for its input and for its weights
    gflop = 3 * forward_flops(reference.OnsetsAndFrames(*astuple(SIZES))) * args.batch_size * args.sequence_length / HOP_SIZE / 1e9
    bound = gflop / max(median(rates[name]) for name in rates if name.startswith("convolution"))
    rows = [Row(f"training step, {args.batch_size} x {args.sequence_length}", ours["seconds"], base["seconds"]),
            Row("- of it cutting the batch", ours["batch"], base["batch"]),
            Row("- of it augmentation", found["augmentation"]["seconds"],
                note=f"{median(found['augmentation']['seconds']) / median(ours['seconds']):.1%} of it"),
            Row("- with the recipe 'course'", found["course"]["seconds"], base["seconds"]),
            Row("- with the model 'harmonic'", found["harmonic"]["seconds"], base["seconds"]),
            Row("- arithmetic", *([gflop / s for s in side["seconds"]] for side in (ours, base)), unit="GFLOP/s",
                note=f"{gflop:.3g} GFLOP take {bound:.3g} s at the convolution's rate, {bound / median(ours['seconds']):.0%} of ours"),
            *(Row(f"- this machine's {name}", rates[name], unit="GFLOP/s") for name in rates if name != "seconds")]
    return rows + ([Row("- share in convolution and matmul kernels", found["cuda"]["share"], unit="")] if "cuda" in found else [])


# --- transcription ---

def our_transcription(args: argparse.Namespace, folder: Path, *checkpoints: Path) -> Work:
    train.keep_pages()
    net = load_ensemble(checkpoints, pick_device(args.device))
    return in_stages(reading=lambda _: load_audio(folder / "short.flac"),
                     inference=lambda audio: tuple(logit.numpy() for logit in net.infer(torch.from_numpy(audio))),
                     decoding=lambda logits: estimated_notes(logits, net.thresholds, net.recipe.onset_target),
                     writing=lambda notes: write_midi(folder / "ours.midi", notes) or notes)


def reference_transcription(args: argparse.Namespace, folder: Path) -> Work:
    torch.manual_seed(0)
    device = pick_device(args.device)
    net = reference.OnsetsAndFrames(*astuple(SIZES)).to(device).eval()

    @torch.no_grad()
    def logits_of(audio: Tensor) -> tuple[Tensor, ...]:
        return tuple(logit[0].cpu() for logit in net(audio[None].to(device)))

    listen_for_music(net, logits_of)
    return in_stages(reading=lambda _: reference.read_audio(folder / "short.flac"),
                     inference=lambda audio: [torch.sigmoid(logit).numpy() for logit in logits_of(torch.from_numpy(audio))],
                     decoding=lambda probs: reference.extract_notes(probs[1], probs[0]),
                     writing=lambda notes: reference.write_midi(folder / "reference.midi", notes) or notes)


def bench_transcribe(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, lengths = Path(name), [*LENGTHS, *([180] if args.long else [])]
        torch.manual_seed(0)
        net = build_model("onf", SIZES).eval()
        net.level.fill_(0.01)  # as if trained: recordings are brought to its level and colour
        listen_for_music(net, net.infer)
        save_checkpoint(folder / "ours.pt", net)
        write_recording(folder / "short.flac", 60 * args.minutes)
        found = take_turns(args.rounds, {"reference": partial(reference_transcription, args, folder),
                                         "ours": partial(our_transcription, args, folder, folder / "ours.pt"),
                                         "released": partial(our_transcription, args, folder, *model.RELEASED),
                                         "harmonic": partial(our_transcription, args, folder, model.RELEASED[0])})
        for minutes in lengths:
            write_recording(folder / f"{minutes}min.flac", 60 * minutes)
        runs = [[run_process("transcribe.py", str(folder / "ours.pt"), str(folder / f"{minutes}min.flac"), "--save_path", name,
                             "--device", args.device) for minutes in lengths] for _ in range(PROCESS_ROUNDS)]
    base, ours = found["reference"], found["ours"]

    def speed(minutes: float, seconds: list[float]) -> str:
        return f"{60 * minutes / median(seconds):.3g} x real time"

    rows = [Row(f"transcription, {args.minutes:g} min", ours["seconds"], base["seconds"], note=speed(args.minutes, ours["seconds"])),
            *(Row(f"- {part}", ours[part], base[part]) for part in ("reading", "inference", "decoding", "writing"))]
    rows[-1].note = f"{ours['notes'][0]} notes, {base['notes'][0]} notes"
    for what, side in (("the released checkpoints", "released"), (model.RELEASED[0].name, "harmonic")):
        rows.append(Row(f"- with {what}", found[side]["seconds"], base["seconds"], note=speed(args.minutes, found[side]["seconds"])))
    for minutes, pairs in zip(lengths, zip(*runs)):
        seconds, peaks = map(list, zip(*pairs))
        rows += [Row(f"transcribe.py, {minutes} min", seconds, note=speed(minutes, seconds)), Row("- peak memory", peaks, unit="GB")]
    return rows


# --- data ---

def our_loading(folder: Path) -> Work:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    stages = in_stages(first=lambda _: load_split(folder, "train"), second=lambda _: load_split(folder, "train"))

    def work() -> Numbers:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return stages()
    return work


def reference_loading(folder: Path) -> Work:
    return in_stages(loading=lambda _: reference.Recordings(reference.load_recordings(folder), 102400))


def labelled(args: argparse.Namespace) -> tuple[list[Recording], list[tuple[int, int]]]:
    """Recordings, and where all their segments begin, side by side."""
    recordings, n_frames = some_recordings(60 * LABELLED // RECORDING_SECONDS, RECORDING_SECONDS), args.sequence_length // HOP_SIZE
    return recordings, [(number, start) for number, recording in enumerate(recordings)
                        for start in range(0, recording.n_frames - n_frames + 1, n_frames)]


def our_labels(args: argparse.Namespace) -> Work:
    recordings, places = labelled(args)
    segments = Segments(recordings, args.sequence_length, 0, model.RECIPES["default"].onset_target)

    def labels(_: Any) -> None:
        for number, start in places:
            notes_to_rolls(recordings[number].notes, segments.n_frames, start, segments.onset_target)

    def cut(_: Any) -> None:
        for place in places:
            segments.cut(*place)
    return in_stages(labels=labels, segments=cut)


def reference_labels(args: argparse.Namespace) -> Work:
    recordings, places = labelled(args)

    def cut(name: str) -> None:  # with the rolls of the whole recordings, which have to be made first
        data = reference.Recordings(recordings, args.sequence_length)
        for place in places:
            getattr(data, name)(*place)
    return in_stages(labels=lambda _: cut("labels"), segments=lambda _: cut("cut"))


def drawing(args: argparse.Namespace, folder: Path, hours: float) -> Work:
    """Batches, training steps and the process's memory with so many hours of data."""
    recordings = mapped_recordings(folder, round(hours * 3600 / RECORDING_SECONDS), RECORDING_SECONDS)
    steps = our_training(args, lambda: recordings)
    batches = train.batches(Segments(recordings, args.sequence_length, 1), args.batch_size, 1, 10000, None, pick_device(args.device))

    def work() -> Numbers:
        start = time.perf_counter()
        for _ in range(DRAWN):
            next(batches)
        drawn = (time.perf_counter() - start) / DRAWN
        return {"drawn": drawn, "step": steps()["seconds"], "peak": peak_gb(resource.getrusage(resource.RUSAGE_SELF))}
    return work


def bench_data(args: argparse.Namespace) -> list[Row]:
    count, seconds = LOADED
    small, big = DATA_HOURS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            write_recording(folder / f"{number}.flac", seconds)
            write_midi(folder / f"{number}.midi", some_notes(seconds, number))
        write_json(folder / "data.json", [dict.fromkeys(COLUMNS, "") | {
            "split": "train", "duration": seconds, "midi_filename": f"{n}.midi", "audio_filename": f"{n}.flac"} for n in range(count)])
        loading = take_turns(args.rounds, {"reference": partial(reference_loading, folder), "ours": partial(our_loading, folder)})
        cutting = take_turns(args.rounds, {"reference": partial(reference_labels, args), "ours": partial(our_labels, args)})
        long = take_turns(args.rounds, {f"{hours} h": partial(drawing, args, folder, hours) for hours in DATA_HOURS})
    base, ours = long[f"{small} h"], long[f"{big} h"]
    rows = [Row(f"loading {count} x {seconds} s, {time} time", loading["ours"][time], loading["reference"]["loading"]) for time in ("first", "second")]
    rows += [Row(f"{part} of {LABELLED} min", cutting["ours"][part], cutting["reference"][part]) for part in ("labels", "segments")]
    rows[-1].note = "audio and labels"
    for what, key, unit in (("a batch", "drawn", "s"), ("a training step", "step", "s"), ("- peak memory", "peak", "GB")):
        rows.append(Row(f"{what} with {big} h of data", ours[key], base[key], f"with {small} h", unit))
    return rows


# --- decoding, start-up, several processes, accuracy ---

def decoding(minutes: float, decode: Callable[..., Notes]) -> Work:
    rolls = probabilities(minutes)
    return in_stages(decoding=lambda _: decode(*rolls))


def scoring(minutes: float, score: Callable[[Notes, Notes], Numbers]) -> Work:
    ref = some_notes(60 * minutes, 0)
    est = Notes(ref.intervals + np.random.default_rng(0).normal(0, 0.04, (len(ref), 1)), ref.pitches, ref.velocities)
    work = in_stages(scoring=lambda _: score(ref, est))
    return lambda: {**work(), "peak": peak_gb(resource.getrusage(resource.RUSAGE_SELF))}


def bench_decode(args: argparse.Namespace) -> list[Row]:
    decoders = {"reference": reference.extract_notes, "ours": extract_notes, "finer": partial(extract_notes, onset_target="two")}
    found = take_turns(args.rounds, {name: partial(decoding, DECODED, decode) for name, decode in decoders.items()})
    scored = take_turns(args.rounds, {"reference": partial(scoring, SCORED, reference.note_scores), "ours": partial(scoring, SCORED, note_metrics)})
    return [Row(f"decoding {DECODED} min", found["ours"]["decoding"], found["reference"]["decoding"], note=f"{found['ours']['notes'][0]} notes"),
            Row("- in between frames", found["finer"]["decoding"], found["reference"]["decoding"]),
            Row(f"scoring {SCORED} min", scored["ours"]["scoring"], scored["reference"]["scoring"]),
            Row("- peak memory", scored["ours"]["peak"], scored["reference"]["peak"], unit="GB")]


def bench_startup(args: argparse.Namespace) -> list[Row]:
    commands = [("-c", "import torch, torchaudio"), *((script, "--help") for script in SCRIPTS)]
    base, *others = zip(*[[run_process(*command)[0] for command in commands] for _ in range(args.rounds + 1)][1:])
    return [Row(f"{script} --help", list(ours), list(base), "import torch, torchaudio",
                note=f"{median(ours) - median(base):+.2f} s") for script, ours in zip(SCRIPTS, others)]


def share_of_training(args: argparse.Namespace) -> None:
    """What torchrun starts for `bench_scaling`: one of the processes that train together; the first writes its seconds."""
    alone = os.environ["WORLD_SIZE"] == "1"
    if not alone:
        dist.init_process_group("gloo")
    step = our_training(args, partial(some_recordings, 1, RECORDING_SECONDS))
    seconds = [step()["seconds"] for _ in range(args.rounds + 1)][1:]
    if os.environ["RANK"] == "0":
        write_json(args.json, seconds)
    if not alone:
        dist.barrier()  # no process leaves while another still talks to it
        dist.destroy_process_group()


def bench_scaling(args: argparse.Namespace) -> list[Row]:
    seconds = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for count in [1, 2] * PROCESS_ROUNDS:
            flags = {"rounds": args.rounds, "batch_size": args.batch_size, "sequence_length": args.sequence_length, "device": "cpu",
                     "json": f"{folder}/seconds.json"}
            run_process("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", __file__, "scaling",
                        *(f"--{name}={value}" for name, value in flags.items()), OMP_NUM_THREADS="1")
            seconds[count] += json.loads(Path(flags["json"]).read_text())
    efficiency = median(seconds[1]) / median(seconds[2]) / 2
    return [Row("training step, 2 processes of 1 thread", seconds[2], seconds[1], "1 process", note=f"efficiency {efficiency:.0%}")]


def training_run(args: argparse.Namespace, folder: Path, fast: bool) -> Work:
    """A run of train.py up to its last validation, as it is or in float32; gives the scores that training is judged by."""
    flags = {name: getattr(args, name) for name in ("iterations", "batch_size", "sequence_length", "device")}
    flags |= {"validation_interval": args.iterations, "logdir": folder / str(fast), "cnn_unit": SIZES.cnn_unit, "fc_unit": SIZES.fc_unit}

    def work() -> Numbers:
        scores, validate = {}, train.validate
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(train, "test", lambda *_: None))  # the test split stays unseen
            stack.enter_context(mock.patch.object(train, "validate", lambda *given: scores.update(validate(*given)) or scores))
            for module in () if fast else (train, model):
                stack.enter_context(mock.patch.object(module, "autocast", lambda device: contextlib.nullcontext()))
            for module, name in () if fast else ((model, "multiplies_bytes"), (layers, "keeps_bfloat16")):
                stack.enter_context(mock.patch.object(module, name, lambda device: False))
            if train.main(["--data", *args.data, *(f"--{name}={value}" for name, value in flags.items())]):
                raise OSError("train.py did not come to its end")
        return {name: scores[name] for name in train.CHOSEN_BY}
    return work


def bench_accuracy(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        found = take_turns(1, {name: partial(training_run, args, Path(folder), name == "ours") for name in ("ours", "float32")}, unmeasured=0)
    ours, base = found["ours"], found["float32"]
    return [Row(f"{args.iterations} steps of {args.batch_size} x {args.sequence_length}", ours["seconds"], base["seconds"], "float32"),
            *(Row(f"- validation {name.removeprefix('metric/')}", ours[name], base[name], "float32", unit="") for name in train.CHOSEN_BY)]


# --- the command ---

BENCHES = {"train": bench_train, "transcribe": bench_transcribe, "data": bench_data, "decode": bench_decode, "startup": bench_startup,
           "scaling": bench_scaling, "accuracy": bench_accuracy}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("which", nargs="?", choices=(*BENCHES, "all"), default="all", help="what to measure; all is all but accuracy, which takes long")
    add("--rounds", type=int, default=7, help="how often each side works")
    add("--batch_size", type=int, default=16, help="segments in a training step")
    add("--sequence_length", type=int, default=102400, help="samples in a segment")
    add("--minutes", type=float, default=3, help="transcribe: length of the recording that both sides transcribe")
    add("--long", action="store_true", help="transcribe: a recording of three hours too")
    add("--data", nargs="+", help="accuracy: data folders, see prepare.py")
    add("--iterations", type=int, default=1000, help="accuracy: training steps")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--json", type=Path, default=Path("bench.json"), help="where every number goes")
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch_size, args.minutes, args.iterations) <= 0 or args.sequence_length < HOP_SIZE:
        parser.error("a number is too small")
    if args.which == "accuracy" and not args.data:
        parser.error("accuracy needs --data")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        share_of_training(args)
        return 0
    report = {"machine": machine(), "arguments": {**vars(args), "json": str(args.json)}, "rows": []}
    rows = []
    try:
        write_json(args.json, report)  # what cannot be written is known before the long work
        for name in [name for name in BENCHES if name != "accuracy"] if args.which == "all" else [args.which]:
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            rows += BENCHES[name](args)
            write_json(args.json, report | {"rows": [asdict(row) | {"ratio": row.ratio()} for row in rows]})
    except (OSError, ValueError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
