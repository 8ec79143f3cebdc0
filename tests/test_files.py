"""Files are written whole or not at all."""

import json
from pathlib import Path

import pytest

from files import write_json, written_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_well_replaces_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "song.midi"
    for text in ("first", "second"):
        with written_whole(path) as temporary:
            assert temporary.suffix == ".midi" and temporary.parent == path.parent  # writers choose by suffix; rename needs one disk
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names_in(path.parent) == ["song.midi"]


def test_any_name_that_the_disk_takes_can_be_written(tmp_path):
    path = tmp_path / ("a" * 250 + ".midi")
    with written_whole(path) as temporary:
        temporary.write_text("notes")
    assert names_in(tmp_path) == [path.name] and path.read_text() == "notes"


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "model.pt"
    path.write_text("old")
    with pytest.raises(type(error)), written_whole(path) as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["model.pt"]


def test_a_full_disk_names_the_file_that_was_wanted(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(OSError, match=r"results\.json: cannot be written \(No space left on device\)"), written_whole(path) as temporary:
        temporary.write_text("{")
        raise OSError(28, "No space left on device")
    assert names_in(tmp_path) == []


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"file/song\.midi: cannot be written"), written_whole(tmp_path / "file" / "song.midi") as temporary:
        temporary.write_text("never")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_json_survives_the_disk(tmp_path):
    content = [{"canonical_composer": "Frédéric Chopin", "duration": 1.25, "year": 2018}]
    write_json(tmp_path / "data.json", content)
    text = (tmp_path / "data.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "Frédéric" in text


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "data.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "data.json", [object()])
    assert json.loads((tmp_path / "data.json").read_text()) == [1]
    assert names_in(tmp_path) == ["data.json"]
