"""The tool that averages checkpoints, on small models of our own."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from constants import HOP_SIZE
from model import Sizes, build_model, load_checkpoint, read_checkpoint, save_checkpoint, write_state
from recipe import RECIPES

sys.path.insert(0, str(ROOT / "runs" / "released"))

import average  # noqa: E402  # after the path

SMALL = Sizes(4, 8, 8)


def checkpoint(path: Path, seed: int, sizes: Sizes = SMALL, **changes: float) -> Path:
    torch.manual_seed(seed)
    model = build_model("rnn", sizes, dataclasses.replace(RECIPES["default"], **changes))
    model(0.1 * torch.randn(2, 20 * HOP_SIZE))  # so that batch norms have seen some
    model.thresholds = {"onset": 0.05, "frame": 0.05}  # which tuning never gives
    save_checkpoint(path, model, step=seed, optimizer={}, scheduler={})
    return path


def test_weights_are_averaged_and_thresholds_tuned(tmp_path: Path, data_folder: Path, capsys):
    paths = [checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (1, 2, 3)]
    assert average.main([*map(str, paths), str(tmp_path / "mean.pt"), "--data", str(data_folder)]) == 0
    *states, mean = [read_checkpoint(path) for path in (*paths, tmp_path / "mean.pt")]
    for name, value in mean["weights"].items():
        if name == "velocity":  # at first one for all, and now learnt
            assert not torch.equal(value, states[0]["weights"][name])
        elif value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([state["weights"][name] for state in states]).mean(dim=0))
    assert mean["step"] == 3 and not mean.keys() & {"optimizer", "scheduler"}
    assert mean["thresholds"] == load_checkpoint(tmp_path / "mean.pt").thresholds != states[0]["thresholds"]
    assert "metric/note-with-offsets/f1" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["sizes", "recipe", "layers", "missing", "no data"])
def test_what_cannot_be_averaged_is_said_in_a_line(tmp_path: Path, data_folder: Path, capsys, other: str):
    last = checkpoint(tmp_path / "last.pt", 0)
    first = tmp_path / "first.pt"
    if other != "missing":
        checkpoint(first, 1, Sizes(4, 16, 8) if other == "sizes" else SMALL, **({"room": 0.1} if other == "recipe" else {}))
    if other == "layers":  # of a version whose models had one less
        state = read_checkpoint(first)
        del state["weights"]["level"]
        write_state(first, state)
    data = tmp_path / "nowhere" if other == "no data" else data_folder
    assert average.main([str(first), str(last), str(tmp_path / "mean.pt"), "--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("average.py: ") and error.count("\n") == 1 and not (tmp_path / "mean.pt").exists()
    assert ("first.pt" if other != "no data" else "nowhere") in error


def test_a_forgotten_out_overwrites_nothing(tmp_path: Path, data_folder: Path, capsys):
    paths = [checkpoint(tmp_path / f"{seed}.pt", seed) for seed in (1, 2)]
    before = [path.read_bytes() for path in paths]
    assert average.main([*map(str, paths), "--data", str(data_folder)]) == 1
    assert capsys.readouterr().err == f"average.py: {paths[1]}: is there already; the last file named is the one to write\n"
    assert [path.read_bytes() for path in paths] == before
