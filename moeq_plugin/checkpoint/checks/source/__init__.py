"""Is every number what rounding makes of the 16-bit model that a checkpoint was quantized from?"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.checks.source.linears import Verdict, judge
from moeq_plugin.checkpoint.checks.source.originals import Originals
from moeq_plugin.checkpoint.checks.source.others import check_others
from moeq_plugin.checkpoint.checks.source.pruning import kept_experts, nearest_expert
from moeq_plugin.checkpoint.checks.source.recipe import Rewrites, read_rewrites
from moeq_plugin.checkpoint.checks.values.readable import is_readable
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import in_file

_NOT_COMPARABLE = 0.5  # of the linears that have nothing to do with the source's
_LOOK_UP = 64  # unrelated experts that are looked for among the others


def check_source(layout: Layout, source: Layout) -> Iterator[Finding]:
    """Yield what differs from the source by more than quantization explains.

    Args:
        layout: the checkpoint.
        source: the 16-bit model, experts fused or not.
    """
    if any(source.stored.values()):
        yield error("not-comparable", str(source.checkpoint.directory), "it is quantized itself")
        return
    rewrites, originals = read_rewrites(layout.checkpoint.directory), Originals(source)
    if rewrites.pruned_experts:
        originals = Originals(source, kept_experts(layout, originals))
    if rewrites.names():
        yield _said(rewrites)
    verdicts = [
        judge(layout, linear, originals, rewrites)
        for linear in layout.present()
        if is_readable(layout, linear) and not _is_renumbered(linear.role, rewrites)
    ]
    yield from _without_original(layout, verdicts)
    known = [verdict for verdict in verdicts if verdict.is_known]
    unrelated = [verdict for verdict in known if verdict.is_unrelated]
    if len(unrelated) > _NOT_COMPARABLE * len(known):
        yield error(
            "not-comparable",
            "linears",
            f"{len(unrelated)} of {len(known)} have nothing to do with the source's",
        )
    else:
        yield from _findings(layout, known, originals)
    wrong = {verdict.linear.name for verdict in known if verdict.what}
    yield from check_others(layout, originals, rewrites, wrong)


def _said(rewrites: Rewrites) -> Finding:
    names = ", ".join(rewrites.names())
    return warning(
        "not-comparable",
        "linears",
        f"{names} changed the weights before they were quantized (recipe.yaml), so only what that "
        "leaves as it was is compared with the source",
        "compare what the two compute: moeq eval SOURCE CHECKPOINT --text FILE",
    )


def _is_renumbered(role: Role, rewrites: Rewrites) -> bool:
    return role is Role.ROUTER and bool(rewrites.pruned_experts)


def _without_original(layout: Layout, verdicts: list[Verdict]) -> Iterator[Finding]:
    lone = [verdict.linear for verdict in verdicts if not verdict.is_known]
    lone = [linear for linear in lone if not linear.is_mtp]
    if lone and not layout.architecture.is_known:
        what = f"{len(lone)} linears were not compared: the source has them in no form known here"
        yield warning("not-compared", lone[0].name, what)
        return
    for linear in lone:
        yield error("not-comparable", linear.name, "the source has no weight of this shape")


def _findings(layout: Layout, verdicts: list[Verdict], originals: Originals) -> Iterator[Finding]:
    looked_up = 0
    for verdict in verdicts:
        if not verdict.what:
            continue
        linear, where = verdict.linear, in_file(verdict.linear.name, layout.architecture.family)
        other = None
        if linear.role is Role.EXPERT and verdict.is_unrelated and looked_up < _LOOK_UP:
            looked_up += 1
            other = nearest_expert(layout, linear, originals)
        if other is not None and other != linear.expert:
            what = f"{verdict.what}; it is expert {other} of the source"
            yield error("swapped-expert", where, what)
        else:
            yield error("far-from-source", where, verdict.what)
