"""``moeq sample``: let a model write its own calibration set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeq_plugin.cli.display import display
from moeq_plugin.cli.loading import TrustRemoteCode, device, load_model
from moeq_plugin.cli.named_model import check_named
from moeq_plugin.cli.shared import app, errors, say


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="JSON lines to write; an unfinished file is resumed")],
    num_sequences: Annotated[int, typer.Option(help="sequences")] = 128,
    seq_len: Annotated[int, typer.Option(help="tokens per sequence, start included")] = 512,
    beam_width: Annotated[int, typer.Option(help="branches per sequence; 1 is greedy")] = 4,
    tau: Annotated[
        float | None, typer.Option(help="search for balance, 1.2 in the paper; default: sample")
    ] = None,
    prefix_tokens: Annotated[int, typer.Option(help="tokens sampled before the search")] = 3,
    no_repeat_ngram: Annotated[int | None, typer.Option(help="n-grams that may not repeat")] = None,
    global_balance: Annotated[bool, typer.Option(help="balance the set, not the sequence")] = False,
    seed: Annotated[int, typer.Option(help="of start tokens and prefixes")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Let a model write its own calibration set, with evenly loaded experts (EBSS).

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    with errors("sample"):
        check_named(model)
        from moeq_plugin.core.sampling import EBSSConfig
        from moeq_plugin.files.places import check_new_file, check_places
        from moeq_plugin.files.sampled_set import SampledSetFile

        manifest = SampledSetFile(out).manifest_path
        check_places(reads={"MODEL": Path(model)}, makes={"OUT": out, "its manifest": manifest})
        check_new_file("OUT", out, lambda _: manifest.exists(), makes_parents=True)
        config = EBSSConfig(
            num_sequences=num_sequences,
            seq_len=seq_len,
            beam_width=beam_width,
            tau=tau,
            prefix_tokens=prefix_tokens,
            no_repeat_ngram=no_repeat_ngram,
            global_balance=global_balance,
            seed=seed,
        )
        with display(phases=["sample"], jsonl=False):
            from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import sample_set

            loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
            loaded.to(device())
            report = sample_set(loaded, tokenizer, config, path=out).report
    say(f"{out}: {report.summary()}")
    for text in report.samples:
        say(f"  {text[:100]!r}")
