"""The benchmark at toy size, in one process, and its reference against the project's own functions."""

import json
from concurrent.futures import Future
from functools import partial

import bench
import measure
import numpy as np
import pytest
import reference
import torch
from conftest import random_notes

import layers
import model
import train
from audio import audio_to_int16
from dataset import Recording, Segments
from devices import multiplies_bytes
from evaluate import extract_notes
from model import Sizes, build_model
from recipe import parse_recipe


class SameProcess:
    """An executor that works here and now: to start processes takes longer than all of this."""

    def __init__(self, *_):
        measure.works.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list[str]:
    """Flags and constants that make the benchmark last a moment."""
    monkeypatch.setattr(measure, "ProcessPoolExecutor", SameProcess)
    for name, value in {"SIZES": Sizes(4, 8), "RECORDING_SECONDS": 120, "DATA_HOURS": (0.1, 0.2), "DRAWN": 2,
                        "LOADED": (2, 2), "LENGTHS": [0.05], "LABELLED": 2, "DECODED": 0.5, "SCORED": 1, "PROCESS_ROUNDS": 1, "RATE_SECONDS": 0}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "run_process", lambda *command, **environment: (1.5, 0.25))
    return ["--rounds", "1", "--batch_size", "2", "--sequence_length", "16384", "--minutes", "0.1", "--iterations", "1", "--device", "cpu",
            "--json", str(tmp_path / "bench.json")]


def test_the_reference_is_the_course_s_model():
    torch.manual_seed(0)
    ours = build_model("onf", Sizes(4, 8, 8), parse_recipe("course,combined_unit=8"))
    plain = reference.OnsetsAndFrames(4, 8, 8)
    plain.load_state_dict({name: value for name, value in ours.state_dict().items() if name not in ("level", "velocity")})
    audio = 0.1 * torch.randn(2, 16384)
    with torch.inference_mode():
        for name in ("frame", "onset"):
            torch.testing.assert_close(dict(zip(("frame", "onset"), plain.eval()(audio)))[name],
                                       dict(zip(("frame", "onset"), ours.eval()(audio)))[name])


def test_the_reference_cuts_alike():
    audio = audio_to_int16(np.random.default_rng(0).uniform(-1, 1, 160000))
    recordings = [Recording("noise", audio, random_notes(0, 10, 40))]
    theirs, ours = (data(recordings, 51200, 0).cut(0, 150) for data in (reference.Recordings, Segments))
    assert ours["onset"].sum() > 0
    for name in theirs:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0)


def test_the_reference_clips_each_parameter_by_itself():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"frame": torch.nn.Linear(4, 88), "onset": torch.nn.Linear(4, 88)})
    net.forward = lambda audio: (net["frame"](audio), net["onset"](audio))
    batch = {"audio": 1e6 * torch.randn(2, 4), "frame": torch.ones(2, 88), "onset": torch.zeros(2, 88)}
    reference.training_step(net, torch.optim.SGD(net.parameters(), 0.0), batch)
    norms = [parameter.grad.norm().item() for parameter in net.parameters() if parameter.dim() == 2]
    assert norms == pytest.approx([reference.MAX_NORM] * 2)


def test_flops_are_counted():
    """A linear layer of 3 x 5 on 2 frames: 15 multiplications and 15 additions for each."""
    net = torch.nn.Sequential(torch.nn.Unflatten(1, (2, 256)), torch.nn.Linear(256, 5))
    assert bench.forward_flops(net, 1) == 2 * 2 * 256 * 5
    mel_bands, units = 229, 88
    conv = 2 * 9 * (48 * mel_bands + 48 * 48 * mel_bands + 48 * 96 * (mel_bands // 2)) + 2 * 96 * (mel_bands // 4) * 256
    lstms = sum(2 * 2 * 4 * units * (first + units + 2 * units + units) for first in (256, 176))
    linear = 2 * 256 * 88 + 2 * 2 * 176 * 88
    assert bench.forward_flops(reference.OnsetsAndFrames()) == 2 * conv + lstms + linear


@pytest.mark.parametrize("which, lines", [
    ("train", ["training step, 2 x 16384", "- arithmetic", "- of it augmentation", "- this machine's convolution, float32"]),
    ("transcribe", ["transcription, 0.1 min", "- inference", "transcribe.py, 0.05 min", "- peak memory"]),
    ("data", ["loading 2 x 2 s, second time", "labels of 2 min", "- peak memory with 0.2 h of data"]),
    ("decode", ["decoding 0.5 min", "scoring 1 min", "- peak memory"]),
    ("startup", ["train.py --help", "prepare.py --help"]),
    ("accuracy", ["1 steps of 2 x 16384", "- validation note/f1", "- validation note-with-offsets/f1"])])
def test_every_part_runs(which, lines, toy, data_folder, tmp_path, capsys):
    assert bench.main([which, *toy, "--data", str(data_folder)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["what"]: row for row in report["rows"]}
    assert {"cpu", "threads", "gpu", "python", "torch"} <= report["machine"].keys() and report["arguments"]["batch_size"] == 2
    printed = capsys.readouterr().out
    for line in lines:
        assert f"\n{line} " in printed and len(rows[line]["ours"]) == 1 and rows[line]["ours"][0] >= 0
    assert rows[lines[0]]["ratio"] > 0


def test_sides_take_turns_and_the_first_round_is_dropped(toy):
    done = []

    def make(name):
        return lambda: done.append(name) or {"count": len(done)}

    found = measure.take_turns(2, {"a": lambda: make("a"), "b": lambda: make("b")})
    assert done == ["a", "b"] * 3
    assert (found["a"]["count"], found["b"]["count"]) == ([3, 5], [4, 6])


def test_a_side_has_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(measure, "works", {})
    found = measure.take_turns(1, {"ours": partial(bench.decoding, 0.1, extract_notes)})
    assert found["ours"]["notes"][0] > 0 and not measure.works


def test_a_process_is_measured():
    seconds, peak = measure.run_process("-c", "import os; assert os.environ['NAME'] == 'value'; bytearray(800_000_000)", NAME="value")
    assert seconds > 0 and 0.8 < peak < 8
    with pytest.raises(OSError, match="no such thing"):
        measure.run_process("-c", "raise SystemExit('no such thing')")


def test_scaling_compares_one_process_with_two(toy, monkeypatch):
    """torchrun's own part is left out: a lone process writes its seconds, then two are said to take as long."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}

    def torchrun(*command: str, **_: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert bench.main(list(command[command.index("scaling"):])) == 0

    monkeypatch.setattr(bench, "run_process", torchrun)
    row, = bench.bench_scaling(bench.parse_args(["scaling", *toy]))
    assert len(row.ours) == len(row.base) == 1 and min(row.ours + row.base) > 0
    assert "efficiency" in row.note


@pytest.mark.parametrize("half", [True, False])
def test_accuracy_compares_with_float32(half, toy, data_folder, tmp_path, monkeypatch):
    """On a machine that multiplies bfloat16 and on one that only keeps it; and with convolutions of floats, where this one infers in bytes."""
    seen, cpu = [], torch.device("cpu")
    monkeypatch.setattr(layers, "keeps_bfloat16", lambda device: True)
    for module in (model, train):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16, enabled=half))
    monkeypatch.setattr(train, "clip_gradients", lambda *_: None)
    features = model.Transcriber.features
    monkeypatch.setattr(model.Transcriber, "features", lambda self, mel: seen.append(
        (torch.is_autocast_enabled("cpu"), layers.keeps_bfloat16(cpu), model.multiplies_bytes(cpu))) or features(self, mel))
    args = bench.parse_args(["accuracy", *toy, "--data", str(data_folder)])
    for fast in (True, False):
        bench.training_run(args, tmp_path, fast)()
        assert set(seen) == {(fast and half, fast, fast and multiplies_bytes(cpu))}
        seen.clear()


@pytest.mark.parametrize("flags, message", [
    (["accuracy", "--data", "nowhere"], "bench.py: train.py did not come to its end"),
    (["decode", "--json", "README.md/bench.json"], "bench.py: README.md/bench.json: cannot be written"),
    (["train", "--device", "abacus"], "bench.py: device 'abacus'")])
def test_what_cannot_be_done_is_said(flags, message, toy, capsys):
    assert bench.main([flags[0], *toy, *flags[1:]]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("flags", [["accuracy"], ["train", "--rounds", "0"], ["train", "--sequence_length", "100"]])
def test_flags_that_make_no_sense(flags):
    with pytest.raises(SystemExit, match="2"):
        bench.parse_args(flags)


def test_ratios_say_how_many_times_faster():
    assert measure.Row("a step", [1.0, 2.0, 9.0], [5.0, 6.0, 100.0]).ratio() == 3
    assert measure.Row("F1", [0.9], [0.8], unit="").ratio() is None
    table = measure.format_table([measure.Row("a step", [1.0, 2.0, 9.0], [5.0, 6.0, 100.0], note="so"), measure.Row("peak", [1500.0], unit="GB")])
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["a", "step", "2", "s", "[1..9]", "reference", "6", "s", "[5..100]", "3", "so"], ["peak", "1500", "GB", "[1500..1500]"]]
