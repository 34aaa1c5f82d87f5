"""How many seconds of device time a job will take, learnt per group from the jobs that it ran.

Model: seconds = steps * (a + b * work) + c * work, where work = megapixels * frames * outputs * guidance branches.
a is the fixed price of a step, b that of its pixels, c that of decoding. Fitted by recursive least squares with
forgetting (Haykin, Adaptive Filter Theory, ch. 10), of errors relative to what a job took: small jobs count as much as
large ones, and one that was held up, by the compiler say, counts for little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from omni_ray.messages import Job

FORGETTING = 0.98
PRIOR = (0.01, 0.1, 0.1)
PRIOR_VARIANCE = 100.0
SHORTEST_S = 1e-3

Vector = npt.NDArray[np.float64]


class CostModel:
    """Estimates device seconds. Starts from a prior and follows what :meth:`learn` is told."""

    def __init__(self) -> None:
        self._weights: Vector = np.array(PRIOR)
        self._covariance: Vector = np.eye(3) * PRIOR_VARIANCE
        self.num_learnt = 0

    def estimate_s(self, job: Job) -> float:
        """Device seconds of the whole job, never less than a millisecond."""
        return max(float(self._weights @ features(job)), SHORTEST_S)

    def learn(self, job: Job, device_s: float) -> None:
        """Take in a finished job that used ``device_s`` seconds of device time."""
        x = features(job) / max(device_s, SHORTEST_S)
        gain = self._covariance @ x / (FORGETTING + x @ self._covariance @ x)
        self._weights = np.maximum(self._weights + gain * (1.0 - self._weights @ x), 0.0)
        self._covariance = (self._covariance - np.outer(gain, x @ self._covariance)) / FORGETTING
        self.num_learnt += 1


def features(job: Job) -> Vector:
    """``[steps, steps * work, work]`` of a job."""
    params = job.params
    steps = float(params.get("num_inference_steps", 1))
    megapixels = params.get("height", 1024) * params.get("width", 1024) / 1e6
    branches = 2 if params.get("negative_prompt") or params.get("true_cfg_scale", 1) > 1 else 1
    work = megapixels * params.get("num_frames", 1) * job.num_outputs * branches
    return np.array([steps, steps * work, work])
