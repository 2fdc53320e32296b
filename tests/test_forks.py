"""A process that is forked ends by SIGTERM, also by one that comes while it begins."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from children import run_python


FORKS = """
import os
import signal
import time

from bs_optuna.forks import end_forks_by_sigterm

signal.signal(signal.SIGTERM, lambda number, frame: None)
end_forks_by_sigterm()
for _ in range(200):
    child = os.fork()
    if child == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it did not end"
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
os.kill(os.getpid(), signal.SIGTERM)  # is still heard here
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} cannot fork")
def test_a_fork_ends_by_the_signal_at_any_moment() -> None:
    run = run_python("-c", FORKS)
    assert run.stdout == "done\n", run.stderr
    assert run.returncode == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # none of it in this process
