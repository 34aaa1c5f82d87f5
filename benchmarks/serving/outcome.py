"""What became of one sending of a request."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """Seconds that the server foretold, and that it took, both from the moment of the telling."""

    estimated_s: float
    real_s: float


@dataclass
class Outcome:
    """Times in seconds; ``arrival_s``, ``sent_s`` and ``end_s`` from the start of the run, the others from the sending.

    ``gaps_s`` are the times between events with content, ``failure`` the cause if the request failed. A request that
    was sent ``attempt`` times before has an outcome for each time.
    """

    index: int
    label: str
    kind: str
    model: str
    arrival_s: float = 0.0
    sent_s: float = 0.0
    end_s: float = 0.0
    attempt: int = 0
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_outputs: int = 0
    failure: str | None = None
    detail: str = ""
    status: int | None = None
    retry_after_s: float | None = None
    start_estimate: Estimate | None = None
    end_estimate: Estimate | None = None

    @property
    def total_s(self) -> float:
        """End-to-end latency, from the sending."""
        return self.end_s - self.sent_s

    @property
    def refused(self) -> bool:
        return self.status == 429
