"""What people see: the display, the curve, the numbers beside them."""

import io
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from twinax.layers.mixer_config import Mamba2Config
from twinax.models.config import DecoderConfig, LayerKind
from twinax.models.decoder import param_shapes
from twinax.train import display as display_module
from twinax.train.curve import draw_curve, smoothed, thinned, ticks
from twinax.train.display import Display, clock
from twinax.train.flops import flops_per_token, peak_flops
from twinax.train.recipe import ModelConfig

VALUES = {"loss": 2.0, "lr": 1e-3, "tokens_per_second": 12345.6, "mfu": 0.31, "seconds_left": 75.0}


def show(steps, interval, monkeypatch, *, terminal=False, enabled=True):
    monkeypatch.setattr(display_module, "INTERVAL", interval)
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, quiet=not enabled)
    with Display(5, enabled=enabled, console=console) as display:
        for step in steps:
            display.update(step, VALUES)
        display.update(steps[-1], {"eval_loss": 2.5})
        display.message("saved [to] here")
    return out.getvalue()


def test_without_a_terminal_plain_lines_come_at_intervals(monkeypatch):
    lines = show(range(1, 6), 3600.0, monkeypatch).splitlines()
    assert lines == [
        "step 1/5  loss 2.0000  lr 1.00e-03  tokens/s 12,346  MFU 31.0%  left 1:15",
        "step 5/5  loss 2.0000  lr 1.00e-03  tokens/s 12,346  MFU 31.0%  left 1:15",
        "saved [to] here",
    ]
    assert len(show(range(1, 6), 0.0, monkeypatch).splitlines()) == 6


def test_a_terminal_shows_progress_and_every_number(monkeypatch):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", show([1, 2], 0.0, monkeypatch, terminal=True))
    for part in ("40%", "step 2/5", "loss 2.0000", "eval 2.5000", "tokens/s 12,346", "MFU 31.0%", "left 1:15", "[to]"):
        assert part in text


def test_disabled_shows_nothing(monkeypatch):
    assert show([1, 5], 0.0, monkeypatch, enabled=False) == ""


def test_clock():
    assert [clock(s) for s in (7.4, 750, 10921)] == ["0:07", "12:30", "3:02:01"]


def test_the_curve_is_svg_with_its_lines_and_labels():
    points = [(step, 5.0 - step / 100) for step in range(1, 301)]
    root = ElementTree.fromstring(draw_curve(points, [(100, 4.5), (300, 2.5)], 3.317, "Loss of <run> & co"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in (
        "Loss of <run> & co",
        "step",
        "loss, nats per token",
        "unigram entropy 3.317",
        "held out 2.500",
        "300",
    ):
        assert text in texts
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 3
    corners = [tuple(map(float, pair.split(","))) for line in lines for pair in line.attrib["points"].split()]
    assert all(70 < x < 940 and 60 < y < 490 for x, y in corners)
    first, last = corners[0], corners[299]
    assert first[1] < last[1]  # down the page, as the loss falls


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, float("inf")), (2, 3.0)]])
def test_a_curve_of_next_to_nothing_is_still_a_picture(points):
    assert "nan" not in ElementTree.tostring(ElementTree.fromstring(draw_curve(points))).decode()


def test_ticks_are_round_and_span_the_values():
    assert ticks(1.2, 5.6, 7) == [1, 2, 3, 4, 5, 6]
    assert ticks(0, 300, 8) == [0, 50, 100, 150, 200, 250, 300]
    assert ticks(2.0, 2.0, 7)[0] <= 2.0 < ticks(2.0, 2.0, 7)[-1]


def test_smoothing_has_no_lag_and_thinning_keeps_the_ends():
    line = [(step, 2.0 * step) for step in range(1000)]
    assert smoothed(line)[500] == pytest.approx((500, 1000.0))
    kept = thinned([(step, 0.0) for step in range(5001)])
    assert (kept[0][0], kept[-1][0]) == (0, 5000)
    assert len(kept) < 1000


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_six_for_a_weight_and_the_causal_half_of_the_attention(tied):
    config = ModelConfig(hidden_size=64, intermediate_size=128, num_layers=3, tie_embeddings=tied).decoder(100, 32)
    sizes = {name: shape.size for name, shape in param_shapes(config).items()}
    multiplied = sum(sizes.values()) - (0 if tied else sizes["embed.weight"])
    # Scores and values: 2 products of 2 * T * heads * head_dim FLOPs, three times with the backward, half by causality.
    attention = 3 * 2 * 2 * 32 * 64 / 2 * 3
    assert flops_per_token(config, 32) == 6 * multiplied + attention


def test_a_token_pays_for_the_experts_it_takes():
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_layers": 3}
    dense = ModelConfig(**{**sizes, "intermediate_size": 3 * 32}).decoder(100, 32)
    mixture = ModelConfig(**sizes, experts=16, shared_experts=1).decoder(100, 32)
    routers = 3 * 16 * 64
    assert flops_per_token(mixture, 32) == flops_per_token(dense, 32) + 6 * routers


def test_a_state_is_updated_and_read_once_a_token():
    config = DecoderConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=0,
        num_layers=3,
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        max_position_embeddings=32,
        mamba2=Mamba2Config(num_heads=4, head_dim=32, state_size=16),
        pattern=(LayerKind(rope=None, mixer="mamba2", feed_forward=None),),
    )
    multiplied = sum(shape.size for name, shape in param_shapes(config).items() if name != "embed.weight")
    # A key times a value and a query times the state: 2 products of 2 FLOPs a number, three times with the backward.
    states = 3 * 2 * 2 * (4 * 32 * 16) * 3
    assert flops_per_token(config, 32) == flops_per_token(config, 8) == 6 * multiplied + states


class FakeDevice:
    platform, device_kind = "tpu", "TPU v5 lite"


def test_peaks_are_from_the_table_or_measured():
    assert peak_flops([FakeDevice()] * 4, jnp.bfloat16).flops == 4 * 197e12  # type: ignore[list-item]
    unknown = FakeDevice()
    unknown.device_kind = "TPU v99"
    assert peak_flops([unknown], jnp.bfloat16).flops is None  # type: ignore[list-item]
    measured = peak_flops(jax.devices()[:1], jnp.float32)
    assert measured.source == "measured matmul peak"
    assert measured.flops is not None
    assert measured.flops > 1e8
