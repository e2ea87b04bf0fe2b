"""/v1/embeddings through the real client, and /v1/score. What the numbers are is tested with the engine."""

import base64
import math
import struct

import openai
import pytest
from openai.types import embedding_create_params

from twinax.serving.http import fields

from .conftest import CONTEXT, MAX_WAITING, MODEL, Server

TEXT = "def f(x):"
WIDTH = 32


def embed(client, given=TEXT, **options) -> list[list[float]]:
    answer = client.embeddings.create(model=MODEL, input=given, **options)
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return [one.embedding for one in answer.data]


def close(found, want) -> None:
    assert len(found) == len(want)
    assert all(math.isclose(one, other, abs_tol=1e-5) for one, other in zip(found, want, strict=True))


def test_every_field_of_the_api_is_known_and_no_other():
    theirs = set(embedding_create_params.EmbeddingCreateParams.__annotations__)
    assert set(fields.EMBEDDINGS) == theirs | set(fields.EMBEDDING_EXTENSIONS)


def test_all_forms_of_an_input_mean_the_same(server: Server, client):
    [vector] = embed(client)  # the client asks for base64
    assert len(vector) == WIDTH
    assert math.hypot(*vector) == pytest.approx(1, abs=1e-6)
    ids = list(TEXT.encode())
    for given in (ids, [TEXT], [ids]):
        close(embed(client, given, encoding_format="float")[0], vector)
    raw = server.post("/v1/embeddings", {"model": MODEL, "input": TEXT, "encoding_format": "base64"}).json()
    close(struct.unpack(f"<{WIDTH}f", base64.b64decode(raw["data"][0]["embedding"])), vector)


def test_many_at_once_are_what_each_is_alone(server: Server, client):
    given = [f"{TEXT} return {n}" * (1 + n % 5) for n in range(3 * MAX_WAITING)]
    for kind in ("last", "mean"):
        body = {"pooling": kind}
        together = embed(client, given, extra_body=body)
        for n in (0, 7, 24, len(given) - 1):
            close(together[n], embed(client, given[n], extra_body=body)[0])
    answer = client.embeddings.create(model=MODEL, input=given, extra_body={"cache_salt": "new"})
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, given))
    server.wait_idle()


def test_pooling_length_and_dimensions(client):
    """The last token's hidden state is not the mean of all, and a part of a vector is its beginning, normalised."""
    [last], [mean] = embed(client), embed(client, extra_body={"pooling": "mean"})
    assert max(abs(one - other) for one, other in zip(last, mean, strict=True)) > 0.1
    [whole] = embed(client, extra_body={"normalize": False})
    close([number / math.hypot(*whole) for number in whole], last)
    [part] = embed(client, dimensions=5)
    close(part, [number / math.hypot(*whole[:5]) for number in whole[:5]])
    [raw] = embed(client, dimensions=5, extra_body={"normalize": False})
    close(raw, whole[:5])


def test_a_long_input_comes_in_chunks(client):
    long = "".join(chr(97 + n * n % 26) for n in range(CONTEXT - 1))
    [mean] = embed(client, long, extra_body={"pooling": "mean"})
    assert math.hypot(*mean) == pytest.approx(1, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="context holds") as caught:
        embed(client, ["a", long + "a"])
    assert (caught.value.param, caught.value.code) == ("input[1]", "context_length_exceeded")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], [999]]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": WIDTH + 1}, "dimensions"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_bad_fields(server: Server, change, param):
    response = server.post("/v1/embeddings", {"model": MODEL, "input": "a"} | change)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_scores_are_cosines(server: Server, client):
    one, *others = embed(client, [TEXT, "class A:", TEXT])
    want = [sum(a * b for a, b in zip(one, other, strict=True)) for other in others]

    def scores(**texts) -> list[float]:
        answer = server.post("/v1/score", {"model": MODEL, **texts}).json()
        assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
        return [entry["score"] for entry in answer["data"]]

    close(scores(text_1=TEXT, text_2=["class A:", TEXT]), want)
    close(scores(text_1=[TEXT, "class A:"], text_2=["class A:", "class A:"]), [want[0], 1])
    assert want[1] == pytest.approx(1, abs=1e-5) and want[0] < 0.999
    response = server.post("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "text_1")
