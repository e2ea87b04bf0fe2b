"""/metrics: the names that dashboards know, with numbers that follow from what was asked."""

from pathlib import Path

from twinax.serving import wire
from twinax.serving.http.metrics import Metrics

from .conftest import MODEL, Server

DASHBOARD = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_prompt_tokens_sum",
    "vllm:request_generation_tokens_sum",
    "twinax_pages_copied_out_total",
    "twinax_pages_copied_back_total",
    "twinax_engine_steps_total",
    "twinax_engine_host_seconds_total",
    "twinax_engine_restarts_total",
    "twinax_replayed_requests_total",
    "twinax_compiles_after_warmup_total",
]


def test_every_series_is_there_from_the_start(server: Server):
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert set(DASHBOARD) <= set(server.metrics())
    for reason in ("stop", "length", "abort", "error"):
        assert server.finished(reason) >= 0


def test_counts_follow_from_the_requests(server: Server, client):
    server.wait_idle()
    before, finished = server.metrics(), server.finished("length")
    client.completions.create(model=MODEL, prompt="12345", n=2, max_tokens=7, extra_body={"ignore_eos": True})
    after = server.metrics()
    difference = {name: after[name] - before[name] for name in DASHBOARD}
    assert difference["vllm:prompt_tokens_total"] == 10
    assert difference["vllm:generation_tokens_total"] == 14
    assert difference["vllm:time_to_first_token_seconds_count"] == 2
    assert difference["vllm:inter_token_latency_seconds_count"] == 12
    assert difference["vllm:e2e_request_latency_seconds_count"] == 2
    assert difference["vllm:request_prompt_tokens_sum"] == 10
    assert difference["vllm:request_generation_tokens_sum"] == 14
    assert difference["twinax_engine_steps_total"] >= 7
    assert difference["twinax_engine_host_seconds_total"] > 0
    assert server.finished("length") == finished + 2


def test_what_is_said_of_pages_with_the_host():
    metrics = Metrics()
    metrics.set_model(MODEL)
    metrics.stats = wire.Stats(host_pages_used=2, host_pages_total=8, pages_copied_out=9, pages_copied_back=7)
    lines = [line.split() for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    found = {name.partition("{")[0]: float(value) for name, value in lines}
    assert found["vllm:cpu_cache_usage_perc"] == 0.25
    counts = [found[f"twinax_{name}_total"] for name in ("pages_copied_out", "pages_copied_back")]
    assert counts == [9, 7]


def test_an_idle_engine_sleeps(server: Server):
    """With nothing to do its main thread is not woken once, neither by a loop nor by a timer."""
    server.wait_idle()
    pid = server.engine_pid()

    def wakes() -> list[str]:
        status = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
        return [line for line in status if "ctxt_switches" in line]

    while "State:\tS" not in Path(f"/proc/{pid}/task/{pid}/status").read_text():
        assert server.get("/health").status_code == 200
    before, steps = wakes(), server.metrics()["twinax_engine_steps_total"]
    for _ in range(200):
        server.get("/health")
    assert server.metrics()["twinax_engine_steps_total"] == steps
    assert wakes() == before
