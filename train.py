"""Train a transcriber: `python train.py --model onf`. On several GPUs or hosts: `torchrun --nproc_per_node N train.py …`."""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import math
import multiprocessing.util
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import prepare
from augment import augment, transposed, uniform
from commands import Help, exit_status_of, positive
from constants import HOP_SIZE, SAMPLE_RATE
from dataset import Recording, Segments, find_table, load_split
from devices import autocast, keep_pages, pick_device, rank_and_world
from evaluate import evaluate_split, fit_velocity, format_table, predict, score, summarise, tune_thresholds, write_results
from files import write_json, written_whole
from layers import mean_over_ranks
from model import (
    MODELS,
    Sizes,
    Transcriber,
    build_model,
    load_checkpoint,
    model_of,
    n_parameters,
    read_checkpoint,
    save_checkpoint,
)
from notes import write_midi
from recipe import RECIPES, Recipe, parse_recipe
from spectrogram import tuning_of

MAX_NORM = 3.0           # of the gradient; Hawthorne et al. 2018
WARM_UP = 100            # steps until the learning rate is at its peak; of a short run a tenth
GPU_WORKERS = 4          # processes at most that cut segments for a GPU
VALIDATION_SECONDS = 60  # of each validation recording, so that a whole MAESTRO does not stall training
VELOCITY_RECORDINGS = 64  # at most of the training recordings that velocities are learnt from, for the same reason
REPORTED = ("metric/loss/frame_loss", "metric/loss/onset_loss", "metric/frame/frame_f1", "metric/frame/onset_f1",
            "metric/note/f1", "metric/note-with-offsets/f1")
CHOSEN_BY = ("metric/note/f1", "metric/note-with-offsets/f1")  # their mean: offsets still improve where notes alone only vary
DEBUG = {"iterations": 150, "batch_size": 8, "sequence_length": 51200, "validation_interval": 50, "learning_rate": 2e-3}
DEBUG_RECORDINGS = 10
# flags that a resumed run cannot change
FIXED = ("model", "recipe", "sequence_length", "batch_size", "learning_rate", "weight_decay", "cnn_unit", "fc_unit", "seed")


def learning_rate_factor(recipe: Recipe, iterations: int, step: int) -> float:
    """What the learning rate is multiplied by in step 0, 1, …: warm-up and cosine, or the course's x 0.98 per 1000 steps."""
    if not recipe.cosine:
        return 0.98 ** (step // 1000)
    warm_up = min(WARM_UP, iterations // 10 + 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, iterations - warm_up)))


def joined(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over all processes; itself where there is only one."""
    if rank_and_world()[1] == 1:
        return model
    # buffers need no broadcast: batch norm and the level see the joint batch in every rank, and the mel filters do not change
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None, broadcast_buffers=False)


def batches(segments: Segments, batch_size: int, first: int, last: int, workers: int | None, device: torch.device) -> Iterator[dict]:
    """The batches of steps first to last on `device`, what Segments cuts with B in front; each rank gets its share of each, and all shares make the batch of one process."""
    if workers is None:  # a GPU would wait for segments; on a CPU other processes are in the way, and spawned ones copy all recordings
        forks = torch.multiprocessing.get_start_method() == "fork"
        workers = min(GPU_WORKERS, os.cpu_count() or 1) if device.type == "cuda" and forks else 0
    if workers:
        multiprocessing.util.Finalize(None, end_workers, exitpriority=0)  # as atexit, but before multiprocessing waits for them
    rank, world = rank_and_world()
    share = batch_size // world
    numbers = (range((step - 1) * batch_size + rank * share, (step - 1) * batch_size + (rank + 1) * share)
               for step in range(first, last + 1))
    loader = torch.utils.data.DataLoader(segments, batch_sampler=numbers, num_workers=workers, pin_memory=device.type == "cuda",
                                         worker_init_fn=leave_signals)
    for batch in loader:
        # other devices than CUDA may still copy from memory that is not pinned when it has been freed
        yield {name: value.to(device, non_blocking=device.type == "cuda") if name != "recording" else value for name, value in batch.items()}


def end_workers() -> None:
    """Kill what cuts segments: at its end Python asks them by SIGTERM, which they leave alone, and waits."""
    for worker in torch.multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def leave_signals(_: int) -> None:
    """A worker leaves Ctrl-C and SIGTERM, which a whole group of processes may get, to the main one, which stops it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def augmented(batch: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The batch as another piano in another room might have played it; `semitones` (B,) says how much sharper it is to be heard.

    What is transposed or detuned is heard in tune otherwise, as inference hears recordings.
    """
    audio, device = batch["audio"], batch["audio"].device
    batch = {**batch, "audio": augment(audio, recipe.gain_db, recipe.equalise_db, recipe.room, recipe.noise)}
    if recipe.transpose or recipe.detune:
        keys = torch.randint(-recipe.transpose, recipe.transpose + 1, (len(audio),), device=device)
        batch["semitones"] = keys - tuning_of(audio) + uniform(-recipe.detune, recipe.detune, len(audio), device=device)
        if recipe.transpose:
            batch |= {name: transposed(batch[name], keys) for name in ("onset", "frame")}
    return batch


def frame_weights(frame: Tensor, offset_weight: float) -> Tensor:
    """(B, T, K): `offset_weight` for the last two frames of a note and the four after it, elsewhere 1.

    A frame roll is nearly right with every note a few frames too long, and its offsets are then all wrong. Where the same key is
    struck at once or the segment is over, nothing tells of an end.
    """
    ends = nn.functional.pad((frame[:, :-1] - frame[:, 1:]).clamp(min=0), (0, 0, 1, 0))  # first silent frames
    near = nn.functional.max_pool1d(nn.functional.pad(ends.transpose(1, 2), (3, 2)), 6, 1).transpose(1, 2)
    return 1 + (offset_weight - 1) * near


def losses_of(model: nn.Module, recipe: Recipe, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Binary cross entropy of each head against its own roll, that of frames weighted, and zero where a segment's offsets do not count.

    Args:
        batch: audio (B, S), onset and frame rolls (B, T, K), has_offsets (B,), and semitones (B,) where it was augmented.
    """
    with autocast(device):
        frame_logit, onset_logit = model(batch["audio"], batch.get("semitones"))           # (B, T, K) each
    bce = nn.functional.binary_cross_entropy_with_logits
    weights = batch["has_offsets"][:, None, None] * frame_weights(batch["frame"], recipe.offset_weight)  # (B, T, K)
    return {"frame_loss": bce(frame_logit.float(), batch["frame"], weights), "onset_loss": bce(onset_logit.float(), batch["onset"])}


def clip_gradients(model: nn.Module, recipe: Recipe) -> None:
    for group in [list(model.parameters())] if recipe.clip_jointly else [[p] for p in model.parameters()]:
        clip_grad_norm_(group, MAX_NORM)


def adam(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam (Kingma & Ba, ICLR 2015) in one kernel. The gradients are there from the beginning and stay: made anew in every step,
    in between the activations, they split the heap so that it grew by a quarter of a GB."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.Adam(model.parameters(), learning_rate, weight_decay=weight_decay, fused=fused)


def training_step(model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor],
                  device: torch.device) -> dict[str, Tensor]:
    """Learn from one batch; gives its losses."""
    losses = losses_of(model, recipe, augmented(batch, recipe), device)
    optimizer.zero_grad(set_to_none=False)
    sum(losses.values()).backward()
    clip_gradients(model, recipe)
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is up in any rank, so that all leave the loop together."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    return (mean_over_ranks(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()


def begin_with(model: Transcriber, path: Path) -> tuple[list[str], list[str]]:
    """Load the weights of a checkpoint into those of the model that have the same name and shape.

    Returns:
        The layers that stay as they are, in whole or in part, and those of the checkpoint for which there is no place.

    Raises:
        OSError, ValueError: the checkpoint cannot be read, or holds another kind of model.
    """
    state, own = read_checkpoint(path), model.state_dict()
    if MODELS[state["model"]] is not type(model):
        raise ValueError(f"{path}: holds a {state['model']!r} model; --model {state['model']} can begin with its weights")
    fitting = {name: value for name, value in state["weights"].items()
               if isinstance(value, Tensor) and name in own and own[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    anew = {name.split(".")[0] for name, _ in model.named_parameters() if name not in fitting}
    return sorted(anew), sorted({name.split(".")[0] for name in state["weights"] if name not in own})


def best_beside(resumed: Path, state: dict[str, Any]) -> Path:
    """The checkpoint beside a resumed one that was the best so far when that was written; else the resumed one.

    It is model-best.pt, but where the run had gone on and found a better one since.
    """
    numbered = sorted((int(path.stem[6:]), path) for path in resumed.parent.glob("model-*.pt") if path.stem[6:].isdecimal())
    for path in [resumed.with_name("model-best.pt"), *(path for step, path in numbered if step <= state["step"])]:
        with contextlib.suppress(OSError, ValueError):  # one that is not there or broken cannot be it
            found = read_checkpoint(path)
            if found.get("step", math.inf) <= state["step"] and found.get("best") == state["best"]:
                return path
    return resumed


def validate(model: Transcriber, recordings: list[Recording], training: list[Recording]) -> dict[str, float]:
    """Mean metrics of validation `recordings`. First the model learns from those of `training` how to read velocities and, where the recipe
    says so, its thresholds are tuned on `recordings`."""
    fit_velocity(model, [recording.until(VALIDATION_SECONDS) for recording in training[:: -(-len(training) // VELOCITY_RECORDINGS)]])
    heard = list(predict(model, recordings))
    if model.recipe.tune_thresholds:
        model.thresholds = tune_thresholds(recordings, heard, model.recipe.onset_target)
    rows = [score(recording, each, model.thresholds, model.recipe.onset_target) for recording, each in zip(recordings, heard)]
    return {name: mean for name, (mean, _) in summarise(rows).items()}


class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to stop after its step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def build_parser() -> argparse.ArgumentParser:
    def frames(text: str) -> int:
        if (samples := int(text)) < HOP_SIZE or samples % HOP_SIZE:
            raise argparse.ArgumentTypeError(f"{samples} samples are not whole frames of {HOP_SIZE}")
        return samples

    def recipe(text: str) -> str:
        try:
            parse_recipe(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    parser = argparse.ArgumentParser(description="Train a piano transcriber, choose its best checkpoint on validation, score it on test.",
                                     formatter_class=Help)
    add = parser.add_argument
    add("--model", "--model_type", type=str.lower, choices=tuple(MODELS), default="onf", help="which transcriber")
    add("--recipe", type=recipe, default="default", metavar="NAME[,ENTRY=VALUE...]",
        help=f"{' or '.join(RECIPES)}, the homework's models and training settings; entries of Recipe in recipe.py may be replaced: default,cosine=False")
    add("--data", nargs="+", default=["data"], help="data folders, see prepare.py; a split is that of all of them")
    add("--onset_data", nargs="*", default=[], help="more folders for training, from which onsets alone are learnt: their offsets "
        "follow another convention than those of --data")
    add("--iterations", "-i", type=positive(int), default=5000, help="training steps")
    add("--batch_size", "-b", type=positive(int), default=16, help="segments in a step, over all processes")
    add("--sequence_length", "-v", type=frames, default=102400, help="samples in a segment")
    add("--learning_rate", "-lr", type=positive(float), help="at its peak; by default the recipe's: "
        + ", ".join(f"{recipe.learning_rate:g} for {name}" for name, recipe in RECIPES.items()))
    add("--weight_decay", "-wd", type=positive(float, or_zero=True), default=0.0, help="Adam's L2 penalty")
    add("--validation_interval", "-vi", type=positive(int), default=500, help="steps between validations and checkpoints")
    add("--cnn_unit", "-cnn", type=positive(int), default=Sizes.cnn_unit, help="channels of the first convolutions")
    add("--fc_unit", "-fc", type=positive(int), default=Sizes.fc_unit, help="features of a frame after the convolutions")
    add("--weights", type=Path, metavar="CKPT", help="begin with the weights of this checkpoint where they fit, to adapt it or to enlarge it; "
        "for the same run again there is --resume")
    add("--seed", type=positive(int, or_zero=True, below=2**63), default=0, help="of weights, segments and dropout")
    add("--logdir", type=Path, help="run folder; by default runs/exp_ and the time, or the resumed run's")
    add("--save_midi", action="store_true", help="write what is heard in the test recordings as MIDI files")
    add("--resume", type=Path, metavar="CKPT", help="go on from this checkpoint as if never stopped")
    add("--debug", action="store_true", help="the whole path at toy size in about three minutes; makes the demo data if there is none")
    add("--num_workers", type=positive(int, or_zero=True), help=f"processes that cut segments ahead; they change no result; by default {GPU_WORKERS} beside a GPU, else none")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Typed flags win over those of `--debug` or of the resumed run, which win over the defaults.

    Raises:
        OSError, ValueError: the checkpoint to resume cannot be read, or a typed flag contradicts it.
    """
    parser = build_parser()
    defaults = vars(parser.parse_args([]))
    untyped = argparse.Namespace(**dict.fromkeys(defaults))  # nothing but None, which no default replaces
    typed = {name: value for name, value in vars(parser.parse_args(argv, untyped)).items() if value is not None}
    if "resume" in typed:
        state = read_checkpoint(typed["resume"])
        if not {"optimizer", "arguments"} <= state.keys():
            raise ValueError(f"{typed['resume']}: holds weights only and cannot be resumed")
        if "weights" in typed:
            raise ValueError(f"--weights {typed['weights']}: a resumed run goes on with its own")
        for name in FIXED:
            if name in typed and typed[name] != state["arguments"][name]:
                raise ValueError(f"--{name} {typed[name]}: the resumed run has {state['arguments'][name]}, start a new run to change it")
        args = argparse.Namespace(**{**defaults, **state["arguments"], **typed})
        args.logdir = typed.get("logdir", typed["resume"].parent)
        args.state = state
    else:
        debug = {name: value for name, value in DEBUG.items() if "debug" in typed and f",{name}=" not in typed.get("recipe", "")}
        args = argparse.Namespace(**{**defaults, **debug, **typed})
        args.learning_rate = args.learning_rate or parse_recipe(args.recipe).learning_rate
        args.state = None
    resumed = args.state is not None and args.logdir.resolve() == typed["resume"].parent.resolve()
    if args.logdir and not resumed and any(args.logdir.glob("model-*.pt")):
        raise ValueError(f"--logdir {args.logdir}: holds another run; go on with that by --resume, or name another folder")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        raise ValueError(f"--batch_size {args.batch_size}: does not divide among {world} processes")
    args.data_typed = "data" in typed
    return args


@contextlib.contextmanager
def first_of_host_first() -> Iterator[None]:
    """Within, of the processes that train together on a host, the first is done before the others begin: they find what it made and decoded."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()


def load_data(args: argparse.Namespace) -> dict[str, list[Recording]]:
    """The three splits; with --debug a few recordings of each, of a demo set made on the spot where there is no data.

    Raises:
        OSError, ValueError: as load_split does.
    """
    if args.debug and not args.data_typed and args.state is None:
        if find_table(args.data[0]) is None:
            args.data = [str(Path(args.data[0]) / "demo")]
            if find_table(args.data[0]) is None:
                prepare.make_demo(Path(args.data[0]))
    limit = DEBUG_RECORDINGS if args.debug else None
    data = {split: load_split(args.data, split, limit) for split in ("train", "validation", "test")}
    if args.onset_data:
        data["train"] += [dataclasses.replace(recording, has_offsets=False) for recording in load_split(args.onset_data, "train", limit)]
    return data


def new_run_folder() -> Path:
    """Make runs/exp_ and the time, with a number behind it where another run began in the same second. Raises OSError."""
    Path("runs").mkdir(exist_ok=True)
    name = datetime.datetime.now().strftime("exp_%y%m%d-%H%M%S")
    for number in itertools.count(1):
        run = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            run.mkdir()
            return run


def train(args: argparse.Namespace, data: dict[str, list[Recording]], device: torch.device) -> int:
    """The run itself: loop, validations, checkpoints, and the test split once at the end. Returns the exit status."""
    rank, world = rank_and_world()
    torch.manual_seed(args.seed)
    if args.state:
        model = model_of(args.state, args.resume).to(device)
    else:
        model = build_model(args.model, Sizes(args.cnn_unit, args.fc_unit), parse_recipe(args.recipe))
        anew, unused = begin_with(model, args.weights) if args.weights else ([], [])
        model.to(device)
    recipe = model.recipe  # a resumed run keeps the one it began with
    model.train()
    optimizer = adam(model, args.learning_rate, args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, args.iterations, step))
    first, best = 1, -1.0
    if args.state:
        optimizer.load_state_dict(args.state["optimizer"])
        schedule.load_state_dict(args.state["scheduler"])
        for group, peak in zip(optimizer.param_groups, schedule.base_lrs):  # other --iterations than before give another rate from the first step on
            group["lr"] = peak * learning_rate_factor(recipe, args.iterations, args.state["step"])
        first = args.state["step"] + 1
        if [*map(os.path.abspath, args.data)] == [*map(os.path.abspath, args.state["arguments"]["data"])]:
            best = args.state["best"]  # what was reached on other validation data says nothing about these
    parallel = joined(model, device)
    minutes = {split: sum(len(r.audio) for r in recordings) / SAMPLE_RATE / 60 for split, recordings in data.items()}
    validation = [recording.until(VALIDATION_SECONDS) for recording in data["validation"]]
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
              if name not in ("state", "data_typed", "resume", "logdir", "device")}
    description = {"folders": args.data, "onset_folders": args.onset_data,
                   "recordings": {split: len(recordings) for split, recordings in data.items()},
                   "minutes": {split: round(value, 1) for split, value in minutes.items()}}
    run = args.logdir or (new_run_folder() if rank == 0 else Path("runs"))
    log, writer = (tqdm.write if rank == 0 else lambda _: None), None
    log(f"{args.model}, {n_parameters(model):,} parameters, recipe {args.recipe}, seed {args.seed}, on {device}"
        + (f" x {world}" if world > 1 else "") + f", into {run}\n"
        + f"data {' '.join(args.data)}" + (f", onsets of {' '.join(args.onset_data)}" if args.onset_data else "") + ": "
        + ", ".join(f"{len(data[split])} {split} ({minutes[split]:.1f} min)" for split in data)
        + (f"\nweights of {args.weights}" + (f", but for {', '.join(anew)}" if anew else "")
           + (f"; not used: {', '.join(unused)}" if unused else "") if args.weights and not args.state else "")
        + f"\nsteps {first} to {args.iterations} of {args.batch_size} x {args.sequence_length / SAMPLE_RATE:.1f} s")
    if rank == 0:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here
        write_json(run / "config.json", {**config, "recipe_entries": dataclasses.asdict(recipe), "data_description": description})
        writer = SummaryWriter(str(run), purge_step=first)

        if args.state:  # into another folder the best so far comes along, and from an earlier step a later best does not stay
            best_before = best_beside(args.resume, args.state)
            if best_before != run / "model-best.pt":
                with written_whole(run / "model-best.pt") as temporary:
                    shutil.copyfile(best_before, temporary)

    def save(step: int, name: str) -> Path:
        if rank == 0:
            save_checkpoint(run / name, model, optimizer=optimizer.state_dict(), scheduler=schedule.state_dict(), step=step,
                            best=best, data=description, arguments=config)
        return run / name

    segments = Segments(data["train"], args.sequence_length, args.seed, recipe.onset_target)
    stop = StopRequest()
    look = 1 if device.type == "cpu" else 10  # steps between looks at the loss, each of which waits for the GPU to be done
    unseen: list[tuple[int, Tensor, Tensor]] = []  # steps since the last look, with their losses and the recordings they heard
    try:
        bar = tqdm(range(first, args.iterations + 1), initial=first - 1, total=args.iterations, disable=rank != 0, dynamic_ncols=True)
        for step, batch in zip(bar, batches(segments, args.batch_size, first, args.iterations, args.num_workers, device)):
            # augmentation and dropout too are drawn from the seed and the step alone: that is the whole random state of a run
            torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))
            losses = training_step(parallel, recipe, optimizer, batch, device)
            of_all = mean_over_ranks(torch.stack(list(losses.values())))
            validating = step % args.validation_interval == 0 or step == args.iterations
            unseen.append((step, sum(losses.values()), batch["recording"]))
            stopping = False
            if validating or step % look == 0:
                values = torch.stack([loss for _, loss, _ in unseen]).tolist()
                wrong = [not math.isfinite(value) for value in values]
                broken, stopping = any_rank(any(wrong), bool(stop.number))
                if broken:
                    if not any(wrong):
                        raise FloatingPointError("the loss of another process is not a number; it says more")
                    first_wrong = wrong.index(True)
                    number, _, drawn = unseen[first_wrong]
                    names = ", ".join(data["train"][i].name for i in sorted(set(drawn.tolist())))
                    raise FloatingPointError(f"step {number}: the loss is {values[first_wrong]}; recordings of the batch: {names}")
                unseen.clear()
                bar.set_postfix_str(f"loss {of_all.sum():.4f}")
            if writer and (step % 10 == 0 or step == 1):
                for name, scalar in {**dict(zip(losses, of_all.tolist())), "learning_rate": optimizer.param_groups[0]["lr"]}.items():
                    writer.add_scalar(f"train/{name}", scalar, step)
            schedule.step()
            if validating and rank == 0:
                scores = validate(model, validation, data["train"])
                for name, mean in scores.items():
                    writer.add_scalar(name, mean, step)
                log(f"step {step}\n" + "\n".join(f"{name:30}: {scores[name]:.4f}" for name in REPORTED))
                if (merit := sum(scores[name] for name in CHOSEN_BY) / len(CHOSEN_BY)) >= best:
                    best = merit
                    save(step, "model-best.pt")
                writer.flush()
            if validating or stopping:
                path = save(step, f"model-{step}.pt")
            if validating and world > 1:
                dist.barrier()  # the others wait for rank 0
            if stopping and step < args.iterations:
                start = "python" if world == 1 else f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', world)}"
                log(f"stopped after step {step}; go on with: {start} train.py --resume {shlex.quote(str(path))}")
                return 128 + (stop.number or signal.SIGTERM)  # another rank may have got it
    finally:
        stop.restore()
        if writer:
            writer.close()
    if rank == 0:
        test(run, args, data["test"], device, log)
    if world > 1:
        dist.barrier()
    return 0


def test(run: Path, args: argparse.Namespace, recordings: list[Recording], device: torch.device, log: Any) -> None:
    """Score the best checkpoint on the test split and write results.txt, .json and .csv. Raises OSError."""
    torch.backends.cudnn.benchmark = False  # the last chunk of each recording has a shape of its own, not worth a search
    path = run / "model-best.pt"
    model = load_checkpoint(path, device)
    rows, heard = evaluate_split(model, recordings)
    if args.save_midi:
        for recording, notes in zip(recordings, heard):
            write_midi(run / "midi" / Path(recording.name).with_suffix(".midi"), notes)
    table = format_table(summarise(rows))
    with written_whole(run / "results.txt") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    write_results(run / "results.json", recordings, rows, model.thresholds, checkpoint=path.name, data=args.data, split="test",
                  reference="midi")
    log(f"test, {len(rows)} whole recordings, {path}, thresholds {model.thresholds}\n{table}")


def run(argv: list[str] | None) -> int:
    """Train as the command line says. Returns the exit status; raises OSError, ValueError and FloatingPointError."""
    keep_pages(all_blocks=True)
    try:
        args = parse_args(argv)
        world = int(os.environ.get("WORLD_SIZE", 1))
        device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else None)
        torch.backends.cudnn.benchmark = True  # every batch has one shape, whose fastest convolutions are worth a search
        if world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # the others wait while rank 0 makes data, validates and tests, so be patient
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
        with first_of_host_first():
            data = load_data(args)
        return train(args, data, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    # bad input, a full disk, a loss that is no number; and Ctrl-C when it is the second, or outside the loop
    return exit_status_of("train.py", lambda: run(argv), "what was saved last is in the run folder", OSError, ValueError, FloatingPointError)


if __name__ == "__main__":
    sys.exit(main())
