"""What a run ran on: libraries, hardware, time and memory."""

from __future__ import annotations

import platform
import resource
import sys
import time
from importlib.metadata import version

import torch

_PACKAGES = ("moeq-plugin", "llmcompressor", "compressed-tensors", "transformers", "torch")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide about the result."""
    return {package: version(package) for package in _PACKAGES}


def run_facts(began: float) -> dict[str, str]:
    """Return what a reader of the checkpoint wants to know of the run, in words.

    Args:
        began: ``time.monotonic()`` when it began; of a continued run, its last process.
    """
    minutes = (time.monotonic() - began) / 60
    return {
        "hardware": _hardware(),
        "wall time": f"{minutes:.1f} minutes",
        "peak memory": f"{peak_memory() / 1e9:.1f} GB",
    }


def peak_resident_memory() -> int:
    """Return bytes: the most memory of the host that this process has held."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident  # there in bytes already


def peak_memory() -> int:
    """Return bytes: the most this process has held, on the host or on its accelerator."""
    resident = peak_resident_memory()
    if not torch.accelerator.is_available():
        return resident
    return max(resident, int(torch.accelerator.max_memory_allocated()))


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        return accelerator.type
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
