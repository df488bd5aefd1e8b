"""Poisson draws of examples or users, how a draw becomes batches, and what it costs.

In a Poisson draw each unit takes part independently with probability q. That, and nothing close to it, is what the
accountants count: batches of a fixed size, or a shuffled pass over the data, cost more privacy at the same noise.

One concept a file: `words` is the randomness, `secret` where its key comes from, `poisson` draws of examples, `capped`
draws of examples where users are protected, `users` draws of users, `index` and `columns` who owns which examples,
`batches` what fits into memory, `loader` and `collate` the loop. Knows no model.
"""

from fastclip.sampling.batches import PhysicalBatch, length_bucket, physical_batches
from fastclip.sampling.capped import ExamplePoissonSampler
from fastclip.sampling.index import UserIndex
from fastclip.sampling.loader import PoissonLoader
from fastclip.sampling.poisson import PoissonSampler, safe_max_batch
from fastclip.sampling.users import UserPoissonSampler

__all__ = [
    "ExamplePoissonSampler",
    "PhysicalBatch",
    "PoissonLoader",
    "PoissonSampler",
    "UserIndex",
    "UserPoissonSampler",
    "length_bucket",
    "physical_batches",
    "safe_max_batch",
]
