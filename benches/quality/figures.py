"""The cells that are there, as figures: which count, and what each says."""

import statistics
from dataclasses import dataclass

from cell import FORMAT, read_json
from setting import Cell, Setting

# The form of accuracy that the literature quotes for each task; the others are length-normalised.
PLAIN_ACCURACY = ("boolq", "winogrande")


@dataclass
class Figures:
    setting: Setting
    seeds: list
    # By name; only cells made by the setting and recipes of now, all with the same model and texts.
    cells: dict
    # Files that do not count.
    stale: list

    @classmethod
    def read(cls, setting, results, seeds):
        names = {}
        for sparsity in setting.goal.ratio:
            for cell in setting.schedule(setting.rows, [sparsity], seeds):
                names[cell.name] = cell
        found, stale = {}, []
        for path in sorted(results.glob("*.json")):
            value, cell = read_json(path), names.get(path.stem)
            fits = value["format"] == FORMAT and cell is not None and value["training"] == setting.training_of(cell)
            if fits:
                found[path.stem] = value
            else:
                stale.append(path.stem)
        # Texts or model that only some cells had: the newest cell says which count.
        if found:
            newest = max(found.values(), key=lambda value: value["made"]["time"])["inputs"]
            stale += [name for name, value in found.items() if value["inputs"] != newest]
            found = {name: value for name, value in found.items() if value["inputs"] == newest}
        return cls(setting, seeds, found, stale)

    def of(self, row, sparsity):
        """Seed -> cell, for those that are there. A row without seeds has one."""
        wanted = {self.setting.cell(row, sparsity, seed) for seed in self.seeds}
        return {cell.seed: self.cells[cell.name] for cell in sorted(wanted, key=_by_seed) if cell.name in self.cells}

    def perplexity(self, cells, text, window):
        how = self.setting.evaluations(False)[text.at(window)]
        found = (cell["evaluations"].get(text.at(window)) for cell in cells.values())
        return [value["said"]["perplexity"] for value in found if value and value["how"] == how]

    def zeroshot(self, cells):
        """Mean accuracy over the tasks, in per cent."""
        return [zeroshot_mean(value) for value in self._zeroshot(cells)]

    def zeroshot_error(self):
        """The largest standard error that the number of questions leaves in any cell's mean."""
        errors = (zeroshot_error(value) for value in self._zeroshot(self.cells))
        return max((error for error in errors if error is not None), default=None)

    def _zeroshot(self, cells):
        how = self.setting.evaluations(True)["zeroshot"]
        found = (cell["evaluations"].get("zeroshot") for cell in cells.values())
        return [value["said"] for value in found if value and value["how"] == how]

    def prune(self, cells, name):
        return [cell["prune"][name] for cell in cells.values() if name in cell["prune"]]

    def ratios(self, row, sparsity, text, window):
        """Perplexities over those of the row compared with, for each seed that both have."""
        against = self.of(self.setting.row(self.setting.goal.against), sparsity)
        ours = self.of(row, sparsity)
        ratios = []
        for seed in sorted(ours.keys() & against.keys()):
            above = self.perplexity({seed: ours[seed]}, text, window)
            below = self.perplexity({seed: against[seed]}, text, window)
            if above and below:
                ratios.append(above[0] / below[0])
        return ratios


def accuracies(said):
    """Task -> accuracy and its standard error, each in the form that the literature quotes."""
    found = {}
    for result in said["tasks"]:
        form = "accuracy" if result["task"] in PLAIN_ACCURACY else "normalized_accuracy"
        found[result["task"]] = (result[form], result.get(f"{form}_error"))
    return found


def zeroshot_mean(said):
    """Mean accuracy over the tasks, in per cent."""
    return 100 * statistics.mean(accuracy for accuracy, _ in accuracies(said).values())


def zeroshot_error(said):
    """Standard error of that mean from the number of questions, in points; nothing where a task has too few."""
    errors = [error for _, error in accuracies(said).values()]
    if any(error is None for error in errors):
        return None
    return 100 * sum(error**2 for error in errors) ** 0.5 / len(errors)


def _by_seed(cell: Cell):
    return -1 if cell.seed is None else cell.seed
