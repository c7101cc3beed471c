"""The two phases against SB3's SAC, against single agents, and against NumPy."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    IMAGE_SPACE,
    TinyEnv,
    assert_close_members,
    assert_same,
    batch_of_member,
    make_dataset,
    make_model,
    parameters_of,
    random_batch,
    random_frames,
    saved_state,
    small_model,
)
from plain_cql import PlainCQL
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sb3_off2on import Off2OnSAC
from sb3_off2on.buffers import to_device


def double_batch(batch: Any) -> Any:
    return batch._replace(**{name: value.double() for name, value in batch._asdict().items() if isinstance(value, th.Tensor)})


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
        "kwargs",
        [
            {},
            {"cql_sampled_gradient": False},
            {"cql_target_action_gap": 0.5},
            {"ent_coef": 0.1},
            {"offline_ent_coef": "auto_0.3"},
        ],
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
        normal, unit, uniform = (Noise(kind, n_members) for kind in ("normal", "unit", "uniform"))
        monkeypatch.setattr("torch.distributions.normal._standard_normal", normal.standard_normal)
        monkeypatch.setattr(th, "rand_like", lambda tensor: unit.fill(th.empty_like(tensor)))
        monkeypatch.setattr(th.Tensor, "uniform_", lambda tensor, low, high: uniform.fill(tensor))

        def run(model: Any, member: int | None) -> None:
            for update, batch in enumerate(batches):
                for noise in (normal, unit, uniform):
                    noise.start(update, member)
                if member is not None:
                    batch = batch_of_member(batch, member, batch_size)
                model.replay_buffer.sample_offline = lambda *args, batch=batch, **kw: batch
                model.train_offline(gradient_steps=1, batch_size=batch_size)

        run(ensemble, None)
        for index, single in enumerate(singles):
            run(single, index)
            assert_close_members(ensemble.policy.get_member(index), single.policy.get_member(0))
            assert ensemble.offline_log_ent_coef[index].item() == pytest.approx(single.offline_log_ent_coef.item(), abs=1e-12)
            assert ensemble.log_cql_lagrange[index].item() == pytest.approx(single.log_cql_lagrange.item(), abs=1e-12)


class TestEntropyCoefficients:
    """``ent_coef`` is that of both phases, unless ``offline_ent_coef`` gives the offline phase one of its own."""

    @pytest.mark.parametrize("offline_ent_coef", ["auto", "auto_0.3", 0.1, 0])
    @pytest.mark.parametrize("ent_coef", ["auto_0.5", 0.2])
    def test_of_its_own(self, ent_coef: str | float, offline_ent_coef: str | float) -> None:
        dataset = make_dataset(env=TinyEnv())

        def pretrained(**kwargs: Any) -> Off2OnSAC:
            return small_model(TinyEnv(), dataset=dataset, **kwargs).learn_offline(gradient_steps=3)

        own = pretrained(ent_coef=ent_coef, offline_ent_coef=offline_ent_coef)
        alone = pretrained(ent_coef=offline_ent_coef)
        assert_same(parameters_of(own.policy), parameters_of(alone.policy))
        assert th.equal(own.offline_log_ent_coef, alone.offline_log_ent_coef)
        if own.log_ent_coef is not None:
            assert own.log_ent_coef.exp().item() == pytest.approx(0.5)
        else:
            assert own.ent_coef_tensor.item() == pytest.approx(0.2)

    @pytest.mark.parametrize(("saved", "expected"), [(0.5, 0.3), ("auto_0.5", 0.5)])
    def test_learned_after_load(self, saved: str | float, expected: float, tmp_path: Path) -> None:
        """A learned coefficient goes on where it was; where it was fixed, from the initial value given."""
        small_model(TinyEnv(), offline_ent_coef=saved).save(tmp_path / "model")
        loaded = Off2OnSAC.load(tmp_path / "model", offline_ent_coef="auto_0.3")
        assert loaded.offline_log_ent_coef.exp().tolist() == pytest.approx([expected] * loaded.policy.ensemble_size)

    def test_the_online_phase_has_the_other(self) -> None:
        """Agents of the same offline phase learn online with the one coefficient or the other."""
        dataset = make_dataset(env=TinyEnv())
        results = []
        for ent_coef in ("auto_0.3", "auto_0.3", 0.2):
            model = small_model(TinyEnv(), dataset=dataset, ent_coef=ent_coef, offline_ent_coef=0.1)
            results.append(parameters_of(model.learn_offline(gradient_steps=2).learn(10).policy))
        assert_same(results[0], results[1])
        with pytest.raises(AssertionError):
            assert_same(results[0], results[2])


class TestBehaviourCloning:
    """The first ``offline_bc_steps`` updates, in which the actors imitate."""

    def test_likelihood_against_numpy(self) -> None:
        """Density of tanh(u) with u Gaussian, by the change of variables."""
        rng = np.random.default_rng(0)
        mean, log_std = rng.normal(size=(2, 3, 4, 2))
        actions = rng.uniform(-0.95, 0.95, (3, 4, 2))
        u = np.arctanh(actions)
        normal = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        expected = (normal - np.log(1 - actions**2)).sum(axis=2)
        actor = small_model(policy_kwargs={"ensemble_size": 3, "net_arch": [4]}).actor
        got = actor.log_prob_of_actions(*(th.as_tensor(x) for x in (mean, log_std, actions)))
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4)
        # On the bounds it is finite
        on_bounds = actor.log_prob_of_actions(th.zeros(1, 1, 2), th.zeros(1, 1, 2), th.tensor([[[1.0, -1.0]]]))
        assert th.isfinite(on_bounds).all()

    def test_first_updates_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One step of gradient ascent on each member's own likelihood, the critics' update as ever, then CQL's actor."""
        policy_kwargs = {"ensemble_size": 2, "net_arch": [8], "optimizer_class": th.optim.SGD}
        dataset = make_dataset(n_episodes=2, length=10)
        imitating, plain = (
            small_model(dataset=dataset, policy_kwargs=policy_kwargs, offline_learning_rate=0.1, offline_bc_steps=n)
            for n in (1, 0)
        )
        batch = imitating.replay_buffer.sample_offline(2 * 4)
        for model in (imitating, plain):
            monkeypatch.setattr(model.replay_buffer, "sample_offline", lambda *args, **kwargs: batch)
        before = deepcopy(imitating.actor)
        for model in (imitating, plain):
            model.set_logger(configure(None, []))
            th.manual_seed(0)
            model.train_offline(gradient_steps=1, batch_size=4)
        assert_same(parameters_of(imitating.critic), parameters_of(plain.critic))

        params = before.member_action_dist_params(batch.observations, per_member=True)
        log_prob = before.log_prob_of_actions(*params, batch.actions.view(2, 4, 1))
        (log_prob[0].mean() + log_prob[1].mean()).backward()
        with th.no_grad():
            for parameter in before.parameters():
                assert parameter.grad is not None
                parameter.add_(0.1 * parameter.grad)
        for name, value in before.state_dict().items():
            th.testing.assert_close(imitating.actor.state_dict()[name], value)

        # Entropy coefficients wait for the second update, which is the same in both from the same actors on
        assert (imitating.offline_log_ent_coef == 0).all()
        assert (plain.offline_log_ent_coef != 0).all()
        plain.actor.load_state_dict(imitating.actor.state_dict())
        plain.offline_log_ent_coef.data.zero_()
        for model in (imitating, plain):
            th.manual_seed(1)
            model.train_offline(gradient_steps=1, batch_size=4)
        assert_same(parameters_of(imitating.actor), parameters_of(plain.actor))
        assert (imitating.offline_log_ent_coef != 0).all()

    def test_wrong_numbers(self) -> None:
        with pytest.raises(ValueError, match=r"`offline_bc_steps` must be at least 0, got -1"):
            small_model(offline_bc_steps=-1)
        with pytest.raises(ValueError, match=r"`offline_bc_steps` must be an integer, got 0.5"):
            small_model(offline_bc_steps=0.5)


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
        lowest = {"normal": None, "unit": 0, "uniform": -1}[self.kind]
        values = self.rng.normal(size=full) if lowest is None else self.rng.uniform(lowest, 1, full)
        if self.member is not None:
            values = values[self.member * shape[0] : (self.member + 1) * shape[0]]
        return th.as_tensor(values)

    def standard_normal(self, shape: Any, dtype: th.dtype, device: Any) -> th.Tensor:
        return self.block(tuple(shape)).to(dtype)

    def fill(self, tensor: th.Tensor) -> th.Tensor:
        return tensor.copy_(self.block(tuple(tensor.shape)))


class NoCopyOutsideOf(TorchDispatchMode):
    """Fails where numbers of the CPU, other than a scalar, meet the meta device, unless ``allowed``."""

    allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, th.Tensor)]
        from_cpu = any(x.device.type == "cpu" and x.dim() > 0 for x in tensors)
        assert self.allowed or not (from_cpu and any(x.is_meta for x in tensors)), func
        return result


class TestOnAnAccelerator:
    """
    The meta device stands for it: its tensors have shapes and no values, so that whatever would have to wait for a value
    raises (``item()``, ``cpu()``, ``numpy()``, ``if``, indexing with booleans, ...).
    """

    @pytest.mark.parametrize(
        ("policy", "space", "kwargs"),
        [
            ("MlpPolicy", spaces.Box(-1, 1, (3,)), {}),
            (
                "MlpPolicy",
                spaces.Box(-1, 1, (3,)),
                {
                    "ent_coef": 0.1,
                    "target_q": "mean",
                    "cql_alpha_online": 1.0,
                    "cql_sampled_gradient": False,
                    "density_ratio_kwargs": {"reference": "union"},
                },
            ),
            (
                "MlpPolicy",
                spaces.Box(-1, 1, (3,)),
                {"calql": True, "cql_target_action_gap": 0.5, "replay_buffer_kwargs": {"scheme": "symmetric"}},
            ),
            ("MultiInputPolicy", spaces.Dict({"vector": spaces.Box(-1, 1, (3,)), "image": IMAGE_SPACE}), {}),
        ],
    )
    def test_no_update_waits(
        self, policy: str, space: spaces.Space, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads = self.on_meta(monkeypatch)
        env = make_vec_env(lambda: TinyEnv(space))
        if isinstance(space, spaces.Box):
            env = VecNormalize(env, norm_reward="calql" not in kwargs)
        # The fused step, of which PyTorch has none for this device, reads nothing: its counter is on the device
        kwargs = {"policy_kwargs": {"optimizer_kwargs": {"foreach": True}}, **kwargs}
        kwargs["replay_buffer_kwargs"] = {"buffer_device": "meta", **kwargs.get("replay_buffer_kwargs", {})}
        model = small_model(env, policy, device="meta", dataset=make_dataset(env=TinyEnv(space)), **kwargs)
        model.set_logger(configure(None, []))
        self.add_rows(model)

        watch = NoCopyOutsideOf()

        def copied(values: Any, device: th.device) -> th.Tensor:
            watch.allowed = True
            tensor = to_device(values, device)
            watch.allowed = False
            return tensor

        monkeypatch.setattr("sb3_off2on.buffers.to_device", copied)
        monkeypatch.setattr("sb3_off2on.off2on_sac.to_device", copied)
        with watch:
            reads.clear()
            model.train_offline(1, batch_size=8)
            assert reads == []
            model.train(1, batch_size=8)
            once = list(reads)
            assert once  # what train() logs, after its updates
            self.add_rows(model)
            reads.clear()
            model.train(2, batch_size=8)
            assert len(reads) == len(once)

    def on_meta(self, monkeypatch: pytest.MonkeyPatch) -> list[th.Tensor]:
        """Allow the meta device, and reading scalars of it, which are returned as they are read."""
        reads: list[th.Tensor] = []
        item = th.Tensor.item

        def read(tensor: th.Tensor) -> Any:
            if not tensor.is_meta:
                return item(tensor)
            reads.append(tensor)
            return 1.0

        monkeypatch.setattr(th.Tensor, "item", read)
        monkeypatch.setattr(th.Tensor, "__float__", read)
        monkeypatch.setattr("sb3_off2on.buffers._usable_device", th.device)
        return reads

    def add_rows(self, model: Off2OnSAC) -> None:
        buffer = model.replay_buffer
        for _ in range(5):
            obs = random_frames(buffer.observation_space, 1, np.random.default_rng(0))
            buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])

    @pytest.mark.parametrize("kwargs", [{}, {"calql": True, "replay_buffer_kwargs": {"scheme": "symmetric"}}])
    def test_both_phases_as_on_the_host(self, kwargs: dict[str, Any]) -> None:
        """Rows on a device (here the CPU) are those that the host draws, so are the networks and priorities they lead to."""
        models = []
        for on_device in ({}, {"buffer_device": "cpu"}):
            replay_buffer_kwargs = {**kwargs.get("replay_buffer_kwargs", {}), **on_device}
            model = small_model(**{**kwargs, "dataset": make_dataset(), "replay_buffer_kwargs": replay_buffer_kwargs})
            model.learn_offline(gradient_steps=3)
            model.learn(12)
            models.append(model)
        host, device = models
        assert_same(saved_state(host), saved_state(device))
        assert host.logger.name_to_value["train/critic_loss"] != 0
        assert host.logger.name_to_value == device.logger.name_to_value
        if host.replay_buffer.scheme == "balanced":
            rows = np.arange(host.replay_buffer.n_offline + 12)
            priorities = host.replay_buffer.priorities(rows)
            np.testing.assert_array_equal(device.replay_buffer.priorities(rows), priorities)
            assert len(np.unique(priorities)) > 10

    def test_saved_where_there_was_one(self, tmp_path: Any) -> None:
        model = small_model(dataset=make_dataset(), replay_buffer_kwargs={"buffer_device": "cpu"})
        model.learn(8)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        rows = np.arange(300 + 8)
        priorities = model.replay_buffer.priorities(rows)
        model.load_replay_buffer(tmp_path / "buffer.pkl")
        assert model.replay_buffer.buffer_device == th.device("cpu")
        np.testing.assert_array_equal(model.replay_buffer.priorities(rows), priorities)
        model.train(1, batch_size=8)

        model.replay_buffer_kwargs["buffer_device"] = "cuda:99"
        model.save(tmp_path / "model.zip")
        with pytest.raises(
            ValueError, match=r"buffer_device='cuda:99' cannot be used here.* pass replay_buffer_kwargs to load"
        ):
            Off2OnSAC.load(tmp_path / "model.zip")
        loaded = Off2OnSAC.load(tmp_path / "model.zip", replay_buffer_kwargs={})
        assert loaded.replay_buffer.buffer_device is None
