"""Which extra of ours brings a package that is not installed."""

from __future__ import annotations

_EXTRAS = {
    "llmcompressor": (
        "llmcompressor",
        "transformers",
        "datasets",
        "compressed_tensors",
        "loguru",
        "yaml",
    ),  # fmt: skip
    "report": ("jinja2", "plotly"),
    "eval": ("lm_eval",),
}


def install_line(package: str | None) -> str:
    """Return what installs a package that a command needs, empty for one that no extra brings.

    Example:
        >>> install_line("transformers.models")
        "pip install 'moeq-plugin[llmcompressor]'"
        >>> install_line("something")
        ''
    """
    top = (package or "").partition(".")[0]
    extra = next((name for name, brings in _EXTRAS.items() if top in brings), None)
    return "" if extra is None else f"pip install 'moeq-plugin[{extra}]'"
