"""What the tests of models share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Of torch, which is fastest with one at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
