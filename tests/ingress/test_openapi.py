"""The OpenAPI description: made from the route table, valid, and complete."""

from __future__ import annotations

import json
import re
from typing import Any

from gateway.ingress.openapi import SCHEMAS, document
from tests.ingress.oip_bench import http, oip_bench


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if "$ref" in value else set()
        return own.union(*[references(inner) for inner in value.values()])
    return set().union(*[references(inner) for inner in value]) if isinstance(value, list | tuple) else set()


async def test_every_route_is_described_and_nothing_else() -> None:
    async with oip_bench() as bench:
        table = bench.application.table
        described = (await bench.ask(http("GET", "/v2/openapi.json"))).document
        assert described == json.loads(json.dumps(document(table)))
        assert described["openapi"] == "3.1.0"
        found = {
            (path, method.upper().encode())
            for path, methods in described["paths"].items()
            for method in methods
            if method != "parameters"
        }
        assert found == {(path, method) for path, operations in table.paths.items() for method in operations}


async def test_references_lead_somewhere_and_every_schema_is_used() -> None:
    async with oip_bench() as bench:
        described = document(bench.application.table)
        used = {reference.removeprefix("#/components/schemas/") for reference in references(described)}
        assert used == SCHEMAS.keys()


async def test_names_in_a_path_are_its_parameters_and_ids_are_unique() -> None:
    async with oip_bench() as bench:
        described = document(bench.application.table)
        ids = []
        for path, methods in described["paths"].items():
            assert [p["name"] for p in methods["parameters"]] == re.findall(r"\{(\w+)\}", path)
            ids += [operation["operationId"] for method, operation in methods.items() if method != "parameters"]
        assert len(ids) == len(set(ids))
        assert all(re.fullmatch(r"\w+", name) for name in ids)
