"""The whole corpus against both servers, and the tally: equal, explained, unexplained.

`run` asks Triton and the gateway every case, step by step; `Tally` sorts the differences by the allow-list. A case is
equal without differences, explained when an entry covers each of them, else unexplained.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from tests.differential import corpus_binary, corpus_grpc, corpus_json, corpus_management
from tests.differential.allowed import ALLOWED, Allowed
from tests.differential.compare import Difference, differences
from tests.differential.exchange import Asker, Case
from tests.differential.triton_process import TritonProcess, triton
from tests.differential.zoo import NOT_LOADED, TWINS, Twin, write_repository
from tests.live.gateway_process import GatewayProcess, gateway

CORPUS: Final[Sequence[Case]] = (
    *corpus_json.cases(),
    *corpus_binary.cases(),
    *corpus_management.cases(),
    *corpus_grpc.cases(),
)


@dataclass
class Tally:
    found: dict[str, list[Difference]] = field(default_factory=dict)
    unexplained: dict[str, list[Difference]] = field(default_factory=dict)
    used: Counter[Allowed] = field(default_factory=Counter)

    def add(self, case: Case, found: list[Difference]) -> None:
        self.found[case.name] = found
        self.unexplained[case.name] = [difference for difference in found if not self._explained(difference)]

    def _explained(self, difference: Difference) -> bool:
        entries = [entry for entry in ALLOWED if entry.covers(difference)]
        self.used.update(entries)
        return bool(entries)

    @property
    def stale(self) -> list[Allowed]:
        return [entry for entry in ALLOWED if not self.used[entry]]

    def table(self) -> str:
        """One line a group: cases, equal, explained, unexplained."""
        rows: dict[str, list[int]] = {}
        for name, found in self.found.items():
            kind = 3 if self.unexplained[name] else 2 if found else 1
            for group in (name.partition("/")[0], "all"):
                row = rows.setdefault(group, [0, 0, 0, 0])
                row[0] += 1
                row[kind] += 1
        rows["all"] = rows.pop("all", [0, 0, 0, 0])
        lines = [f"{'group':<20}{'cases':>8}{'equal':>8}{'explained':>11}{'unexplained':>13}"]
        lines += [
            f"{name:<20}{n:>8}{equal:>8}{explained:>11}{rest:>13}" for name, (n, equal, explained, rest) in rows.items()
        ]
        return "\n".join(lines)


def run(corpus: Sequence[Case], real: TritonProcess, ours: GatewayProcess) -> Tally:
    tally = Tally()
    theirs = Asker(real.port, real.grpc_port)
    us = Asker(ours.port, getattr(ours, "grpc_port", 0) or 1)
    with contextlib.closing(theirs), contextlib.closing(us):
        for case in corpus:
            found: list[Difference] = []
            for number, step in enumerate(case.steps):
                expected = theirs.ask(step)
                if expected.status in ("connection lost", "UNAVAILABLE"):
                    real.ensure()
                prefix = f"{number}:" if len(case.steps) > 1 else ""
                found += differences(case.name, step, expected, us.ask(step), prefix)
            tally.add(case, found)
    return tally


@dataclass(frozen=True)
class Setting:
    """How both servers are started: the same repository, the same switches in each one's own words."""

    twins: Sequence[Twin]
    loaded: Sequence[str] = ()
    """Models to load under explicit control; empty: all of them, and no control."""
    flags: Sequence[str] = ()
    server: Mapping[str, object] = field(default_factory=dict)
    """Keys of the gateway's `server` section."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Keys of the gateway's `defaults` section."""


SETTING: Final = Setting(TWINS, [twin.name for twin in TWINS if twin.name not in NOT_LOADED])


@contextlib.contextmanager
def both(folder: Path, setting: Setting = SETTING) -> Iterator[tuple[TritonProcess, GatewayProcess]]:
    """A Triton and a gateway that serve the same twins."""
    repository = write_repository(folder / "triton", setting.twins, triton=True)
    with triton(repository, setting.loaded, *setting.flags) as real:
        file = configuration(folder, setting)
        with gateway("serve", "-c", str(file)) as ours:
            yield real, ours


def configuration(folder: Path, setting: Setting) -> Path:
    repository = write_repository(folder / "gateway", setting.twins, triton=False)
    server: dict[str, object] = {
        "workers": 2,
        "drain_delay_s": 0,
        "compression": {"min_bytes": 1},
        "protocol": {"server_name": "triton"},
        **setting.server,
    }
    if setting.loaded:
        server |= {"model_control": "explicit", "load_models": list(setting.loaded)}
    models = [{"source": str(repository)}]
    file = folder / "gateway.yaml"
    file.write_text(
        yaml.safe_dump({"server": server, "defaults": {"instances": 1, **setting.defaults}, "models": models})
    )
    return file
