"""transformers' Llama on torch: `python torch_llama.py decode|serve|train|multiply QUESTION.json ANSWER.json`.

Needs no Twinax.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers


def decode(question: dict) -> dict:
    """Greedy `generate`, batches of `batch` in the order given, padded on the left; all run until the longest ends."""
    model = transformers.AutoModelForCausalLM.from_pretrained(question["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    requests, size = question["requests"], question["batch"]

    def run(batch: list[dict]) -> list[list[int]]:
        longest = max(len(one["prompt"]) for one in batch)
        ids = torch.tensor([[0] * (longest - len(one["prompt"])) + one["prompt"] for one in batch])
        mask = torch.tensor(
            [[0] * (longest - len(one["prompt"])) + [1] * len(one["prompt"]) for one in batch], dtype=torch.long
        )
        new = max(one["tokens"] for one in batch)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return [row[longest : longest + one["tokens"]].tolist() for row, one in zip(out, batch, strict=True)]

    run(requests[:size])  # warm-up
    start = time.perf_counter()
    tokens = [row for at in range(0, len(requests), size) for row in run(requests[at : at + size])]
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def serve(question: dict) -> dict:
    """transformers' continuous batching: all requests at once, `batch` of them running, `chunk` tokens a step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        question["model"], dtype=getattr(torch, question["dtype"]), attn_implementation="sdpa"
    ).eval()
    requests, page = question["requests"], 64
    longest = max(len(one["prompt"]) + one["tokens"] for one in requests)
    settings = transformers.ContinuousBatchingConfig(
        page_size=page,
        num_blocks=question["batch"] * (-(-longest // page) + 1),
        max_batch_tokens=question["chunk"],
        max_requests_per_batch=question["batch"],
    )
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(batch: list[dict]) -> tuple[list[list[int]], float]:
        found = {}
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(
                generation, continuous_batching_config=settings, persistent_manager=True
            ) as manager,
        ):
            start = time.perf_counter()
            ids = [manager.add_request(one["prompt"], max_new_tokens=one["tokens"], eos_token_id=-1) for one in batch]
            while len(found) < len(ids):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is not None:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' generation thread has ended")
            seconds = time.perf_counter() - start
        return [found[name] for name in ids], seconds

    run(requests[: question["batch"]])  # warm-up
    tokens, seconds = run(requests)
    return {"seconds": seconds, "tokens": tokens}


def train(question: dict) -> dict:
    """AdamW steps on given rows of tokens; the median of the steps after the first two."""
    config = transformers.AutoConfig.from_pretrained(question["model"])
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_pretrained(question["model"], config=config, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    seconds, losses = [], []
    for rows in question["batches"]:
        ids = torch.tensor(rows)
        start = time.perf_counter()
        # One token more than the row: what the loss of transformers shifts away, ours predicts.
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[2:]), "losses": losses}


def multiply(question: dict) -> dict:
    """Floating-point operations a second of the product of two large matrices, the best of three after one."""
    size, dtype = question["size"], getattr(torch, question["dtype"])
    a_NN = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a_NN, a_NN)
        seconds.append(time.perf_counter() - start)
    return {"flops": 2 * size**3 / min(seconds[1:])}


if __name__ == "__main__":
    job, question_file, answer_file = sys.argv[1:]
    jobs = {"decode": decode, "serve": serve, "train": train, "multiply": multiply}
    answer = jobs[job](json.loads(Path(question_file).read_text()))
    answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer["version"] = f"transformers {transformers.__version__}, torch {torch.__version__}"
    Path(answer_file).write_text(json.dumps(answer))
