"""Deterministic seeds for every test, and the options of the suite."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("vkernels", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("vkernels")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
