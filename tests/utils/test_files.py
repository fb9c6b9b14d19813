"""Files that are incomplete because a run was killed."""

import pytest

from fgbg_kd.utils.files import add_row, read_json, read_rows, whole, write_whole


def test_a_torn_last_row_is_left_out_and_gives_way_to_the_next(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    add_row(file, {"a": 1})
    add_row(file, {"b": float("inf")})
    file.write_text(file.read_text() + '{"c": [1, ')
    assert read_rows(file) == [{"a": 1}, {"b": float("inf")}]
    add_row(file, {"d": 4})
    assert file.read_text() == '{"a": 1}\n{"b": Infinity}\n{"d": 4}\n'
    file.write_text('{"a": 1}')  # complete except for the newline
    add_row(file, {"b": 2})
    assert read_rows(file) == [{"a": 1}, {"b": 2}]


def test_another_damaged_row_is_an_error_with_its_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        read_rows(file)
    with pytest.raises(ValueError, match="rows.jsonl is damaged"):
        read_json(file)


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    file = tmp_path / "results.md"
    with whole(file) as ours:
        ours.write_text("ours")
        monkeypatch.setattr("os.getpid", lambda: -1)
        write_whole(file, "theirs")
    assert file.read_text() == "ours" and list(tmp_path.iterdir()) == [file]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "done.json"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "x" * 100_000 + "\ud800")
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert file.read_text() == "new" and list(tmp_path.glob("*.json")) == [file]
