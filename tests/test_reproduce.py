"""The paper's comparisons: what runs, what is run again, what the figures show, and what is wrong."""

import argparse
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch as th
import yaml
from helpers import IMAGE_SPACE, TinyEnv, assert_same, make_dataset

from sb3_off2on import AWAC, BCQ, Off2OnSAC, cli, collect_dataset
from sb3_off2on.datasets import load_dataset
from sb3_off2on.reproduce import analyses, command, runs, systems
from sb3_off2on.reproduce.analyses import Run, TaskInfo
from sb3_off2on.reproduce.systems import HYPERPARAMS_FOLDER, SYSTEMS, Job, Task
from sb3_off2on.zoo import OfflineToOnlineExperimentManager

TASK = "Pendulum-v1-pendulum-random-v0"
PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
# Name: file, agents it starts with, N, replay, weight of CQL's term online
DOCUMENTED = {
    name: (file.strip("`"), starts_with.strip("`"), *rest)
    for _, names, file, starts_with, *rest in (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if line.count("|") == 8
    )
    for name in re.findall(r"`(\w+)`", names)
}
CONFIGURATIONS = ("sac_ft", "cql_ft", "calql", "symmetric")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """60 steps of Pendulum, in episodes of 20."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("datasets")))
        env = gym.make("Pendulum-v1", max_episode_steps=20)
        collect_dataset(None, env, n_steps=60, dataset_id="pendulum/random-v0", seed=0)
        yield "pendulum/random-v0"


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def pretrained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with agents of every family."""
    out = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        for name in ("fqe_init", "awac", "bcq_ft", "calql"):
            for job in jobs_of(data, out, name)[:-1]:
                runs.run_job(job, lambda done: None)
    return out


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
    def test_pretraining_goes_on(self, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From its last checkpoint, to the agents of a run that nobody stopped."""
        monkeypatch.setattr(runs, "CHECKPOINT_FREQ", 1)

        def stop_at_3(done: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        agents = []
        for folder, is_stopped in (("whole", False), ("stopped", True)):
            for job in jobs_of(data, tmp_path / folder, "fqe_init", "--offline-steps", "16")[:2]:
                if is_stopped:
                    with pytest.raises(KeyboardInterrupt):
                        runs.run_job(job, stop_at_3)
                    assert max(path.name for path in job.folder.glob("*/*")).startswith("000002_")
                reports: list[int] = []
                runs.run_job(job, reports.append)
                assert reports == list(range(3 if is_stopped else 1, job.n_steps + 1))
                assert not (job.folder / "checkpoints").exists()
                assert len(list(job.folder.glob("progress_*.csv"))) == is_stopped  # the log of the first attempt is kept
                agents.append(Off2OnSAC.load(job.folder / "model").policy.state_dict())
        assert_same(agents[2], agents[0])
        assert_same(agents[3], agents[1])

    @pytest.mark.parametrize("name", ["off2on", "awac"])
    def test_run_goes_on(
        self, name: str, data: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From its last checkpoint, to the logs of a run that nobody stopped, also if stopped twice at the same place."""
        monkeypatch.setattr(runs, "CHECKPOINT_FREQ", 20)
        shutil.copytree(pretrained / TASK / "pretrained", tmp_path / TASK / "pretrained")
        job = jobs_of(data, tmp_path, name, "--online-steps", "100")[-1]
        runs.run_job(job, lambda done: None)
        whole, whole_share = Run(job.folder), Run(job.folder).logged("replay/offline_fraction")
        rows = (job.folder / "first_online_rows.npz").read_bytes()
        shutil.rmtree(job.folder)

        for stop, first in ((55, 1), (58, 41), (77, 41)):  # episodes have 20 steps
            reports: list[int] = []

            def report(done: int, stop: int = stop, reports: list[int] = reports) -> None:
                reports.append(done)
                if done == stop:
                    raise RuntimeError("the machine went away")

            with pytest.raises(RuntimeError, match="the machine went away"):
                runs.run_job(job, report)
            assert reports == list(range(first, stop + 1))
            assert not job.is_finished()
        reports.clear()
        runs.run_job(job, reports.append)
        assert reports == list(range(61, 101))
        run = Run(job.folder)
        assert run.steps.tolist() == whole.steps.tolist()
        assert run.start == whole.start
        assert run.progress["time/total_timesteps"].tolist() == whole.progress["time/total_timesteps"].tolist()
        for part, expected in zip(run.logged("replay/offline_fraction"), whole_share, strict=True):
            np.testing.assert_array_equal(part, expected)
        assert (job.folder / "first_online_rows.npz").read_bytes() == rows
        assert not (job.folder / "checkpoints").exists()

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
            ("Off2On", "state by state"),
            ("Off2On", "its members alone, state by state"),
            ("Off2On, N=1", ""),
            ("Off2On, N=1", "state by state"),
        }
        for figure in ("fig4a", "fig4b", "fig4c"):
            assert (tmp_path / figure / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
            report = (tmp_path / figure / "report.md").read_text()
            assert f"sb3-off2on reproduce {figure} --dataset {data} --offline-steps 4" in report
            assert command.FIGURES[figure].claim in report
            assert "| Off2On | 2 |" in report
            assert "Systems with an ensemble have N = 2 where their name says no other." in report
            assert f"### {command.FIGURES[figure].label}: {Task((data,), None).dataset_name}" in report
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
        for _ in range(2):  # those of CQL, which those of FQE were made of
            reproduce("fig1c", data, tmp_path, "--seeds", "1")
            shutil.rmtree(tmp_path / TASK / "pretrained", ignore_errors=True)
            assert done == ["pretrained/cql_seed_0", "off2on_n1/seed_0", "pretrained/fqe_seed_0", "fqe_init_n1/seed_0"]

    def test_processes(self, data: str, tmp_path: Path) -> None:
        """Side by side; one that fails takes with it those that need it. Slow, as each process imports PyTorch."""
        good, bad, after_bad = (
            jobs_of(data, tmp_path, "sac")[0],
            jobs_of(data, tmp_path, "tqc")[0],
            jobs_of(data, tmp_path, "crossq")[0],
        )
        bad.settings["algorithm"] = "Unknown"
        after_bad = Job(after_bad.folder, after_bad.settings, 40, after_bad.task, bad.folder)
        failed = runs.run_all([good, bad, after_bad], 2)
        assert list(failed) == [bad.folder, after_bad.folder]
        assert "KeyError: 'Unknown'" in failed[bad.folder]
        assert failed[after_bad.folder] == f"not run, as {bad.folder} failed"
        assert good.is_finished()
        assert Run(good.folder).steps.tolist() == [0, 10, 20, 30, 40]
        assert not bad.is_finished()


class TestSystems:
    def test_all_are_documented(self) -> None:
        assert set(DOCUMENTED) == set(SYSTEMS)
        figures = re.findall(r"^\| (`fig.*?|`today`) \| (.*?) \|", PAGE.read_text(), flags=re.MULTILINE)
        compared = {
            name: tuple(re.findall(r"`(\w+)`", cells)) for names, cells in figures for name in re.findall(r"`(\w+)`", names)
        }
        assert compared == {name: figure.systems for name, figure in command.FIGURES.items()}

    @pytest.mark.parametrize("name", SYSTEMS)
    def test_is_what_the_table_says(self, name: str, data: str, pretrained: Path) -> None:
        file, starts_with, ensemble_size, replay, cql_alpha_online = DOCUMENTED[name]
        assert SYSTEMS[name].config == (
            file if file != "-" else type(runs.make_model(jobs_of(data, pretrained, name)[-1])).__name__
        )
        assert SYSTEMS[name].pretraining == (None if starts_with == "-" else starts_with)
        *before, job = jobs_of(data, pretrained, name)
        assert all(one.is_finished() for one in before)
        model = runs.make_model(job)
        assert model.seed == 0
        if replay == "no dataset":
            assert not hasattr(model, "dataset")
            return
        assert type(model) is {"awac": AWAC, "bcq": BCQ}.get(file, Off2OnSAC)
        # N = 5 is 2 in these tests
        assert model.policy.ensemble_size == min(int(ensemble_size), 2)
        assert model.replay_buffer.scheme == replay
        assert model.dataset.fingerprint == load_dataset(data).fingerprint
        if cql_alpha_online != "-":
            assert model.cql_alpha_online == float(cql_alpha_online)
        if name == "other_ratio":
            assert model.density_ratio_kwargs == {"reference": "union"}
        assert model.pretrained == bool(before)
        if before:
            agents = type(model).load(before[-1].folder / "model")
            assert agents._n_offline_updates == (4 + 1 if starts_with == "fqe" else 4)
            for index in range(model.policy.ensemble_size):
                assert_same(model.get_member(index), agents.get_member(index))

    def test_given_hyperparameters(self, data: str, pretrained: Path) -> None:
        """They are the online phase's: the pretrained agents stay those of everyone."""
        options = ("--batch-size", "7", "--learning-rate", "1e-5", "--ent-coef", "auto_0.1")
        for name in ("off2on", "awac", "sac"):
            *before, job = jobs_of(data, pretrained, name, *options)
            assert all(one.is_finished() for one in before)
            model = runs.make_model(job)
            assert model.batch_size == 7
            is_ours = isinstance(model, Off2OnSAC)
            assert (model.learning_rate == 1e-5) == is_ours
            if is_ours:
                model._hand_over()
                assert model.log_ent_coef.exp().item() == pytest.approx(0.1)

    def test_pretrained_agents(self, data: str, pretrained: Path) -> None:
        """FQE has the policies of CQL and critics of its own; only Cal-QL has the bound."""
        cql, fqe, calql = (
            Off2OnSAC.load(pretrained / TASK / "pretrained" / f"{family}_seed_0" / "model")
            for family in ("cql", "fqe", "calql")
        )
        assert_same(fqe.get_member(1)["actor"], cql.get_member(1)["actor"])
        assert not th.equal(fqe.get_member(1)["critic"]["qf0.0.weight"], cql.get_member(1)["critic"]["qf0.0.weight"])
        assert (cql.calql, calql.calql) == (False, True)
        assert calql.policy.ensemble_size == 1

    @pytest.mark.parametrize("name", ["awac", "bcq_ft", "calql", "cql_ft", "fqe_init_n1", "symmetric", "tqc"])
    def test_runs(self, name: str, data: str, pretrained: Path) -> None:
        """From its first evaluation to its last; what it logs is what the analyses read."""
        job = jobs_of(data, pretrained, name)[-1]
        reported: list[int] = []
        runs.run_job(job, reported.append)
        assert job.is_finished()
        assert reported == list(range(1, 41))
        run = Run(job.folder)
        assert run.steps.tolist() == [0, 10, 20, 30, 40]
        if name != "tqc":
            _, share = analyses.offline_share(run)[""]
            expected = {"cql_ft": 0, "symmetric": 50, "calql": 50}
            assert share.tolist() == [expected[name]] * len(share) if name in expected else (share <= 100).all()
            assert len(share) > 0

    @pytest.mark.parametrize("config", CONFIGURATIONS)
    def test_rl_zoo_takes_the_file(self, config: str, tmp_path: Path) -> None:
        path = HYPERPARAMS_FOLDER / f"{config}.yml"
        block = yaml.safe_load(path.read_text())["default"]
        manager = OfflineToOnlineExperimentManager(
            argparse.Namespace(dataset=None),
            "off2on_sac",
            "Pendulum-v1",
            str(tmp_path),
            eval_freq=-1,
            config=str(path),
            hyperparams={"offline_gradient_steps": 0},
        )
        model: Any = manager.setup_experiment()[0]  # type: ignore[index]
        assert manager.n_timesteps == 250_000
        assert model.policy.ensemble_size == eval(block["policy_kwargs"])["ensemble_size"]
        assert model.replay_buffer.scheme == eval(block["replay_buffer_kwargs"])["scheme"]
        for name in set(block) - {
            "n_timesteps",
            "policy",
            "policy_kwargs",
            "replay_buffer_kwargs",
            "train_freq",
            "offline_gradient_steps",
        }:
            value = getattr(model, name)
            assert (value(1.0) if callable(value) else value) == block[name], name


class TestPlan:
    def test_scale(self, data: str, tmp_path: Path) -> None:
        """The paper's numbers at 1, their share below."""

        def plan(name: str, *more: str) -> list[int]:
            args = command.make_parser("").parse_args(["fig3", "--dataset", data, "--out", str(tmp_path), *more])
            return [job.n_steps for job in systems.make_jobs(args, Task((data,), None), SYSTEMS[name], name, 0)]

        assert plan("fqe_init") == [1_000_000, 250_000, 250_000]
        assert plan("awac") == [50_000, 250_000]
        assert plan("off2on_long") == [1_000_000, 1_000_000]
        assert plan("fqe_init", "--scale", "0.01") == [10_000, 2_500, 2_500]
        assert plan("fqe_init", "--scale", "0.01", "--offline-steps", "80", "--online-steps", "30") == [80, 20, 30]
        assert plan("sac", "--scale", "1e-9") == [1]

    def test_options_reach_the_runs(self, data: str, tmp_path: Path) -> None:
        more = ["--offline-batch-size", "3", "--cql-n-actions", "2", "--offline-bc-steps", "3"]
        for name in ("off2on", "awac", "bcq_ft"):
            before, job = jobs_of(data, tmp_path, name, *more)
            for settings in (before.settings, job.settings):
                assert settings["hyperparameters"]["offline_batch_size"] == 3
                assert settings["hyperparameters"].get("cql_n_actions") == (2 if name == "off2on" else None)
                assert settings["hyperparameters"].get("offline_bc_steps") == (3 if name == "off2on" else None)
        assert job.settings["eval_freq"] == 10
        assert job.settings["eval_episodes"] == 2

    def test_online_learners_are_shared_by_datasets(self, data: str, tmp_path: Path) -> None:
        (job,) = jobs_of(data, tmp_path, "sac")
        assert job.folder == tmp_path / "Pendulum-v1" / "sac" / "seed_0"
        assert data not in json.dumps(job.settings)

    @pytest.mark.parametrize(
        ("sources", "name"),
        [
            (("mujoco/hopper/medium-v0",), "mujoco-hopper-medium-v0"),
            (("a/b-v0", "a/c-v0"), "a-b-v0+a-c-v0"),
        ],
    )
    def test_names_of_folders(self, sources: tuple[str, ...], name: str) -> None:
        assert Task(sources, None).dataset_name == name

    def test_name_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "some data.npz").touch()
        assert Task((str(tmp_path / "some data.npz"),), None).dataset_name == "some-data"


def write_run(folder: Path, seed: int, returns: Any, start: int = 100, log: str = "") -> Run:
    """Logs as a run leaves them, evaluated every 10 steps; ``returns`` has a row for each evaluation."""
    folder.mkdir(parents=True)
    returns = np.asarray(returns, dtype=float)
    steps = 10 * np.arange(len(returns))
    settings = {"seed": seed, "online_steps": int(steps[-1])}
    (folder / "run.json").write_text(json.dumps({"settings": settings, "finished": True, "num_timesteps_at_start": start}))
    np.savez(folder / "evaluations.npz", timesteps=start + steps, results=returns)
    (folder / "progress.csv").write_text(log)
    return Run(folder)


class TestAnalyses:
    def test_returns(self, tmp_path: Path) -> None:
        means = np.array([5.0, 4.0, 3.0, 8.0, 6.0, -2.0, -9.0, 1.0, 2.0, 7.0, 9.0])
        run = write_run(tmp_path / "run", 0, np.stack([means - 1, means + 1], axis=1))
        steps, values = analyses.learning_curve(run)[""]
        assert steps.tolist() == list(range(0, 110, 10))
        np.testing.assert_allclose(values, means)
        assert run.offline == 5
        assert run.dip == -2  # of the evaluations up to the one at 50
        assert run.final == 6  # of the last three

    def test_short_run(self, tmp_path: Path) -> None:
        """The evaluation before the first step is none of the final ones."""
        assert write_run(tmp_path / "run", 0, [[4.0], [2.0]]).final == 2

    def test_what_was_logged_last(self, tmp_path: Path) -> None:
        keys = ["auroc/ensemble", "auroc/member_0", "auroc/member_1"]
        keys = ["time/total_timesteps", "replay/offline_fraction", *keys, *(key.replace("/", "_per_state/") for key in keys)]
        log = ",".join(keys) + "\n105,,,,,,,\n113,0.5,,,,,,\n118,0.4,0.9,0.7,0.8,0.99,0.9,0.92\n"
        log += "125,,,,,,,\n130,0.1,0.6,0.3,0.4,0.95,0.9,0.8\n"
        run = write_run(tmp_path / "run", 0, np.zeros((4, 1)), log=log)
        steps, values = analyses.offline_share(run)[""]
        assert steps.tolist() == [20, 30]
        np.testing.assert_allclose(values, [40, 10])
        curves = analyses.action_auroc(run)
        np.testing.assert_allclose(curves[""][1], [90, 60])
        np.testing.assert_allclose(curves["its members alone"][1], [75, 35])
        np.testing.assert_allclose(curves["state by state"][1], [99, 95])
        np.testing.assert_allclose(curves["its members alone, state by state"][1], [91, 85])
        with pytest.raises(ValueError, match=r"progress.csv has no `no/such_key`: make the run anew, in another `--out`"):
            run.logged("no/such_key")

    def test_interquartile_mean(self) -> None:
        values = np.array([3.0, 100.0, 1.0, 4.0, -50.0, 2.0, 6.0, 5.0])
        iqm, low, high = analyses.iqm_with_interval([values])
        assert iqm == np.mean(np.sort(values)[2:6])
        assert low < iqm < high
        # All runs together, not the mean of the datasets' own
        iqm, *_ = analyses.iqm_with_interval([values[:3], values[3:]])
        assert iqm == np.mean(np.sort(values)[2:6])

    def test_interval(self) -> None:
        """Against all 4^4 samples, which are equally likely."""
        values = np.array([0.0, 1.0, 4.0, 9.0])
        means = [np.mean(np.sort(sample)[1:3]) for sample in itertools.product(values, repeat=4)]
        _, low, high = analyses.iqm_with_interval([values])
        assert low == pytest.approx(np.quantile(means, 0.025), abs=0.3)
        assert high == pytest.approx(np.quantile(means, 0.975), abs=0.3)

    def test_interval_is_stratified(self) -> None:
        """Datasets that differ do not make an interval wide if their runs agree."""
        assert analyses.iqm_with_interval([np.zeros(4), np.full(4, 10.0)]) == (5, 5, 5)
        assert analyses.iqm_with_interval([np.array([3.0])])[0] == 3
        assert np.isnan(analyses.iqm_with_interval([np.array([3.0])])[1:]).all()

    def test_summary(self, tmp_path: Path) -> None:
        def two(dataset: str, *finals: float) -> list[Run]:
            return [write_run(tmp_path / dataset / str(seed), seed, [[0.0], [x]]) for seed, x in enumerate(finals)]

        by_dataset = {"first": {"A": two("first", 1, 3)}, "second": {"A": two("second", 10, 30)}}
        infos = {"first": TaskInfo(5.0, 0.0, 10.0), "second": TaskInfo(7.0, 0.0, 100.0)}
        table = analyses.summary(by_dataset, infos)
        assert table["dataset"].tolist() == ["first", "second", "first + second"]
        assert table["final"].tolist() == ["2.0 [1.0, 3.0]", "20.0 [10.0, 30.0]", "-"]
        assert table["final, normalized"].tolist() == ["20.0 [10.0, 30.0]"] * 2 + ["20.0 [10.0, 30.0]"]
        assert table["offline"].tolist() == ["0.0 [0.0, 0.0]"] * 2 + ["-"]
        assert table["behaviour"].tolist() == ["5.0", "7.0", "-"]
        assert table["runs"].tolist() == ["2", "2", "4"]
        # Without a dataset: both have the same runs
        shared = analyses.summary({dataset: by_dataset["first"] for dataset in infos}, dict.fromkeys(infos, infos["first"]))
        assert shared["runs"].tolist() == ["2", "2", "2"]
        assert shared["final, normalized"].tolist() == ["20.0 [10.0, 30.0]"] * 3
        one_unknown = analyses.summary(by_dataset, {**infos, "second": TaskInfo(7.0, None, None)})
        assert one_unknown["dataset"].tolist() == ["first", "second"]
        unknown = analyses.summary({"first": by_dataset["first"]}, {"first": TaskInfo(5.0, None, None)})
        assert "final, normalized" not in unknown
        assert analyses.markdown_table(unknown).splitlines()[2].startswith("| first | A | 2 | 5.0 |")

    def test_tables_of_curves(self) -> None:
        """Interquartile means at steps that all curves have; quantiles of what a histogram shows."""
        rows = [("A", "", seed, step, float(seed + step)) for seed in range(2) for step in range(0, 101, 10)]
        rows += [("B", "part", 0, step, 2.0 * step) for step in range(20, 91, 10)]
        results = pd.DataFrame(rows, columns=["system", "curve", "seed", "step", "value"])
        table = analyses.curve_table(results, n_steps=3)
        assert table.to_dict("list") == {
            "step": ["A", "B: part"],
            "20": ["20.5 [20.0, 21.0]", "40.0"],
            "60": ["60.5 [60.0, 61.0]", "120.0"],
            "90": ["90.5 [90.0, 91.0]", "180.0"],
        }
        assert analyses.curve_table(results[results["step"] == 20]).columns.tolist() == ["step", "20"]
        nothing_in_common = results[(results["system"] == "B") | (results["step"] == 0)]
        assert analyses.curve_table(nothing_in_common).columns.tolist() == ["step"]
        quantiles = analyses.quantile_table(pd.DataFrame({"curve": ["x"] * 101, "value": np.arange(101.0)}))
        assert quantiles.to_numpy().tolist() == [["x", "5.0", "25.0", "50.0", "75.0", "95.0"]]

    def test_plots(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A line and a shade for each curve at the interquartile means, a panel for each dataset."""
        drawn: list[Any] = []
        monkeypatch.setattr(analyses.MatplotlibFigure, "savefig", lambda figure, path, dpi: drawn.append(figure))
        by_dataset = {
            dataset: {
                system: [write_run(tmp_path / dataset / system / str(seed), seed, [[0.0], [seed + 1.0]]) for seed in range(3)]
                for system in ("A", "B")
            }
            for dataset in ("first", "second")
        }
        results = analyses.tidy_results(by_dataset, analyses.learning_curve)
        analyses.plot_curves(results, "return", tmp_path / "x.png")
        assert [axes.get_title() for axes in drawn[0].axes] == ["first", "second"]
        for axes in drawn[0].axes:
            assert [line.get_label() for line in axes.lines] == ["A", "B"]
            for line in axes.lines:
                np.testing.assert_allclose(line.get_xydata(), [[0, 0], [10, 2]])
            assert len(axes.collections) == 2
            assert axes.get_ylabel() == "return"
        (legend,) = drawn[0].legends
        assert [text.get_text() for text in legend.get_texts()] == ["A", "B"]
        table = pd.DataFrame(
            {"dataset": "first", "system": "A", "curve": ["x", "x", "y"], "seed": 0, "value": [0.0, 1.0, 2.0]}
        )
        analyses.plot_histograms(table, "nats", tmp_path / "x.png")
        (axes,) = drawn[1].axes
        assert axes.get_legend_handles_labels()[1] == ["x", "y"]

    def test_vae_tells_what_is_unlike_the_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Log-densities of a Gaussian that it has learned, and low ones far off."""
        rng = np.random.default_rng(0)
        th.manual_seed(0)
        vae = analyses.fit_vae(rng.normal(size=(2000, 2)).astype(np.float32), 200, rng)
        x = th.tensor([[0.0, 0.0], [1.0, -1.0], [6.0, 6.0]])
        density = -0.5 * (x**2).sum(dim=1).numpy() - np.log(2 * np.pi)
        estimate = vae.log_likelihood(x[:, :0], x).numpy()
        np.testing.assert_allclose(estimate[:2], density[:2], atol=0.7)
        assert estimate[2] < -10

    def test_pairs(self, data: str) -> None:
        dataset: Any = load_dataset(data)
        pairs = analyses.state_action_pairs(dataset)
        np.testing.assert_allclose(pairs[:, :3], dataset.observations)
        np.testing.assert_allclose(pairs[:, 3:], dataset.actions / 2, atol=1e-6)  # Pendulum's actions are in [-2, 2]


class TestWrongUse:
    @pytest.mark.parametrize(
        ("more", "match"),
        [
            (["--seeds", "0"], r"`--seeds` must be at least 1, got 0"),
            (["--offline-steps", "0"], r"`--offline-steps` must be at least 1, got 0"),
            (["--scale", "0"], r"`--scale` must be above 0, got 0.0"),
            (["--learning-rate", "-1"], r"`--learning-rate` must be above 0, got -1.0"),
            (["--ent-coef", "auto_x"], r"`--ent-coef` must be auto, or auto_ and a number above 0, got 'auto_x'"),
            (["--ent-coef", "auto_0.0"], r"`--ent-coef` must be auto, or auto_ and a number above 0, got 'auto_0.0'"),
            (["--ent-coef", "0.1"], r"`--ent-coef` must be auto, or auto_ and a number above 0, got '0.1'"),
            (["--batch-size", "0"], r"`--batch-size` must be at least 1, got 0"),
            (["--eval-freq", "50"], r"`--eval-freq` must be at most the number of online steps, 40, got 50"),
            (["--online-steps", "20"], r"gives 20 online steps, but the first update only comes after 20"),
            (["--dataset", "pendulum/random-v0"], r"in one folder, 'pendulum-random-v0': give each dataset once"),
            (["--ensemble-size", "1"], r"`--ensemble-size 1` is too small: 'Off2On, N=2' needs 2 agents"),
        ],
    )
    def test_arguments(self, data: str, tmp_path: Path, more: list[str], match: str) -> None:
        with pytest.raises(SystemExit, match=match):
            reproduce("fig4d", data, tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()

    def test_unknown_figure(self, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            reproduce("fig99", data, tmp_path)
        assert "invalid choice: 'fig99'" in capsys.readouterr().err

    def test_other_settings(self, data: str, pretrained: Path) -> None:
        with pytest.raises(SystemExit, match=r"cql_seed_0 was made with gradient_steps=4, not 5: choose another `--out`, or"):
            reproduce("fig4c", data, pretrained, "--offline-steps", "5")

    def test_images_have_no_fig1a(self) -> None:
        with pytest.raises(ValueError, match=r"fig1a needs vectors as observations, but arrays has Box.*: choose another"):
            analyses.state_action_pairs(make_dataset(1, 5, env=TinyEnv(IMAGE_SPACE)))

    def test_unknown_environment(self) -> None:
        task = Task(("nothing",), None)
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(systems, "load_once", lambda sources: make_dataset(1, 5, env=gym.make("Pendulum-v1")))
            with pytest.raises(ValueError, match=r"arrays does not name its environment: pass `--env`"):
                _ = task.env_name

    def test_missing_packages(self, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sb3_contrib", None)
        with pytest.raises(SystemExit, match=r"TQC is part of sb3-contrib, which is not installed: pip install \"sb3-contrib"):
            reproduce("today", data, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        monkeypatch.setitem(sys.modules, "sb3_off2on.reproduce.command", None)
        with pytest.raises(SystemExit, match=r"is not installed: pip install \"\.\[reproduce\]\" in the folder"):
            reproduce("fig4c", data, tmp_path / "out")
