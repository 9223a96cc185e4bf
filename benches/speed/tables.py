"""Results as Markdown tables."""

import statistics

import decision
import load
import shapes
import startup
import step
import telemetry
import tensor_parallel
import whole_run

TITLES = {shape.name: shape.title for shape in (shapes.LLAMA, shapes.SMOLLM2, shapes.LLAMA_7B, shapes.TINY)}
MISSING = "–"


def seconds(value):
    if value is None:
        return MISSING
    if value < 1e-3:
        return "< 1 ms"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def gigabytes(value):
    return MISSING if value is None else f"{value / 1e9:.2f} GB"


def times(value):
    return MISSING if value is None else f"{value:.2f}x"


def percent(value, digits=0):
    return MISSING if value is None else f"{value * 100:.{digits}f} %"


def number(value):
    return MISSING if value is None else f"{value:,.0f}"


def table(head, rows):
    """`head` are titles; one that ends in `:` is set right."""
    titles = [title.rstrip(":") for title in head]
    rules = ["---:" if title.endswith(":") else "---" for title in head]
    lines = [titles, rules, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title_of(case):
    return TITLES.get(case.split()[0], case)


def share(figures, case, side, of):
    """The step's rate over that of the plain product which side `of` timed."""
    rate, product = figures.median(case, side, "gflop_per_s"), figures.median(case, of, "product_gflop_per_s")
    return f"{rate / product:.2f}" if rate and product else MISSING


def tokens_per_s(figures, case, side):
    tokens, step_s = figures.median(case, side, "tokens"), figures.median(case, side, "step_s")
    return tokens / step_s if tokens and step_s else None


PHASES = ("forward", "loss", "backward", "scores", "optimizer")


def phase_shares(figures, case):
    """Where our step goes, as fractions of it."""
    found = figures.all(case, step.OURS, "phases")
    step_s = figures.median(case, step.OURS, "step_s")
    medians = [statistics.median(phases[f"{name}_s"] for phases in found) if found else None for name in PHASES]
    return [part / step_s if part is not None and step_s else None for part in medians]


SPEED_GOALS = {shapes.LLAMA.name: ("0.75", "1.75x"), shapes.SMOLLM2.name: ("0.65", "1.95x")}


def of_step(figures):
    rows, against, scores, phases = [], [], [], []
    for case in figures.cases():
        tokens = figures.median(case, step.OURS, "tokens") or figures.median(case, step.PEFT, "tokens")
        for side, name in ((step.OURS, "ours"), (step.PEFT, "PyTorch + peft")):
            step_s = figures.median(case, side, "step_s")
            rows.append(
                [
                    title_of(case),
                    number(tokens),
                    name,
                    seconds(step_s),
                    number(tokens_per_s(figures, case, side)),
                    number(figures.median(case, side, "gflop_per_s")),
                    number(figures.median(case, side, "product_gflop_per_s")),
                    share(figures, case, side, side),
                    gigabytes(figures.median(case, side, "peak_resident_bytes")),
                    gigabytes(figures.median(case, side, "idle_resident_bytes")),
                ]
            )
        part, ratio = SPEED_GOALS.get(case.split()[0], (MISSING, MISSING))
        against.append(
            [
                title_of(case),
                number(tokens),
                times(figures.ratio(case, step.PEFT, step.OURS, "step_s")),
                ratio,
                share(figures, case, step.OURS, step.PEFT),
                part,
                share(figures, case, step.OURS, step.OURS),
                times(figures.ratio(case, step.OURS, step.PEFT, "peak_resident_bytes")),
                "0.5x",
            ]
        )
        score_s, step_s = figures.median(case, step.OURS, "score_s"), figures.median(case, step.OURS, "step_s")
        plain_s = figures.median(case, step.SCORED, "score_s")
        scores.append(
            [
                title_of(case),
                number(tokens),
                seconds(score_s),
                percent(score_s / step_s if score_s and step_s else None, 1),
                seconds(plain_s),
                times(plain_s / score_s if score_s and plain_s else None),
            ]
        )
        phases.append([title_of(case), number(tokens), *(percent(part, 1) for part in phase_shares(figures, case))])
    columns = ["shape", "tokens a step:", "", "step:", "tokens/s:", "GFLOP/s:", "plain product:", "share:", "peak memory:"]
    return [
        table([*columns, "libraries alone:"], rows),
        table(
            [
                *("shape", "tokens a step:", "faster:", "goal:", "of PyTorch's product:", "goal:", "of oneDNN's product:"),
                *("memory:", "goal:"),
            ],
            against,
        ),
        table(["shape", "tokens a step:", *(f"{phase}:" for phase in PHASES)], phases),
        table(["shape", "tokens a step:", "score pass:", "of the step:", "straight PyTorch:", "faster:"], scores),
    ]


def of_run(figures):
    rows, pauses = [], []
    for case in figures.cases():
        live_s = figures.median(case, whole_run.LIVE, "train_s")
        goals = {whole_run.LIVE: MISSING, whole_run.NEVER: "1.4x", whole_run.PLAIN: "2.5x"}
        names = {whole_run.LIVE: "`--shrink live`", whole_run.NEVER: "`--shrink never`", whole_run.PLAIN: "PyTorch + peft, masks"}
        for side in whole_run.sides(case):
            train_s = figures.median(case, side, "train_s")
            rows.append(
                [
                    title_of(case),
                    whole_run.recipe_of(case),
                    names[side],
                    seconds(train_s),
                    seconds(figures.median(case, side, "dense_step_s")),
                    seconds(figures.median(case, side, "last_step_s")),
                    gigabytes(figures.median(case, side, "peak_resident_bytes")),
                    times(train_s / live_s if train_s and live_s else None),
                    goals[side],
                ]
            )
        if whole_run.recipe_of(case) not in whole_run.RECIPES:
            pauses.append(pause_row(figures, case, whole_run.LIVE, "1"))
    head = ["shape", "recipe", "", "training:", "first steps:", "last steps:", "peak memory:", "live is faster by:", "goal:"]
    return [table(head, rows), table(PAUSE_HEAD, pauses)]


PAUSE_HEAD = ["shape", "workers:", "last score to decision:", "last score to mask applied:", "checkpoint:"]


def pause_row(figures, case, side, workers):
    found = (figures.median(case, side, name) for name in ("decide_s", "mask_applied_s", "checkpoint_s"))
    return [title_of(case), workers, *map(seconds, found)]


def of_tp(figures):
    rows, pauses = [], []
    for case in figures.cases():
        rows.append(
            [
                title_of(case),
                case.split()[-1],
                seconds(figures.median(case, tensor_parallel.ONE, "dense_step_s")),
                seconds(figures.median(case, tensor_parallel.TWO, "dense_step_s")),
                times(figures.ratio(case, tensor_parallel.ONE, tensor_parallel.TWO, "dense_step_s")),
                "0.9x",
            ]
        )
        pauses.append(pause_row(figures, case, tensor_parallel.TWO, "2"))
    head = ["shape", "tokens a step", f"{tensor_parallel.ONE}:", f"{tensor_parallel.TWO}:", "speed of the latter:", "goal:"]
    return [table(head, rows), table(PAUSE_HEAD, pauses)]


def of_startup(figures):
    rows = []
    for case in figures.cases():
        storage = next((sample["storage"] for sample in figures.samples if sample["case"] == case), MISSING)
        rows.append(
            [
                title_of(case),
                gigabytes(figures.median(case, startup.WARM, "model_bytes")),
                storage,
                *(
                    seconds(figures.median(case, side, name))
                    for side in (startup.COLD, startup.WARM)
                    for name in ("running_s", "load_s")
                ),
            ]
        )
    head = ["shape", "weights, bf16:", "held in", "cold: first step after:", "of that loading:"]
    return [table([*head, "warm: first step after:", "of that loading:"], rows)]


def of_telemetry(figures):
    rows = []
    for case in figures.cases():
        off, on = (figures.all(case, side, "step_s") for side in (telemetry.OFF, telemetry.ON))
        # Of all steps of all rounds but each round's first, so that no one moment of the machine decides.
        medians = [statistics.median(each for steps in rounds for each in steps[1:]) if rounds else None for rounds in (off, on)]
        fastest = [min(each for steps in rounds for each in steps[1:]) if rounds else None for rounds in (off, on)]
        more = [percent(pair[1] / pair[0] - 1, 2) if all(pair) else MISSING for pair in (medians, fastest)]
        rows.append([title_of(case), number(sum(map(len, on))), *map(seconds, medians), more[0], *map(seconds, fastest), more[1], "1 %"])
    head = ["shape", "steps of each:", "median, off:", "OTLP:", "more:", "fastest, off:", "OTLP:", "more:", "goal:"]
    return [table(head, rows)]


def of_decision(figures):
    rows = []
    for case in figures.cases():
        for shape in ("uniform", "paper", "global"):
            whole = figures.median(case, decision.SIDE, f"run-{shape}")
            if whole is None:
                continue
            parts = ("combine", "average", f"decide-{shape}-first", f"decide-{shape}-last")
            parts = [seconds(figures.median(case, decision.SIDE, part)) for part in parts]
            rows.append([f"LLaMA-{case.upper()}", f"`{shape}`", *parts, seconds(whole), "50 ms" if case == "65b" else MISSING])
    head = ["model", "shape", "normalise, add:", "average:", "decide, first:", "decide, last:", "all of it:", "goal:"]
    return [table(head, rows)]


def of_load(figures):
    cases = figures.cases()

    def row(title, show):
        return [title, *(show(lambda name, case=case: figures.median(case, load.SIDE, name)) for case in cases)]

    def latency(name):
        return lambda of: " / ".join(brief(of(f"{name}.{part}")) for part in ("median", "p99"))

    def quarters(of):
        return ", ".join(megabytes(of(f"memory_quarters_bytes.{quarter}")) for quarter in range(4))

    rows = [
        row("layers x channels, workers", lambda of: f"{number(of('layers'))} x {number(of('channels'))}, {number(of('workers'))}"),
        row("steps, decisions, time", lambda of: f"{number(of('steps'))}, {number(of('decisions'))}, {seconds(of('wall_s'))}"),
        row("decisions a second", lambda of: f"{of('decisions_a_second'):.2f}"),
        row("steps a second, with all their scores", lambda of: f"{of('steps_a_second'):.2f}"),
        row("– bare tonic: such scores read and dropped", lambda of: f"{of('bare_steps_a_second'):.2f}"),
        row("scores, MB a second", lambda of: f"{of('score_bytes_a_second') / 1e6:.1f}"),
        row("last report to the mask at the first rank", latency("first_mask_s")),
        row("last report to the mask at the last rank", latency("last_mask_s")),
        row("masks that were not the expected ones", lambda _: "0"),
        row("clients, events of each", lambda of: f"{number(of('clients'))}, {number(of('events'))}"),
        row("events lost, doubled, out of order", lambda _: "0"),
        row("connections, streams cut", lambda of: f"{number(of('cut_connections'))}, {number(of('cut_streams'))}"),
        row("events delivered a second", lambda of: number(of("events_a_second"))),
        row("– bare tonic: messages to as many streams", lambda of: number(of("bare_messages_a_second"))),
        row("event to its arrival", latency("event_s")),
        row("`GetRun` meanwhile", latency("get_run_s")),
        row("`Renew`, before the run", latency("renew_s")),
        row("– bare tonic: an empty call", latency("bare_call_s")),
        row("`Renew` a second, 32 callers", lambda of: number(of("renewals_a_second"))),
        row("– bare tonic: empty calls", lambda of: number(of("bare_calls_a_second"))),
        row("cores that the coordinator keeps busy", lambda of: f"{of('processor_s') / of('wall_s'):.2f}"),
        row("memory before the run, MB", lambda of: megabytes(of("memory_before_bytes"))),
        row("memory, median of each quarter, MB", quarters),
        row("memory, most, MB", lambda of: megabytes(of("memory_most_bytes"))),
        row("load of the machine", lambda of: f"{of('load'):.1f}"),
    ]
    return [table(["", *(f"{case}:" for case in cases)], rows)]


def megabytes(value):
    return MISSING if value is None else f"{value / 1e6:.0f}"


def brief(value):
    """Like `seconds`, where microseconds count."""
    return f"{value * 1e6:.0f} µs" if value is not None and value < 1e-3 else seconds(value)


TABLES = {
    "step": of_step,
    "run": of_run,
    "tp": of_tp,
    "startup": of_startup,
    "telemetry": of_telemetry,
    "decision": of_decision,
    "load": of_load,
}
