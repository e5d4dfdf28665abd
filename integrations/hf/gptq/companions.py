"""Which of the files beside the weights go along when a checkpoint is copied."""

from __future__ import annotations

from pathlib import Path

# tokenizers, configs, chat templates, recipes; and what one may do with a model
_COPIED_KINDS = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".yaml")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def companions(source: Path, *, without: frozenset[str]) -> tuple[list[Path], list[str]]:
    """Return the files beside the weights that a copy of a checkpoint needs, and names of others.

    A copy is made to be shared: nothing from outside of the directory gets into it, no program,
    and nothing whose kind is not known.

    Args:
        source: directory of the checkpoint.
        without: names of files that the copy has its own of.

    Raises:
        ValueError: if a file that would be copied is a link out of the directory.
    """
    copied, left = [], []
    for path in sorted(source.iterdir()):
        if path.name in without or path.suffix == ".safetensors" or path.is_dir():
            continue
        is_known = path.suffix in _COPIED_KINDS or path.name.startswith(_COPIED_NAMES)
        if not (is_known and path.is_file()):
            left.append(path.name)
        elif not _is_inside(path, source):
            raise ValueError(
                f"{path} is a link to a file outside of the directory; what it leads to is not "
                "copied. Replace it by the file, or remove it."
            )
        else:
            copied.append(path)
    return copied, left


def _is_inside(path: Path, directory: Path) -> bool:
    """Tell whether a file is of a directory; a hub's cache keeps the files of all its snapshots."""
    real, home = path.resolve(), directory.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    return any(real.is_relative_to(of) for of in homes)
