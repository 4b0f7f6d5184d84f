"""One name for several backends, and what its resolution does to them (DNS).

The gateway runs in a mount namespace of its own, where /etc/hosts is a file of the rig's; that takes the privilege to
make one, and the scenario says so where it is missing.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.faults import nonce
from tests.faults.load import Profile
from tests.faults.registry import Unavailable, scenario
from tests.faults.results import Result
from tests.faults.rig import PACE, Rig, Run, with_rate
from tests.faults.servers import BackendProcess, GatewayServer, Where, eventually, free_port

NAME = "backends.test"
INSIDE = 'mount --bind "$0" /etc/hosts && exec "$@"'


def namespace() -> None:
    """Raises Unavailable: mount namespaces cannot be had here."""
    try:
        made = subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        raise Unavailable("this user cannot make a mount namespace, in which /etc/hosts is another file")


class Names:
    """The gateway's /etc/hosts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.say([])

    def say(self, addresses: Sequence[str]) -> None:
        """The name has these addresses from now on; none: it does not exist."""
        self.path.write_text("".join(f"{address} {NAME}\n" for address in addresses))


@contextlib.asynccontextmanager
async def behind_a_name(run: Run, first: Sequence[int]) -> AsyncIterator[tuple[Rig, Names, list[str]]]:
    """Three backends on addresses of their own and one port; the gateway knows their name only.

    Args:
        first: indexes of those that the name means at the start.
    """
    namespace()
    folder = Path(tempfile.mkdtemp(dir=run.folder))
    addresses = [f"127.0.1.{n + 1}" for n in range(3)]
    ports = free_port(), free_port()
    async with contextlib.AsyncExitStack() as stack:
        names = Names(folder / "hosts")
        names.say([addresses[n] for n in first])
        backends = []
        for n, address in enumerate(addresses):
            backends.append(BackendProcess(f"b{n + 1}", folder, PACE, n + 1, address, ports))
            stack.callback(backends[-1].close)
        for backend in backends:
            await backend.wait_started()
        entry = {"name": nonce.MODEL, "backends": [{"url": f"http://{NAME}:{ports[0]}"}]}
        where = Where(prefix=("unshare", "-m", "sh", "-c", INSIDE, str(names.path)))
        gateway = GatewayServer(folder, [], {"models": [entry]}, where)
        stack.callback(gateway.close)
        await gateway.wait_started()
        rig = Rig(run, gateway, backends, with_rate(run, Profile(rate=1.0), 250.0))
        stack.push_async_callback(rig.close)
        yield rig, names, addresses


@scenario("28-names", "a name's addresses change, then it is gone", "followed; the last good set is kept; 0 errors")
async def changing_names(run: Run, result: Result) -> Result:
    async with behind_a_name(run, [0, 1]) as (rig, names, addresses):
        await rig.before(3.0)
        result.at_most("rows of a backend that the name does not mean", rig.arrivals(rig.backends[2], 0.0), 0)
        await rig.inject()
        names.say(addresses[1:])
        rig.backends[0].kill()  # a failed connect makes it look again soon
        await eventually(
            lambda: rig.arrivals(rig.backends[2], 0.0) > 0, 45.0, "the new address is not used", every_s=0.1
        )
        names.say([])
        rig.backends[1].kill()
        await rig.hold(6.0, 3.0)
        names.say(addresses)
        await rig.backends[0].restart()
        await rig.backends[1].restart()
        await rig.heal()
        await rig.after(10.0, 4.0)
        result.injected = 5
        await rig.finish(result)
        states = [f"{backend.name}: {backend.state}" for backend in rig.gateway.backends()]
        result.notes.append(", ".join(states))
        used = rig.arrivals(rig.backends[1], rig.healed_at)
        result.at_least("batches of the one that came back", used, 1)
    return result
