"""Whether a study can be kept in a file: its folder, its permissions, its file system."""

from __future__ import annotations

import os
from pathlib import Path

from bs_optuna.errors import StudyError


# File systems between machines. SQLite's write-ahead log shares memory between its processes, so
# it is wrong on them (https://www.sqlite.org/wal.html, section 1).
NETWORK_FILE_SYSTEMS = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "gpfs", "lustre"}
    | {"ncpfs", "nfs", "nfs3", "nfs4", "smb3", "smbfs"}
)
MOUNTS = Path("/proc/self/mounts")  # the table of what is mounted where; only Linux has it


def check_writable(path: Path) -> None:
    """Make sure that the study's file can be written, and make its last folder where it lacks.

    Only the last folder is made: a path that lacks more than that is more likely mistyped.

    Raises:
        StudyError: The path is no file, or it or its folder is missing or cannot be written.
    """
    folder = path.parent
    if path.parts[:1] == ("~",):
        raise StudyError(
            f"{path} starts with '~', which a storage URL takes for a folder of that name; "
            f"write {path.expanduser()}"
        )
    if not folder.parent.is_dir():
        raise StudyError(
            f"{path} cannot be made, there is no folder {folder.parent}; "
            "make it, or name another file with --storage"
        )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StudyError(
            f"{folder} cannot be made ({error.strerror}); "
            "name a file in a folder you can write to with --storage"
        ) from error
    if path.is_dir():
        raise StudyError(f"{path} is a folder; name a file in it with --storage")
    # SQLite and the journal write beside the file as well (write-ahead log, locks).
    for place in [folder, path] if path.exists() else [folder]:
        if not os.access(place, os.R_OK | os.W_OK):
            raise StudyError(
                f"{place} is read-only for this user; "
                "make it writable, or name another file with --storage"
            )


def network_file_system(path: Path) -> str | None:
    """Name of the network file system that a file lies on; None where it is local or unknown."""
    if not MOUNTS.exists():
        return None
    found = ""
    kind = None
    target = path.resolve()
    for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        mount_point, mounted_kind = line.split(" ")[1:3]
        mount_point = mount_point.replace("\\040", " ")
        # Of mounts over each other, the longest path holds, and of equal ones the last.
        if target.is_relative_to(mount_point) and len(mount_point) >= len(found):
            found, kind = mount_point, mounted_kind
    return kind if kind in NETWORK_FILE_SYSTEMS else None
