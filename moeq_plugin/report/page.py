"""The report: one HTML file that opens without network, in dark and light, on a phone, on paper."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from pathlib import Path

from moeq_plugin.report.directory import Findings
from moeq_plugin.report.model_card import FILE_NAME
from moeq_plugin.report.section import Section
from moeq_plugin.report.section_bits import bits_section
from moeq_plugin.report.section_experts import experts_section
from moeq_plugin.report.section_loss import loss_section
from moeq_plugin.report.section_pareto import pareto_section
from moeq_plugin.report.section_quality import quality_section
from moeq_plugin.report.section_run import run_section, samples_section, verdict

_SECTIONS = (
    quality_section,
    experts_section,
    bits_section,
    loss_section,
    pareto_section,
    samples_section,
    run_section,
)


def render(found: Findings) -> str:
    """Return the page.

    Args:
        found: what a directory says.

    Raises:
        ImportError: if the packages for pages are not installed.
    """
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
    sections = [section(found) for section in _SECTIONS]
    return environment.get_template("page.html").render(
        title=found.directory.resolve().name,
        verdict=verdict(found),
        problems=found.problems,
        sections=sections,
        card=FILE_NAME if (found.directory / FILE_NAME).exists() else None,
        charts=_script_safe(sections),
        plotly=get_plotlyjs(),
        style=(here / "page.css").read_text(),
        script=(here / "page.js").read_text(),
    )


def _code(text: str) -> str:
    """Return HTML in which what stands between backticks is code."""
    parts = [html.escape(part) for part in text.split("`")]
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _script_safe(sections: list[Section]) -> str:
    """Return the charts as JSON that no name in it can end the script element with."""
    charts = {chart.name: asdict(chart) for section in sections for chart in section.charts}
    return json.dumps(charts, allow_nan=False).replace("<", "\\u003c")
