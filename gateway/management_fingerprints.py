"""What the models on disk look like from outside: a change of it is a reason to load a model again."""

from __future__ import annotations

from glob import escape
from pathlib import Path

from gateway.config import Config
from gateway.config_models import locate_model, model_names


def fingerprints(config: Config) -> dict[str, object]:
    """Settings, and path, size and time of every file, of every model; blocks on the disk."""
    found: dict[str, object] = {}
    for name in model_names(config):
        located = locate_model(config, name)
        if located is not None:
            entry, place = located
            files = _files(place)
            # Backends and variants come and go without a load; that there are backends decides what a load makes.
            own = entry.model_dump_json(exclude={"backends", "canary", "shadow"})
            settings = (own, bool(entry.backends), config.defaults.model_dump_json(), config.instances)
            found[name] = (settings, *[_look(path) for path in files])
    return found


def _files(place: Path) -> list[Path]:
    """Every file of a model; of one that is served alone also what begins with its name, as exporters call its data."""
    found = place.parent.glob(f"{escape(place.stem)}*") if place.is_file() else place.rglob("*")
    return [path for path in sorted(found) if path.is_file()]


def _look(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path), status.st_size, status.st_mtime_ns
