"""Values of flags."""

import argparse

import pytest

from locallip import flags


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("36/255", 36 / 255), ("1e-3", 1e-3), ("3/1.5", 2)])
def test_a_number_may_be_a_fraction(text, value):
    assert flags.natural_float(text) == value


@pytest.mark.parametrize(
    "text", ["", "/", "36/", "/255", "0/0", "1/2/3", "-1", "1/-2", "nan", "inf", "1e999", "1e31", "1e-46"]
)
def test_what_is_no_number_of_at_least_0_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        flags.natural_float(text)


@pytest.mark.parametrize(("text", "value"), [("0", [0]), ("12,0,6,6", [0, 6, 12])])
def test_positions_come_in_order_and_once(text, value):
    assert flags.positions(text) == value


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "1.5", "one"])
def test_what_are_no_positions_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="commas between"):
        flags.positions(text)


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False), (None, True)])
def test_help_is_printed_by_the_first_process_alone(rank, printed, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1234")):
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        flags.ArgumentParser("Does something.").parse_args(["--help"])
    assert ended.value.code == 0
    assert ("Does something." in capsys.readouterr().out) == printed
