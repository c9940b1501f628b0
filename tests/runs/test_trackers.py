"""Experiment trackers, each for real and without a network: what was sent is read back with the tracker's own means."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedclip_flwr.base.errors import UserError
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.runs import trackers
from fedclip_flwr.runs.folder import RunFolder
from fedclip_flwr.runs.opening import open_run
from fedclip_flwr.runs.trackers import Trackers
from fedclip_flwr.runs.trackers.about import About
from fedclip_flwr.runs.trackers.tensor_board import TensorBoard
from fedclip_flwr.server.results import RoundResult
from tests import forked
from tests.extras import needs
from tests.runs.test_folder import complete, started
from tests.test_running import fedclip

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

SECRETS = ("st-mary", "st-john", "melanoma")
"""Names of sites and of a class."""
SITES = {"st-mary": 0.5, "st-john": 1.0}
QUALITY = {"accuracy": 0.75, "balanced_accuracy": 0.7, "macro_f1": 0.6, "calibration_error": 0.1}
RESULT = {
    "seen": 0.75,
    "unseen": 0.5,
    "sites": SITES,
    "holdout_sites": {"st-john": 0.5},
    "metrics": {
        "seen": QUALITY,
        "unseen": {**QUALITY, "recall": {"melanoma": 0.5}},
        "sites": {"st-mary": {**QUALITY, "recall": {"melanoma": 0.25}}},
    },
}
SUMMARY: dict[str, Any] = {
    "status": "completed",
    "holdout": "far",
    "zero_shot": {**RESULT, "seen": 0.25},
    "adapted": {**RESULT, "round": 1, "blend": 1.0, "personal": SITES, "personal_metrics": None},
    "traffic": {"down_bytes": 10, "up_bytes": 20, "per_site_round_bytes": 7.5, "full_model_bytes": None},
    "privacy": None,
    "seconds": {"encode": 1.0, "rounds": 2.0, "total": 3.5},
    "rounds": 2,
    "failures": [{"round": 1, "site": "st-mary", "why": "out of memory"}],
    "scaled": {"st-john": 2},
}
CLOSING = {
    "result/zero_shot/seen": 0.25,
    "result/zero_shot/unseen": 0.5,
    "result/adapted/seen": 0.75,
    "result/adapted/unseen": 0.5,
    "result/adapted/round": 1,
    "result/adapted/blend": 1.0,
    **{
        f"result/{which}/{where}/{name}": value
        for which in ("zero_shot", "adapted")
        for where in ("seen", "unseen")
        for name, value in QUALITY.items()
        if name != "accuracy"
    },
    "result/traffic/down_bytes": 10,
    "result/traffic/up_bytes": 20,
    "result/traffic/per_site_round_bytes": 7.5,
    "result/seconds/encode": 1.0,
    "result/seconds/rounds": 2.0,
    "result/seconds/total": 3.5,
    "result/rounds": 2,
}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracker hears of the user's own settings for it, nor of a network."""
    for name in os.environ:
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


def line(number: int, loss: float | None = None) -> dict[str, Any]:
    """As of metrics.jsonl."""
    return {"round": number, "seen": number / 4, "unseen": None, "loss": loss or 1.0 - number / 8, "sites": 2}


def about(folder: Path, before: int = 0) -> tuple[str, Path, Settings, list[dict[str, Any]]]:
    """A run of that folder, which continues after that number of lines."""
    folder.mkdir(exist_ok=True)
    settings = Settings(class_names="melanoma,nevus", results_dir=str(folder.parent), seed=7)
    return f"{folder.name}-0a1b", folder, settings, [line(number) for number in range(before)]


def track(name: str, folder: Path, rounds: range, before: int = 0, end: str = "completed") -> None:
    """The tracker gets these rounds, and the end."""
    tracking = Trackers(name)
    tracking.begin(*about(folder, before))
    for number in rounds:
        tracking.line(line(number))
    if end == "completed":
        tracking.finish(SUMMARY)
    tracking.end(end)


def events_of(folder: Path) -> Any:
    """What TensorBoard shows of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value by tag."""
    events = events_of(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts(folder: Path) -> dict[str, str]:
    events = events_of(folder)
    return {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}


def mlflow_of(results: Path) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # as this package does before it imports it
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{results / 'mlflow.db'}")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's, which it takes a second to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_of(path.parent).search_experiments()
    return path


def mlflow_runs(results: Path, experiment: str = "fedclip") -> list[Any]:
    client = mlflow_of(results)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return [*client.search_runs([found.experiment_id])]


def history(results: Path, run: Any, name: str) -> list[tuple[int, float]]:
    return [(int(m.step), m.value) for m in mlflow_of(results).get_metric_history(run.info.run_id, name)]


def records(file: Path) -> Iterator[Any]:
    """Of a .wandb file: LevelDB's log format, in blocks of 32 KiB, each with W&B's messages or pieces of them."""
    from wandb.proto import wandb_internal_pb2

    data, place, joined = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        joined += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of it, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(joined)
            yield record
            joined = b""


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a .wandb file's history."""
    found = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in row.item} for row in found]


def wandb_summary(file: Path) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for record in records(file):
        last |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    return last


def wandb_files(folder: Path) -> list[Path]:
    """What W&B has written, to the end."""
    import wandb

    wandb.teardown()
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def no_secret_in(*places: Path) -> bool:
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    return bool(files) and not any(name.encode() in file.read_bytes() for file in files for name in SECRETS)


def approx(expected: Mapping[Any, float]) -> Any:
    """Event files have float32."""
    return pytest.approx(dict(expected), rel=1e-6)


@needs("tensorboard")
def test_tensorboard_shows_rounds_settings_and_the_result(tmp_path: Path) -> None:
    track("tensorboard", tmp_path / "one", range(3))
    shown = scalars(tmp_path / "one")
    assert shown["seen"] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert shown["loss"] == [(0, 1.0), (1, 0.875), (2, 0.75)]
    assert shown.keys() == {"seen", "loss", "sites", *CLOSING}
    assert {name: shown[name][0][1] for name in CLOSING} == approx(CLOSING)
    assert all(shown[name][0][0] == 2 for name in CLOSING)
    assert "| seed | 7 |" in texts(tmp_path / "one")["settings/text_summary"]
    assert texts(tmp_path / "one")["status/text_summary"] == "completed"
    assert no_secret_in(tmp_path / "one" / "tensorboard")


@needs("tensorboard")
def test_tensorboard_shows_a_run_that_went_on_as_one(tmp_path: Path) -> None:
    track("tensorboard", tmp_path / "one", range(4), end="stopped")  # round 3 was never complete
    track("tensorboard", tmp_path / "one", range(2, 4), before=2)
    shown = scalars(tmp_path / "one")
    assert shown["seen"] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert len(list((tmp_path / "one" / "tensorboard").iterdir())) == 2
    assert texts(tmp_path / "one")["status/text_summary"] == "completed"


@needs("tensorboard")
def test_tensorboard_has_several_prompts_in_one_cell(tmp_path: Path) -> None:
    TensorBoard(About("one", tmp_path, {"prompt": "a {}|the {}"}, [])).end("stopped")
    assert "| prompt | a {}&#124;the {} |" in texts(tmp_path)["settings/text_summary"]


@needs("mlflow")
def test_mlflow_has_rounds_settings_and_the_result(tmp_path: Path) -> None:
    track("mlflow", tmp_path / "one", range(3))
    (run,) = mlflow_runs(tmp_path)
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    assert history(tmp_path, run, "seen") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert run.data.metrics.keys() == {"seen", "loss", "sites", *CLOSING}
    assert {name: run.data.metrics[name] for name in CLOSING} == approx(CLOSING)
    assert run.data.params["seed"] == "7"
    assert not run.data.params.keys() & {"class-names", "results-dir", "resume", "track", "prompt"}
    assert run.data.tags.keys() == {"fedclip.run", "mlflow.runName"}  # and nobody's name, or place of files
    assert no_secret_in(tmp_path / "mlflow.db")


@needs("mlflow")
def test_an_mlflow_run_continues_and_has_no_round_twice(tmp_path: Path, database: Path) -> None:
    shutil.copy(database, tmp_path)
    track("mlflow", tmp_path / "one", range(3), end="failed")
    assert [run.info.status for run in mlflow_runs(tmp_path)] == ["FAILED"]
    track("mlflow", tmp_path / "other", range(1), end="stopped")
    track("mlflow", tmp_path / "one", range(2, 4), before=2)
    runs = {run.info.run_name: run for run in mlflow_runs(tmp_path)}
    assert {name: run.info.status for name, run in runs.items()} == {"one": "FINISHED", "other": "KILLED"}
    assert history(tmp_path, runs["one"], "seen") == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]


@needs("mlflow", "tensorboard", "wandb")
def test_a_run_that_is_tracked_only_later_is_tracked_completely(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(database, tmp_path)
    track("mlflow,tensorboard,wandb", tmp_path / "one", range(2, 3), before=2)
    assert scalars(tmp_path / "one")["seen"] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert history(tmp_path, mlflow_runs(tmp_path)[0], "seen") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    (file,) = wandb_files(tmp_path / "one")
    assert [(row["_step"], row["seen"]) for row in wandb_rows(file)] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    printed = capsys.readouterr()
    assert sorted(printed.out.splitlines()) == [
        f"tracking    mlflow: experiment fedclip in sqlite:///{tmp_path}/mlflow.db",
        f"tracking    tensorboard: {tmp_path}/one/tensorboard",
        f"tracking    wandb: {file.parent}",
    ]


@needs("mlflow")
def test_mlflows_own_variables_are_heeded(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    shutil.copy(database, elsewhere)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{elsewhere / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ward 7")
    track("mlflow", tmp_path / "one", range(1))
    assert [run.info.run_name for run in mlflow_runs(elsewhere, "ward 7")] == ["one"]
    assert not (tmp_path / "mlflow.db").exists()


@needs("wandb")
def test_wandb_has_rounds_settings_and_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "st-mary")
    monkeypatch.setenv("WANDB_PROJECT", "ward-7")
    track("wandb", tmp_path / "one", range(3))
    (file,) = wandb_files(tmp_path / "one")
    assert [(row["_step"], row["round"], row["seen"]) for row in wandb_rows(file)] == [
        (0, 0, 0.0),
        (1, 1, 0.25),
        (2, 2, 0.5),
    ]
    summary = wandb_summary(file)
    assert {name: summary[name] for name in CLOSING} == approx(CLOSING)
    assert summary["status"] == "completed"
    (run,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_id, run.display_name, run.host) == ("ward-7", "one-0a1b", "one", "fedclip")
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config["seed"] == 7
    assert config.keys() <= Settings.keys().keys() - {"class-names", "results-dir", "resume", "track"}
    kinds = {record.WhichOneof("record_type") for record in records(file)}
    assert not kinds & {"output", "output_raw", "stats", "artifact"}
    assert no_secret_in(file)
    assert not run.HasField("git")


@needs("wandb")
def test_a_wandb_run_that_went_on_offline_is_two_files_of_one_run(tmp_path: Path) -> None:
    track("wandb", tmp_path / "one", range(2), end="stopped")
    (first,) = wandb_files(tmp_path / "one")
    exits = [record.exit.exit_code for record in records(first) if record.WhichOneof("record_type") == "exit"]
    assert exits == [1]
    track("wandb", tmp_path / "one", range(2, 4), before=2)
    assert {file.name for file in wandb_files(tmp_path / "one")} == {"run-one-0a1b.wandb"}
    (second,) = {*wandb_files(tmp_path / "one")} - {first}
    assert [row["_step"] for row in wandb_rows(first)] == [0, 1]
    assert [row["_step"] for row in wandb_rows(second)] == [2, 3]


def in_a_process_of_its_own(name: str, folder: Path, limit: str = "", **env: str) -> list[str]:
    """What is printed where the tracker gets many rounds: W&B's mode and a full disk hold for a process."""
    script = f"""
import resource, signal
from pathlib import Path
from fedclip_flwr.base.settings import Settings
from fedclip_flwr.runs.trackers import Trackers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{limit}
tracking = Trackers({name!r})
tracking.begin("one-0a1b", Path({str(folder)!r}), Settings(), [])
for number in range(1000):
    tracking.line({{"round": number, "seen": 0.5}})
tracking.end("completed")
"""
    done = forked.run(script, env={**os.environ, **env})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@needs("wandb")
def test_without_a_key_wandb_is_dropped_in_one_line(tmp_path: Path) -> None:
    env = {"WANDB_MODE": "online", "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    (printed,) = in_a_process_of_its_own("wandb", tmp_path, **env)
    assert printed.startswith(
        "tracking    wandb failed, and is no longer used; the run continues: UsageError: No API key"
    )


class Noting:
    """A tracker of no package: what it got."""

    where = "here"

    def __init__(self, about: About) -> None:
        self.lines, self.ends = [*about.before], list[str]()

    def line(self, line: Mapping[str, float]) -> None:
        self.lines.append(dict(line))

    def finish(self, figures: Mapping[str, float]) -> None:
        pass

    def end(self, status: str) -> None:
        self.ends.append(status)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Noting]:
    """What `tensorboard` gets, which is such a tracker now, by the name of the run's folder."""
    found: dict[str, Noting] = {}
    monkeypatch.setitem(
        trackers.TRACKERS, "tensorboard", ("json", lambda about: found.setdefault(about.folder.name, Noting(about)))
    )
    return found


class Failing:
    """A tracker that fails at the second line, in a way nobody expects."""

    where = "nowhere"
    ended = False

    def __init__(self, about: About) -> None:
        self.lines = 0

    def line(self, line: Mapping[str, float]) -> None:
        self.lines += 1
        if self.lines == 2:
            raise SystemExit("no route to https://key:secret@example.org\nfor now")

    def finish(self, figures: Mapping[str, float]) -> None:
        Failing.ended = True

    def end(self, status: str) -> None:
        Failing.ended = True


def test_a_tracker_that_fails_is_dropped_once_and_the_others_continue(
    tmp_path: Path, noted: dict[str, Noting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("wandb", Failing))
    monkeypatch.setattr(Failing, "ended", False)
    track("wandb,tensorboard", tmp_path / "one", range(4))
    assert [said for said in capsys.readouterr().out.splitlines() if "no longer" in said] == [
        "tracking    wandb failed, and is no longer used; the run continues: SystemExit: no route to "
        "https://example.org for now"
    ]
    assert not Failing.ended
    assert len(noted["one"].lines) == 4


@pytest.mark.parametrize(("where", "end"), [("__init__", "stopped"), ("__init__", "completed"), ("line", "failed")])
def test_a_tracker_that_hangs_holds_up_neither_rounds_nor_a_stop(
    where: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    never = threading.Event()

    class Hanging(Failing):
        pass

    monkeypatch.setattr(Hanging, where, lambda *_: never.wait() and None)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("wandb", Hanging))
    monkeypatch.setattr(trackers, "READY", 0.01 if where == "__init__" else trackers.READY)
    monkeypatch.setattr(trackers, "CUT_OFF", 0.01)
    monkeypatch.setattr(trackers, "DONE", math.inf)  # which no thread can be waited for
    track("wandb", tmp_path / "one", range(100), end=end)
    never.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join()
    expected = "tracking    wandb did not finish in time, and may lack the end of this run\n"
    assert capsys.readouterr().out.removeprefix("tracking    wandb: nowhere\n") == expected  # and nothing later


@needs("tensorboard")
def test_on_a_full_disk_tensorboard_is_dropped_in_one_line(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))"
    assert in_a_process_of_its_own("tensorboard", tmp_path, limit)[1:] == [
        "tracking    tensorboard failed, and is no longer used; the run continues: OSError: [Errno 27] File too large"
    ]
    assert len(scalars(tmp_path)["seen"]) > 10


def test_what_is_not_a_number_is_sent_to_no_tracker() -> None:
    facts = {"seen": 0.5, "unseen": None, "sites": {"st-mary": 1.0}, "who": "st-john", "won": True, "loss": math.inf}
    assert trackers._numbers(facts) == {"seen": 0.5, "loss": math.inf}
    assert trackers.figures(SUMMARY) == CLOSING
    private = {**SUMMARY, "privacy": {"dp": "local", "epsilon": 3.5, "delta": 1e-5}}
    assert trackers.figures(private) == {**CLOSING, "result/privacy/epsilon": 3.5}


def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", ("json", Failing))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("not_there", Failing))
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("left_behind", Failing))
    (tmp_path / "left_behind").mkdir()
    with pytest.raises(UserError) as error:
        open_run({"track": "tensorboard, wandb,mlflow", "learning-rate": -1})
    assert str(error.value).splitlines()[2].strip() == (
        "track = 'tensorboard, wandb,mlflow': wandb and mlflow are not installed here: "
        "pip install 'fedclip-flwr[wandb,mlflow]'"
    )
    trackers.check("tensorboard")
    trackers.check("")


def test_nothing_of_a_tracker_is_imported_by_a_run_without_one() -> None:
    script = (
        "import sys, server_app; from pathlib import Path; from fedclip_flwr.base.settings import Settings; "
        "from fedclip_flwr.runs.trackers import Trackers, check; check(''); tracking = Trackers(''); "
        "tracking.begin('run', Path(), Settings(), []); tracking.line({}); tracking.finish({}); "
        "tracking.end('completed'); "
        "sys.exit(bool({'mlflow', 'wandb', 'tensorboard'} & sys.modules.keys()))"
    )
    done = forked.run(script)
    assert done.returncode == 0, done.stderr


def tracked(results: Path, **settings: object) -> RunFolder:
    """The folder of a run that has begun and is tracked; its first round is complete."""
    folder = started(results, track="tensorboard", **settings)
    folder.begin([], 2)
    folder.trackers.begin(folder.run, folder.path, Settings(), folder.metrics)
    folder.line(RoundResult(0, {}, {}, 10, 0.5))
    return folder


def test_how_a_run_ends_reaches_its_trackers(tmp_path: Path, noted: dict[str, Noting]) -> None:
    with pytest.raises(ZeroDivisionError), (failed := tracked(tmp_path)):
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt), (interrupted := tracked(tmp_path)):
        raise KeyboardInterrupt
    with tracked(tmp_path) as stopped:
        stopped.stop()  # as Flower's exit handler does, from outside
    with tracked(tmp_path) as completed:
        completed.finish(SUMMARY)
    completed.stop()  # too late
    ends = [noted[run.path.name].ends for run in (failed, interrupted, stopped, completed)]
    assert ends == [["failed"], ["stopped"], ["stopped"], ["completed"]]
    assert [row["bytes"] for row in noted[completed.path.name].lines] == [10]


def test_a_run_may_continue_with_another_tracker(tmp_path: Path, noted: dict[str, Noting]) -> None:
    with started(tmp_path) as run:
        run.checkpoint(complete(1, [line(0)]))
    with tracked(tmp_path, resume=run.path.name) as later:
        assert later.run == run.run
    assert [row.get("seen") for row in noted[run.path.name].lines] == [0.0, None]


@pytest.mark.federation
@needs("mlflow", "tensorboard")
def test_a_federation_is_tracked_by_two_trackers(tmp_path: Path, tree: Path) -> None:
    """The user's environment reaches the process of the run."""
    given = [f"data=folder:{tree}", "num-server-rounds=2", "batch-size=4", "holdout=", "track=tensorboard,mlflow"]
    done = fedclip(
        "run",
        "--nodes",
        "2",
        *given,
        f"results-dir={tmp_path}/runs",
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = (tmp_path / "runs" / "latest").resolve()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    shown, (run,) = scalars(folder), mlflow_runs(tmp_path)
    for name in ("seen", "val", "loss", "sites", "bytes", "seconds"):
        expected = {row["round"]: row[name] for row in lines}
        assert dict(shown[name]) == approx(expected)
        assert history(tmp_path, run, name) == [*expected.items()]
    assert "unseen" not in shown
    assert run.data.metrics["result/adapted/seen"] == pytest.approx(summary["adapted"]["seen"])
    assert run.info.status == "FINISHED"
    assert "tracking    mlflow" in done.stdout  # whether before or after the plan
    assert "run folder" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    for file in (tmp_path / "mlflow.db", *(folder / "tensorboard").iterdir()):
        assert b"photo-0" not in file.read_bytes()
