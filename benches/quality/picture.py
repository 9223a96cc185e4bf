"""The picture of docs/results.md: every method's perplexity, one dot for each seed."""

import statistics

DOT, MEAN, OURS, DENSE = "#6b7a99", "#2b3a55", "#c2452d", "#7a9a5a"


def draw(figures, path):
    """Writes a PNG: the first text at its first window, one panel for each sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    setting = figures.setting
    text = setting.perplexity[0]
    window = text.windows[0]
    rows = [row for row in setting.compared if row.trained]
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False})
    panels = list(setting.goal.ratio)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.9 * len(panels), 0.32 * len(rows) + 1.3), sharey=True, squeeze=False)
    dense = [row for row in setting.rows if not row.trained]
    for axis, sparsity in zip(axes[0], panels, strict=True):
        for place, row in enumerate(rows):
            values = figures.perplexity(figures.of(row, sparsity), text, window)
            colour = OURS if row.name == setting.goal.row else DOT
            axis.scatter(values, [place] * len(values), s=26, color=colour, alpha=0.75, linewidths=0, zorder=3)
            if len(values) > 1:
                mean = statistics.mean(values)
                axis.plot([mean, mean], [place - 0.3, place + 0.3], color=MEAN, linewidth=1.6, zorder=4)
            if not values:
                axis.text(0.02, place, "missing", transform=axis.get_yaxis_transform(), va="center", color="#999999")
        for row in dense:
            for value in figures.perplexity(figures.of(row, sparsity), text, window):
                axis.axvline(value, color=DENSE, linewidth=1.2, linestyle="--", zorder=1)
                axis.text(value, -0.75, " dense", color=DENSE, ha="left", va="center")
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        # Few enough for their numbers to stay apart.
        steps = (1, 3) if high > 80 * low else (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
        axis.xaxis.set_major_locator(LogLocator(subs=steps))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="#e6e6e6", zorder=0)
        axis.set_title(f"{sparsity * 100:g} % removed", loc="left", fontweight="bold")
        axis.set_xlabel(f"{text.title} perplexity, window {window} (lower is better)")
        axis.set_ylim(len(rows) - 0.4, -1.1)
    axes[0][0].set_yticks(range(len(rows)), [row.title.replace("`", "") for row in rows])
    for axis in axes[0]:
        axis.tick_params(axis="y", length=0)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
