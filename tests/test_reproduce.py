"""The paper's comparisons: what runs, what is run again, what the figures show, and what is wrong."""

import argparse
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
import yaml
from helpers import assert_same, make_dataset
from stable_baselines3 import SAC

from sb3_off2on import AWAC, BCQ, Off2OnSAC, cli, collect_dataset
from sb3_off2on.datasets import load_dataset
from sb3_off2on.reproduce import analyses, command, runs, systems
from sb3_off2on.reproduce.analyses import Run, TaskInfo
from sb3_off2on.reproduce.systems import HYPERPARAMS_FOLDER, PRETRAINING, SYSTEMS, Job, Task
from sb3_off2on.zoo import OfflineToOnlineExperimentManager

TASK = "Pendulum-v1-pendulum-random-v0"
PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
CONFIGURATIONS = ("sac_ft", "cql_ft", "calql", "symmetric")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """60 steps of Pendulum, in episodes of 20."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("datasets")))
        env = gym.make("Pendulum-v1", max_episode_steps=20)
        collect_dataset(None, env, n_steps=60, dataset_id="pendulum/random-v0", seed=0)
        yield "pendulum/random-v0"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and batches of the published values in small, and the first update after 20 steps."""
    published = systems.hyperparameters

    def hyperparameters(config: str) -> dict[str, Any]:
        kwargs = published(config)
        kwargs.update(learning_starts=20, train_freq=20, batch_size=4, offline_batch_size=4, first_update_multiplier=1)
        kwargs["policy_kwargs"]["net_arch"] = [8]
        if config == "bcq":
            kwargs["policy_kwargs"].update(vae_net_arch=[8], n_candidates=4)
        return kwargs

    monkeypatch.setattr(systems, "hyperparameters", hyperparameters)
    monkeypatch.setattr(systems, "VAE_STEPS", 20)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that were started, in order."""
    names: list[str] = []
    run_job = runs.run_job

    def count(job: Job, report: Any) -> None:
        names.append("/".join(job.folder.parts[-2:]))
        run_job(job, report)

    monkeypatch.setattr(runs, "run_job", count)
    return names


def options(data: str, out: Path) -> list[str]:
    text = f"--offline-steps 4 --online-steps 40 --eval-freq 10 --eval-episodes 2 --ensemble-size 2 --seeds 2 --out {out}"
    return ["--dataset", data, *text.split()]


def arguments(data: str, out: Path, *more: str) -> argparse.Namespace:
    return command.make_parser("").parse_args(["fig3", *options(data, out), *more])


def jobs_of(data: str, out: Path, name: str, *more: str) -> list[Job]:
    return list(systems.make_jobs(arguments(data, out, *more), Task((data,), None), SYSTEMS[name], name, 0))


def reproduce(figure: str, data: str, out: Path, *more: str) -> None:
    cli.main(["reproduce", figure, *options(data, out), *more])


class TestCommand:
    def test_stopped_and_repeated(
        self, data: str, tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What is finished is not run again; figures share runs and pretrained agents."""
        fine_tune = runs.fine_tune

        def stop_in_the_middle(job: Job, report: Any) -> Any:
            if job.folder.parts[-2:] == ("uniform", "seed_0"):
                (job.folder / "evaluations.npz").write_text("half of it")
                raise KeyboardInterrupt
            return fine_tune(job, report)

        monkeypatch.setattr(runs, "fine_tune", stop_in_the_middle)
        with pytest.raises(SystemExit, match=r"stopped; the same command goes on with what is missing"):
            reproduce("fig4c", data, tmp_path)
        assert not (tmp_path / "fig4c").exists()
        monkeypatch.setattr(runs, "fine_tune", fine_tune)
        first = ["pretrained/cql_seed_0", "off2on/seed_0", "pretrained/cql_seed_1", "off2on/seed_1", "uniform/seed_0"]
        assert done == first
        done.clear()

        reproduce("fig4c", data, tmp_path)
        assert done == ["uniform/seed_0", "uniform/seed_1", "online_only/seed_0", "online_only/seed_1"]
        done.clear()
        for figure in ("fig4c", "fig4a", "fig4b"):
            if figure == "fig4b":  # another one of the same pretrained agents
                done.clear()
            reproduce(figure, data, tmp_path)
            assert done == (["off2on_n1/seed_0", "off2on_n1/seed_1"] if figure == "fig4b" else [])
        assert "8 jobs" in capsys.readouterr().out

        folder = tmp_path / TASK
        results = pd.read_csv(tmp_path / "fig4c" / "results.csv")
        for name, label in (("off2on", "Off2On"), ("uniform", "Uniform"), ("online_only", "Online only")):
            for seed in range(2):
                with np.load(folder / name / f"seed_{seed}" / "evaluations.npz") as evaluations:
                    assert (evaluations["timesteps"] == 4 + np.arange(0, 50, 10)).all()
                    assert evaluations["results"].shape == (5, 2)
                    rows = results[(results["system"] == label) & (results["seed"] == seed)]
                    np.testing.assert_allclose(rows["value"], evaluations["results"].mean(axis=1))
                    assert rows["step"].tolist() == [0, 10, 20, 30, 40]
        # Runs of the same seed start with the same agents; so the offline return is that of the same policy
        shares = pd.read_csv(tmp_path / "fig4a" / "results.csv")
        assert shares["value"].between(0, 100).all()
        auroc = pd.read_csv(tmp_path / "fig4b" / "results.csv").fillna("")
        assert set(zip(auroc["system"], auroc["curve"], strict=True)) == {
            ("Off2On", ""),
            ("Off2On", "its members alone"),
            ("Off2On, N=1", ""),
        }
        for figure in ("fig4a", "fig4b", "fig4c"):
            assert (tmp_path / figure / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
            report = (tmp_path / figure / "report.md").read_text()
            assert f"sb3-off2on reproduce {figure} --dataset {data} --offline-steps 4" in report
            assert command.FIGURES[figure].claim in report
            assert "| Off2On | 2 |" in report
            assert f"torch {th.__version__}" in report
            assert "Failed" not in report

    def test_one_fails(
        self, data: str, tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The others go on, and the exit status tells; its seed is repeated."""
        pretrain = runs.pretrain

        def fail(job: Job, report: Any) -> Any:
            if job.settings["seed"] == 0:
                raise RuntimeError("out of luck")
            return pretrain(job, report)

        monkeypatch.setattr(runs, "pretrain", fail)
        with pytest.raises(SystemExit, match=r"2 of 4 jobs failed: .*cql_seed_0, .*off2on.seed_0"):
            reproduce("fig4a", data, tmp_path)
        assert done == ["pretrained/cql_seed_0", "pretrained/cql_seed_1", "off2on/seed_1"]
        folder = tmp_path / TASK
        assert "out of luck" in (folder / "pretrained" / "cql_seed_0" / "error.txt").read_text()
        assert "RuntimeError: out of luck" in capsys.readouterr().err
        report = (tmp_path / "fig4a" / "report.md").read_text()
        assert "Failed, and not in the results" in report
        assert "| Off2On | 1 |" in report
        monkeypatch.setattr(runs, "pretrain", pretrain)
        done.clear()
        reproduce("fig4a", data, tmp_path)
        assert done == ["pretrained/cql_seed_0", "off2on/seed_0"]
        assert "| Off2On | 2 |" in (tmp_path / "fig4a" / "report.md").read_text()

    def test_fig1a(self, data: str, tmp_path: Path) -> None:
        """The online pairs are those that were collected before the first update, by the policy of the offline phase."""
        reproduce("fig1a", data, tmp_path, "--seeds", "1")
        results = pd.read_csv(tmp_path / "fig1a" / "results.csv")
        assert results.groupby("curve").size().to_dict() == {"offline, held out": 6, "online": 20}
        assert np.isfinite(results["value"]).all()
        rows = np.load(tmp_path / TASK / "off2on_n1" / "seed_0" / "first_online_rows.npz")
        assert rows["observations"].shape == (20, 3)
        assert rows["actions"].shape == (20, 1)
        assert np.abs(rows["actions"]).max() <= 1
        np.testing.assert_allclose(np.linalg.norm(rows["observations"][:, :2], axis=1), 1, rtol=1e-5)

    def test_pretraining_that_nothing_needs(self, data: str, tmp_path: Path, done: list[str]) -> None:
        """Deleted agents are not made again for runs that are finished."""
        reproduce("fig4a", data, tmp_path, "--seeds", "1")
        done.clear()
        shutil.rmtree(tmp_path / TASK / "pretrained")
        reproduce("fig4a", data, tmp_path, "--seeds", "1")
        assert done == []

    def test_processes(self, data: str, tmp_path: Path) -> None:
        """Side by side; one that fails takes with it those that need it."""
        good, bad, after_bad = jobs_of(data, tmp_path, "sac")[0], jobs_of(data, tmp_path, "tqc")[0], jobs_of(data, tmp_path, "crossq")[0]
        bad.settings["algorithm"] = "Unknown"
        after_bad = Job(after_bad.folder, after_bad.settings, 40, after_bad.task, bad.folder)
        failed = runs.run_all([good, bad, after_bad], 2)
        assert list(failed) == [bad.folder, after_bad.folder]
        assert "KeyError: 'Unknown'" in failed[bad.folder]
        assert failed[after_bad.folder] == f"not run, as {bad.folder} failed"
        assert good.is_finished()
        assert Run(good.folder).steps.tolist() == [0, 10, 20, 30, 40]
        assert not bad.is_finished()


@pytest.fixture(scope="module")
def pretrained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Agents of every family, from two updates."""
    out = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context():
        for name in ("fqe_init", "awac", "bcq_ft", "calql"):
            for job in jobs_of(data, out, name)[:-1]:
                if not job.is_finished():
                    runs.run_job(job, lambda done: None)
    return out
