import os

# the host logs a line per linear; what a test asserts on, it captures itself
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command has it, for what tests start

import logging  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

# tiny matrices: a second thread only waits, and on a busy machine it waits for long
torch.set_num_threads(1)

# The lock of progress bars is one of all processes, and tests kill children that may hold it: the
# next bar here would wait for ever. A lock of this process, and of each child, cannot be left held.
tqdm.set_lock(threading.RLock())
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


@pytest.fixture(autouse=True)
def _loggers_write_to_open_streams():
    """A library first imported while a command's output is captured would log to that for ever."""
    for logger in list(logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if getattr(getattr(handler, "stream", None), "closed", False):
                handler.stream = sys.stderr  # setStream would flush the closed one
