"""``moeq quantize``: a checkpoint from a model and a request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moeq_plugin.cli.data import Data
from moeq_plugin.cli.display import display
from moeq_plugin.cli.health import complaint, health
from moeq_plugin.cli.loading import TrustRemoteCode, run_oneshot
from moeq_plugin.cli.modifiers import of_recipe, of_request
from moeq_plugin.cli.shared import app, errors, say
from moeq_plugin.files.new_directory import check_new_directory
from moeq_plugin.files.places import check_places
from moeq_plugin.files.work_dir import (
    check_work_dir,
    holds_progress,
    holds_state,
    may_go,
    remove_state,
)

_REQUESTS = "--scheme, --bits-per-weight, --size-gb, --allocation and --recipe"


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="new directory for the checkpoint")],
    scheme: Annotated[str | None, typer.Option(help="such as W4A16")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="budget instead")] = None,
    size_gb: Annotated[float | None, typer.Option(help="of the checkpoint, instead")] = None,
    allocation: Annotated[Path | None, typer.Option(help="of `moeq plan`, instead")] = None,
    recipe: Annotated[Path | None, typer.Option(help="llm-compressor recipe, instead")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="table of `moeq plan`")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="scheme to choose from, such as W3A16_G64")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="fast, balanced or best")] = None,
    target: Annotated[str, typer.Option(help="vllm, gguf, expert or linear")] = "vllm",
    dataset: Annotated[
        Path | None, typer.Option(help="JSON lines with `text` or `input_ids`; default: EBSS")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="sequences")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 2048,
    work_dir: Annotated[
        Path | None, typer.Option(help="state after every layer; default: OUT.work")
    ] = None,
    resume: Annotated[bool, typer.Option(help="continue a run that was interrupted")] = False,
    strict: Annotated[
        bool, typer.Option(help="fail if a linear does not rest on enough of its own tokens")
    ] = False,
    jsonl: Annotated[bool, typer.Option(help="print progress as JSON lines")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model to a scheme, a budget, an allocation made before or a recipe.

    Raises:
        typer.Exit: with code 1 if a linear was not quantized as asked, 2 if the request cannot be
            met, 130 if interrupted.
    """
    given: dict[str, Any] = {
        "scheme": scheme,
        "bits_per_weight": bits_per_weight,
        "size_gb": size_gb,
        "allocation": allocation and str(allocation),
        "recipe": recipe,
    }
    request = {name: value for name, value in given.items() if value is not None}
    _check_request(request, preset)
    with errors("quantize"):
        work_dir = work_dir or out.with_name(out.name + ".work")
    request |= {"options": option} if option else {}
    request |= {"preset": preset} if preset is not None else {}
    request |= {} if sensitivity is None else {"sensitivity": str(sensitivity)}
    phases = _phases(request, has_dataset=dataset is not None)
    with errors("quantize"), display(phases=phases, jsonl=jsonl):
        reads = {"--dataset": dataset, "--recipe": recipe, "MODEL": Path(model)}
        reads |= {"--sensitivity": sensitivity, "--allocation": allocation}
        check_places(reads=reads, makes={"OUT": out, "--work-dir": work_dir})
        check_new_directory(out)
        _check_resume(work_dir, resume=resume)
        is_ours = may_go(work_dir)
        if recipe is None:
            modifiers = of_request(**request, target=target, work_dir=str(work_dir))
        else:
            modifiers = of_recipe(recipe, work_dir)
        data = Data(dataset, num_calibration_samples, max_seq_length)
        summary, failures = _run(model, out, modifiers, data, work_dir, strict, trust_remote_code)
    remove_state(work_dir, with_directory=is_ours)
    if not jsonl:
        say(f"{out}: {summary}")
        say(f"next: moeq verify {out} --source {model}")
    if failures:
        _complain(failures, f"{out} holds them rounded to nearest")
        raise typer.Exit(1)


def _check_request(request: Mapping[str, Any], preset: str | None) -> None:
    """Refuse what is no request, or two.

    Raises:
        typer.Exit: with code 2.
    """
    if len(request) != 1:
        typer.echo(f"moeq quantize: give exactly one of {_REQUESTS}", err=True)
        raise typer.Exit(2)
    if "recipe" in request and preset is not None:
        typer.echo("moeq quantize: --preset is a line of the recipe, `preset: ...`", err=True)
        raise typer.Exit(2)


def _phases(request: Mapping[str, Any], *, has_dataset: bool) -> list[str]:
    """Return what the run will go through, in order."""
    has_budget = "bits_per_weight" in request or "size_gb" in request
    return [
        *([] if has_dataset else ["sample"]),
        *(["measure"] if has_budget and "sensitivity" not in request else []),
        "quantize",
        "save",
    ]


def _complain(failures: list[str], consequence: str) -> None:
    for line in complaint(failures, consequence).splitlines():
        say(line, err=True)


def _run(
    model: str,
    out: Path,
    modifiers: list[Any],
    data: Data,
    work_dir: Path,
    strict: bool,
    trust_remote_code: bool,
) -> tuple[str, list[str]]:
    """Quantize and write the checkpoint; return what :func:`health` says of it.

    Raises:
        typer.Exit: with code 1 if strict and a linear was not quantized as asked, 130 if
            interrupted; nothing is written then.
    """
    from moeq_plugin.files.datasets import read_dataset
    from moeq_plugin.files.publish import staged

    try:
        with staged(out) as stage, _without_empty_state(work_dir):
            run_oneshot(
                model,
                modifiers,
                trust_remote_code=trust_remote_code,
                dataset=read_dataset(data.path, data.num_sequences),
                num_calibration_samples=data.num_sequences,
                max_seq_length=data.seq_len,
                shuffle_calibration_samples=False,
                output_dir=str(stage),
            )
            summary, failures = health(stage, strict=strict)
            if failures and strict:
                _complain(failures, f"{out} was not written")
                if holds_progress(work_dir):
                    way_out = f"--resume without --strict writes it, from {work_dir}"
                    say(way_out, err=True)
                raise typer.Exit(1)
            return summary, failures
    except KeyboardInterrupt:
        kept = f"--resume continues from {work_dir}" if holds_progress(work_dir) else "nothing kept"
        say("", err=True)  # after the ^C of the terminal
        say(f"interrupted; {kept}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _without_empty_state(work_dir: Path) -> Iterator[None]:
    """Leave nothing behind of a run that failed before it had finished anything."""
    is_ours = may_go(work_dir)
    try:
        yield
    except BaseException:
        if not holds_progress(work_dir):
            remove_state(work_dir, with_directory=is_ours)
        raise


def _check_resume(work_dir: Path, *, resume: bool) -> None:
    """Let nobody continue, or fail to continue, an earlier run without knowing.

    Raises:
        ValueError: if there is state and ``resume`` was not asked for, or the other way round, or
            files of something else.
    """
    check_work_dir(work_dir)
    if holds_progress(work_dir) and not resume:
        raise ValueError(
            f"{work_dir} holds the state of an unfinished run: continue it with --resume, or "
            "delete it to start anew"
        )
    if resume and not holds_state(work_dir):
        raise ValueError(f"--resume: there is no state of an unfinished run in {work_dir}")
