"""
The ensemble of N actors and N x ``n_critics`` critics, stacked: every parameter of SB3's ``Actor`` and ``ContinuousCritic``
gets a leading member axis, so that one batched product serves all members. State dicts of single members carry SB3's own
names, which is what lets an agent trained with ``SAC`` become a member.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import BaseModel, BasePolicy, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor, SACPolicy
from torch import nn
from torch.distributions import Normal
from torch.utils._pytree import tree_map

from sb3_off2on.faults import NumericalFault, is_fine
from sb3_off2on.stacking import EnsembleLinear, EnsembleModule, EnsembleSequential, stack_modules

# On a CPU, hidden layers of this many rows (1 MB at 256 units) stay in the second-level cache
MAX_ROWS_AT_ONCE = 1024
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_layers(name: str, layers: Any, alternative: str = "") -> None:
    """
    :param name: of the argument
    :param layers: sizes of the hidden layers, ``None`` for the default
    :param alternative: what else the argument may be, for the message
    :raises ValueError: if they are not integers of at least 1
    """
    is_list = isinstance(layers, (list, tuple))
    if layers is not None and not (is_list and all(isinstance(size, int) and size >= 1 for size in layers)):
        raise ValueError(f"`{name}` must be a list of integers of at least 1{alternative}, got {layers!r}")


def member_features(network: BaseModel, obs: PyTorchObs, ensemble_size: int, per_member: bool) -> th.Tensor:
    """
    Features of the observations for every member, SB3's ``extract_features`` with a member axis.

    :param network: an ensemble whose ``features_extractor`` was stacked
    :param obs: ``batch_size`` rows seen by all members, or ``ensemble_size * batch_size`` rows, those of member 0 first
    :param ensemble_size: number of members N
    :param per_member: whether each member has rows of its own
    :return: shape ``(ensemble_size, batch_size, features_dim)``
    """
    preprocessed_obs = preprocess_obs(obs, network.observation_space, normalize_images=network.normalize_images)
    extractor = network.features_extractor
    assert extractor is not None
    if isinstance(extractor, EnsembleModule):
        if per_member:
            preprocessed_obs = tree_map(lambda x: x.reshape(ensemble_size, -1, *x.shape[1:]), preprocessed_obs)
        return extractor(preprocessed_obs, per_member)
    features = extractor(preprocessed_obs)
    if per_member:
        return features.reshape(ensemble_size, -1, features.shape[-1])
    return features.expand(ensemble_size, *features.shape)


def moment_matching(mean_actions: th.Tensor, log_std: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Gaussian with the mean and the variance of the members' mixture, before the squashing (Lee et al. 2021, Eq. 5).

    The variance is the mean of ``sigma^2 + (mu - mean)^2``: the equation's ``E[mu^2 + sigma^2] - mean^2`` cancels in float32.

    :param mean_actions: means of the members, shape ``(ensemble_size, batch_size, action_dim)``
    :param log_std: logarithms of their standard deviations, same shape
    :return: mean and log standard deviation (within SAC's limits), each of shape ``(batch_size, action_dim)``
    """
    assert mean_actions.shape == log_std.shape
    assert mean_actions.dim() == 3
    mixture_mean = mean_actions.mean(dim=0)
    deviation = mean_actions - mixture_mean
    variance = th.addcmul(th.exp(2 * log_std), deviation, deviation).mean(dim=0)
    return mixture_mean, th.clamp(0.5 * th.log(variance), LOG_STD_MIN, LOG_STD_MAX)


class SquashedGaussian(SquashedDiagGaussianDistribution):
    """
    SB3's, whose parameters PyTorch does not check: an accelerator would be waited for each time, and in training the error
    would come before the one that names the cause.
    """

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "SquashedGaussian":
        self.distribution = Normal(mean_actions, log_std.exp(), validate_args=False)
        return self


class CheckedPolicy(BasePolicy):
    """Mixin of the policy and of its actor, whose ``predict()`` raises an error in place of an action that is NaN."""

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        :param observation: of one or of several environments
        :param state: not used, as there are no recurrent networks
        :param episode_start: not used
        :param deterministic: whether to play the mode of the distribution in place of a sample
        :return: actions, and ``state``
        :raises NumericalFault: if an action is NaN
        """
        actions, state = super().predict(observation, state, episode_start, deterministic)
        if np.isnan(actions).any():
            bad = [name for name, parameter in self.named_parameters() if not is_fine(parameter)]
            cause = "the observation holds NaN, infinity or values too large for the networks: repair it"
            if bad:
                cause = f"the parameter `{bad[0]}` is not finite: load the last checkpoint"
            raise NumericalFault(f"An action is NaN, as {cause}")
        return actions, state


class EnsembleActor(CheckedPolicy, Actor):
    """
    N of SB3's actors. Where SB3 asks for *the* action distribution it gets the moment-matched mixture (Eq. 5). ``forward``,
    whose actions are played, draws from it without ``action_dist``.

    :param members: SB3 actors, alike but for their parameters; or how many new ones to build, as ``load()`` does
    :param actor_kwargs: what they were built with
    """

    member_class: type[Actor] = Actor
    latent_pi: EnsembleSequential

    def __init__(self, members: Sequence[Actor] | int, **actor_kwargs: Any) -> None:
        # Built without memory or random numbers: every network is replaced by the members' in the next lines
        with th.device("meta"):
            super().__init__(**actor_kwargs)
        if isinstance(members, int):
            members = [self.member_class(**actor_kwargs) for _ in range(members)]
        self.ensemble_size = len(members)
        self.action_dist = SquashedGaussian(get_action_dim(self.action_space))  # type: ignore[assignment]
        extractors = [member.features_extractor for member in members]
        # That of a saved ensemble comes stacked already
        is_stacked = isinstance(extractors[0], EnsembleModule)
        self.features_extractor = extractors[0] if is_stacked else stack_modules(extractors)  # type: ignore[assignment]
        for name in ("latent_pi", "mu", "log_std"):
            setattr(self, name, stack_modules([getattr(member, name) for member in members]))

    def member_action_dist_params(self, obs: PyTorchObs, per_member: bool = False) -> tuple[th.Tensor, th.Tensor]:
        """
        Every member's own Gaussian, before the squashing.

        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: means and log standard deviations, each of shape ``(ensemble_size, batch_size, action_dim)``
        """
        return self._params_of_features(member_features(self, obs, self.ensemble_size, per_member))

    def _params_of_features(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean_actions, log_std = self.latent_pi.with_heads(features, self.mu, self.log_std)  # type: ignore[arg-type]
        return mean_actions, th.clamp(log_std, LOG_STD_MIN, LOG_STD_MAX)

    def sample_from_params(
        self, mean_actions: th.Tensor, log_std: th.Tensor, n_samples: int = 1
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Squashed actions of given Gaussians and their log-probabilities, with gradient.

        :param mean_actions: shape ``(n_members, batch_size, action_dim)``
        :param log_std: same shape
        :param n_samples: number of actions of each Gaussian
        :return: actions in [-1, 1], shape ``(n_members, n_samples, batch_size, action_dim)``,
            and log-probabilities, shape ``(n_members, n_samples, batch_size)``
        """
        n_members, batch_size, action_dim = mean_actions.shape
        shape = (n_members, n_samples, batch_size, action_dim)
        rows = [x.unsqueeze(1).expand(shape).reshape(-1, action_dim) for x in (mean_actions, log_std)]
        actions, log_prob = self.action_dist.log_prob_from_params(*rows)
        return actions.view(shape), log_prob.view(shape[:-1])

    def log_prob_of_actions(self, mean_actions: th.Tensor, log_std: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Log-likelihood of given actions, with gradient to the parameters of the Gaussians.

        :param mean_actions: shape ``(n_members, batch_size, action_dim)``
        :param log_std: same shape
        :param actions: in [-1, 1], same shape; on the bounds, SB3 takes the next number inside
        :return: shape ``(n_members, batch_size)``
        """
        mean_rows, log_std_rows, action_rows = (x.flatten(0, 1) for x in (mean_actions, log_std, actions))
        distribution = SquashedGaussian(actions.shape[-1]).proba_distribution(mean_rows, log_std_rows)
        return distribution.log_prob(action_rows).view(actions.shape[:2])

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        mean_actions, log_std = moment_matching(*self.member_action_dist_params(obs))
        return mean_actions, log_std, {}

    def _gaussian_actions(self, obs: PyTorchObs, deterministic: bool) -> th.Tensor:
        """
        :param obs: ``batch_size`` rows
        :param deterministic: whether to take the means of the moment-matched Gaussians, or samples
        :return: shape ``(batch_size, action_dim)``
        """
        features = member_features(self, obs, self.ensemble_size, per_member=False)
        # Takes less time than ``no_grad``, but its tensors never have a gradient: so not what a user's extractor may keep, nor
        # what ``forward`` returns
        with th.inference_mode(not th.is_grad_enabled()):
            if deterministic:  # the standard deviations are left out
                return self.mu(self.latent_pi(features)).mean(dim=0)
            mean_actions, log_std = moment_matching(*self._params_of_features(features))
            return mean_actions + log_std.exp() * th.randn_like(mean_actions)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return th.tanh(self._gaussian_actions(obs, deterministic))

    def member_state(self, index: int) -> dict[str, th.Tensor]:
        """
        :param index: which member
        :return: views on its parameters and buffers, under the names that they have in SB3's ``Actor``
        """
        return {name.replace(".template.", "."): value[index] for name, value in self.state_dict().items()}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "members": self.ensemble_size}


class LayerNormCritic(ContinuousCritic):
    """
    SB3's critic with a layer norm after every hidden linear layer.

    :param critic_kwargs: see ``ContinuousCritic``
    """

    def __init__(self, **critic_kwargs: Any) -> None:
        super().__init__(**critic_kwargs)
        input_dim = critic_kwargs["features_dim"] + get_action_dim(self.action_space)
        net_arch, activation_fn = critic_kwargs["net_arch"], critic_kwargs["activation_fn"]
        for idx in range(self.n_critics):
            layers = create_mlp(input_dim, 1, net_arch, activation_fn, post_linear_modules=[nn.LayerNorm])
            self.q_networks[idx] = nn.Sequential(*layers)
            setattr(self, f"qf{idx}", self.q_networks[idx])


class EnsembleCritic(BaseModel):
    """
    N of SB3's critics, each of ``n_critics`` networks, as ``N * n_critics`` stacked networks (those of member 0 first).

    :param members: SB3 critics, alike but for their parameters
    """

    qf: EnsembleSequential

    def __init__(self, members: Sequence[ContinuousCritic]) -> None:
        first = members[0]
        super().__init__(first.observation_space, first.action_space, normalize_images=first.normalize_images)
        self.ensemble_size = len(members)
        self.n_critics = first.n_critics
        self.share_features_extractor = first.share_features_extractor
        extractors = [member.features_extractor for member in members]
        # One that is shared with the actor comes stacked already
        shared = isinstance(extractors[0], EnsembleModule)
        self.features_extractor = extractors[0] if shared else stack_modules(extractors)  # type: ignore[assignment]
        self.qf = stack_modules([q_network for member in members for q_network in member.q_networks])  # type: ignore[assignment]

    def extract_member_features(self, obs: PyTorchObs, per_member: bool = False) -> th.Tensor:
        """
        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: shape ``(ensemble_size, batch_size, features_dim)``
        """
        # SB3 trains a features extractor that is shared with the actor through the actor's loss only
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return member_features(self, obs, self.ensemble_size, per_member)

    def q_values(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param features: shape ``(ensemble_size, batch_size, features_dim)``
        :param actions: in [-1, 1], broadcast to ``(ensemble_size, n_critics, batch_size, action_dim)``
        :return: shape ``(ensemble_size, n_critics, batch_size)``
        """
        leading = (self.ensemble_size, self.n_critics, features.shape[1])
        features = features.unsqueeze(1).expand(*leading, -1)
        q_input = th.cat([features, actions.expand(*leading, -1)], dim=-1)
        return self.qf(q_input.flatten(0, 1)).view(leading)

    def q_values_of_many(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Q-values of several actions at each state. Without gradient and on a CPU, where nearly all of CQL's arithmetic is,
        network by network and in pieces that fit the cache: the same values, faster.

        :param features: shape ``(ensemble_size, batch_size, features_dim)``
        :param actions: in [-1, 1], shape ``(ensemble_size, n_actions, batch_size, action_dim)``
        :return: shape ``(ensemble_size, n_critics, n_actions, batch_size)``
        """
        n_actions, batch_size = actions.shape[1:3]
        shape = (self.ensemble_size, self.n_critics, n_actions, batch_size)
        if th.is_grad_enabled() or actions.device.type != "cpu" or not isinstance(self.qf[0], EnsembleLinear):
            rows = features.repeat(1, n_actions, 1), actions.flatten(1, 2).unsqueeze(1)
            return self.q_values(*rows).view(shape)
        features, actions = (x.repeat_interleave(self.n_critics, dim=0) for x in (features, actions))
        return self.qf.of_pairs(features, actions, MAX_ROWS_AT_ONCE).view(shape)

    def member_q_values(self, obs: PyTorchObs, actions: th.Tensor, per_member: bool = False) -> th.Tensor:
        """
        Every critic's own estimate.

        :param obs: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)`` or ``(ensemble_size, batch_size, action_dim)``
        :param per_member: whether each member has rows of its own (those of member 0 first)
        :return: shape ``(ensemble_size, n_critics, batch_size)``
        """
        if actions.dim() == 3:
            actions = actions.unsqueeze(1)
        return self.q_values(self.extract_member_features(obs, per_member), actions)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        SB3's interface: one tensor of shape ``(batch_size, 1)`` per network, those of member 0 first.

        :param obs: ``batch_size`` rows
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :return: ``ensemble_size * n_critics`` tensors
        """
        return tuple(self.member_q_values(obs, actions).flatten(0, 1).unsqueeze(-1))

    def member_state(self, index: int) -> dict[str, th.Tensor]:
        """
        :param index: which member
        :return: views on its parameters and buffers, under the names that they have in SB3's ``ContinuousCritic``
        """
        state = {}
        for stacked_name, value in self.state_dict().items():
            name = stacked_name.replace(".template.", ".")
            if name.startswith("qf."):
                for idx in range(self.n_critics):
                    state[name.replace("qf.", f"qf{idx}.", 1)] = value[index * self.n_critics + idx]
            else:
                state[name] = value[index]
        return state


class EnsembleCQLPolicy(CheckedPolicy, SACPolicy):
    """
    Policy with N actors and N x ``n_critics`` critics for both phases: N independent CQL agents offline, one agent online
    whose action distribution is the moment-matched mixture of the N (Eq. 5).

    :param args: those of SB3's ``SACPolicy``
    :param ensemble_size: number of members N
    :param critic_layer_norm: whether every hidden layer of the critics is followed by a layer norm
    :param compile_mode: compile the stacked networks with ``th.compile`` in this mode, e.g. ``"default"``, or
        ``"reduce-overhead"`` for CUDA graphs; ``None`` for no compilation
    :param kwargs: those of SB3's ``SACPolicy``, without gSDE's
    :raises ValueError: if ``ensemble_size`` or ``n_critics`` is below 1, ``compile_mode`` is unknown, or an argument of gSDE
        is given
    """

    actor: EnsembleActor
    critic: EnsembleCritic  # type: ignore[assignment]
    critic_target: EnsembleCritic  # type: ignore[assignment]

    def __init__(
        self,
        *args: Any,
        ensemble_size: int = 5,
        critic_layer_norm: bool = False,
        compile_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(ensemble_size, bool) or not isinstance(ensemble_size, int) or ensemble_size < 1:
            raise ValueError(f"`ensemble_size` must be an integer of at least 1, got {ensemble_size!r}")
        n_critics = kwargs.get("n_critics", 2)
        if isinstance(n_critics, bool) or not isinstance(n_critics, int) or n_critics < 1:
            raise ValueError(f"`n_critics` must be an integer of at least 1, got {n_critics!r}")
        net_arch = kwargs.get("net_arch")
        for layers in net_arch.values() if isinstance(net_arch, dict) else [net_arch]:
            check_layers("net_arch", layers, ", or a dict of such for pi and qf")
        if kwargs.get("use_sde", False):
            raise ValueError(
                "`use_sde=True` is not supported: the ensemble acts with the Gaussian that matches the moments of its members "
                "(Eq. 5 of the paper), and gSDE's noise, which depends on one actor's features, has no such mixture. "
                "Use `action_noise` for more exploration"
            )
        if compile_mode is not None and compile_mode not in COMPILE_MODES:
            raise ValueError(f"`compile_mode` must be None or one of {', '.join(COMPILE_MODES)}, got {compile_mode!r}")
        for name in ("log_std_init", "use_expln", "clip_mean"):
            if name in kwargs:
                raise ValueError(f"`{name}` only has a meaning with gSDE (`use_sde=True`), which is not supported: remove it")
        # The parameters of all members at once: PyTorch's plain Adam goes over that memory a dozen times in each update
        optimizer_kwargs = kwargs.get("optimizer_kwargs") or {}
        is_adam = kwargs.get("optimizer_class", th.optim.Adam) in (th.optim.Adam, th.optim.AdamW)
        if is_adam and not {"foreach", "differentiable"} & set(optimizer_kwargs):
            kwargs["optimizer_kwargs"] = {"fused": True, **optimizer_kwargs}
        self.ensemble_size = ensemble_size
        self.critic_layer_norm = critic_layer_norm
        self.compile_mode = compile_mode
        super().__init__(*args, **kwargs)
        if compile_mode is not None:
            # Both phases, predictions and evaluations make a dozen kinds of call, above Dynamo's limit of 8 for a function
            th._dynamo.config.recompile_limit = max(th._dynamo.config.recompile_limit, 32)
            for network in self._stacked_networks():
                network.compile(mode=compile_mode)  # in place: parameters keep their names

    def set_training_mode(self, mode: bool) -> None:
        # predict() leaves training mode each time: a quarter of the time for one observation, to go through all modules
        if mode or self.training or self.actor.training or self.critic.training:
            super().set_training_mode(mode)

    def _stacked_networks(self) -> list[nn.Module]:
        """:return: those that are worth compiling"""
        return [self.actor.latent_pi, self.critic.qf, self.critic_target.qf]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> EnsembleActor:
        members = [super(EnsembleCQLPolicy, self).make_actor(features_extractor) for _ in range(self.ensemble_size)]
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, members[0].features_extractor)
        return EnsembleActor(members, **actor_kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> EnsembleCritic:  # type: ignore[override]
        critic_class = LayerNormCritic if self.critic_layer_norm else ContinuousCritic
        if isinstance(features_extractor, EnsembleModule):  # the actor's, stacked: the members only need its size
            features_dim = features_extractor.template.features_dim
            kwargs = [dict(self.critic_kwargs, features_extractor=features_extractor, features_dim=features_dim)]
            kwargs *= self.ensemble_size
        else:
            kwargs = [
                self._update_features_extractor(self.critic_kwargs, features_extractor) for _ in range(self.ensemble_size)
            ]
        return EnsembleCritic([critic_class(**member_kwargs) for member_kwargs in kwargs]).to(self.device)

    def reset_optimizers(self) -> None:
        """Give actor and critic fresh optimizers, of the same kind and on the same parameters."""
        for network in (self.actor, self.critic):
            parameters = network.optimizer.param_groups[0]["params"]
            learning_rate = network.optimizer.param_groups[0]["lr"]
            network.optimizer = self.optimizer_class(parameters, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    def member_states(self, index: int) -> dict[str, dict[str, th.Tensor]]:
        """
        :param index: which member
        :return: views on its parameters: a state dict for each of ``actor``, ``critic`` and ``critic_target``
        :raises ValueError: if there is no such member
        """
        if not 0 <= index < self.ensemble_size:
            raise ValueError(f"`index` must be between 0 and {self.ensemble_size - 1} (`ensemble_size - 1`), got {index}")
        return {
            "actor": self.actor.member_state(index),
            "critic": self.critic.member_state(index),
            "critic_target": self.critic_target.member_state(index),
        }

    def get_member(self, index: int) -> dict[str, dict[str, th.Tensor]]:
        """
        Take one member out, as state dicts that SB3's ``Actor`` and ``ContinuousCritic`` load.

        :param index: which member
        :return: copies of the state dicts of ``actor``, ``critic`` and ``critic_target``
        :raises ValueError: if there is no such member
        """
        return {
            network: {name: value.clone() for name, value in state.items()}
            for network, state in self.member_states(index).items()
        }

    def set_member(self, index: int, member: dict[str, dict[str, th.Tensor]]) -> None:
        """
        Put an agent that was trained elsewhere in the place of one member. Nothing is written unless everything fits.

        :param index: which member
        :param member: state dicts of ``actor`` and ``critic`` under SB3's names, and of ``critic_target``
            (the critic's where it is missing), e.g. ``{"actor": sac.actor.state_dict(), "critic": sac.critic.state_dict()}``
        :raises ValueError: if there is no such member, or a network, name or shape does not fit
        """
        states = self.member_states(index)
        unknown = set(member) - set(states)
        missing = {"actor", "critic"} - set(member)
        if unknown or missing:
            raise ValueError(
                f"`member` must hold the state dicts 'actor', 'critic' and, optionally, 'critic_target', got {sorted(member)}"
            )
        member = {"critic_target": member["critic"], **member}
        for network, state in states.items():
            given = {name: th.as_tensor(value) for name, value in member[network].items()}
            if set(given) != set(state):
                raise ValueError(
                    f"The parameters of `member['{network}']` do not fit: missing {sorted(set(state) - set(given))}, "
                    f"not known {sorted(set(given) - set(state))}. Build the model with the `policy_kwargs` of that agent"
                )
            for name, value in given.items():
                if value.shape != state[name].shape:
                    raise ValueError(
                        f"`member['{network}']['{name}']` has shape {tuple(value.shape)} but the ensemble's is "
                        f"{tuple(state[name].shape)}. Build the model with the `policy_kwargs` of that agent"
                    )
        if self.share_features_extractor:
            actor, critic = member["actor"], member["critic"]
            for name in (name for name in states["actor"] if name.startswith("features_extractor.")):
                if not th.equal(th.as_tensor(actor[name]), th.as_tensor(critic[name])):
                    raise ValueError(
                        f"Actor and critic of `member` differ in '{name}', shared with `share_features_extractor=True`"
                    )
        with th.no_grad():
            for network, state in states.items():
                for name, view in state.items():
                    view.copy_(th.as_tensor(member[network][name]))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("use_sde", "log_std_init", "use_expln", "clip_mean"):
            del data[name]
        data["share_features_extractor"] = self.share_features_extractor
        data["ensemble_size"] = self.ensemble_size
        data["critic_layer_norm"] = self.critic_layer_norm
        data["compile_mode"] = self.compile_mode
        return data


class EnsembleCnnPolicy(EnsembleCQLPolicy):
    """
    ``EnsembleCQLPolicy`` for image observations: SB3's ``NatureCNN``, one for each member, unless told otherwise.

    :param args: see ``EnsembleCQLPolicy``
    :param features_extractor_class: features extractor of a member
    :param kwargs: see ``EnsembleCQLPolicy``
    """

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class EnsembleMultiInputPolicy(EnsembleCQLPolicy):
    """
    ``EnsembleCQLPolicy`` for dict observations: SB3's ``CombinedExtractor``, one for each member, unless told otherwise.

    :param args: see ``EnsembleCQLPolicy``
    :param features_extractor_class: features extractor of a member
    :param kwargs: see ``EnsembleCQLPolicy``
    """

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)
