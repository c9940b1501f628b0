"""TensorBoard."""

from __future__ import annotations

import time
from typing import Any

from fedclip_flwr.runs.trackers.about import About, Numbers


class TensorBoard:
    """An event file in the run's folder, written synchronously: TensorBoard's own writer fails in a thread of its own.

    A resumed run has a new file with all rounds so far, which also makes TensorBoard discard the old one.
    """

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = about.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        again = any(folder.iterdir())
        self.where = str(folder)
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}").open("wb")
        self._records = RecordWriter(self._file)
        self._add(0, file_version="brain.Event:2")
        if again:
            self._add(0, session_log=SessionLog(status=SessionLog.START))
        rows = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in about.settings.items()]
        self._text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]))
        for line in about.before:
            self.line(line)

    def line(self, line: Numbers) -> None:
        self._scalars(line, line["round"])

    def finish(self, figures: Numbers) -> None:
        self._scalars(figures, figures["result/rounds"])

    def end(self, status: str) -> None:
        self._text("status", status)
        self._file.close()

    def _text(self, name: str, text: str) -> None:
        from torch.utils.tensorboard import summary

        self._add(0, summary=summary.text(name, text))  # type: ignore[no-untyped-call]

    def _scalars(self, numbers: Numbers, step: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items() if name != "round"]
        self._add(int(step), summary=Summary(value=values))

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        self._records.flush()
