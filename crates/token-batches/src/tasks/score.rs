//! Which choice wins, and how often it is the right one.

use super::{Question, TaskSet};

/// What a model makes of a task.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TaskOutcome {
    pub counts: TaskCounts,
    /// Sum over all choices of all questions, in nats.
    pub log_likelihood: f64,
}

/// Right answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TaskCounts {
    pub questions: u64,
    /// Questions whose likeliest choice is the right one.
    pub correct: u64,
    /// The same with each log likelihood divided by its choice's characters; absent where contexts are compared.
    pub correct_normalized: Option<u64>,
}

impl TaskSet {
    /// What follows from the log likelihoods, in nats, of all choices in their order.
    #[must_use]
    pub fn outcome(&self, log_likelihoods: &[f64]) -> TaskOutcome {
        let mut left = log_likelihoods;
        let mut counts = TaskCounts { questions: self.questions.len() as u64, ..TaskCounts::default() };
        let mut normalized = Some(0);
        for question in &self.questions {
            let (own, rest) = left.split_at(question.choices.len().min(left.len()));
            left = rest;
            counts.correct += u64::from(highest(own.iter().copied()) == Some(question.gold));
            normalized = normalized.zip(question.normalized(own)).map(|(sum, right)| sum + u64::from(right));
        }
        counts.correct_normalized = normalized;
        TaskOutcome { counts, log_likelihood: log_likelihoods.iter().sum() }
    }
}

impl Question {
    /// Whether the choice with the highest log likelihood a character is the right one.
    fn normalized(&self, log_likelihoods: &[f64]) -> Option<bool> {
        let scores = self
            .choices
            .iter()
            .zip(log_likelihoods)
            .map(|(choice, log_likelihood)| Some(log_likelihood / choice.characters? as f64))
            .collect::<Option<Vec<f64>>>()?;
        Some(highest(scores.into_iter()) == Some(self.gold))
    }
}

/// Place of the highest value; of equal ones the first.
fn highest(values: impl Iterator<Item = f64>) -> Option<usize> {
    values.enumerate().reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::super::Choice;
    use super::*;

    fn question(characters: &[Option<usize>], gold: usize) -> Question {
        let choice = |characters: &Option<usize>| Choice {
            context: vec![1],
            continuation: vec![2],
            characters: *characters,
        };
        Question { choices: characters.iter().map(choice).collect(), gold }
    }

    #[test]
    fn the_likeliest_choice_wins_plainly_and_by_character() {
        let set = TaskSet {
            name: "t".into(),
            questions: vec![
                // -4 beats -6; by character -6 / 4 beats -4 / 2.
                question(&[Some(2), Some(4)], 0),
                question(&[Some(2), Some(4)], 1),
                // Equal: the first.
                question(&[Some(3), Some(3), Some(3)], 0),
            ],
        };
        let outcome = set.outcome(&[-4.0, -6.0, -4.0, -6.0, -1.0, -1.0, -1.5]);
        let counts = TaskCounts { questions: 3, correct: 2, correct_normalized: Some(2) };
        assert_eq!(outcome, TaskOutcome { counts, log_likelihood: -23.5 });
    }

    #[test]
    fn compared_contexts_have_no_length_to_divide_by() {
        let set = TaskSet { name: "t".into(), questions: vec![question(&[None, None], 1)] };
        let outcome = set.outcome(&[-4.0, -3.0]);
        assert_eq!(outcome.counts, TaskCounts { questions: 1, correct: 1, correct_normalized: None });
    }
}
