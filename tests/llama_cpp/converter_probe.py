"""Run llama.cpp's own converter: ``python converter_probe.py SOURCES MODEL OUT``.

It is a process of its own because its sources bring another version of gguf. Vocabularies are left
out: the converter knows tokenizers by what they do to a text, and those of tiny models are strange
to it.
"""

import importlib
import sys
from typing import Any


def set_no_vocab(converter: Any) -> None:
    converter._set_vocab_none()
    converter.gguf_writer.add_vocab_size(converter.hparams["vocab_size"])


def main() -> None:
    sources, model, out = sys.argv[1:]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    program = importlib.import_module("convert_hf_to_gguf")
    package = importlib.import_module("conversion")
    for name in ("base", "deepseek", "glm", "qwen"):
        module = importlib.import_module(f"{package.__name__}.{name}")
        for found in vars(module).values():
            if isinstance(found, type) and "set_vocab" in vars(found):
                found.set_vocab = set_no_vocab
    # tiny models have no layers that predict further tokens, which it looks for where it knows them
    package.base.ModelBase.no_mtp = True
    sys.argv = ["convert", model, "--outfile", out, "--outtype", "bf16"]
    program.main()


if __name__ == "__main__":
    main()
