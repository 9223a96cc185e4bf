//! The HTML page: one file, no scripts, nothing loaded from elsewhere.

use super::charts::{Chart, Part, channels, heads, kept_share, marks, over_steps};
use super::history::History;
use super::overview::overview;
use super::scale::spread;
use super::summary;
use crate::{proto_json, units};
use anyhow::Context;
use minijinja::{Environment, context};
use std::time::Duration;
use wire::pb;

const TEMPLATE: &str = include_str!("page.html");

/// Decisions in the table, spread over all when there are more.
const MOST_ROWS: usize = 200;

/// The page as HTML text.
///
/// # Errors
/// Only when the template or the schema built into this program is broken.
pub(crate) fn page(history: &History) -> anyhow::Result<String> {
    let marks = marks(history);
    let lines: Vec<String> =
        over_steps(history, &marks).iter().map(|chart| chart.picture(460.0, 280.0)).collect();
    let wide = |chart: Option<Chart<'_>>| chart.map(|chart| chart.picture(700.0, 420.0));
    let maps: Vec<String> = [
        wide(heads(history)),
        wide(channels(history)),
        wide(kept_share(history, Part::Heads)),
        wide(kept_share(history, Part::Channels)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let rows: Vec<Vec<String>> = summary::rows(history)
        .into_iter()
        .map(|row| vec![row.name.to_owned(), row.before, row.after, row.change])
        .collect();
    let mut environment = Environment::new();
    // The ending of the name makes every value escaped; the charts alone are marked safe in the template.
    environment.add_template("page.html", TEMPLATE).context("the page's template is broken")?;
    let template = environment.get_template("page.html").context("the page's template is missing")?;
    template
        .render(context! {
            title => title(history),
            subtitle => subtitle(history),
            rows,
            lines,
            maps,
            facts => facts(history),
            evaluations => evaluations(history),
            decisions => decisions(history),
            notes => history.run.as_ref().and_then(|run| run.plan.as_ref()).map_or(Vec::new(), |plan| plan.notes.clone()),
            recipe => recipe_yaml(history)?,
            commands => commands(history),
            version => env!("CARGO_PKG_VERSION"),
        })
        .context("failed to fill the page's template")
}

/// The overview picture.
#[must_use]
pub(crate) fn picture(history: &History) -> String {
    overview(history)
}

/// `SmolLM2-135M pruned by 50 %`, or what is known of it.
pub(crate) fn title(history: &History) -> String {
    let spec = history.run.as_ref().and_then(|run| run.spec.as_ref());
    let model = spec.map_or("Run", |spec| {
        let folder = spec.model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        if folder.is_empty() { "Run" } else { folder }
    });
    if history.decisions.is_empty() {
        model.to_owned()
    } else {
        format!("{model}: {} of the projection weights pruned", units::percent(history.final_sparsity()))
    }
}

/// Steps, workers and time in one line.
pub(crate) fn subtitle(history: &History) -> String {
    let mut parts = vec![format!("{} steps", units::grouped(history.steps.len() as u64))];
    if let Some(degree) =
        history.run.as_ref().and_then(|run| run.spec.as_ref()).and_then(|spec| spec.tp_degree)
    {
        parts.push(format!("{degree} tensor-parallel worker{}", if degree == 1 { "" } else { "s" }));
    }
    parts.push(units::duration(Duration::from_secs_f64(history.wall_seconds)));
    if let Some(state) = &history.state {
        parts.push(crate::tables::state_name(state.state()).to_owned());
    }
    format!("espalier · {}", parts.join(" · "))
}

/// Names and values.
fn facts(history: &History) -> Vec<Vec<String>> {
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            facts.push(vec![name.to_owned(), value]);
        }
    };
    if let Some(run) = &history.run {
        fact("run", run.id.clone());
        if let Some(spec) = &run.spec {
            fact("name", spec.display_name.clone());
            fact("model", spec.model.clone());
            let paths: Vec<&str> = spec.training_data.iter().map(|source| source.path.as_str()).collect();
            fact("tuned on", paths.join(", "));
            if let Some(evaluation) = &spec.evaluation {
                let paths: Vec<&str> = evaluation.sources.iter().map(|source| source.path.as_str()).collect();
                fact("measured on", paths.join(", "));
            }
        }
    }
    if let Some(state) = &history.state {
        fact("state", crate::tables::state_name(state.state()).to_owned());
        fact("message", state.message.clone());
    }
    if let Some(peak) = history.peak_memory_bytes() {
        fact("peak memory of a worker", units::bytes(peak));
    }
    if let Some(result) = &history.export {
        fact("written to", result.path.clone());
        fact("weights on disk", units::bytes(result.weight_bytes));
        fact("model type", result.model_type.clone());
        fact(
            "reload check",
            format!(
                "largest logit difference {:.1e} (largest logit {:.1}), {}, mean KL {:.1e} nats",
                result.max_logit_difference,
                result.max_logit,
                summary::check_words(result),
                result.mean_kl
            ),
        );
        fact("manifest SHA-256", result.manifest_sha256.clone());
    }
    facts
}

fn evaluations(history: &History) -> Vec<Vec<String>> {
    let row = |evaluation: &pb::Evaluation| {
        vec![
            evaluation.label.clone(),
            format!("{:.4}", evaluation.perplexity),
            units::grouped(evaluation.predicted_tokens),
            units::grouped(evaluation.step),
            units::duration(Duration::from_secs_f64(evaluation.seconds.max(0.0))),
        ]
    };
    history.evaluations.iter().map(row).collect()
}

fn decisions(history: &History) -> Vec<Vec<String>> {
    let row = |decision: &pb::Decision| {
        vec![
            decision.generation.to_string(),
            units::grouped(decision.step),
            units::percent(decision.sparsity),
            units::grouped(decision.parameters),
            crate::tables::range_of(decision.layers.iter().map(|layer| layer.query_heads)),
            crate::tables::range_of(decision.layers.iter().map(|layer| layer.kv_heads)),
            crate::tables::range_of(decision.layers.iter().map(|layer| layer.channels)),
        ]
    };
    spread(history.decisions.len(), MOST_ROWS)
        .into_iter()
        .map(|index| row(&history.decisions[index]))
        .collect()
}

fn recipe_yaml(history: &History) -> anyhow::Result<String> {
    let Some(spec) = history.run.as_ref().and_then(|run| run.spec.as_ref()) else { return Ok(String::new()) };
    let value = proto_json::to_json(spec)?;
    serde_yaml_ng::to_string(&value["recipe"]).context("failed to write the recipe as YAML")
}

fn commands(history: &History) -> Vec<String> {
    let mut commands = Vec::new();
    if let Some(result) = &history.export {
        let path = &result.path;
        commands.push(format!("espalier eval --model {path} --data TEXT"));
        commands.push(format!(
            "python -c 'from transformers import AutoModelForCausalLM as M; print(M.from_pretrained(\"{path}\"))'"
        ));
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::super::history::tests::example;
    use super::*;

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let page = page(&example(40)).unwrap();
        for word in
            ["Loss", "Sparsity", "Memory", "Step time", "Heads kept by layer", "20.00", "25.00", "</html>"]
        {
            assert!(page.contains(word), "no {word:?}");
        }
        let links = page.replace("http://www.w3.org/2000/svg", "");
        for word in ["http:", "https:", "src=", "<script", "@import", "url("] {
            assert!(!links.contains(word), "{word:?} loads something");
        }
    }

    #[test]
    fn words_of_a_run_are_escaped() {
        let mut history = example(4);
        history.state = Some(pb::StateChange { message: "<b>no</b>".into(), ..Default::default() });
        assert!(!page(&history).unwrap().contains("<b>no</b>"));
    }

    #[test]
    fn a_run_without_steps_still_has_a_page() {
        let mut history = History::default();
        history.evaluations.push(pb::Evaluation { perplexity: 9.5, ..Default::default() });
        assert!(page(&history).unwrap().contains("9.5"));
        assert!(picture(&history).starts_with("<svg"));
    }
}
