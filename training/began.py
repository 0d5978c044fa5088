"""What a run began with, so that it goes on as that or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..slim.file import list_entries
from .parallel import World
from .shard_files import write_json

RECIPE, STUDENT, ROUTER = "recipe.json", "student.safetensors", "router.safetensors"
# bytes of each tensor that tell a file from another
BEGINNING = 4096


def contents(path: Path) -> str:
    """Checksum of a safetensors file's names, shapes and the beginning of every tensor.

    Raises:
        ValueError: it is no such file.
    """
    digest = hashlib.sha256()
    entries = sorted(list_entries(path)[0], key=lambda entry: entry.offset)
    with path.open("rb") as file:
        for entry in entries:
            digest.update(f"{entry.name} {entry.dtype} {entry.shape} ".encode())
            file.seek(entry.offset)
            digest.update(file.read(min(entry.size, BEGINNING)))
    return digest.hexdigest()[:16]


def read_began(folder: Path) -> dict | None:
    """What was noted in a folder, or None where nothing was saved: another recipe may begin there.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / RECIPE
    saved = (folder / STUDENT).exists() or any((folder / "state").glob("step-*"))
    if not path.exists() or not saved:
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it cannot be read ({error}). Choose another --out.") from error
    return found if isinstance(found, dict) else {}


def check_same(folder: Path, now: dict, world: World, done: bool = False) -> None:
    """Note what a folder's work begins with, or refuse to go on with something else.

    Args:
        done: its work is; how many samples a step had, and where it began, is the past.

    Raises:
        ValueError: names what differs.
    """
    now = json.loads(json.dumps(now))
    world.wait()
    said = read_began(folder)
    world.wait()
    if said is None:
        if world.first:
            write_json(folder / RECIPE, now)
        world.wait()
        return
    before, after = _flat(said), _flat(now)
    # a table that was not there has other names than the one that is
    for name in dict.fromkeys((*before, *after)):
        was, became = before.get(name), after.get(name)
        if became == was or (done and name.split(".")[0] in ("batch", "start")):
            continue
        if name == "batch":
            raise ValueError(
                f"{folder.name}: it began with a batch of {was}, which {world.size} processes cannot "
                "share out evenly. Go on with a number of them that divides it, or choose another "
                "--out."
            )
        advice = ""
        if name.startswith("start."):
            advice = ", or give the --start that it began with"
        elif name == "data.samples":
            advice = ", or bring its samples back (damaged shards are named above)"
        raise ValueError(
            f"{folder.name}: it began with {name} = {was!r}, and this is {became!r}. Choose another "
            f"--out{advice}."
        )


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Leaves of nested tables and lists by their dotted names."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    found = {}
    for key, inner in items:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found
