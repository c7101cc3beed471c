import math
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    Schedule,
    TensorDict,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import FloatSchedule, polyak_update, update_learning_rate
from stable_baselines3.sac.policies import CnnPolicy, MultiInputPolicy, SACPolicy
from stable_baselines3.sac.sac import SAC

from sb3_off2on.buffers import BalancedReplayBuffer, BalancedReplayBufferSamples, initial_priority, to_device
from sb3_off2on.cql import calql_lower_bound, cql_gap, draw_softmax_actions, uniform_log_density
from sb3_off2on.density_ratio import DensityRatio, density_ratio_loss, density_ratio_priority
from sb3_off2on.fqe import fqe_errors, reset_critics
from sb3_off2on.offline import OfflineToOnline, check_action_space, check_replay_arguments
from sb3_off2on.policies import (
    EnsembleActor,
    EnsembleCnnPolicy,
    EnsembleCQLPolicy,
    EnsembleCritic,
    EnsembleMultiInputPolicy,
    check_layers,
)
from sb3_off2on.stacking import frozen

SelfOff2OnSAC = TypeVar("SelfOff2OnSAC", bound="Off2OnSAC")


class Off2OnSAC(OfflineToOnline, SAC):
    """
    Offline-to-Online RL via Balanced Replay and Pessimistic Q-Ensemble (Lee et al., CoRL 2021), on top of SAC:
    N independent CQL agents learn from a dataset, then act and learn as one ensemble agent in the environment, from a replay
    that prefers online samples and those of the dataset that look like them.

    Paper: https://proceedings.mlr.press/v164/lee22d.html

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, by name or as SAC's class);
        ``ensemble_size`` is one of its arguments
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of the actor and the entropy coefficient in the online phase
    :param buffer_size: size of the online part of the replay buffer
    :param learning_starts: how many steps to collect before learning starts: played by the pretrained agents,
        at random where nothing was pretrained. Without pretrained agents or a dataset as in SAC: the first update comes with
        the first rollout that ends after them, at step 2000 with the defaults
    :param batch_size: see SAC; also that of the density ratio's offline and online batch
    :param tau: see SAC
    :param gamma: see SAC
    :param train_freq: see SAC
    :param gradient_steps: see SAC
    :param action_noise: see SAC
    :param replay_buffer_class: ``BalancedReplayBuffer`` or a class derived from it
    :param replay_buffer_kwargs: e.g. ``dict(scheme="uniform")``: ``balanced`` (the paper's), ``uniform``, ``online``,
        ``offline`` or ``symmetric`` (half and half); or ``dict(buffer_device="cuda")`` to keep the rows on the device
    :param optimize_memory_usage: not supported, see ``BalancedReplayBuffer``
    :param n_steps: not supported, must be 1
    :param ent_coef: see SAC; restarts for the online phase
    :param target_update_interval: see SAC
    :param target_entropy: see SAC
    :param use_sde: not supported
    :param sde_sample_freq: not supported
    :param use_sde_at_warmup: not supported
    :param stats_window_size: see SAC
    :param tensorboard_log: see SAC
    :param policy_kwargs: those of SAC, ``ensemble_size`` (default 5) and ``critic_layer_norm``, see ``EnsembleCQLPolicy``
    :param verbose: see SAC
    :param seed: see SAC
    :param device: see SAC
    :param _init_setup_model: see SAC
    :param qf_learning_rate: learning rate of the critics in the online phase, ``learning_rate`` if ``None``
    :param dataset: whatever ``load_dataset`` takes; also possible later with ``set_dataset()`` or ``learn_offline()``
    :param offline_gradient_steps: updates of the offline phase that ``learn()`` does first, once. With 0, a dataset only
        serves the replay, unless ``learn_offline()`` is called
    :param offline_learning_rate: learning rate of the actors and entropy coefficients in the offline phase
    :param offline_qf_learning_rate: learning rate of the critics in the offline phase
    :param offline_ent_coef: that of the offline phase, of which each member has one of its own: as ``ent_coef`` if ``None``
    :param offline_batch_size: rows per member and update in the offline phase
    :param offline_bc_steps: in this many of the first updates of the offline phase, the actors imitate the dataset's actions
        (maximum likelihood, without entropy) instead of maximising Q: ``policy_eval_start`` of CQL's and COG's published code.
        Entropy coefficients are tuned after them
    :param cql_alpha: weight of CQL's conservative term beside the squared TD error (not halved), offline phase
    :param cql_n_actions: sampled actions per state, for each of: uniform, policy at s, policy at s'
    :param cql_temp: temperature of the log-sum-exp
    :param cql_target_action_gap: target of CQL's Lagrange form, which then multiplies ``cql_alpha`` with a learned factor
        for each member; ``None`` for the fixed weight. As in the published code, the gap that is held against it contains the
        constant ``cql_temp * log(3 * cql_n_actions)``
    :param cql_sampled_gradient: take the gradient of the log-sum-exp at one action drawn from its softmax (unbiased, several
        times cheaper) instead of at all sampled actions
    :param cql_alpha_online: weight of the conservative term in the online phase; 0 in the paper, above 0 for CQL-ft
    :param calql: bound the policy's Q-values in the conservative term by the dataset's Monte-Carlo returns (Cal-QL); offline
        phase only
    :param target_q: ``"member"``: each member regresses to its own target (the authors' code), ``"mean"``: each to the mean
        of all targets (Eq. 5); online phase
    :param first_update_multiplier: the first online update of pretrained agents takes this many times ``learning_starts``
        gradient steps
    :param initial_online_fraction: rho, the probability that a draw of the first update is an online sample
    :param priority_temperature: T of Eq. 6
    :param density_ratio_kwargs: arguments of ``DensityRatio`` (``net_arch``, ``activation_fn``, ``learning_rate``), and
        ``reference``: ``"offline"`` for d_on/d_off, ``"union"`` for the d_on/d_(off and on) of section E.1
    :param on_fault: what to do about NaN, infinity and exploding Q-values: ``"raise"`` stops with a ``NumericalFault`` that
        names the cause, ``"skip"`` leaves such steps and updates out and counts them
    :param max_abs_q: Q-values beyond it count as exploding
    :raises ValueError: if an argument is out of its range or not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": EnsembleCQLPolicy,
        "EnsembleCQLPolicy": EnsembleCQLPolicy,
        "CnnPolicy": EnsembleCnnPolicy,
        "MultiInputPolicy": EnsembleMultiInputPolicy,
    }
    policy: EnsembleCQLPolicy
    actor: EnsembleActor
    critic: EnsembleCritic  # type: ignore[assignment]
    critic_target: EnsembleCritic  # type: ignore[assignment]
    replay_buffer: BalancedReplayBuffer
    _dataset_params: ClassVar[list[str]] = ["dataset", "mc_returns"]
    # Since the critics are those of fitted Q evaluation
    _n_fqe_updates: int = 0

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 1000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1000,
        gradient_steps: int = -1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        qf_learning_rate: float | Schedule | None = None,
        dataset: Any = None,
        offline_gradient_steps: int = 0,
        offline_learning_rate: float | Schedule = 1e-4,
        offline_qf_learning_rate: float | Schedule = 3e-4,
        offline_ent_coef: str | float | None = None,
        offline_batch_size: int = 256,
        offline_bc_steps: int = 0,
        cql_alpha: float = 5.0,
        cql_n_actions: int = 10,
        cql_temp: float = 1.0,
        cql_target_action_gap: float | None = None,
        cql_sampled_gradient: bool = True,
        cql_alpha_online: float = 0.0,
        calql: bool = False,
        target_q: str = "member",
        first_update_multiplier: int = 5,
        initial_online_fraction: float = 0.75,
        priority_temperature: float = 5.0,
        density_ratio_kwargs: dict[str, Any] | None = None,
        on_fault: str = "raise",
        max_abs_q: float = 1e8,
    ):
        replay_buffer_class = check_replay_arguments(replay_buffer_class, n_steps)
        if use_sde or use_sde_at_warmup or sde_sample_freq != -1:
            raise ValueError(
                f"gSDE is not supported, see EnsembleCQLPolicy: remove `use_sde={use_sde}`, "
                f"`sde_sample_freq={sde_sample_freq}` and `use_sde_at_warmup={use_sde_at_warmup}`, or use `action_noise`"
            )
        sb3_policies: dict[Any, type[EnsembleCQLPolicy]] = {
            SACPolicy: EnsembleCQLPolicy,  # MlpPolicy
            CnnPolicy: EnsembleCnnPolicy,
            MultiInputPolicy: EnsembleMultiInputPolicy,
        }
        super().__init__(
            sb3_policies.get(policy, policy),
            check_action_space(env, verbose),  # type: ignore[arg-type]
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            ent_coef=ent_coef,
            target_update_interval=target_update_interval,
            target_entropy=target_entropy,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if not issubclass(self.policy_class, EnsembleCQLPolicy):
            raise ValueError(f"`policy` must be a name or derived from EnsembleCQLPolicy, got {self.policy_class.__name__}")
        self.dataset = dataset
        self.qf_learning_rate = qf_learning_rate
        self.offline_gradient_steps = offline_gradient_steps
        self.offline_learning_rate = offline_learning_rate
        self.offline_qf_learning_rate = offline_qf_learning_rate
        self.offline_ent_coef = offline_ent_coef
        self.offline_batch_size = offline_batch_size
        self.offline_bc_steps = offline_bc_steps
        self.cql_alpha = cql_alpha
        self.cql_n_actions = cql_n_actions
        self.cql_temp = cql_temp
        self.cql_target_action_gap = cql_target_action_gap
        self.cql_sampled_gradient = cql_sampled_gradient
        self.cql_alpha_online = cql_alpha_online
        self.calql = calql
        self.target_q = target_q
        self.first_update_multiplier = first_update_multiplier
        self.initial_online_fraction = initial_online_fraction
        self.priority_temperature = priority_temperature
        self.density_ratio_kwargs = density_ratio_kwargs or {}
        self.on_fault = on_fault
        self.max_abs_q = max_abs_q
        self.density_ratio: DensityRatio | None = None
        self.mc_returns: th.Tensor | None = None

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        self._check_at_least(
            offline_gradient_steps=0,
            offline_batch_size=1,
            offline_bc_steps=0,
            cql_alpha=0,
            cql_n_actions=1,
            cql_alpha_online=0,
            first_update_multiplier=1,
            target_update_interval=1,
        )
        self._check_integers("offline_bc_steps", "cql_n_actions", "first_update_multiplier", "target_update_interval")
        for name in ("cql_temp", "priority_temperature", "initial_online_fraction"):
            self._check_number(name)
        if self.cql_target_action_gap is not None:
            self._check_number("cql_target_action_gap")
        self._read_ent_coef("ent_coef")
        if self.offline_ent_coef is not None:
            self._read_ent_coef("offline_ent_coef")
        for name in ("cql_sampled_gradient", "calql"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        for name in ("cql_temp", "priority_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.initial_online_fraction < 1:
            raise ValueError(f"`initial_online_fraction` (rho) must be in [0, 1), got {self.initial_online_fraction}")
        if self.target_q not in ("member", "mean"):
            raise ValueError(f"`target_q` must be 'member' or 'mean', got {self.target_q!r}")
        known = {"net_arch", "activation_fn", "learning_rate", "reference"}
        if not set(self.density_ratio_kwargs) <= known:
            raise ValueError(f"`density_ratio_kwargs` must be among {sorted(known)}, got {sorted(self.density_ratio_kwargs)}")
        check_layers("density_ratio_kwargs['net_arch']", self.density_ratio_kwargs.get("net_arch"))
        reference = self.density_ratio_kwargs.get("reference", "offline")
        if reference not in ("offline", "union"):
            raise ValueError(f"`density_ratio_kwargs['reference']` must be 'offline' or 'union', got {reference!r}")
        self._check_returns()

    def _read_ent_coef(self, name: str) -> tuple[float, bool]:
        """
        :param name: of an argument in SAC's notation: ``"auto"``, such as ``"auto_0.1"``, or a number
        :return: its value, which is the initial one if it is learned, and whether it is
        :raises ValueError: if it is none of these
        """
        given = getattr(self, name)
        is_learned = str(given).startswith("auto")
        try:
            value = 1.0 if given == "auto" else float(str(given).removeprefix("auto_"))
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf or (is_learned and value == 0):
            raise ValueError(f"`{name}` must be 'auto', such as 'auto_0.1', or a number from 0, got {given!r}")
        return value, is_learned

    def _check_returns(self) -> None:
        if self.calql and self._vec_normalize_env is not None and self._vec_normalize_env.norm_reward:
            raise ValueError(
                "`calql=True` compares Q-values with the dataset's returns: use `VecNormalize(norm_reward=False)`"
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        self.qf_lr_schedule = None if self.qf_learning_rate is None else FloatSchedule(self.qf_learning_rate)
        self.offline_lr_schedule = FloatSchedule(self.offline_learning_rate)
        self.offline_qf_lr_schedule = FloatSchedule(self.offline_qf_learning_rate)
        # The offline phase has an entropy coefficient (as SAC's) and a Lagrange factor (as CQL's) for each member
        shape = (self.policy.ensemble_size,)
        self._initial_log_ent_coef = 0.0 if self.log_ent_coef is None else self.log_ent_coef.item()
        ent_coef, is_learned = self._read_ent_coef("ent_coef" if self.offline_ent_coef is None else "offline_ent_coef")
        self._fixed_offline_ent_coef = None if is_learned else ent_coef
        self._initial_offline_log_ent_coef = math.log(ent_coef) if is_learned else 0.0
        self.offline_log_ent_coef = th.full(shape, self._initial_offline_log_ent_coef, device=self.device, requires_grad=True)
        self.log_cql_lagrange = th.zeros(shape, device=self.device, requires_grad=True)
        self._reset_coefficient_optimizers()

    def _reset_coefficient_optimizers(self) -> None:
        """Those of the offline phase's coefficients."""
        self.offline_ent_coef_optimizer = th.optim.Adam([self.offline_log_ent_coef], lr=self.offline_lr_schedule(1))
        self.cql_lagrange_optimizer = th.optim.Adam([self.log_cql_lagrange], lr=self.offline_qf_lr_schedule(1))

    def _setup_density_ratio(self) -> None:
        # Whatever the scheme, as a saved model may be loaded with another one
        kwargs = {name: value for name, value in self.density_ratio_kwargs.items() if name != "reference"}
        self.density_ratio = DensityRatio(
            self.observation_space,
            self.action_space,  # type: ignore[arg-type]
            self.policy.make_features_extractor(),
            normalize_images=self.policy.normalize_images,
            **kwargs,
        ).to(self.device)

    @property
    def _replay_is_balanced(self) -> bool:
        """Whether draws follow density ratios: the scheme asks for it, and there is a dataset to compare with."""
        return self.dataset is not None and self.replay_buffer.scheme == "balanced"

    def set_dataset(self, dataset: Any) -> None:
        super().set_dataset(dataset)
        assert self.dataset is not None
        if self.density_ratio is None:
            self._setup_density_ratio()
        if self.calql:
            self.mc_returns = th.as_tensor(self.dataset.monte_carlo_returns(self.gamma), device=self.device)

    def _prepare_dataset(self) -> None:
        super()._prepare_dataset()
        self._check_returns()  # once more, as the environment may be another one

    def set_member(self, index: int, member: dict[str, dict[str, th.Tensor]]) -> None:
        super().set_member(index, member)
        self.offline_log_ent_coef.data[index] = self._initial_offline_log_ent_coef
        self.log_cql_lagrange.data[index] = 0.0
        self._reset_coefficient_optimizers()
        self._n_fqe_updates = 0

    # ------------------------------------------------------------------ offline phase (Algorithm 1)

    def train_offline(self, gradient_steps: int, batch_size: int) -> None:
        self._n_fqe_updates = 0
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        assert isinstance(self.target_entropy, float)
        # Update learning rates according to the schedules of this phase
        learning_rate = self.offline_lr_schedule(self._current_progress_remaining)
        qf_learning_rate = self.offline_qf_lr_schedule(self._current_progress_remaining)
        update_learning_rate(self.actor.optimizer, learning_rate)
        update_learning_rate(self.offline_ent_coef_optimizer, learning_rate)
        update_learning_rate(self.critic.optimizer, qf_learning_rate)
        update_learning_rate(self.cql_lagrange_optimizer, qf_learning_rate)

        ensemble_size = self.policy.ensemble_size
        for _ in range(gradient_steps):
            self._n_offline_updates += 1
            is_imitating = self._n_offline_updates <= self.offline_bc_steps
            # Each member learns from a minibatch of its own: the first `batch_size` rows are member 0's
            replay_data = self.replay_buffer.sample_offline(ensemble_size * batch_size, env=self._vec_normalize_env)
            if self._has_fault(replay_data, ensemble_size):
                continue
            actions = replay_data.actions.view(ensemble_size, batch_size, -1)
            rewards = replay_data.rewards.view(ensemble_size, 1, batch_size)
            dones = replay_data.dones.view(ensemble_size, 1, batch_size)

            # Action of each member's actor for its states: (ensemble_size, batch_size, action_dim)
            dist_params = self.actor.member_action_dist_params(replay_data.observations, per_member=True)
            actions_pi, log_prob = (x.squeeze(1) for x in self.actor.sample_from_params(*dist_params))

            if self._fixed_offline_ent_coef is None:
                ent_coef = th.exp(self.offline_log_ent_coef.detach()).unsqueeze(1)  # (ensemble_size, 1)
                entropy_gap = (log_prob + self.target_entropy).detach()
                ent_coef_loss = -(self.offline_log_ent_coef.unsqueeze(1) * entropy_gap).mean(dim=1).sum()
            else:
                ent_coef = th.as_tensor(self._fixed_offline_ent_coef)

            with th.no_grad():
                next_dist_params = self.actor.member_action_dist_params(replay_data.next_observations, per_member=True)
                next_actions, _ = self.actor.sample_from_params(*next_dist_params)
                next_q_values = self.critic_target.member_q_values(
                    replay_data.next_observations, next_actions.squeeze(1), per_member=True
                )
                # Each member's own twin-min; CQL leaves the entropy out of the backup
                next_q_values = next_q_values.min(dim=1, keepdim=True).values  # (ensemble_size, 1, batch_size)
                target_q_values = rewards + (1 - dones) * self.gamma * next_q_values
                cql_actions, cql_log_density = self._sample_cql_actions(dist_params, next_dist_params)
                mc_returns = None
                if self.mc_returns is not None:
                    mc_returns = self.mc_returns[to_device(replay_data.indices, self.device)].view(ensemble_size, batch_size)

            # Current Q-values and CQL(H)'s gap: (ensemble_size, n_critics, batch_size) each
            features = self.critic.extract_member_features(replay_data.observations, per_member=True)
            current_q_values, gap = self._q_values_and_gap(features, actions, cql_actions, cql_log_density, mc_returns)
            assert current_q_values.shape == gap.shape
            td_loss = (current_q_values - target_q_values).pow(2).mean(dim=2)  # (ensemble_size, n_critics)

            cql_weight = th.as_tensor(self.cql_alpha)
            if self.cql_target_action_gap is not None:
                excess = gap.detach().mean(dim=(1, 2)) - self.cql_target_action_gap
                cql_lagrange = th.exp(self.log_cql_lagrange).clamp(max=1e6)
                cql_weight = self.cql_alpha * cql_lagrange.detach().unsqueeze(1)  # (ensemble_size, 1)
                lagrange_loss = -(self.cql_alpha * cql_lagrange * excess).sum()

            # Sums over the members keep them independent: no gradient of one depends on another
            critic_loss = (td_loss + cql_weight * gap.mean(dim=2)).sum()
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            # Before the first step, so that a faulty minibatch changes nothing
            if self._has_fault(
                replay_data,
                ensemble_size,
                self.critic.optimizer,
                log_prob=log_prob,
                target_q_values=target_q_values,
                current_q_values=current_q_values,
                gap=gap,
                critic_loss=critic_loss,
            ):
                continue
            self.critic.optimizer.step()

            # Where actors imitate, entropy is none of their aims, and the coefficient would go far off before it is one
            if self._fixed_offline_ent_coef is None and not is_imitating:
                self.offline_ent_coef_optimizer.zero_grad()
                ent_coef_loss.backward()
                self.offline_ent_coef_optimizer.step()

            if self.cql_target_action_gap is not None:
                self.cql_lagrange_optimizer.zero_grad()
                lagrange_loss.backward()
                self.cql_lagrange_optimizer.step()

            # Min over each member's critics: (ensemble_size, batch_size)
            with frozen(self.critic):
                q_values_pi = self.critic.member_q_values(replay_data.observations, actions_pi, per_member=True)
            min_qf_pi = q_values_pi.min(dim=1).values
            if is_imitating:
                actor_loss = -self.actor.log_prob_of_actions(*dist_params, actions).mean(dim=1).sum()
            else:
                actor_loss = (ent_coef * log_prob - min_qf_pi).mean(dim=1).sum()
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            if self._has_fault(replay_data, ensemble_size, self.actor.optimizer, q_values_pi=min_qf_pi, actor_loss=actor_loss):
                continue
            self.actor.optimizer.step()

            if self._n_offline_updates % self.target_update_interval == 0:
                polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

            # Means over the members and their critics
            means = {
                "critic_loss": critic_loss / (ensemble_size * self.critic.n_critics),
                "td_loss": td_loss.mean(),
                "cql_gap": gap.mean(),
                "q_data": current_q_values.mean(),
                "q_pi": min_qf_pi.mean(),
                "actor_loss": actor_loss / ensemble_size,
                "ent_coef": ent_coef.mean(),
                "entropy": -log_prob.mean(),
            }
            if self.cql_target_action_gap is not None:
                means["cql_weight"] = cql_weight.mean()
            for name, value in means.items():
                # The logger averages until the next dump. Tensors, see TensorReader: a number would make an
                # accelerator finish each update first
                self.logger.record_mean(f"offline/{name}", value.detach())  # type: ignore[arg-type]

        self.logger.record("offline/learning_rate", learning_rate)
        self.logger.record("offline/qf_learning_rate", qf_learning_rate)

    def _sample_cql_actions(
        self, dist_params: tuple[th.Tensor, th.Tensor], next_dist_params: tuple[th.Tensor, th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        The actions of CQL(H)'s importance sampling: uniform, of the policy at s and of the policy at s'.

        :param dist_params: Gaussians at s, each ``(n_members, batch_size, action_dim)``
        :param next_dist_params: Gaussians at s', same shapes
        :return: actions, shape ``(n_members, 3 * cql_n_actions, batch_size, action_dim)``,
            and their log-densities, shape ``(n_members, 3 * cql_n_actions, batch_size)``
        """
        actions, log_prob = self.actor.sample_from_params(*dist_params, n_samples=self.cql_n_actions)
        next_actions, next_log_prob = self.actor.sample_from_params(*next_dist_params, n_samples=self.cql_n_actions)
        uniform_actions = th.empty_like(actions).uniform_(-1, 1)
        uniform_log_prob = th.full_like(log_prob, uniform_log_density(actions.shape[-1]))
        return th.cat([uniform_actions, actions, next_actions], 1), th.cat([uniform_log_prob, log_prob, next_log_prob], 1)

    def _q_values_and_gap(
        self,
        features: th.Tensor,
        actions: th.Tensor,
        cql_actions: th.Tensor,
        cql_log_density: th.Tensor,
        mc_returns: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Q-values of the dataset's actions and the gap of CQL(H). With the sampled gradient the gap has its own value, and a
        gradient that is right in expectation.

        :param features: shape ``(ensemble_size, batch_size, features_dim)``
        :param actions: shape ``(ensemble_size, batch_size, action_dim)``
        :param cql_actions: shape ``(ensemble_size, n_actions, batch_size, action_dim)``
        :param cql_log_density: shape ``(ensemble_size, n_actions, batch_size)``
        :param mc_returns: Cal-QL's lower bound, shape ``(ensemble_size, batch_size)``
        :return: two tensors of shape ``(ensemble_size, n_critics, batch_size)``
        """
        with th.set_grad_enabled(not self.cql_sampled_gradient):
            q_sampled = q_bounded = self.critic.q_values_of_many(features, cql_actions)
            if mc_returns is not None:
                uniform, policy = q_sampled.tensor_split([self.cql_n_actions], dim=2)
                q_bounded = th.cat([uniform, calql_lower_bound(policy, mc_returns)], dim=2)

        if not self.cql_sampled_gradient:
            q_data = self.critic.q_values(features, actions.unsqueeze(1))
            gap = cql_gap(q_bounded, cql_log_density, q_data, self.cql_temp)
            return q_data, gap

        drawn = draw_softmax_actions(q_bounded, cql_log_density, self.cql_temp)
        # (ensemble_size, n_critics, batch_size, action_dim)
        n_critics, action_dim = self.critic.n_critics, actions.shape[-1]
        index = drawn.unsqueeze(-1).expand(-1, -1, -1, action_dim)
        drawn_actions = cql_actions.gather(1, index)
        data_actions = actions.unsqueeze(1).expand(-1, n_critics, -1, -1)
        # One pass for both
        both = self.critic.q_values(features.repeat(1, 2, 1), th.cat([data_actions, drawn_actions], dim=2))
        q_data, q_drawn = both.chunk(2, dim=2)
        if mc_returns is not None:
            # Where Cal-QL's bound holds, the log-sum-exp does not depend on the critic
            q_drawn = q_drawn * (q_sampled == q_bounded).gather(2, drawn.unsqueeze(2)).squeeze(2)
        gap = cql_gap(q_bounded, cql_log_density, q_data.detach(), self.cql_temp)
        surrogate = q_drawn - q_data
        return q_data, gap + surrogate - surrogate.detach()

    # ------------------------------------------------------------------ FQE-init (section 3.3)

    def fit_fqe(
        self: SelfOff2OnSAC,
        dataset: Any = None,
        gradient_steps: int = 250_000,
        batch_size: int = 256,
        learning_rate: float = 3e-4,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        progress_bar: bool = False,
        tb_log_name: str | None = None,
    ) -> SelfOff2OnSAC:
        """
        Replace the pretrained, pessimistic critics by those of fitted Q evaluation: new ones that learn the Q-function of each
        member's actor, which stays as it is. It is the paper's ablation FQE-init (section C, from where the defaults are).

        The updates count as those of the offline phase. Called again before anything else is trained, it goes on with the
        critics that it has.

        :param dataset: whatever ``load_dataset`` takes; not needed where the model has one already
        :param gradient_steps: number of updates, on top of those done before
        :param batch_size: rows per member and update
        :param learning_rate: learning rate of the critics
        :param callback: see ``learn_offline``
        :param log_interval: see ``learn_offline``
        :param progress_bar: see ``learn_offline``
        :param tb_log_name: see ``learn_offline``
        :return: the model, ready for ``learn()``
        :raises ValueError: if nothing was pretrained, a number is out of its range, or there is no dataset that fits
        """
        checkpoint_is_of_learn = self._to_complete is not None and self._to_complete[0] == "learn"
        if not checkpoint_is_of_learn and (not self.pretrained or self._handed_over):
            raise ValueError(
                "`fit_fqe()` evaluates pretrained policies before they learn online: call it between `learn_offline()` (or "
                "`set_member()`) and `learn()`"
            )
        for name, value in {"batch_size": batch_size, "learning_rate": learning_rate}.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value}")
        train = partial(self.train_fqe, batch_size=batch_size, learning_rate=learning_rate)
        self._offline_call("fit_fqe", train, dataset, gradient_steps, callback, log_interval, progress_bar, tb_log_name)
        return self

    def train_fqe(self, gradient_steps: int, batch_size: int, learning_rate: float) -> None:
        """
        Updates of fitted Q evaluation, see ``fit_fqe``.

        :param gradient_steps: number of updates
        :param batch_size: rows per update and member
        :param learning_rate: learning rate of the critics
        """
        if self._n_fqe_updates == 0:
            reset_critics(self.policy)
        # Switch to train mode (this affects batch norm / dropout), but for the policy that is evaluated
        self.policy.set_training_mode(True)
        self.actor.set_training_mode(False)
        update_learning_rate(self.critic.optimizer, learning_rate)
        ensemble_size = self.policy.ensemble_size
        for _ in range(gradient_steps):
            self._n_fqe_updates += 1
            self._n_offline_updates += 1
            # Each member learns from a minibatch of its own, as in train_offline()
            replay_data = self.replay_buffer.sample_offline(ensemble_size * batch_size, env=self._vec_normalize_env)
            if self._has_fault(replay_data, ensemble_size):
                continue
            q_values, td_errors = fqe_errors(self.policy, replay_data, self.gamma)
            # Sums over all networks keep them independent: no gradient of one depends on another
            critic_loss = td_errors.pow(2).mean(dim=2).sum()
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            tensors = {"current_q_values": q_values, "td_errors": td_errors, "critic_loss": critic_loss}
            if self._has_fault(replay_data, ensemble_size, self.critic.optimizer, **tensors):
                continue
            self.critic.optimizer.step()

            if self._n_fqe_updates % self.target_update_interval == 0:
                polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

            # Means over the members and their critics
            means = {"fqe_loss": td_errors.detach().pow(2).mean(), "fqe_q_data": q_values.mean()}
            for name, value in means.items():
                self.logger.record_mean(f"offline/{name}", value)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ hand-over

    def _hand_over(self) -> None:
        """Fresh optimizers, target critics equal to critics, entropy coefficient and priorities at their initial values."""
        if self.pretrained:
            self._n_updates = self._n_fqe_updates = 0
            self.policy.reset_optimizers()
            self.critic_target.load_state_dict(self.critic.state_dict())
            if self.log_ent_coef is not None:
                self.log_ent_coef.data.fill_(self._initial_log_ent_coef)
                self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))
        if self._replay_is_balanced:
            self._setup_density_ratio()
            self._reset_priorities()

    def _reset_priorities(self) -> None:
        if self.replay_buffer.scheme == "balanced":
            # Paper, section D: online rows of the first update are drawn with probability rho
            n_new = self.learning_starts
            if n_new == 0:  # the first update comes after `train_freq` steps; as in the paper if that is in episodes
                assert isinstance(self.train_freq, TrainFreq)
                is_steps = self.train_freq.unit == TrainFrequencyUnit.STEP
                n_new = self.train_freq.frequency * self.n_envs if is_steps else 1000
            n_online = min(self.replay_buffer.n_online + n_new, self.replay_buffer.buffer_size * self.n_envs)
            p0 = initial_priority(self.replay_buffer.n_offline, n_online, self.initial_online_fraction)
            self.replay_buffer.reset_priorities(p0)

    # ------------------------------------------------------------------ online phase (Algorithm 2)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        gradient_steps = self._online_gradient_steps(gradient_steps)
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        # Update optimizers learning rate
        optimizers = [self.actor.optimizer]
        if self.ent_coef_optimizer is not None:
            optimizers += [self.ent_coef_optimizer]
        self._update_learning_rate(optimizers)
        # Looked up here, as SB3's users replace `lr_schedule` between two calls of learn()
        qf_learning_rate = (self.qf_lr_schedule or self.lr_schedule)(self._current_progress_remaining)
        update_learning_rate(self.critic.optimizer, qf_learning_rate)

        # Filled in place: scalars that stay, one after each update, would keep the memory between them from being used again
        logged = th.full((6, gradient_steps), math.nan, device=self.device)
        ent_coef_losses, ent_coefs, actor_losses, critic_losses, density_ratio_losses, offline_fractions = logged
        replay_is_balanced = self._replay_is_balanced

        for gradient_step in self._steps_shown(gradient_steps):
            # Lines 13-14 of Algorithm 2
            if replay_is_balanced:
                reference_data, density_ratio_losses[gradient_step] = self._train_density_ratio(batch_size)

            # Sample replay buffer (line 16)
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            if self._has_fault(replay_data):
                continue
            is_offline = to_device(replay_data.indices < self.replay_buffer.n_offline, self.device)
            offline_fractions[gradient_step] = is_offline.float().mean()

            # Action by the ensemble's policy (Eq. 5) for the sampled state
            actions_pi, log_prob = self.actor.action_log_prob(replay_data.observations)  # (batch_size, .), (batch_size,)

            ent_coef_loss = None
            if self.ent_coef_optimizer is not None and self.log_ent_coef is not None:
                # Important: detach the variable from the graph
                # so we don't change it with other losses
                # see https://github.com/rail-berkeley/softlearning/issues/60
                ent_coef = th.exp(self.log_ent_coef.detach())
                assert isinstance(self.target_entropy, float)
                ent_coef_loss = -(self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean()
            else:
                ent_coef = self.ent_coef_tensor

            with th.no_grad():
                # One action of the ensemble's policy, judged by all members
                next_actions, next_log_prob = self.actor.action_log_prob(replay_data.next_observations)
                next_q_values = self.critic_target.member_q_values(replay_data.next_observations, next_actions)
                # Compute the next Q values: min over each member's critics targets (ensemble_size, 1, batch_size)
                next_q_values = next_q_values.min(dim=1, keepdim=True).values
                if self.target_q == "mean":
                    next_q_values = next_q_values.mean(dim=0, keepdim=True)
                # add entropy term
                next_q_values = next_q_values - ent_coef * next_log_prob
                # td error + entropy term
                rewards, dones = replay_data.rewards.view(1, 1, -1), replay_data.dones.view(1, 1, -1)
                target_q_values = rewards + (1 - dones) * self.gamma * next_q_values

            # Get current Q-values estimates for each critic network
            # using action from the replay buffer (ensemble_size, n_critics, batch_size)
            if self.cql_alpha_online > 0:
                current_q_values, gap = self._online_q_values_and_gap(replay_data)
            else:
                current_q_values = self.critic.member_q_values(replay_data.observations, replay_data.actions)
                gap = th.zeros_like(current_q_values)

            # Compute critic loss (line 17): the mean over the batch, the sum over all networks
            td_errors = current_q_values - target_q_values
            critic_loss = 0.5 * (td_errors.pow(2) + self.cql_alpha_online * gap).mean(dim=2).sum()

            # Optimize the critic
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            # Before the agent's first step, so that a faulty minibatch changes nothing
            if self._has_fault(
                replay_data,
                1,
                self.critic.optimizer,
                log_prob=log_prob,
                target_q_values=target_q_values,
                current_q_values=current_q_values,
                gap=gap,
                critic_loss=critic_loss,
            ):
                continue
            self.critic.optimizer.step()
            critic_losses[gradient_step] = critic_loss.detach()
            ent_coefs[gradient_step] = ent_coef

            # Optimize entropy coefficient, also called
            # entropy temperature or alpha in the paper
            if ent_coef_loss is not None and self.ent_coef_optimizer is not None:
                self.ent_coef_optimizer.zero_grad()
                ent_coef_loss.backward()
                self.ent_coef_optimizer.step()
                ent_coef_losses[gradient_step] = ent_coef_loss.detach()

            # Compute actor loss (line 18)
            # Min over each member's critic networks, mean over the members (Eq. 5)
            with frozen(self.critic):
                q_values_pi = self.critic.member_q_values(replay_data.observations, actions_pi)
            mean_qf_pi = q_values_pi.min(dim=1).values.mean(dim=0)  # (batch_size,)
            actor_loss = (ent_coef * log_prob - mean_qf_pi).mean()

            # Optimize the actor
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            if self._has_fault(replay_data, 1, self.actor.optimizer, q_values_pi=mean_qf_pi, actor_loss=actor_loss):
                continue
            self.actor.optimizer.step()
            actor_losses[gradient_step] = actor_loss.detach()

            # Lines 19-22 of Algorithm 2
            if replay_is_balanced:
                self._update_priorities(replay_data, reference_data)

            # Update target networks
            if gradient_step % self.target_update_interval == 0:
                polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
                # Copy running stats, see GH issue #996
                polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/qf_learning_rate", qf_learning_rate)
        self._record_mean("train/ent_coef", ent_coefs)
        self._record_mean("train/actor_loss", actor_losses)
        self._record_mean("train/critic_loss", critic_losses)
        self._record_mean("train/ent_coef_loss", ent_coef_losses)
        self._record_mean("density_ratio/loss", density_ratio_losses)
        if replay_is_balanced and gradient_steps > 0:
            self.logger.record("replay/default_priority", self.replay_buffer.default_priority)
        if self.dataset is not None:
            self._record_mean("replay/offline_fraction", offline_fractions)

    def _record_mean(self, name: str, values: th.Tensor) -> None:
        """
        :param name: what to log
        :param values: one for each update, NaN where there is none; not logged if there is none at all, as of a coefficient
            that is not learned or where faults ended all updates
        """
        mean = values.nanmean().item()
        if not math.isnan(mean):
            self.logger.record(name, mean)

    def _train_density_ratio(self, batch_size: int) -> tuple[BalancedReplayBufferSamples, th.Tensor]:
        """
        One step on Eq. 4.

        :param batch_size: number of online and number of reference samples
        :return: the reference samples and the loss
        """
        assert self.density_ratio is not None
        if self.density_ratio_kwargs.get("reference", "offline") == "offline":
            reference_data = self.replay_buffer.sample_offline(batch_size, env=self._vec_normalize_env)
        else:
            reference_data = self.replay_buffer.sample_uniform(batch_size, env=self._vec_normalize_env)
        online_data = self.replay_buffer.sample_online(batch_size, env=self._vec_normalize_env)
        ratio_online, ratio_reference = self.density_ratio.of_batches(
            (online_data.observations, online_data.actions), (reference_data.observations, reference_data.actions)
        )
        loss = density_ratio_loss(ratio_online, ratio_reference)
        self.density_ratio.optimizer.zero_grad()
        loss.backward()
        optimizer = self.density_ratio.optimizer
        has_fault = self._has_fault(reference_data, density_ratio=ratio_reference)
        if not has_fault and not self._has_fault(online_data, 1, optimizer, density_ratio=ratio_online, loss=loss):
            optimizer.step()
        return reference_data, loss.detach()

    def _update_priorities(
        self, replay_data: BalancedReplayBufferSamples, reference_data: BalancedReplayBufferSamples
    ) -> None:
        """
        Give the rows just learned from their self-normalised density ratio (Eq. 6) as priority.

        :param replay_data: those rows
        :param reference_data: samples of the reference distribution
        """
        assert self.density_ratio is not None
        with th.no_grad():
            ratio, ratio_reference = self.density_ratio.of_batches(
                (replay_data.observations, replay_data.actions), (reference_data.observations, reference_data.actions)
            )
            priorities = density_ratio_priority(ratio, ratio_reference, self.priority_temperature)
        if self._has_fault(replay_data, priorities=priorities):
            return
        self.replay_buffer.update_priorities(replay_data.indices, priorities)

    def _online_q_values_and_gap(self, replay_data: BalancedReplayBufferSamples) -> tuple[th.Tensor, th.Tensor]:
        """
        As ``_q_values_and_gap``, with one minibatch for all members and the actions of the ensemble's policy.

        :param replay_data: the minibatch
        :return: Q-values of its actions and CQL's gap, each of shape ``(ensemble_size, n_critics, batch_size)``
        """
        ensemble_size = self.policy.ensemble_size
        with th.no_grad():
            mean_actions, log_std, _ = self.actor.get_action_dist_params(replay_data.observations)
            next_mean_actions, next_log_std, _ = self.actor.get_action_dist_params(replay_data.next_observations)
            cql_actions, cql_log_density = self._sample_cql_actions(
                (mean_actions.unsqueeze(0), log_std.unsqueeze(0)), (next_mean_actions.unsqueeze(0), next_log_std.unsqueeze(0))
            )
        features = self.critic.extract_member_features(replay_data.observations)
        return self._q_values_and_gap(
            features,
            replay_data.actions.expand(ensemble_size, -1, -1),
            cql_actions.expand(ensemble_size, -1, -1, -1),
            cql_log_density.expand(ensemble_size, -1, -1),
        )

    def dump_logs(self) -> None:
        # Here, as it goes over all priorities
        if self._replay_is_balanced and self._n_updates > 0:
            self.logger.record("replay/effective_sample_size", self.replay_buffer.effective_sample_size())
        super().dump_logs()

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        SB3's. The parameters can be those of a model with a dataset where this one has none yet, or of one with a fixed
        entropy coefficient where this one's is learned.

        :raises TypeError: if they are of a learned entropy coefficient and this model's is fixed
        """
        params = load_path_or_dict
        if not isinstance(params, dict):
            params = load_from_zip_file(params, device=device, load_data=False)[1]
        if "ent_coef_optimizer" in params and self.ent_coef_optimizer is None:
            raise TypeError(  # load() takes a ValueError for that of an old DQN
                f"`ent_coef={self.ent_coef!r}` is fixed, but the entropy coefficient of the saved model is learned: give "
                "'auto' or such as 'auto_0.1'"
            )
        if self.ent_coef_optimizer is not None:  # where a coefficient was fixed that is learned from now on
            own: Any = self.ent_coef_optimizer.state_dict()
            params = {"ent_coef_optimizer": own, **params}
        if self.density_ratio is None and "density_ratio" in params:
            self._setup_density_ratio()
        super().set_parameters(params, exact_match, device)
        if self.density_ratio is not None and "learning_rate" in self.density_ratio_kwargs:
            # The optimizer's state has that of the saved model, which `load(density_ratio_kwargs=...)` may have changed
            update_learning_rate(self.density_ratio.optimizer, self.density_ratio_kwargs["learning_rate"])

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, saved_pytorch_variables = super()._get_torch_save_params()
        # SAC saves a fixed entropy coefficient, too. It is what the argument says, which load() may change
        saved_pytorch_variables = [name for name in saved_pytorch_variables if name != "ent_coef_tensor"]
        state_dicts += ["offline_ent_coef_optimizer", "cql_lagrange_optimizer"]
        saved_pytorch_variables.append("log_cql_lagrange")
        if self._fixed_offline_ent_coef is None:
            saved_pytorch_variables.append("offline_log_ent_coef")
        if self.density_ratio is not None:
            state_dicts += ["density_ratio", "density_ratio.optimizer"]
        return state_dicts, saved_pytorch_variables
