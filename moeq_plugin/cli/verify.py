"""``moeq verify``: is a checkpoint what its config says, and will its reader see the same?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.display import display
from moeq_plugin.cli.loading import TrustRemoteCode, load_tokenizer, loading
from moeq_plugin.cli.named_model import local
from moeq_plugin.cli.shared import app, errors, say, say_json

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.checks.findings import Finding


@app.command()
def verify(
    checkpoint: Annotated[
        str, typer.Argument(help="directory of a checkpoint of any origin, or an id in the cache")
    ],
    source: Annotated[
        str | None, typer.Option(help="16-bit model to compare every weight with")
    ] = None,
    target: Annotated[str, typer.Option(help="vllm, transformers or gguf")] = "vllm",
    tp: Annotated[int, typer.Option(help="ranks of tensor parallelism")] = 1,
    generate: Annotated[
        str | None, typer.Option(help="prompt to continue with the dequantized model")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check names, shapes, schemes and numbers of a checkpoint before anyone serves it.

    Raises:
        typer.Exit: with code 1 for errors, 2 if the request or a file cannot be read.
    """
    with errors("verify"):
        from dataclasses import replace

        from moeq_plugin import verify_checkpoint

        directory = local(checkpoint)
        original = None if source is None else local(source)
        report = verify_checkpoint(directory, original, target=target, tp=tp)
        if generate is not None and not report.errors:
            with display(phases=[], jsonl=False):
                text, found = _generate(directory, generate, trust_remote_code)
            report = replace(report, findings=(*report.findings, *found))
            for line in f"{generate}{text}".splitlines():
                say(line, err=as_json)
        if as_json:
            say_json(json.dumps(report.to_dict(), indent=1))
        else:
            for line in report.lines():
                say(line)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _generate(checkpoint: Path, prompt: str, trust_remote_code: bool) -> tuple[str, list[Finding]]:
    """Return a continuation, and a finding if the model does not predict numbers."""
    import torch

    from moeq_plugin.checkpoint.checks.findings import error
    from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized

    # transformers declares `generate` for a class that exists for type checkers only
    with loading(str(checkpoint)):
        model: Any = load_dequantized(checkpoint, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(str(checkpoint), trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
        if not logits.isfinite().all():
            return "", [error("generation", "logits", f"NaN or infinity after {prompt!r}")]
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])), []
