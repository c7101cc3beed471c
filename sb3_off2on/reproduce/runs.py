"""How the jobs are done: agents are pretrained, fine-tuned and evaluated, in one process or several."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv

from sb3_off2on.awac import AWAC
from sb3_off2on.bcq import BCQ
from sb3_off2on.callbacks import ActionAUROCCallback, ResumableCheckpointCallback
from sb3_off2on.off2on_sac import Off2OnSAC
from sb3_off2on.offline import OfflineToOnline, default_policy
from sb3_off2on.reproduce.analyses import FIRST_ROWS_FILE
from sb3_off2on.reproduce.systems import Job

# A folder of each job, and after how many updates or steps one is due; online, it may wait as long again for an episode to end
CHECKPOINTS = "checkpoints"
CHECKPOINT_FREQ = 1000
# Evaluated side by side, as an agent takes little longer for five observations than for one
N_EVAL_ENVS = 5


class ReportCallback(BaseCallback):
    """
    Tell how far a run is.

    :param report: takes the number of steps done
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.report = report

    def _on_step(self) -> bool:
        self.report(self.n_calls)
        return True


class FirstRowsCallback(BaseCallback):
    """
    Keep what the offline agent collected before the first online update, for Fig. 1a.

    :param path: of the ``.npz`` file, with ``observations`` and ``actions`` (in [-1, 1])
    """

    model: OfflineToOnline

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.replay_buffer
        assert buffer is not None
        if self.model._n_updates == 0 and isinstance(buffer.observations, np.ndarray):
            n_rows = buffer.n_online
            observations = buffer.observations[: buffer.size()].reshape(n_rows, -1)
            np.savez(self.path, observations=observations, actions=buffer.actions[: buffer.size()].reshape(n_rows, -1))


def algorithm_class(name: str) -> Any:
    """
    :param name: of an algorithm
    :return: its class
    :raises ValueError: if it needs a package that is not installed
    """
    if name in ("TQC", "CrossQ"):
        try:
            return getattr(import_module("sb3_contrib"), name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f'{name} is part of sb3-contrib, which is not installed: pip install "sb3-contrib>=2.9,<3.0"'
            ) from error
    return {"SAC": SAC, "Off2OnSAC": Off2OnSAC, "AWAC": AWAC, "BCQ": BCQ}[name]


def write_record(folder: Path, **record: Any) -> None:
    """
    :param folder: of a job
    :param record: what ``run.json`` says from now on
    """
    # Renamed when it is complete, so that there never is half a file
    partial_path = folder / "run.json.partial"
    partial_path.write_text(json.dumps(record, indent=1))
    partial_path.replace(folder / "run.json")


def run_job(job: Job, report: Callable[[int], None]) -> None:
    """
    Train, from the last checkpoint of an attempt that was interrupted, where there is one. The error of one that fails is in
    ``error.txt``.

    :param job: what to train
    :param report: takes the number of steps done
    """
    th.set_num_threads(1)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "error.txt").unlink(missing_ok=True)
    write_record(job.folder, settings=job.settings, finished=False)
    start = time.time()
    try:
        record = (pretrain if "pretraining" in job.settings else fine_tune)(job, report)
    except Exception:
        (job.folder / "error.txt").write_text(traceback.format_exc())
        raise
    write_record(job.folder, settings=job.settings, finished=True, seconds=round(time.time() - start), **record)
    shutil.rmtree(job.folder / CHECKPOINTS, ignore_errors=True)


def pretrain(job: Job, report: Callable[[int], None]) -> dict[str, Any]:
    """
    :param job: with ``pretraining`` in its settings
    :param report: takes the number of steps done
    :return: nothing to remember
    """
    settings, env = job.settings, job.task.make_env()
    model: Any
    if settings["pretraining"] == "fqe":
        assert job.after is not None
        model = Off2OnSAC.load(job.after / "model", env=env, device="auto", dataset=job.task.dataset)
        model.set_random_seed(settings["seed"])
        learn = model.fit_fqe
    else:
        algorithm = {"awac": AWAC, "bcq": BCQ}.get(settings["pretraining"], Off2OnSAC)
        model = algorithm(
            default_policy(env.observation_space),
            env,
            dataset=job.task.dataset,
            seed=settings["seed"],
            **deepcopy(settings["hyperparameters"]),
        )
        learn = model.learn_offline
    keep_log(job.folder, model._n_offline_updates if model.resume(job.folder / CHECKPOINTS) else None)
    model.set_logger(configure(str(job.folder), ["csv"]))
    checkpoints = ResumableCheckpointCallback(job.folder / CHECKPOINTS, CHECKPOINT_FREQ)
    try:
        learn(gradient_steps=settings["gradient_steps"], callback=[ReportCallback(report), checkpoints])
    finally:
        model.logger.close()
    model.save(job.folder / "model")
    return {}


def make_model(job: Job) -> Any:
    """
    :param job: a run
    :return: the algorithm at the start of its online phase
    """
    settings, env = job.settings, job.task.make_env()
    # A copy, as SB3 adds to `policy_kwargs`
    algorithm, kwargs = algorithm_class(settings["algorithm"]), deepcopy(settings["hyperparameters"])
    if job.after is not None:
        online = {name: value for name, value in kwargs.items() if name != "policy_kwargs"}
        pretrained = algorithm.load(job.after / "model", env=env, dataset=job.task.dataset, **online)
        if pretrained.policy.ensemble_size == kwargs["policy_kwargs"]["ensemble_size"]:
            pretrained.set_random_seed(settings["seed"])
            return pretrained
    if settings["dataset"] is not None:
        kwargs = {**kwargs, "dataset": job.task.dataset}
    model = algorithm(default_policy(env.observation_space), env, seed=settings["seed"], **kwargs)
    if job.after is not None:
        # Members are independent: the first ones of a large ensemble are a small one
        for index in range(model.policy.ensemble_size):
            model.set_member(index, pretrained.get_member(index))
    return model


def fine_tune(job: Job, report: Callable[[int], None]) -> dict[str, Any]:
    """
    :param job: a run
    :param report: takes the number of steps done
    :return: what the analyses want to know
    """
    settings, model = job.settings, make_model(job)
    is_ours = isinstance(model, OfflineToOnline)
    going_on = is_ours and model.resume(job.folder / CHECKPOINTS)
    keep_log(job.folder, model.num_timesteps if going_on else None)
    model.set_logger(configure(str(job.folder), ["csv"]))
    n_eval_envs = min(N_EVAL_ENVS, settings["eval_episodes"])
    eval_env: VecEnv = make_vec_env(job.task.make_env, n_eval_envs, seed=settings["seed"] + 1000)
    eval_env = BaseAlgorithm._wrap_env(eval_env)  # as SB3 does with the one to learn from: images get their channels first
    evaluation = EvalCallback(
        eval_env,
        eval_freq=settings["eval_freq"],
        n_eval_episodes=settings["eval_episodes"],
        log_path=str(job.folder),
        verbose=0,
    )
    callbacks: list[BaseCallback] = [evaluation, ReportCallback(report)]
    if is_ours:
        callbacks += [
            FirstRowsCallback(job.folder / FIRST_ROWS_FILE),
            ResumableCheckpointCallback(job.folder / CHECKPOINTS, CHECKPOINT_FREQ),
        ]
    if isinstance(model, Off2OnSAC):
        # Before the evaluation, which writes what it logs
        callbacks = [ActionAUROCCallback(settings["eval_freq"], seed=settings["seed"]), *callbacks]
    if not going_on:
        # The offline return, as the first of the evaluations
        returns, lengths = evaluate_policy(model, eval_env, settings["eval_episodes"], return_episode_rewards=True)
        evaluation.evaluations_timesteps.append(model.num_timesteps)
        evaluation.evaluations_results.append(returns)  # type: ignore[arg-type]
        evaluation.evaluations_length.append(lengths)  # type: ignore[arg-type]
    try:
        model.learn(settings["online_steps"], callback=callbacks, log_interval=1)
    finally:
        model.logger.close()
    return {"num_timesteps_at_start": evaluation.evaluations_timesteps[0]}


def keep_log(folder: Path, step: int | None) -> None:
    """
    SB3 begins ``progress.csv`` anew. What an interrupted attempt wrote there is kept under another name, which tells up to
    where it counts; see ``Run.progress``.

    :param folder: of a job
    :param step: update or environment step where it goes on; ``None`` if it begins
    """
    path = folder / "progress.csv"
    if step is None:
        for part in folder.glob("progress*.csv"):
            part.unlink()
    elif path.is_file() and not (kept := folder / f"progress_{step}.csv").is_file():
        path.rename(kept)  # else both attempts went on from here, and this one got to no other checkpoint


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Job, done: Any) -> None:
    """In a process of its own, which ends with the one that started it, however that ends. Ctrl-C is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_job(job, partial(setattr, done, "value"))
    except Exception:
        sys.exit(1)


def run_all(jobs: Sequence[Job], n_processes: int) -> dict[Path, str]:
    """
    Train everything, with a bar for each job that runs. Where one fails, only those that need its agents are left out.

    :param jobs: those that are needed come first
    :param n_processes: number of jobs side by side; one runs in this process
    :return: errors by folder of the job
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    failed: dict[Path, str] = {}
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as progress:
        total = progress.add_task("all jobs", total=len(jobs))

        def end(job: Job, error: str | None) -> None:
            progress.advance(total)
            progress.console.print(f"{job.name}: {error.strip().splitlines()[-1] if error else 'done'}", markup=False)
            if error:
                failed[job.folder] = error

        run = _run_here if n_processes == 1 else partial(_run_in_processes, n_processes=n_processes)
        run(list(jobs), failed, progress, end)
    return failed


def _needs_failed(job: Job, failed: Mapping[Path, str]) -> str | None:
    return f"not run, as {job.after} failed" if job.after in failed else None


def _run_here(jobs: list[Job], failed: dict[Path, str], progress: Progress, end: Callable[[Job, str | None], None]) -> None:
    for job in jobs:
        error = _needs_failed(job, failed)
        if error is None:
            bar = progress.add_task(job.name, total=job.n_steps)
            try:
                run_job(job, lambda done, bar=bar: progress.update(bar, completed=done))  # type: ignore[misc]
            except Exception:
                error = traceback.format_exc()
            progress.remove_task(bar)
        end(job, error)


def _run_in_processes(
    jobs: list[Job],
    failed: dict[Path, str],
    progress: Progress,
    end: Callable[[Job, str | None], None],
    n_processes: int,
) -> None:
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    running: dict[Any, tuple[Job, Any, Any, TaskID]] = {}
    while waiting or running:
        unfinished = {job.folder for job in [*waiting, *(job for job, *_ in running.values())]}
        for job in [job for job in waiting if job.after not in unfinished]:
            error = _needs_failed(job, failed)
            if error is None and len(running) == n_processes:
                continue
            waiting.remove(job)
            if error is not None:
                end(job, error)
                continue
            done = context.Value("q", 0)
            process = context.Process(target=_work, args=(job, done), daemon=True)
            process.start()
            running[process.sentinel] = job, process, done, progress.add_task(job.name, total=job.n_steps)
        ended = wait(list(running), timeout=0.5)
        for _, _, done, bar in running.values():
            progress.update(bar, completed=done.value)
        for sentinel in ended:
            job, process, _, bar = running.pop(sentinel)
            process.join()
            progress.remove_task(bar)
            path = job.folder / "error.txt"
            error = path.read_text() if path.is_file() else f"its process ended with exit code {process.exitcode}"
            end(job, error if process.exitcode else None)
