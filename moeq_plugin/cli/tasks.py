"""Scores of tasks, by lm-eval, which has them all; no harness of our own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeq_plugin.records.quality import TaskScore

# what people quote where a task has it, before whatever it lists first
_QUOTED = ("acc_norm", "exact_match", "acc")
INSTALL = "pip install 'moeq-plugin[eval]'"


def check_tasks(tasks: Sequence[str], *, include_path: Path | None = None) -> Any:
    """Return lm-eval's manager of tasks, before any model is loaded.

    Args:
        tasks: names that it has to know.
        include_path: directory with task files of one's own.

    Raises:
        ValueError: if lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval: {INSTALL}") from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}; list them: lm_eval ls tasks")
    return manager


def score_tasks(
    model: Any,
    reference: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
) -> list[TaskScore]:
    """Run tasks on both models.

    Args:
        model: a causal language model of transformers.
        reference: likewise, before quantization.
        tokenizer: of both.
        tasks: names that lm-eval knows.
        limit: documents per task; ``None`` for all.
        batch_size: documents at a time.
        include_path: directory with task files of one's own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = check_tasks(tasks, include_path=include_path)
    before, after = (
        simple_evaluate(
            model=HFLM(pretrained=of, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
        for of in (reference, model)
    )
    return [task_score(name, before, after) for name in before["results"]]


def task_score(task: str, before: dict[str, Any], after: dict[str, Any]) -> TaskScore:
    """Return the metric of a task that is quoted, from two results of ``simple_evaluate``."""
    results = before["results"][task]
    keys = [
        key
        for key, value in results.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    ]
    key = next((k for name in _QUOTED for k in keys if k.split(",")[0] == name), keys[0])
    metric, _, variant = key.partition(",")
    errors = (of["results"][task].get(f"{metric}_stderr,{variant}") for of in (before, after))
    reference_stderr, stderr = (e if isinstance(e, int | float) else None for e in errors)
    return TaskScore(
        task=task,
        metric=metric,
        higher_is_better=before.get("higher_is_better", {}).get(task, {}).get(metric, True),
        reference=results[key],
        reference_stderr=reference_stderr,
        score=after["results"][task][key],
        stderr=stderr,
    )
