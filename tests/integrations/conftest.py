# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the integration tests."""

import pytest
import torch


@pytest.fixture
def random() -> torch.Generator:
    """A seeded generator: the same numbers in every run and in any order of the tests."""
    return torch.Generator().manual_seed(20250121)
