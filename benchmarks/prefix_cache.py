"""Tokens of prompts that the prefix cache saves on a trace of real traffic, of those that an endless one would, and of
those that the best possible one of its size would, which knows what comes.

The server's own scheduler runs, without a model: its decisions hang on no number that one would compute. The trace
gives for each request the blocks of 512 tokens that its prompt is made of (Mooncake: Qin et al. 2024,
arXiv:2407.00079); lengths are divided by `--scale`, and a block is a page. Requests come as quickly as they are taken.
With room in the host's memory (`--host-cache-bytes`), what comes back from there is saved as well.
"""

import heapq
import json
from collections import deque
from pathlib import Path
from typing import Any

from rich.progress import track

from . import report

BLOCK = 512
SIZES = (0.05, 0.125, 0.25, 0.5)
# Of the device, and beside it of the host, whose memory is the larger one where it is not the same.
HOSTS = ((0.05, 0.5), (0.125, 0.375), (0.25, 0.25), (0.25, 0.5))


def requests_of(trace: Path, scale: int, most: int | None) -> list[Any]:
    """Each prompt in tokens that are its blocks' numbers."""
    from twinax.serving.request import Request, SamplingParams

    found = []
    for number, line in enumerate(trace.read_text().splitlines()[:most]):
        one = json.loads(line)
        length = max(1, one["input_length"] // scale)
        tokens = [block for block in one["hash_ids"] for _ in range(BLOCK // scale)][:length]
        params = SamplingParams(max_tokens=max(1, one["output_length"] // scale))
        found.append(Request(str(number), tokens, params))
    return found


def saved(requests: list[Any], page_size: int, num_pages: int, policy: str, host_pages: int = 0) -> int:
    """Prompt tokens that requests found, all requests served in turn."""
    from twinax.serving.scheduler import Scheduler, SchedulerConfig

    longest = max(len(one.prompt_ids) + one.params.max_tokens for one in requests)
    scheduler = Scheduler(
        SchedulerConfig(
            max_running=16,
            page_size=page_size,
            num_pages=num_pages,
            max_model_len=longest + 1,
            chunk_tokens=512,
            max_waiting=16,
            prefix_cache=policy,
            host_pages=host_pages,
        )
    )
    first = {one.id: len(one.prompt_ids) for one in requests}
    found, queue = 0, iter(requests)
    waiting = next(queue, None)
    while waiting or scheduler.has_work:
        while waiting and len(scheduler.waiting) < 16:
            scheduler.add(waiting)
            waiting = next(queue, None)
        plan = scheduler.schedule()
        if plan is None:
            raise RuntimeError("The scheduler has work and plans none; that is a bug.")
        for sequence in plan.admitted:
            if first.pop(sequence.id, None):  # what a preempted request finds again is its own
                found += sequence.num_cached
        # Tokens that no other request has: only prompts are shared, as in the trace.
        sampled = {entry.sequence.id: -1 - int(entry.sequence.id) for entry in plan.entries if entry.is_last_chunk}
        for sequence in scheduler.commit(plan, sampled):
            if sequence.length_reached:
                scheduler.finish(sequence.id)
    return found


def optimum(requests: list[Any], page_size: int, num_pages: int) -> int:
    """Prompt tokens that no cache of so many pages can find more of, whatever goes first: the page that is asked for
    latest (Belady 1966), which is never one before another that goes on with it. Requests come one after another, and
    what they use while they run takes no room of the cache."""
    asked: list[list[int]] = []  # pages of each request, each the number of all tokens up to its end
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    coming: dict[int, deque[int]] = {}
    for at, one in enumerate(requests):
        tokens, before, pages = one.prompt_ids, -1, []
        for start in range(0, len(tokens) - page_size, page_size):  # but the last token, which is always computed
            before = numbers.setdefault((before, tuple(tokens[start : start + page_size])), len(numbers))
            pages.append(before)
            coming.setdefault(before, deque()).append(at)
        asked.append(pages)
    kept: dict[int, int] = {}  # when it is asked for again
    latest: list[tuple[int, int]] = []
    found = 0
    for pages in asked:
        for page in pages:
            found += kept.pop(page, None) is not None
            coming[page].popleft()
            if coming[page]:
                kept[page] = coming[page][0]
                heapq.heappush(latest, (-kept[page], page))
        while len(kept) > num_pages:
            again, page = heapq.heappop(latest)
            if kept.get(page) == -again:
                del kept[page]
    return found * page_size


def main() -> None:
    from twinax.serving import kv_policies

    parser = report.arguments(str(__doc__), peer=False)
    parser.add_argument("trace", type=Path, help="a Mooncake trace, JSON lines")
    parser.add_argument("--scale", type=int, default=64, help="by which lengths are divided; divides 512")
    parser.add_argument("--requests", type=int, help="the first so many only")
    options = parser.parse_args()
    if options.scale < 1 or BLOCK % options.scale:
        parser.error(f"--scale divides {BLOCK}; got {options.scale}")
    requests, page = requests_of(options.trace, options.scale, options.requests), BLOCK // options.scale
    asked = sum(len(one.prompt_ids) for one in requests)
    blocks = len({token for one in requests for token in one.prompt_ids})
    endless = sum(-(-(len(one.prompt_ids) + one.params.max_tokens) // page) for one in requests) + 16
    most = saved(requests, page, endless, "lru")
    rows = [report.Row("prefix_cache", "endless, of all prompt tokens", 100 * most / asked, None, "", "%", None)]
    largest = max(len(one.prompt_ids) + one.params.max_tokens for one in requests) // page + 2
    cases = [(size, 0.0, policy) for size in SIZES for policy in ("", *kv_policies.names())]
    cases += [(size, host, policy) for size, host in HOSTS for policy in kv_policies.names()]
    best = 0
    for size, host, policy in track(cases, "replaying the trace", transient=True):
        room, case = max(int(size * blocks), largest), f"room for {size:.1%} of {blocks:,} blocks, "
        if host:
            found = saved(requests, page, room, policy, int(host * blocks))
            case += f"in the host's memory for {host:.1%}, {policy}"
            rows.append(report.Row("prefix_cache", case, found, most, "an endless cache", "tokens", 0.9))
            continue
        if not policy:
            best = min(optimum(requests, page, room), most)
            rows.append(report.Row("prefix_cache", f"{case}optimum", best, most, "an endless cache", "tokens", None))
            continue
        found = saved(requests, page, room, policy)
        rows.append(report.Row("prefix_cache", case + policy, found, most, "an endless cache", "tokens", 0.9))
        rows.append(report.Row("prefix_cache", case + policy, found, best, "the optimum", "tokens", None))
    report.finish(rows, options.json)


if __name__ == "__main__":
    main()
