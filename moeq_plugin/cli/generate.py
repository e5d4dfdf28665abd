"""``moeq generate``: a continuation of a prompt by a model or a quantized checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moeq_plugin.cli.display import display
from moeq_plugin.cli.loading import TrustRemoteCode, device, load_model
from moeq_plugin.cli.named_model import check_named
from moeq_plugin.cli.shared import app, errors, say


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="directory, id or RWKV .pth file")],
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of random choices, with a temperature")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt, to see that a checkpoint is alive; RWKV runs on its packed weights.

    Raises:
        typer.Exit: with code 2 if the model cannot be loaded.
    """
    with errors("generate"):
        check_named(model)
        sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        sampling |= {"temperature": temperature} if temperature > 0 else {}
        with display(phases=[], jsonl=False):
            text = _continuation(model, prompt, seed, sampling, trust_remote_code)
        for line in f"{prompt}{text}".splitlines():
            say(line)


def _continuation(
    model: str, prompt: str, seed: int, sampling: dict[str, Any], trust_remote_code: bool
) -> str:
    import torch

    loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
    loaded = loaded.eval().to(device())
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        tokens = loaded.generate(**inputs, **sampling)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))
