"""Signals become a question, and a second Ctrl-C leaves at once; in whole runs: test_resume.py."""

import os
import signal
import time

import pytest

from ratlip.stopping import SIGNALS, Stop, Stopped


@pytest.fixture
def stop():
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = Stop()
    yield stop
    stop.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted(stop, number):
    assert not stop.asked()
    os.kill(os.getpid(), number)
    assert stop.asked() and stop.cause == number.name


def test_a_second_ctrl_c_leaves_at_once(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not_hinder_the_saving(stop):
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.cause == "SIGTERM"


def test_long_work_is_left_at_once(stop):
    with pytest.raises(Stopped, match="SIGUSR1"), stop.at_once():
        os.kill(os.getpid(), signal.SIGUSR1)
    stop.cause = None
    os.kill(os.getpid(), signal.SIGTERM)  # outside it is only noted
    assert stop.asked()


def test_long_work_is_not_begun_after_a_signal(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
        raise AssertionError("begun")


def test_the_time_limit():
    stop = Stop(max_hours=0.02 / 3600)
    try:
        assert not stop.asked()
        time.sleep(0.05)
        assert stop.asked() and stop.cause == "train.max_hours"
    finally:
        stop.close()
    stop = Stop(max_hours=1, since=time.time() - 3601)
    try:
        assert stop.asked()
    finally:
        stop.close()
