import os
import pwd

import pytest

from locallip import files
from locallip.files import InputError


def test_a_file_written_atomically_has_the_new_content_and_no_neighbours(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("old", "new"):
        files.write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises((InputError, RuntimeError, KeyboardInterrupt)):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_check_writable_leaves_the_folder_as_it_was(tmp_path):
    mine = tmp_path / "writable"
    mine.write_text("mine")
    files.check_writable(tmp_path)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {mine: "mine"}


def test_check_writable_creates_the_folder(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("below", ["", "folder", "folder/folder"])
def test_check_writable_refuses_a_place_below_a_file(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        files.check_writable(tmp_path / "file" / below)


# --- home folders


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", ["~", "~/data", "~/a/../b", "~//data"])
def test_the_home_folder_stands_for_a_leading_tilde(home, path):
    assert files.expand_home(path) == str(home) + path[1:]


@pytest.mark.parametrize("path", ["data", "./~", "a/~/b", "/~", "a~", ""])
def test_other_paths_stay_as_they_are(home, path):
    assert files.expand_home(path) == path


def test_another_users_home_folder_is_known():
    me = pwd.getpwuid(os.getuid())
    assert files.expand_home(f"~{me.pw_name}/data") == f"{me.pw_dir.rstrip('/')}/data"


def test_a_home_folder_that_does_not_exist_is_refused_with_one_line():
    with pytest.raises(InputError, match=r"no home folder '~nobody-of-that-name'; \./~nobody-of-that-name would"):
        files.expand_home("~nobody-of-that-name/data")
