"""Every kind of bad input from the command line: one line that names the file, exit status 1, nothing left behind."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import BROKEN, broken

import evaluate
import prepare
import train
import transcribe
from constants import SAMPLE_RATE
from model import Sizes, build_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = ["-i", "1", "-b", "1", "-v", "16384", "-cnn", "4", "-fc", "8", "--model", "rnn", "--device", "cpu"]


def everything(folder: Path) -> dict[str, bytes | None]:
    """Each file below a folder with its content, and each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(capsys: pytest.CaptureFixture, script: str) -> str:
    """The whole of standard error, which must be one line of that script."""
    error = capsys.readouterr().err
    assert error.startswith(f"{script}: ") and error.count("\n") == 1 and error.endswith("\n"), error
    return error


def last_line(capsys: pytest.CaptureFixture, script: str) -> str:
    """The only line of that script on standard error, after its progress bars."""
    lines = [line for line in capsys.readouterr().err.split("\n") if "it/s" not in line and line.strip()]
    lines = [line.split("\r")[-1].strip() for line in lines]
    assert len([line for line in lines if line.startswith(f"{script}: ")]) == 1 and "Traceback" not in "".join(lines), lines
    return next(line for line in lines if line.startswith(f"{script}: "))


@contextlib.contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes: every write behind that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- data folders ---

def spoil_audio(path: Path, kind: str) -> Path:
    """Break an audio file in place; the path it has then."""
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("Dear diary, today I practised scales.\n" * 20)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "header":
        path.write_bytes(path.read_bytes()[:30])
    elif kind == "nan":
        path.unlink()
        path = path.with_suffix(".wav")
        audio = np.zeros(SAMPLE_RATE, dtype=np.float32)
        audio[500] = np.nan
        soundfile.write(path, audio, SAMPLE_RATE, subtype="FLOAT")
    elif kind == "no samples":
        path.unlink()
        path = path.with_suffix(".wav")
        soundfile.write(path, np.zeros(0, dtype=np.float32), SAMPLE_RATE)
    else:
        raise AssertionError(kind)
    return path


def spoil(folder: Path, kind: str) -> Path:
    """Break a data folder in one way; the path that the message has to name."""
    table = folder / "data.json"
    rows = json.loads(table.read_text())
    if kind == "no folder":
        shutil.rmtree(folder)
        return folder
    if kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
        return folder
    if kind.startswith("table"):
        table.write_text({"table of text": "recordings: many", "table of numbers": "[1, 2]", "table without rows": "[]",
                          "table without columns": '[{"split": "test", "duration": 1}]',
                          "table of half a file": table.read_text()[:300]}[kind])
        return table
    if kind == "no test split":
        table.write_text(json.dumps([row for row in rows if row["split"] != "test"]))
        return folder
    if kind.startswith("audio"):
        return spoil_audio(folder / "r4.flac", kind.removeprefix("audio "))
    midi = folder / "r4.midi"
    if kind == "midi missing":
        midi.unlink()
    elif kind == "midi of text":
        midi.write_text("C D E F G A B C")
    elif kind == "midi truncated":
        midi.write_bytes(midi.read_bytes()[: midi.stat().st_size // 2])
    elif kind == "midi empty":
        midi.write_bytes(b"")
    else:
        raise AssertionError(kind)
    return midi


FOLDERS = ["no folder", "empty folder", "table of text", "table of numbers", "table without rows", "table without columns",
           "table of half a file", "no test split", "audio missing", "audio empty", "audio text", "audio truncated", "audio header", "audio nan",
           "audio no samples", "midi missing", "midi of text", "midi truncated", "midi empty"]


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """A data folder of one's own, to be broken."""
    return Path(shutil.copytree(data_folder, tmp_path / "own"))


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_bad_folder_is_not_evaluated(kind, folder, checkpoint, tmp_path, capsys):
    named = spoil(folder, kind)
    assert evaluate.main([str(checkpoint), "--data", str(folder), "--save_path", str(tmp_path / "out")]) == 1
    assert f" {named}: " in one_line(capsys, "evaluate.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_bad_folder_is_not_trained_on(kind, folder, tmp_path, capsys):
    named = spoil(folder, kind)
    assert train.main(["--data", str(folder), "--logdir", str(tmp_path / "run"), *TINY]) == 1
    assert f" {named}: " in one_line(capsys, "train.py")
    assert not (tmp_path / "run").exists()


def test_messages_say_what_to_do(folder, tmp_path, capsys):
    assert train.main(["--data", str(tmp_path / "none"), *TINY]) == 1
    assert "prepare.py demo" in capsys.readouterr().err
    spoil(folder, "audio nan")
    assert train.main(["--data", str(folder), *TINY]) == 1
    assert "NaN" in capsys.readouterr().err


def test_recordings_shorter_than_a_segment_are_used(data_folder, tmp_path):
    """The longest lasts 4.5 s, a segment 6.4 s."""
    assert train.main(["--data", str(data_folder), "--logdir", str(tmp_path / "run"), *TINY, "-v", "102400"]) == 0
    assert (tmp_path / "run" / "results.txt").is_file()


# --- recordings to transcribe ---

@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "header", "nan", "no samples"])
def test_a_bad_recording_is_not_transcribed(kind, checkpoint, tones, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transcribe, "has_fluidsynth", lambda: True)
    path = spoil_audio(tones.audio, kind)
    assert transcribe.main([str(checkpoint), str(path), "--save_path", str(tmp_path / "out")]) == 1
    assert one_line(capsys, "transcribe.py").startswith(f"transcribe.py: {path}: ")
    assert not (tmp_path / "out").exists()


def test_a_bad_recording_is_not_transcribed_without_ffmpeg(checkpoint, tones, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transcribe, "has_fluidsynth", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    path = spoil_audio(tones.audio, "text")
    assert transcribe.main([str(checkpoint), str(path), "--save_path", str(tmp_path / "out")]) == 1
    assert "ffmpeg" in one_line(capsys, "transcribe.py")


def test_an_empty_folder_is_not_transcribed(checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert transcribe.main([str(checkpoint), str(tmp_path / "in"), "--save_path", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'in'}: holds no recordings" in one_line(capsys, "transcribe.py")
    assert not (tmp_path / "out").exists()


# --- checkpoints ---

@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "code", "constants", "dictionary"])
@pytest.mark.parametrize("script", ["evaluate.py", "transcribe.py", "train.py"])
def test_a_bad_checkpoint_is_refused(script, kind, data_folder, tones, tmp_path, capsys):
    path = broken(tmp_path, kind)
    before = everything(tmp_path)
    out = str(tmp_path / "out")
    status = {"evaluate.py": lambda: evaluate.main([str(path), "--data", str(data_folder), "--save_path", out]),
              "transcribe.py": lambda: transcribe.main([str(path), str(tones.audio), "--save_path", out]),
              "train.py": lambda: train.main(["--resume", str(path), "--logdir", out])}[script]()
    assert status == 1
    error = one_line(capsys, script)
    assert error.startswith(f"{script}: {path}: ") and BROKEN[kind] in error
    assert everything(tmp_path) == before


# --- outputs ---

def test_an_output_that_cannot_be_written_is_named_by_evaluate(checkpoint, data_folder, tmp_path, capsys):
    """A file lies where the folder should be."""
    (tmp_path / "out").write_text("keep me")
    assert evaluate.main([str(checkpoint), "--data", str(data_folder), "--save_path", str(tmp_path / "out")]) == 1
    error = one_line(capsys, "evaluate.py")
    assert f"{tmp_path / 'out' / 'small_test_midi.json'}: cannot be written" in error
    assert everything(tmp_path) == {"out": b"keep me"}


def test_an_output_that_cannot_be_written_is_named_by_train(data_folder, tmp_path, capsys):
    (tmp_path / "run").write_text("keep me")
    assert train.main(["--data", str(data_folder), "--logdir", str(tmp_path / "run"), *TINY]) == 1
    assert f"{tmp_path / 'run' / 'config.json'}: cannot be written" in one_line(capsys, "train.py")
    assert everything(tmp_path) == {"run": b"keep me"}


def test_an_output_that_cannot_be_written_is_named_by_prepare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "DEMO_COUNTS", {"train": 1})
    (tmp_path / "out").write_text("keep me")
    assert prepare.main(["demo", str(tmp_path / "out"), "--num_workers", "1"]) == 1
    error = last_line(capsys, "prepare.py")
    assert str(tmp_path / "out") in error and "cannot be written" in error
    assert everything(tmp_path) == {"out": b"keep me"}


def test_a_full_disk_while_training(data_folder, tmp_path, capsys):
    """Room for the configuration, not for a checkpoint; those that were there stay."""
    run = tmp_path / "run"
    assert train.main(["--data", str(data_folder), "--logdir", str(run), *TINY, "-i", "1"]) == 0
    before = {name: content for name, content in everything(run).items() if name.endswith(".pt")}
    with full_disk(60_000):
        assert train.main(["--resume", str(run / "model-1.pt"), "-i", "2", "--device", "cpu"]) == 1
    error = last_line(capsys, "train.py")
    assert str(run) in error and ".pt: cannot be written" in error
    assert before and {name: content for name, content in everything(run).items() if name.endswith(".pt") or ".tmp" in name} == before


def test_a_full_disk_while_evaluating(checkpoint, data_folder, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [str(checkpoint), "--data", str(data_folder), "--save_path", str(out)]
    assert evaluate.main(argv) == 0
    before = everything(out)
    capsys.readouterr()
    with full_disk(100):
        assert evaluate.main(argv) == 1
    assert f"{out / 'small_test_midi.json'}: cannot be written" in one_line(capsys, "evaluate.py")
    assert everything(out) == before


@pytest.mark.parametrize("room", [0, 100, 6_000, 20_000])
def test_a_full_disk_while_transcribing(room, checkpoint, tones, tmp_path, monkeypatch, capsys):
    """Wherever the room ends, no file of the four is there in half."""
    monkeypatch.setattr(transcribe, "has_fluidsynth", lambda: True)
    out = tmp_path / "out"
    argv = [str(checkpoint), str(tones.audio), "--save_path", str(out)]
    with full_disk(room):
        assert transcribe.main(argv) == 1
    error = one_line(capsys, "transcribe.py")
    assert error.startswith(f"transcribe.py: {out / 'tones_transcribed'}.") and "cannot be written" in error
    left = {path.name for path in out.iterdir()}
    if "tones_transcribed.npz" in left:
        with np.load(out / "tones_transcribed.npz") as arrays:
            assert arrays["onset"].shape == (62, 88)
    assert left <= {"tones_transcribed.npz", "tones_transcribed.midi", "tones_transcribed.png"}


def test_a_full_disk_while_preparing(data_folder, tmp_path):
    """Recordings that have no room are named and left out. In a process of its own, whose workers inherit the limit."""
    command = [sys.executable, str(ROOT / "prepare.py"), "maestro", str(data_folder), str(tmp_path / "out"), "--all", "--num_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)))
    assert done.returncode == 1 and "6 failed" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 6 and all(error.startswith(f"prepare.py: {tmp_path / 'out'}") and "cannot be written" in error for error in errors)
    assert not [name for name, content in everything(tmp_path).items() if content is not None]


# --- flags ---

@pytest.mark.parametrize("flags", [
    ["-i", "0"], ["-i", "-3"], ["-i", "1.5"], ["-b", "0"], ["-v", "0"], ["-v", "1000"], ["-v", "511"], ["-lr", "0"], ["-lr", "-1"], ["-lr", "nan"],
    ["-lr", "inf"], ["-wd", "-1"], ["-wd", "nan"], ["-vi", "0"], ["-cnn", "0"], ["-fc", "-8"], ["--seed", "-1"], ["--seed", str(2**63)], ["--num_workers", "-1"],
    ["--model", "transformer"], ["--recipe", "cake"], ["--recipe", "default,combined_unit=0"], ["--no_such_flag"], ["surplus"]])
def test_train_refuses_flags_out_of_range(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert flags[0].lstrip("-") in error.splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main, flags", [
    (evaluate.main, ["x.pt", "--split", "practice"]), (evaluate.main, ["x.pt", "--reference", "ear"]),
    (transcribe.main, []), (transcribe.main, ["x.pt"]), (prepare.main, []), (prepare.main, ["bake", "x"]),
    (prepare.main, ["maestro", "a", "b", "--train", "0"]), (prepare.main, ["demo", "x", "--num_workers", "0"])])
def test_the_others_refuse_flags_out_of_range(main, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and not list(tmp_path.iterdir())


def test_evaluation_without_data_says_so(tmp_path, monkeypatch, capsys):
    """No flag is needed: the released checkpoint on the folder `data`; here there is none."""
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: data: is no folder") and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["evaluate.py", "transcribe.py", "train.py"])
def test_a_device_that_is_not_there_is_named(script, checkpoint, data_folder, tones, tmp_path, capsys):
    argv = {"evaluate.py": [str(checkpoint), "--data", str(data_folder)], "transcribe.py": [str(checkpoint), str(tones.audio)],
            "train.py": ["--data", str(data_folder)]}[script]
    main = {"evaluate.py": evaluate.main, "transcribe.py": transcribe.main, "train.py": train.main}[script]
    assert main([*argv, "--device", "abacus"]) == 1
    assert "'abacus'" in one_line(capsys, script)


# --- as a person runs them ---

@pytest.mark.parametrize("script, flags, named", [
    ("train.py", ["--data", "nowhere"], "nowhere"), ("evaluate.py", ["no.pt"], "no.pt"),
    ("transcribe.py", ["CHECKPOINT", "letter.flac"], "letter.flac"), ("prepare.py", ["check", "nowhere"], "nowhere")])
def test_from_a_shell(script, flags, named, checkpoint, tmp_path):
    (tmp_path / "letter.flac").write_text("Dear diary")
    flags = [str(checkpoint) if flag == "CHECKPOINT" else flag for flag in flags]
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "libfluidsynth" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: {named}: "), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.flac"]


def test_a_checkpoint_on_a_full_device(tmp_path):
    """torch's own words for a full disk come out as one line."""
    with full_disk(10_000), pytest.raises(OSError, match=r"m\.pt: cannot be written") as caught:
        save_checkpoint(tmp_path / "m.pt", build_model("rnn", Sizes(4, 8, 8)))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
