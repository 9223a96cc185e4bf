"""What is to be measured: setting.toml as values, the cells that follow from it, and the commands of each cell."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SETTING = HERE / "setting.toml"
RECIPES = HERE / "recipes"
RESULTS = HERE / "results"


class SettingError(Exception):
    """Something in the setting or on the command line that cannot be."""


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    recipe: Path
    trained: bool = True
    pruned: bool = True
    decide_after_step: int | None = None
    # A variant that tells what one choice does: made at the first sparsity and seed alone, shown in a table of its own.
    ablation: bool = False

    def recipe_text(self):
        """The recipe without comments: what a change of makes the row's cells stale."""
        lines = (line for line in self.recipe.read_text().splitlines() if line.strip())
        return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


@dataclass(frozen=True)
class Text:
    """A held-out text and the windows that it is measured at."""

    name: str
    title: str
    text: str
    windows: tuple
    max_tokens: int

    def at(self, window):
        return f"{self.name}@{window}"


@dataclass(frozen=True)
class Zeroshot:
    folder: str
    tasks: tuple
    limit: int


@dataclass(frozen=True)
class Goal:
    against: str
    row: str
    ratio: dict


@dataclass(frozen=True)
class Cell:
    """One row at one sparsity and seed; a row without pruning or training has one for all of them."""

    row: Row
    sparsity: float | None
    seed: int | None

    @property
    def name(self):
        parts = [self.row.name]
        if self.sparsity is not None:
            parts.append(f"{self.sparsity * 100:g}")
        if self.seed is not None:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)


@dataclass(frozen=True)
class Setting:
    model: str
    limits: str
    training: dict
    texts: tuple
    perplexity: tuple
    zeroshot: Zeroshot
    goal: Goal
    # The row that ablations change one choice of.
    ablated: str
    rows: tuple

    @classmethod
    def read(cls, path=SETTING, recipes=RECIPES):
        with open(path, "rb") as file:
            raw = tomllib.load(file)
        training = dict(raw["training"])
        goal = raw["goal"]
        rows = []
        for row in raw["row"]:
            rows.append(Row(recipe=recipes / f"{row['name']}.yaml", **row))
            if rows[-1].trained and not rows[-1].recipe.is_file():
                raise SettingError(f"{path.name}: the row `{row['name']}` has no recipe at {rows[-1].recipe}")
        setting = cls(
            model=raw["model"],
            limits=raw["limits"],
            texts=tuple(training.pop("texts")),
            training=training,
            perplexity=tuple(Text(**{**text, "windows": tuple(text["windows"])}) for text in raw["perplexity"]),
            zeroshot=Zeroshot(**{**raw["zeroshot"], "tasks": tuple(raw["zeroshot"]["tasks"])}),
            goal=Goal(goal["against"], goal["row"], {float(key): value for key, value in goal["ratio"].items()}),
            ablated=raw["ablated"],
            rows=tuple(rows),
        )
        names = [row.name for row in rows]
        for name in (setting.goal.against, setting.goal.row, setting.ablated):
            if name not in names:
                raise SettingError(f"{path.name}: the goal or `ablated` names `{name}`, which is no row")
        if len(set(names)) < len(names):
            raise SettingError(f"{path.name}: two rows have one name")
        return setting

    @property
    def tokens_per_step(self):
        return self.training["window_tokens"] * self.training["rows"] * self.training["micro_batches"]

    @property
    def training_tokens(self):
        return self.training["steps"] * self.tokens_per_step

    @property
    def compared(self):
        """The rows of the tables, without ablations."""
        return [row for row in self.rows if not row.ablation]

    def row(self, name):
        for row in self.rows:
            if row.name == name:
                return row
        raise SettingError(f"there is no row `{name}`; there are {', '.join(row.name for row in self.rows)}")

    def cell(self, row, sparsity, seed):
        """The cell that stands for `row` in the table of `sparsity`."""
        return Cell(row, sparsity if row.pruned else None, seed if row.trained else None)

    def schedule(self, rows, sparsities, seeds):
        """All cells, each once: the first seed of all rows at each sparsity, then the other seeds, so that what is
        there early makes a whole table."""
        passes = [(sparsity, [seeds[0]]) for sparsity in sparsities]
        passes += [(sparsity, [seed]) for sparsity in sparsities for seed in seeds[1:]]
        first = (next(iter(self.goal.ratio)), seeds[0])
        cells = [
            self.cell(row, sparsity, seed)
            for sparsity, few in passes
            for seed in few
            for row in rows
            if not row.ablation or (sparsity, seed) == first
        ]
        return list(dict.fromkeys(cells))

    def training_of(self, cell):
        """What decides the weights of a cell, but for model and texts; equal means that it need not be made again."""
        if not cell.row.trained:
            return None
        return {
            **self.training,
            "texts": list(self.texts),
            "seed": cell.seed,
            "sparsity": cell.sparsity,
            "decide_after_step": cell.row.decide_after_step,
            "recipe": cell.row.recipe_text(),
        }

    def prune_arguments(self, cell, *, espalier, model, data, out, recipe, threads):
        """`espalier prune` of a cell."""
        steps = self.training["steps"]
        command = [espalier, "prune", "--model", model, "--recipe", recipe]
        command += ["--data", *(f"{data}/{text}" for text in self.texts), "--steps", steps]
        for name in ("window_tokens", "rows", "micro_batches"):
            command += ["--" + name.replace("_", "-"), self.training[name]]
        command += ["--seed", cell.seed]
        if cell.sparsity is not None:
            command += ["--sparsity", cell.sparsity]
        if (step := cell.row.decide_after_step) is not None:
            if not 1 <= step < steps:
                raise SettingError(f"`{cell.row.name}` decides after step {step}; it must lie in 1..{steps}")
            # A one-shot ramp decides where its warm-up ends, which is told as a fraction of the steps.
            command += ["--warmup", round(step / steps, 9)]
        # In f32, so that a row is measured for what it does and not for how its weights round.
        command += ["--export-dtype", "f32", "--workers", 1, "--threads", threads, "--out", out]
        return [str(part) for part in command]

    def perplexity_arguments(self, text, window, *, espalier, model, data, threads):
        """`espalier eval` on one held-out text at one window."""
        command = [espalier, "eval", "--model", model, "--data", f"{data}/{text.text}", "--window", window]
        command += ["--max-tokens", text.max_tokens, "--threads", threads, "--json"]
        return [str(part) for part in command]

    def zeroshot_arguments(self, *, espalier, model, data, threads):
        """`espalier eval` on the zero-shot tasks."""
        files = [f"{data}/{self.zeroshot.folder}/{task}.jsonl" for task in self.zeroshot.tasks]
        command = [espalier, "eval", "--model", model, "--tasks", *files]
        command += ["--task-limit", self.zeroshot.limit, "--threads", threads, "--json"]
        return [str(part) for part in command]

    def evaluations(self, with_zeroshot):
        """What each cell measures: name -> what decides the figure. Equal means that it need not be measured again."""
        wanted = {
            text.at(window): {"text": text.text, "window": window, "max_tokens": text.max_tokens}
            for text in self.perplexity
            for window in text.windows
        }
        if with_zeroshot:
            wanted["zeroshot"] = {"tasks": list(self.zeroshot.tasks), "limit": self.zeroshot.limit}
        return wanted
