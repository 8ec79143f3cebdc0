"""What the commands share."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prepare
from commands import exit_status_of
from dataset import COLUMNS
from files import write_json

ROOT = Path(__file__).resolve().parents[1]


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def test_what_a_terminal_cannot_show_becomes_an_escape(monkeypatch):
    for encoding, shown in (("ascii", b"Fr\\xe9d\\udce9 \\u03a9"), ("cp1252", b"Fr\xe9d\\udce9 \\u03a9"), ("utf-8", "Fréd\\udce9 Ω".encode())):
        monkeypatch.setattr(sys, "stdout", terminal(encoding))
        assert exit_status_of("a.py", lambda: print("Fréd\udce9 Ω", end="") or 0, "") == 0
        assert sys.stdout.buffer.getvalue() == shown


def test_standard_output_may_be_no_terminal(monkeypatch):
    for stream in (io.StringIO(), None):  # a notebook's; that of a Windows program without a window
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_status_of("a.py", lambda: print("Ω") or 3, "") == 3


def test_a_command_names_what_the_terminal_cannot_show(tmp_path, monkeypatch):
    write_json(tmp_path / "data.json", [{"canonical_composer": "Ω", "canonical_title": "\udce9", "split": "test", "year": 1,
                                         "midi_filename": "\u03a9.mid", "audio_filename": "Ω.flac", "duration": 1.0}])
    monkeypatch.setattr(sys, "stdout", terminal("ascii"))
    assert prepare.main(["check", str(tmp_path), "--num_workers", "1"]) == 1
    assert b"\\u03a9.flac" in sys.stdout.buffer.getvalue()


def test_ctrl_c_ends_in_a_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert exit_status_of("a.py", work, "all is well") == 130
    assert capsys.readouterr() == ("", "a.py: interrupted; all is well\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_too_little_memory_ends_in_a_line(error, capsys):
    def work():
        raise error

    assert exit_status_of("a.py", work, "") == 1
    assert capsys.readouterr().err.startswith("a.py: not enough memory; ")


def test_other_errors_of_torch_are_not_taken_for_that():
    def work():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_status_of("a.py", work, "")


def test_who_reads_the_output_may_stop(tmp_path):
    """More lines than a pipe holds, all but the first for nobody."""
    rows = [dict.fromkeys(COLUMNS, "x") | {"split": "test", "duration": 1.0, "audio_filename": f"{number:090}.flac"} for number in range(1000)]
    write_json(tmp_path / "data.json", rows)
    command = f"'{sys.executable}' '{ROOT / 'prepare.py'}' check . --num_workers 1 | head -1; echo ${{PIPESTATUS[0]}}"
    env = {name: value for name, value in os.environ.items() if name != "CI"}  # where pyfluidsynth prints a line of its own
    found = subprocess.run(command, shell=True, executable="/bin/bash", cwd=tmp_path, env=env, capture_output=True, text=True)
    first, status = found.stdout.splitlines()
    assert "0.flac: " in first and status == "141" and "Broken" not in found.stderr and "Traceback" not in found.stderr
