"""Stop strings never leak, and nothing else is lost: a property over random texts and cuts."""

from hypothesis import given
from hypothesis import strategies as st

from twinax.checkpoints.tokenizer import Tokenizer
from twinax.serving.detokenizer import Detokenizer
from twinax.serving.request import Output, SamplingParams

BYTES = Tokenizer.bytes()


def run(text: str, stop: list[str]) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(BYTES, SamplingParams(stop=stop))
    pieces = []
    for token in text.encode():
        piece, found = detokenizer.push(token)
        pieces.append(piece)
        if found:
            return pieces, found
    piece, found = detokenizer.finish()
    return [*pieces, piece], found


@given(st.text(alphabet="abé"), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_text_is_given_up_to_the_first_stop_string(text, stop):
    pieces, found = run(text, stop)
    ends = {text.index(one) + len(one): one for one in stop if one in text}
    if not ends:
        assert ("".join(pieces), found) == (text, None)
        return
    end = min(ends)  # the stop that is complete first ends the request
    assert found in [one for one in stop if text[:end].endswith(one)]
    cut = min(text.index(one) for one in stop if one in text[:end])
    assert "".join(pieces) == text[:cut]
    assert not any(one in "".join(pieces) for one in stop)


def test_text_that_may_begin_a_stop_string_is_held_back_and_then_given():
    pieces, found = run("one STO two STOP three", ["STOP"])
    assert found == "STOP"
    assert "".join(pieces) == "one STO two "
    assert pieces[4:7] == ["", "", ""]  # S, T, O wait


def test_a_character_cut_by_the_end_is_not_lost():
    detokenizer = Detokenizer(BYTES, SamplingParams())
    assert detokenizer.push("é".encode()[0]) == ("", None)
    assert detokenizer.finish() == ("\ufffd", None)


@given(
    st.text(alphabet="abé", max_size=12),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 3), max_size=12),
    st.sampled_from(["length", "end of sequence", "cut"]),
)
def test_outputs_get_the_text_of_their_tokens_and_end_at_a_stop_string(text, stop, sizes, ends):
    pieces, found = run(text, stop)
    detokenizer, given_out = Detokenizer(BYTES, SamplingParams(stop=stop)), []
    tokens, sizes = list(text.encode()), iter(sizes)
    while True:
        count = next(sizes, 2)
        output, tokens = Output("one", token_ids=tokens[:count]), tokens[count:]
        if not tokens and ends != "cut":
            output.finish_reason = "length" if ends == "length" else "stop"
            if ends != "length":
                output.token_ids.append(BYTES.eos_ids[0] if BYTES.eos_ids else 0)
                output.stop_token = True
        known = output.finish_reason is None
        assert detokenizer.fill(output) == (known and output.finish_reason is not None)
        given_out.append(output.text)
        if output.finish_reason or not tokens:
            break
    if ends != "cut" or (found in stop and output.finish_reason):
        assert "".join(given_out) == "".join(pieces)
        assert output.stop_reason == found
        assert output.finish_reason == ("stop" if found or ends != "length" else "length")
    else:
        assert "".join(pieces).startswith("".join(given_out))
