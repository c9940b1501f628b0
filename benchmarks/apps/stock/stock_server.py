"""Flower's FedAvg as its examples use it; a line is written after each round."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedclip_flwr.base import Settings
from fedclip_flwr.features import open_features
from fedclip_flwr.learning import make_adapter

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    given = context.run_config
    features = open_features(Settings(data=str(given["data"])))
    adapter = make_adapter(str(given["adapter"]), features.classes.dim)
    sites, rounds = int(given["sites"]), int(given["num-server-rounds"])
    folder = Path(str(given["results-dir"])) / "latest"
    folder.mkdir()

    def after(number: int, arrays: ArrayRecord) -> None:
        if number:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(f'{{"round": {number}}}\n')

    strategy = FedAvg(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
    result = strategy.start(grid, ArrayRecord(adapter.state_dict()), num_rounds=rounds, evaluate_fn=after)
    if not rounds == len(result.train_metrics_clientapp) == len(result.evaluate_metrics_clientapp):
        raise RuntimeError("a round without answers")  # FedAvg itself would go on without any
