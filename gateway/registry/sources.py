"""All registries of a configuration behind one door: what a reference means, its files, and what they must be.

A reference goes through: its registry is asked (`resolve`, a few attempts) → its files come out of the cache or are
fetched (`obtain`) and compared with every digest that is known for them → it serves, and the lock says so (`confirm`).

What decides which files may serve, in this order: the digest that the configuration pins; with `locked`, what
models.lock says of the reference; the digest that models.lock has for the same immutable id, whoever named it: a
registry whose files changed under a name that should not change is refused, with both digests in the text.

Files that may not serve are fetched once: what is immutable would be the same again. It is fetched anew when something
else is demanded of it (the pin, the lock), when the reference means something else, or after `forget_refused`.

Rules: only schemes and hosts that the configuration names are ever asked; everything else is refused before anything is
opened. A registry that is down harms nobody who serves: at a start, what the lock or else the cache remembers of the
reference serves (`settle`), and whoever asked is told. All methods block and may be called from any thread.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from gateway.errors import GatewayError, SourceError, SourceUnavailable
from gateway.registry.cache import Cache, Cached, CacheStatistics
from gateway.registry.locator import locate_reference, scheme_of
from gateway.registry.lock import Locked, LockFile
from gateway.registry.reference import not_allowed
from gateway.registry.resolver import Resolved, Resolver, Told, untold

log = logging.getLogger("gateway.registry")

ATTEMPTS: Final = 3
WAIT_S: Final = 0.5
MAX_WAIT_S: Final = 5.0
MAX_REFUSED: Final = 64
Outcome = Literal["ok", "refused", "unavailable"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settled:
    """What a reference means for a start."""

    resolved: Resolved
    stale: str = ""
    """Why this is remembered and not what the registry says now; empty if it was asked."""
    instead_of: str = ""
    """Identity of what an operator decided against while the reference meant it; empty: nobody decided."""


@dataclass(frozen=True, slots=True)
class SchemeStatistics:
    """Questions to one kind of registry since the process started."""

    outcomes: Mapping[Outcome, int]
    last_success: float
    """Seconds since 1970; 0.0: there was none."""


@dataclass(frozen=True, slots=True)
class RegistriesStatistics:
    """`schemes` holds every registry that is configured, asked or not."""

    schemes: Mapping[str, SchemeStatistics] = field(default_factory=dict)
    cache: CacheStatistics = field(default_factory=lambda: CacheStatistics(0, 0, 0, 0, 0))


class Registries:
    """The registries, the cache and the lock of one configuration."""

    def __init__(
        self,
        resolvers: Mapping[str, Resolver],
        cache: Cache,
        lock: LockFile,
        *,
        locked: bool = False,
        keep_versions: int = 3,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`resolvers`: by scheme; `locked`: only what the lock names is served; `keep_versions`: see `collect`."""
        self._resolvers = resolvers
        self.cache = cache
        self.lock = lock
        self.locked = locked
        self._keep_versions = keep_versions
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._guard = threading.Lock()
        self._outcomes: dict[str, Counter[Outcome]] = {scheme: Counter() for scheme in resolvers}
        self._last_success: dict[str, float] = dict.fromkeys(resolvers, 0.0)
        self._unanswered: dict[str, str] = {}
        self._lock_unwritable = False
        self._refused: dict[tuple[str, str], str] = {}
        """Digests of files that were fetched and may not serve, by registry and immutable id."""

    # -- what a reference means --------------------------------------------------------------------------------------

    def resolve(self, reference: str) -> Resolved:
        """What the reference means now, as its registry says; with `locked`, what the lock says.

        Raises:
            SourceUnavailable: the registry cannot be asked.
            SourceError: it has no such model; or the scheme is not allowed.
            ConfigError: the lock cannot be used.
        """
        if self.locked:
            return self._locked(reference).resolved
        resolver = self._resolver(reference)
        try:
            resolved = self._counted(resolver.scheme, lambda: self._patiently(lambda: resolver.resolve(reference)))
        except SourceUnavailable as error:
            with self._guard:
                self._unanswered[reference] = str(error)
            raise
        except SourceError:
            self._answered(reference)
            raise
        self._answered(reference)
        return resolved

    def unanswered(self) -> dict[str, str]:
        """References whose registry could not be asked the last time, and why."""
        with self._guard:
            return dict(self._unanswered)

    def _answered(self, reference: str) -> None:
        with self._guard:
            self._unanswered.pop(reference, None)

    def recall(self, reference: str) -> Settled | None:
        """What the reference meant when it served last, from the lock, else from the cache; nobody is asked."""
        mutable = locate_reference(reference).mutable
        entry = self.lock.read().get(reference)
        if entry is not None:
            found = self.cache.find(lambda o: (o.registry, o.immutable_id) == (entry.registry, entry.immutable_id))
            if found is not None:
                return Settled(found[1].resolved(reference, mutable=mutable), instead_of=entry.instead_of)
            resolved = Resolved(reference, entry.uri, entry.immutable_id, entry.version, mutable, entry.registry)
            return Settled(resolved, instead_of=entry.instead_of)
        remembered = self.cache.find(lambda origin: origin.reference == reference)
        if remembered is None:
            return None
        return Settled(remembered[1].resolved(reference, mutable=mutable))

    def settle(self, reference: str) -> Settled:
        """For a start: what the registry says, or what is remembered where it cannot be asked, or where an operator
        chose it and the registry still says what it said then.

        Raises:
            SourceUnavailable: neither.
            SourceError, ConfigError: as `resolve`.
        """
        if self.locked:
            return self._locked(reference)
        try:
            resolved = self.resolve(reference)
            return self._chosen(resolved) or Settled(resolved)
        except SourceUnavailable as error:
            remembered = self.recall(reference)
            if remembered is None:
                raise
            theirs, ours = remembered.resolved.registry, self._resolver(reference).registry_of(reference)
            if theirs != ours:  # the same name means another model there
                text = f"{error}; what served as {reference} last came from {theirs or 'elsewhere'}, not from {ours}"
                raise SourceUnavailable(text, soon=error.soon) from None
            text = f"its registry cannot be asked, so it serves {remembered.resolved.uri} as it did last: {error}"
            return replace(remembered, stale=text)

    def _chosen(self, resolved: Resolved) -> Settled | None:
        """What an operator chose to serve instead; None: nobody did, or the reference means something else by now."""
        entry = self.lock.read().get(resolved.reference) if resolved.mutable else None
        if entry is None or (entry.registry, entry.instead_of) != (resolved.registry, resolved.immutable_id):
            return None
        return self.recall(resolved.reference)

    def _locked(self, reference: str) -> Settled:
        self._resolver(reference)  # whether it is allowed at all
        settled = self.recall(reference) if reference in self.lock.read() else None
        if settled is None:
            raise SourceError(
                f"{self.lock.path} does not name {reference}, and only what it names is served (registries.locked); "
                "run gateway lock where the registry can be asked"
            )
        return settled

    # -- its files -------------------------------------------------------------------------------------------------

    def obtain(
        self, resolved: Resolved, pin: str | None = None, told: Told = untold, *, lock_holds: bool = True
    ) -> Cached:
        """The files of a resolved version, hashed, and compared with all that is known of them.

        Args:
            pin: the digest that the configuration demands.
            lock_holds: whether they must be what the lock says; not so for who writes it anew.

        Raises:
            SourceError: they are not what was pinned or locked, or nothing servable.
            SourceUnavailable: they are not in the cache and cannot be fetched.
        """
        resolver = self._resolver(resolved.reference)
        expected = self._expected(resolved, pin, lock_holds=lock_holds)
        version = (resolved.registry, resolved.immutable_id)

        def check(digest: str) -> None:
            for wanted, who, advice in expected:
                if digest != wanted:
                    self._remember_refused(version, digest)
                    raise SourceError(
                        f"the files of {resolved.uri} have digest {digest}, but {who} {wanted}; they are not served. "
                        f"{advice}"
                    )

        def fetch(directory: Path) -> None:
            with self._guard:
                refused = self._refused.get(version)
            if refused is not None:
                check(refused)  # what is immutable would be the same once more

            def once() -> None:
                _emptied(directory)
                resolver.fetch(resolved, directory, told)

            self._counted(resolver.scheme, lambda: self._patiently(once))

        of_this_version = expected if pin is None else expected[1:]  # a pin does not say whose files have its digest
        wanted = of_this_version[0][0] if of_this_version else None
        return self.cache.obtain(resolved, wanted, fetch, check)

    def _remember_refused(self, version: tuple[str, str], digest: str) -> None:
        with self._guard:
            self._refused.pop(version, None)
            self._refused[version] = digest
            if len(self._refused) > MAX_REFUSED:
                del self._refused[next(iter(self._refused))]

    def forget_refused(self) -> None:
        """Fetch what was refused once more when it is asked for: somebody may have mended it in its place."""
        with self._guard:
            self._refused.clear()

    def _expected(self, resolved: Resolved, pin: str | None, *, lock_holds: bool) -> list[tuple[str, str, str]]:
        """Digests that the files must have, who says so, and what to do if they have another."""
        expected = []
        if pin is not None:
            expected.append((pin, "the configuration pins", "Change the pin if that is meant"))
        for entry in self.lock.read().values() if lock_holds else ():
            same_id = (entry.registry, entry.immutable_id) == (resolved.registry, resolved.immutable_id)
            if self.locked and entry.reference == resolved.reference and not same_id:
                raise SourceError(
                    f"{self.lock.path.name} says {entry.uri} of {entry.reference}, not {resolved.uri}, and only what "
                    "it names is served (registries.locked)"
                )
            if same_id:
                who = f"{self.lock.path.name} says of {entry.immutable_id}"
                expected.append((entry.digest, who, "Somebody changed what should not change; gateway lock accepts it"))
        return expected

    # -- what is remembered ----------------------------------------------------------------------------------------

    def confirm(self, resolved: Resolved, digest: str, reference: str = "", instead_of: str = "") -> None:
        """It serves: the lock says so from now on. A lock that cannot be written is told once and harms nobody.

        Args:
            reference: what it serves for; empty: its own.
            instead_of: identity of what that reference means while an operator chose this one; empty: nobody did.
        """
        if self.locked:
            return
        if reference and self._resolver(reference).registry_of(reference) != resolved.registry:
            return  # a canary of another registry: nobody could fetch it by this reference
        resolved = replace(resolved, reference=reference or resolved.reference)
        try:
            if self.lock.record(replace(entry_of(resolved, digest, self._wall_clock()), instead_of=instead_of)):
                log.info("%s: %s is %s, %s", self.lock.path, resolved.reference, resolved.uri, digest)
            self._lock_unwritable = False
        except (OSError, GatewayError) as error:
            if not self._lock_unwritable:
                log.warning("%s cannot be written, so a restart will not know what served: %s", self.lock.path, error)
            self._lock_unwritable = True

    def collect(self, keep: Collection[str]) -> list[str]:
        """Remove versions from the cache that nothing refers to any more; returns their digests.

        Kept: `keep` (what is loaded, what the inference log refers to), what the lock names, and of each reference the
        `keep_versions` that came last.
        """
        locked = {entry.digest for entry in self.lock.read().values()}
        gone = self.cache.collect(locked | set(keep), self._keep_versions)
        if gone:
            log.info("the cache let go of %d versions that nothing refers to", len(gone))
        return gone

    def statistics(self) -> RegistriesStatistics:
        with self._guard:
            schemes = {
                scheme: SchemeStatistics(dict(outcomes), self._last_success[scheme])
                for scheme, outcomes in self._outcomes.items()
            }
        return RegistriesStatistics(schemes, self.cache.statistics())

    def __repr__(self) -> str:
        return f"<Registries {', '.join(self._resolvers) or 'none'}{' locked' if self.locked else ''}>"

    # -- asking ----------------------------------------------------------------------------------------------------

    def _resolver(self, reference: str) -> Resolver:
        scheme = scheme_of(reference)
        resolver = self._resolvers.get(scheme or "")
        if scheme is None or resolver is None:
            raise SourceError(not_allowed(scheme))
        return resolver

    def _patiently(self, call: Callable[[], T]) -> T:
        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, SourceUnavailable) and error.soon),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=WAIT_S, max=MAX_WAIT_S),
            sleep=self._sleep,
            reraise=True,
        )
        return attempts(lambda: _typed(call))

    def _counted(self, scheme: str, call: Callable[[], T]) -> T:
        try:
            result = call()
        except SourceUnavailable:
            self._count(scheme, "unavailable")
            raise
        except SourceError:
            self._count(scheme, "refused")
            raise
        self._count(scheme, "ok")
        return result

    def _count(self, scheme: str, outcome: Outcome) -> None:
        with self._guard:
            self._outcomes[scheme][outcome] += 1
            if outcome != "unavailable":  # it answered
                self._last_success[scheme] = self._wall_clock()


def entry_of(resolved: Resolved, digest: str, at: float) -> Locked:
    """What the lock says of a version that serves. `at`: seconds since 1970."""
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Locked(
        resolved.reference, resolved.uri, resolved.immutable_id, resolved.version, resolved.registry, digest, when
    )


def _typed(call: Callable[[], T]) -> T:
    """What a registry answers can be odd in ways that nobody thought of; whoever asked is told so, by the error that he
    expects. Raises SourceUnavailable."""
    try:
        return call()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        log.debug("a registry's answer could not be read", exc_info=True)
        why = f"its registry answered something that cannot be read ({type(error).__name__})"
        raise SourceUnavailable(f"{why}; check the address", soon=False) from None


def _emptied(directory: Path) -> None:
    """What a failed attempt has left goes."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
