"""What a programmable backend says of itself, the same over HTTP and gRPC."""

from __future__ import annotations

from typing import Any, Final

from tests.faults import nonce
from tests.faults.backend_engine import Engine

SERVER: Final = {
    "name": "triton",
    "version": "0.0.0-faults",
    "extensions": ["model_repository", "model_configuration", "binary_tensor_data"],
}
"""Called `triton` because it speaks Triton's extensions."""


class Documents:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def metadata(self) -> dict[str, Any]:
        return nonce.metadata(self._engine.behaviour.datatype)

    def config(self) -> dict[str, Any]:
        return nonce.config(self._engine.behaviour.datatype)

    def index(self) -> list[dict[str, Any]]:
        if not self._engine.behaviour.model:
            return []
        return [{"name": nonce.MODEL, "version": "1", "state": "READY", "reason": ""}]

    def answer(self, method: str, path: str) -> tuple[int, Any]:
        """Status and document of everything over HTTP that is not inference."""
        ready = 200 if self._engine.behaviour.ready else 400
        of_server: dict[str, tuple[int, Any]] = {
            "/v2/health/live": (200, None),
            "/v2/health/ready": (ready, None),
            "/v2": (200, SERVER),
            "/v2/": (200, SERVER),
            "/v2/repository/index": (200, self.index()),
        }
        if path in of_server:
            return of_server[path]
        model, _, rest = path.removeprefix("/v2/models/").partition("/")
        if not path.startswith("/v2/models/") or model != nonce.MODEL or not self._engine.behaviour.model:
            return 404, {"error": f"Request for unknown model: '{model}' is not found"}
        of_model: dict[tuple[str, str], tuple[int, Any]] = {
            ("GET", ""): (200, self.metadata()),
            ("GET", "config"): (200, self.config()),
            ("GET", "ready"): (ready, None),
            ("GET", "stats"): (200, {"model_stats": [{"name": nonce.MODEL, "version": "1"}]}),
        }
        page = (method, rest.removeprefix("versions/1").removeprefix("/"))
        return of_model.get(page, (404, {"error": f"no such page: {path}"}))
