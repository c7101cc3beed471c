import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.sac.policies import Actor
from torch import nn
from torch.distributions import Normal

from sb3_off2on.buffers import BalancedReplayBuffer, BalancedReplayBufferSamples
from sb3_off2on.offline import OfflineToOnline, check_action_space, check_replay_arguments
from sb3_off2on.policies import (
    EnsembleActor,
    EnsembleCnnPolicy,
    EnsembleCQLPolicy,
    EnsembleCritic,
    EnsembleMultiInputPolicy,
    moment_matching,
)

# Bounds of the policy's log standard deviations, which start half-way (the published code)
LOG_STD_MIN = -6.0
LOG_STD_MAX = 0.0


def advantage_weights(advantages: th.Tensor, awac_lambda: float) -> th.Tensor:
    """
    Weights ``exp(A / lambda) / Z`` of the actor's regression (Nair et al. 2020). As in the published code, Z is the mean over
    the batch instead of one value for each state: the weights average to 1, and nothing overflows.

    :param advantages: shape ``(n_members, batch_size)``
    :param awac_lambda: temperature, > 0; the larger, the closer to behaviour cloning
    :return: weights, same shape
    """
    assert advantages.dim() == 2
    return advantages.shape[1] * th.softmax(advantages / awac_lambda, dim=1)


class StateIndependentLogStd(nn.Module):
    """
    Bounded log standard deviations that are the same in all states.

    :param action_dim: number of action dimensions
    """

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(th.zeros(action_dim))

    def forward(self, latent_pi: th.Tensor) -> th.Tensor:
        """
        :param latent_pi: shape ``(batch_size, latent_dim)``, of which only the batch size counts
        :return: shape ``(batch_size, action_dim)``
        """
        log_std = LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * th.sigmoid(self.logits)
        return log_std.expand(*latent_pi.shape[:-1], -1)


class GaussianActor(Actor):
    """
    SB3's actor with the published head: a Gaussian around a tanh, with state-independent standard deviations.

    :param actor_kwargs: see ``Actor``
    """

    def __init__(self, **actor_kwargs: Any) -> None:
        super().__init__(**actor_kwargs)
        self.mu = nn.Sequential(self.mu, nn.Tanh())
        self.log_std = StateIndependentLogStd(get_action_dim(self.action_space))  # type: ignore[assignment]


class EnsembleGaussianActor(EnsembleActor):
    """
    N Gaussian actors. The Gaussian itself is not squashed, so that actions on the bounds have a finite likelihood; what is
    played is clipped to [-1, 1].

    :param members: alike but for their parameters
    :param actor_kwargs: what they were built with
    """

    member_class = GaussianActor

    def __init__(self, members: Sequence[GaussianActor] | int, **actor_kwargs: Any) -> None:
        super().__init__(members, **actor_kwargs)
        self.action_dist = DiagGaussianDistribution(get_action_dim(self.action_space))  # type: ignore[assignment]

    def distribution(self, obs: PyTorchObs, per_member: bool) -> Normal:
        """
        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param per_member: each member's own Gaussian for rows of its own; otherwise the moment-matched one (Eq. 5 of Lee et
            al. 2021)
        :return: distribution of shape ``(ensemble_size, batch_size, action_dim)``, or ``(1, batch_size, action_dim)``
        """
        mean_actions, log_std = self.member_action_dist_params(obs, per_member)
        if not per_member:
            mean_actions, log_std = (x.unsqueeze(0) for x in moment_matching(mean_actions, log_std))
        return Normal(mean_actions, th.exp(log_std), validate_args=False)  # as ``SquashedGaussian``

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._gaussian_actions(obs, deterministic).clamp(-1, 1)


class AWACPolicy(EnsembleCQLPolicy):
    """
    N Gaussian actors and N x ``n_critics`` critics.

    :param args: see ``EnsembleCQLPolicy``
    :param actor_weight_decay: weight decay of the actors' optimizer, >= 0; the critics' is that of ``optimizer_kwargs``
    :param kwargs: see ``EnsembleCQLPolicy``
    :raises ValueError: if ``actor_weight_decay`` is negative, or another argument is not supported
    """

    actor: EnsembleGaussianActor

    def __init__(self, *args: Any, actor_weight_decay: float = 1e-4, **kwargs: Any) -> None:
        if not actor_weight_decay >= 0:
            raise ValueError(f"`actor_weight_decay` must be at least 0, got {actor_weight_decay}")
        self.actor_weight_decay = actor_weight_decay
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self._set_weight_decay()

    def _set_weight_decay(self) -> None:
        (group,) = self.actor.optimizer.param_groups
        if "weight_decay" in group:
            group["weight_decay"] = self.actor_weight_decay
        elif self.actor_weight_decay > 0:
            raise ValueError(
                f"`optimizer_class={self.optimizer_class.__name__}` has no weight decay: set `actor_weight_decay=0`"
            )

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> EnsembleGaussianActor:
        kwargs = [self._update_features_extractor(self.actor_kwargs, features_extractor) for _ in range(self.ensemble_size)]
        return EnsembleGaussianActor([GaussianActor(**member_kwargs) for member_kwargs in kwargs], **kwargs[0]).to(self.device)

    def reset_optimizers(self) -> None:
        super().reset_optimizers()
        self._set_weight_decay()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "actor_weight_decay": self.actor_weight_decay}


class AWACCnnPolicy(AWACPolicy, EnsembleCnnPolicy):
    """``AWACPolicy`` for image observations, see ``EnsembleCnnPolicy``."""


class AWACMultiInputPolicy(AWACPolicy, EnsembleMultiInputPolicy):
    """``AWACPolicy`` for dict observations, see ``EnsembleMultiInputPolicy``."""


class AWAC(OfflineToOnline):
    """
    Advantage Weighted Actor Critic (Nair et al. 2020): critics as in SAC without entropy, and an actor that imitates the
    replay's actions, the more the higher their advantage. The same update offline and online.

    With ``ensemble_size`` above 1 it is the baseline of Lee et al. (2021): N independent agents learn from the dataset, then
    act and learn as one, as those of ``Off2OnSAC``.

    Paper: https://arxiv.org/abs/2006.09359

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy); ``ensemble_size`` is one of its arguments
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of actor and critics, in both phases
    :param buffer_size: size of the online part of the replay buffer
    :param learning_starts: how many steps to collect before learning starts: played by the pretrained agents,
        at random (as in SAC) where nothing was pretrained
    :param batch_size: rows per update in the online phase
    :param tau: see SAC
    :param gamma: see SAC
    :param train_freq: see SAC
    :param gradient_steps: see SAC
    :param action_noise: see SAC
    :param replay_buffer_class: ``BalancedReplayBuffer`` or a class derived from it
    :param replay_buffer_kwargs: its ``scheme`` is ``uniform`` unless it is set to ``online``, ``offline`` or ``symmetric``
    :param optimize_memory_usage: not supported, see ``BalancedReplayBuffer``
    :param n_steps: not supported, must be 1
    :param stats_window_size: see SAC
    :param tensorboard_log: see SAC
    :param policy_kwargs: see ``AWACPolicy``
    :param verbose: see SAC
    :param seed: see SAC
    :param device: see SAC
    :param _init_setup_model: see SAC
    :param dataset: whatever ``load_dataset`` takes; also possible later with ``set_dataset()`` or ``learn_offline()``
    :param offline_gradient_steps: updates of the offline phase that ``learn()`` does first, once. With 0, a dataset only
        serves the replay, unless ``learn_offline()`` is called
    :param offline_batch_size: rows per member and update in the offline phase
    :param first_update_multiplier: the first online update of pretrained agents takes this many times ``learning_starts``
        gradient steps
    :param awac_lambda: temperature of the advantage weights, > 0; the larger, the closer to behaviour cloning
    :param on_fault: what to do about NaN, infinity and exploding Q-values: ``"raise"`` stops with a ``NumericalFault`` that
        names the cause, ``"skip"`` leaves such steps and updates out and counts them
    :param max_abs_q: Q-values beyond it count as exploding
    :raises ValueError: if an argument is out of its range or not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": AWACPolicy,
        "CnnPolicy": AWACCnnPolicy,
        "MultiInputPolicy": AWACMultiInputPolicy,
    }
    policy: AWACPolicy
    actor: EnsembleGaussianActor
    critic: EnsembleCritic
    critic_target: EnsembleCritic
    replay_buffer: BalancedReplayBuffer

    def __init__(
        self,
        policy: str | type[AWACPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 1000,
        batch_size: int = 1024,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1000,
        gradient_steps: int = -1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        dataset: Any = None,
        offline_gradient_steps: int = 0,
        offline_batch_size: int = 128,
        first_update_multiplier: int = 1,
        awac_lambda: float = 2.0,
        on_fault: str = "raise",
        max_abs_q: float = 1e8,
    ):
        super().__init__(
            policy,
            check_action_space(env, verbose),  # type: ignore[arg-type]
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=check_replay_arguments(replay_buffer_class, n_steps),
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        if not issubclass(self.policy_class, AWACPolicy):
            raise ValueError(f"`policy` must be a name or derived from AWACPolicy, got {self.policy_class.__name__}")
        self.dataset = dataset
        self.offline_gradient_steps = offline_gradient_steps
        self.offline_batch_size = offline_batch_size
        self.first_update_multiplier = first_update_multiplier
        self.awac_lambda = awac_lambda
        self.on_fault = on_fault
        self.max_abs_q = max_abs_q

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        self._check_at_least(offline_gradient_steps=0, offline_batch_size=1, first_update_multiplier=1)
        self._check_integers("first_update_multiplier")
        self._check_number("awac_lambda")
        if not 0 < self.awac_lambda < math.inf:
            raise ValueError(f"`awac_lambda` must be above 0 and finite, got {self.awac_lambda}")
        self._replay_without_priorities()

    def _setup_model(self) -> None:
        super()._setup_model()
        self._create_aliases()
        # Running mean and running var
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.actor.optimizer, self.critic.optimizer]

    def _update(self, replay_data: BalancedReplayBufferSamples, per_member: bool) -> dict[str, th.Tensor]:
        # Offline, the members are independent agents. Online they are one: a policy that matches their moments, judged by the
        # mean over the members (Eq. 5 of Lee et al. 2021)
        ensemble_size = self.policy.ensemble_size
        n_policies = ensemble_size if per_member else 1
        obs, next_obs = replay_data.observations, replay_data.next_observations
        policy_actions = replay_data.actions.view(n_policies, -1, replay_data.actions.shape[-1])
        actions = policy_actions.expand(ensemble_size, -1, -1)  # (ensemble_size, batch_size, action_dim)
        rewards = replay_data.rewards.view(n_policies, 1, -1)
        dones = replay_data.dones.view(n_policies, 1, -1)

        with th.no_grad():
            # Select action according to policy, clipped as the one that is played
            next_actions = self.actor.distribution(next_obs, per_member).sample().clamp(-1, 1).expand_as(actions)
            next_q_values = self.critic_target.member_q_values(next_obs, next_actions, per_member)
            # Compute the next Q values: min over each member's critics targets (ensemble_size, 1, batch_size)
            next_q_values = next_q_values.min(dim=1, keepdim=True).values
            target_q_values = rewards + (1 - dones) * self.gamma * next_q_values

        # Get current Q-values estimates for each critic network (ensemble_size, n_critics, batch_size)
        current_q_values = self.critic.member_q_values(obs, actions, per_member)
        # Compute critic loss. Sums over the members keep them independent: no gradient of one depends on another
        critic_loss = 0.5 * (current_q_values - target_q_values).pow(2).mean(dim=2).sum()

        # Optimize the critic
        self.critic.optimizer.zero_grad()
        critic_loss.backward()
        # Before the first step, so that a faulty minibatch changes nothing
        q_values_and_loss = {
            "target_q_values": target_q_values,
            "current_q_values": current_q_values,
            "critic_loss": critic_loss,
        }
        if self._has_fault(replay_data, n_policies, self.critic.optimizer, **q_values_and_loss):
            return {}
        self.critic.optimizer.step()

        distribution = self.actor.distribution(obs, per_member)
        with th.no_grad():
            # Advantage over one action of the policy, min over each member's critics (ensemble_size, batch_size)
            actions_pi = distribution.sample().clamp(-1, 1).expand_as(actions)
            q_values = self.critic.member_q_values(obs, actions, per_member).min(dim=1).values
            q_values_pi = self.critic.member_q_values(obs, actions_pi, per_member).min(dim=1).values
            advantages = q_values - q_values_pi
            if not per_member:
                advantages = advantages.mean(dim=0, keepdim=True)
            weights = advantage_weights(advantages, self.awac_lambda)  # (n_policies, batch_size)

        # Compute actor loss: weighted likelihood of the replay's actions
        log_prob = distribution.log_prob(policy_actions).sum(dim=-1)
        assert log_prob.shape == weights.shape
        # The sum over members while they are independent. When they act as one, each gets as large a gradient as alone
        actor_loss = -ensemble_size * (weights * log_prob).mean()

        # Optimize the actor
        self.actor.optimizer.zero_grad()
        actor_loss.backward()
        if self._has_fault(
            replay_data, n_policies, self.actor.optimizer, weights=weights, log_prob=log_prob, actor_loss=actor_loss
        ):
            return {}
        self.actor.optimizer.step()

        # Update target networks
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        # Copy running stats, see GH issue #996
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

        return {
            "critic_loss": critic_loss.detach() / (ensemble_size * self.critic.n_critics),
            "actor_loss": actor_loss.detach() / ensemble_size,
            "q_data": q_values.mean().detach(),
            "advantage": advantages.mean().detach(),
            "max_weight": weights.max(dim=1).values.mean().detach(),
            "std": distribution.stddev.mean().detach(),
        }

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "critic", "critic_target"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []
