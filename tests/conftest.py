from typing import Any

import pytest
import torch as th


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks are fastest on one thread, and sums are then the same on every machine."""
    th.set_num_threads(1)


@pytest.fixture
def float64_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SB3 casts observations to float32 before the networks see them: leave them as they are."""

    def keep(obs: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        return obs

    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", keep)
    monkeypatch.setattr("sb3_off2on.policies.preprocess_obs", keep)
