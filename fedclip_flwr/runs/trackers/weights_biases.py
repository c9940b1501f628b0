"""Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path

from fedclip_flwr.runs.trackers.about import About, Numbers


class Wandb:
    """A run of the project `fedclip` unless W&B's own variables are set; its files are in the run's folder."""

    def __init__(self, about: About) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        root = Path(os.environ.get("WANDB_DIR") or about.folder)
        offline = [*root.glob(f"wandb/offline-run-*-{about.name}")]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fedclip",
            id=about.name,
            name=about.folder.name,
            resume="allow",
            dir=root,
            config=dict(about.settings),
            settings=wandb.Settings(
                silent=True,
                console="off",  # the output names the sites
                host="fedclip",
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        where: str | None = self._run.settings.sync_dir if self._run.offline else self._run.url
        self.where = str(where or root / "wandb")
        known = len(about.before) if offline else 0  # offline, W&B does not know its last step
        self._next = max(self._run.step, known)
        for line in about.before:
            self.line(line)

    def line(self, line: Numbers) -> None:
        if line["round"] >= self._next:
            self._run.log(line, step=int(line["round"]), commit=True)

    def finish(self, figures: Numbers) -> None:
        self._run.summary.update(figures)

    def end(self, status: str) -> None:
        self._run.summary.update({"status": status})
        self._run.finish(exit_code=int(status != "completed"))
