"""The tool that made the released `harmonic` wider, on small models of our own."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

from constants import HOP_SIZE
from model import Sizes, build_model, load_checkpoint, read_checkpoint, save_checkpoint

sys.path.insert(0, str(ROOT / "runs" / "released"))

import widen  # noqa: E402  # after the path


def test_a_wide_lstm_and_its_output_say_what_the_narrow_ones_said():
    torch.manual_seed(0)
    narrow, wide = ({"lstm": nn.LSTM(5, hidden, batch_first=True, bidirectional=True), "fc": nn.Linear(2 * hidden, 2)} for hidden in (3, 7))
    for name in wide:
        own = wide[name].state_dict()
        wide[name].load_state_dict({key: widen.widened(f"{name}.{key}", value, own[key]) for key, value in narrow[name].state_dict().items()})
    x = torch.randn(2, 9, 5)
    torch.testing.assert_close(*(model["fc"](model["lstm"](x)[0]) for model in (narrow, wide)))
    wide["fc"](wide["lstm"](x)[0]).sum().backward()
    assert wide["fc"].weight.grad.all(), "what is new can be learnt"


def test_a_wide_checkpoint_says_what_the_narrow_one_said(tmp_path: Path):
    torch.manual_seed(1)
    narrow, audio = build_model("harmonic", Sizes(cnn_unit=5)), 0.1 * torch.randn(2, 20 * HOP_SIZE)
    narrow(audio)  # so that batch norms have seen some
    save_checkpoint(tmp_path / "narrow.pt", narrow.eval(), step=7, optimizer={})
    assert widen.main([str(tmp_path / "narrow.pt"), str(tmp_path / "wide.pt")]) == 0
    wide, state = load_checkpoint(tmp_path / "wide.pt"), read_checkpoint(tmp_path / "wide.pt")
    assert wide.sizes == Sizes() and state["step"] == 7 and "optimizer" not in state
    with torch.no_grad():
        for a, b in zip(narrow(audio), wide(audio)):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["missing", "another model"])
def test_what_cannot_be_widened_is_said_in_a_line(tmp_path: Path, capsys, kind: str):
    if kind == "another model":
        save_checkpoint(tmp_path / "narrow.pt", build_model("rnn", Sizes(4, 8, 8)))
    assert widen.main([str(tmp_path / "narrow.pt"), str(tmp_path / "wide.pt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("widen.py: ") and error.count("\n") == 1 and not (tmp_path / "wide.pt").exists()
