"""Compile the products when they are first needed, once for each machine and source.

Nothing is compiled where ``MOEQ_KERNELS=0`` or where there is no compiler; whoever asked then uses
torch alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("products.cpp")
_INCLUDED = tuple(sorted(_SOURCE.parent.glob("*.h")))
# What a machine has is asked of it, not of a list: the compiler knows what `native` means.
_OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 900  # 15 on an idle core; others may use it

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled products, ``None`` where they are switched off or cannot be compiled."""
    if os.environ.get("MOEQ_KERNELS") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        logger.warning("no C++ compiler: packed weights run through torch, which is slow")
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("packed weights run through torch, which is slow: %s", detail)
        return None


def _compiled(compiler: str) -> Path:
    """Return the shared library, compiled unless an earlier process has done it."""
    content = b"".join(path.read_bytes() for path in (_SOURCE, *_INCLUDED))
    content += _machine().encode() + " ".join((compiler, *_OPTIONS)).encode()
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeq_plugin"
    directory = Path(os.environ.get("MOEQ_CACHE") or default)
    library = directory / f"products-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if library.exists():
        return library
    # private to the user: what lies there is loaded as code
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory) as own:
        made = Path(own) / "products.so"
        command = [*compiler.split(), *_OPTIONS, str(_SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        made.replace(library)  # whole or not at all, whoever else compiles it at the same time
    return library


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the types of its functions, as products.cpp has them."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for kind in ("codebook", "grid"):
        few, times, decode = (
            getattr(library, f"moeq_{kind}_{name}") for name in ("few", "times", "decode")
        )
        few.argtypes = (pointer,)
        times.argtypes = (pointer, pointer, number, pointer, ctypes.c_int, ctypes.c_int)
        decode.argtypes = (pointer, number, number, pointer, ctypes.c_int, ctypes.c_int)
        few.restype, times.restype, decode.restype = number, None, None
    return library


def _machine() -> str:
    """Return what distinguishes processors: a home directory may be shared by several."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split("flags", 1)[-1].splitlines()[0] if info.exists() else ""
    return f"{platform.machine()} {platform.processor()} {flags}"
