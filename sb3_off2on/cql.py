"""Conservative Q-learning, CQL(H), and Cal-QL's lower bound: pure functions on tensors."""

import math

import torch as th


def uniform_log_density(action_dim: int) -> float:
    """
    Log-density of the uniform distribution over SB3's scaled actions.

    :param action_dim: number of action dimensions
    :return: ``log(0.5 ** action_dim)``, as the box is [-1, 1]
    """
    return action_dim * math.log(0.5)


def cql_gap(q_sampled: th.Tensor, log_density: th.Tensor, q_data: th.Tensor, temperature: float = 1.0) -> th.Tensor:
    """
    CQL(H)'s conservative term, ``temperature * log sum_a exp(Q(s, a) / temperature) - Q(s, a_data)`` (Kumar et al. 2020,
    Eq. 4; Lee et al. 2021, Eq. 3), with the sum over actions estimated by importance sampling.

    As in the published code, the constant ``temperature * log(n_actions)`` of the estimate's mean is left out.

    :param q_sampled: Q-values of sampled actions, shape ``(ensemble_size, n_critics, n_actions, batch_size)``
    :param log_density: log-densities the actions were drawn with, shape ``(ensemble_size, n_actions, batch_size)``
    :param q_data: Q-values of the dataset's actions, shape ``(ensemble_size, n_critics, batch_size)``
    :param temperature: softmax temperature, > 0
    :return: the gap, unreduced, shape ``(ensemble_size, n_critics, batch_size)``
    """
    assert q_sampled.shape[:1] + q_sampled.shape[2:] == log_density.shape, (q_sampled.shape, log_density.shape)
    assert q_sampled.shape[:2] + q_sampled.shape[3:] == q_data.shape, (q_sampled.shape, q_data.shape)
    logits = q_sampled / temperature - log_density.unsqueeze(1)
    return temperature * th.logsumexp(logits, dim=2) - q_data


def draw_softmax_actions(q_sampled: th.Tensor, log_density: th.Tensor, temperature: float = 1.0) -> th.Tensor:
    """
    For each critic and state, draw one of the sampled actions from the softmax in ``cql_gap``.

    The gradient of the log-sum-exp is ``E_{a ~ softmax}[dQ(s, a)/dtheta]``, so the gradient of Q at the drawn action is an
    unbiased estimate of it, from one action in the graph instead of all.

    :param q_sampled: Q-values of sampled actions, shape ``(ensemble_size, n_critics, n_actions, batch_size)``
    :param log_density: log-densities the actions were drawn with, shape ``(ensemble_size, n_actions, batch_size)``
    :param temperature: softmax temperature, > 0
    :return: indices of the drawn actions, shape ``(ensemble_size, n_critics, batch_size)``
    """
    logits = q_sampled / temperature - log_density.unsqueeze(1)
    # By inverse transform sampling: one random number per draw instead of one per action, and no logarithms of them
    cumulated = logits.softmax(dim=2).cumsum(dim=2)
    total = cumulated[:, :, -1:]
    return (cumulated < th.rand_like(total) * total).sum(dim=2)


def calql_lower_bound(q_policy: th.Tensor, mc_returns: th.Tensor) -> th.Tensor:
    """
    Cal-QL: Q-values of the policy's actions are not pushed below the behaviour's value (Nakamoto et al. 2023, Eq. 5.1).

    :param q_policy: Q-values of actions of the policy, shape ``(ensemble_size, n_critics, n_actions, batch_size)``
    :param mc_returns: discounted return-to-go of the dataset at those states, shape ``(ensemble_size, batch_size)``
    :return: the larger of the two, shape ``(ensemble_size, n_critics, n_actions, batch_size)``
    """
    assert (q_policy.shape[0], q_policy.shape[-1]) == mc_returns.shape
    return th.maximum(q_policy, mc_returns[:, None, None, :])
