"""What people see of a run: a bar, lines, or nothing."""

import io

import pytest

from fasttrace.cli import progress
from fasttrace.cli.progress import FactsBar, line
from fasttrace.runs.run import Told


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds, moved by hand."""
    seconds = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


def told(done, facts=40, skipped=0):
    return Told(facts, done, skipped, 84 * (done - skipped))


@pytest.mark.parametrize(
    ("told", "seconds", "expected"),
    [
        (told(0), 3.0, "0 of 40 facts, 0 skipped"),
        (told(10, skipped=2), 0.0, "10 of 40 facts, 2 skipped"),
        (told(10), 20.0, "10 of 40 facts, 0 skipped, 0.50 facts/s, 42 cells/s, 60 s left"),
        (told(20), 130.0, "20 of 40 facts, 0 skipped, 0.15 facts/s, 13 cells/s, 2 min left"),
        (told(1, facts=101), 120.0, "1 of 101 facts, 0 skipped, 0.01 facts/s, 1 cells/s, 3 h 20 min left"),
        (told(40), 0.01, "40 of 40 facts, 0 skipped, 4000.00 facts/s, 336,000 cells/s, 0 s left"),
        (told(0, facts=0), 5.0, "0 of 0 facts, 0 skipped"),
    ],
)
def test_a_line_has_facts_rates_and_the_time_that_is_left(told, seconds, expected):
    assert line(told, seconds) == expected


def test_a_log_gets_the_first_line_the_last_and_one_every_ten_seconds(clock):
    stream = io.StringIO()
    with FactsBar(stream=stream) as bar:
        for done in range(41):
            bar(told(done))
            clock[0] += 0.8
    lines = stream.getvalue().splitlines()
    assert [int(text.split()[0]) for text in lines] == [0, 13, 26, 39, 40]
    assert lines[0] == "0 of 40 facts, 0 skipped"
    assert "1.25 facts/s, 105 cells/s" in lines[-1]


def test_a_log_tells_of_facts_that_are_skipped(clock):
    stream = io.StringIO()
    with FactsBar(stream=stream) as bar:
        clock[0] += 60
        bar(told(30, skipped=4))
    assert stream.getvalue() == "30 of 40 facts, 4 skipped, 0.50 facts/s, 36 cells/s, 20 s left\n"


def test_a_terminal_gets_one_bar_that_is_closed(clock):
    stream = Terminal()
    with FactsBar(stream=stream) as bar:
        bar(told(0))
        clock[0] += 10
        bar(told(20, skipped=5))
        assert bar.bar.n == 20
        assert bar.bar.postfix == "126 cells/s, 5 skipped"
        bar(told(40, skipped=5))
    assert bar.bar.disable  # closed
    last = stream.getvalue().split("\r")[-1]
    assert "40/40" in last
    assert "5 skipped" in last
    assert last.endswith("\n")


def test_a_terminal_of_a_run_that_has_nothing_to_do_is_left_in_order():
    stream = Terminal()
    with FactsBar(stream=stream) as bar:
        bar(told(0, facts=0))
    assert stream.getvalue().endswith("\n")


def test_an_interrupted_bar_is_closed():
    stream = Terminal()
    bar = FactsBar(stream=stream)
    bar(told(1))
    with pytest.raises(KeyboardInterrupt), bar:
        raise KeyboardInterrupt
    assert bar.bar.disable
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_quiet_says_nothing(stream):
    with FactsBar(quiet=True, stream=stream) as bar:
        bar(told(0))
        bar(told(40))
    assert stream.getvalue() == ""


def test_without_a_stream_it_speaks_on_stderr(capsys):
    with FactsBar() as bar:
        bar(told(0))
    assert capsys.readouterr().err == "0 of 40 facts, 0 skipped\n"
