"""The command line, ``moeq``. Frameworks are imported inside the commands, so help is instant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ImportError as error:
    raise ImportError(
        "the command line needs typer: pip install 'moeq-plugin[llmcompressor]'"
    ) from error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def moeq() -> None:
    """Quantize Mixture-of-Experts models so that no expert is damaged."""


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
) -> None:
    """Let a model write its own calibration set, with evenly loaded experts (EBSS).

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeq_plugin.core.sampling import EBSSConfig
    from moeq_plugin.integrations.llm_compressor.ebss import sample_set

    with _errors("sample"):
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
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        loaded.to(_device())  # type: ignore[arg-type]
        tokenizer = AutoTokenizer.from_pretrained(model)
        report = sample_set(loaded, tokenizer, config, path=out).report
    typer.echo(f"{out}: {report.summary()}")
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for text in report.samples:
        typer.echo(f"  {text[:100]!r}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    sensitivity: Annotated[
        Path, typer.Option(help="table of sensitivities; measured and written if it is not there")
    ],
    dataset: Annotated[
        Path | None, typer.Option(help="JSON lines with `text` or `input_ids`; default: EBSS")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="sequences")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 2048,
    bits_per_weight: Annotated[
        list[float] | None, typer.Option(help="budget to allocate; may be given several times")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="scheme to choose from, such as W3A16_G64")
    ] = None,
    target: Annotated[str, typer.Option(help="vllm, gguf, expert or linear")] = "vllm",
    robust: Annotated[bool, typer.Option(help="minimise the worst domain")] = False,
    allocation: Annotated[
        Path | None, typer.Option(help="where to write the allocation of the last budget")
    ] = None,
) -> None:
    """Measure what every linear loses at every option, and allocate bits to budgets.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    from moeq_plugin.core.allocation import BitBudget, pareto_front
    from moeq_plugin.core.sensitivity import SensitivityTable

    with _errors("plan"):
        if not sensitivity.exists():
            _measure(model, sensitivity, dataset, option, num_calibration_samples, max_seq_length)
        table = SensitivityTable.load(sensitivity)
        budgets = [BitBudget(bits_per_weight=bits) for bits in bits_per_weight or ()]
        front = pareto_front(table, budgets, target=target, robust=robust)
        for found in front:
            counts = Counter(found.choice.values())
            chosen = ", ".join(f"{counts[o]} {o}" for o in table.options if o in counts)
            size = (found.num_bytes + table.fixed_bytes) / 1e9
            typer.echo(
                f"{found.bits_per_weight:.4f} bits per weight, {size:.4g} GB: predicted loss "
                f"{found.value:.4g}; {chosen}"
            )
        if allocation is not None and front:
            front[-1].save(allocation)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="new directory for the checkpoint")],
    scheme: Annotated[str | None, typer.Option(help="such as W4A16")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="budget instead")] = None,
    size_gb: Annotated[float | None, typer.Option(help="of the checkpoint, instead")] = None,
    allocation: Annotated[Path | None, typer.Option(help="of `moeq plan`, instead")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="table of `moeq plan`")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="scheme to choose from, such as W3A16_G64")
    ] = None,
    target: Annotated[str, typer.Option(help="vllm, gguf, expert or linear")] = "vllm",
    dataset: Annotated[
        Path | None, typer.Option(help="JSON lines with `text` or `input_ids`; default: EBSS")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="sequences")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 2048,
) -> None:
    """Quantize a model to a scheme, a budget or an allocation made before.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    wanted = {
        "scheme": scheme,
        "bits_per_weight": bits_per_weight,
        "size_gb": size_gb,
        "allocation": None if allocation is None else str(allocation),
    }
    if sum(wish is not None for wish in wanted.values()) != 1:
        names = "--scheme, --bits-per-weight, --size-gb and --allocation"
        typer.echo(f"moeq quantize: give exactly one of {names}", err=True)
        raise typer.Exit(2)
    with _errors("quantize"):
        from moeq_plugin import MoEQuantModifier

        settings: dict[str, Any] = {k: v for k, v in wanted.items() if v is not None}
        settings |= {"options": option} if option else {}
        settings |= {"sensitivity": str(sensitivity)} if sensitivity is not None else {}
        recipe = MoEQuantModifier(**settings, target=target, ignore=["lm_head"])
        _oneshot(
            model,
            recipe,
            dataset=_read(dataset),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            output_dir=str(out),
        )
        typer.echo(f"{out}: written")


def _measure(
    model: str,
    path: Path,
    dataset: Path | None,
    options: list[str] | None,
    num_calibration_samples: int,
    max_seq_length: int,
) -> None:
    from moeq_plugin.integrations.llm_compressor.sensitivity import SensitivityModifier

    modifier = SensitivityModifier(**({"options": options} if options else {}))
    _oneshot(
        model,
        modifier,
        dataset="ebss" if dataset is None else _read(dataset),
        num_calibration_samples=num_calibration_samples if dataset is not None else 128,
        max_seq_length=max_seq_length if dataset is not None else 512,
    )
    modifier.table.save(path)
    typer.echo(f"{path}: {len(modifier.table.rows)} linears at {len(modifier.options)} options")


def _oneshot(model: str, recipe: Any, **arguments: Any) -> None:
    from llmcompressor.entrypoints.oneshot import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    oneshot(model=loaded, tokenizer=tokenizer, recipe=recipe, **arguments)


def _read(path: Path | None) -> Any:
    if path is None:
        return None
    from datasets import load_dataset

    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected JSON lines with `text` or `input_ids`")
    return load_dataset("json", data_files=str(path), split="train")


@contextmanager
def _errors(command: str) -> Iterator[None]:
    """Turn what the request got wrong into a message and exit code 2.

    Raises:
        typer.Exit: with that code.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"moeq {command}: {error}", err=True)
        raise typer.Exit(2) from None


def _device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def main() -> None:
    """Run ``moeq``."""
    app()
