"""The file of API keys: what is read, what is refused without showing a key, and whose a request is."""

import pytest

from twinax.serving.http.config import ServeConfig
from twinax.serving.http.errors import ApiError
from twinax.serving.http.keys import ApiKeys, read_keys

FILE = "# keys\n\nann sk-1\n  bob\tsk-2  \n"


def written(tmp_path, text: str):
    path = tmp_path / "keys"
    path.write_text(text)
    return path


def test_a_line_a_tenant(tmp_path):
    assert read_keys(written(tmp_path, FILE)) == {"ann": "sk-1", "bob": "sk-2"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must have a line `NAME KEY`"),
        ("# ann sk-1", "must have a line `NAME KEY`"),
        ("ann", "line 1 of .* got 1 words"),
        ("a sk-0\nann sk-1 more", "line 2 of .* got 3 words"),
        ("../ann sk-1", "a name has at most 64 letters"),
        ("a" * 65 + " sk-1", "a name has at most 64 letters"),
        ("ann sk-ключ", "printable ASCII"),
        ("ann sk-1\nann sk-2", "'ann' is there twice"),
        ("ann sk-1\nbob sk-1", "another tenant's too"),
    ],
)
def test_bad_files_are_refused_and_no_key_is_shown(tmp_path, text, says):
    with pytest.raises(ValueError, match=says) as caught:
        ServeConfig(model="m", api_keys=str(written(tmp_path, text)))
    assert "sk-" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "keys").write_bytes(b"ann sk-\xff")
    with pytest.raises(ValueError, match=r"keys must be text in UTF-8, and is not at byte 7"):
        read_keys(tmp_path / "keys")


def test_the_servers_own_key_stands_beside_them(tmp_path, monkeypatch):
    path = str(written(tmp_path, FILE))
    monkeypatch.delenv("TWINAX_API_KEY", raising=False)
    assert ServeConfig(model="m").tenants() == {}
    assert ServeConfig(model="m", api_keys=path, api_key="own").tenants() == {"": "own", "ann": "sk-1", "bob": "sk-2"}
    monkeypatch.setenv("TWINAX_API_KEY", "sk-2")
    with pytest.raises(ValueError, match="must differ from those in"):
        ServeConfig(model="m", api_keys=path)
    with pytest.raises(ValueError, match=r"api_keys can't be read from .*: No such file"):
        ServeConfig(model="m", api_keys="/nowhere/keys", api_key="own")


def test_whose_key_it_is():
    keys = ApiKeys({"ann": "sk-1", "bob": "sk-2"})
    assert [keys.tenant(b"Bearer sk-1"), keys.tenant(b"bearer  sk-2 ")] == ["ann", "bob"]
    for header in (b"", b"Bearer", b"Bearer sk-3", b"Basic sk-1", b"sk-1", b"Bearer sk-1 sk-1"):
        with pytest.raises(ApiError) as caught:
            keys.tenant(header)
        assert caught.value.status == 401
    assert ApiKeys({}).tenant(b"Bearer anything") == ""
