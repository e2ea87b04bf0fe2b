"""What the server keeps in its folder: whose it is, within which limits, and what a crash leaves."""

import asyncio
import io
import json
import time

import pytest

from twinax.serving.http import records
from twinax.serving.http.batch_lines import answer_line, read_body, read_lines
from twinax.serving.http.batches import Batch, Progress
from twinax.serving.http.errors import ApiError
from twinax.serving.http.file_store import FileStore, StoredFile
from twinax.serving.http.request_file import BadFile, plan_file


def store(folder, **limits) -> FileStore:
    return FileStore(folder, **({"max_bytes": 100, "max_files": 2} | limits))


def add(files: FileStore, tenant: str = "ann", content: bytes = b"x", **options) -> StoredFile:
    return asyncio.run(files.add(tenant, "a.jsonl", "batch", io.BytesIO(content), **options))


def refused(function, *arguments) -> ApiError:
    with pytest.raises(ApiError) as caught:
        function(*arguments)
    return caught.value


def test_a_tenant_sees_its_own_files_alone(tmp_path):
    files = store(tmp_path)
    mine, theirs = add(files, "ann"), add(files, "bob")
    assert files.list("ann") == [mine] and files.list("bob") == [theirs]
    missing = refused(files.get, "bob", "file-" + "0" * 32)
    for tenant in ("bob", ""):
        error = refused(files.get, tenant, mine.id)
        assert (error.status, error.code) == (404, "file_not_found")
        assert error.message == missing.message.replace("file-" + "0" * 32, mine.id), "as if there were none"


def test_the_number_of_files_is_limited_for_each(tmp_path):
    files = store(tmp_path)
    first, _ = add(files), add(files)
    assert refused(add, files).code == "too_many_files"
    assert len(list(tmp_path.glob("*.data"))) == 2, "what was refused is gone"
    add(files, "bob")
    output = tmp_path / "answers"
    output.write_bytes(b"1")
    files.adopt(records.new_name("file-"), output, "ann", "o", None)  # a batch's answers are never refused
    files.remove(first)
    add(files)


def test_files_are_there_after_a_restart_and_half_an_upload_is_not(tmp_path):
    files = store(tmp_path)
    file = add(files, content=b"abc", expires_after=3600)
    (tmp_path / (records.new_name("file-") + ".data")).write_bytes(b"half")
    again = store(tmp_path)
    assert again.list("ann") == [file]
    assert again.path(file).read_bytes() == b"abc"
    assert len(list(tmp_path.glob("*.data"))) == 1
    (tmp_path / f"{file.id}.json").write_text('{"id": 1}')
    with pytest.raises(ValueError, match="is not a record of this server"):
        store(tmp_path)


def test_files_expire(tmp_path):
    files = store(tmp_path)
    file = add(files, expires_after=3600)
    assert file.expires_at == file.created_at + 3600
    file.expires_at = int(time.time()) - 1
    assert files.list("ann") == [] and not list(tmp_path.glob("file-*"))


def test_adopting_twice_is_adopting_once(tmp_path):
    files = store(tmp_path / "files")
    source, name = tmp_path / "partial", records.new_name("file-")
    source.write_bytes(b"1\n")
    first = files.adopt(name, source, "ann", "o.jsonl", None)
    (tmp_path / "files" / f"{name}.json").unlink()  # a crash between the two
    again = store(tmp_path / "files").adopt(name, source, "ann", "o.jsonl", None)
    assert (again.id, again.bytes, again.purpose) == (first.id, 2, "batch_output")


def test_one_server_a_folder(tmp_path):
    records.lock(tmp_path)
    with pytest.raises(ValueError, match="another server keeps its files in"):
        records.lock(tmp_path)


def test_a_line_that_a_crash_has_torn_is_run_again(tmp_path):
    batch = Batch("batch_x", "ann", "/v1/completions", "file-x", "24h", 0, 1, "file-o", "file-e")
    progress = Progress(tmp_path, batch)
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    progress.answered("a", 200, {"usage": usage})
    progress.answered("b", 400, {"error": {}})
    progress.unanswered("c", "batch_expired", "too late")
    progress.close()
    whole = progress.output_path.read_bytes()
    progress.output_path.write_bytes(whole + whole[: len(whole) // 2])
    again = Progress(tmp_path, batch)
    assert again.done == {"a", "b", "c"} and again.counts(4) == progress.counts(4)
    assert again.counts(4)["request_counts"] == {"total": 4, "completed": 1, "failed": 2}
    assert again.counts(4)["usage"]["input_tokens_details"] == {"cached_tokens": 3}
    again.answered("d", 200, {})
    again.close()
    assert [json.loads(line)["custom_id"] for line in again.output_path.read_text().splitlines()] == ["a", "d"]


def test_answers_that_the_disk_has_damaged_are_given_again(tmp_path, capfd):
    batch = Batch("batch_x", "ann", "/v1/completions", "file-x", "24h", 0, 1, "file-o", "file-e")
    progress = Progress(tmp_path, batch)
    for name in "abc":
        progress.answered(name, 200, {})
    progress.close()
    lines = progress.output_path.read_bytes().splitlines(keepends=True)
    progress.output_path.write_bytes(lines[0] + lines[1].replace(b"custom_id", b"\0" * 9) + lines[2])
    assert Progress(tmp_path, batch).done == {"a"}
    assert progress.output_path.read_bytes() == lines[0]
    assert "line 2 is no answer" in capfd.readouterr().err


JUNK = [b"notes", b"notes\n", b"\n", b"5\n", b"[" * 100_000, b'{"id":"batch_req_1"}\n', b"\xff\n", b'{"id": "batch']


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_a_file_of_something_else_is_not_written_over(tmp_path, junk):
    source, other = tmp_path / "requests.jsonl", tmp_path / "other"
    url = "/v1/completions"
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", "prompt": "x"}}
    source.write_text(json.dumps(line) + "\n")
    for before in (b"", answer_line("a", 200, {})):
        other.write_bytes(before + junk)
        with pytest.raises(BadFile, match=f"line {2 if before else 1}: It is no answer.*choose another --output"):
            plan_file(source, other, 1000)
        assert other.read_bytes() == before + junk
    with pytest.raises(BadFile, match="no answer"):
        plan_file(source, source, 1000)
    other.write_bytes(answer_line("a", 500, {}) + b'{"id":"batch_')  # which a crash has torn
    work = plan_file(source, other, 1000)
    assert (work.left, work.failed) == ([], 1) and other.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("junk", [b"", b"[" * 100_000, b"{}", b'{"id": 5}', None])
def test_a_record_that_is_none_is_named(tmp_path, junk):
    file = add(store(tmp_path))
    path = tmp_path / f"{file.id}.json"
    if junk is None:
        path = path.rename(tmp_path / f"file-{'0' * 32}.json")
    else:
        path.write_bytes(junk)
    with pytest.raises(ValueError, match=f"{path.name}.*move it away"):
        store(tmp_path)


def test_lines_are_found_again_and_long_ones_are_refused(tmp_path):
    path, url = tmp_path / "in", "/v1/completions"
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": {"prompt": "é" * n}} for n in range(4)]
    path.write_bytes(b"\n".join(json.dumps(line).encode() for line in lines[:2]) + b"\r\n\n")
    with path.open("ab") as file:
        file.write("\n".join(json.dumps(line, ensure_ascii=False) for line in lines[2:]).encode())
    places, errors = read_lines(path, url, 1000)
    assert errors == [] and [read_body(path, place) for place in places] == [line["body"] for line in lines]
    _, errors = read_lines(path, url, 50)
    assert [(error.code, error.line) for error in errors] == [("line_too_long", 1)]
    path.write_bytes(b"{}\n" * 500)
    assert len(read_lines(path, url, 1000)[1]) == 100
