"""A real server, engine process and all, for a tiny random Llama with the byte tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import safetensors.numpy

MODEL = "tiny"
CONTEXT = 2048
MAX_RUNNING = 4
MAX_WAITING = 12
CHAT_TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}, called by <tool_call></tool_call>\n{% endif %}"
    "{% for message in messages %}{% if message.content == 'forbidden' %}{{ raise_exception('not that word') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ '' + call.function.arguments if message.content == 'as text' else call.function | tojson }}</tool_call>"
    "{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# What the command line does with `serve`, without the command line.
RUNNER = """
import json, sys
from twinax.serving.http.server import ServeConfig, serve
try:
    serve(ServeConfig(**json.loads(sys.argv[1])))
except (ValueError, OSError) as error:
    sys.exit(f"twinax: error: {error}")
"""


@dataclass
class Server:
    """A server in a process of its own. `lines` collects what it prints."""

    process: subprocess.Popen[str]
    lines: list[str]
    reader: threading.Thread
    url: str = ""
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def client(self, **options: Any) -> openai.OpenAI:
        defaults = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(**(defaults | options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(self.url + path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **options)

    def post_bytes(self, path: str, content: Any, content_type: str = "application/json") -> httpx.Response:
        return self.http.post(self.url + path, content=content, headers={"content-type": content_type})

    def metrics(self) -> dict[str, float]:
        """Every sample that has no other labels than the model's, by name."""
        text = self.get("/metrics").text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        suffix = f'{{engine="0",model_name="{MODEL}"}}'
        return {name.removesuffix(suffix): float(value) for name, value in samples if name.endswith(suffix)}

    def finished(self, reason: str) -> float:
        """How many requests have ended for a reason."""
        name = f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="{MODEL}"}} '
        text = self.get("/metrics").text
        return next(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))

    def wait_for(self, **expected: float) -> None:
        """Until the metrics vllm:<name> have these values. Says what they are when that takes too long."""
        deadline = time.monotonic() + 60
        while True:
            metrics = self.metrics()
            found = {name: metrics[f"vllm:{name}"] for name in expected}
            if found == expected:
                return
            assert time.monotonic() < deadline, found
            time.sleep(0.02)

    def wait_idle(self) -> None:
        """Until nothing runs, nothing waits and no page of the cache is in use."""
        self.wait_for(num_requests_running=0, num_requests_waiting=0, kv_cache_usage_perc=0)

    def engine_pid(self) -> int:
        """The engine among the processes that the server has started: chat templates have one too."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ours = b"twinax.serving.engine_process"
        [pid] = [int(child) for child in children if ours in Path(f"/proc/{child}/cmdline").read_bytes()]
        return pid

    def stop(self) -> int:
        """Terminate it and return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()

    def output(self) -> str:
        """All it printed; to be called once it has ended."""
        self.reader.join(timeout=30)
        return "\n".join(self.lines)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from twinax.checkpoints.tokenizer import Tokenizer
    from twinax.layers.rope_config import RopeConfig
    from twinax.models import families
    from twinax.models.config import DecoderConfig
    from twinax.models.decoder import init_params

    config = DecoderConfig(
        family="llama",
        vocab_size=Tokenizer.bytes().vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope=RopeConfig(theta=10000.0),
        norm_eps=1e-5,
        tie_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=CONTEXT,
    )
    family, params = families.load("llama"), init_params(config, 0)
    # Larger logits than an untrained model has, so that likely and unlikely tokens differ.
    params["unembed.weight"] = params["unembed.weight"] * 8
    tensors = {}
    for entry in family.tensor_table(config):
        array = np.asarray(params[entry.name])
        tensors[entry.hf_name] = np.ascontiguousarray(array[entry.index])
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.to_hf(config)))
    Tokenizer.bytes().save(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def start_server(
    model_folder: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Server]:
    """Starts a server; `ready=False` returns at once, else when it takes requests."""
    temporary = tmp_path_factory.mktemp("t")  # servers that are killed leave their folders behind

    def start(*, ready: bool = True, environment: dict[str, str] | None = None, **changes: Any) -> Server:
        config = {
            "model": str(model_folder),
            "port": 0,
            "max_running": MAX_RUNNING,
            "max_waiting": MAX_WAITING,
            "page_size": 16,
            "chunk_tokens": 32,
            "compile_cache": str(repository / ".cache" / "serving"),
        }
        config = {name: value for name, value in (config | changes).items() if value is not None}
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, json.dumps(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "TMPDIR": str(temporary)} | (environment or {}),
        )
        lines: list[str] = []
        found = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if line.startswith("twinax: ready at "):
                    found.set()
            found.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        server = Server(process, lines, reader)
        if ready:
            assert found.wait(timeout=600), "not ready:\n" + "\n".join(lines)
            line = next((line for line in lines if line.startswith("twinax: ready at ")), None)
            assert line is not None, "not ready:\n" + "\n".join(lines)
            server.url = line.split()[3].removesuffix("/v1")
        return server

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share; they leave it idle."""
    server = start_server(files=str(tmp_path_factory.mktemp("kept")))
    yield server
    metrics = server.metrics()
    assert server.stop() == 0, server.output()
    assert metrics["twinax_compiles_after_warmup_total"] == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
