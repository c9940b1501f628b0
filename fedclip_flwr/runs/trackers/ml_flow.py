"""MLflow."""

from __future__ import annotations

import logging
import os
import time
import warnings

from fedclip_flwr.runs.trackers.about import About, Numbers


class MLflow:
    """A run of the experiment `fedclip`, in a database beside the run folders unless MLflow's variables are set."""

    def __init__(self, about: About) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="mlflow")
        own, root = os.environ.get("MLFLOW_TRACKING_URI"), about.folder.parent
        store = own or f"sqlite:///{root / 'mlflow.db'}"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedclip"
        self.where = f"experiment {name} in {'the store of MLFLOW_TRACKING_URI' if own else store}"
        self._client = MlflowClient(tracking_uri=store)
        if experiment := self._client.get_experiment_by_name(name):
            number = experiment.experiment_id
        else:  # without a location, its files would go below the current folder
            number = self._client.create_experiment(name, None if own else (root / "mlartifacts").as_uri())
        if found := self._client.search_runs([number], f"tags.`fedclip.run` = '{about.name}'"):
            run = found[0]
            self._client.update_run(run.info.run_id, "RUNNING")
        else:
            run = self._client.create_run(number, tags={"fedclip.run": about.name}, run_name=about.folder.name)
        self._run = run.info.run_id
        steps = [int(metric.step) for metric in self._client.get_metric_history(self._run, "sites")]
        self._known = max(steps, default=-1)  # logged rounds can't be removed
        for key, value in about.settings.items():
            if key not in run.data.params:  # a logged parameter can't be changed
                self._client.log_param(self._run, key, str(value)[:500])
        for line in about.before:
            self.line(line)

    def line(self, line: Numbers) -> None:
        if line["round"] > self._known:
            self._log({name: number for name, number in line.items() if name != "round"}, line["round"])

    def finish(self, figures: Numbers) -> None:
        self._log(figures, figures["result/rounds"])

    def end(self, status: str) -> None:
        self._client.set_terminated(
            self._run, {"completed": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status]
        )

    def _log(self, numbers: Numbers, step: float) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, number, now, int(step)) for name, number in numbers.items()])
