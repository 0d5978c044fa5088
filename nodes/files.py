"""Names of files as artists type or link them, inside the folders that ComfyUI allows."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import folder_paths

from ..toy import ROUTER, STUDENT

SUFFIX = ".safetensors"
# slim checkpoint and router that come with the pack, as the lists show them
DEMO_STUDENT = "tiny Wan student (demo)"
DEMO_FILES = {"wantrim_slim": STUDENT, "wantrim_routers": ROUTER}
MAX_NAME = 100
# of the 255 that file systems take, so that every ending of ours fits
MAX_BYTES = 200
# no separators, nothing that some file system forbids, and no hidden file; marks belong to a letter
NAME = re.compile(r"[^\W_][\w .+()\[\]-]*")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def add_folder(name: str, inside: str, first: bool = False) -> None:
    """Make models/wantrim/`inside` known to the host under `name`, `first` of those it has there."""
    path = Path(folder_paths.models_dir) / "wantrim" / inside
    folder_paths.add_model_folder_path(name, str(path), first)


def cannot_write(path: Path, error: Exception) -> str:
    return f"{path.name} cannot be written ({error}). Is the disk full, or the folder read-only?"


def plain_name(node: str, given: object, example: str) -> str:
    """The name of a new file, without its ending.

    Raises:
        ValueError: it is empty, has a folder in it, or cannot be a file everywhere.
    """
    name = given.strip().removesuffix(SUFFIX).strip() if isinstance(given, str) else ""
    name = unicodedata.normalize("NFC", name)
    bare = "".join(one for one in name if not unicodedata.category(one).startswith("M"))
    good = NAME.fullmatch(bare) and not RESERVED.fullmatch(name) and not name.endswith(".")
    long = len(name) > MAX_NAME or len(name.encode(errors="replace")) > MAX_BYTES
    if not good or long or name.endswith(".calibration"):
        most = f"at most {MAX_NAME}, of other than Latin letters {MAX_BYTES // 3}"
        raise ValueError(
            f"{node}: filename: expected a plain name such as {example!r} (letters, digits, spaces, "
            f"_ . + - ( ) [ ], {most}, no folder), got {given!r:.120}"
        )
    return name


def valid_name(node: str, given: object, example: str) -> bool | str:
    """For a node's `validate_inputs`: True, or why a name is refused; None comes over a link."""
    try:
        return given is None or bool(plain_name(node, given, example))
    except ValueError as error:
        return str(error)


def list_files(folder: str) -> list[str]:
    """What can be chosen of one of the host's folders: its files, and the demo's."""
    names = [name for name in folder_paths.get_filename_list(folder) if name.endswith(SUFFIX)]
    return [*names, DEMO_STUDENT] if folder in DEMO_FILES else names


def find_file(folder: str, name: object) -> Path | None:
    """A file in one of the host's folders; None when there is none of that name inside of them."""
    if name == DEMO_STUDENT:
        return DEMO_FILES.get(folder)
    found = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    return None if found is None else Path(found)
