"""A sweep's results for papers: tables with one metric in a cell, each site with each seed, differences of methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import mean
from typing import NamedTuple

from fedclip_flwr.data import held_out
from fedclip_flwr.experiments.baselines import Published, method_of
from fedclip_flwr.experiments.paired import Difference, difference
from fedclip_flwr.experiments.sweep import Found, Plan, Results
from fedclip_flwr.experiments.tables import MEAN, Row, Spread, by_key, columns_of, csv_of, markdown_of

ZERO_SHOT = "zero-shot"
SITES = "sweep,method,held_out,seed,site,unseen,examples,correct,accuracy,zero_shot,gain,selected_round,rounds,bytes"
DIFFERENCES = "sweep,held_out,method,against,measure,pairs,difference,low,high,p"
ESCAPED = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})


class Cells(NamedTuple):
    """A table with one metric in each cell: a column for each held-out domain and measure."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[str]]]


def accuracies(made: Sequence[Row], published: Sequence[Published]) -> Cells:
    """Test accuracies in per cent; the mean over all domains only if others publish it."""
    measures = ["seen", "unseen", *(["all"] if any(source.every for source in published) else [])]
    columns = [(name, measure) for name in dict.fromkeys(row.held_out for row in made) for measure in measures]
    rows: list[tuple[str, list[str]]] = []
    for method in dict.fromkeys(row.method for row in made):
        of = {row.held_out: row for row in made if row.method == method}
        own = {name: {"seen": row.seen, "unseen": row.unseen, "all": row.every} for name, row in of.items()}
        rows.append((method_of(method).label, [_spread(own[name][measure]) for name, measure in columns]))
    for source in published:
        figures, place = {**source.by_domain, MEAN: source.mean}, "all" if source.every else "unseen"
        values = [figures.get(name) if measure == place else None for name, measure in columns]
        rows.append((f"published: {source.label}", ["" if value is None else f"{value:.2f}" for value in values]))
    return Cells([(name or "nothing", measure) for name, measure in columns], rows)


def _spread(spread: Spread | None) -> str:
    return "–" if spread is None else spread.text()


def as_markdown(cells: Cells) -> str:
    head = ["held out", *(f"{name}: {measure}" for name, measure in cells.columns)]
    rule = ["---", *["---:"] * len(cells.columns)]
    return markdown_of([head, rule, *([label, *own] for label, own in cells.rows)])


def as_latex(cells: Cells, facts: str) -> str:
    r"""A `tabular` for \input, with the rules of booktabs."""
    names = list(dict.fromkeys(name for name, _ in cells.columns))
    each = len(cells.columns) // max(len(names), 1)
    groups = [rf"\multicolumn{{{each}}}{{c}}{{{_escaped(name)}}}" for name in names]
    lines = [
        f"% {facts}",
        rf"\begin{{tabular}}{{l{'r' * len(cells.columns)}}}",
        r"\toprule",
        " & ".join(["held out", *groups]) + r" \\",
        " & ".join(["", *(measure for _, measure in cells.columns)]) + r" \\",
        r"\midrule",
        *(" & ".join([_escaped(label), *map(_number, own)]) + r" \\" for label, own in cells.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.translate(ESCAPED)


def _number(cell: str) -> str:
    """A figure in math mode."""
    return "--" if cell == "–" else f"${cell.replace('±', chr(92) + 'pm')}$" if cell else ""


def by_site(plan: Plan, results: Results, name: str) -> str:
    """CSV: a line for each method, held-out domain, seed and site, or unseen domain; accuracies are fractions."""
    lines: list[Sequence[object]] = [SITES.split(",")]
    zero = {
        (seed, holdout, site): correct / examples
        for (method, seed, holdout), found in by_key(results).items()
        if method == ZERO_SHOT
        for site, examples, correct in found.tests
        if examples
    }
    for (method, seed, holdout), found in by_key(results).items():
        for site, examples, correct in found.tests:
            if not examples:
                continue
            accuracy, before = correct / examples, zero.get((seed, holdout, site))
            apart = int(bool(held_out(holdout, [site])))
            gain = None if before is None else f"{accuracy - before:.6f}"
            figures = [examples, correct, f"{accuracy:.6f}", None if before is None else f"{before:.6f}", gain]
            how = [found.round, plan.rounds_of(method), found.bytes]
            lines.append([name, method, holdout, seed, site, apart, *figures, *how])
    return csv_of(lines)


class Compared(NamedTuple):
    """The difference of two methods in points of accuracy, over the seeds that both have."""

    held_out: str
    method: str
    against: str
    measure: str
    difference: Difference


def differences(plan: Plan, results: Results) -> list[Compared]:
    """The differences of any two methods, for each held-out domain and their mean; a pair is one seed of both."""
    found, columns = by_key(results), columns_of(plan)
    made = []
    for against, method in combinations(plan.methods, 2):
        for name, holdouts in columns.items():
            pairs = [
                [(found[method, seed, h], found[against, seed, h]) for h in holdouts]
                for seed in plan.seeds
                if all((one, seed, h) in found for one in (method, against) for h in holdouts)
            ]
            for measure in ("seen", "unseen"):
                values = [value for pair in pairs if (value := _mean_difference(pair, measure)) is not None]
                if values:
                    made.append(Compared(name, method, against, measure, difference(values)))
    return made


def _mean_difference(pairs: Iterable[tuple[Found, Found]], measure: str) -> float | None:
    """The mean difference in points, over the held-out domains of one seed."""
    known = [
        100 * (one - other)
        for pair in pairs
        for one, other in [(getattr(found, measure) for found in pair)]
        if one is not None and other is not None
    ]
    return mean(known) if known else None


def differences_csv(made: Sequence[Compared], name: str) -> str:
    lines: list[Sequence[object]] = [DIFFERENCES.split(",")]
    for one in made:
        of = one.difference
        figures = (None if value is None else f"{value:.4f}" for value in (of.mean, of.low, of.high))
        p = None if of.p is None else f"{of.p:.3g}"
        lines.append([name, one.held_out, one.method, one.against, one.measure, of.pairs, *figures, p])
    return csv_of(lines)


def differences_table(made: Sequence[Compared], against: Sequence[str]) -> str:
    """Markdown: every method less each of these, as the mean over the held-out domains."""
    last = made[-1].held_out if made else ""
    found = {(one.method, one.against, one.measure): one.difference for one in made if one.held_out == last}
    found |= {(b, a, m): _turned(of) for (a, b, m), of in found.items()}
    measures = list(dict.fromkeys(one.measure for one in made))
    head = ["points of accuracy", *(f"less {of}: {measure}" for of in against for measure in measures), "pairs"]
    lines = [head, ["---"] * len(head)]
    for method in dict.fromkeys(name for name, *_ in found if name != ZERO_SHOT):
        own = [found.get((method, of, measure)) for of in against for measure in measures]
        pairs = sorted({of.pairs for of in own if of})
        if pairs:
            count = " or ".join(map(str, pairs))
            lines.append([method_of(method).label, *("–" if of is None else of.text() for of in own), count])
    return markdown_of(lines) if made else ""


def _turned(of: Difference) -> Difference:
    low, high = (None if bound is None else -bound for bound in (of.high, of.low))
    return Difference(-of.mean, of.pairs, low, high, of.p)
