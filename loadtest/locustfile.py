"""Load for locust: users that ask the bundled models without pause and check every answer.

    locust -f loadtest/locustfile.py --headless --users 64 --spawn-rate 64 --run-time 30s

Tags: `json`, `binary` choose the encoding, `batch` the requests of several rows. A wrong answer counts as a
failure, so the process exits with code 1; so does a run without a single request.
"""

# locust is an extra: where it is not installed its classes and decorators are of unknown type.
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import random
from typing import Any

from locust import FastHttpUser, constant, events, tag, task

from loadtest.answers import Case, cases, fault

CASES = cases()
SINGLE_JSON = [c for c in CASES if c.encoding == "json" and len(c.labels) == 1]
SINGLE_BINARY = [c for c in CASES if c.encoding == "binary" and len(c.labels) == 1]
SEVERAL_ROWS = [c for c in CASES if len(c.labels) > 1]


class Client(FastHttpUser):
    """One connection; three quarters of its requests are single rows, as from an online service."""

    host = "http://127.0.0.1:8000"
    wait_time = constant(0)

    def _ask(self, case: Case) -> None:
        body: Any = case.body  # locust's annotation leaves bytes out; geventhttpclient sends them as they are
        headers = dict(case.headers)
        with self.client.post(case.path, body, headers=headers, name=case.id, catch_response=True) as response:
            # dict(headers) would not do: geventhttpclient's mapping gives tuples for it
            got = dict(response.headers.items()) if response.headers else {}
            problem = fault(case, response.status_code, got, response.content or b"")
            if problem:
                response.failure(problem)
            else:
                response.success()

    @tag("json")
    @task(4)
    def one_row_json(self) -> None:
        self._ask(random.choice(SINGLE_JSON))

    @tag("binary")
    @task(2)
    def one_row_binary(self) -> None:
        self._ask(random.choice(SINGLE_BINARY))

    @tag("json", "binary", "batch")
    @task(2)
    def several_rows(self) -> None:
        self._ask(random.choice(SEVERAL_ROWS))


@events.quitting.add_listener
def fail_without_requests(environment: Any, **_: Any) -> None:
    """A run that asked nothing proves nothing."""
    if environment.stats.total.num_requests == 0:
        environment.process_exit_code = 1
