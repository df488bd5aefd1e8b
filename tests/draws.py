"""What the tests of the samplers share."""

import numpy as np
import torch
from scipy import stats

# Two-sided p-values below this fail; together the statistical tests here fail a right sampler once in ten thousand runs.
RARE = 1e-6


def presence(sampler):
    """[steps, num_units] of 0 and 1."""
    present = np.zeros((sampler.steps, sampler.num_units))
    for step, drawn in enumerate(sampler):
        present[step, drawn] = 1
    return present


def p_value(z):
    return 2 * stats.norm.sf(np.abs(z))


class Numbers:
    """Example i is a dict of what text models take."""

    def __init__(self, size=20):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {
            "input_ids": torch.full((6,), index),
            "mask": torch.ones(6, dtype=torch.bool),
            "weight": index / 2,
            "name": f"example {index}",
        }
