"""llama.cpp itself, as `make llama` compiles it: quantize, and run.

Each call is a process of its own: llama.cpp ends the process where it meets the unexpected.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

BUILT = Path(__file__).parent.parent / "build" / "llama"
PROGRAMS = BUILT / "built" / "bin"
QUANTIZE = PROGRAMS / "llama-quantize"
CONVERTER = BUILT / "source" / "vendor" / "llama.cpp"


class LlamaError(RuntimeError):
    """llama.cpp refused, with what it printed."""


def quantize(source: Path, out: Path, file_type: str, *arguments: object) -> str:
    """Let ``llama-quantize`` write a file; return what it printed.

    Raises:
        LlamaError: if it fails.
    """
    return _run([QUANTIZE, *arguments, source, out, file_type, "1"])


def logits(model: Path, tokens: np.ndarray) -> np.ndarray:
    """Return ``[sequences, tokens, vocabulary]`` float32 of one forward pass per sequence.

    Raises:
        LlamaError: if the model does not load.
    """
    out = model.with_suffix(".logits.npy")
    request = {"model": str(model), "tokens": tokens.tolist(), "out": str(out)}
    _run([sys.executable, __file__], text=json.dumps(request))
    found: np.ndarray = np.load(out)
    out.unlink()
    return found


def _run(command: Sequence[object], text: str = "") -> str:
    done = subprocess.run([*map(str, command)], input=text, capture_output=True, text=True)
    if done.returncode:
        raise LlamaError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def _bindings() -> ModuleType:
    """Return llama-cpp-python's declarations, without the package around them and its needs."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(PROGRAMS)
    package = ModuleType("llama_cpp")
    package.__path__ = [str(BUILT / "source" / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp

    return llama_cpp


def _compute_logits(model_path: str, rows: list[list[int]]) -> np.ndarray:
    llama = _bindings()
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(model_path.encode(), params)
    if not model:
        raise SystemExit(1)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    length = len(rows[0])
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = 1
    context = llama.llama_init_from_model(model, params)
    found = []
    for row in rows:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch = llama.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for position, token in enumerate(row):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1
        if llama.llama_decode(context, batch):
            raise SystemExit(1)
        values = ctypes.cast(
            llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * length * vocabulary)
        )
        found.append(np.array(values.contents, dtype=np.float32).reshape(length, vocabulary))
        llama.llama_batch_free(batch)
    return np.stack(found)


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    np.save(asked["out"], _compute_logits(asked["model"], asked["tokens"]))
