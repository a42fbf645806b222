"""What the tests of models share."""

import pytest


@pytest.fixture
def one_thread():
    """Of torch, which is fastest with one at these sizes."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made_model(tmp_path_factory):
    """A function from a family's name, and what differs from its config, to its tiny model's folder and cases of long prompts; torch has one thread."""
    import torch
    from families import clear_cases, make_model, save
    known = {}

    def make(name, **changes):
        if name not in known:
            model = make_model(name, **changes)
            known[name] = save(model, tmp_path_factory.mktemp(name)), clear_cases(model, lengths=(200, 90, 30), count=64)
        return known[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(threads)
