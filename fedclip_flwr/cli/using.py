"""Commands that use what was learnt: on images, on labelled images, elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from fedclip_flwr.cli.common import command, option

Adapter = Annotated[
    str, option("A run by its name, a folder, or a name on the hub; the latest run unless said.", "--adapter", "-a")
]
Classes = Annotated[
    str, option("Other classes than the run's, by words alone: a comma list, or a file with one in each line.")
]
Prompt = Annotated[str, option("Another template, with {} for the class name; several with | between.")]
Model = Annotated[str, option("Where its CLIP is, if that is no longer where it was.")]
Revision = Annotated[str, option("Of a name on the hub: a commit, tag or branch.")]


@command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", show_default=False)],
    adapter: Adapter = "latest",
    top: Annotated[int, option("So many classes for each image; 1 unless said.", "--top", "-k")] = 1,
    classes: Classes = "",
    prompt: Prompt = "",
    out: Annotated[str, option("A file for the lines, .csv or .jsonl, instead of the screen.", "--out", "-o")] = "",
    as_json: Annotated[bool, option("Lines of JSON instead of CSV.", "--json")] = False,
    model: Model = "",
    revision: Revision = "",
    device: Annotated[str, option("cpu, cuda or cuda:N; a GPU unless said, where there is one.")] = "auto",
    precision: Annotated[str, option("float32, bfloat16 or float16; what pays unless said.")] = "auto",
) -> None:
    """Tell what images show: a line for each, with the likeliest classes and their probabilities.

    Folders are searched to their ends; - reads names of files from the standard input; features:PATH takes a folder of
    features. Lines come as the images are seen, CSV unless said; with --out the file is there when all are done. An
    image that can't be read has a line that says so, and the exit status is then 1; 2 if nothing can be done.

    Examples: fedclip predict photos --top 3; fedclip predict *.jpg --adapter 20260102-030405 --out found.csv; fedclip
    predict photos --classes zebra,lion --prompt "a photo of a {}"
    """
    from fedclip_flwr.inference import predict  # not for --help: it brings torch

    options = predict.PredictOptions(
        images, adapter, top, classes, prompt, out, as_json, model, revision, device, precision
    )
    raise typer.Exit(predict.predict(options))


@command()
def evaluate(
    data: Annotated[str, typer.Argument(metavar="DATA", show_default=False)],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    adapter: Adapter = "latest",
    classes: Classes = "",
    prompt: Prompt = "",
    by_class: Annotated[bool, option("Also how many of each class are recognised.", "--by-class")] = False,
    as_json: Annotated[bool, option("All of it as JSON.", "--json")] = False,
    model: Model = "",
    revision: Revision = "",
) -> None:
    """Measure on labelled images how well they are told apart: zero-shot beside adapted, domain by domain.

    DATA is what the setting data takes: a folder (domain/class/image or class/image), a data set, drawn, features:PATH.
    Settings are device, precision, and those of a data set's columns. Images that can't be read are left out, and told.
    Features are stored, so a second time is quick. With --classes, as many other words for the data's own classes are
    taken in the order of these.

    Examples: fedclip evaluate images; fedclip evaluate drawn:7 --adapter 20260102-030405 --by-class --json
    """
    from fedclip_flwr.inference import evaluate
    from fedclip_flwr.operations import simulation  # not for --help: they bring torch

    simulation.stop_in_order("Stopped. What is encoded is kept: the same command goes on from here.")
    options = evaluate.EvaluateOptions(
        data, settings or [], adapter, classes, prompt, by_class, as_json, model, revision
    )
    typer.echo(evaluate.evaluate(options))


@command()
def export(
    run: Annotated[str, typer.Argument(metavar="[RUN]", show_default=False)] = "latest",
    out: Annotated[str, option("The folder that is written.", "--out", "-o")] = "",
    onnx: Annotated[bool, option("Also as ONNX: one file for images, adapter and classes.", "--onnx")] = False,
    with_sites: Annotated[bool, option("Name the sites and their sizes in the model card.", "--with-sites")] = False,
    push: Annotated[str, option("Also upload it to this ORG/NAME of the hub; for all to see, unless said.")] = "",
    private: Annotated[bool, option("A new place on the hub is private.", "--private")] = False,
    classes: Classes = "",
    prompt: Prompt = "",
    model: Model = "",
    revision: Revision = "",
) -> None:
    """Write what was learnt to a folder, to be used elsewhere: adapter, settings, model card.

    RUN is a run by its name, a folder, or a name on the hub; the latest run unless said. An older export in the folder
    is replaced, but for a model card that was edited. The frozen CLIP is not copied, except into the ONNX file; a model
    that was trained whole is.

    Examples: fedclip export --out adapter; fedclip export 20260102-030405 --out adapter --onnx --push me/adapter
    """
    from fedclip_flwr.inference import export  # not for --help: it brings torch

    options = export.ExportOptions(run, out, onnx, with_sites, push, private, classes, prompt, model, revision)
    typer.echo(export.export(options))
