"""Ctrl-C ends the command line with its code, at any moment, and without a traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

import jchain.__main__ as command_line
from jchain.__main__ import main


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_that_python_drops_comes_again(monkeypatch, capsys, number, code):
    class Sender:
        """Gets a signal in its destructor, where exceptions are dropped."""

        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    def run(args):
        Sender()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.01)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in background jobs
    monkeypatch.setitem(command_line.COMMANDS, "compare", run)
    assert main(["compare", "x"]) == code
    assert capsys.readouterr().err == "jchain: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_while_jchain_is_imported_has_no_traceback(tmp_path):
    # The import waits until it is interrupted.
    (tmp_path / "jax.py").write_text(
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(30)\n"
        "except BaseException as error:\n    raise ImportError('hidden') from error\n"
    )
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import jchain_command\n"
        "jchain_command.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "jchain: interrupted\n")


def test_an_interrupted_compilation_does_not_crash_the_end():
    # The usual end of the interpreter crashes here.
    code = (
        "import threading, jax, jax.numpy as jnp\n"
        "from jchain.cli.interruption import exit_process\n"
        "x = jnp.ones((8, 8))\n"
        "def layers(x):\n"
        "    for i in range(300):\n"
        "        x = jnp.sort(jnp.tanh(x @ x + i))\n"
        "    return x\n"
        "lowered = jax.jit(layers).lower(x)\n"
        "print('compiling')\n"
        "threading.Thread(target=lowered.compile, daemon=True).start()\n"
        "threading.Event().wait(0.2)\n"
        "exit_process(130)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "compiling\n", "")
