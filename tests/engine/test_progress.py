"""What a person sees of a fit, and what the first and the second Ctrl-C do."""

import signal
from collections.abc import Iterator

import pytest

from flashdip.engine.events import Event, Finished, Progress, Retried, Started
from flashdip.engine.progress import Interruption, clock, describe, show_progress

STARTED = Started(0, 200, "native", "cpu", "bf16", (24, 32), (32, 32), ("backend x cannot run",))


def progress(iteration: int, psnr: float | None = None, rate: float = 4.0) -> Progress:
    return Progress(iteration, 200, 0.0123, psnr, None, 1.0, rate)


def events() -> Iterator[Event]:
    yield STARTED
    yield from (progress(iteration, 31.25) for iteration in range(1, 151))
    yield Retried(150, 1, "the loss jumped to 9")
    yield Finished(150, 120, "es-wmv", 75.0)


def test_a_reading_in_words() -> None:
    assert describe(progress(100)) == "4.0 it/s, loss 1.23e-02, 0:25 left"
    assert describe(progress(100, 30.0, 0.5)) == "2.0 s/it, loss 1.23e-02, 30.00 dB, 3:20 left"
    assert describe(progress(100, rate=0.0)) == "0.0 it/s, loss 1.23e-02"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_file_gets_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("denoise") as callback:
        for event in events():
            callback(event)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "\x1b" not in err
    assert lines[0].startswith("denoise: 32x24 pixels, backend native on cpu, bf16")
    assert lines[1] == "denoise: backend x cannot run"
    assert [line.split()[1] for line in lines if "it/s" in line] == [
        f"{iteration}/200:" for iteration in range(1, 151, 20)
    ]
    assert "retry 1" in lines[-2]
    assert lines[-1] == "denoise: 150 iterations in 1:15, ended by es-wmv, image of iteration 120"


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with show_progress("denoise") as callback:
        for event in events():
            callback(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert "━" in err
    assert "150/200" in err
    assert "retry 1" in err
    assert "ended by es-wmv" in err


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("denoise", quiet=True) as callback:
        for event in events():
            callback(event)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends_the_program(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    passed: list[Event] = []
    with Interruption() as interruption:
        watching = interruption.watch(passed.append)
        watching(STARTED)
        assert passed == [STARTED]
        assert not interruption()
        signal.raise_signal(number)
        assert interruption()
        assert interruption.signal == number
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_before_the_fit_begins_a_signal_ends_the_program() -> None:
    with Interruption(), pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130
