"""What SB3's callbacks do not measure or guard when offline training goes over into online training."""

import os
import signal
import threading
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import sync_envs_normalization

from sb3_off2on.checkpoint import find_checkpoints
from sb3_off2on.datasets import normalized_score
from sb3_off2on.offline import OfflineToOnline
from sb3_off2on.policies import EnsembleCritic
from sb3_off2on.schedules import ScaledSchedule


def _check_parent(callback: BaseCallback) -> None:
    """:raises ValueError: if the callback's parent, which it knows once training starts, is not an ``EvalCallback``"""
    if not isinstance(callback.parent, EvalCallback):
        name = type(callback).__name__
        raise ValueError(f"{name} works on evaluations: pass `EvalCallback(eval_env, callback_after_eval={name}(...))`")


class NormalizedScoreCallback(BaseCallback):
    """
    Log D4RL's normalized score of every evaluation: 0 for a random policy, 100 for an expert.

    It must be used with SB3's ``EvalCallback``, as its ``callback_after_eval``. With both scores given, it works for any
    SB3 algorithm.

    :param ref_min_score: return of a random policy; if neither is given, both are those of the model's dataset
    :param ref_max_score: return of an expert
    :param verbose: see ``BaseCallback``
    :raises ValueError: if only one score is given, or they are not in order. When training starts: if there are none, or if
        the callback is used without an ``EvalCallback``
    """

    parent: EvalCallback

    def __init__(self, ref_min_score: float | None = None, ref_max_score: float | None = None, verbose: int = 0):
        super().__init__(verbose)
        if (ref_min_score is None) != (ref_max_score is None):
            raise ValueError(
                f"Give both scores or neither, got `ref_min_score={ref_min_score}` and `ref_max_score={ref_max_score}`"
            )
        if ref_min_score is not None and ref_max_score is not None and not ref_min_score < ref_max_score:
            raise ValueError(f"`ref_min_score={ref_min_score}` must be below `ref_max_score={ref_max_score}`")
        self.ref_min_score = ref_min_score
        self.ref_max_score = ref_max_score

    def _scores(self) -> tuple[float, float]:
        if self.ref_min_score is not None and self.ref_max_score is not None:
            return self.ref_min_score, self.ref_max_score
        dataset = getattr(self.model, "dataset", None)
        if dataset is None or dataset.ref_min_score is None or dataset.ref_max_score is None:
            raise ValueError(
                "The model has no dataset with reference scores: use "
                "`NormalizedScoreCallback(ref_min_score=..., ref_max_score=...)`"
            )
        return dataset.ref_min_score, dataset.ref_max_score

    def _init_callback(self) -> None:
        self._scores()

    def _on_training_start(self) -> None:
        _check_parent(self)

    def _on_step(self) -> bool:
        self.logger.record("eval/normalized_score", normalized_score(self.parent.last_mean_reward, *self._scores()))
        # The parent has just dumped its own values: without another dump, the score would get a later timestep
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        return True


def auroc(seen: np.ndarray, unseen: np.ndarray) -> float:
    """
    Area under the ROC curve of a score that should be higher for what was seen: the probability that a seen sample scores
    higher than an unseen one, where a tie counts 1/2. Exact, in O((n + m) log m).

    :param seen: scores of the seen samples, any shape, ``n`` in all
    :param unseen: scores of the unseen samples, any shape, ``m`` in all
    :return: between 0 and 1; NaN if a score is NaN
    :raises ValueError: if there are no seen or no unseen samples
    """
    if seen.size == 0 or unseen.size == 0:
        raise ValueError(f"`seen` and `unseen` must not be empty, got {seen.size} and {unseen.size} scores")
    if np.isnan(seen).any() or np.isnan(unseen).any():
        return float("nan")
    ranked = np.sort(unseen, axis=None)
    n_below = np.searchsorted(ranked, seen, side="left").sum()
    n_not_above = np.searchsorted(ranked, seen, side="right").sum()
    return float(n_below + n_not_above) / (2 * seen.size * unseen.size)


class ActionAUROCCallback(BaseCallback):
    """
    Log how well the Q-functions tell state-action pairs that were seen from random actions at the same states (Lee et al.
    2021, Fig. 4b and 10): AUROC with ``Q(s, a)`` as the score, for each member and for the ensemble.

    Our reading of the paper: the real pairs are those collected online so far, here a uniform minibatch of them. Each gets
    50 actions, uniform over the action space. In ``auroc/...``, all real pairs are held against all fake ones, also those of
    other states: one AUROC over the whole set. How much Q varies between states limits it, whatever Q says of actions; in
    ``auroc_per_state/...`` each real pair is held against the fake ones at its own state, and the mean taken. Q of a member is
    the minimum over its critics, Q of the ensemble the mean over the members, which is what the policy maximises.
    As long as nothing was collected online, the pairs are those of the dataset instead.

    Random numbers come from a generator of its own: training is the same to the last bit with and without the callback.

    :param eval_freq: compute every ``eval_freq`` call of the callback, counted through both phases
    :param batch_size: number of real pairs, drawn without replacement; all where there are fewer
    :param n_actions: number of random actions at each of their states
    :param seed: seed of its random numbers
    :param verbose: see ``BaseCallback``
    :raises ValueError: if a number is below 1; when training starts, if the model is no ensemble
    """

    model: OfflineToOnline

    def __init__(
        self, eval_freq: int = 1000, batch_size: int = 256, n_actions: int = 50, seed: int | None = 0, verbose: int = 0
    ):
        super().__init__(verbose)
        for name, value in {"eval_freq": eval_freq, "batch_size": batch_size, "n_actions": n_actions}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.eval_freq = eval_freq
        self.batch_size = batch_size
        self.n_actions = n_actions
        self._rng = np.random.default_rng(seed)

    def _init_callback(self) -> None:
        if not isinstance(getattr(self.model.policy, "critic", None), EnsembleCritic):
            raise ValueError(
                "ActionAUROCCallback needs a model whose policy has an ensemble of critics, e.g. an Off2OnSAC, "
                f"got a {type(self.model).__name__}"
            )

    def _on_step(self) -> bool:
        buffer = self.model.replay_buffer
        assert buffer is not None
        first, n_rows = (buffer.n_offline, buffer.n_online) if buffer.n_online > 0 else (0, buffer.n_offline)
        # Without a dataset, nothing was seen before the first online step
        if self.n_calls % self.eval_freq != 0 or n_rows == 0:
            return True
        indices = first + self._rng.choice(n_rows, size=min(self.batch_size, n_rows), replace=False)
        replay_data = buffer._get_samples(indices, env=self.model._vec_normalize_env)
        # Action 0 is the real one: (1 + n_actions, batch_size, action_dim)
        shape = (self.n_actions, *replay_data.actions.shape)
        random_actions = th.as_tensor(self._rng.uniform(-1, 1, shape)).to(replay_data.actions)
        actions = th.cat([replay_data.actions.unsqueeze(0), random_actions])

        critic = self.model.policy.critic
        assert isinstance(critic, EnsembleCritic)
        # Dropout would draw random numbers, and batch norm would learn from this batch
        was_training = self.model.policy.training
        self.model.policy.set_training_mode(False)
        with th.no_grad():
            features = critic.extract_member_features(replay_data.observations)
            q_values = critic.q_values_of_many(features, actions.expand(len(features), -1, -1, -1))
        self.model.policy.set_training_mode(was_training)

        # (ensemble_size, 1 + n_actions, batch_size)
        member_q_values = q_values.min(dim=1).values.cpu().numpy()
        scores = {f"member_{index}": q_values_of_member for index, q_values_of_member in enumerate(member_q_values)}
        scores["ensemble"] = member_q_values.mean(axis=0)
        for name, values in scores.items():  # (1 + n_actions, batch_size)
            self.logger.record(f"auroc/{name}", auroc(values[0], values[1:]))
            self.logger.record(f"auroc_per_state/{name}", np.mean([auroc(state[:1], state[1:]) for state in values.T]))
        return True


class OfflineShareCallback(BaseCallback):
    """
    Log which share of the draws falls on some of the dataset's rows (Lee et al. 2021, Fig. 5b, where they are the random
    ones): the probability of drawing one of them now, by the scheme and the priorities of the replay. Of the online phase.

    :param rows: which of the dataset's rows, bool, shape ``(n_transitions,)``
    :param name: logged as ``replay/{name}_share``
    :param eval_freq: compute every ``eval_freq`` call of the callback
    :param verbose: see ``BaseCallback``
    :raises ValueError: if ``eval_freq`` is below 1. When training starts: if the model has no dataset, or one of another size
    """

    model: OfflineToOnline

    def __init__(self, rows: np.ndarray, name: str, eval_freq: int = 1000, verbose: int = 0):
        super().__init__(verbose)
        if eval_freq < 1:
            raise ValueError(f"`eval_freq` must be at least 1, got {eval_freq}")
        self.rows = np.asarray(rows)
        self.name = name
        self.eval_freq = eval_freq

    def _init_callback(self) -> None:
        dataset = getattr(self.model, "dataset", None)
        if dataset is None:
            raise ValueError("OfflineShareCallback needs a model with a dataset: pass `dataset=...` or call `set_dataset()`")
        if self.rows.shape != (len(dataset),) or self.rows.dtype != np.bool_:
            raise ValueError(
                f"`rows` must be one bool for each of the dataset's {len(dataset)} transitions, "
                f"got {self.rows.dtype} of shape {self.rows.shape}"
            )

    def share(self) -> float:
        """:return: the share at this moment, between 0 and 1; NaN as long as the scheme has nothing to draw from"""
        buffer = self.model.replay_buffer
        assert buffer is not None
        n_offline, n_online = buffer.n_offline, buffer.n_online
        weights = np.ones(n_offline + n_online)
        if buffer.scheme == "balanced":
            priorities = buffer.priorities(np.arange(n_offline + n_online))
            weights = priorities.cpu().numpy() if isinstance(priorities, th.Tensor) else priorities
        elif buffer.scheme in ("offline", "online"):
            weights[n_offline:] = buffer.scheme == "online"
            weights[:n_offline] = buffer.scheme == "offline"
        elif buffer.scheme == "symmetric":
            weights[n_offline:] = n_offline / max(n_online, 1)
        with np.errstate(invalid="ignore"):
            return float(weights[:n_offline][self.rows].sum() / weights.sum())

    def _on_step(self) -> bool:
        if self.model._handed_over and self.n_calls % self.eval_freq == 0:
            self.logger.record(f"replay/{self.name}_share", self.share())
        return True


def _get_state(model: BaseAlgorithm) -> tuple[dict[str, Any], dict[str, Any]]:
    """:return: copies of what SB3 saves of a model's tensors: state dicts (of networks and optimizers) and variables"""
    variables = {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]}
    return deepcopy((model.get_parameters(), variables))


def _set_state(model: BaseAlgorithm, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    # A copy, because an optimizer goes on with the very tensors that it loads
    parameters, variables = deepcopy(state)
    model.set_parameters(parameters)
    for name, value in variables.items():
        # In place, because an optimizer holds the variable
        recursive_getattr(model, name).data = value.data


class CollapseGuardCallback(BaseCallback):
    """
    Guard the pretrained policy in the online phase. An evaluation whose mean return is below

    ``threshold = floor + min_share * (offline_return - floor)``

    (or NaN) is a fall: the model goes back to its last good state, and on from there with lower learning rates. The formula
    measures from the floor, so that a share has a meaning for negative returns too.

    It must be used with SB3's ``EvalCallback``, as its ``callback_after_eval``, for any algorithm with an offline phase. It
    acts from the first online update on.

    - The offline return is that of the policy handed over: one evaluation with the settings of the ``EvalCallback``, when
      ``learn()`` starts. Best or last evaluation of the offline phase would be that of another policy, and the best of many
      noisy means is too high.
    - The good state is that of the last evaluation without a fall, at first that of the hand-over. It contains what SB3 saves
      of a model's tensors: networks, target networks, optimizers, entropy coefficient, density ratio. It is a copy in
      memory, on the model's device.
    - The replay buffer and the statistics of ``VecNormalize`` stay as they are: the failed experience is information. So do
      counters, and with them the schedules.
    - Each fall multiplies ``learning_rate`` and ``qf_learning_rate`` of the online phase by ``learning_rate_factor``, in the
      model itself: a saved model has the lower rates when it is loaded. The density ratio keeps its rate.

    :param min_share: share of the offline return, above the floor, that must be kept; in [0, 1]
    :param max_restores: this restore ends the training, with the model in its last good state; at least 1
    :param learning_rate_factor: in (0, 1]; 1 keeps the learning rates
    :param offline_return: offline return, where it is known; needed to continue a run that had left the offline policy
        behind, as the evaluation would be of the policy that it starts with
    :param floor: return of a policy that has nothing to lose; by default the dataset's ``ref_min_score``, or without one the
        lowest return of its episodes
    :param verbose: 1 to print restores, 0 for no output
    :raises ValueError: if an argument is out of its range. When training starts: if there is neither floor nor dataset, the
        model has no offline phase, or the callback is used without an ``EvalCallback``
    """

    model: OfflineToOnline
    parent: EvalCallback

    def __init__(
        self,
        min_share: float = 0.5,
        max_restores: int = 3,
        learning_rate_factor: float = 0.5,
        offline_return: float | None = None,
        floor: float | None = None,
        verbose: int = 1,
    ):
        super().__init__(verbose)
        if not 0 <= min_share <= 1:
            raise ValueError(f"`min_share` must be in [0, 1], got {min_share}")
        if max_restores < 1:
            raise ValueError(f"`max_restores` must be at least 1, got {max_restores}")
        if not 0 < learning_rate_factor <= 1:
            raise ValueError(f"`learning_rate_factor` must be in (0, 1], got {learning_rate_factor}")
        for name, value in {"offline_return": offline_return, "floor": floor}.items():
            if value is not None and not np.isfinite(value):
                raise ValueError(f"`{name}` must be finite, got {value}")
        self.min_share = min_share
        self.max_restores = max_restores
        self.learning_rate_factor = learning_rate_factor
        self.offline_return = offline_return
        self.floor = floor
        self.threshold = -np.inf
        self.n_restores = 0
        self._good_state: tuple[dict[str, Any], dict[str, Any]] | None = None

    def _init_callback(self) -> None:
        if not isinstance(self.model, OfflineToOnline):
            raise ValueError(
                "CollapseGuardCallback needs a model with an offline phase, e.g. an Off2OnSAC, "
                f"got a {type(self.model).__name__}"
            )
        if self.floor is None and self.model.dataset is None:
            raise ValueError("The model has no dataset to take the floor from: use `CollapseGuardCallback(floor=...)`")

    def _on_training_start(self) -> None:
        _check_parent(self)
        if "gradient_steps" in self.locals:  # those of learn_offline(); learn() has handed over when it comes here
            return
        # Otherwise an online phase goes on that this guard knows from its start
        if self.model._n_updates == 0 or self._good_state is None:
            self._start()
        # SB3 does not tell the children of a callback when training ends, so this cannot wait till then
        n_calls = -(-(self.locals["total_timesteps"] - self.num_timesteps) // self.model.n_envs)
        if self.parent.eval_freq <= 0 or self.parent.n_calls % self.parent.eval_freq + n_calls < self.parent.eval_freq:
            warnings.warn(
                f"CollapseGuardCallback has nothing to act on: `eval_freq={self.parent.eval_freq}` asks for no evaluation in "
                f"the {n_calls} calls of this training. Use a lower `eval_freq`"
            )

    def _start(self) -> None:
        """Take the threshold and the first good state from the model as it is."""
        floor, offline_return = self.floor, self.offline_return
        if floor is None:
            dataset = self.model.dataset
            assert dataset is not None
            floor = float(dataset.episode_returns.min()) if dataset.ref_min_score is None else dataset.ref_min_score
        if offline_return is None:
            offline_return = self._evaluate()
        if offline_return > floor:
            self.threshold = floor + self.min_share * (offline_return - floor)
        else:
            self.threshold = -np.inf
            warnings.warn(
                f"CollapseGuardCallback can see no fall: the offline return {offline_return:.2f} is not above the floor "
                f"{floor:.2f}, so there is nothing to lose. Use a lower `floor` if there is"
            )
        self.n_restores = 0
        self._good_state = _get_state(self.model)

    def _evaluate(self) -> float:
        """:return: mean return, as the parent would measure it"""
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.parent.eval_env)
        mean_return, _ = evaluate_policy(
            self.model,
            self.parent.eval_env,
            n_eval_episodes=self.parent.n_eval_episodes,
            deterministic=self.parent.deterministic,
            warn=self.parent.warn,
        )
        assert isinstance(mean_return, float)
        return mean_return

    def _on_step(self) -> bool:
        # Before the first online update there is no change to judge
        if not self.model._handed_over or self.model._n_updates == 0:
            return True
        if self._good_state is None:
            raise ValueError("CollapseGuardCallback must be the `callback_after_eval`, not the `callback_on_new_best`")
        mean_return = self.parent.last_mean_reward
        # A NaN is below any threshold
        is_fall = not (mean_return >= self.threshold)
        if is_fall:
            _set_state(self.model, self._good_state)
            self._lower_learning_rates()
            self.n_restores += 1
            if self.verbose >= 1:
                print(
                    f"The mean return {mean_return:.2f} fell below {self.threshold:.2f}: "
                    f"back to the last good state (restore {self.n_restores} of {self.max_restores})"
                )
        else:
            self._good_state = _get_state(self.model)
        self.logger.record("collapse_guard/threshold", self.threshold)
        self.logger.record("collapse_guard/n_restores", self.n_restores)
        return not (is_fall and self.n_restores >= self.max_restores)

    def _lower_learning_rates(self) -> None:
        # The arguments too, of which load() makes the schedules anew. Numbers stay numbers
        for name in ("learning_rate", "qf_learning_rate"):
            value = getattr(self.model, name, None)
            if callable(value):
                setattr(self.model, name, ScaledSchedule(value, self.learning_rate_factor))
            elif value is not None:
                setattr(self.model, name, self.learning_rate_factor * value)
        for name in ("lr_schedule", "qf_lr_schedule"):
            schedule = getattr(self.model, name, None)
            if schedule is not None:
                setattr(self.model, name, FloatSchedule(ScaledSchedule(schedule, self.learning_rate_factor)))


class ResumableCheckpointCallback(BaseCallback):
    """
    Write checkpoints from which training goes on as if it had never stopped, see ``OfflineToOnline.save_checkpoint``:
    every ``save_freq`` calls, when training ends, and on SIGTERM and Ctrl-C, which then do what they always do.

    A checkpoint is taken once all callbacks have been called: in the offline phase at once; online between two rollouts, and
    there the first at which an episode has ended in every environment, which is what an exact resume needs. If there is none
    within another ``save_freq`` calls, it is taken without. A signal does not wait for that, only for the update or the
    environment step under way; a second one does not wait either.

    :param folder: where checkpoints are written, for this run alone
    :param save_freq: write every ``save_freq`` call of the callback, counted through both phases as by SB3's
        ``CheckpointCallback``
    :param keep: how many checkpoints to keep
    :param resume: ``"auto"`` for a script that may be started again: a new model goes on from the newest checkpoint that is
        not damaged, if there is one. Calls that were completed before return at once, the interrupted one is completed.
        That is for one call of each method: a script with several of ``learn()`` has to count by ``model.num_timesteps``
    :param verbose: 1 to print when a run goes on and when a signal comes, 2 for each checkpoint
    :raises ValueError: if an argument is out of its range. When training starts: if the model has no offline phase, or is new
        and the folder holds checkpoints that it is not told to go on from; or see ``OfflineToOnline.resume``
    """

    model: OfflineToOnline

    def __init__(
        self, folder: str | os.PathLike[str], save_freq: int, keep: int = 2, resume: str | None = None, verbose: int = 0
    ):
        super().__init__(verbose)
        for name, value in {"save_freq": save_freq, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if resume not in (None, "auto"):
            raise ValueError(f"`resume` must be 'auto' or None, got {resume!r}")
        self.folder = folder
        self.save_freq = save_freq
        self.keep = keep
        self.resume = resume
        self._due_since: int | None = None
        self._saved_at: tuple[int, int] | None = None
        self._is_learning = False
        self._signal: int | None = None
        self._old_handlers: dict[int, Any] = {}

    def on_call_start(self, model: OfflineToOnline) -> None:
        """
        Called when ``learn()`` or ``learn_offline()`` begins.

        :param model: which is about to learn
        """
        os.makedirs(self.folder, exist_ok=True)  # now rather than after hours
        if Path(self.folder).resolve() != model._checkpoint_folder:  # which is not the one that it goes on from, or writes to
            if self.resume == "auto":
                if model.resume(self.folder) and self.verbose >= 1:
                    print(f"Going on at {model.num_timesteps} steps from {self.folder}")
            elif checkpoints := find_checkpoints(self.folder):
                raise ValueError(
                    f"`folder={str(self.folder)!r}` holds checkpoints, the newest is {checkpoints[0].name}: go on from it "
                    "with `resume='auto'` or `load_checkpoint()`, or choose another folder for this new model"
                )
        self._is_learning = True
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                handler = signal.getsignal(signum)
                if handler not in (signal.SIG_IGN, None):
                    self._old_handlers[signum] = handler
                    signal.signal(signum, self._on_signal)

    def on_call_end(self) -> None:
        """Called when ``learn()`` or ``learn_offline()`` is over, by an error too."""
        self._is_learning = False
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)
        self._old_handlers = {}
        if self._signal is not None:  # it came after the last step, whose checkpoint is written
            signum, self._signal = self._signal, None
            signal.raise_signal(signum)

    def _on_signal(self, signum: int, frame: Any) -> None:
        is_second, self._signal = self._signal is not None, signum
        if self.verbose >= 1:
            print(f"{signal.Signals(signum).name}: " + ("stopping" if is_second else "stopping after the next checkpoint"))
        if is_second:
            self.on_call_end()

    def _init_callback(self) -> None:
        if not isinstance(self.model, OfflineToOnline):
            raise ValueError(
                "ResumableCheckpointCallback needs a model with an offline phase, e.g. an Off2OnSAC, "
                f"got a {type(self.model).__name__}"
            )

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq == 0 and self._due_since is None:
            self._due_since = self.n_calls
        return True

    def on_between_steps(self) -> None:
        """Called when everything about the last update or environment step is stored."""
        if self._signal is not None:
            try:
                self._save()
            except OSError as error:
                warnings.warn(f"Stopped without a checkpoint: {error}")
            self.on_call_end()
        elif self._due_since is not None and not self.model._in_rollout:
            is_overdue = self.n_calls - self._due_since >= self.save_freq
            if not self.model._handed_over or self.model._at_episode_start or is_overdue:
                self._save()

    def _on_training_end(self) -> None:
        # RL Zoo calls this after an error as well, which may have come in the middle of an update
        if self._is_learning:
            self._save()

    def _save(self) -> None:
        counters = self.model.num_timesteps, self.model._n_updates
        if counters != self._saved_at:
            path = self.model.save_checkpoint(self.folder, self.keep)
            self._saved_at = counters
            if self.verbose >= 2:
                print(f"Saving checkpoint to {path}")
        self._due_since = None
