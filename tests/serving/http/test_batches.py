"""/v1/files and /v1/batches through the real client."""

import json
import os
import signal
import time

import openai
import pytest
from openai.types import batch_create_params, batch_list_params, file_create_params, file_list_params

from twinax.serving.http import fields

from .conftest import MAX_RUNNING, MODEL, Server

COMPLETIONS = "/v1/completions"


def upload(client: openai.OpenAI, content: bytes | list, name: str = "in.jsonl", **options):
    data = content if isinstance(content, bytes) else b"".join(json.dumps(line).encode() + b"\n" for line in content)
    return client.files.create(file=(name, data), purpose="batch", **options)


def line(name: str, url: str = COMPLETIONS, **body) -> dict:
    if url == COMPLETIONS:
        body = {"prompt": name * 3, "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": MODEL} | body}


def run(client: openai.OpenAI, lines: bytes | list, url: str = COMPLETIONS, **options):
    given = upload(client, lines)
    batch = client.batches.create(input_file_id=given.id, endpoint=url, completion_window="24h", **options)
    return ended(client, batch)


def ended(client: openai.OpenAI, batch, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def answers(client: openai.OpenAI, name: str | None) -> dict[str, dict]:
    text = "" if name is None else client.files.content(name).text
    found = [json.loads(one) for one in text.splitlines()]
    assert len({one["id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


@pytest.mark.parametrize(
    ("table", "theirs"),
    [
        (fields.UPLOAD, file_create_params.FileCreateParams),
        (fields.LIST_FILES, file_list_params.FileListParams),
        (fields.BATCH, batch_create_params.BatchCreateParams),
        (fields.LIST_BATCHES, batch_list_params.BatchListParams),
    ],
)
def test_every_field_of_the_api_is_known_and_no_other(table, theirs):
    names = {name for one in theirs.__mro__[:-1] for name in getattr(one, "__annotations__", {})}
    assert set(table) == names | set(theirs.__required_keys__) | set(theirs.__optional_keys__)


def test_a_file_is_kept_until_it_is_deleted(server: Server, client):
    content = "ключ\n".encode() * 70_000
    file = upload(client, content, "../../etc/passwd")
    assert (file.filename, file.bytes, file.purpose) == ("../../etc/passwd", len(content), "batch")
    assert client.files.content(file.id).read() == content
    assert client.files.retrieve(file.id) == file
    assert file.id in [one.id for one in client.files.list(purpose="batch")]
    assert client.files.delete(file.id).deleted
    for gone in (file.id, "file-" + "0" * 32, "..%2f..%2fetc%2fpasswd", "lock"):
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(gone)
    expiring = upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 3600})
    assert expiring.expires_at - expiring.created_at == 3600
    client.files.delete(expiring.id)


def test_files_come_in_pages(client):
    names = [upload(client, b"x", f"{n}").id for n in range(3)]
    listed = [file.id for file in client.files.list(limit=2, order="asc")]  # the client asks for the next pages
    assert set(names) <= set(listed) and len(listed) == len(set(listed))
    page = client.files.list(limit=1)
    assert page.has_more and len(page.data) == 1
    for name in names:
        client.files.delete(name)
    with pytest.raises(openai.BadRequestError, match="'limit' must be between 1 and 10000"):
        client.files.list(limit=0)


@pytest.mark.parametrize(
    ("form", "files", "status", "param"),
    [
        ({"purpose": "batch"}, {}, 415, None),
        ({"purpose": "batch"}, {"other": b"x"}, 400, "other"),
        ({}, {"file": b"x"}, 400, "purpose"),
        ({"purpose": "vision"}, {"file": b"x"}, 400, "purpose"),
        ({"purpose": "batch", "expires_after[seconds]": "5"}, {"file": b"x"}, 400, "expires_after.anchor"),
        ({"purpose": "batch", "colour": "red"}, {"file": b"x"}, 400, "colour"),
        ({"purpose": "b" * 5000}, {"file": b"x"}, 400, None),
    ],
)
def test_bad_uploads(server: Server, form, files, status, param):
    response = server.http.post(server.url + "/v1/files", data=form, files=files)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_a_form_that_is_none(server: Server):
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
        response = server.post_bytes("/v1/files", b"no form", kind)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_form"), response.text


def test_answers_are_those_that_each_request_gets_alone(server: Server, client):
    lines = [line(f"a{n}", prompt="the same beginning " * 3 + str(n % 5), seed=n, temperature=1) for n in range(30)]
    lines += [line("bad", temperature=9), line("streamed", stream=True), line("two", n=2)]
    batch = run(client, lines, metadata={"of": "me"})
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"of": "me"}, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (33, 31, 2)
    found = answers(client, batch.output_file_id)
    assert set(found) == {one["custom_id"] for one in lines} - {"bad", "streamed"}
    for one in (lines[0], lines[17], lines[-1]):
        got = found[one["custom_id"]]
        assert (got["error"], got["response"]["status_code"]) == (None, 200)
        direct = server.post(COMPLETIONS, one["body"]).json()
        assert got["response"]["body"]["choices"] == direct["choices"]
    refused = answers(client, batch.error_file_id)
    for name, param in (("bad", "temperature"), ("streamed", "stream")):
        response = refused[name]["response"]
        assert (response["status_code"], response["body"]["error"]["param"]) == (400, param)
    used = [one["response"]["body"]["usage"] for one in found.values()]
    assert batch.usage.input_tokens == sum(one["prompt_tokens"] for one in used)
    assert batch.usage.output_tokens == sum(one["completion_tokens"] for one in used)
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    server.wait_idle()


def test_other_endpoints(server: Server, client):
    chat = line("chat", "/v1/chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=2)
    batch = run(client, [chat], "/v1/chat/completions")
    [got] = answers(client, batch.output_file_id).values()
    assert got["response"]["body"]["object"] == "chat.completion"
    batch = run(client, [line("r", "/v1/responses", input="a", max_output_tokens=2, ignore_eos=True)], "/v1/responses")
    [got] = answers(client, batch.output_file_id).values()
    assert got["response"]["body"]["object"] == "response" and batch.usage.output_tokens == 2
    batch = run(client, [line("e", "/v1/embeddings", input=["a", "b"])], "/v1/embeddings")
    [got] = answers(client, batch.output_file_id).values()
    assert len(got["response"]["body"]["data"]) == 2
    server.wait_idle()


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"\n\n", "empty_file", None),
        (b"{}", "missing_required_parameter", 1),
        (b"[]", "invalid_json", 1),
        (b"\n{", "invalid_json", 2),
        (b"\xff", "invalid_utf8", 1),
        ([line("a"), line("a")], "invalid_value", 2),
        ([line("a", "/v1/embeddings")], "invalid_value", 1),
        ([line("a") | {"colour": "red"}], "unknown_parameter", 1),
        ([line("a"), line("b") | {"body": []}], "invalid_value", 2),
        ([line("")], "invalid_value", 1),
    ],
)
def test_a_bad_file_fails_its_batch_and_says_where(client, lines, code, number):
    batch = run(client, lines)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]


def test_bad_batches(client):
    file = upload(client, [line("a")])
    good = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    for change, param in (
        ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.create(**(good | change))
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_" + "0" * 32)
    client.files.delete(file.id)


def test_a_cancelled_batch_keeps_what_it_has(server: Server, client):
    file = upload(client, [line(f"long{n}", max_tokens=200, ignore_eos=True) for n in range(40)])
    batch = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
    while not client.batches.retrieve(batch.id).request_counts.completed:
        time.sleep(0.01)
    with pytest.raises(openai.BadRequestError, match="needs this file"):
        client.files.delete(file.id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
    assert len(answers(client, batch.output_file_id)) == batch.request_counts.completed < 40
    server.wait_idle()
    with pytest.raises(openai.BadRequestError, match="can't be cancelled"):
        client.batches.cancel(batch.id)
    assert batch.id == next(iter(client.batches.list(limit=1))).id
    client.files.delete(file.id)


def test_others_go_first(server: Server, client):
    """A batch leaves room in the queue, and takes it where there is none other."""
    file = upload(client, [line(f"b{n}", max_tokens=100, ignore_eos=True) for n in range(60)])
    batch = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
    most = 0
    while (now := client.batches.retrieve(batch.id)).status != "completed":
        assert now.status in ("validating", "in_progress", "finalizing")
        metrics = server.metrics()
        most = max(most, metrics["vllm:num_requests_waiting"] + metrics["vllm:num_requests_running"])
        client.completions.create(model=MODEL, prompt="now", max_tokens=1)
    assert most <= MAX_RUNNING + MAX_RUNNING // 4 + 1
    assert now.request_counts.completed == 60


@pytest.mark.slow
def test_where_the_scheduler_knows_priority_a_batch_gives_way(start_server, tmp_path):
    """The one slot is taken from a batch's request, but for one that asks for a priority of its own."""
    server = start_server(files=str(tmp_path / "kept"), scheduler="priority", max_running=1)
    long = {"max_tokens": 600, "ignore_eos": True}
    with server.client() as client:
        for given, preempted in (({"max_tokens": 1900}, 1), ({"priority": -1}, 0)):
            before = server.metrics()["vllm:num_preemptions_total"]
            file = upload(client, [line("long", **(long | given))])
            batch = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
            server.wait_for(num_requests_running=1)
            client.completions.create(model=MODEL, prompt="now", max_tokens=1)
            batch = ended(client, batch)
            [found] = answers(client, batch.output_file_id).values()
            assert found["response"]["body"]["choices"][0]["finish_reason"] == "length"
            assert server.metrics()["vllm:num_preemptions_total"] - before == preempted
        direct = server.post(COMPLETIONS, line("long", **long)["body"]).json()
        assert found["response"]["body"]["choices"] == direct["choices"]
        embedded = run(client, [line("e", "/v1/embeddings", input="a")], "/v1/embeddings")
        assert embedded.request_counts.completed == 1
    assert server.stop() == 0


@pytest.mark.slow
def test_a_killed_server_goes_on_where_it_was(start_server, tmp_path):
    lines = [line(f"k{n}", prompt=f"prompt {n}", seed=n, temperature=1, max_tokens=60) for n in range(80)]
    first = start_server(files=str(tmp_path / "kept"))
    with first.client() as client:
        file = upload(client, lines)
        batch = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
        while not client.batches.retrieve(batch.id).request_counts.completed > 5:
            time.sleep(0.005)
        os.kill(engine := first.engine_pid(), signal.SIGSTOP)  # so that something is left to do
        late = client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h")
        refused = start_server(files=str(tmp_path / "kept"), ready=False)
        assert refused.process.wait(timeout=60) != 0
        assert "another server keeps its files" in refused.output()
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(timeout=60)
    os.kill(engine, signal.SIGKILL)
    partial = tmp_path / "kept" / "batches" / f"{batch.id}.output"
    record = partial.with_name(f"{late.id}.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"expires_at": int(time.time())}))
    before = partial.read_bytes()
    partial.write_bytes(before + b'{"id": "torn')  # as a crash of the machine may leave it
    second = start_server(files=str(tmp_path / "kept"))
    with second.client() as client:
        batch = ended(client, client.batches.retrieve(batch.id))
        assert (batch.status, batch.request_counts.completed, batch.request_counts.total) == ("completed", 80, 80)
        written = client.files.content(batch.output_file_id).read()
        assert written.startswith(before) and len(answers(client, batch.output_file_id)) == 80
        direct = second.post(COMPLETIONS, lines[-1]["body"]).json()
        late = ended(client, client.batches.retrieve(late.id))
        counts = late.request_counts
        assert (late.status, counts.completed + counts.failed, counts.total) == ("expired", 80, 80)
        missed = answers(client, late.error_file_id)
        assert {one["error"]["code"] for one in missed.values()} == {"batch_expired"} and len(missed) == counts.failed
        last = answers(client, batch.output_file_id)["k79"]["response"]["body"]
        assert last["choices"] == direct["choices"]
    assert second.stop() == 0
