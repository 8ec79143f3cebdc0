"""Data folders, made from sources that are made on the spot."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretty_midi
import pytest
import soundfile
from conftest import play, random_notes, write_tones

import prepare
from audio import default_soundfont, has_fluidsynth, load_audio, render_midi
from constants import HOP_SIZE, SAMPLE_RATE
from dataset import COLUMNS, load_split, read_table
from evaluate import write_results
from files import write_json
from notes import Notes, notes_to_midi, read_midi, write_midi
from prepare import legato_pedal, main

needs_fluidsynth = pytest.mark.skipif(not has_fluidsynth(), reason="libfluidsynth is not installed")
ONE = ["--num_workers", "1"]
PATIENCE = 60  # seconds; no test here takes a tenth of it


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A worker that waits for ever is ended, so that its test fails and the others go on."""
    def give_up(*_):
        for child in multiprocessing.active_children():
            child.kill()

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(*arguments: object) -> int:
    return main([*map(str, arguments), *ONE])


def times_of(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("**/*.*") if path.suffix != ".json"}


def no_leftovers(folder: Path) -> bool:
    return not list(folder.glob("**/*.tmp*"))


def level(audio: np.ndarray, start: float, stop: float) -> float:
    return float(np.abs(audio[round(start * SAMPLE_RATE) : round(stop * SAMPLE_RATE)]).max())


# --- demo ---

@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(prepare, "DEMO_COUNTS", {"train": 2, "validation": 1, "test": 1})
    monkeypatch.setattr(prepare, "DEMO_SECONDS", 8)


@pytest.mark.parametrize("with_fluidsynth", [pytest.param(True, marks=needs_fluidsynth), False])
def test_the_demo_set_trains_what_it_sounds(tmp_path, monkeypatch, capsys, small_demo, with_fluidsynth):
    monkeypatch.setattr(prepare, "has_fluidsynth", lambda: with_fluidsynth)
    assert run("demo", tmp_path / "demo") == 0
    said = capsys.readouterr().out
    assert "4 recordings (2 train, 1 validation, 1 test)" in said and "0 were there, 0 failed" in said
    assert ("libfluidsynth is missing" in said) != with_fluidsynth
    rows = read_table(tmp_path / "demo")
    assert [row["split"] for row in rows] == ["train", "train", "validation", "test"]
    contents = set()
    for row in rows:
        audio, notes = load_audio(tmp_path / "demo" / row["audio_filename"]), read_midi(tmp_path / "demo" / row["midi_filename"])
        contents.add(notes.intervals.tobytes())
        assert abs(len(audio) / SAMPLE_RATE - row["duration"]) < 0.001
        assert len(notes) >= 5 and notes.intervals.max() <= row["duration"]
        first = notes.intervals[0, 0]
        assert level(audio, 0, first - 0.01) < 0.1 * level(audio, first, first + 0.1)  # it sounds from its first onset on
        assert 0.02 < abs(audio).max() <= 1
    assert len(contents) == 4
    assert no_leftovers(tmp_path)


@needs_fluidsynth
def test_rendering_in_this_process_first_does_not_hang_the_workers(tmp_path, small_demo):
    """As a notebook does: FluidSynth loads a SoundFont with OpenMP, which does not survive a fork."""
    list(render_midi(notes_to_midi(Notes([[0.1, 0.2]], [60], [80]))))
    assert run("demo", tmp_path) == 0


@pytest.mark.skipif(os.name == "nt", reason="a terminal's Ctrl-C is another thing there")
@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_ctrl_c_and_sigterm_wait_for_the_recordings_at_hand_and_leave_no_workers(tmp_path, number, to_all):
    """A terminal sends Ctrl-C to all processes, the idle one too."""
    code = """
import signal, sys, prepare, slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background would ignore it
try:
    with prepare.process_pool(2) as pool:
        last = pool.submit(slow.pause_then_write, sys.argv[1])
        pool.submit(len, "").result()
        print("ready", flush=True)
        last.result()
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
"""
    (tmp_path / "slow.py").write_text("import pathlib, time\ndef pause_then_write(path):\n    time.sleep(1)\n    pathlib.Path(path).touch()\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(prepare.__file__).parent)])}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "done")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=environment)
    assert "ready\n" in iter(process.stdout.readline, "")  # pyfluidsynth may say first where it found its library
    (os.killpg if to_all else os.kill)(process.pid, number)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and (tmp_path / "done").exists()  # all have closed their standard error


def test_a_demo_piece_hangs_on_its_seed_alone():
    def said(midi: pretty_midi.PrettyMIDI) -> list[tuple]:
        return [(note.start, note.end, note.pitch, note.velocity) for note in midi.instruments[0].notes]

    assert said(prepare.demo_piece(3)) == said(prepare.demo_piece(3)) != said(prepare.demo_piece(4))


def test_demo_pieces_hold_what_a_transcriber_has_to_learn():
    pieces = [prepare.demo_piece(seed).instruments[0] for seed in range(10)]
    pedalled = [any(change.value >= 64 for change in piece.control_changes) for piece in pieces]
    velocities = [note.velocity for piece in pieces for note in piece.notes]
    assert any(pedalled) and min(velocities) < 40 and max(velocities) > 95
    for piece in pieces:
        assert all(21 <= note.pitch <= 108 and note.end > note.start for note in piece.notes)
        by_pitch: dict[int, list] = {}
        for note in sorted(piece.notes, key=lambda note: note.start):
            by_pitch.setdefault(note.pitch, []).append(note)
        assert all(a.end < b.start for notes in by_pitch.values() for a, b in zip(notes, notes[1:]))  # a key is up before it is struck


def test_what_was_made_is_not_made_again(tmp_path, monkeypatch, capsys, small_demo):
    monkeypatch.setattr(prepare, "has_fluidsynth", lambda: False)
    out = tmp_path / "demo"
    assert run("demo", out) == 0
    table, before = (out / "data.json").read_text(), times_of(out)
    lost = "train/demo01.flac"
    (out / lost).unlink()
    (out / "data.json").unlink()  # as if it had been stopped
    capsys.readouterr()
    assert run("demo", out) == 0
    assert "3 were there, 0 failed" in capsys.readouterr().out
    after = times_of(out)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {lost, "train/demo01.midi"}
    assert (out / "data.json").read_text() == table


def test_a_broken_file_that_was_there_is_named(tmp_path, monkeypatch, capsys, small_demo):
    monkeypatch.setattr(prepare, "has_fluidsynth", lambda: False)
    run("demo", tmp_path)
    (tmp_path / "train" / "demo00.flac").write_bytes(b"half")
    capsys.readouterr()
    assert run("demo", tmp_path) == 1
    said = capsys.readouterr()
    assert "demo00.flac: is broken, delete it and run again" in said.err
    assert "3 recordings" in said.out and "1 failed" in said.out
    assert len(read_table(tmp_path)) == 3


# --- maestro ---

@pytest.fixture
def download(tmp_path) -> Path:
    """An official download as it unpacks: 44.1 kHz stereo, two years, one chamber recording among the train split."""
    source, rows = tmp_path / "maestro-v2.0.0", []
    for number, split in enumerate(["train"] * 5 + ["validation"] * 2 + ["test"] * 2):
        year, name = (2009, 2018)[number % 2], "Chamber3" if number == 4 else f"R{number}"
        folder = source / str(year)
        folder.mkdir(parents=True, exist_ok=True)
        notes = random_notes(number, 1.0, 3)
        time = np.arange(44100) / 44100
        stereo = np.stack([0.3 * np.sin(2 * np.pi * 440 * time), 0.1 * np.sin(2 * np.pi * 440 * time)], axis=1)
        soundfile.write(folder / f"{name}.wav", stereo, 44100)
        write_midi(folder / f"{name}.midi", notes)
        rows.append({"canonical_composer": "Frédéric Chopin", "canonical_title": f"Étude, No. {number}", "split": split, "year": year,
                     "midi_filename": f"{year}/{name}.midi", "audio_filename": f"{year}/{name}.wav", "duration": 1.0})
    with open(source / "maestro-v2.0.0.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(COLUMNS))
        table.writeheader()
        table.writerows(rows)
    return source


def chosen(folder: Path) -> list[str]:
    return [row["midi_filename"] for row in read_table(folder)]


def test_a_subset_of_maestro(tmp_path, download, capsys):
    out = tmp_path / "out"
    assert run("maestro", download, out, "--train", 2, "--validation", 1, "--test", 1) == 0
    rows, official = read_table(out), {row["midi_filename"]: row for row in read_table(download)}
    assert [row["split"] for row in rows] == ["train", "train", "validation", "test"]
    assert {row["year"] for row in rows[:2]} == {"2009", "2018"}  # the years in turn
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert all(row[key] == official[row["midi_filename"]][key] for key in ("split", "canonical_composer", "canonical_title", "year"))
        about = soundfile.info(out / row["audio_filename"])
        assert (about.format, about.subtype, about.samplerate, about.channels) == ("FLAC", "PCM_16", 16000, 1)
        audio = load_audio(out / row["audio_filename"])
        assert len(audio) == SAMPLE_RATE and row["duration"] == 1.0
        assert abs(np.fft.rfft(audio)).argmax() == 440 and abs(abs(audio[1000:-1000]).max() - 0.2) < 0.005
        assert (out / row["midi_filename"]).read_bytes() == (download / row["midi_filename"]).read_bytes()
    assert len(load_split(out, "train")) == 2
    said = capsys.readouterr().out
    assert said.startswith("4 recordings chosen; ") and "4 recordings (2 train, 1 validation, 1 test), 0.1 minutes" in said


def test_the_choice_is_fixed(tmp_path, download):
    counts = ("--train", 2, "--validation", 1, "--test", 1)
    for name in ("one", "two"):
        assert run("maestro", download, tmp_path / name, *counts) == 0
    assert chosen(tmp_path / "one") == chosen(tmp_path / "two")
    # nor does it hang on the table's order, and a larger choice holds the smaller
    rows = read_table(download)
    small, large = ({row["midi_filename"] for row in prepare.choose_maestro(some, {"train": count})}
                    for some, count in ((rows, 2), (rows[::-1], 3)))
    assert small == set(chosen(tmp_path / "one")[:2]) and small < large


def test_a_subset_has_no_chamber_music_and_all_has_everything(tmp_path, download):
    assert run("maestro", download, tmp_path / "subset") == 0  # asks for more than there is
    assert len(chosen(tmp_path / "subset")) == 8 and not [name for name in chosen(tmp_path / "subset") if "Chamber" in name]
    assert run("maestro", download, tmp_path / "all", "--all") == 0
    assert chosen(tmp_path / "all") == [row["midi_filename"] for row in read_table(download)]


def test_a_missing_recording_is_named_and_the_others_are_kept(tmp_path, download, capsys):
    (download / "2018" / "R1.wav").unlink()
    shutil.copy(download / "2009" / "R2.midi", download / "2009" / "kept.midi")
    (download / "2009" / "R2.midi").write_text("no MIDI")
    out = tmp_path / "out"
    assert run("maestro", download, out, "--all") == 1
    said = capsys.readouterr()
    complaints = [line for line in said.err.splitlines() if line.startswith("prepare.py: ")]
    assert len(complaints) == 2
    assert any("2018/R1.wav: is named in the table and not on the disk" in line for line in complaints)
    assert any("2009/R2.midi: is not a whole MIDI file" in line for line in complaints)
    assert "7 recordings" in said.out and "0 were there, 2 failed" in said.out
    assert len(read_table(out)) == 7 and len(list(out.glob("**/*.flac"))) == 7 and no_leftovers(out)
    # the source mended, it goes on where it was
    before = times_of(out)
    shutil.copy(download / "2018" / "R3.wav", download / "2018" / "R1.wav")
    shutil.copy(download / "2009" / "kept.midi", download / "2009" / "R2.midi")
    assert run("maestro", download, out, "--all") == 0
    assert "9 recordings" in (said := capsys.readouterr().out) and "7 were there, 0 failed" in said
    assert before.items() <= times_of(out).items()


def test_a_source_that_is_none(tmp_path, capsys):
    assert run("maestro", tmp_path / "lost", tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"prepare.py: {tmp_path}/lost: is no folder")
    (tmp_path / "empty").mkdir()
    for command, message in (("maestro", "holds neither data.json"), ("maps", "holds no PIANO/MUS"), ("check", "holds neither data.json")):
        assert run(command, tmp_path / "empty", *([] if command == "check" else [tmp_path / "out"])) == 1
        assert capsys.readouterr().err.startswith(f"prepare.py: {tmp_path}/empty: {message}")
    assert not (tmp_path / "out").exists()


# --- maps ---

def write_maps(source: Path, piano: str, composition: str, table: list[tuple], played: Notes) -> Path:
    folder = source / piano / "MUS"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"MAPS_MUS-{composition}_{piano}.wav"
    soundfile.write(path, np.tile(0.1 * np.sin(np.arange(11025) / 10)[:, None], (1, 2)), 44100)
    path.with_suffix(".txt").write_text("OnsetTime\tOffsetTime\tMidiPitch\r\n" + "".join(f"{a}\t{b}\t{pitch}\r\n" for a, b, pitch in table))
    write_midi(path.with_suffix(".mid"), played)
    return path


LIST = [(0.05, 0.24, 60), (0.1, 0.2, 64), (0.15, 0.2, 67)]
PLAYED = Notes([[0.0501, 0.1], [0.1, 0.2]], [60, 64], [33, 99])  # as the keys went; the list knows what the pedal held


def test_maps_keeps_the_test_pianos_compositions_out_of_train(tmp_path, capsys):
    source, out = tmp_path / "MAPS", tmp_path / "out"
    pieces = [f"mz_{number}" for number in range(12)]
    for piece in pieces:
        for piano in ("AkPnBcht", "StbgTGd2"):
            write_maps(source, piano, piece, LIST, PLAYED)
    for piano, piece in (("ENSTDkAm", pieces[0]), ("ENSTDkCl", "only-here")):
        write_maps(source, piano, piece, LIST, PLAYED)
    isolated = source / "AkPnBcht" / "ISOL"
    isolated.mkdir()
    shutil.copy(source / "AkPnBcht" / "MUS" / "MAPS_MUS-mz_1_AkPnBcht.wav", isolated)
    assert run("maps", source, out) == 0
    rows = read_table(out)
    assert len(rows) == 2 * 11 + 2
    tested = {(row["year"], row["canonical_title"]) for row in rows if row["split"] == "test"}
    assert tested == {("ENSTDkAm", "mz_0"), ("ENSTDkCl", "only-here")}
    assert {row["canonical_title"] for row in rows if row["split"] != "test"} == set(pieces[1:])
    split_of = {(row["canonical_title"], row["split"]) for row in rows}
    assert len(split_of) == 12 + 1  # each composition in one split
    assert {split for _, split in split_of} == {"train", "validation", "test"}
    assert "2 test" in capsys.readouterr().out
    assert soundfile.info(out / rows[0]["audio_filename"]).samplerate == SAMPLE_RATE
    assert rows[0]["duration"] == 0.25
    assert run("maps", source, out) == 0
    assert "24 were there" in capsys.readouterr().out


def test_maps_notes_come_from_the_list_and_velocities_from_the_midi(tmp_path):
    write_maps(tmp_path / "MAPS", "AkPnBcht", "mz_1", LIST, PLAYED)
    assert run("maps", tmp_path / "MAPS", tmp_path / "out") == 0
    notes = read_midi(tmp_path / "out" / read_table(tmp_path / "out")[0]["midi_filename"])
    assert notes.pitches.tolist() == [60, 64, 67]
    np.testing.assert_allclose(notes.intervals, [row[:2] for row in LIST], atol=0.001)
    assert notes.velocities.tolist() == [33, 99, prepare.NO_VELOCITY]


def test_maps_may_be_named_from_within(tmp_path, monkeypatch):
    """Where a piano's folder is the current one, its name is not in the paths."""
    write_maps(tmp_path / "MAPS", "AkPnBcht", "mz_1", LIST, PLAYED)
    monkeypatch.chdir(tmp_path / "MAPS" / "AkPnBcht")
    assert run("maps", ".", tmp_path / "out") == 0
    assert read_table(tmp_path / "out")[0]["audio_filename"] == "AkPnBcht/MAPS_MUS-mz_1_AkPnBcht.flac"


def test_maps_link_has_the_piano_it_is_named_after(tmp_path):
    write_maps(tmp_path / "disk 1", "ENSTDkAm", "mz_1", LIST, PLAYED)
    (tmp_path / "disk 1" / "ENSTDkAm").rename(tmp_path / "disk 1" / "part 2")
    (tmp_path / "ENSTDkAm").symlink_to(tmp_path / "disk 1" / "part 2")
    assert run("maps", tmp_path / "ENSTDkAm", tmp_path / "out") == 0
    assert [(row["split"], row["canonical_title"]) for row in read_table(tmp_path / "out")] == [("test", "mz_1")]


def test_broken_maps_files_are_named(tmp_path, capsys):
    source, out = tmp_path / "MAPS", tmp_path / "out"
    broken = {name: write_maps(source, "AkPnBcht", name, LIST, PLAYED) for name in ("words", "columns", "lost", "silent", "good")}
    broken["words"].with_suffix(".txt").write_text("OnsetTime OffsetTime MidiPitch\nno numbers here\n")
    broken["columns"].with_suffix(".txt").write_text("OnsetTime OffsetTime\n0.1 0.2\n")
    broken["lost"].with_suffix(".txt").unlink()
    broken["silent"].write_bytes(b"")
    assert run("maps", source, out) == 1
    complaints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prepare.py: ")]
    assert len(complaints) == 4
    for message in ("words_AkPnBcht.txt: is not a MAPS note list (", "columns_AkPnBcht.txt: is not a MAPS note list of three columns",
                    "lost_AkPnBcht.txt", "silent_AkPnBcht.wav: is empty"):
        assert any(message in line for line in complaints), message
    assert [row["canonical_title"] for row in read_table(out)] == ["good"]


# --- render ---

def performances(folder: Path) -> Path:
    for name in ("Bach/Fugue 1/a.mid", "Bach/Fugue 1/b.MID", "Sonata Op.27 No.2.midi"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_midi(folder / name, Notes([[0.2, 0.4]], [60], [90]))
    return folder


@needs_fluidsynth
def test_performances_are_rendered_on_every_soundfont(tmp_path, capsys):
    source, out, other = performances(tmp_path / "midi"), tmp_path / "out", tmp_path / "Other.sf2"
    os.symlink(default_soundfont(), other)
    arguments = ("render", source, out, "--soundfont", default_soundfont(), other)
    assert run(*arguments) == 0
    rows = read_table(out)
    assert sorted(row["audio_filename"] for row in rows) == sorted(
        f"{font}/{name}.flac" for font in ("TimGM6mb", "Other") for name in ("Bach/Fugue 1/a", "Bach/Fugue 1/b", "Sonata Op.27 No.2"))
    assert len({row["split"] for row in rows if row["canonical_title"] == "Bach/Fugue 1"}) == 1  # a piece stays in one split
    assert {row["canonical_composer"] for row in rows} == {"Bach", "Sonata Op.27 No.2"}
    for row in rows:
        audio, notes = load_audio(out / row["audio_filename"]), read_midi(out / row["midi_filename"])
        assert abs(notes.intervals[0, 0] - 0.2) < 0.001
        assert level(audio, 0, 0.19) < 0.05 * level(audio, 0.2, 0.4)
        assert abs(len(audio) / SAMPLE_RATE - row["duration"]) < 0.001
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "6 were there, 0 failed" in capsys.readouterr().out


@needs_fluidsynth
def test_a_folder_that_was_rendered_otherwise_is_not_gone_on_with(tmp_path, capsys):
    write_midi(tmp_path / "midi" / "a.mid", Notes([[0.2, 0.5]], [60], [80]))
    assert run("render", tmp_path / "midi", tmp_path / "out") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run("render", tmp_path / "midi", tmp_path / "out", "--pedals", "none") == 1
    error = capsys.readouterr().err
    assert error == f"prepare.py: {tmp_path / 'out'}: was made with another pedals (own, not none); choose another folder\n"
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    shutil.copyfile(default_soundfont(), tmp_path / "Other.sf2")
    both = ("--soundfont", default_soundfont(), tmp_path / "Other.sf2")
    assert run("render", tmp_path / "midi", tmp_path / "out", *both) == 0  # a piano more may come
    assert len(read_table(tmp_path / "out")) == 2
    capsys.readouterr()
    for spoilt in ("{", "[1]"):
        (tmp_path / "out" / "settings.json").write_text(spoilt)
        assert run("render", tmp_path / "midi", tmp_path / "out", *both) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"prepare.py: {tmp_path / 'out' / 'settings.json'}: cannot be read (") and error.count("\n") == 1
        assert (tmp_path / "out" / "settings.json").read_text() == spoilt


@needs_fluidsynth
def test_renderings_within_the_source_are_not_rendered_again(tmp_path, capsys):
    write_midi(tmp_path / "midi" / "a.mid", Notes([[0.2, 0.5]], [60], [80]))
    for there in (0, 1):
        assert run("render", tmp_path / "midi", tmp_path / "midi" / "out") == 0
        assert len(read_table(tmp_path / "midi" / "out")) == 1 and f"; {there} were there, 0 failed" in capsys.readouterr().out
    assert run("render", tmp_path / "midi" / "out", tmp_path / "again") == run("render", tmp_path / "midi", tmp_path) == 0


@needs_fluidsynth
def test_without_pedals_notes_end_with_their_keys(tmp_path):
    """In the sound and in the MIDI file beside it; other messages stay."""
    midi = pretty_midi.PrettyMIDI(initial_tempo=97)
    piano = pretty_midi.Instrument(0)
    piano.notes = [pretty_midi.Note(90, 60, 0.2, 0.5), pretty_midi.Note(90, 67, 2.2, 2.5)]
    piano.control_changes = [pretty_midi.ControlChange(number, value, seconds) for seconds, number, value in
                             ((0.0, 7, 90), (0.1, 67, 127), (0.3, 64, 127), (0.3, 66, 127), (1.9, 64, 0), (2.0, 66, 0))]
    midi.instruments.append(piano)
    (tmp_path / "midi").mkdir()
    midi.write(str(tmp_path / "midi/a.mid"))
    rang = {}
    for name, *flags in (("with",), ("without", "--pedals", "none")):
        assert run("render", tmp_path / "midi", tmp_path / name, *flags) == 0
        (row,) = read_table(tmp_path / name)
        notes = read_midi(tmp_path / name / row["midi_filename"])
        np.testing.assert_allclose(notes.intervals, [[0.2, 0.5 if flags else 1.9], [2.2, 2.5]], atol=0.002)
        rang[name] = level(load_audio(tmp_path / name / row["audio_filename"]), 1.3, 1.8)
        left = pretty_midi.PrettyMIDI(str(tmp_path / name / row["midi_filename"])).instruments[0].control_changes
        assert [change.number for change in left] == ([7] if flags else [7, 67, 64, 66, 64, 66])
    assert rang["without"] < 0.05 * rang["with"]


@needs_fluidsynth
def test_an_unlisted_pedal_is_heard_and_not_written(tmp_path):
    """Detached notes ring on in most gaps, while the MIDI file ends them with their keys; the same again the next time."""
    midi = pretty_midi.PrettyMIDI()
    right, left = pretty_midi.Instrument(0), pretty_midi.Instrument(0)
    right.notes = [pretty_midi.Note(90, 72, second, second + 0.2) for second in np.arange(0, 40, 0.5)]
    left.notes = [pretty_midi.Note(90, 48, second, second + 0.2) for second in np.arange(0, 40, 2)]
    right.control_changes = [pretty_midi.ControlChange(64, 127, 0.0)]  # down all the time, and to be left out
    midi.instruments += [right, left]
    (tmp_path / "midi").mkdir()
    midi.write(str(tmp_path / "midi/a.mid"))
    sound = {}
    for name, pedals in (("none", "none"), ("unlisted", "unlisted"), ("again", "unlisted")):
        assert run("render", tmp_path / "midi", tmp_path / name, "--pedals", pedals) == 0
        (row,) = read_table(tmp_path / name)
        notes = read_midi(tmp_path / name / row["midi_filename"])
        np.testing.assert_allclose(notes.intervals[:, 1] - notes.intervals[:, 0], 0.2, atol=0.003)
        assert not pretty_midi.PrettyMIDI(str(tmp_path / name / row["midi_filename"])).instruments[0].control_changes
        sound[name] = load_audio(tmp_path / name / row["audio_filename"])
    np.testing.assert_array_equal(sound["unlisted"], sound["again"])
    gaps = np.arange(0, 40, 0.5)[:, None] + [0.42, 0.49]  # of those without a pedal nothing is left there
    ring = np.array([[level(sound[name], *gap) for gap in gaps] for name in ("none", "unlisted")])
    held = ring[1] > 5 * ring[0]
    assert 0.4 < held.mean() < 0.95


def test_a_made_up_pedal_changes_with_chords():
    """It never goes down twice, stays down at least a tenth of a second, and is up at the end; one strike and none at all do no harm."""
    for onsets in (np.arange(0, 100, 0.25), np.arange(0, 100, 0.06), np.array([3.0]), np.zeros(0)):
        for seed in range(10):
            changes = legato_pedal(onsets, 101.0, np.random.default_rng(seed))
            seconds, values = np.array([second for second, _ in changes]), [value for _, value in changes]
            assert values == [127, 0] * (len(values) // 2)
            assert (np.diff(seconds) > 0).all() and (seconds[1::2] - seconds[::2] >= 0.0999).all()
            assert (len(changes) > 20) == (len(onsets) > 1)


@needs_fluidsynth
def test_one_split_of_a_data_folder_is_rendered(data_folder, tmp_path):
    """It keeps its notes and what its table says of it; a MIDI file that two recordings share is played once."""
    source = Path(shutil.copytree(data_folder, tmp_path / "source"))
    shutil.copy(source / "r0.midi", source / "r1.midi")
    assert run("render", source, tmp_path / "out", "--split", "train") == 0
    rows = read_table(tmp_path / "out")
    assert [row["audio_filename"] for row in rows] == ["TimGM6mb/r0.flac", "TimGM6mb/r2.flac"]
    for row, original in zip(rows, read_table(source)[::2]):
        assert all(row[key] == original[key] for key in ("canonical_composer", "canonical_title", "split"))
    played = load_split(tmp_path / "out", "train")[1]
    np.testing.assert_allclose(played.notes.intervals, load_split(source, "train")[2].notes.intervals, atol=1e-6)
    assert level(played.to_float().numpy(), *played.notes.intervals[0]) > 0.01
    (source / "r3.midi").unlink()
    assert run("render", source, tmp_path / "all") == 1  # the others are rendered all the same
    assert [row["split"] for row in read_table(tmp_path / "all")] == ["train"] * 2 + ["test"] * 2


@pytest.fixture
def rendered(monkeypatch) -> list[tuple[str, str, str]]:
    """In place of sound: what `render` plays on which SoundFont for which split."""
    played = []
    monkeypatch.setattr(prepare, "has_fluidsynth", lambda: True)
    monkeypatch.setattr(prepare, "run_jobs", lambda out, jobs, workers, settings: played.extend(
        (row["audio_filename"], arguments[1].name, row["split"]) for _, arguments, row in jobs) or 0)
    return played


def test_performances_are_dealt_among_soundfonts(tmp_path, rendered):
    source, fonts = tmp_path / "midi", [tmp_path / name for name in ("A.sf2", "B.sf2")]
    source.mkdir()
    for path in (*fonts, *(source / f"{number}.mid" for number in range(5))):
        path.touch()
    assert run("render", source, tmp_path / "out", "--soundfont", *fonts, "--deal", "--split", "train") == 0
    assert rendered == [(f"{'AB'[number % 2]}/{number}.flac", f"{'AB'[number % 2]}.sf2", "train") for number in range(5)]
    rendered.clear()
    assert run("render", source, tmp_path / "out", "--soundfont", *fonts, "--split", "test") == 0
    assert len(rendered) == 10 and {split for _, _, split in rendered} == {"test"}


def test_a_split_to_render_that_is_not_there(data_folder, tmp_path, rendered, capsys):
    write_json(tmp_path / "data.json", [row for row in read_table(data_folder) if row["split"] != "test"])
    assert run("render", tmp_path, tmp_path / "out", "--split", "test") == 1
    assert capsys.readouterr().err == f"prepare.py: {tmp_path}: no recordings in the test split\n"
    assert not rendered


@needs_fluidsynth
def test_recordings_that_would_share_a_name_do_not_overwrite_each_other(tmp_path, capsys):
    """Two SoundFonts called piano.sf2, or song.mid beside song.midi."""
    source, fonts = performances(tmp_path / "midi"), [tmp_path / folder / "piano.sf2" for folder in ("one", "two")]
    write_midi(source / "Sonata Op.27 No.2.mid", Notes([[0.2, 0.4]], [72], [90]))
    for font in fonts:
        font.parent.mkdir()
        os.symlink(default_soundfont(), font)
    for number, soundfonts in enumerate((fonts, fonts[:1])):
        out = tmp_path / f"out{number}"
        assert run("render", source, out, "--soundfont", *soundfonts) == 1
        assert capsys.readouterr().err == f"prepare.py: {out}: two recordings would have one name; rename one of the sources\n"
        assert not out.exists()


@needs_fluidsynth
def test_a_table_that_names_other_recordings_is_not_replaced(data_folder, tmp_path, capsys):
    """Neither the source's own, where OUT is the source, nor that of another split rendered before."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(data_folder, source)
    assert run("render", source, out, "--split", "validation") == 0
    for command in (("render", source, source), ("render", source, out, "--split", "train"), ("demo", out),
                    ("maestro", source, source, "--train", 1)):
        folder = command[2] if len(command) > 2 else command[1]
        before = (folder / "data.json").read_bytes()
        assert run(*command) == 1
        assert f"prepare.py: {folder}: its table names " in capsys.readouterr().err
        assert (folder / "data.json").read_bytes() == before
    assert run("render", source, out) == 0  # validation is part of all
    assert {row["split"] for row in read_table(out)} == {row["split"] for row in read_table(source)}


@needs_fluidsynth
def test_a_key_that_two_staves_hold_sounds_as_long_as_its_label(tmp_path):
    """Left and right hand share a key: struck again while it is down, it is released by the later of the two."""
    (tmp_path / "midi").mkdir()
    midi = notes_to_midi(Notes([[0.2, 1.0]], [60], [100]))
    midi.instruments[0].notes.append(pretty_midi.Note(100, 20, 3.5, 3.9))  # lower than any key
    midi.instruments.append(pretty_midi.Instrument(program=0))
    midi.instruments[1].notes = [pretty_midi.Note(100, 60, 0.6, 3.0)]
    midi.write(str(tmp_path / "midi" / "two hands.mid"))
    assert run("render", tmp_path / "midi", tmp_path / "out") == 0
    (row,) = read_table(tmp_path / "out")
    heard, notes = load_audio(tmp_path / "out" / row["audio_filename"]), read_midi(tmp_path / "out" / row["midi_filename"])
    np.testing.assert_allclose(notes.intervals, [[0.2, 0.6], [0.6, 3.0]], atol=0.01)
    alone = np.concatenate(list(render_midi(notes_to_midi(Notes([[0.6, 3.0]], [60], [100])))))
    for start in (0.7, 1.3, 2.5):
        assert level(heard, start, start + 0.3) == pytest.approx(level(alone, start, start + 0.3), rel=0.3)
    assert level(heard, 3.6, 3.9) < 0.1 * level(heard, 2.5, 2.8)


@needs_fluidsynth
def test_what_is_rendered_lasts_as_long_as_its_file(tmp_path):
    """A pedal that never goes up holds its notes to the end of the file, which drums or words may mark."""
    (tmp_path / "midi").mkdir()
    midi = notes_to_midi(Notes([[0.2, 1.0]], [60], [100]))
    midi.instruments[0].control_changes.append(pretty_midi.ControlChange(64, 127, 0.5))
    midi.instruments.append(pretty_midi.Instrument(program=0, is_drum=True))
    midi.instruments[1].notes.append(pretty_midi.Note(100, 60, 3.0, 4.0))
    midi.lyrics.append(pretty_midi.Lyric("end", 6.0))
    midi.write(str(tmp_path / "midi" / "song.mid"))
    assert run("render", tmp_path / "midi", tmp_path / "out") == 0
    (row,) = read_table(tmp_path / "out")
    (ends,) = read_midi(tmp_path / "out" / row["midi_filename"]).intervals[:, 1]
    assert ends == pytest.approx(6.0, abs=0.01) and row["duration"] == pytest.approx(8.0, abs=0.1)


@needs_fluidsynth
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_performances_may_have_names_of_any_bytes(tmp_path):
    source = tmp_path / "midi"
    source.mkdir()
    write_midi(source / os.fsdecode(b"Fr\xe9d \\.mid"), Notes([[0.2, 0.4]], [72], [90]))
    assert run("render", source, tmp_path / "out", "--split", "train") == 0
    (recording,) = load_split(tmp_path / "out", "train")
    assert len(recording.notes) == 1 and run("check", tmp_path / "out") == 0
    write_results(tmp_path / "results.json", [recording], [{"metric/note/f1": 1.0}], {})
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        assert "Fr\\udce9d" in file.read()


@needs_fluidsynth
def test_what_cannot_be_rendered_is_named(tmp_path, capsys):
    source = performances(tmp_path / "midi")
    assert run("render", source, tmp_path / "out", "--soundfont", tmp_path / "lost.sf2") == 1
    assert "lost.sf2: no such SoundFont" in capsys.readouterr().err
    (tmp_path / "words.sf2").write_text("no SoundFont")
    assert run("render", source, tmp_path / "out", "--soundfont", tmp_path / "words.sf2") == 1
    assert "words.sf2: is not a SoundFont" in capsys.readouterr().err
    (source / "broken.mid").write_text("no MIDI")
    assert run("render", source, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "broken.mid: is not a whole MIDI file" in said.err and "3 recordings" in said.out
    (tmp_path / "empty").mkdir()
    assert run("render", tmp_path / "empty", tmp_path / "out") == 1
    assert "empty: holds no .mid or .midi files" in capsys.readouterr().err


def test_render_needs_fluidsynth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "has_fluidsynth", lambda: False)
    assert run("render", performances(tmp_path / "midi"), tmp_path / "out") == 1
    assert capsys.readouterr().err == "prepare.py: libfluidsynth is missing: apt-get install fluidsynth\n"


# --- hold out ---

PLAYED_BY = {"train": [("A", 1), ("A", 2), ("B", 2), ("B", 3), ("C", 1)], "validation": [("A", 4), ("B", 5)], "test": [("A", 6), ("D", 6)]}


@pytest.fixture
def pianos(tmp_path) -> Path:
    """Pianos A to D and which piece each plays in which split; the table says .wav where the disk has .flac."""
    rows = []
    for split, played in PLAYED_BY.items():
        for piano, piece in played:
            (tmp_path / "source" / piano).mkdir(parents=True, exist_ok=True)
            write_tones(tmp_path / "source" / piano, str(piece), random_notes(piece, 2.0, 4), 2.0)
            rows.append({"canonical_composer": "tester", "canonical_title": f"piece {piece}", "split": split, "year": 2024,
                         "midi_filename": f"{piano}/{piece}.midi", "audio_filename": f"{piano}/{piece}.wav", "duration": 2.0})
    write_json(tmp_path / "source" / "data.json", rows)
    return tmp_path / "source"


def names_of(folder: Path, split: str) -> list[str]:
    return [row["midi_filename"].removesuffix(".midi") for row in read_table(folder) if row["split"] == split]


def hold_out(source: Path, out: Path, *names: str) -> int:
    return main(["hold-out", str(source), str(out), "--piano", *names])


def test_a_piano_is_held_out(pianos, tmp_path, capsys):
    """B's piece 2 is left out, for A trains on it; its piece 3 and its validation recording validate."""
    before = {path: path.read_bytes() for path in pianos.rglob("*.*")}
    assert hold_out(pianos, tmp_path / "out", "B") == 0
    rest, unseen = tmp_path / "out" / "rest", tmp_path / "out" / "unseen"
    assert [names_of(rest, split) for split in PLAYED_BY] == [["A/1", "A/2", "C/1"], ["A/4"], ["A/6", "D/6"]]
    assert [names_of(unseen, split) for split in PLAYED_BY] == [[], ["B/3", "B/5"], []]
    said = capsys.readouterr().out
    assert f"{rest}: 6 recordings (3 train, 1 validation, 2 test), 0.2 minutes\n" in said and "left out: 1 recordings of B" in said
    assert [recording.name.split("/", 1)[1] for recording in load_split([rest, unseen], "validation")] == ["A/4.flac", "B/3.flac", "B/5.flac"]
    assert all(path.is_symlink() and path.resolve().is_relative_to(pianos) for path in (*rest.rglob("*.flac"), *unseen.rglob("*.midi")))
    assert main(["check", str(rest), *ONE]) == main(["check", str(unseen), *ONE]) == 0
    assert {path: path.read_bytes() for path in pianos.rglob("*.*")} == before and no_leftovers(tmp_path)


def test_several_pianos_are_held_out_together(pianos, tmp_path):
    """What they have in common is left to validate on; a second call replaces the first."""
    assert hold_out(pianos, tmp_path / "out", "C") == 1  # A trains on all that C plays
    assert not (tmp_path / "out").exists()
    assert hold_out(pianos, tmp_path / "out", "B") == 0
    assert hold_out(pianos, tmp_path / "out", "A", "C") == 0
    assert names_of(tmp_path / "out" / "unseen", "validation") == ["A/1", "C/1", "A/4"]
    assert names_of(tmp_path / "out" / "rest", "train") == ["B/2", "B/3"]
    assert names_of(tmp_path / "out" / "rest", "test") == ["A/6", "D/6"]


def test_where_there_can_be_no_links_there_are_copies(pianos, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert hold_out(pianos, tmp_path / "out", "B") == 0
    copy = tmp_path / "out" / "unseen" / "B" / "3.flac"
    assert not copy.is_symlink() and copy.read_bytes() == (pianos / "B" / "3.flac").read_bytes()


def test_what_cannot_be_held_out_is_said(pianos, tmp_path, capsys):
    for names, message in ((["E"], "source: has no E in train or validation, there are A, B, C\n"), (["B", "D"], "source: has no D in"),
                           (["C"], "source: all that C plays is also trained on with others, nothing is left to validate on\n"),
                           (["A", "B", "C"], "source: nothing is left to train on without A, B, C\n")):
        assert hold_out(pianos, tmp_path / "out", *names) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    shutil.move(pianos, tmp_path / "rest")
    before = {path: path.read_bytes() for path in (tmp_path / "rest").rglob("*.*")}
    assert hold_out(tmp_path / "rest", tmp_path, "B") == 1
    assert "rest: is the source itself" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "rest").rglob("*.*")} == before
    shutil.move(tmp_path / "rest", tmp_path / "unseen")
    assert hold_out(tmp_path / "unseen", tmp_path, "B") == 1
    assert "unseen: is the source itself" in capsys.readouterr().err and not (tmp_path / "rest").exists()
    shutil.move(tmp_path / "unseen", tmp_path / "rest")
    write_tones(tmp_path / "out" / "unseen", "other", random_notes(0, 2.0, 4), 2.0)
    write_json(tmp_path / "out" / "unseen" / "data.json", [{**dict.fromkeys(COLUMNS, ""), "split": "test", "duration": 2.0,
                                                            "midi_filename": "other.midi", "audio_filename": "other.flac"}])
    assert hold_out(tmp_path / "rest", tmp_path / "out", "B") == 1
    assert "unseen: its table names 1 recordings that this command does not make, such as other.midi" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unseen"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "rest" / "B" / "3.midi").unlink()
    assert hold_out(tmp_path / "rest", tmp_path / "out", "B") == 1
    assert "B/3.midi: is named in the table and not on the disk" in capsys.readouterr().err


# --- check ---

def test_a_good_folder_passes(data_folder, capsys):
    assert run("check", data_folder) == 0
    assert "6 recordings read, 0 bad, 0 pieces in more than one split" in capsys.readouterr().out


FAULTS = {
    "no audio": "no audio.flac: is named in the table and not on the disk",
    "text": "text.flac: holds no audio",
    "short audio": "short audio.flac: is",
    "no midi": "no midi.midi: cannot be read",
    "broken midi": "broken midi.midi: is not a whole MIDI file",
    "nan": "nan.wav: holds samples that are not numbers",
    "split": "split.flac: its split 'training' is none of train, validation, test",
    "duration": "duration.flac: lasts 2.0 s, the table says 9.0 s",
    "silent": "silent.flac: the audio is silent",
    "no notes": "no notes.flac: the MIDI file has no notes",
    "long midi": "long midi.flac: its last note begins at 8.0 s, the audio ends at 2.0 s",
}


def test_every_kind_of_bad_recording_is_named(tmp_path, capsys):
    rows = []
    for name in ["good", *FAULTS]:
        tones = write_tones(tmp_path, name, random_notes(0, 2.0, 4), 2.0)
        rows.append({"canonical_composer": "tester", "canonical_title": name, "split": "training" if name == "split" else "train",
                     "year": 2024, "midi_filename": tones.midi.name, "duration": 9.0 if name == "duration" else 2.0,
                     "audio_filename": "nan.wav" if name == "nan" else tones.audio.name})
    (tmp_path / "no audio.flac").unlink()
    (tmp_path / "no midi.midi").unlink()
    (tmp_path / "text.flac").write_text("these are the words of a song\n" * 20)
    (tmp_path / "short audio.flac").write_bytes((tmp_path / "good.flac").read_bytes()[:5000])
    (tmp_path / "broken midi.midi").write_bytes((tmp_path / "good.midi").read_bytes()[:60])
    soundfile.write(tmp_path / "nan.wav", np.full(2 * SAMPLE_RATE, np.nan), SAMPLE_RATE, subtype="FLOAT")
    write_tones(tmp_path, "silent", Notes([], [], []), 2.0)
    write_midi(tmp_path / "silent.midi", random_notes(0, 2.0, 4))
    write_midi(tmp_path / "no notes.midi", Notes([], [], []))
    write_midi(tmp_path / "long midi.midi", Notes([[0.5, 1], [8, 9]], [60, 60], [80, 80]))
    write_json(tmp_path / "data.json", rows)
    assert run("check", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"{len(rows)} recordings read, {len(FAULTS)} bad" in lines[-1]
    assert len(lines) == len(FAULTS) + 1
    for name, message in FAULTS.items():
        assert any(message in line for line in lines), name


@pytest.mark.parametrize("title", ["piece 0", 5, None])
def test_a_piece_in_two_splits_is_named(tmp_path, data_folder, capsys, title):
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    rows = json.loads((folder / "data.json").read_text())
    rows[-1]["canonical_title"] = rows[0]["canonical_title"] = title
    write_json(folder / "data.json", rows)
    assert run("check", folder) == 1
    assert capsys.readouterr().out.startswith(f"tester / {title}: is in more than one split\n")


# --- the command line ---

def test_labels_and_audio_of_a_made_folder_agree_in_time(tmp_path):
    """From an official download to rolls: nothing on the way shifts one against the other."""
    source = tmp_path / "maestro-v3"
    source.mkdir()
    notes = random_notes(0, 3.0, 8)
    soundfile.write(source / "a.wav", play(notes, 3.0), SAMPLE_RATE)
    write_midi(source / "a.midi", notes)
    columns = {**{column: {"0": "x"} for column in COLUMNS}, "split": {"0": "train"}, "midi_filename": {"0": "a.midi"},
               "audio_filename": {"0": "a.wav"}, "duration": {"0": 3.0}}
    write_json(source / "maestro-v3.0.0.json", columns)
    assert run("maestro", source, tmp_path / "out", "--all") == 0
    (recording,) = load_split(tmp_path / "out", "train")
    np.testing.assert_allclose(recording.to_float().numpy(), play(notes, 3.0), atol=2 / 32768)
    np.testing.assert_allclose(recording.notes.intervals, notes.intervals, atol=0.001)
    assert recording.n_frames == 3 * SAMPLE_RATE // HOP_SIZE
