"""Training runs of a few tiny steps: what they write, how they stop and go on, and that several processes are as one."""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import evaluate
import prepare
import train
from augment import transposed
from constants import HOP_SIZE
from dataset import Segments, load_split
from model import Sizes, build_model, load_checkpoint
from notes import notes_to_rolls, read_midi
from recipe import RECIPES, parse_recipe
from spectrogram import tuning_of

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cpu")
VALIDATION = ["metric/loss/frame_loss", "metric/loss/onset_loss", "metric/frame/frame_f1", "metric/frame/onset_f1",
              "metric/note/f1", "metric/note-with-offsets/f1"]
TINY = ["-b", "2", "-v", "16384", "-cnn", "4", "-fc", "8", "--device", "cpu"]


def tiny(folder: Path, logdir: Path, *more: str) -> list[str]:
    """Flags of four steps with two validations; later flags win."""
    return ["--data", str(folder), "--logdir", str(logdir), "-i", "4", "-vi", "2", *TINY, *more]


def same(a, b) -> bool:
    """Whether two states hold the same numbers, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_run(a: Path, b: Path) -> None:
    first, second = state_of(a), state_of(b)
    for part in ("weights", "optimizer", "scheduler", "step", "best", "thresholds"):
        assert same(first[part], second[part]), part


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory) -> Path:
    """The folder of a whole run of the default model and recipe."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(tiny(data_folder, run, "--model", "onf")) == 0
    return run


# --- what a run leaves ---

def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.iterdir() if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {"config.json", "model-2.pt", "model-4.pt", "model-best.pt", "results.txt", "results.json", "results.csv"}


def test_the_configuration_can_be_read(finished, data_folder):
    config = json.loads((finished / "config.json").read_text())
    assert (config["model"], config["iterations"], config["batch_size"], config["sequence_length"]) == ("onf", 4, 2, 16384)
    assert (config["cnn_unit"], config["fc_unit"], config["seed"], config["recipe"]) == (4, 8, 0, "default")
    assert config["learning_rate"] == RECIPES["default"].learning_rate
    assert config["data"] == config["data_description"]["folders"] == [str(data_folder)]
    assert config["data_description"]["recordings"] == {"train": 3, "validation": 1, "test": 2}


def test_results_are_means_over_the_test_recordings(finished, data_folder):
    written = json.loads((finished / "results.json").read_text())
    assert [row["recording"] for row in written["recordings"]] == ["r4.flac", "r5.flac"]
    model = load_checkpoint(finished / "model-best.pt")
    summary = evaluate.summarise(evaluate.evaluate_split(model, load_split(data_folder, "test"))[0])
    lines = dict(re.split(r"\s*: ", line) for line in (finished / "results.txt").read_text().splitlines())
    assert set(VALIDATION) <= set(lines) and lines.keys() == summary.keys()
    for name, (mean, std) in summary.items():
        assert written["means"][name] == pytest.approx({"mean": mean, "std": std}, abs=1e-6)
        assert lines[name] == f"{mean:.4f} +- {std:.4f}"


def test_tensorboard_can_be_read_back(finished):
    events = EventAccumulator(str(finished)).Reload()
    tags = set(events.Tags()["scalars"])
    assert set(VALIDATION) <= tags and {"train/frame_loss", "train/onset_loss", "train/learning_rate"} <= tags
    for name in VALIDATION:
        assert [event.step for event in events.Scalars(name)] == [2, 4]
        assert all(np.isfinite(event.value) for event in events.Scalars(name))
    assert 0 < events.Scalars("metric/loss/frame_loss")[0].value < 5
    first = events.Scalars("train/learning_rate")[0]
    assert first.step == 1 and first.value == pytest.approx(RECIPES["default"].learning_rate * train.learning_rate_factor(RECIPES["default"], 4, 0))


def test_save_midi_writes_what_is_heard(data_folder, tmp_path, monkeypatch, capsys):
    """A model that hears all, instead of one of two steps that hears nothing."""
    def perfect(model, recordings):
        drawn = [np.stack(notes_to_rolls(recording.notes, recording.n_frames, 0, shape)).astype(np.float32) for recording in recordings]
        return [(20 * frame - 10, 20 * onset - 10) for onset, frame in drawn]

    shape = RECIPES["default"].onset_target
    monkeypatch.setattr(evaluate, "predict", perfect)
    assert train.main(tiny(data_folder, tmp_path, "--model", "rnn", "-i", "2", "--save_midi")) == 0
    assert re.search(r"metric/note/f1 +: 1\.0000", capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "midi").iterdir()} == {"r4.midi", "r5.midi"}
    for recording in load_split(data_folder, "test"):
        written = read_midi((tmp_path / "midi" / recording.name).with_suffix(".midi"))
        assert written.pitches.tolist() == recording.notes.pitches.tolist()
        np.testing.assert_allclose(written.intervals, recording.notes.intervals, atol=0.02)


def test_checkpoints_are_enough_for_evaluation(finished, tmp_path):
    """No flag repeats what the file knows: not the data, nor the model."""
    assert evaluate.main([str(finished / "model-4.pt"), "--save_path", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "model-4_test_midi.json").read_text())["recordings"]) == 2
    state = state_of(finished / "model-4.pt")
    assert state["step"] == 4 and state["sizes"]["cnn_unit"] == 4 and {"optimizer", "scheduler", "data", "versions"} <= state.keys()


def test_the_screen_shows_the_run_and_its_metrics(data_folder, tmp_path, capsys):
    assert train.main(tiny(data_folder, tmp_path / "run", "--model", "rnn", "-vi", "4", "--seed", "5")) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("step 4") + 1
    block = [re.fullmatch(r"(\S+)\s*: (\d+\.\d+)", line).groups() for line in lines[start : start + 6]]
    assert [name for name, _ in block] == VALIDATION
    model = build_model("rnn", Sizes(4, 8))
    head = "\n".join(lines[: start - 1])
    for fact in ("rnn", f"{train.n_parameters(model):,} parameters", "seed 5", "cpu", str(tmp_path / "run"), "3 train", "1 validation", "2 test"):
        assert fact in head


@pytest.mark.parametrize("model", ["baseline", "crnn", "harmonic"])
def test_every_model_trains_in_the_courses_recipe(model, data_folder, tmp_path):
    assert train.main(tiny(data_folder, tmp_path, "--model_type", model.upper(), "--recipe", "course", "-i", "2")) == 0
    trained = load_checkpoint(tmp_path / "model-2.pt")
    assert trained.recipe == RECIPES["course"] and trained.thresholds == {"onset": 0.5, "frame": 0.5}
    torch.manual_seed(0)
    fresh = build_model(model, Sizes(4, 8), RECIPES["course"])
    changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters())]
    assert changed == [parameter.requires_grad for parameter in fresh.parameters()]


PLAIN = dataclasses.replace(RECIPES["default"], gain_db=0.0, equalise_db=0.0, room=0.0, noise=0.0, detune=0.0, transpose=0)


def test_training_learns(data_folder, tmp_path):
    """Sixty steps on one batch's worth of tones: the loss falls well below that of the base rates."""
    model = build_model("onf", Sizes(4, 8, 8))
    segments = Segments(load_split(data_folder, "train"), 16384, 0)
    batch = next(train.batches(segments, 2, 1, 1, 0, DEVICE))
    optimizer = train.adam(model, 1e-2)
    first = None
    for _ in range(60):
        loss = sum(train.training_step(model, PLAIN, optimizer, batch, DEVICE).values()).item()
        first = first or loss
    assert loss < 0.8 * first


def test_losses_are_of_their_own_heads():
    class Fixed(nn.Module):
        def forward(self, audio, semitones):
            return torch.zeros(1, 2, 88), torch.ones(1, 2, 88)

    frame, onset = torch.zeros(1, 2, 88), torch.zeros(1, 2, 88)
    onset[0, 0, 0] = 1
    batch = {"audio": torch.zeros(1, 2 * HOP_SIZE), "frame": frame, "onset": onset, "has_offsets": torch.tensor([True])}
    losses = train.losses_of(Fixed(), PLAIN, batch, DEVICE)
    assert losses["frame_loss"].item() == pytest.approx(np.log(2))
    assert losses["onset_loss"].item() == pytest.approx((175 * np.log(1 + np.e) + np.log(1 + 1 / np.e)) / 176, rel=1e-5)


@pytest.mark.parametrize("sounds, weighed", [
    ("XXXX........", "..******...."),
    ("XXXX...XXXX.", "..******.***"),  # what has begun in between, too
    ("X...........", "*****......."),
    ("..........XX", "............"),  # sounding on when the segment ends
    ("............", "............"),
    ("X", "."),
])
def test_frames_near_a_notes_end_count_more(sounds, weighed):
    frame = torch.zeros(2, len(sounds), 88)
    frame[1, :, 40] = torch.tensor([place == "X" for place in sounds]).float()
    expected = torch.ones_like(frame)
    expected[1, :, 40] += torch.tensor([place == "*" for place in weighed]) * 2.0
    assert torch.equal(train.frame_weights(frame, 3.0), expected)
    assert torch.equal(train.frame_weights(frame, 1.0), torch.ones_like(frame))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_offset_weight_reaches_the_loss(name):
    class Fixed(nn.Module):
        def forward(self, audio, semitones):
            return torch.zeros(1, 10, 88), torch.zeros(1, 10, 88)

    frame = torch.zeros(1, 10, 88)
    frame[0, :4, 40] = 1
    batch = {"audio": torch.zeros(1, 10 * HOP_SIZE), "frame": frame, "onset": frame, "has_offsets": torch.tensor([True])}
    losses = train.losses_of(Fixed(), RECIPES[name], batch, DEVICE)
    assert losses["frame_loss"].item() == pytest.approx(np.log(2) * (1 + 6 * (RECIPES[name].offset_weight - 1) / 880), rel=1e-5)
    assert losses["onset_loss"].item() == pytest.approx(np.log(2), rel=1e-5)


def test_onset_data_teaches_onsets_alone(data_folder):
    """A segment whose offsets do not count gives the frame head no gradient, and the onset head the same as any other."""
    model = build_model("crnn", Sizes(4, 8, 8)).eval()
    batch = next(train.batches(Segments(load_split(data_folder, "train"), 16384, 0), 2, 1, 1, 0, DEVICE))
    gradients = []
    for counts in ([True, True], [True, False], [False, True], [False, False]):
        model.zero_grad()
        sum(train.losses_of(model, PLAIN, {**batch, "has_offsets": torch.tensor(counts)}, DEVICE).values()).backward()
        gradients.append([head.weight.grad.clone() for head in (model.frame_fc, model.onset_fc)])
    (both, onset), *others, (none, _) = gradients
    assert both.abs().max() > 0 and none.abs().max() == 0
    torch.testing.assert_close(others[0][0] + others[1][0], both)  # each segment's share is the same, whatever the other's is
    assert all(torch.equal(other[1], onset) for other in others)


def test_onset_data_is_only_for_training_and_stays_when_resumed(data_folder, tmp_path, capsys):
    more = Path(shutil.copytree(data_folder, tmp_path / "more"))
    assert train.main([*tiny(data_folder, tmp_path / "run"), "--onset_data", str(more)]) == 0
    assert f"data {data_folder}, onsets of {more}: 6 train" in capsys.readouterr().out
    assert train.main(["--resume", str(tmp_path / "run" / "model-2.pt"), "--logdir", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert ", 1 validation" in (out := capsys.readouterr().out) and ": 6 train" in out
    assert_same_run(tmp_path / "run" / "model-4.pt", tmp_path / "again" / "model-4.pt")
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["recordings"]) == 2  # the test split of --data
    args = train.parse_args([*tiny(data_folder, tmp_path / "third"), "--onset_data", str(more)])
    assert [recording.has_offsets for recording in train.load_data(args)["train"]] == [True] * 3 + [False] * 3


# --- stopping and going on ---

@pytest.mark.parametrize("model, recipe", [("onf", "default"), ("baseline", "course"), ("harmonic", "default")])
def test_a_resumed_run_equals_an_uninterrupted_one(model, recipe, data_folder, tmp_path):
    assert train.main(tiny(data_folder, tmp_path / "whole", "--model", model, "--recipe", recipe, "-wd", "1e-4")) == 0
    (tmp_path / "again").mkdir()
    for name in ("model-2.pt", "model-best.pt"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    assert train.main(["--resume", str(tmp_path / "again" / "model-2.pt"), "--device", "cpu"]) == 0  # goes on in its own folder
    assert_same_run(tmp_path / "whole" / "model-4.pt", tmp_path / "again" / "model-4.pt")
    assert not same(state_of(tmp_path / "whole" / "model-2.pt")["weights"], state_of(tmp_path / "whole" / "model-4.pt")["weights"])


def test_a_run_resumed_for_more_steps_has_their_learning_rate_at_once(finished, tmp_path, monkeypatch):
    """At the end of four steps a cosine is zero, in the middle of eight it is not."""
    used = []

    def remember(model, recipe, optimizer, *rest, step=train.training_step):
        used.append(optimizer.param_groups[0]["lr"])
        return step(model, recipe, optimizer, *rest)

    monkeypatch.setattr(train, "training_step", remember)
    assert train.main(["--resume", str(finished / "model-4.pt"), "-i", "8", "--logdir", str(tmp_path), "--device", "cpu"]) == 0
    recipe = RECIPES["default"]
    assert used == pytest.approx([recipe.learning_rate * train.learning_rate_factor(recipe, 8, step) for step in range(4, 8)]) and min(used) > 0


def test_a_run_resumed_elsewhere_leaves_a_whole_folder(finished, tmp_path):
    """Also where nothing better is found after it went on."""
    assert train.main(["--resume", str(finished / "model-2.pt"), "--logdir", str(tmp_path / "new"), "--device", "cpu"]) == 0
    assert_same_run(finished / "model-4.pt", tmp_path / "new" / "model-4.pt")
    assert {"model-best.pt", "results.txt", "results.json"} <= {path.name for path in (tmp_path / "new").iterdir()}


def test_a_run_resumed_at_an_earlier_step_forgets_a_later_best(finished, tmp_path):
    """The folder is that of a run which went on and became better; what is tested in the end is of this run."""
    for name in ("model-2.pt", "model-4.pt"):
        shutil.copyfile(finished / name, tmp_path / name)
    torch.save({**state_of(finished / "model-4.pt"), "best": 2.0}, tmp_path / "model-best.pt")
    state = state_of(finished / "model-2.pt")
    torch.save({**state, "best": 1.0}, tmp_path / "model-2.pt")  # nothing will be better
    assert train.main(["--resume", str(tmp_path / "model-2.pt"), "--device", "cpu"]) == 0
    assert state_of(tmp_path / "model-best.pt")["step"] == 2


def test_a_broken_checkpoint_beside_a_whole_one_is_passed_over(finished, tmp_path):
    shutil.copyfile(finished / "model-2.pt", tmp_path / "model-2.pt")
    for name in ("model-1.pt", "model-best.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert train.main(["--resume", str(tmp_path / "model-2.pt"), "--device", "cpu"]) == 0
    assert_same_run(finished / "model-4.pt", tmp_path / "model-4.pt")


def test_other_validation_data_begin_a_new_search_for_the_best(finished, data_folder, tmp_path):
    """A score on other data is no measure: whatever it was, the resumed run's own best is kept."""
    state = state_of(finished / "model-2.pt")
    torch.save({**state, "best": 1.0}, tmp_path / "model-2.pt")
    more = shutil.copytree(data_folder, tmp_path / "more")
    for name, data, step in (("same", [], 2), ("spelt otherwise", ["--data", f"{data_folder}/"], 2), ("other", ["--data", str(more)], 4)):
        assert train.main(["--resume", str(tmp_path / "model-2.pt"), "--logdir", str(tmp_path / name), "--device", "cpu", *data]) == 0
        assert state_of(tmp_path / name / "model-best.pt")["step"] == step


def test_a_resumed_run_keeps_its_recipe(finished, tmp_path, monkeypatch):
    """What `--recipe default` means may change between two versions; a run that began with the old one ends with it."""
    monkeypatch.setitem(train.RECIPES, "default", RECIPES["course"])
    assert train.main(["--resume", str(finished / "model-2.pt"), "--logdir", str(tmp_path), "--device", "cpu"]) == 0
    assert_same_run(finished / "model-4.pt", tmp_path / "model-4.pt")


def test_several_data_folders(data_folder, tmp_path, capsys):
    """All are trained on, in the checkpoint and in the results; a resumed run still has them."""
    more = Path(shutil.copytree(data_folder, tmp_path / "more"))
    flags = ["--data", str(data_folder), str(more), "--logdir", str(tmp_path / "run"), "--model", "rnn", "--save_midi", *TINY]
    assert train.main([*flags, "-i", "1"]) == 0
    assert f"data {data_folder} {more}: 6 train" in capsys.readouterr().out
    state = state_of(tmp_path / "run" / "model-1.pt")
    assert state["data"]["folders"] == state["arguments"]["data"] == [str(data_folder), str(more)]
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["recordings"]) == 4
    assert len(list((tmp_path / "run" / "midi").glob("**/*.midi"))) == 4
    assert train.main(["--resume", str(tmp_path / "run" / "model-1.pt"), "-i", "2", "--device", "cpu"]) == 0
    assert "2 validation" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "run" / "model-2.pt"), "--split", "train", "--save_path", str(tmp_path)]) == 0
    assert "6 train recordings" in capsys.readouterr().out


def test_the_latest_of_equals_is_best(data_folder, tmp_path):
    """On the plateau all score zero: the one that has learnt longest is kept."""
    assert train.main(tiny(data_folder, tmp_path, "--recipe", "course")) == 0
    assert state_of(tmp_path / "model-best.pt")["step"] == 4


def test_the_best_is_so_in_notes_and_in_offsets(data_folder, tmp_path, monkeypatch):
    """One step that finds a few more notes is not better than one whose notes end right."""
    given = iter([(0.90, 0.50), (0.89, 0.60)])

    def validate(model, recordings, training):
        note, with_offsets = next(given)
        return dict.fromkeys(train.REPORTED, 0.0) | {"metric/note/f1": note, "metric/note-with-offsets/f1": with_offsets}

    monkeypatch.setattr(train, "validate", validate)
    assert train.main(tiny(data_folder, tmp_path)) == 0
    state = state_of(tmp_path / "model-best.pt")
    assert (state["step"], state["best"]) == (4, pytest.approx(0.745))


def test_workers_change_no_result(finished, data_folder, tmp_path):
    assert train.main(tiny(data_folder, tmp_path, "--num_workers", "2")) == 0
    assert_same_run(finished / "model-4.pt", tmp_path / "model-4.pt")


def test_the_loss_of_another_process_is_not_blamed_on_recordings_of_this_one(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "any_rank", lambda *flags: [True, False])
    assert train.main(tiny(data_folder, tmp_path)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: the loss of another process is not a number; it says more"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_as_if_never_stopped(number, status, finished, data_folder, tmp_path, monkeypatch, capsys):
    """The signal comes in the middle of step 2; that step or the next is finished and saved, and the resumed run does the rest."""
    calls = []

    def clip_and_signal(model, recipe, clip=train.clip_gradients):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        clip(model, recipe)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_gradients", clip_and_signal)
        assert train.main(tiny(data_folder, tmp_path / "a run")) == status
    assert signal.getsignal(number) is before
    step, saved = re.search(r"stopped after step ([23]); go on with: python train.py --resume (.*)", capsys.readouterr().out).groups()
    saved, = shlex.split(saved)  # as a shell would read it
    assert Path(saved) == tmp_path / "a run" / f"model-{step}.pt" and state_of(saved)["step"] == int(step)
    assert not (tmp_path / "a run" / "model-4.pt").exists()
    assert not (tmp_path / "a run" / "results.txt").exists()
    assert train.main(["--resume", saved, "--device", "cpu"]) == 0
    assert_same_run(finished / "model-4.pt", tmp_path / "a run" / "model-4.pt")
    assert (tmp_path / "a run" / "results.txt").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_a_process_saves(workers, data_folder, tmp_path):
    """And so it does where, as under torchrun or with Ctrl-C in a terminal, its workers get the signal too."""
    run = tmp_path / "run"
    command = [sys.executable, "train.py", *tiny(data_folder, run, "--model", "rnn", "-i", "1000000", "-vi", "1000000"), f"--num_workers={workers}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        seen = b""
        while b"loss " not in seen:  # the bar of a finished step
            assert (piece := process.stderr.read1(4096)), seen.decode()
            seen += piece
        os.killpg(process.pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and b"Traceback" not in seen + errors
    path = Path(re.search(r"go on with: python train.py --resume (.*)", out.decode()).group(1))
    step = state_of(path)["step"]
    assert path == run / f"model-{step}.pt" and load_checkpoint(path)
    assert train.main(["--resume", str(path), "-i", str(step + 1), "--device", "cpu"]) == 0
    assert (run / "results.txt").is_file() and state_of(run / f"model-{step + 1}.pt")["step"] == step + 1


def test_a_loss_that_is_no_number_stops_the_run(data_folder, tmp_path, monkeypatch, capsys):
    def poisoned(*arguments):
        model = build_model(*arguments)
        with torch.no_grad():
            model.onset_fc.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(train, "build_model", poisoned)
    assert train.main(tiny(data_folder, tmp_path, "--model", "rnn")) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py:"))
    assert re.search(r"step 1\b.*nan.*recordings of the batch: r\d\.flac", error)
    drawn = {int(n) for n in re.findall(r"r(\d)\.flac", error)}
    expected = next(train.batches(Segments(load_split(data_folder, "train"), 16384, 0), 2, 1, 1, 0, DEVICE))["recording"]
    assert drawn == set(expected.tolist())
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("flags", [["--model", "crnn"], ["--seed", "1"], ["-b", "4"], ["-lr", "0.5"], ["-cnn", "8"], ["--recipe", "course"]])
def test_a_resumed_run_is_not_contradicted(flags, finished, tmp_path, capsys):
    before = {path.name for path in finished.iterdir()}
    assert train.main(["--resume", str(finished / "model-2.pt"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: --") and flags[1] in error and "the resumed run has" in error
    assert {path.name for path in finished.iterdir()} == before


def test_weights_alone_are_not_resumed(checkpoint, capsys):
    assert train.main(["--resume", str(checkpoint)]) == 1
    assert "holds weights only" in capsys.readouterr().err


# --- beginning with other weights ---

def test_a_run_begins_with_the_weights_it_is_given(finished, data_folder, tmp_path, capsys):
    """And, but for chance, with nothing else of that run."""
    given = finished / "model-4.pt"
    assert train.main(tiny(data_folder, tmp_path, "--weights", str(given), "-i", "1", "-lr", "1e-12")) == 0
    assert f"weights of {given}\nsteps 1 to 1 of" in capsys.readouterr().out
    state = state_of(tmp_path / "model-1.pt")
    assert state["step"] == 1 and state["arguments"]["weights"] == str(given)
    learnt = [name for name, _ in load_checkpoint(given).named_parameters()]
    assert all(torch.allclose(state["weights"][name], state_of(given)["weights"][name], atol=1e-9) for name in learnt)
    resumed = ["--resume", str(tmp_path / "model-1.pt"), "-i", "2", "--device", "cpu"]
    assert train.main([*resumed, "--weights", str(given)]) == 1 and "--weights" in capsys.readouterr().err
    assert train.main(resumed) == 0 and "weights of" not in capsys.readouterr().out


def test_layers_that_the_weights_do_not_fit_begin_anew(finished, data_folder, tmp_path, capsys):
    model = build_model("onf", Sizes(4, 8), parse_recipe("default,combined_unit=8"))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    assert train.begin_with(model, finished / "model-4.pt") == (["combined_fc", "combined_lstm"], [])
    given = state_of(finished / "model-4.pt")["weights"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name] if given[name].shape == value.shape else own[name])
    flags = tiny(data_folder, tmp_path, "--weights", str(finished / "model-4.pt"), "-i", "1", "--recipe", "default,combined_unit=8")
    assert train.main(flags) == 0 and "model-4.pt, but for combined_fc, combined_lstm\n" in capsys.readouterr().out


def test_weights_without_a_place_are_named(finished, data_folder, tmp_path, capsys):
    flags = tiny(data_folder, tmp_path, "--weights", str(finished / "model-4.pt"), "-i", "1", "--recipe", "default,normalise_mel=False")
    assert train.main(flags) == 0 and "model-4.pt; not used: mel_norm\n" in capsys.readouterr().out


def test_weights_of_another_model_are_refused(finished, data_folder, tmp_path, capsys):
    assert train.main(tiny(data_folder, tmp_path / "run", "--weights", str(finished / "model-4.pt"), "--model", "rnn")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds a 'onf' model" in error and not (tmp_path / "run").exists()


# --- several processes ---

@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("number, order", [("0", ["work", "barrier"]), ("1", ["barrier", "work"])])
def test_the_first_process_of_a_host_makes_and_decodes_what_the_others_find(number, order, fails, monkeypatch):
    """They are told that it is done when it fails, too, for they would wait for ever."""
    done = []
    monkeypatch.setenv("LOCAL_RANK", number)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "barrier", lambda: done.append("barrier"))
    with pytest.raises(OSError, match="broken") if fails else contextlib.nullcontext(), train.first_of_host_first():
        done.append("work")
        if fails:
            raise OSError("broken")
    assert done == order


SCRIPT = """
import sys
from pathlib import Path
import torch
import layers
import train

torch.set_num_threads(1)
train.autocast = lambda device: torch.autocast(device.type, enabled=False)
layers.keeps_bfloat16 = lambda device: False
train.augmented = lambda batch, recipe: {**batch, "semitones": torch.ones(len(batch["audio"]))}

seen = []

def keep(net, recipe, clip=train.clip_gradients):
    if train.rank_and_world()[0] == 0:
        seen.append({name.removeprefix("module."): p.grad.clone() for name, p in net.named_parameters() if p.requires_grad})
        torch.save(seen, sys.argv[1])
    clip(net, recipe)

train.clip_gradients = keep
sys.exit(train.main(sys.argv[2:]))
"""


def test_two_processes_have_the_gradients_of_one(data_folder, tmp_path):
    """torchrun with gloo against one process with the joint batch: gradients of three steps, and one run folder of rank 0."""
    script = tmp_path / "first_steps.py"
    script.write_text(SCRIPT)
    flags = ["--data", str(data_folder), "-i", "3", "-b", "4", "-v", "16384", "-cnn", "4", "-fc", "8", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    runs = {"one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, start in runs.items():
        done = subprocess.run([*start, str(script), str(tmp_path / f"{name}.pt"), *flags, "--logdir", str(tmp_path / name)], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("metric/note-with-offsets/f1") == 2  # validation and test, once each
    one, two = state_of(tmp_path / "one.pt"), state_of(tmp_path / "two.pt")
    assert len(one) == len(two) == 3 and one[0].keys() == two[0].keys() and len(one[0]) > 30
    for name, gradient in one[0].items():
        error = (two[0][name] - gradient).norm()
        assert error <= 2e-3 * gradient.norm(), f"{name}: {error} of {gradient.norm()}"
    last, its_like = (torch.cat([gradient.flatten() for gradient in steps[-1].values()]) for steps in (one, two))
    assert (its_like - last).norm() < 0.02 * last.norm()  # Adam has made much of what was rounding in the first steps
    for name in ("train/frame_loss", "train/onset_loss"):
        losses = [EventAccumulator(str(tmp_path / run)).Reload().Scalars(name)[0].value for run in runs]  # each of what both have heard
        assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    levels = [state_of(tmp_path / name / "model-3.pt")["weights"]["level"].item() for name in runs]  # of what both have heard
    assert levels[0] > 0 and levels[1] == pytest.approx(levels[0], rel=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir() if "tfevents" not in path.name} \
        == {path.name for path in (tmp_path / "one").iterdir() if "tfevents" not in path.name}
    assert len(list((tmp_path / "two").glob("*tfevents*"))) == 1


def test_ranks_share_the_batch_of_one_process(data_folder, monkeypatch):
    segments = Segments(load_split(data_folder, "train"), 8192, 0)
    whole = list(train.batches(segments, 4, 3, 4, 0, DEVICE))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(train, "rank_and_world", lambda rank=rank: (rank, 2))
        shares.append(list(train.batches(segments, 4, 3, 4, 0, DEVICE)))
    for step in range(2):
        for part in ("audio", "onset", "frame"):
            assert torch.equal(torch.cat([share[step][part] for share in shares]), whole[step][part])
    assert not torch.equal(whole[0]["audio"], whole[1]["audio"])


def test_an_error_in_a_worker_ends_the_run(data_folder, tmp_path):
    """Which Python would wait for at its end, for workers leave SIGTERM alone."""
    script = tmp_path / "broken_worker.py"
    script.write_text("""
import sys
import dataset, train

def cut(*_):
    raise RuntimeError("no segment")

dataset.Segments.cut = cut
sys.exit(train.main(sys.argv[1:]))
""")
    done = subprocess.run([sys.executable, str(script), *tiny(data_folder, tmp_path / "run", "--num_workers", "2")], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no segment" in done.stderr


def test_a_batch_that_does_not_divide_is_refused(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train.main(tiny(data_folder, tmp_path / "run")) == 1
    assert capsys.readouterr().err == "train.py: --batch_size 2: does not divide among 3 processes\n"
    assert not (tmp_path / "run").exists()


# --- flags ---

def test_the_courses_flags_are_understood():
    args = train.parse_args("--model_type ONF -v 51200 -lr 3e-4 -b 4 -i 77 -vi 11 -wd 1e-5 -cnn 24 -fc 64 --save_midi".split())
    assert (args.model, args.sequence_length, args.learning_rate, args.batch_size, args.iterations) == ("onf", 51200, 3e-4, 4, 77)
    assert (args.validation_interval, args.weight_decay, args.cnn_unit, args.fc_unit, args.save_midi) == (11, 1e-5, 24, 64, True)
    long = train.parse_args("--sequence_length 51200 --learning_rate 3e-4 --batch_size 4 --iterations 77 --validation_interval 11 "
                            "--weight_decay 1e-5 --cnn_unit 24 --fc_unit 64 --save_midi --model onf".split())
    assert vars(long) == vars(args)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_learning_rate_is_the_recipes_until_typed(recipe):
    assert train.parse_args(["--recipe", recipe]).learning_rate == RECIPES[recipe].learning_rate
    assert train.parse_args(["--recipe", recipe, "-lr", "0.25"]).learning_rate == 0.25


def test_entries_of_a_recipe_can_be_replaced(data_folder, tmp_path):
    """The checkpoint, the configuration, the optimizer and a resumed run have them."""
    text = "course,cosine=True,gain_db=3,learning_rate=2e-3"
    assert train.main(tiny(data_folder, tmp_path, "--model", "rnn", "--recipe", text, "-i", "2")) == 0
    expected = dataclasses.replace(RECIPES["course"], cosine=True, gain_db=3.0, learning_rate=2e-3)
    assert load_checkpoint(tmp_path / "model-2.pt").recipe == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["recipe"] == text and config["recipe_entries"] == dataclasses.asdict(expected) and config["learning_rate"] == 2e-3
    resume = ["--resume", str(tmp_path / "model-2.pt"), "-i", "3", "--device", "cpu"]
    assert train.main([*resume, "--recipe", "course"]) == 1
    assert train.main([*resume, "--recipe", text]) == 0
    assert load_checkpoint(tmp_path / "model-3.pt").recipe == expected


def test_a_learning_rate_in_the_recipe_is_typed_too():
    assert train.parse_args(["--recipe", "default,learning_rate=0.125"]).learning_rate == 0.125
    assert train.parse_args(["--recipe", "default,learning_rate=0.125", "--debug"]).learning_rate == 0.125
    assert train.parse_args(["--recipe", "default,learning_rate=0.125", "-lr", "0.5"]).learning_rate == 0.5


@pytest.mark.parametrize("text, message", [("", "'' is no recipe"), ("default,cosine=yes", "cosine is True or False, not 'yes'")])
def test_a_wrong_recipe_is_named(text, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--recipe", text])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and "error: argument --recipe: " in error and message in error


def test_a_flag_beside_debug_counts():
    plain, debug = train.parse_args([]), train.parse_args(["--debug"])
    assert debug.iterations < plain.iterations and debug.validation_interval < plain.validation_interval
    for flag, name, value in (("-i", "iterations", 7), ("-b", "batch_size", 3), ("-v", "sequence_length", 1024), ("-vi", "validation_interval", 5),
                              ("-lr", "learning_rate", 0.125)):
        typed = train.parse_args(["--debug", flag, str(value)])
        assert getattr(typed, name) == value
        assert {key: v for key, v in vars(typed).items() if key != name} == {key: v for key, v in vars(debug).items() if key != name}
    again = train.parse_args(["--debug", "-i", str(plain.iterations)])  # typed, though it is the default's number
    assert again.iterations == plain.iterations


def test_seed_and_weight_decay_change_the_weights(finished, data_folder, tmp_path):
    plain = state_of(finished / "model-2.pt")["weights"]
    for flags in (["--seed", "1"], ["-wd", "0.5"], ["-lr", "0.5"]):
        assert train.main(tiny(data_folder, tmp_path / flags[0], "-i", "2", "-vi", "2", *flags)) == 0
        changed = state_of(tmp_path / flags[0] / "model-2.pt")["weights"]
        assert not torch.equal(changed["onset_fc.weight"], plain["onset_fc.weight"])
        unlearnt = "onset_conv_stack.cnn.0.bias"  # before a batch norm; weight decay too leaves it
        assert torch.equal(changed[unlearnt], plain[unlearnt]) == (flags[0] != "--seed")


def test_runs_of_one_second_have_folders_of_their_own(data_folder, tmp_path, monkeypatch):
    class Stopped(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(train.datetime, "datetime", Stopped)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main(["--data", str(data_folder), "--model", "rnn", "-i", "1", *TINY]) == 0
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["exp_260102-030405", "exp_260102-030405-2"]
    assert len(list((tmp_path / "runs").glob("*/results.txt"))) == 2


def test_another_run_is_not_mixed_with(data_folder, tmp_path, capsys):
    assert train.main(tiny(data_folder, tmp_path / "run", "--model", "rnn")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert train.main(tiny(data_folder, tmp_path / "run", "--model", "crnn")) == 1
    assert train.main(tiny(data_folder, tmp_path / "other", "--model", "rnn", "-i", "2")) == 0
    assert train.main(["--resume", str(tmp_path / "other" / "model-2.pt"), "-i", "4", "--logdir", str(tmp_path / "run"), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.count(f"train.py: --logdir {tmp_path / 'run'}: holds another run; go on with that by --resume, or name another folder\n") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_runs_that_cannot_be_made_are_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "a disk that is not there")
    with pytest.raises(OSError, match="runs"):
        train.new_run_folder()


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_args(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and "training steps (default: 5000)" in out and "which transcriber (default: onf)" in out
    assert "of weights, segments and dropout (default: 0)" in out and not re.search(r"\(default: (None|False|\[\])\)", out)


def test_debug_makes_the_demo_set_where_there_is_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "DEMO_COUNTS", {"train": 2, "validation": 1, "test": 1})
    assert train.main(["--debug", "-i", "2", *TINY]) == 0
    assert len(json.loads((tmp_path / "data" / "demo" / "data.json").read_text())) == 4
    run, = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"exp_\d{6}-\d{6}", run.name) and (run / "results.txt").is_file()
    out = capsys.readouterr().out
    assert "metric/note/f1" in out and "2 train" in out
    made = (tmp_path / "data" / "demo" / "data.json").stat().st_mtime_ns
    assert train.main(["--debug", "-i", "1", "--logdir", "runs/again", *TINY]) == 0  # the second time it is there
    assert (tmp_path / "data" / "demo" / "data.json").stat().st_mtime_ns == made


def test_debug_does_not_pass_over_broken_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.json").write_text("[{")
    assert train.main(["--debug", *TINY]) == 1
    assert "data.json: is not a table of recordings" in capsys.readouterr().err
    assert not (tmp_path / "data" / "demo").exists()


def test_debug_takes_a_few_recordings_of_what_is_there(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DEBUG_RECORDINGS", 1)
    assert train.main(tiny(data_folder, tmp_path, "--debug", "-i", "1")) == 0
    assert json.loads((tmp_path / "config.json").read_text())["data_description"]["recordings"] == {"train": 1, "validation": 1, "test": 1}


def test_debug_makes_nothing_where_data_was_named(tmp_path, capsys):
    assert train.main(["--debug", "--data", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: is no folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- recipes ---

def test_the_courses_learning_rate_falls_every_thousand_steps():
    factors = [train.learning_rate_factor(RECIPES["course"], 5000, step) for step in (0, 999, 1000, 1999, 2000, 4999)]
    np.testing.assert_allclose(factors, [1, 1, 0.98, 0.98, 0.98**2, 0.98**4])


@pytest.mark.parametrize("iterations", [1, 4, 150, 5000])
def test_the_default_learning_rate_warms_up_and_ends_at_zero(iterations):
    factors = np.array([train.learning_rate_factor(RECIPES["default"], iterations, step) for step in range(iterations + 1)])
    peak = int(factors.argmax())
    assert factors.max() == 1 and (factors[:-1] > 0).all() and peak <= max(train.WARM_UP, 1)
    assert (np.diff(factors[: peak + 1]) > 0).all() and (np.diff(factors[peak + 1 :]) < 0).all()
    assert factors[-1] == pytest.approx(0, abs=1e-9) or iterations == 1
    middle = (peak + 1 + iterations) // 2
    if iterations >= 150:
        assert factors[middle] == pytest.approx(0.5, abs=0.02)  # half of a cosine


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_schedule_reaches_the_optimizer(recipe, data_folder, tmp_path):
    assert train.main(tiny(data_folder, tmp_path, "--recipe", recipe, "--model", "rnn", "-i", "3", "-vi", "3", "-lr", "0.01")) == 0
    state = state_of(tmp_path / "model-3.pt")
    expected = 0.01 * train.learning_rate_factor(RECIPES[recipe], 3, 3)  # set for a fourth step
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected, abs=1e-12)


def test_gradients_are_clipped_as_the_recipe_says():
    """Two parameters with gradients of norm 30 and 0.3: together their norm becomes 3, each by itself 3 and 0.3."""
    def clipped(recipe):
        pair = nn.Linear(1, 1)
        pair.weight.grad, pair.bias.grad = torch.full((1, 1), 30.0), torch.full((1,), 0.3)
        train.clip_gradients(pair, RECIPES[recipe])
        return [pair.weight.grad.item(), pair.bias.grad.item()]

    np.testing.assert_allclose(clipped("default"), [3 * 30 / np.hypot(30, 0.3), 3 * 0.3 / np.hypot(30, 0.3)], rtol=1e-4)
    np.testing.assert_allclose(clipped("course"), [3, 0.3], rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_validation_tunes_thresholds_where_the_recipe_says_so(recipe, data_folder, monkeypatch):
    """A model that is never surer than 0.38, and right."""
    recordings = load_split(data_folder, "validation")
    (onset, frame), = [notes_to_rolls(recording.notes, recording.n_frames) for recording in recordings]
    monkeypatch.setattr(train, "predict", lambda *_: [tuple(np.where(roll > 0, -0.5, -4).astype(np.float32) for roll in (frame, onset))])
    model = build_model("rnn", Sizes(4, 8, 8), RECIPES[recipe])
    scores = train.validate(model, recordings, load_split(data_folder, "train"))
    tuned = RECIPES[recipe].tune_thresholds
    assert (scores["metric/note/f1"], scores["metric/note-with-offsets/f1"]) == ((1, 1) if tuned else (0, 0))
    assert (max(model.thresholds.values()) < 0.38) == tuned and model.training


@pytest.mark.parametrize("recipe", RECIPES)
def test_segments_are_augmented_as_the_recipe_says(recipe, data_folder, tmp_path, monkeypatch):
    asked, heard = [], []

    def spy_audio(audio, *parts, augment=train.augment):
        asked.append(parts)
        return augment(audio, *parts)

    def spy_batch(model, recipe, batch, device, losses_of=train.losses_of):
        heard.append(batch)
        return losses_of(model, recipe, batch, device)

    monkeypatch.setattr(train, "augment", spy_audio)
    monkeypatch.setattr(train, "losses_of", spy_batch)
    assert train.main(tiny(data_folder, tmp_path, "--recipe", recipe, "--model", "rnn", "-i", "5", "-vi", "5")) == 0
    parts = RECIPES[recipe]
    assert asked == [(parts.gain_db, parts.equalise_db, parts.room, parts.noise)] * 5
    original = list(train.batches(Segments(load_split(data_folder, "train"), 16384, 0, parts.onset_target), 2, 1, 5, 0, DEVICE))
    assert all(torch.equal(batch["audio"], plain["audio"]) != any(asked[0]) for batch, plain in zip(heard, original))
    semitones = torch.cat([batch.get("semitones", torch.zeros(2)) for batch in heard])
    if semitones.any():  # in tune, and then moved
        semitones += tuning_of(torch.cat([batch["audio"] for batch in original]))
    keys = semitones.round().long()
    assert bool(parts.detune) == (semitones != keys).any() and bool(parts.transpose) == keys.any()
    assert (semitones - keys).abs().max() <= parts.detune and keys.abs().max() <= parts.transpose
    for name in ("onset", "frame"):
        labels, moved = (torch.cat([batch[name] for batch in some]) for some in (original, heard))
        assert torch.equal(transposed(labels, keys), moved)
