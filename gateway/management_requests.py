"""What clients who list, load and unload models are told before anything is touched: the index's lines, and refusals.

Rules: the texts are Triton's where Triton has one, for clients look for them; nothing here waits, reads a disk or
changes anything. What is then loaded and unloaded is the affair of management_repository.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from gateway.catalog import ServedVersion
from gateway.core.model import ModelState
from gateway.errors import ControlOff, InvalidRequest, LoadFailed, NotReady, Unsupported
from gateway.registry.reference import name_fault

ModelControl = Literal["none", "poll", "explicit"]
_INDEX_STATE: Final = {
    ModelState.LOADING: "LOADING",
    ModelState.UNLOADING: "UNLOADING",
    ModelState.UNAVAILABLE: "UNAVAILABLE",
    ModelState.FAILED: "UNAVAILABLE",
}


def known_versions(versions: Iterable[ServedVersion], *, ready: bool) -> list[dict[str, str]]:
    """The index's entries of versions with a state; `ready`: only of those that can answer."""
    entries: list[dict[str, str]] = []
    for version in versions:
        if not version.reachable:
            continue
        entry = {"name": version.name, "version": version.version}
        loaded = version.state is ModelState.READY
        reason = version.refusal if loaded else version.reason
        if loaded and not reason:
            entries.append(entry | {"state": "READY"})
        elif not ready:
            state = "UNAVAILABLE" if loaded else _INDEX_STATE[version.state]
            entries.append(entry | {"state": state, "reason": reason})
    return entries


def check_request(name: str, repository: str, mode: ModelControl, *, is_open: bool) -> None:
    """Whether clients may load and unload a model now. Raises Unsupported, InvalidRequest, ControlOff, NotReady."""
    if repository:
        raise Unsupported("'repository_name' specification is not supported; leave it out")
    if not name.strip():
        raise InvalidRequest("Model name cannot be empty or consist of blanks")
    if mode != "explicit":
        raise ControlOff(
            "explicit model load / unload is not allowed if polling is enabled or model control is off; start the "
            "gateway with --model-control explicit"
        )
    if not is_open:
        raise NotReady("the gateway is still loading what it serves from the start, or is stopping; retry later")


def check_name(name: str) -> None:
    """Whether a model may be called that. Raises InvalidRequest, LoadFailed."""
    if "/" in name or "\\" in name or ".." in name:
        raise InvalidRequest("model name must not contain path traversal characters")
    if (fault := name_fault(name)) is not None or name.startswith("."):
        raise LoadFailed(
            f"failed to load '{name[:64]}', failed to poll from model repository: "
            f"{fault or 'a name that begins with a dot is hidden'}"
        )
