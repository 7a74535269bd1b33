"""Signals that ask a run to stop, in processes of their own."""

import subprocess
import sys

PRELUDE = """
import os, signal, sys, threading, time
from megatron_moe.distributed import signals
"""


def output_of(code: str) -> str:
    command = [sys.executable, "-c", PRELUDE + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_signal_is_noted_and_more_change_nothing() -> None:
    code = """
signals.install()
signals.install()
print(signals.stop_requested())
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
    os.kill(os.getpid(), number)
print(signals.stop_requested(), signals.received_name())
"""
    assert output_of(code) == "False\nTrue SIGUSR1\n"


def test_a_signal_that_was_held_back_counts() -> None:
    code = """
with signals.held_back():
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.stop_requested())
    signals.install()
    print(signals.stop_requested())
"""
    assert output_of(code) == "False\nTrue\n"


def test_another_thread_does_not_install() -> None:
    code = """
thread = threading.Thread(target=signals.install)
thread.start()
thread.join()
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    assert output_of(code) == "True\n"


def test_a_read_goes_on_after_a_signal() -> None:
    """One of a library, which does not begin it again as Python's own do."""
    code = """
import ctypes
signals.install()
read, write = os.pipe()
sender = threading.Thread(target=lambda: (time.sleep(0.2), os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.2),
                                          os.write(write, b"x")))
sender.start()
buffer = ctypes.create_string_buffer(1)
print(ctypes.CDLL(None).read(read, buffer, 1), buffer.raw.decode())
sender.join()
print(signals.stop_requested())
"""
    assert output_of(code) == "1 x\nTrue\n"


def test_a_process_that_reads_for_a_rank_leaves_signals_to_it() -> None:
    code = """
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    signals.leave_to_parent()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    sender = os.fork()  # neither the parent nor the process itself
    if sender == 0:
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    os.waitpid(sender, 0)
    time.sleep(0.3)
    os.write(tell, b"goes on")
    time.sleep(60)
    os._exit(1)
os.close(tell)
print(os.read(ready, 100).decode())
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(code) == "goes on\n0\n"


def test_a_signal_after_the_end_kills_no_process_that_is_ending() -> None:
    code = """
class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGUSR1):
        kill(process, number)  # Python has given the signals back by then
signals.install()
signals.ignore()
late = Late()
print(signals.stop_requested())
"""
    assert output_of(code) == "False\n"
