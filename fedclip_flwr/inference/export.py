"""The command `fedclip export`: a trained adapter in a folder, on the hub, and as ONNX.

A folder that holds an older export is replaced file by file, its config.json last; a model card that was edited stays.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedclip_flwr.base import UserError, content, files, hub
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.inference import onnx_file
from fedclip_flwr.inference.model import FedCLIP
from fedclip_flwr.inference.predict import names_of
from fedclip_flwr.runs import history, peft_folder, saved

CARD, WHOLE = "README.md", "model"
OWN = (
    *(CARD, saved.CONFIG, saved.TENSORS, peft_folder.CONFIG, peft_folder.TENSORS, WHOLE),
    *(onnx_file.FILE, onnx_file.WEIGHTS, onnx_file.PREPARING),
)
"""All files and folders that an export may have."""
BEGUN = ".export-"
"""Prefix of the temporary folder in which an export is made; a killed export leaves it behind."""
MARK = "\n<!-- fedclip export wrote this card: {}. An edited one is kept. -->\n"


@dataclass(frozen=True)
class ExportOptions:
    """The command's options; empty for the default."""

    adapter: str
    out: str
    onnx: bool
    sites: bool
    push: str
    private: bool
    classes: str
    prompt: str
    model: str
    revision: str


def export(options: ExportOptions) -> str:
    """Writes the folder; returns its files and how to use it."""
    if not options.out:
        raise UserError("--out: name the folder that is to be written")
    if options.private and not options.push:
        raise UserError("--private: nothing is uploaded without --push ORG/NAME")
    if options.onnx:
        onnx_file.check_installed()
    if options.push:
        hub.check_upload(options.push)
    out = Path(options.out).expanduser().absolute()
    check(out)
    model = FedCLIP.from_pretrained(
        options.adapter, revision=options.revision, model=options.model, device="cpu", precision="float32"
    )
    if model.loaded.lora:
        peft_folder.check_installed()
    notes = _warned(model, options)
    if options.classes or options.prompt:
        model = model.with_classes(names_of(options.classes) or None, options.prompt)
    notes += write(model, out, onnx=options.onnx, sites=options.sites)
    lines = [f"  {name:<28}{bytes_of(size):>8}" for name, size in _sizes(out)]
    parts = [f"Written to {out}:", *lines, *notes]
    use = str(out)
    if options.push:
        message = f"Export of fedclip-flwr, round {model.facts.get('round', 0)}"
        patterns = [*OWN, f"{WHOLE}/*"]
        parts.append(f"On the hub: {hub.upload(out, options.push, patterns, message, private=options.private or None)}")
        use = options.push
    parts += ["", "from fedclip_flwr import FedCLIP", f'model = FedCLIP.from_pretrained("{use}")']
    return "\n".join([*parts, 'print(model.predict("image.jpg"))'])


def check(out: Path) -> None:
    """Raises if the folder holds anything but an export."""
    if not out.is_dir():
        return
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    others = [name for name in found if name not in OWN]
    if not others and found not in ([], [CARD]) and not _is_export(out):
        others = [name for name in found if name != CARD]
    if others:
        raise UserError(f"--out: {out} holds other files, such as {others[0]}: name another folder")


def _is_export(folder: Path) -> bool:
    try:
        facts = files.read_json(folder / saved.CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and "fedclip_flwr" in facts


def write(model: FedCLIP, out: Path, *, onnx: bool = False, sites: bool = False) -> list[str]:
    """Writes the folder, which `check` has accepted; returns notes for the user. All is made aside, then moved."""
    notes = []
    with files.writing_to(out, "--out"):
        for unfinished in out.glob(f"{BEGUN}*"):
            shutil.rmtree(unfinished)
        with tempfile.TemporaryDirectory(prefix=BEGUN, dir=out) as name:
            made = Path(name)
            model.save_pretrained(made, model_card_kwargs={"sites": sites})
            _mark(made / CARD)
            if onnx:
                print(f"writing and testing {onnx_file.FILE} …", file=sys.stderr, flush=True)
                found = onnx_file.write(model, made)
                notes.append(
                    f"{onnx_file.FILE} compared with torch: {found.same} of {found.pictures} drawn pictures have the "
                    f"same class, and no probability differs by more than {found.difference:.0e}."
                )
            if (out / CARD).exists() and not _as_written(out / CARD):
                (made / CARD).unlink()
                notes.append(f"{CARD} was edited and is kept; for a new one, move it away and repeat the command.")
            _put(made, out)
    return notes


def _put(made: Path, out: Path) -> None:
    """Replaces the old export with the new one; config.json, which marks a folder as an export, comes last."""
    new = sorted((path.name for path in made.iterdir()), key=lambda name: name == saved.CONFIG)
    kept = {CARD, saved.CONFIG}
    for name in OWN:
        if (old := out / name).is_dir():
            shutil.rmtree(old)
        elif name not in {*new, *kept}:
            old.unlink(missing_ok=True)
    for name in new:
        os.replace(made / name, out / name)


def _mark(card: Path) -> None:
    """Appends a hash to the card, which later shows if it was edited."""
    text = card.read_text(encoding="utf-8").rpartition(MARK.partition("{}")[0])
    plain = (text[0] if text[1] else text[2]).rstrip() + "\n"
    card.write_text(plain + MARK.format(content.digest(plain)), encoding="utf-8")


def _as_written(card: Path) -> bool:
    """True if the card has not been edited since it was marked."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    plain = text.rpartition(MARK.partition("{}")[0])[0]
    return text == plain + MARK.format(content.digest(plain))


def _warned(model: FedCLIP, options: ExportOptions) -> list[str]:
    """Notes for the user about the run that it comes from."""
    run = history.read(model.origin) if model.origin and (model.origin / history.SETTINGS).exists() else None
    if run is None:
        if options.sites:
            raise UserError(f"--with-sites: {options.adapter} is not a run's folder, and only that knows the sites")
        return []
    if run.status == "running":
        raise UserError(f"{run.path} is still running: wait until it ends, or stop it")
    if not run.completed:
        return [f"The run was not completed ({run.status}): this is its best adapter up to round {_last(run)}."]
    return []


def _last(run: history.Run) -> object:
    return run.summary.get("round", "?")


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """The names and sizes of the export's files."""
    for name in OWN:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                yield file.relative_to(folder).as_posix(), file.stat().st_size
