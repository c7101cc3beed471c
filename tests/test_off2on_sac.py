"""The two phases against SB3's SAC, against single agents, and against NumPy."""

from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import ACTION_DIM, OBS_DIM, make_dataset, make_model
from plain_cql import PlainCQL
from stable_baselines3 import SAC

from sb3_off2on.buffers import BalancedReplayBufferSamples


def double_batch(batch: Any) -> Any:
    return batch._replace(**{name: value.double() for name, value in batch._asdict().items() if isinstance(value, th.Tensor)})


def random_batch(n: int, seed: int) -> BalancedReplayBufferSamples:
    generator = th.Generator().manual_seed(seed)

    def uniform(*shape: int) -> th.Tensor:
        return 2 * th.rand(*shape, generator=generator, dtype=th.float64) - 1

    return BalancedReplayBufferSamples(
        observations=uniform(n, OBS_DIM),
        actions=uniform(n, ACTION_DIM),
        next_observations=uniform(n, OBS_DIM),
        dones=(uniform(n, 1) > 0.8).double(),
        rewards=uniform(n, 1),
        indices=np.arange(n),
    )


@pytest.fixture
def float64_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SB3 casts observations to float32 before the networks see them: leave them as they are."""

    def keep(obs: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        return obs

    monkeypatch.setattr("stable_baselines3.common.policies.preprocess_obs", keep)
    monkeypatch.setattr("sb3_off2on.policies.preprocess_obs", keep)


class TestAgainstSAC:
    @pytest.mark.parametrize("ent_coef", ["auto", "auto_0.3", 0.2])
    def test_one_member_is_sac(self, float64_preprocessing: None, ent_coef: str | float) -> None:
        """One member, uniform replay, no dataset: same weights, batch and noise give the same update, in float64."""
        sac = make_model(SAC, double=True, ent_coef=ent_coef)
        ours = make_model(
            double=True, ent_coef=ent_coef, policy_kwargs={"ensemble_size": 1}, replay_buffer_kwargs={"scheme": "uniform"}
        )
        ours.policy.set_member(0, {name: getattr(sac, name).state_dict() for name in ("actor", "critic", "critic_target")})
        for step in range(3):
            batch = random_batch(32, seed=step)
            for model in (sac, ours):
                model.replay_buffer.sample = lambda *args, batch=batch, **kwargs: batch
                # Not reset_optimizers(): the moments of the steps before count
                th.manual_seed(step)
                model.train(gradient_steps=1, batch_size=32)
        member = ours.policy.get_member(0)
        for network in ("actor", "critic", "critic_target"):
            for name, value in getattr(sac, network).state_dict().items():
                np.testing.assert_allclose(member[network][name].numpy(), value.numpy(), rtol=0, atol=1e-9, err_msg=name)
        if sac.log_ent_coef is not None:
            assert ours.log_ent_coef.item() == pytest.approx(sac.log_ent_coef.item(), abs=1e-12)

    def test_same_seed_same_warm_up_and_first_weights(self) -> None:
        """Also through SB3's learn(): the same seed gives SAC's initial weights, warm-up transitions and batches."""
        sac, ours = make_model(SAC), make_model(policy_kwargs={"ensemble_size": 1})
        for name, value in sac.actor.state_dict().items():
            assert th.equal(ours.actor.member_state(0)[name], value)
        for name, value in sac.critic.state_dict().items():
            assert th.equal(ours.critic.member_state(0)[name], value)
        for model in (sac, ours):
            model.learn(50)
        np.testing.assert_array_equal(sac.replay_buffer.actions[:50], ours.replay_buffer.actions[:50])
        np.random.seed(3)
        expected = sac.replay_buffer.sample(8)
        np.random.seed(3)
        drawn = ours.replay_buffer.sample(8)
        assert th.equal(expected.observations, drawn.observations)


class TestOfflinePhase:
    def test_one_member_is_plain_cql(self, float64_preprocessing: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """One member, the full gradient: same weights, batch and noise give the update of CQL's paper, in float64."""
        rate = 3e-4
        plain = make_model(PlainCQL, double=True, learning_rate=rate)
        ours = make_model(
            double=True,
            policy_kwargs={"ensemble_size": 1},
            dataset=make_dataset(),
            cql_sampled_gradient=False,
            offline_learning_rate=rate,
            offline_qf_learning_rate=rate,
        )
        ours.policy.set_member(0, {name: getattr(plain, name).state_dict() for name in ("actor", "critic", "critic_target")})
        for step in range(3):
            batch = random_batch(32, seed=step)
            plain.replay_buffer.sample = lambda *args, batch=batch, **kwargs: batch
            ours.replay_buffer.sample_offline = lambda *args, batch=batch, **kwargs: batch
            th.manual_seed(step)
            plain.train(gradient_steps=1, batch_size=32)
            th.manual_seed(step)
            ours.train_offline(gradient_steps=1, batch_size=32)
        member = ours.policy.get_member(0)
        for network in ("actor", "critic", "critic_target"):
            for name, value in getattr(plain, network).state_dict().items():
                np.testing.assert_allclose(member[network][name].numpy(), value.numpy(), rtol=0, atol=1e-9, err_msg=name)
        assert ours.offline_log_ent_coef.item() == pytest.approx(plain.log_ent_coef.item(), abs=1e-12)

    @pytest.mark.parametrize(
        "kwargs", [{}, {"cql_sampled_gradient": False}, {"cql_target_action_gap": 0.5}, {"ent_coef": 0.1}]
    )
    def test_members_are_independent_agents(
        self, float64_preprocessing: None, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]
    ) -> None:
        """Three members at once equal three runs of one, on the same batches and noise, in float64."""
        n_members, batch_size, n_updates = 3, 16, 4
        dataset = make_dataset()
        ensemble = make_model(double=True, policy_kwargs={"ensemble_size": n_members}, dataset=dataset, **kwargs)
        singles = [
            make_model(double=True, policy_kwargs={"ensemble_size": 1}, dataset=dataset, **kwargs) for _ in range(n_members)
        ]
        for index, single in enumerate(singles):
            single.policy.set_member(0, ensemble.policy.get_member(index))

        batches = [random_batch(n_members * batch_size, seed=10 + update) for update in range(n_updates)]
        # Noise by request: the k-th request of an update gets the k-th block, of which a single agent takes its part
        normal, exponential, uniform = (Noise(kind, n_members) for kind in ("normal", "exponential", "uniform"))
        monkeypatch.setattr("torch.distributions.normal._standard_normal", normal.standard_normal)
        monkeypatch.setattr(th.Tensor, "exponential_", lambda tensor: exponential.fill(tensor))
        monkeypatch.setattr(th.Tensor, "uniform_", lambda tensor, low, high: uniform.fill(tensor))

        def run(model: Any, member: int | None) -> None:
            for update, batch in enumerate(batches):
                for noise in (normal, exponential, uniform):
                    noise.start(update, member)
                if member is not None:
                    rows = slice(member * batch_size, (member + 1) * batch_size)
                    batch = batch._replace(**{name: x[rows] for name, x in batch._asdict().items() if x is not None})
                model.replay_buffer.sample_offline = lambda *args, batch=batch, **kw: batch
                model.train_offline(gradient_steps=1, batch_size=batch_size)

        run(ensemble, None)
        for index, single in enumerate(singles):
            run(single, index)
            expected, member = single.policy.get_member(0), ensemble.policy.get_member(index)
            for network, state in expected.items():
                for name, value in state.items():
                    np.testing.assert_allclose(
                        member[network][name].numpy(), value.numpy(), rtol=0, atol=1e-9, err_msg=f"{network} {name}"
                    )
            assert ensemble.offline_log_ent_coef[index].item() == pytest.approx(single.offline_log_ent_coef.item(), abs=1e-12)
            assert ensemble.log_cql_lagrange[index].item() == pytest.approx(single.log_cql_lagrange.item(), abs=1e-12)


class Noise:
    """Random numbers that a single agent draws exactly as its place in the ensemble does: the leading axis is the members'."""

    def __init__(self, kind: str, n_members: int) -> None:
        self.kind, self.n_members = kind, n_members

    def start(self, update: int, member: int | None) -> None:
        self.rng = np.random.default_rng([len(self.kind), update])
        self.member = member

    def block(self, shape: tuple[int, ...]) -> th.Tensor:
        members = 1 if self.member is None else self.n_members
        full = (shape[0] * members, *shape[1:])
        draw = {"normal": self.rng.normal, "exponential": self.rng.exponential, "uniform": None}[self.kind]
        values = self.rng.uniform(-1, 1, full) if draw is None else draw(size=full)
        if self.member is not None:
            values = values[self.member * shape[0] : (self.member + 1) * shape[0]]
        return th.as_tensor(values)

    def standard_normal(self, shape: Any, dtype: th.dtype, device: Any) -> th.Tensor:
        return self.block(tuple(shape)).to(dtype)

    def fill(self, tensor: th.Tensor) -> th.Tensor:
        return tensor.copy_(self.block(tuple(tensor.shape)))
