"""Block sizes from files: what a kernel is answered, by key, chip and within `using`."""

import importlib
import json

import pytest

from twinax.pallas_kernels import tuned
from twinax.pallas_kernels.chips import TPUS


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "file_of", lambda operation, chip: tmp_path / operation / f"{chip}.json")
    tuned._read.cache_clear()
    yield tmp_path / "flash_attention" / "v6e.json"
    tuned._read.cache_clear()


def test_the_answer_is_that_of_the_chip_and_key(file):
    file.parent.mkdir()
    file.write_text(json.dumps({"D=128 causal=true": {"blocks": {"rows": 512}, "microseconds": 1.0}}))
    key = {"causal": True, "D": 128}
    assert tuned.best("flash_attention", "v6e", key) == {"rows": 512}
    assert tuned.best("flash_attention", "v6e", {**key, "causal": False}) is None
    assert tuned.best("flash_attention", "v5p", key) is None
    assert tuned.best("other", "v6e", key) is None
    assert tuned.best("flash_attention", None, key) is None


def test_an_answer_is_the_callers_to_change(file):
    file.parent.mkdir()
    file.write_text(json.dumps({"D=128": {"blocks": {"rows": 512}}}))
    tuned.best("flash_attention", "v6e", {"D": 128})["rows"] = 1
    assert tuned.best("flash_attention", "v6e", {"D": 128}) == {"rows": 512}


def test_candidates_take_the_place_of_files_and_keys_are_heard_of(file):
    with tuned.asked() as asked, tuned.using("a", {"D": 64}, {"rows": 1}), tuned.using("a", {"D": 128}, {"rows": 2}):
        assert tuned.best("a", "v6e", {"D": 64}) == {"rows": 1}
        assert tuned.best("a", None, {"D": 128}) == {"rows": 2}
        assert tuned.best("b", "v6e", {"D": 64}) is None
        tuned.best("a", "v6e", {"D": 64})
    assert asked == [("a", {"D": 64}), ("a", {"D": 128}), ("b", {"D": 64})]
    assert tuned.best("a", "v6e", {"D": 64}) is None


def test_a_name_tells_keys_apart():
    assert tuned.name_of({"b": True, "a": 1}) == tuned.name_of({"a": 1, "b": True}) == "a=1 b=true"
    assert tuned.name_of({"a": 1}) != tuned.name_of({"a": True})


def test_every_file_in_the_package_is_asked_for_and_chosen_from():
    """Its keys are names of keys, its blocks such as the operation offers for them."""
    for file in tuned.file_of("x", "y").parent.parent.parent.glob("*/tuned/*.json"):
        operation, chip = file.parent.parent.name, file.stem
        space = importlib.import_module(f"twinax.pallas_kernels.{operation}.tpu").tuning_space
        assert chip in TPUS.values()
        for name, entry in json.loads(file.read_text()).items():
            key = {part: _value(text) for part, text in (one.split("=") for one in name.split())}
            offered = json.loads(json.dumps(space(chip, key)))
            assert entry["blocks"] in offered and entry["microseconds"] < entry["closed_form"], (file, name)
            assert tuned.best(operation, chip, key) == entry["blocks"]


def _value(text):
    return text == "true" if text in ("true", "false") else int(text) if text.isdigit() else text
