"""What the models on disk look like from outside: a change of it is a reason to load a model again."""

from __future__ import annotations

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
            files = [place] if place.is_file() else [p for p in sorted(place.rglob("*")) if p.is_file()]
            # Backends come and go without a load; whether there are any decides what a load makes.
            own = entry.model_dump_json(exclude={"backends"})
            settings = (own, bool(entry.backends), config.defaults.model_dump_json(), config.instances)
            found[name] = (settings, *[_look(path) for path in files])
    return found


def _look(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path), status.st_size, status.st_mtime_ns
