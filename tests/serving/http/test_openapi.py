"""/openapi.json says what the server does: all its routes, all its fields, and a small run of schemathesis.

`python -m benchmarks.fuzz` is the large run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twinax.serving.http import fields
from twinax.serving.http.batch_work import ENDPOINTS
from twinax.serving.http.fields import schema_of_object
from twinax.serving.http.openapi import OPERATIONS

from .conftest import MODEL, Server


@pytest.fixture(scope="module")
def document(server: Server) -> dict:
    return server.get("/openapi.json").json()


def test_every_route_is_described(server: Server, document):
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == set(OPERATIONS)
    assert "security" not in document["paths"]["/v1/models"]["get"]  # no key is asked for
    for path, item in document["paths"].items():
        for operation in item.values():
            assert {"200", "500"} <= set(operation["responses"]), path
            assert operation["summary"].endswith(".")


def test_every_field_is_described(document):
    content = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert set(content["schema"]["properties"]) == set(fields.COMPLETIONS)
    assert content["schema"]["properties"]["model"] == {"enum": [MODEL]}
    assert content["schema"]["properties"]["temperature"]["default"] == 1.0
    assert content["schema"]["required"] == ["model", "prompt"]  # though the prompt may be null
    assert {"type": "null"} in content["schema"]["properties"]["prompt"]["anyOf"]
    for table in (fields.COMPLETIONS, fields.CHAT, fields.EMBEDDINGS, fields.SCORE, fields.BATCH):
        schema = schema_of_object(table)
        assert schema["additionalProperties"] is False
        # Only what is looked at later, beside the model, is not described by its own parser.
        assert {name for name, one in schema["properties"].items() if one == {}} <= {"messages", "tools", "tool_choice"}


def test_the_examples_are_answered(server: Server, document):
    for path, item in document["paths"].items():
        content = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "example" in content and path != "/v1/batches":
            response = server.post(path, content["example"])
            assert response.status_code == 200, (path, response.text)


def test_what_a_path_takes_is_said_of_all_its_methods(server: Server):
    """Several routes may have the same path."""
    response = server.http.request("PUT", server.url + "/v1/files/file-0")
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


def test_a_batch_can_be_made_by_the_document_alone(document):
    """Which a tool needs that draws requests from it: an endpoint, and the file that an upload left."""
    content = document["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]
    assert set(content["schema"]["properties"]["endpoint"]["enum"]) == set(ENDPOINTS)
    [link] = document["paths"]["/v1/files"]["post"]["responses"]["200"]["links"].values()
    assert link["operationRef"] == "#/paths/~1v1~1batches/post"
    assert link["requestBody"] == {"input_file_id": "$response.body#/id"}


@pytest.fixture
def with_files(start_server: Callable[..., Server], tmp_path: Path) -> Iterator[Server]:
    # A short context: without max_tokens an answer fills it.
    server = start_server(files=str(tmp_path / "files"), max_model_len=64)
    yield server
    server.stop()


@pytest.mark.slow
def test_schemathesis_finds_nothing(with_files: Server):
    from benchmarks import fuzz

    engine = with_files.engine_pid()
    found = fuzz.fuzz(with_files.url, examples=2)
    assert found.failures == [], found.text
    assert found.complete
    assert found.operations == len(OPERATIONS)
    assert found.cases > 1000
    assert with_files.engine_pid() == engine
    assert with_files.metrics()["twinax_compiles_after_warmup_total"] == 0
    assert with_files.get("/health").json() == {"status": "ok"}
