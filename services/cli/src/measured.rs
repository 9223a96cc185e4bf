//! What was measured on a model: perplexities and tasks, for people and as JSON.

use crate::failure::Failure;
use crate::out_folder::pretty;
use crate::output::say;
use crate::{proto_json, tables, units};
use serde_json::{Value, json};
use std::time::Duration;
use wire::pb;

/// In the order in which it was measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    pub evaluations: Vec<pb::Evaluation>,
    pub tasks: Vec<pb::TaskResult>,
}

impl Measured {
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.evaluations.is_empty() && self.tasks.is_empty()
    }

    /// # Errors
    /// Only when the schema built into this program is broken.
    pub(crate) fn show(&self, as_json: bool) -> Result<(), Failure> {
        if as_json {
            say(pretty(&self.to_json()?)?.trim_end());
            return Ok(());
        }
        match self.evaluations.as_slice() {
            [only] if self.tasks.is_empty() => {
                say(format!("perplexity         {:.4}", only.perplexity));
                say(format!("predicted tokens   {}", units::grouped(only.predicted_tokens)));
                let took = units::duration(Duration::from_secs_f64(only.seconds.max(0.0)));
                say(format!("took               {took}"));
            }
            [] => {}
            evaluations => say(tables::evaluations_table(evaluations)),
        }
        if !self.tasks.is_empty() {
            say(tables::tasks_table(&self.tasks, self.mean_accuracy(), self.mean_normalized_accuracy()));
        }
        Ok(())
    }

    /// One perplexity alone as an `Evaluation`; else lists of them and of tasks.
    fn to_json(&self) -> Result<Value, Failure> {
        if let ([only], []) = (self.evaluations.as_slice(), self.tasks.as_slice()) {
            return Ok(proto_json::to_json(only)?);
        }
        let evaluations = self.evaluations.iter().map(proto_json::to_json).collect::<Result<Vec<_>, _>>()?;
        let tasks = self.tasks.iter().map(proto_json::to_json).collect::<Result<Vec<_>, _>>()?;
        Ok(json!({
            "evaluations": evaluations,
            "tasks": tasks,
            "mean_accuracy": self.mean_accuracy(),
            "mean_normalized_accuracy": self.mean_normalized_accuracy(),
        }))
    }

    /// Over tasks, each counting once; nothing without tasks.
    fn mean_accuracy(&self) -> Option<f64> {
        mean(self.tasks.iter().map(|task| task.accuracy))
    }

    /// The same, by normalised accuracy where there is one.
    fn mean_normalized_accuracy(&self) -> Option<f64> {
        mean(self.tasks.iter().map(|task| task.normalized_accuracy.unwrap_or(task.accuracy)))
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> Option<f64> {
    let count = values.len();
    (count > 0).then(|| values.sum::<f64>() / count as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_task_counts_once_in_a_mean_whatever_its_rows() {
        let task = |accuracy, normalized_accuracy, count| pb::TaskResult {
            accuracy,
            normalized_accuracy,
            count,
            ..Default::default()
        };
        let measured =
            Measured { evaluations: Vec::new(), tasks: vec![task(0.5, Some(0.25), 4), task(1.0, None, 400)] };
        assert_eq!(measured.mean_accuracy(), Some(0.75));
        assert_eq!(measured.mean_normalized_accuracy(), Some(0.625));
        assert_eq!(Measured::default().mean_accuracy(), None);
        assert_eq!(measured.to_json().unwrap()["tasks"].as_array().unwrap().len(), 2);
    }
}
