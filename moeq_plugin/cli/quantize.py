"""``moeq quantize``: a checkpoint from a model and a request."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moeq_plugin.checkpoint.presets import served_by
from moeq_plugin.cli import fields
from moeq_plugin.cli.data import ChatTemplate, Data, Datasets, MaxSeqLength, NumSamples
from moeq_plugin.cli.display import display
from moeq_plugin.cli.health import borrowing, complaint, health, verdict
from moeq_plugin.cli.loading import TrustRemoteCode, run_oneshot
from moeq_plugin.cli.modifiers import check_recipe, of_recipe, of_request
from moeq_plugin.cli.named_model import check_named
from moeq_plugin.cli.rwkv import is_rwkv
from moeq_plugin.cli.shared import Interrupted, app, errors, say
from moeq_plugin.files.new_directory import check_new_directory
from moeq_plugin.files.places import check_places
from moeq_plugin.files.work_dir import (
    check_work_dir,
    holds_progress,
    holds_state,
    may_go,
    remove_state,
)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="model directory, id or RWKV .pth file")],
    out: Annotated[Path, typer.Argument(help="new directory for the checkpoint")],
    scheme: fields.Scheme = None,
    bits_per_weight: fields.BitsPerWeight = None,
    size_gb: fields.SizeGB = None,
    allocation: fields.AllocationFile = None,
    recipe: fields.RecipeFile = None,
    sensitivity: fields.SensitivityFile = None,
    option: fields.Options = None,
    preset: fields.Preset = None,
    target: fields.Target = "vllm",
    ignore: fields.Ignore = None,
    weight_observer: fields.WeightObserver = None,
    affinity_power: fields.AffinityPower = None,
    seed: fields.Seed = None,
    dataset: Datasets = None,
    chat_template: ChatTemplate = True,
    num_calibration_samples: NumSamples = 512,
    max_seq_length: MaxSeqLength = 2048,
    batch_size: Annotated[int, typer.Option(help="sequences that are calibrated on at a time")] = 1,
    dtype: Annotated[str, typer.Option(help="to load weights in; auto: their own")] = "auto",
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of an id")] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="where state is kept after every layer; default: OUT.work")
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
        typer.Exit: with code 1 if a linear was not quantized as asked, or no expert saw enough
            tokens; 2 if the request cannot be met; 130 if interrupted.
    """
    with errors("quantize"):
        request = fields.given(
            scheme=scheme, bits_per_weight=bits_per_weight, size_gb=size_gb, allocation=allocation,
            recipe=recipe, sensitivity=sensitivity, options=option, preset=preset, ignore=ignore,
            weight_observer=weight_observer, affinity_power=affinity_power, seed=seed,
        )  # fmt: skip
        fields.check_fields(request, has_default=is_rwkv(model))
        fields.check_words(preset, target, [scheme, *(option or ())])
        fields.check_loading(dtype, batch_size)
        check_named(model)
        data = Data(tuple(dataset or ()), num_calibration_samples, max_seq_length, chat_template)
        data.check()
        job = _Job(
            model, out, work_dir or out.with_name(out.name + ".work"), data, strict,
            {"batch_size": batch_size, "dtype": dtype, "revision": revision,
             "trust_remote_code": trust_remote_code},
        )  # fmt: skip
        job.check(request, resume=resume)
    with errors("quantize"):
        summary, failures = job.run(request, target, jsonl=jsonl)
    if not jsonl:
        say(f"{out}: {summary}")
        say(_next(model, out))
    _judge(out, failures)


@dataclass(frozen=True)
class _Job:
    """A run as it was asked for.

    Attributes:
        model: directory or id.
        out: new directory.
        work_dir: of the state after every layer.
        data: to calibrate on.
        strict: whether a linear that does not rest on its own tokens fails the run.
        settings: of loading and of ``oneshot``.
    """

    model: str
    out: Path
    work_dir: Path
    data: Data
    strict: bool
    settings: Mapping[str, Any]

    def check(self, request: Mapping[str, Any], *, resume: bool) -> None:
        """Refuse places that would overwrite each other or an earlier run; say who serves it."""
        files = ("recipe", "sensitivity", "allocation")
        reads = {f"--{name}": Path(request[name]) for name in files if name in request}
        reads |= {"MODEL": Path(self.model), **self.data.reads()}
        check_places(reads=reads, makes={"OUT": self.out, "--work-dir": self.work_dir})
        if "recipe" in request:
            check_recipe(Path(request["recipe"]))
        check_new_directory(self.out)
        _check_resume(self.work_dir, resume=resume)
        schemes = [request["scheme"]] if "scheme" in request else request.get("options", ())
        if note := served_by(schemes):
            say(note, err=True)

    def run(self, request: dict[str, Any], target: str, *, jsonl: bool) -> tuple[str, list[str]]:
        """Quantize; return what :func:`health` says of the checkpoint."""
        is_ours = may_go(self.work_dir)
        phases = _phases(request, has_dataset=bool(self.data.sources))
        with display(phases=phases, jsonl=jsonl):
            if "recipe" in request:
                modifiers = of_recipe(Path(request["recipe"]), self.work_dir)
            else:
                modifiers = of_request(
                    self.model, target=target, work_dir=str(self.work_dir), **request
                )
            found = self._write(modifiers)
        remove_state(self.work_dir, with_directory=is_ours)
        return found

    def _write(self, modifiers: list[Any]) -> tuple[str, list[str]]:
        """Write the checkpoint.

        Raises:
            typer.Exit: with code 1 if strict and a linear was not quantized as asked; nothing is
                written then.
            Interrupted: saying what is kept.
        """
        from moeq_plugin.files.publish import staged

        try:
            with staged(self.out) as stage, _without_empty_state(self.work_dir):
                run_oneshot(
                    self.model,
                    modifiers,
                    self.data,
                    shuffle_calibration_samples=False,
                    output_dir=str(stage),
                    **self.settings,
                )
                summary, failures = health(stage, strict=self.strict)
                if failures and self.strict:
                    _complain(failures, f"{self.out} was not written")
                    if holds_progress(self.work_dir):
                        say(f"--resume without --strict writes it, from {self.work_dir}", err=True)
                    raise typer.Exit(1)
                return summary, failures
        except KeyboardInterrupt:
            kept = "nothing kept"
            if holds_progress(self.work_dir):
                kept = f"--resume continues from {self.work_dir}"
            raise Interrupted(kept) from None


def _phases(request: Mapping[str, Any], *, has_dataset: bool) -> list[str]:
    """Return what the run will go through, in order."""
    has_budget = "bits_per_weight" in request or "size_gb" in request
    return [
        *([] if has_dataset else ["sample"]),
        *(["measure"] if has_budget and "sensitivity" not in request else []),
        "quantize",
        "save",
    ]


def _next(model: str, out: Path) -> str:
    """Return commands to paste, of which ``TEXT`` is for a person to fill in."""
    source, made, result = map(shlex.quote, (model, str(out), str(out / "moeq_eval.json")))
    return (
        f"next: moeq verify {made} --source {source}; moeq eval {source} {made} --text TEXT "
        f"--json {result}; moeq report {made}"
    )


def _judge(out: Path, failures: list[str]) -> None:
    """Say what the checkpoint lacks.

    Raises:
        typer.Exit: with code 1 if a linear was not quantized as asked, or no expert was fed.
    """
    starvation = borrowing(out)
    if warning := verdict(starvation):
        say(warning, err=True)
    if failures:
        _complain(failures, f"{out} holds them rounded to nearest")
    if failures or starvation.none_is_fed:
        raise typer.Exit(1)


def _complain(failures: list[str], consequence: str) -> None:
    for line in complaint(failures, consequence).splitlines():
        say(line, err=True)


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
