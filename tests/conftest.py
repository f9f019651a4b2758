"""What all tests share."""

from __future__ import annotations

import hypothesis
import torch

# Small tensors: threads cost more than they bring, and one file alone must give what the whole suite gives.
torch.set_num_threads(1)

# pytest --hypothesis-profile=deep; Hypothesis itself has "ci", which it takes by itself where CI is set.
hypothesis.settings.register_profile("deep", max_examples=10_000, deadline=None)
