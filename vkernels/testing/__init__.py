"""Shared by tests, benchmarks and users: one tolerance policy, poisoned and guarded memory, strided views."""

from vkernels.testing.memory import guarded_memory, poisoned_memory, strided
from vkernels.testing.numerics import assert_gradient, assert_within_budget, rounding_band
from vkernels.testing.plans import plan_to_dense

__all__ = [
    "assert_gradient",
    "assert_within_budget",
    "guarded_memory",
    "plan_to_dense",
    "poisoned_memory",
    "rounding_band",
    "strided",
]
