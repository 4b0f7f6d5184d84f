"""`gateway lock`: ask the registries what every reference of a configuration means now, and write that down.

Every version is fetched into the cache, hashed, and compared with the pins of the configuration, so that a lock never
names something that could not be served. What was locked before does not hold here: accepting a change is what the
command is for, and it shows each one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from gateway.config import Config
from gateway.config_sources import all_references, registries_of
from gateway.errors import ConfigError, Fault, GatewayError, SourceError
from gateway.registry.layout import model_file
from gateway.registry.lock import Locked
from gateway.registry.sources import Registries, entry_of
from gateway.terminal import fetching


def lock(out: Console, config: Config) -> None:
    """Write the lock, and show what changed.

    Raises:
        ConfigError: no model comes from a registry; or the lock that is there is not understood.
        SourceError: some references cannot be locked, each with its reason; then nothing was written.
    """
    wanted = all_references(config)
    if not wanted:
        place = config.file or "command line"
        raise ConfigError([Fault(place, 0, "", "no model comes from a registry; there is nothing to lock")])
    registries = registries_of(replace(config, registries=config.registries.model_copy(update={"locked": False})))
    before = registries.lock.read()
    entries, failed = {}, []
    for reference, pins in wanted:
        try:
            entries[reference] = _entry(registries, reference, pins)
        except ConfigError:
            raise
        except GatewayError as error:
            failed.append(f"{reference}: {error}")
    if failed:
        raise SourceError("nothing was locked:\n" + "\n".join(failed))
    gone = before.keys() - entries.keys() if config.file else set()  # without a file others may share the lock
    try:
        registries.lock.update(entries, gone)
    except OSError as error:
        raise SourceError(f"{registries.lock.path} cannot be written: {error.strerror}") from None
    _show(out, {key: entry for key, entry in before.items() if key in entries or key in gone}, entries)
    out.print(f"{registries.lock.path}: {len(entries)} locked", markup=False, soft_wrap=True)


def _entry(registries: Registries, reference: str, pins: Sequence[str]) -> Locked:
    """`pins`: digests that entries of the configuration demand; its files must have each of them."""
    resolved = registries.resolve(reference)
    first, *others = pins or (None,)
    with fetching(reference) as told:
        cached = registries.obtain(resolved, first, told, lock_holds=False)
    for pin in others:
        registries.obtain(resolved, pin, lock_holds=False)
    model_file(cached.path)  # whether there is anything to serve in it
    return entry_of(resolved, cached.digest, time.time())


def _show(out: Console, before: Mapping[str, Locked], after: Mapping[str, Locked]) -> None:
    for reference in sorted(before.keys() | after.keys()):
        old, new = before.get(reference), after.get(reference)
        if new is None:
            text = "removed: no model comes from it any more"
        elif old is None:
            text = f"{new.uri}, {new.digest}"
        elif new.same(old):
            text = f"as before: {new.uri}, {new.digest}"
        else:
            text = f"{old.uri}, {old.digest} -> {new.uri}, {new.digest}"
        out.print(f"{reference}: {text}", markup=False, soft_wrap=True)
