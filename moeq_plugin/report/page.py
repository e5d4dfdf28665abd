"""The report: one HTML file that opens without network, in dark and light, on a phone, on paper."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moeq_plugin.report.comparison import comparison_section, overall
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.model_card import FILE_NAME
from moeq_plugin.report.section import Section
from moeq_plugin.report.section_bits import bits_section
from moeq_plugin.report.section_experts import experts_section
from moeq_plugin.report.section_loss import loss_section
from moeq_plugin.report.section_pareto import pareto_section
from moeq_plugin.report.section_quality import quality_section
from moeq_plugin.report.section_run import Verdict, run_section, samples_section, verdict

_SECTIONS = (
    quality_section,
    experts_section,
    bits_section,
    loss_section,
    pareto_section,
    samples_section,
    run_section,
)

_STRONG = re.compile(r"\*\*(.+?)\*\*")


def render(found: Findings) -> str:
    """Return the page of one checkpoint.

    Args:
        found: what a directory says.

    Raises:
        ImportError: if the packages for pages are not installed.
    """
    card = FILE_NAME if (found.directory / FILE_NAME).exists() else None
    sections = [section(found) for section in _SECTIONS]
    return _page(found.directory.resolve().name, verdict(found), sections, found.problems, card)


def render_comparison(several: Sequence[Findings]) -> str:
    """Return the page that compares checkpoints.

    Args:
        several: what their directories say.

    Raises:
        ImportError: if the packages for pages are not installed.
    """
    problems = [
        f"{found.directory.name}: {problem}" for found in several for problem in found.problems
    ]
    title = f"{len(several)} checkpoints compared"
    return _page(title, overall(several), [comparison_section(several)], problems, None)


def _page(
    title: str,
    verdict: Verdict,
    sections: Sequence[Section],
    problems: Sequence[str],
    card: str | None,
) -> str:
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "the report needs jinja2 and plotly: pip install 'moeq-plugin[report]'"
        ) from error
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _code
    shown = [section for section in sections if not section.is_empty]
    return environment.get_template("page.html").render(
        title=title,
        verdict=verdict,
        problems=problems,
        sections=shown,
        empty=[section for section in sections if section.is_empty],
        card=card,
        charts=_script_safe(shown),
        plotly=get_plotlyjs(),
        style=(here / "page.css").read_text(),
        script=(here / "page.js").read_text(),
    )


def _code(text: str) -> str:
    """Return HTML in which what stands between backticks is code, and between ``**`` strong."""
    parts = [html.escape(part) for part in text.split("`")]
    return "".join(
        f"<code>{part}</code>" if i % 2 else _STRONG.sub(r"<strong>\1</strong>", part)
        for i, part in enumerate(parts)
    )


def _script_safe(sections: Sequence[Section]) -> str:
    """Return the charts as JSON that no name in it can end the script element with."""
    charts = {chart.name: asdict(chart) for section in sections for chart in section.charts}
    return json.dumps(charts, allow_nan=False).replace("<", "\\u003c")
