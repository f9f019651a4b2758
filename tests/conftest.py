"""What all tests share."""

from __future__ import annotations

import torch

# Small tensors: threads cost more than they bring, and one file alone must give what the whole suite gives.
torch.set_num_threads(1)
