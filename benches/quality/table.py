#!/usr/bin/env python3
"""Writes docs/results.md and its picture from the cells below results/.

    python3 benches/quality/table.py [--no-picture]

A cell that is not there, or was made by another recipe or setting than now, is shown as missing. The picture needs
matplotlib (benches/requirements.txt); the rest needs the standard library of Python 3.11 alone.
"""

import argparse
import statistics
import sys
from pathlib import Path

from figures import Figures
from setting import HERE, RECIPES, REPOSITORY, RESULTS, SETTING, Setting, SettingError

MISSING = "missing"
DOCUMENT = REPOSITORY / "docs" / "results.md"
# What the tables say, in words: by hand, so to be read again when they change.
READING = HERE / "reading.md"
PICTURE = "images/quality.png"
MIB = 1 << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--setting", type=Path, default=SETTING)
    parser.add_argument("--recipes", type=Path, default=RECIPES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the picture goes to images/ beside it")
    parser.add_argument("--no-picture", action="store_true", help="leave the picture as it is")
    given = parser.parse_args()
    setting = Setting.read(given.setting, given.recipes)
    figures = Figures.read(setting, given.results, given.seeds)
    for name in figures.stale:
        print(f"not shown: {name} was made by another recipe, setting, model or text", file=sys.stderr)
    picture = given.document.parent / PICTURE
    if not given.no_picture:
        from picture import draw

        draw(figures, picture)
    given.document.parent.mkdir(parents=True, exist_ok=True)
    given.document.write_text(document(figures, picture.is_file()))
    print(f"{given.document}: {len(figures.cells)} cells")


def document(figures, has_picture):
    setting = figures.setting
    parts = [*head(figures)]
    if has_picture:
        title = setting.perplexity[0].title
        window = setting.perplexity[0].windows[0]
        parts += [f"![{title} perplexity at window {window} of every method and seed]({PICTURE})", ""]
    parts += [READING.read_text().rstrip(), ""]
    for sparsity in setting.goal.ratio:
        parts += section(figures, sparsity)
    parts += ablations(figures)
    parts += choices(figures)
    parts += commands(setting)
    return "\n".join(parts) + "\n"


# What was done -----------------------------------------------------------------------------------------------------------


def head(figures):
    setting, training = figures.setting, figures.setting.training
    texts = ", ".join(f"{text.title} (first {count(text.max_tokens)} tokens)" for text in setting.perplexity)
    windows = " and ".join(str(window) for window in setting.perplexity[0].windows)
    yield "# Quality of pruned models"
    yield ""
    yield "<!-- Written by benches/quality/table.py from benches/quality/results and reading.md; do not edit. -->"
    yield ""
    yield (
        f"{setting.model}, pruned and tuned in one run by each method, then measured by `espalier eval` as the checkpoint that was exported."
    )
    yield ""
    yield (
        f"- **Equal training for every row but the first**: {training['steps']} steps of {training['rows'] * training['micro_batches']} windows "
        f"of {training['window_tokens']} tokens, {setting.training_tokens:,} tokens of C4 and Wikipedia text in an order that the seed "
        "gives; no text of the evaluation is in it. Steps before a one-shot decision count. AdamW, f32; the rest is in each row's recipe. What "
        "compensation is calibrated on comes on top: 48 windows of the same text, the same at each decision, forward only. So does the "
        "forward pass of distillation over what is trained on."
    )
    yield (
        "- **Equal size for every pruned row**: the same share of the weights of all projections goes, and every layer keeps the same "
        "widths (`shape: uniform`, whole key/value groups; but for one variant, which says so)."
    )
    yield (
        f"- **Perplexity** (lower is better): {texts}; one stream without special tokens, windows of {windows} tokens that do not overlap, each "
        "alone, f32."
    )
    yield f"- **Zero-shot** (higher is better): {zeroshot_words(figures)}"
    yield (
        "- **Cost** of the whole `espalier prune`, with loading, export and the check of the export: wall and CPU seconds of all its "
        "processes, high-water mark of resident memory of the worker and of the command, which holds the coordinator. "
        f"{machine(figures)}"
    )
    yield "- Mean ± sample standard deviation over seeds where there are several; `missing` where nothing was measured."
    yield f"- **Limits**: {setting.limits}."
    yield ""


def zeroshot_words(figures):
    zeroshot = figures.setting.zeroshot
    which = f"the first {zeroshot.limit} questions" if zeroshot.limit else "all questions"
    words = (
        f"mean accuracy of {', '.join(zeroshot.tasks)}, {which} of each in the file; plain accuracy for boolq and winogrande, "
        "length-normalised for the others."
    )
    if (error := figures.zeroshot_error()) is not None:
        words += f" The number of questions leaves a standard error of up to {error:.1f} points in each mean; it is not in the ±."
    return words


def machine(figures):
    made = [cell["made"] for cell in figures.cells.values()]
    if not made:
        return ""
    kinds = sorted({f"{m['processor']}, {m['threads']} thread" + "s" * (m["threads"] > 1) for m in made})
    most = max(m["parallel"] for m in made)
    beside = f", up to {most} cells at a time on cores of their own, which share memory bandwidth" if most > 1 else ""
    days = sorted(m["time"][:10] for m in made)
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    builds = len({m["programs"] for m in made})
    several = f" Cells come from {builds} builds of the programs, so their times do not compare exactly." if builds > 1 else ""
    return f"Measured {span} on {'; '.join(kinds)}{beside}.{several}"


# Tables ------------------------------------------------------------------------------------------------------------------


def section(figures, sparsity):
    setting = figures.setting
    percent = f"{sparsity * 100:g} %"
    columns = [(text, window) for text in setting.perplexity for window in text.windows]
    yield f"## {percent} of the prunable weights removed"
    yield ""
    titles = [f"{text.title} @{window}" for text, window in columns]
    yield table_row(["row", "seeds", *titles, "zero-shot mean, %", "parameters", "memory, MiB (worker + command)", "wall, s", "CPU, s"])
    yield table_row(["---", *["---:"] * (len(titles) + 6)])
    for row in setting.compared:
        cells = figures.of(row, sparsity)
        yield table_row(
            [
                row.title,
                len(cells) if cells else MISSING,
                *(spread(figures.perplexity(cells, text, window), "{:.2f}") for text, window in columns),
                spread(figures.zeroshot(cells), "{:.1f}"),
                spread(figures.prune(cells, "parameters"), "{:,.0f}"),
                memory(figures, row, cells),
                cost(figures, row, cells, "wall_s"),
                cost(figures, row, cells, "cpu_s"),
            ]
        )
    yield ""
    yield from ratios(figures, sparsity, columns, titles)


def ratios(figures, sparsity, columns, titles):
    """Each row's perplexity over that of the row it is compared with, seed by seed."""
    setting = figures.setting
    against = setting.row(setting.goal.against)
    goal = setting.goal.ratio[sparsity]
    yield (
        f"Perplexity over that of {against.title}, seed by seed (below 1 is better). The goal for {setting.row(setting.goal.row).title} is "
        f"at most {goal:g}{goal_words(figures, sparsity)}"
    )
    yield ""
    yield table_row(["row", *titles])
    yield table_row(["---", *["---:"] * len(titles)])
    for row in setting.compared:
        if row.pruned:
            values = [figures.ratios(row, sparsity, text, window) for text, window in columns]
            yield table_row([row.title, *(spread(value, "{:.3f}") for value in values)])
    yield ""


def ablations(figures):
    """What each choice does: variants of one row at the first sparsity and seed."""
    setting = figures.setting
    sparsity, seed = next(iter(setting.goal.ratio)), figures.seeds[0]
    rows = [row for row in setting.rows if row.ablation]
    if not rows:
        return
    whole = setting.row(setting.ablated)
    columns = [(text, window) for text in setting.perplexity for window in text.windows]
    yield f"## What each choice does, at {sparsity * 100:g} % and seed {seed}"
    yield ""
    yield f"Perplexity, and in brackets over that of {whole.title}: above 1 the variant is worse."
    yield ""
    titles = [f"{text.title} @{window}" for text, window in columns]
    yield table_row(["variant", *titles, "zero-shot mean, %", "parameters", "CPU, s"])
    yield table_row(["---", *["---:"] * (len(titles) + 3)])
    base = {seed: cell for seed, cell in figures.of(whole, sparsity).items() if seed == figures.seeds[0]}
    for row in [whole, *rows]:
        cells = {seed: cell for seed, cell in figures.of(row, sparsity).items() if seed == figures.seeds[0]}
        fields = []
        for text, window in columns:
            value, against = figures.perplexity(cells, text, window), figures.perplexity(base, text, window)
            ratio = f" ({value[0] / against[0]:.2f})" if value and against else ""
            fields.append(f"{value[0]:.2f}{ratio}" if value else MISSING)
        zeroshot, parameters = figures.zeroshot(cells), figures.prune(cells, "parameters")
        yield table_row(
            [row.title, *fields, spread(zeroshot, "{:.1f}"), spread(parameters, "{:,.0f}"), cost(figures, row, cells, "cpu_s")]
        )
    yield ""


def goal_words(figures, sparsity):
    setting = figures.setting
    text = setting.perplexity[0]
    window = text.windows[0]
    found = figures.ratios(setting.row(setting.goal.row), sparsity, text, window)
    if not found:
        return "."
    mean, goal = statistics.mean(found), setting.goal.ratio[sparsity]
    verdict = "reached" if mean <= goal else "not reached"
    return f"; on {text.title} @{window} it is {mean:.3f}: {verdict}."


def table_row(fields):
    return f"| {' | '.join(str(field) for field in fields)} |"


def spread(values, form):
    """Mean and sample standard deviation of what is there."""
    if not values:
        return MISSING
    mean = form.format(statistics.mean(values))
    if len(values) < 2 or max(values) == min(values):
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


def memory(figures, row, cells):
    if not row.trained:
        return "–"
    worker, command = (figures.prune(cells, name) for name in ("peak_worker_bytes", "peak_coordinator_bytes"))
    if not worker:
        return MISSING
    return f"{max(worker) / MIB:,.0f} + {max(command) / MIB:,.0f}"


def cost(figures, row, cells, name):
    return spread(figures.prune(cells, name), "{:,.0f}") if row.trained else "–"


def choices(figures):
    """What the runs themselves say about learning rate, factors and decisions."""
    setting = figures.setting
    sparsity = next(iter(setting.goal.ratio))
    yield f"## Choices, at {sparsity * 100:g} %"
    yield ""
    yield table_row(["row", "learning rate", "LoRA", "masks decided after step", "steps after the last", "besides"])
    yield table_row(["---", "---", "---", "---", "---:", "---"])
    for row in setting.rows:
        cells = list(figures.of(row, sparsity).values())
        if not row.trained:
            continue
        if not cells:
            yield table_row([row.title, *[MISSING] * 5])
            continue
        prune = cells[0]["prune"]
        recipe, steps = prune["recipe"], prune["pruning_steps"]
        after = setting.training["steps"] - 1 - steps[-1] if steps else setting.training["steps"]
        yield table_row(
            [row.title, learning_rate(recipe["learning_rate"]), lora(recipe["lora"]), few(steps), after, besides(recipe)]
        )
    yield ""


def learning_rate(rate):
    decay = rate["decay"].removeprefix("DECAY_").lower()
    floor = f" to {rate['floor']:g} of it" if rate.get("floor") else ""
    recovery = rate.get("recovery", "RECOVERY_CONTINUE").removeprefix("RECOVERY_").lower()
    recovery = {"continue": "", "hold": "; held up to the last mask", "restart": "; anew after the last mask"}[recovery]
    return f"{rate['peak']:g} after {rate['warmup_steps']} steps, {decay}{floor}{recovery}"


def lora(factors):
    dropout = f", dropout {factors['dropout']:g}" if factors.get("dropout") else ""
    return f"rank {factors['rank']}, alpha {factors['alpha']:g}{dropout}"


# What other columns say or the command does, and what every row has; a field that is none of these is shown.
SAID = {
    *("batch", "seed", "steps", "learning_rate", "lora", "optimizer", "max_grad_norm", "pruning", "recompute"),
    *("criterion", "sparsity", "ramp", "shrink"),
}
USUAL = {
    "precision": {"compute": "COMPUTE_F32", "storage": "STORAGE_F32"},
    "moving_average_decay": 0.9,
    "shape": "SHAPE_UNIFORM",
    "head_grouping": "HEAD_GROUPING_KV_GROUPS",
    "channel_multiple": 1,
    "calibration_windows": 16,
}


def besides(recipe):
    """What no other column says: methods that only some rows use."""
    found = []
    for name, value in [*recipe.items(), *(recipe.get("pruning") or {}).items()]:
        if value and name not in SAID and value != USUAL.get(name):
            inner = [f"{key} {part}" for key, part in flat(value)] if isinstance(value, dict) else [str(word(name, value))]
            found.append(f"{name.replace('_', ' ')} {', '.join(inner)}")
    return "; ".join(found) or "–"


def word(field, value):
    """A value of the schema as a word: SHAPE_PAPER of `shape` is paper."""
    if not isinstance(value, str):
        return value
    for prefix in (field.upper() + "_", value.rsplit("_", 1)[0] + "_"):
        if value.startswith(prefix):
            return value.removeprefix(prefix).lower()
    return value


def flat(value):
    for key, part in value.items() if isinstance(value, dict) else []:
        if isinstance(part, dict):
            yield from flat(part)
        else:
            yield key.replace("_", " "), word(key, part)


def few(steps):
    if len(steps) <= 3:
        return ", ".join(map(str, steps)) or "none"
    return f"{steps[0]}, {steps[1]}, … {steps[-1]} ({len(steps)} times)"


def count(tokens):
    return f"{tokens:,}" if tokens else "all"


# Commands ----------------------------------------------------------------------------------------------------------------


def commands(setting):
    yield "## Commands"
    yield ""
    yield (
        "All of it: `python3 benches/quality/run.py --data DATA --model MODEL --out OUT`, then `python3 benches/quality/table.py`. "
        "What a row runs at its first sparsity and seed; the rest of its choices is in its recipe in `benches/quality/recipes`:"
    )
    yield ""
    yield "```sh"
    sparsity = next(iter(setting.goal.ratio))
    for row in setting.rows:
        if row.trained:
            cell = setting.cell(row, sparsity, 0)
            recipe = f"benches/quality/recipes/{row.name}.yaml"
            words = setting.prune_arguments(
                cell, espalier="espalier", model="MODEL", data="DATA", out=f"OUT/{cell.name}", recipe=recipe, threads=1
            )
            yield " ".join(words)
    text = setting.perplexity[0]
    common = {"espalier": "espalier", "model": "OUT/ROW/model", "data": "DATA", "threads": 1}
    yield " ".join(setting.perplexity_arguments(text, text.windows[0], **common))
    yield " ".join(setting.zeroshot_arguments(**common))
    yield "```"


if __name__ == "__main__":
    try:
        main()
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
