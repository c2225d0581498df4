"""Whatever is sent, the answer is what OpenAPI documents, and never a fault of the service's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.report.synthetic import finished
from tests.service.live import TOKEN, running, settings_in

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 8
SECONDS = 60
"""Within which an answer comes; a report loads a plotting library first."""
AUTH = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with running(settings_in(tmp_path_factory.mktemp("fuzzed"), at_once=0)) as live:
        finished(live.store, 10)
        url = f"{live.service.address}/api/v1/openapi.json"
        yield schemathesis.openapi.from_url(url, headers=AUTH)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_brings_a_fault(document: Any, mode: GenerationMode) -> None:
    tried = 0
    for found in document.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, headers=AUTH, timeout=SECONDS)
            if "name" in (case.path_parameters or {}):  # once more for the run that there is
                case.path_parameters["name"] = "demo"
                case.call_and_validate(checks=CHECKS, headers=AUTH, timeout=SECONDS)

        try:
            check()
        except Unsatisfiable:
            continue  # it takes nothing that could be wrong
        except BaseException as problem:
            problem.add_note(f"while calling {operation.label}")
            raise
        tried += 1
    assert tried > 15
