"""
What the paper's figures show, from the logs of runs: values of each run, aggregates over runs, plots and tables. No agent is
trained here, see ``runs.py``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure
from scipy import stats

from sb3_off2on.datasets import OfflineDataset, load_dataset, normalized_score
from sb3_off2on.vae import ConditionalVAE

FIRST_ROWS_FILE = "first_online_rows.npz"
N_RESAMPLES = 2000
# Share of the online steps in which the return is expected to fall, if it does. Large, as the first update comes after 1000
# steps, however short a run is
DIP_SHARE = 0.5
# Evaluations whose mean is the final return: one alone is noisy
N_FINAL = 3

# What a run shows: its curves by name (empty where a system has one), each with steps and values
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


class Run:
    """
    The logs of one finished run.

    :param folder: with ``run.json``, ``evaluations.npz`` and ``progress.csv``
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = json.loads((folder / "run.json").read_text())
        # SB3 counts from the offline phase on
        self.start = self.record["num_timesteps_at_start"]
        with np.load(folder / "evaluations.npz") as evaluations:
            self.steps = evaluations["timesteps"] - self.start  # (n_evaluations,), the first is 0
            self.returns = evaluations["results"].mean(axis=1)  # (n_evaluations,)

    @cached_property
    def progress(self) -> pd.DataFrame:
        """SB3's log: a row for each dump, a column for each key. A run that was interrupted left parts of it."""
        step = "time/total_timesteps"
        parts = [pd.DataFrame()]
        for path in self.folder.glob("progress*.csv"):
            if path.stat().st_size > 0:
                part = pd.read_csv(path)
                _, _, end = path.stem.partition("_")
                parts.append(part[part[step] <= int(end)] if end else part)
        rows = pd.concat(parts)
        return rows.sort_values(step, kind="stable", ignore_index=True) if len(rows) > 0 else rows

    def logged(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """
        What SB3's logger had last written at each evaluation: runs write at the ends of episodes, which differ, but evaluate
        at the same steps.

        :param key: key of SB3's logger
        :return: online steps and values, from the first one that was written on, each of shape ``(n,)``
        :raises ValueError: if it never was
        """
        if key not in self.progress:
            raise ValueError(f"{self.folder / 'progress.csv'} has no `{key}`: make the run anew, in another `--out`")
        rows = self.progress[["time/total_timesteps", key]].dropna()
        last = rows["time/total_timesteps"].to_numpy().searchsorted(self.steps + self.start, side="right") - 1
        return self.steps[last >= 0], rows[key].to_numpy()[last[last >= 0]]

    @property
    def offline(self) -> float:
        """Mean return before the first online step."""
        return float(self.returns[0])

    @property
    def dip(self) -> float:
        """Lowest mean return of an evaluation in the first ``DIP_SHARE`` of the online steps, the one before them included."""
        return float(self.returns[self.steps <= DIP_SHARE * self.record["settings"]["online_steps"]].min())

    @property
    def final(self) -> float:
        """Mean return of the last ``N_FINAL`` evaluations."""
        return float(self.returns[1:][-N_FINAL:].mean())


# ---------------------------------------------------------------------- what a run shows


def learning_curve(run: Run) -> Curves:
    """
    :param run: any run
    :return: mean return of each evaluation
    """
    return {"": (run.steps, run.returns)}


def offline_share(run: Run) -> Curves:
    """
    :param run: of an algorithm with an offline part in its replay
    :return: share of dataset rows in the minibatches, in percent (Fig. 4a)
    """
    steps, fractions = run.logged("replay/offline_fraction")
    return {"": (steps, 100 * fractions)}


def action_auroc(run: Run) -> Curves:
    """
    :param run: logged with ``ActionAUROCCallback``
    :return: AUROC of the ensemble and, if there are several, the mean of those of its members, in percent (Fig. 4b); both over
        all states at once, and as means over the states
    """
    curves: Curves = {}
    for prefix, name in {"auroc": "", "auroc_per_state": "state by state"}.items():
        steps, ensemble = run.logged(f"{prefix}/ensemble")
        curves[name] = (steps, 100 * ensemble)
        members = [key for key in run.progress if key.startswith(f"{prefix}/member_")]
        if len(members) > 1:
            mean = np.mean([run.logged(key)[1] for key in members], axis=0)
            curves[", ".join(filter(None, ["its members alone", name]))] = (steps, 100 * mean)
    return curves


def log_likelihoods(run: Run) -> Curves:
    """
    Fig. 1a: a VAE of state-action pairs learns from nine tenths of the dataset (Adam, 1e-3, as in section C), and judges the
    last tenth and what the offline agent collected before its first online update. Pairs are standardised by the former.

    :param run: with ``first_online_rows.npz``
    :return: importance-weighted log-likelihoods of up to 1000 offline and online pairs in nats; steps are their numbers
    :raises ValueError: if observations are not vectors
    """
    settings = run.record["settings"]
    with np.load(run.folder / FIRST_ROWS_FILE) as rows:
        online = np.concatenate([rows["observations"], rows["actions"]], axis=1)
    dataset = load_dataset(settings["dataset"])
    rng = np.random.default_rng(settings["seed"])
    offline = rng.permutation(state_action_pairs(dataset))
    n_held_out = max(len(offline) // 10, 1)
    held_out, training = offline[:n_held_out], offline[n_held_out:]
    mean, std = training.mean(axis=0), training.std(axis=0) + 1e-6
    with th.random.fork_rng(devices=[]):  # the log-likelihoods are the same whatever ran before
        th.manual_seed(settings["seed"])
        vae = fit_vae((training - mean) / std, settings["vae_steps"], rng)
        values = {}
        for name, pairs in {"offline, held out": held_out, "online": online}.items():
            x = th.as_tensor((pairs[:1000] - mean) / std, dtype=th.float32)
            log_likelihood = vae.log_likelihood(x[:, :0], x).numpy() - np.log(std).sum()
            values[name] = (np.arange(len(x)), log_likelihood)
    return values


def state_action_pairs(dataset: OfflineDataset) -> np.ndarray:
    """
    :param dataset: with vectors as observations
    :return: observations and actions scaled to [-1, 1], shape ``(n, obs_dim + action_dim)``
    :raises ValueError: if observations are not vectors
    """
    observations = dataset.observations
    if isinstance(observations, dict) or observations.ndim != 2:
        raise ValueError(
            f"fig1a needs vectors as observations, but {dataset.source} has {dataset.observation_space}: choose another figure"
        )
    low, high = dataset.action_space.low, dataset.action_space.high
    actions = 2 * (dataset.actions - low) / (high - low) - 1
    return np.concatenate([observations, actions.reshape(len(dataset), -1)], axis=1)


def fit_vae(x: np.ndarray, gradient_steps: int, rng: np.random.Generator) -> ConditionalVAE:
    """
    :param x: training data, shape ``(n, x_dim)``
    :param gradient_steps: number of updates, each on 256 rows
    :param rng: draws the rows
    :return: a VAE without condition
    """
    vae = ConditionalVAE(0, x.shape[1], net_arch=(256, 256), squash_output=False)
    optimizer = th.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(gradient_steps):
        batch = th.as_tensor(x[rng.integers(len(x), size=256)], dtype=th.float32)
        loss = -vae.elbo(batch[:, :0], batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae


# ---------------------------------------------------------------------- aggregates over runs


def iqm_with_interval(strata: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """
    Interquartile mean of all runs, and its 95% interval by stratified bootstrap (Agarwal et al. 2021): runs are drawn anew
    within each stratum. Of less than four runs nothing is trimmed, so that it is the mean.

    :param strata: for each dataset, one value of each run, shape ``(n_runs,)``
    :return: interquartile mean, and bounds of the interval, NaN where a stratum has a single run
    """

    def interquartile_mean(*samples: np.ndarray, axis: int) -> np.ndarray:
        return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    iqm = float(interquartile_mean(*strata, axis=-1))
    if min(len(values) for values in strata) < 2:
        return iqm, np.nan, np.nan
    result = stats.bootstrap(
        tuple(strata), interquartile_mean, n_resamples=N_RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return iqm, float(result.confidence_interval.low), float(result.confidence_interval.high)


Runs = dict[str, dict[str, list[Run]]]


def tidy_results(runs: Runs, analysis: Callable[[Run], Curves]) -> pd.DataFrame:
    """
    :param runs: by dataset and by label of the system
    :param analysis: what a run shows
    :return: one value a row, with the columns ``dataset, system, curve, seed, step, value``
    """
    tables = []
    for dataset, by_system in runs.items():
        for system, seeds in by_system.items():
            for run in seeds:
                for curve, (steps, values) in analysis(run).items():
                    columns = {"dataset": dataset, "system": system, "curve": curve, "seed": run.record["settings"]["seed"]}
                    tables.append(pd.DataFrame({**columns, "step": steps, "value": values}))
    return pd.concat(tables, ignore_index=True)


class TaskInfo(NamedTuple):
    """
    What returns are held against.

    :param behaviour: mean return of the dataset's episodes
    :param ref_min_score: return of a random policy
    :param ref_max_score: return of an expert
    """

    behaviour: float
    ref_min_score: float | None
    ref_max_score: float | None

    @classmethod
    def of(cls, dataset: OfflineDataset) -> "TaskInfo":
        """
        :param dataset: a dataset
        :return: what it says
        """
        return cls(float(dataset.episode_returns.mean()), dataset.ref_min_score, dataset.ref_max_score)


def summary(runs: Runs, infos: Mapping[str, TaskInfo]) -> pd.DataFrame:
    """
    Returns of every system: interquartile means over the runs. Of several datasets together there are normalised scores only,
    as returns of different tasks have different units.

    :param runs: by dataset and by label of the system
    :param infos: by dataset
    :return: a row for each dataset and system, with text in its cells
    """
    rows = []
    scores: dict[str, dict[tuple[Path, ...], np.ndarray]] = {}
    for dataset, by_system in runs.items():
        behaviour, *references = infos[dataset]
        for system, seeds in by_system.items():
            values = {name: np.array([getattr(run, name) for run in seeds]) for name in ("offline", "dip", "final")}
            row = {"dataset": dataset, "system": system, "runs": str(len(seeds)), "behaviour": f"{behaviour:,.1f}"}
            row.update((name, _with_interval([x])) for name, x in values.items())
            if None not in references:
                score: Any = normalized_score(values["final"], *references)  # type: ignore[arg-type]
                row["final, normalized"] = _with_interval([score])
                # Runs that several datasets share count once
                scores.setdefault(system, {})[tuple(run.folder for run in seeds)] = score
            rows.append(row)
    if len(runs) > 1 and all(None not in infos[dataset] for dataset in runs):
        for system, strata in scores.items():
            together = [*strata.values()]
            known = " + ".join(dataset for dataset in runs if system in runs[dataset])
            row = {"dataset": known, "system": system, "runs": str(sum(map(len, together)))}
            rows.append({**row, "final, normalized": _with_interval(together)})
    return pd.DataFrame(rows).fillna("-")


def _with_interval(strata: Sequence[np.ndarray]) -> str:
    iqm, low, high = iqm_with_interval(strata)
    return f"{iqm:,.1f}" if np.isnan(low) else f"{iqm:,.1f} [{low:,.1f}, {high:,.1f}]"


# ---------------------------------------------------------------------- plots and reports


def plot_curves(results: pd.DataFrame, ylabel: str, path: Path) -> None:
    """
    A panel for each dataset: interquartile means over the seeds at each step, and 95% intervals as shades.

    :param results: of ``tidy_results``
    :param ylabel: what the values are, with their unit
    :param path: of the PNG
    """

    def draw(axes: Any, table: pd.DataFrame) -> None:
        for (system, curve), rows in table.groupby(["system", "curve"], sort=False):
            steps, *bounds = np.transpose(
                [[step, *iqm_with_interval([values.to_numpy()])] for step, values in rows.groupby("step")["value"]]
            )
            (line,) = axes.plot(steps, bounds[0], label=f"{system}: {curve}" if curve else system)
            axes.fill_between(steps, bounds[1], bounds[2], color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel("environment steps")
        axes.set_ylabel(ylabel)

    _plot(results, draw, path)


def plot_histograms(results: pd.DataFrame, xlabel: str, path: Path) -> None:
    """
    A panel for each dataset: the distribution of the values of each curve, of all seeds together.

    :param results: of ``tidy_results``
    :param xlabel: what the values are, with their unit
    :param path: of the PNG
    """

    def draw(axes: Any, table: pd.DataFrame) -> None:
        # Log-likelihoods of what is far off have a long tail, which would leave one bar for the rest
        bins = np.linspace(table["value"].quantile(0.01), table["value"].max(), 51)
        for curve, rows in table.groupby("curve", sort=False):
            axes.hist(rows["value"].clip(lower=bins[0]), bins, density=True, alpha=0.5, label=curve)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("density")

    _plot(results, draw, path)


def _plot(results: pd.DataFrame, draw: Callable[[Any, pd.DataFrame], None], path: Path) -> None:
    tables = list(results.groupby("dataset", sort=False))
    # Not with pyplot, whose state and windows belong to the user
    figure = MatplotlibFigure(figsize=(6.4 * len(tables), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (dataset, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        draw(axes, table)
        axes.set_title(dataset)
        axes.grid(alpha=0.3)
    # One for all panels, which have the same curves, where it covers none of them
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(tables))
    figure.savefig(path, dpi=150)


def curve_table(results: pd.DataFrame, n_steps: int = 7) -> pd.DataFrame:
    """
    The curves of a plot in numbers: interquartile means over the seeds at some steps.

    :param results: of ``tidy_results``, of one dataset
    :param n_steps: at how many steps, of those that all curves have
    :return: a row for each curve, with text in its cells
    """
    curves = {
        f"{system}: {curve}" if curve else system: rows.groupby("step")["value"].agg(lambda x: _with_interval([x.to_numpy()]))
        for (system, curve), rows in results.groupby(["system", "curve"], sort=False)
    }
    steps = sorted(set.intersection(*(set(values.index) for values in curves.values())))
    chosen = dict.fromkeys(steps[round(index)] for index in np.linspace(0, len(steps) - 1, n_steps) if steps)
    return pd.DataFrame([{"step": name, **{f"{step:,}": values[step] for step in chosen}} for name, values in curves.items()])


def quantile_table(results: pd.DataFrame) -> pd.DataFrame:
    """
    The histograms of a plot in numbers.

    :param results: of ``tidy_results``, of one dataset
    :return: a row for each curve, with text in its cells
    """
    quantiles = {f"{q:.0%}": q for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return pd.DataFrame(
        [
            {"quantile": curve, **{name: f"{rows['value'].quantile(q):,.1f}" for name, q in quantiles.items()}}
            for curve, rows in results.groupby("curve", sort=False)
        ]
    )


def markdown_table(table: pd.DataFrame) -> str:
    """
    :param table: with text in its cells
    :return: the same in Markdown
    """
    rows = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
