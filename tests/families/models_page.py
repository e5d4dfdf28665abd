"""``docs/models.md`` from what the suite has recorded: ``python tests/families/models_page.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moeq_plugin.checkpoint.architecture import KEPT, Role

_HERE = Path(__file__).parent
PAGE = _HERE.parents[1] / "docs" / "models.md"
_OF_ALL = {Role.ROUTER.value, Role.SHARED_GATE.value, Role.HEAD.value}
_WHY = {
    Role.ROUTER: "decides which expert runs; a few thousandths of the weights",
    Role.SHARED_GATE: "one row, and it multiplies the whole output of the shared experts",
    Role.HEAD: "servers expect 16 bits there; every token passes it",
    Role.TOWER: "text that calibrates does not reach what sees and hears",
    Role.STATE_GATE: "decays and step sizes of a recurrent state add up over all tokens "
    "(`in_proj_a`, `in_proj_b`, `in_proj_ba`, `b_proj`, `f_a_proj`, `f_b_proj`, `dt_proj`, "
    "`x_proj`); their few rows are too few for the kernels of servers, and `dt_proj` is used "
    "without a call",
    Role.HEAD_GATE: "one row for each attention head (`g_proj`)",
    Role.INDEXER: "picks the tokens that attention sees (`indexer`)",
    Role.COMPRESSOR: "what it makes of keys and values is read by all later tokens (`compressor`)",
    Role.HYPER_CONNECTION: "mixes the residual streams of the whole model (`*hyper_connection*`)",
    Role.NORM: "a few columns within a norm",
    Role.STATE_FACTOR: "RWKV's decay, learning rate, value and gate come out of these narrow "
    "products, and errors of its state add up over all tokens (`att.w1`, `att.w2`, ...)",
    Role.PREDICTION: "servers draft with it; transformers does not load it, so it is copied",
}


_PAGE = """\
# Models: every Mixture-of-Experts family of transformers

transformers 5.17 has {all} families with experts. A tiny random model of each goes through
`moeq plan`, `inspect`, `quantize` and `verify`: {works} come out as asked, {refused} are refused in
a sentence, by `plan` and by the run alike. What comes out as asked has every expert matrix
quantized, all else as it was bit by bit, and the size that `plan` has said, to the byte;
`load_dequantized` reads it back exactly and `verify` finds nothing in it.

This page is written by `python tests/families/models_page.py` from
`tests/families/recorded_families.json`, which `python tests/families/test_families.py` records, and
`recorded_vllm.json` beside it, which `vllm_families.py` records; the tests compare them. Models are
named as examples: their weights were not tried.

## Families

*transformers*: whether plain `from_pretrained` computes the same; where it says no, it would
initialize the experts at random or fail, as the log, the model card and `verify` say, and
`load_dequantized` reads it. *vLLM 0.32*: whether it loads the tiny model, quantized in groups of
64, on a CPU, its integer kernels replaced by exact products, and computes what transformers does;
where not, in its own words. *Tensors not counted*: its own count of what it has loaded knows names
that nothing uses, so the logits alone say that nothing is missing. Much of what it refuses there it
serves on a GPU, which was not tried.
*AWQ* and *rotation*: whether `MoEQuantAWQModifier` and `ResidualRotationModifier` take the family;
both refuse before anything is changed.

| family | models | transformers | vLLM 0.32 | AWQ | rotation | in 16 bit beside routers and heads |
|---|---|---|---|---|---|---|
{rows}

## Refused

| family | models | why |
|---|---|---|
{refusals}

## What stays in 16 bit unless it is named

A target that is a class, such as `Linear`, does not mean these; a target that names them does. The
run's record and the model card list every one with its reason, and `moeq plan` counts them.

| kind | why |
|---|---|
{kinds}
"""


def text() -> str:
    """Return the page."""
    recorded = json.loads((_HERE / "recorded_families.json").read_text())
    known, served = _known_models(), _served()
    works = [name for name in recorded if "refusal" not in recorded[name]]
    refused = [name for name in recorded if "refusal" in recorded[name]]
    refusals = (
        f"| {name} | {', '.join(known[name])} | {_cell(recorded[name]['refusal'])} |"
        for name in refused
    )
    return _PAGE.format(
        all=len(recorded),
        works=len(works),
        refused=len(refused),
        rows="\n".join(_row(name, known[name], recorded[name], served.get(name)) for name in works),
        refusals="\n".join(refusals),
        kinds="\n".join(f"| {role.value} | {_WHY[role]} |" for role in KEPT),
    )


def _row(name: str, models: list[str], found: dict[str, Any], served: str | None) -> str:
    kept = ", ".join(kind for kind in found["kept"] if kind not in _OF_ALL)
    answers = (_answer(found[key]) for key in ("awq", "rotation"))
    reloads = "yes" if found["reloads"] else "no"
    cells = [name, ", ".join(models), reloads, served or "not tried", *answers, kept]
    return f"| {' | '.join(cells)} |"


def _served() -> dict[str, str]:
    """Return what vLLM does with each family that was tried."""
    recorded = json.loads((_HERE / "recorded_vllm.json").read_text())
    tried = json.loads((_HERE / "tiny_vllm.json").read_text())["families"]
    found = {}
    for name, done in recorded.items():
        loads = "loads" if tried[name].get("strict", True) else "loads, tensors not counted"
        if "differs" in tried[name]:
            loads = f"{loads}; {tried[name]['differs']}"
        found[name] = _answer(done["refusal"]) if "refusal" in done else loads
    return found


def _answer(reason: str) -> str:
    return f"no: {_cell(reason)}" if reason else "yes"


def _cell(sentence: str) -> str:
    return sentence.replace("|", "\\|")


def _known_models() -> dict[str, list[str]]:
    paths = (path for path in (_HERE / "tiny").glob("*.json") if path.stem != "base")
    entries = (json.loads(path.read_text()) for path in paths)
    return {name: entry["models"] for of in entries for name, entry in of.items()}


if __name__ == "__main__":
    PAGE.write_text(text())
