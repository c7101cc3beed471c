import pytest
import torch as th


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are fastest on one thread, and sums are then the same on every machine."""
    th.set_num_threads(1)
