import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp, get_actor_critic_arch
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from torch import nn

from sb3_off2on.buffers import BalancedReplayBuffer, BalancedReplayBufferSamples
from sb3_off2on.offline import OfflineToOnline, check_action_space, check_replay_arguments
from sb3_off2on.policies import (
    EnsembleCnnPolicy,
    EnsembleCQLPolicy,
    EnsembleCritic,
    EnsembleMultiInputPolicy,
    check_layers,
    member_features,
)
from sb3_off2on.stacking import EnsembleModule, frozen, stack_modules
from sb3_off2on.vae import ConditionalVAE


def soft_clipped_double_q(q_values: th.Tensor, bcq_lambda: float) -> th.Tensor:
    """
    ``lambda * min + (1 - lambda) * max`` over a member's critics (Fujimoto et al. 2019, Eq. 13).

    :param q_values: shape ``(ensemble_size, n_critics, ...)``
    :param bcq_lambda: weight of the minimum, in [0, 1]
    :return: shape ``(ensemble_size, ...)``
    """
    return bcq_lambda * q_values.min(dim=1).values + (1 - bcq_lambda) * q_values.max(dim=1).values


class EnsembleNetwork(BaseModel):
    """
    N features extractors, stacked, and what its subclasses put on top.

    :param observation_space: observation space
    :param action_space: action space
    :param features_extractors: one for each member
    :param normalize_images: whether images are divided by 255
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractors: Sequence[BaseFeaturesExtractor],
        normalize_images: bool,
    ) -> None:
        super().__init__(observation_space, action_space, normalize_images=normalize_images)
        self.ensemble_size = len(features_extractors)
        first: Any = features_extractors[0]
        # Those of a saved ensemble come stacked already
        is_stacked = isinstance(first, EnsembleModule)
        self.features_dim = first.template.features_dim if is_stacked else first.features_dim
        self.features_extractor = first if is_stacked else stack_modules(features_extractors)  # type: ignore[assignment]

    def extract_member_features(self, obs: PyTorchObs, per_member: bool) -> th.Tensor:
        """
        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: shape ``(ensemble_size, batch_size, features_dim)``
        """
        return member_features(self, obs, self.ensemble_size, per_member)

    def member_state(self, index: int) -> dict[str, th.Tensor]:
        """
        :param index: which member
        :return: views on its parameters and buffers
        """
        return {name.replace(".template.", "."): value[index] for name, value in self.state_dict().items()}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return {**data, "features_extractors": [self.features_extractor] * self.ensemble_size}


class EnsembleVAE(EnsembleNetwork):
    """
    N conditional VAEs: each member's model of the behaviour.

    :param vae_kwargs: ``latent_dim``, ``net_arch`` and ``activation_fn`` of ``ConditionalVAE``
    :param latent_clip: latents of generated actions are within this distance of 0
    :param n_fixed_latents: number of latents, drawn once for each member, that deterministic actions are made of
    :param kwargs: see ``EnsembleNetwork``
    """

    fixed_latents: th.Tensor

    def __init__(self, vae_kwargs: dict[str, Any], latent_clip: float, n_fixed_latents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        action_dim = get_action_dim(self.action_space)
        members = [ConditionalVAE(self.features_dim, action_dim, **vae_kwargs) for _ in range(self.ensemble_size)]
        self.vae_kwargs = vae_kwargs
        self.latent_clip = latent_clip
        self.model = members[0]
        for name in ("encoder", "decoder"):
            setattr(self.model, name, stack_modules([getattr(member, name) for member in members]))
        fixed_latents = th.randn(self.ensemble_size, n_fixed_latents, self.model.latent_dim)
        self.register_buffer("fixed_latents", fixed_latents.clamp(-latent_clip, latent_clip))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        n_fixed_latents = self.fixed_latents.shape[1]
        return {
            **data,
            "vae_kwargs": self.vae_kwargs,
            "latent_clip": self.latent_clip,
            "n_fixed_latents": n_fixed_latents,
        }

    def member_state(self, index: int) -> dict[str, th.Tensor]:
        # How many latents are fixed depends on the ensemble, not on the member
        return {name: value for name, value in super().member_state(index).items() if name != "fixed_latents"}

    def elbo(self, obs: PyTorchObs, actions: th.Tensor, per_member: bool) -> th.Tensor:
        """
        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param actions: in [-1, 1], shape ``(ensemble_size, batch_size, action_dim)``
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: lower bounds on the actions' log-likelihoods, shape ``(ensemble_size, batch_size)``
        """
        return self.model.elbo(self.extract_member_features(obs, per_member), actions)

    @th.no_grad()
    def log_likelihood(self, obs: PyTorchObs, actions: th.Tensor, n_samples: int = 100) -> th.Tensor:
        """
        Every member's importance-weighted estimate of the behaviour's log-likelihood, see ``ConditionalVAE.log_likelihood``.

        :param obs: ``batch_size`` rows
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :param n_samples: number of latents for each action
        :return: estimates in nats, shape ``(ensemble_size, batch_size)``
        """
        features = self.extract_member_features(obs, per_member=False)
        return self.model.log_likelihood(features, actions.expand(self.ensemble_size, -1, -1), n_samples)

    def forward(self, obs: PyTorchObs, n_actions: int | None, per_member: bool) -> th.Tensor:
        """
        Actions like those of the behaviour.

        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param n_actions: number of actions for each state, or ``None`` for those of the fixed latents
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: shape ``(ensemble_size, n_actions, batch_size, action_dim)``
        """
        features = self.extract_member_features(obs, per_member)
        if n_actions is None:
            latents = self.fixed_latents.unsqueeze(2).expand(-1, -1, features.shape[1], -1)
        else:
            shape = (self.ensemble_size, n_actions, features.shape[1], self.model.latent_dim)
            latents = th.randn(shape, dtype=features.dtype, device=features.device).clamp(-self.latent_clip, self.latent_clip)
        features = features.unsqueeze(1).expand(-1, latents.shape[1], -1, -1)
        actions = self.model.decode(features.flatten(1, 2), latents.flatten(1, 2))
        return actions.view(*latents.shape[:-1], -1)


class EnsemblePerturbation(EnsembleNetwork):
    """
    N perturbation networks: each moves its member's actions by up to ``phi`` to where the critic is higher.

    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function of the hidden layers
    :param phi: largest perturbation, in units of half the action range
    :param kwargs: see ``EnsembleNetwork``
    """

    optimizer: th.optim.Optimizer

    def __init__(self, net_arch: list[int], activation_fn: type[nn.Module], phi: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        action_dim = get_action_dim(self.action_space)
        input_dim = self.features_dim + action_dim
        members = [
            nn.Sequential(*create_mlp(input_dim, action_dim, net_arch, activation_fn, squash_output=True))
            for _ in range(self.ensemble_size)
        ]
        self.net_arch = net_arch
        self.activation_fn = activation_fn
        self.phi = phi
        self.perturbation = stack_modules(members)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return {**data, "net_arch": self.net_arch, "activation_fn": self.activation_fn, "phi": self.phi}

    def forward(self, obs: PyTorchObs, actions: th.Tensor, per_member: bool) -> th.Tensor:
        """
        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param actions: in [-1, 1], shape ``(ensemble_size, n_actions, batch_size, action_dim)``
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: perturbed actions in [-1, 1], same shape
        """
        features = self.extract_member_features(obs, per_member).unsqueeze(1).expand(-1, actions.shape[1], -1, -1)
        inputs = th.cat([features, actions], dim=-1)
        perturbation = self.perturbation(inputs.flatten(1, 2)).view(actions.shape)
        return (actions + self.phi * perturbation).clamp(-1, 1)


class BCQPolicy(EnsembleCQLPolicy):
    """
    N agents, each with a conditional VAE, a perturbation network (``actor``) and ``n_critics`` critics. They act as one: the
    best of the candidates of all members, by the mean over the members of their first critics.

    :param args: see ``EnsembleCQLPolicy``; ``net_arch`` is that of perturbation networks and critics
    :param phi: largest perturbation of an action, in units of half the action range, in [0, 2]
    :param n_candidates: number of actions among which the best is played, in equal parts from all members (rounded up)
    :param vae_net_arch: sizes of the hidden layers of the VAE's encoder and decoder, [750, 750] if ``None``
    :param latent_dim: number of dimensions of the VAE's latents, twice that of actions if ``None``
    :param latent_clip: generated actions come from latents within this distance of 0, > 0
    :param kwargs: see ``EnsembleCQLPolicy``
    :raises ValueError: if an argument is out of its range or not supported
    """

    actor: EnsemblePerturbation  # type: ignore[assignment]
    actor_target: EnsemblePerturbation
    vae: EnsembleVAE

    def __init__(
        self,
        *args: Any,
        phi: float = 0.05,
        n_candidates: int = 100,
        vae_net_arch: list[int] | None = None,
        latent_dim: int | None = None,
        latent_clip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if not 0 <= phi <= 2:
            raise ValueError(f"`phi` must be in [0, 2], got {phi}")
        if not isinstance(n_candidates, int) or n_candidates < 1:
            raise ValueError(f"`n_candidates` must be an integer of at least 1, got {n_candidates!r}")
        check_layers("vae_net_arch", vae_net_arch)
        if not latent_clip > 0:
            raise ValueError(f"`latent_clip` must be above 0, got {latent_clip}")
        if kwargs.get("share_features_extractor", False):
            raise ValueError(
                "`share_features_extractor=True` is not supported, remove it: VAE, perturbation network and critic learn "
                "features of their own, each from its own loss"
            )
        self.phi = phi
        self.n_candidates = n_candidates
        self.vae_net_arch = [750, 750] if vae_net_arch is None else vae_net_arch
        self.latent_dim = latent_dim
        self.latent_clip = latent_clip
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.actor_target = self.make_actor()
        self.actor_target.load_state_dict(self.actor.state_dict())
        # Target networks should always be in eval mode
        self.actor_target.set_training_mode(False)
        self.vae = self.make_vae()
        self.vae.optimizer = self.optimizer_class(
            self.vae.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _stacked_networks(self) -> list[nn.Module]:
        networks = [self.actor.perturbation, self.actor_target.perturbation, self.vae.model.encoder, self.vae.model.decoder]
        return [*networks, self.critic.qf, self.critic_target.qf]

    def _network_kwargs(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "features_extractors": [self.make_features_extractor() for _ in range(self.ensemble_size)],
            "normalize_images": self.normalize_images,
        }

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> EnsemblePerturbation:  # type: ignore[override]
        assert features_extractor is None  # none is shared
        net_arch, _ = get_actor_critic_arch(self.net_arch)
        return EnsemblePerturbation(net_arch, self.activation_fn, self.phi, **self._network_kwargs()).to(self.device)

    def make_vae(self) -> EnsembleVAE:
        vae_kwargs = {
            "latent_dim": self.latent_dim,
            "net_arch": self.vae_net_arch,
            "activation_fn": self.activation_fn,
        }
        n_fixed_latents = math.ceil(self.n_candidates / self.ensemble_size)
        return EnsembleVAE(vae_kwargs, self.latent_clip, n_fixed_latents, **self._network_kwargs()).to(self.device)

    def reset_optimizers(self) -> None:
        super().reset_optimizers()
        (group,) = self.vae.optimizer.param_groups
        self.vae.optimizer = self.optimizer_class(group["params"], lr=group["lr"], **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param observation: ``batch_size`` rows
        :param deterministic: whether the candidates come from latents that were drawn once, or from new ones
        :return: actions in [-1, 1], shape ``(batch_size, action_dim)``
        """
        n_candidates = None if deterministic else self.vae.fixed_latents.shape[1]
        candidates = self.vae(observation, n_candidates, per_member=False)
        candidates = self.actor(observation, candidates, per_member=False).flatten(0, 1)
        features = self.critic.extract_member_features(observation)
        q_values = self.critic.q_values_of_many(features, candidates.expand(self.ensemble_size, -1, -1, -1))
        # First critics, mean over members: (ensemble_size * n_candidates, batch_size)
        best = q_values[:, 0].mean(dim=0).argmax(dim=0)
        return candidates[best, th.arange(len(best), device=best.device)]

    def member_states(self, index: int) -> dict[str, dict[str, th.Tensor]]:
        states = super().member_states(index)
        return {**states, "actor_target": self.actor_target.member_state(index), "vae": self.vae.member_state(index)}

    def set_member(self, index: int, member: dict[str, dict[str, th.Tensor]]) -> None:
        """
        See ``EnsembleCQLPolicy.set_member``.

        :param index: which member
        :param member: state dicts as ``get_member`` returns them; ``actor_target`` and ``critic_target`` can be missing
        :raises ValueError: if there is no such member, or a network, name or shape does not fit
        """
        for network in ("actor", "vae"):
            if network not in member:
                raise ValueError(f"`member` must hold the state dict '{network}', got {sorted(member)}")
        super().set_member(index, {"actor_target": member["actor"], **member})

    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(mode)
        self.vae.set_training_mode(mode)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("phi", "n_candidates", "vae_net_arch", "latent_dim", "latent_clip"):
            data[name] = getattr(self, name)
        return data


class BCQCnnPolicy(BCQPolicy, EnsembleCnnPolicy):
    """``BCQPolicy`` for image observations, see ``EnsembleCnnPolicy``."""


class BCQMultiInputPolicy(BCQPolicy, EnsembleMultiInputPolicy):
    """``BCQPolicy`` for dict observations, see ``EnsembleMultiInputPolicy``."""


class BCQ(OfflineToOnline):
    """
    Batch-Constrained deep Q-learning (Fujimoto et al. 2019) for continuous actions: Q-learning over actions that a conditional
    VAE generates, close to those of the replay. The same update offline and online, which makes it the baseline BCQ-ft of Lee
    et al. (2021). With ``ensemble_size`` above 1, N agents learn independently and act as one, see ``BCQPolicy``.

    Paper: https://arxiv.org/abs/1812.02900

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy); ``ensemble_size`` is one of its arguments
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: learning rate of VAE, perturbation network and critics, in both phases
    :param buffer_size: size of the online part of the replay buffer
    :param learning_starts: how many steps to collect before learning starts: played by the pretrained agents,
        at random (as in TD3) where nothing was pretrained
    :param batch_size: rows per update in the online phase
    :param tau: see TD3
    :param gamma: see TD3
    :param train_freq: see TD3
    :param gradient_steps: see TD3
    :param action_noise: see TD3; without it, actions vary by the candidates that are drawn
    :param replay_buffer_class: ``BalancedReplayBuffer`` or a class derived from it
    :param replay_buffer_kwargs: its ``scheme`` is ``uniform`` unless it is set to ``online``, ``offline`` or ``symmetric``
    :param optimize_memory_usage: not supported, see ``BalancedReplayBuffer``
    :param n_steps: not supported, must be 1
    :param stats_window_size: see TD3
    :param tensorboard_log: see TD3
    :param policy_kwargs: see ``BCQPolicy``
    :param verbose: see TD3
    :param seed: see TD3
    :param device: see TD3
    :param _init_setup_model: see TD3
    :param dataset: whatever ``load_dataset`` takes; also possible later with ``set_dataset()`` or ``learn_offline()``
    :param offline_gradient_steps: updates of the offline phase that ``learn()`` does first, once. With 0, a dataset only
        serves the replay, unless ``learn_offline()`` is called
    :param offline_batch_size: rows per member and update in the offline phase
    :param first_update_multiplier: the first online update of pretrained agents takes this many times ``learning_starts``
        gradient steps
    :param bcq_lambda: weight of the smaller Q-value in the target, in [0, 1]; the larger has the rest
    :param n_target_actions: number of generated actions over which the target takes the maximum
    :param on_fault: what to do about NaN, infinity and exploding Q-values: ``"raise"`` stops with a ``NumericalFault`` that
        names the cause, ``"skip"`` leaves such steps and updates out and counts them
    :param max_abs_q: Q-values beyond it count as exploding
    :raises ValueError: if an argument is out of its range or not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": BCQPolicy,
        "CnnPolicy": BCQCnnPolicy,
        "MultiInputPolicy": BCQMultiInputPolicy,
    }
    policy: BCQPolicy
    actor: EnsemblePerturbation
    actor_target: EnsemblePerturbation
    critic: EnsembleCritic
    critic_target: EnsembleCritic
    vae: EnsembleVAE
    replay_buffer: BalancedReplayBuffer

    def __init__(
        self,
        policy: str | type[BCQPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 1000,
        batch_size: int = 100,
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
        offline_batch_size: int = 100,
        first_update_multiplier: int = 1,
        bcq_lambda: float = 0.75,
        n_target_actions: int = 10,
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
        if not issubclass(self.policy_class, BCQPolicy):
            raise ValueError(f"`policy` must be a name or derived from BCQPolicy, got {self.policy_class.__name__}")
        self.dataset = dataset
        self.offline_gradient_steps = offline_gradient_steps
        self.offline_batch_size = offline_batch_size
        self.first_update_multiplier = first_update_multiplier
        self.bcq_lambda = bcq_lambda
        self.n_target_actions = n_target_actions
        self.on_fault = on_fault
        self.max_abs_q = max_abs_q

        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        self._check_at_least(offline_gradient_steps=0, offline_batch_size=1, first_update_multiplier=1, n_target_actions=1)
        self._check_integers("first_update_multiplier", "n_target_actions")
        self._check_number("bcq_lambda")
        if not 0 <= self.bcq_lambda <= 1:
            raise ValueError(f"`bcq_lambda` must be in [0, 1], got {self.bcq_lambda}")
        self._replay_without_priorities()

    def _setup_model(self) -> None:
        super()._setup_model()
        self._create_aliases()
        # Running mean and running var
        self.actor_batch_norm_stats = get_parameters_by_name(self.actor, ["running_"])
        self.critic_batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.actor_batch_norm_stats_target = get_parameters_by_name(self.actor_target, ["running_"])
        self.critic_batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.actor_target = self.policy.actor_target
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.vae = self.policy.vae

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [self.vae.optimizer, self.actor.optimizer, self.critic.optimizer]

    def _update(self, replay_data: BalancedReplayBufferSamples, per_member: bool) -> dict[str, th.Tensor]:
        # The members are independent agents in both phases, but online they learn from the same minibatches
        ensemble_size = self.policy.ensemble_size
        n_batches = ensemble_size if per_member else 1
        obs, next_obs = replay_data.observations, replay_data.next_observations
        # (ensemble_size, batch_size, action_dim)
        actions = replay_data.actions.view(n_batches, -1, replay_data.actions.shape[-1]).expand(ensemble_size, -1, -1)
        rewards = replay_data.rewards.view(n_batches, 1, -1)
        dones = replay_data.dones.view(n_batches, 1, -1)

        # Sums over the members keep them independent: no gradient of one depends on another
        vae_loss = -self.vae.elbo(obs, actions, per_member).mean(dim=1).sum()
        # Optimize the VAE
        self.vae.optimizer.zero_grad()
        vae_loss.backward()
        if self._has_fault(replay_data, n_batches, self.vae.optimizer, vae_loss=vae_loss):
            return {}
        self.vae.optimizer.step()

        with th.no_grad():
            # Generated and perturbed actions (ensemble_size, n_target_actions, batch_size, action_dim)
            next_actions = self.vae(next_obs, self.n_target_actions, per_member)
            next_actions = self.actor_target(next_obs, next_actions, per_member)
            # Compute the next Q-values: soft minimum over the critics, maximum over the actions
            next_features = self.critic_target.extract_member_features(next_obs, per_member)
            next_q_values = self.critic_target.q_values_of_many(next_features, next_actions)
            next_q_values = soft_clipped_double_q(next_q_values, self.bcq_lambda).max(dim=1, keepdim=True).values
            target_q_values = rewards + (1 - dones) * self.gamma * next_q_values  # (ensemble_size, 1, batch_size)

        # Get current Q-values estimates for each critic network (ensemble_size, n_critics, batch_size)
        current_q_values = self.critic.member_q_values(obs, actions, per_member)
        # Compute critic loss
        critic_loss = (current_q_values - target_q_values).pow(2).mean(dim=2).sum()

        # Optimize the critics
        self.critic.optimizer.zero_grad()
        critic_loss.backward()
        q_values_and_loss = {
            "target_q_values": target_q_values,
            "current_q_values": current_q_values,
            "critic_loss": critic_loss,
        }
        if self._has_fault(replay_data, n_batches, self.critic.optimizer, **q_values_and_loss):
            return {}
        self.critic.optimizer.step()

        # Compute actor loss: the first critic's value of a generated and perturbed action
        with th.no_grad():
            generated_actions = self.vae(obs, 1, per_member)
        perturbed_actions = self.actor(obs, generated_actions, per_member).squeeze(1)
        with frozen(self.critic):
            q_values_pi = self.critic.member_q_values(obs, perturbed_actions, per_member)[:, 0]
        actor_loss = -q_values_pi.mean(dim=1).sum()

        # Optimize the actor
        self.actor.optimizer.zero_grad()
        actor_loss.backward()
        if self._has_fault(replay_data, n_batches, self.actor.optimizer, q_values_pi=q_values_pi, actor_loss=actor_loss):
            return {}
        self.actor.optimizer.step()

        # Update target networks
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.actor.parameters(), self.actor_target.parameters(), self.tau)
        # Copy running stats, see GH issue #996
        polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
        polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)

        return {
            "vae_loss": vae_loss.detach() / ensemble_size,
            "critic_loss": critic_loss.detach() / (ensemble_size * self.critic.n_critics),
            "actor_loss": actor_loss.detach() / ensemble_size,
            "q_data": current_q_values.mean().detach(),
        }

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "actor", "actor_target", "critic", "critic_target", "vae"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "vae.optimizer", "actor.optimizer", "critic.optimizer"], []
