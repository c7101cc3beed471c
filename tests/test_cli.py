"""The command line: the commands of the documentation, in their order, and what a user does wrong."""

import importlib
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import huggingface_hub
import minari  # type: ignore[import-untyped]
import numpy as np
import optuna
import pytest
import yaml
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from helpers import TinyEnv, small_model
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sb3_off2on import Off2OnSAC, cli, collect_dataset, load_dataset, zoo

ROOT = Path(__file__).parents[1]
ENV_ID, DATASET, EXPERT = "HalfCheetah-v5", "mujoco/halfcheetah/medium-v0", "mujoco/halfcheetah/expert-v0"


def commands(page: str) -> list[str]:
    return re.findall(r"^(sb3-off2on [^#\n]*)", (ROOT / page).read_text(), flags=re.MULTILINE)


COMMANDS = commands("docs/zoo.md") + commands("README.md")
RUN = Path("logs", "off2on_sac", f"{ENV_ID}_1")


class DrawnEnv(TinyEnv):
    """Stands in for HalfCheetah: episodes of 5 steps, and pictures that need neither a screen nor a library."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.full((32, 32, 3), 50 * self.n_steps, np.uint8)


HYPERPARAMS = {
    "default": {
        "policy": "MlpPolicy",
        "n_timesteps": 20,
        "offline_gradient_steps": 20,
        "learning_starts": 4,
        "train_freq": 4,
        "batch_size": 4,
        "offline_batch_size": 4,
        "buffer_size": 100,
        "policy_kwargs": "dict(net_arch=[8], ensemble_size=2)",
    }
}


MY_ENVS = """
import gymnasium

gymnasium.register("MyRobot-v0", "test_cli:DrawnEnv")
"""


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with local datasets and hyperparameters of seconds."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
        monkeypatch.setenv("MPLBACKEND", "Agg")
        monkeypatch.setitem(gym.registry, ENV_ID, EnvSpec(ENV_ID, entry_point="test_cli:DrawnEnv"))
        for seed, dataset_id in enumerate((DATASET, EXPERT)):
            collect_dataset(None, ENV_ID, n_steps=60, dataset_id=dataset_id, seed=seed, algorithm_name="random")
        (folder / "hyperparams").mkdir()
        (folder / "hyperparams" / "off2on_sac.yml").write_text(yaml.safe_dump(HYPERPARAMS))
        monkeypatch.setattr(zoo, "HYPERPARAMS_FOLDER", folder / "hyperparams")
        # The environment and the file of one's own in the documentation
        (folder / "my_envs.py").write_text(MY_ENVS)
        monkeypatch.syspath_prepend(str(folder))
        importlib.import_module("my_envs")
        collect_dataset(None, "MyRobot-v0", n_steps=60, dataset_id="my-robot/log-v0", seed=0)
        (block,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/zoo.md").read_text(), flags=re.DOTALL | re.MULTILINE)
        robot = yaml.safe_load(block)
        robot["MyRobot-v0"].update(HYPERPARAMS["default"])
        (folder / "robot.yml").write_text(yaml.safe_dump(robot))
        yield folder


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """RL Zoo's scripts read ``sys.argv``, so commands set it."""
    monkeypatch.setattr(sys, "argv", ["sb3-off2on"])


class LocalHub:
    """What ``push-to-hub`` calls of the hub, without a network; keeps the names of uploaded files."""

    uploaded: set[str]

    def create_repo(self, **kwargs: Any) -> str:
        return f"hub/{kwargs['repo_id']}"

    def snapshot_download(self, repo_id: str, local_dir: Path) -> None:
        local_dir.mkdir(parents=True)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        LocalHub.uploaded = {path.name for path in folder_path.iterdir()}


@pytest.fixture(scope="module")
def outputs(workplace: Path) -> dict[str, str]:
    """Runs the commands of the documentation, in its order, with thousands as 20; what each printed."""
    outputs = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub, "HfApi", LocalHub)
        monkeypatch.setattr(sys, "argv", ["sb3-off2on"])
        for command in COMMANDS:
            small = re.sub(r"\b\d+000\b", "20", command).replace("--n-trials 20", "--n-trials 2")
            with redirect_stdout(StringIO()) as output:
                cli.main(shlex.split(small)[1:])
            outputs[command] = output.getvalue()
    return outputs


def last_run() -> Path:
    return max(RUN.parent.glob(f"{ENV_ID}_*"))


def test_every_command_is_in_the_documentation(outputs: dict[str, str]) -> None:
    known = [*cli.ZOO_SCRIPTS, *(f"plot {kind}" for kind in cli.ZOO_PLOTS), "datasets", "datasets show"]
    assert {name for name in known if any(f"{command} ".startswith(f"sb3-off2on {name} ") for command in outputs)} == set(
        known
    )


def test_train(outputs: dict[str, str]) -> None:
    names = {path.name for path in RUN.iterdir()}
    assert names >= {f"{ENV_ID}.zip", "best_model.zip", "rl_model_20_steps.zip", "rl_model_40_steps.zip"}
    assert np.load(RUN / "evaluations.npz")["timesteps"].tolist() == [20, 40]
    assert Off2OnSAC.load(RUN / f"{ENV_ID}.zip").num_timesteps == 40
    config = yaml.load((RUN / ENV_ID / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert config["dataset"] == DATASET


def test_own_environment(outputs: dict[str, str]) -> None:
    (run,) = RUN.parent.glob("MyRobot-v0_*")
    model = Off2OnSAC.load(run / "MyRobot-v0.zip")
    assert (model.num_timesteps, model.lr_schedule(1), model.ent_coef) == (40, 3e-5, "auto_0.1")


def test_resume(outputs: dict[str, str]) -> None:
    resumed = RUN.with_name(f"{ENV_ID}_3")
    assert "Loading pretrained agent" in next(output for command, output in outputs.items() if " -i " in command)
    assert yaml.load((resumed / ENV_ID / "config.yml").read_text(), Loader=yaml.UnsafeLoader)["dataset"] == DATASET


def test_enjoy_and_plot(outputs: dict[str, str]) -> None:
    assert [output.count("4 Episodes") for command, output in outputs.items() if " enjoy " in command] == [1, 1]
    assert [path.stat().st_size > 1000 for path in RUN.parent.rglob("*.mp4")] == [True]
    assert Path("logs/halfcheetah.png").stat().st_size > 1000


def test_optimize(outputs: dict[str, str]) -> None:
    storage = JournalStorage(JournalFileBackend("logs/cheetah.log"))
    trials = optuna.load_study(study_name="cheetah", storage=storage).trials
    # Of 20 environment steps and 20 updates, the former are evaluated, 5 times
    assert [len(trial.intermediate_values) for trial in trials] == [5, 5]
    assert Off2OnSAC.load(last_run() / f"{ENV_ID}.zip").cql_alpha == trials[1].params["cql_alpha"]


def test_push_to_hub(outputs: dict[str, str]) -> None:
    """All but the network."""
    assert LocalHub.uploaded >= {"README.md", "config.yml", "args.yml", "results.json", f"off2on_sac-{ENV_ID}.zip"}
    card = Path(f"hub/off2on_sac-{ENV_ID}/README.md").read_text()
    assert card.startswith("---\nlibrary_name: stable-baselines3\n")
    assert "**Off2OnSAC** Agent playing" in card


# ------------------------------------------------------------------ datasets


def test_list_of_datasets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    cli.main(["datasets"])
    assert re.fullmatch(rf"No Minari datasets in {tmp_path}: .*`minari download ID`.*\n", capsys.readouterr().out)

    images: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, (8, 8, 3), np.uint8), "state": spaces.Box(-1, 1, (2,))}
    collect_dataset(None, TinyEnv(spaces.Dict(images)), 12, "tiny/images-v0", seed=0)
    # Scores of the metadata, and D4RL's
    scored = collect_dataset(None, TinyEnv(), 12, "tiny/scored-v0", seed=0)
    scored.storage.update_metadata({"ref_min_score": -10.0, "ref_max_score": 10.0})
    collect_dataset(None, ENV_ID, 60, "tiny/cheetah-v0", seed=0)
    collect_dataset(None, TinyEnv(), 12, "tiny/broken-v0", seed=0)
    (tmp_path / "tiny" / "broken-v0" / "data" / "main_data.hdf5").write_text("")
    capsys.readouterr()
    cli.main(["datasets"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    rows = {
        line.split()[0]: [*re.split(r"\s{2,}", line)[1:], after] for line, after in itertools.pairwise(lines) if "/" in line
    }
    assert [name for name in rows if name.startswith("tiny/")] == [
        f"tiny/{x}-v0" for x in ("broken", "cheetah", "images", "scored")
    ]
    assert rows["tiny/broken-v0"][-1].startswith("cannot be read: ")
    assert rows["tiny/images-v0"][-1] == "image: (8, 8, 3) uint8, state: (2,) -> (2,)"
    expected = {"tiny/scored-v0": (-10.0, 10.0), "tiny/cheetah-v0": (-280.178953, 12135.0), "tiny/images-v0": None}
    for dataset_id, scores in expected.items():
        episodes = list(minari.load_dataset(dataset_id).iterate_episodes())
        mean_return = np.mean([episode.rewards.sum() for episode in episodes])
        assert rows[dataset_id][:3] == [
            f"{sum(len(episode) for episode in episodes):,}",
            f"{len(episodes):,}",
            f"{mean_return:,.1f}",
        ]
        score = "-" if scores is None else f"{100 * (mean_return - scores[0]) / (scores[1] - scores[0]):.1f}"
        assert rows[dataset_id][3] == score
        size = sum(path.stat().st_size for path in (tmp_path / dataset_id).rglob("*") if path.is_file())
        assert rows[dataset_id][4] == f"{size / 1e6:.1f} MB"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    cli.main(["datasets", "show", *arguments])
    lines = [re.split("[│┃]", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    return {name.strip(): value.strip() for name, value in filter(None, lines)}


def test_show_a_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dataset = load_dataset([DATASET, EXPERT])
    returns = dataset.episode_returns
    rows = shown(capsys, DATASET, EXPERT)
    assert rows[""] == f"{DATASET} + {EXPERT}"
    assert rows["transitions"] == "120"
    assert rows["episodes"] == f"24, {dataset.terminations.sum()} of them terminated"
    assert rows["episode length"] == "5.0 +/- 0.0, from 5.0 to 5.0"
    assert rows["return"] == f"{returns.mean():.1f} +/- {returns.std():.1f}, from {returns.min():.1f} to {returns.max():.1f}"
    assert rows["normalized score"].startswith(f"{dataset.normalized_score(returns).mean():.1f} +/- ")
    assert rows["reference scores"] == "random -280.2, expert 12,135.0"
    assert rows["observations"] == str(dataset.observation_space)
    assert rows["fingerprint"] == dataset.fingerprint

    # A file, without environment or scores
    columns = {name: getattr(dataset, name) for name in ("observations", "actions", "rewards", "terminations", "truncations")}
    np.savez(tmp_path / "rows.npz", **columns)
    rows = shown(capsys, str(tmp_path / "rows.npz"))
    assert rows["environment"] == "unknown"
    assert rows["normalized score"] == "no reference scores"
    assert rows["size on disk"] == f"{(tmp_path / 'rows.npz').stat().st_size / 1e6:.1f} MB"

    model = small_model(ENV_ID, buffer_size=10, learning_starts=20).learn(12)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    assert shown(capsys, str(tmp_path / "buffer.pkl"), "--allow-pickle")["transitions"] == "10"


# ------------------------------------------------------------------ what a user does wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("fly", "argument COMMAND: invalid choice: 'fly'"),
        ("plot", "the following arguments are required: KIND"),
        ("datasets drop", "argument ACTION: invalid choice: 'drop'"),
        ("datasets --all", "unrecognized arguments: --all"),
        ("datasets show unknown/data-v0", "datasets show: error: No Minari dataset 'unknown/data-v0'"),
        ("datasets show rows.pkl", "datasets show: error: The file rows.pkl does not exist"),
        ("train --algo sax", "train: error: argument --algo: invalid choice: 'sax'"),
        (
            "train --algo off2on_sac --env HalfCheeta-v5",
            "train: error: HalfCheeta-v5 not found in gym registry, you maybe meant",
        ),
        (
            f"train --algo off2on_sac --env {ENV_ID}",
            "train: error: `--algo off2on_sac` trains offline first (20 updates) and needs",
        ),
        (f"train --algo off2on_sac --env {ENV_ID} --dataset unknown/data-v0", "error: No Minari dataset 'unknown/data-v0'"),
        (f"train --algo sac --env {ENV_ID} --dataset {DATASET}", "error: `--dataset` cannot be used with `--algo sac`"),
        (
            "train --algo off2on_sac --env Pendulum-v1 --dataset " + DATASET,
            "its action space Box(-1.0, 1.0, (2,), float32) is not",
        ),
        (
            f"train --algo off2on_sac --env {ENV_ID} -i none.zip",
            "train: error: The trained_agent must be a valid path to a .zip",
        ),
        (
            f"train --algo off2on_sac --env {ENV_ID} --conf-file none.yml",
            "train: error: [Errno 2] No such file or directory: 'none",
        ),
        (f"enjoy --algo off2on_sac --env {ENV_ID} -f none", "enjoy: error: The none/off2on_sac folder was not found"),
        (
            f"record-video --algo off2on_sac --env {ENV_ID} -f none",
            "record-video: error: The none/off2on_sac folder was not found",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        cli.main([*arguments.split(), *(["-f", str(tmp_path)] if arguments.startswith("train") else [])])
    assert info.value.code not in (None, 0)
    last_line = info.value.code if isinstance(info.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in last_line
    assert last_line.startswith("sb3-off2on")
    assert message in last_line


def test_error_in_training_is_shown_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("nan")

    monkeypatch.setattr(Off2OnSAC, "train_offline", fail)
    with pytest.raises(ValueError, match="nan"):
        cli.main(["train", "--algo", "off2on_sac", "--env", ENV_ID, "--dataset", DATASET, "-f", str(tmp_path)])


def test_assertion_without_words_is_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(cli, "list_datasets", fail)
    with pytest.raises(AssertionError):
        cli.main(["datasets"])


def test_without_rl_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "sb3_off2on.zoo")
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    for command in ("train", "enjoy", "record-video", "push-to-hub", "plot all"):
        with pytest.raises(
            SystemExit, match=rf'^sb3-off2on {command}: error: rl_zoo3 is not installed: pip install "\.\[zoo\]" in the folder'
        ):
            cli.main(command.split())
    cli.main(["datasets"])
    assert DATASET in capsys.readouterr().out


# ------------------------------------------------------------------ the program


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("", "COMMAND"),
        ("train", "--dataset DATASET"),
        ("enjoy", "--no-render"),
        ("record-video", "--output-folder"),
        ("push-to-hub", "--organization"),
        ("plot", "from-file"),
        ("plot all", "--exp-folders"),
        ("datasets", "show"),
        ("datasets show", "--download"),
    ],
)
def test_help(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*command.split(), "--help"])
    output = capsys.readouterr().out
    assert option in output
    if not command.startswith("plot "):  # whose parsers have a sentence where the name should be
        assert f"usage: sb3-off2on {command}".strip() in output


def test_module_and_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-off2on", "datasets"])
    runpy.run_path(cli.__file__, run_name="__main__")
    assert DATASET in capsys.readouterr().out
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"sb3-off2on": f"{cli.main.__module__}:{cli.main.__name__}"}


@pytest.mark.parametrize("number", range(2))
def test_datasets_make(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of the page, small and with states: pictures need OpenGL, see test_envs.py."""
    command, dataset_id = commands("docs/envs.md")[number], f"test/made-v{number}"
    cli.main(shlex.split(f"{command} --n-scripted 50 --n-random 50 --observation state --dataset-id {dataset_id}")[1:])
    assert f"{dataset_id}: 100 steps" in capsys.readouterr().out
    assert len(load_dataset(dataset_id)) == 100
