"""How much memory this process uses, as Linux accounts for it."""

from __future__ import annotations

from pathlib import Path


_STATUS = Path("/proc/self/status")


def process_memory(*names: str) -> dict[str, int]:
    """Reads fields of `/proc/self/status`.

    Args:
        names: Fields counted in kB there, such as "VmData" (private writable mappings), "VmHWM"
            (peak resident set) or "RssAnon" (resident memory that belongs to no file).

    Returns:
        Bytes by field.

    Raises:
        OSError: The system has no such file.
    """
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    fields = {words[0].rstrip(":"): words for words in lines if words}
    return {name: int(fields[name][1]) * 1024 for name in names}
