"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Small tensors: threads cost more than they bring, and one file alone must give what the whole suite gives.
torch.set_num_threads(1)

# pytest --hypothesis-profile=deep; Hypothesis itself has "ci", which it takes by itself where CI is set.
hypothesis.settings.register_profile("deep", max_examples=10_000, deadline=None)


@pytest.fixture
def random_draws() -> Iterator[None]:
    """Hypothesis's own default, where CI would have it draw the same each time and keep nothing."""
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.load_profile("default")
    yield
    hypothesis.settings.load_profile(before)
