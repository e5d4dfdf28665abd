"""Room on the disk, known to be too little before it is used."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from moeq_plugin.files.disk import existing_part


def check_room(needs: Mapping[Path, int]) -> None:
    """Refuse what will not fit on a disk.

    Args:
        needs: bytes that will be written below each path, at least.

    Raises:
        ValueError: saying what is free and what is needed.
    """
    by_device: dict[int, int] = {}
    for path, num_bytes in needs.items():
        existing = existing_part(path.resolve())
        device = existing.stat().st_dev
        by_device[device] = by_device.get(device, 0) + num_bytes
        free = shutil.disk_usage(existing).free
        if by_device[device] > free:
            raise ValueError(
                f"no room for {path}: {free / 1e9:.4g} GB are free, at least "
                f"{by_device[device] / 1e9:.4g} GB are needed for the checkpoint and what is kept "
                "to continue from; nothing was calibrated yet"
            )
