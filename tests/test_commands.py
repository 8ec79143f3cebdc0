"""What the commands share."""

import io
import sys

import prepare
from commands import print_any_name
from files import write_json


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def test_what_a_terminal_cannot_show_becomes_an_escape(monkeypatch):
    for encoding, shown in (("ascii", b"Fr\\xe9d\\udce9 \\u03a9"), ("cp1252", b"Fr\xe9d\\udce9 \\u03a9"), ("utf-8", "Fréd\\udce9 Ω".encode())):
        monkeypatch.setattr(sys, "stdout", terminal(encoding))
        print_any_name()
        print("Fréd\udce9 Ω", end="")
        assert sys.stdout.buffer.getvalue() == shown


def test_standard_output_may_be_no_terminal(monkeypatch):
    for stream in (io.StringIO(), None):  # a notebook's; that of a Windows program without a window
        monkeypatch.setattr(sys, "stdout", stream)
        print_any_name()


def test_a_command_names_what_the_terminal_cannot_show(tmp_path, monkeypatch):
    write_json(tmp_path / "data.json", [{"canonical_composer": "Ω", "canonical_title": "\udce9", "split": "test", "year": 1,
                                         "midi_filename": "\u03a9.mid", "audio_filename": "Ω.flac", "duration": 1.0}])
    monkeypatch.setattr(sys, "stdout", terminal("ascii"))
    assert prepare.main(["check", str(tmp_path), "--num_workers", "1"]) == 1
    assert b"\\u03a9.flac" in sys.stdout.buffer.getvalue()
