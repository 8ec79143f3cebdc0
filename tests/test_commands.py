"""What the commands share."""

import io
import os
import subprocess
import sys
from pathlib import Path

import prepare
from commands import exit_status_of
from files import write_json


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


def test_who_reads_the_output_may_stop(tmp_path):
    (tmp_path / "a.py").write_text("import sys\nfrom commands import exit_status_of\n"
                                   "sys.exit(exit_status_of('a.py', lambda: print('1234567\\n' * 100000) or 0, ''))")
    found = subprocess.run(f"{sys.executable} a.py | head -1; echo ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", cwd=tmp_path,
                           env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("1234567\n141\n", "")
