"""Commands that use a trained adapter: predict, evaluate, export."""

from __future__ import annotations

from typing import Annotated

import typer

from fedclip_flwr.cli.common import command, option

Adapter = Annotated[
    str, option("A run by its name, a folder, or a name on the hub (default: the latest run).", "--adapter", "-a")
]
Classes = Annotated[str, option("Other class names than the run's: a comma list, or a file with one per line.")]
Prompt = Annotated[str, option("Another prompt template, with {} for the class name; separate several with |.")]
Model = Annotated[str, option("The location of its CLIP, if that has moved.")]
Revision = Annotated[str, option("For a name on the hub: a commit, tag or branch.")]


@command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER...", show_default=False)],
    adapter: Adapter = "latest",
    top: Annotated[int, option("Number of classes for each image (default: 1).", "--top", "-k")] = 1,
    classes: Classes = "",
    prompt: Prompt = "",
    out: Annotated[str, option("A file for the output, .csv or .jsonl, instead of the terminal.", "--out", "-o")] = "",
    as_json: Annotated[bool, option("JSON lines instead of CSV.", "--json")] = False,
    model: Model = "",
    revision: Revision = "",
    device: Annotated[str, option("cpu, cuda or cuda:N (default: a GPU, if there is one).")] = "auto",
    precision: Annotated[str, option("float32, bfloat16 or float16 (default: by device).")] = "auto",
) -> None:
    """Classify images: a line for each, with the likeliest classes and their probabilities.

    Folders are searched recursively; - reads file names from standard input; features:PATH takes a feature folder.
    Lines are printed as images are classified, by default as CSV; --out writes the file when all are done. An image
    that can't be read has a line with an error, and the exit status is then 1; 2 if nothing could be done.

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
    by_class: Annotated[bool, option("Also print the recall of each class.", "--by-class")] = False,
    as_json: Annotated[bool, option("Print JSON.", "--json")] = False,
    model: Model = "",
    revision: Revision = "",
) -> None:
    """Measure accuracy on labelled images: zero-shot beside adapted, domain by domain.

    DATA is as the setting data: a folder (domain/class/image or class/image), a data set, drawn, features:PATH.
    Settings are device, precision, and those of a data set's columns. Images that can't be read are skipped and named.
    Features are stored, so a second evaluation is quick. With --classes, give one other name for each of the data's own
    classes, in their order.

    Examples: fedclip evaluate images; fedclip evaluate drawn:7 --adapter 20260102-030405 --by-class --json
    """
    from fedclip_flwr.inference import evaluate
    from fedclip_flwr.operations import simulation  # not for --help: they bring torch

    simulation.stop_in_order("Stopped. Encoded features are kept: the same command resumes from here.")
    options = evaluate.EvaluateOptions(
        data, settings or [], adapter, classes, prompt, by_class, as_json, model, revision
    )
    typer.echo(evaluate.evaluate(options))


@command()
def export(
    run: Annotated[str, typer.Argument(metavar="[RUN]", show_default=False)] = "latest",
    out: Annotated[str, option("The folder to write.", "--out", "-o")] = "",
    onnx: Annotated[
        bool, option("Also write ONNX: one file with image encoder, adapter and classes.", "--onnx")
    ] = False,
    with_sites: Annotated[bool, option("Name the sites and their sizes in the model card.", "--with-sites")] = False,
    push: Annotated[str, option("Also upload it to ORG/NAME on the hub, publicly by default.")] = "",
    private: Annotated[bool, option("Make a new repository on the hub private.", "--private")] = False,
    classes: Classes = "",
    prompt: Prompt = "",
    model: Model = "",
    revision: Revision = "",
) -> None:
    """Export a trained adapter to a folder, for use elsewhere: adapter, settings, model card.

    RUN is a run by its name, a folder, or a name on the hub (default: the latest run). An older export in the folder
    is replaced, except a model card that was edited. The frozen CLIP is not copied, except into the ONNX file; a model
    that was fully trained is.

    Examples: fedclip export --out adapter; fedclip export 20260102-030405 --out adapter --onnx --push me/adapter
    """
    from fedclip_flwr.inference import export  # not for --help: it brings torch

    options = export.ExportOptions(run, out, onnx, with_sites, push, private, classes, prompt, model, revision)
    typer.echo(export.export(options))
