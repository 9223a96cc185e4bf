"""Results as pictures: SVG with its words as words."""

import statistics

import step
import tables
import whole_run

OURS, OTHERS, SECOND = "#c2452d", "#8b97ad", "#4f6d9e"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "figure.facecolor": "white",
            "svg.fonttype": "none",
            "svg.hashsalt": "espalier",
        }
    )
    return pyplot


def _save(pyplot, figure, path):
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def _bars(axis, labels, sides, form):
    """Horizontal bars, one group for each label; `sides` are (name, colour, values)."""
    height = 0.8 / len(sides)
    for place, (name, colour, values) in enumerate(sides):
        for row, value in enumerate(values):
            y = row + (place - (len(sides) - 1) / 2) * height
            if value is None:
                axis.text(0, y, " missing", va="center", color="#999999")
                continue
            axis.barh(y, value, height * 0.9, color=colour, label=name if row == 0 else None)
            axis.text(value, y, f" {form(value)}", va="center", color="#333333", zorder=4)
    axis.set_yticks(range(len(labels)), labels)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.18)


def of_step(figures, path):
    pyplot = _pyplot()
    cases = figures.cases()
    labels = [f"{tables.title_of(case)}\n{case.split()[-1]} tokens" for case in cases]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 0.8 * len(cases) + 1.3), sharey=True)
    sides = ((step.OURS, "Espalier", OURS), (step.PEFT, "PyTorch + peft", OTHERS))
    rates = [(name, colour, [tables.tokens_per_s(figures, case, side) for case in cases]) for side, name, colour in sides]
    _bars(speed, labels, rates, lambda value: f"{value:,.0f}")
    speed.set_title("Tokens a second")
    peaks = [
        (name, colour, [(found or 0) / 1e9 or None for found in (figures.median(case, side, "peak_resident_bytes") for case in cases)])
        for side, name, colour in sides
    ]
    _bars(memory, labels, peaks, lambda value: f"{value:.2f} GB")
    memory.set_title("Peak memory")
    speed.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    _save(pyplot, figure, path)


def of_run(figures, path):
    pyplot = _pyplot()
    cases = [case for case in figures.cases() if whole_run.recipe_of(case) not in whole_run.RECIPES]
    figure, axes = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 3), squeeze=False)
    looks = ((whole_run.LIVE, "slices", OURS), (whole_run.NEVER, "masks only", SECOND), (whole_run.PLAIN, "PyTorch + peft, masks", OTHERS))
    for axis, case in zip(axes[0], cases, strict=True):
        for side, name, colour in looks:
            runs = figures.all(case, side, "step_s")
            if not runs:
                continue
            medians = [statistics.median(durations) for durations in zip(*runs, strict=True)]
            axis.plot(range(1, len(medians) + 1), medians, color=colour, linewidth=1.8, label=name)
        axis.set_ylim(bottom=0)
        axis.set_title(tables.title_of(case))
        axis.set_xlabel("step")
        axis.grid(axis="y", color="#e6e6e6")
    axes[0][0].set_ylabel("seconds a step")
    axes[0][0].legend(frameon=False)
    _save(pyplot, figure, path)


PICTURES = {"step": of_step, "run": of_run}
