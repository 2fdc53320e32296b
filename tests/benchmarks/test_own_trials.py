"""What recommend says of a study that the sampler itself has made, most of it near the best."""

from __future__ import annotations

import numpy as np
from noisy_quadratic import surfaces
from sampler import own_trials


def test_intervals_hold_the_best_learning_rates_of_batch_sizes_that_were_hardly_tried() -> None:
    answers = [answer for surface in list(surfaces())[::2] for answer in own_trials(surface, 1)]
    close, covered = np.mean([answer[1:] for answer in answers], axis=0)
    assert len(answers) > 40
    assert close > 0.5
    assert covered > 0.8
