"""The CPU time of a step is that of everything that it ran."""

import subprocess
import sys
import time

from megatron_tcod.train import PhaseClock, cpu_seconds

BURN = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\n"


def burn_here(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_process_that_is_alive_counts_and_goes_on_counting_when_it_has_ended():
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", BURN + "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    alive = cpu_seconds() - before
    child.communicate(b"\n")
    ended = cpu_seconds() - before
    assert 0.45 <= alive <= ended < alive + 0.5


def test_a_step_is_charged_with_its_own_seconds_alone():
    clock = PhaseClock(lambda phase: None)
    burn_here(0.5)
    clock.take()
    burn_here(0.2)
    assert 0.2 <= clock.take()["cpu"] < 0.4
    assert clock.take()["cpu"] < 0.2, "no step, next to nothing"
