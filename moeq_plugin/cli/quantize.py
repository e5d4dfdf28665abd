"""``moeq quantize``: a checkpoint from a model and a wish."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from moeq_plugin.cli.display import display
from moeq_plugin.cli.shared import app, errors, run_oneshot

_WISHES = "--scheme, --bits-per-weight, --size-gb, --allocation and --recipe"


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
) -> None:
    """Quantize a model to a scheme, a budget, an allocation made before or a recipe.

    Raises:
        typer.Exit: with code 1 if a linear was not quantized as asked, 2 if the request cannot be
            met, 130 if interrupted.
    """
    wanted: dict[str, Any] = {
        "scheme": scheme,
        "bits_per_weight": bits_per_weight,
        "size_gb": size_gb,
        "allocation": None if allocation is None else str(allocation),
        "recipe": recipe,
    }
    wanted = {name: wish for name, wish in wanted.items() if wish is not None}
    if len(wanted) != 1:
        typer.echo(f"moeq quantize: give exactly one of {_WISHES}", err=True)
        raise typer.Exit(2)
    work_dir = work_dir or out.with_name(out.name + ".work")
    phases = [] if dataset is not None else ["sample"]
    if ("bits_per_weight" in wanted or "size_gb" in wanted) and sensitivity is None:
        phases.append("measure")
    with errors("quantize"), display(phases=[*phases, "quantize", "save"], jsonl=jsonl):
        from moeq_plugin.files.atomic import staged
        from moeq_plugin.files.datasets import read_dataset
        from moeq_plugin.integrations.llm_compressor.preflight import check_output_dir

        check_output_dir(out)
        _check_work_dir(work_dir, resume=resume)
        if recipe is None:
            wanted |= {"options": option} if option else {}
            wanted |= {"sensitivity": str(sensitivity)} if sensitivity is not None else {}
            modifiers = _modifiers(**wanted, target=target, work_dir=str(work_dir))
        else:
            modifiers = _of_recipe(recipe, work_dir)
        try:
            with staged(out) as stage:
                run_oneshot(
                    model,
                    modifiers,
                    dataset=read_dataset(dataset),
                    num_calibration_samples=num_calibration_samples,
                    max_seq_length=max_seq_length,
                    shuffle_calibration_samples=False,
                    output_dir=str(stage),
                )
                summary, failures = _health(stage, strict=strict)
                if failures and strict:
                    typer.echo(_complaint(failures, f"{out} was not written"), err=True)
                    if _has_state(work_dir):
                        way_out = f"--resume without --strict writes it, from {work_dir}"
                        typer.echo(way_out, err=True)
                    raise typer.Exit(1)
        except KeyboardInterrupt:
            kept = f"--resume continues from {work_dir}" if _has_state(work_dir) else "nothing kept"
            typer.echo(f"\ninterrupted; {kept}", err=True)
            raise typer.Exit(130) from None
    shutil.rmtree(work_dir, ignore_errors=True)
    if not jsonl:
        typer.echo(f"{out}: {summary}")
        typer.echo(f"next: moeq verify {out} --source {model}")
    if failures:
        typer.echo(_complaint(failures, f"{out} holds them rounded to nearest"), err=True)
        raise typer.Exit(1)


def _check_work_dir(work_dir: Path, *, resume: bool) -> None:
    """Let nobody continue, or fail to continue, an earlier run without knowing.

    Raises:
        ValueError: if there is state and ``resume`` was not asked for, or the other way round.
    """
    if _has_state(work_dir) and not resume:
        raise ValueError(
            f"{work_dir} holds the state of an unfinished run: continue it with --resume, or "
            "delete it to start anew"
        )
    if resume and not _has_state(work_dir):
        raise ValueError(f"--resume: there is no state of an unfinished run in {work_dir}")


def _has_state(work_dir: Path) -> bool:
    return work_dir.is_dir() and any(work_dir.iterdir())


def _modifiers(**settings: Any) -> list[Any]:
    """Return what a wish comes to; unlike the host's, a scheme may name its group size."""
    from moeq_plugin import MoEQuantModifier
    from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option

    if "_G" in (scheme := settings.get("scheme", "")):
        group = parse_option(settings.pop("scheme")).for_targets(["Linear"])
        settings["config_groups"] = {scheme: group}
    return [MoEQuantModifier(**settings, ignore=["lm_head"])]


def _of_recipe(path: Path, work_dir: Path) -> list[Any]:
    """Return a recipe's modifiers, those of ours told where to keep their state.

    Raises:
        ValueError: if it is no recipe, or state of several modifiers would have to be kept.
    """
    from llmcompressor.recipe import Recipe

    from moeq_plugin import MoEQuantModifier

    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a recipe in YAML")
    try:
        modifiers = list(Recipe.create_instance(str(path)).modifiers)
    except Exception as error:  # whatever a file that is no recipe makes a parser do
        raise ValueError(f"{path} is not a recipe: {error}") from error
    if not modifiers:
        raise ValueError(f"{path} names no modifier")
    if len(modifiers) == 1 and isinstance(modifiers[0], MoEQuantModifier):
        return [modifiers[0].model_copy(update={"work_dir": str(work_dir)})]
    typer.echo(f"{path}: such a recipe keeps no state, a kill loses the run", err=True)
    return modifiers


def _health(checkpoint: Path, *, strict: bool) -> tuple[str, list[str]]:
    """Return the run in one line, and every linear or scale that is not as asked for."""
    from moeq_plugin.records.run import FILE_NAME, Basis, RunRecord

    if not (checkpoint / FILE_NAME).exists():
        return "written by modifiers of others, which keep no record", []
    records = RunRecord.load(checkpoint)
    rests_on = [
        (linear.name, linear.basis, linear.effective_tokens)
        for record in records
        for linear in record.linears
    ]
    rests_on += [
        (f"scales of {name}", Basis(of["basis"]), of["effective_tokens"])
        for record in records
        for name, of in record.smoothed.items()
    ]
    wrong = {Basis.NONE} if not strict else {Basis.NONE, Basis.LAYER, Basis.SHRUNK}
    failures = [
        f"{name}: {basis.value}, {effective_tokens:.1f} effective tokens"
        for name, basis, effective_tokens in rests_on
        if basis in wrong
    ]
    return "; ".join(record.summary(len(record.linears)) for record in records), failures


def _complaint(failures: list[str], consequence: str) -> str:
    listed = "\n".join(f"  - {failure}" for failure in failures[:10])
    return (
        f"moeq quantize: {len(failures)} linears were not quantized as asked, {consequence}:\n"
        f"{listed}\nMore calibration data feeds them."
    )
