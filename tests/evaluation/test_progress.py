"""A run over many images says how far it is, wherever its errors go."""

import threading

import pytest

from locallip.evaluation import progress as module
from locallip.evaluation.progress import progress


@pytest.fixture
def seconds(monkeypatch):
    """What the clock shows; a test sets it."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


def test_a_log_gets_a_line_a_minute(seconds, capsys):
    with progress(100, done=10) as advance:
        for now, done in ((59, 20), (61, 30), (90, 10), (125, 5)):
            seconds[0] = now
            advance(done, certified=done // 2, open=1)
    assert capsys.readouterr().err.splitlines() == [
        "60 of 100 images: 15 certified, 1 open",
        "75 of 100 images: 2 certified, 1 open",
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_gets_a_line_before_the_first_images_are_done(quiet, capsys, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    said = threading.Event()
    monkeypatch.setattr(module, "_say", lambda line, say=module._say: (say(line), said.set()))
    with progress(100, done=10, quiet=quiet):
        assert said.wait(0.2 if quiet else 30) is not quiet
    assert capsys.readouterr().err == ("" if quiet else "10 of 100 images, and more under way\n")


def test_no_timer_outlives_what_it_waits_for(capsys):
    with pytest.raises(KeyError), progress(100):
        raise KeyError
    with progress(100) as advance:
        advance(1)
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers)
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_by_a_process_that_is_to_be_quiet(seconds, capsys):
    with progress(100, quiet=True) as advance:
        seconds[0] = 1000.0
        advance(50, certified=1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_no_lines(seconds, capsys, monkeypatch):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    with progress(100) as advance:
        seconds[0] = 1000.0
        advance(50, certified=7)
    shown = capsys.readouterr().err
    assert "50/100" in shown
    assert "certified=7" in shown
    assert "of 100 images" not in shown
