"""Draws a token for each row of given logits as transformers' `generate` does; timed.

    python torch_sampling.py QUESTION ANSWER

JSON files. The question: `logits`, a .npy file [R, V]; `settings`, of each case temperature, top_k and top_p; `rounds`.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def main() -> None:
    question = json.loads(Path(sys.argv[1]).read_text())
    logits_RV = torch.from_numpy(np.load(question["logits"]))
    torch.manual_seed(0)
    no_tokens = torch.zeros((len(logits_RV), 0), dtype=torch.long)
    seconds = []
    for one in question["settings"]:
        warpers = LogitsProcessorList()
        if one["temperature"] > 0:
            warpers.append(TemperatureLogitsWarper(one["temperature"]))
        if one["top_k"] > 0:
            warpers.append(TopKLogitsWarper(one["top_k"]))
        if one["top_p"] < 1:
            warpers.append(TopPLogitsWarper(one["top_p"]))
        taken = []
        for _ in range(question["rounds"]):
            start = time.perf_counter()
            scores = warpers(no_tokens, logits_RV)  # type: ignore[arg-type]
            if one["temperature"] > 0:
                torch.multinomial(torch.softmax(scores, -1), 1)
            else:
                torch.argmax(scores, -1)
            taken.append(time.perf_counter() - start)
        seconds.append(sorted(taken)[len(taken) // 2])
    answer = {"seconds": seconds, "version": f"transformers {transformers.__version__}"}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
