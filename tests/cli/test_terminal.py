"""What stands on a terminal in the end, after everything that was drawn over something else."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from command_line import command, write_tiny

pytest.importorskip("llmcompressor")


def take_terminal():
    """Let keys of the terminal reach this process, which leads a session of its own."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # whoever runs the tests in the background ignores the signal, and so would the command
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def on_terminal(argv, interrupt_at, timeout=300):
    """Run a command on a terminal of 60 columns; Ctrl-C once a pattern has appeared."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "60", "LINES": "20", "TERM": "xterm"}
    process = subprocess.Popen(
        argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    seen, sent, until = "", False, time.monotonic() + timeout
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                seen += os.read(ours, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        if not sent and re.search(interrupt_at, seen):
            os.write(ours, b"\x03")
            sent = True
    return process.wait(timeout=60), seen


def shown(text):
    """Return the lines that are left when a terminal has obeyed the sequences."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            kind, number = part[-1], int(re.sub(r"\D", "", part[2:-1]) or 1)
            if kind == "A":
                row = max(0, row - number)
            elif kind == "K":
                lines[row] = "" if number == 2 else lines[row][:column]
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


@pytest.mark.slow
def test_after_ctrl_c_it_says_how_to_go_on(tmp_path):
    write_tiny(tmp_path, num_hidden_layers=6)
    request = ["quantize", tmp_path / "model", tmp_path / "out", "--scheme", "W4A16_G32"]
    argv = command(*request, "--dataset", tmp_path / "data.jsonl")
    code, seen = on_terminal(argv, r"\b[12] of 6 layers")
    assert code == 130
    lines = [line for line in shown(seen) if line]
    assert "interrupted; --resume continues from" in " ".join(lines[-3:])
    assert (tmp_path / "out.work").is_dir()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_ends_the_run(tmp_path):
    write_tiny(tmp_path)
    request = ["quantize", tmp_path / "model", tmp_path / "out", "--scheme", "W4A16_G32"]
    argv = command(*request, "--dataset", tmp_path / "data.jsonl")
    code, seen = on_terminal(argv, "loading")
    assert code == 130
    assert "interrupted" in seen
    assert not (tmp_path / "out").exists()


def test_something_is_on_the_screen_before_the_imports():
    code = (
        "import moeq_plugin.cli.display as display, time\n"
        "display.log_to = lambda console: (time.sleep(2), print('IMPORTS'))\n"
        "with display.display(phases=[], jsonl=False): pass\n"
    )
    exit_code, seen = on_terminal([sys.executable, "-c", code], "nothing is typed")
    assert exit_code == 0
    assert 0 <= seen.find("loading") < seen.find("IMPORTS")
