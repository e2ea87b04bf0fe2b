"""How many tokens a request will generate, guessed from those that have finished: a mean over those that are alike."""

from __future__ import annotations

from .request import Request

LATEST = 64  # requests of a kind that count; an older one counts less and less
MOST_KINDS = 4096
Kind = tuple[str | None, int | None]


class OutputLengths:
    """Kinds are a tenant and the prompt's length, to a factor of two; or, where too few of that kind have finished,
    either of the two; or all requests."""

    def __init__(self) -> None:
        self._seen: dict[Kind, tuple[int, float]] = {}  # kind -> how many, their mean

    def learn(self, request: Request, length: int) -> None:
        """`request` has finished with so many tokens."""
        for kind in self._kinds(request):
            count, mean = self._seen.pop(kind, (0, 0.0))
            count = min(count + 1, LATEST)
            self._seen[kind] = (count, mean + (length - mean) / count)
        while len(self._seen) > MOST_KINDS:  # what was not renewed for the longest time
            del self._seen[next(iter(self._seen))]

    def predict(self, request: Request, most: int) -> float:
        """From 1 to `most`, which it is as long as nothing was seen."""
        for kind in self._kinds(request):
            count, mean = self._seen.get(kind, (0, 0.0))
            if count >= 4 or (count and kind == (None, None)):
                return min(max(mean, 1.0), most)
        return most

    @staticmethod
    def _kinds(request: Request) -> tuple[Kind, ...]:
        """The closest first."""
        size = len(request.prompt_ids).bit_length()
        return (request.tenant, size), (None, size), (request.tenant, None), (None, None)
