"""The benchmark at toy size, in one process, and its reference against the project's own functions."""

import json
from concurrent.futures import Future

import bench
import numpy as np
import pytest
import reference
import torch
from conftest import random_notes

from dataset import Recording, Segments, audio_to_int16
from evaluate import extract_notes
from model import RECIPES, Sizes, build_model


class SameProcess:
    """An executor that works here and now: to start processes takes longer than all of this."""

    def __init__(self, *_):
        bench.works.clear()

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
    for name, value in {"ProcessPoolExecutor": SameProcess, "SIZES": Sizes(4, 8), "RECORDING_SECONDS": 12, "DATA_HOURS": (1, 2), "DRAWN": 2,
                        "LOADED": (2, 2), "LENGTHS": [0.05], "DECODED": 0.5, "PROCESS_ROUNDS": 1, "RATE_SECONDS": 0}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "run_process", lambda *command, **environment: (1.5, 0.25))
    return ["--rounds", "1", "--batch_size", "2", "--sequence_length", "16384", "--minutes", "0.1", "--iterations", "1", "--device", "cpu",
            "--json", str(tmp_path / "bench.json")]


@pytest.fixture(scope="module")
def rolls() -> tuple[np.ndarray, np.ndarray]:
    """Onset and frame probabilities that rise and fall slowly and everywhere."""
    noise = np.random.default_rng(0).standard_normal((2, 302, 88))
    return tuple((1 / (1 + np.exp(-(noise[:, 2:] + noise[:, 1:-1] + noise[:, :-2])))).astype(np.float32))


def test_the_reference_is_the_course_s_model():
    torch.manual_seed(0)
    ours = build_model("onf", Sizes(4, 8, 8), RECIPES["course"])
    plain = reference.OnsetsAndFrames(4, 8, 8)
    plain.load_state_dict(ours.state_dict())
    audio = 0.1 * torch.randn(2, 16384)
    with torch.inference_mode():
        for name in ("frame", "onset"):
            torch.testing.assert_close(dict(zip(("frame", "onset"), plain.eval()(audio)))[name],
                                       dict(zip(("frame", "onset"), ours.eval()(audio)))[name])


def test_the_reference_decodes_alike(rolls):
    theirs, ours = reference.extract_notes(*rolls), extract_notes(*rolls)
    assert len(ours) > 1000
    np.testing.assert_array_equal(theirs.intervals, ours.intervals)
    np.testing.assert_array_equal(theirs.pitches, ours.pitches)


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
    ("train", ["training step, 2 x 16384", "- arithmetic", "- this machine's convolution, bfloat16"]),
    ("transcribe", ["transcription, 0.1 min", "- inference", "transcribe.py, 0.05 min", "- peak memory"]),
    ("data", ["loading 2 x 2 s, second time", "segments and labels of an hour", "- peak memory with 2 h of data"]),
    ("decode", ["decoding 0.5 min"]),
    ("startup", ["train.py --help", "prepare.py --help"]),
    ("accuracy", ["1 steps of 2 x 16384", "- validation note F1"])])
def test_every_part_runs(which, lines, toy, data_folder, tmp_path, capsys):
    assert bench.main([which, *toy, "--data", str(data_folder)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["what"]: row for row in report["rows"]}
    assert {"cpu", "threads", "gpu", "python", "torch"} <= report["machine"].keys() and report["arguments"]["batch_size"] == 2
    for line in lines:
        assert line in capsys.readouterr().out or line in rows
        assert all(np.isfinite(rows[line]["ours"]))
    assert len(next(iter(rows.values()))["ours"]) == 1
    assert next(iter(rows.values()))["ratio"] > 0
