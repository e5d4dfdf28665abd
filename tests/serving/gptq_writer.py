"""Quantize models with GPTQModel itself; run by the interpreter of ``.venv-gptq``.

Reads one JSON object from standard input, ``{"prompts": [[1, 2, 3]], "jobs": [["model directory",
"new directory", {"bits": 4}], ...]}`` with the arguments of GPTQModel's ``QuantizeConfig``.
"""

import json
import sys


def main() -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    request = json.load(sys.stdin)
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in request["prompts"]]
    for source, out, settings in request["jobs"]:
        model = GPTQModel.load(source, QuantizeConfig(**settings), device="cpu")
        model.quantize(data, batch_size=4)
        model.save(out)


if __name__ == "__main__":
    main()
