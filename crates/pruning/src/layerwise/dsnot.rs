use super::{LayerwiseError, LinearWeight, WeightMask};
use crate::decide::sort_key;
use crate::slices::{check_matrix, check_vector};
use serde::{Deserialize, Serialize};

/// Whether a swap may carry a row's error across zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SignRule {
    /// It may not: the row is left as it was before. Every swap then lessens the error.
    Same,
    /// It may, as by default in the published code; single swaps may make the error larger.
    Any,
}

/// Which state of a row is its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The one after the last swap, as published.
    Last,
    /// The first one of the least error.
    Best,
}

/// What a swap may exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Swaps {
    /// Any two weights of a row: the one that goes must lessen the error too.
    InRow { sign: SignRule },
    /// Two weights of one group of `of` neighbours, whose pattern stays: the least important of the group goes,
    /// whatever its sign. No error crosses zero.
    InGroup { of: usize },
}

/// How long masks are refined.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DsnotSettings {
    pub swaps: Swaps,
    pub ending: Ending,
    /// Swaps of a row at most; 50 is usual.
    pub most_swaps: usize,
    /// A row whose error is no larger is done; 0.1 is usual, in the unit of `expected_inputs`.
    pub error_threshold: f64,
    /// Power of the variance that a weight to come back is judged against; 1 is usual.
    pub variance_power: f64,
}

/// What refinement starts from.
#[derive(Debug, Clone, Copy)]
pub struct Dsnot<'a> {
    pub weight: LinearWeight<'a>,
    pub weight_mask: &'a WeightMask,
    /// `[rows, columns]`, such as Wanda's: the least important of those that may go is the one that does.
    pub importance: &'a [f64],
    /// By input, the mean over sequences of its sum.
    pub expected_inputs: &'a [f64],
    /// By input, its variance within a sequence.
    pub variances: &'a [f64],
}

/// Refined masks.
#[derive(Debug, Clone, PartialEq)]
pub struct DsnotOutcome {
    pub weight_mask: WeightMask,
    /// By row, the expected change of the output: before the first swap and at the end.
    pub first_errors: Vec<f64>,
    pub last_errors: Vec<f64>,
    /// By row.
    pub swap_counts: Vec<usize>,
}

impl Dsnot<'_> {
    /// Swaps pruned weights for kept ones so that the mean output comes back, without changing any weight (DSnoT,
    /// arXiv:2310.08915).
    ///
    /// ```text
    /// c_j = W_j E[x_j]                 e = sum_{j pruned} c_j, the mean of dense less sparse output
    /// while |e| > threshold:
    ///   e > 0: back comes the pruned j of the largest c_j / Var_j^p, of those with c_j > 0; the least important kept j with c_j < 0 goes
    ///   e < 0: likewise with the signs turned
    ///   e <- e + c_gone - c_back
    /// ```
    ///
    /// A weight is swapped once at most. Where no weight of the wanted sign is left the row is done; the published code
    /// goes on with weights of the other lists. Variances of (nearly) zero count as 1e-12 of the largest. The number of
    /// pruned weights of every row, or group, stays. The means agree better afterwards; the mean squared error need
    /// not.
    ///
    /// # Errors
    /// Names the slice or setting that does not fit.
    pub fn refine(&self, settings: &DsnotSettings) -> Result<DsnotOutcome, LayerwiseError> {
        check(self, settings)?;
        let Self { weight, weight_mask, .. } = *self;
        let judged = judged_variances(self.variances, settings.variance_power);
        let mut outcome = DsnotOutcome {
            weight_mask: weight_mask.clone(),
            first_errors: Vec::with_capacity(weight.rows),
            last_errors: Vec::with_capacity(weight.rows),
            swap_counts: Vec::with_capacity(weight.rows),
        };
        for row in 0..weight.rows {
            let contributions: Vec<f64> = weight
                .row(row)
                .iter()
                .zip(self.expected_inputs)
                .map(|(weight, input)| weight * input)
                .collect();
            let importance = &self.importance[row * weight.columns..(row + 1) * weight.columns];
            let path = Row {
                contributions: &contributions,
                importance,
                variances: &judged,
                is_pruned: weight_mask.row(row),
            }
            .path(settings);
            let taken = match settings.ending {
                Ending::Last => path.swaps.len(),
                Ending::Best => {
                    let error = |place: usize| sort_key(path.errors[place].abs());
                    (0..path.errors.len()).min_by_key(|&place| error(place)).unwrap_or(0)
                }
            };
            if path.errors.iter().any(|error| !error.is_finite()) {
                return Err(LayerwiseError::Overflow { row });
            }
            for &Swap { back, gone } in &path.swaps[..taken] {
                outcome.weight_mask.set(row, back, false);
                outcome.weight_mask.set(row, gone, true);
            }
            outcome.first_errors.push(path.errors[0]);
            outcome.last_errors.push(path.errors[taken]);
            outcome.swap_counts.push(taken);
        }
        Ok(outcome)
    }
}

fn check(start: &Dsnot<'_>, settings: &DsnotSettings) -> Result<(), LayerwiseError> {
    let Dsnot { weight, weight_mask, importance, expected_inputs, variances } = *start;
    weight.check()?;
    weight.check_mask(weight_mask)?;
    check_matrix("importance", importance, [weight.rows, weight.columns])?;
    check_vector("expected_inputs", expected_inputs, weight.columns)?;
    check_vector("variances", variances, weight.columns)?;
    let rule = "a number of at least 0";
    let not_negative = |value: f64| (0.0..f64::INFINITY).contains(&value);
    for (what, value) in
        [("error_threshold", settings.error_threshold), ("variance_power", settings.variance_power)]
    {
        if !not_negative(value) {
            return Err(LayerwiseError::Setting { what, rule, value });
        }
    }
    if let Some(&value) = variances.iter().find(|value| !not_negative(**value)) {
        return Err(LayerwiseError::Setting { what: "variances", rule, value });
    }
    match settings.swaps {
        Swaps::InGroup { of } if of == 0 || !weight.columns.is_multiple_of(of) => {
            Err(LayerwiseError::Columns { columns: weight.columns, of })
        }
        Swaps::InGroup { .. } | Swaps::InRow { .. } => Ok(()),
    }
}

/// `Var^p`, over the largest, with a floor.
fn judged_variances(variances: &[f64], power: f64) -> Vec<f64> {
    let largest = variances.iter().copied().fold(0.0, f64::max);
    let relative = |variance: f64| if largest > 0.0 { (variance / largest).max(1e-12) } else { 1.0 };
    variances.iter().map(|&variance| relative(variance).powf(power)).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Swap {
    back: usize,
    gone: usize,
}

/// One row before any swap.
struct Row<'a> {
    contributions: &'a [f64],
    importance: &'a [f64],
    variances: &'a [f64],
    is_pruned: &'a [bool],
}

/// Swaps in order, and the error before the first and after each.
struct Path {
    swaps: Vec<Swap>,
    errors: Vec<f64>,
}

impl Row<'_> {
    fn path(&self, settings: &DsnotSettings) -> Path {
        let mut error: f64 =
            self.places(|place| self.is_pruned[place]).map(|place| self.contributions[place]).sum();
        let mut path = Path { swaps: Vec::new(), errors: vec![error] };
        let first_is_positive = error > 0.0;
        let (mut back, mut gone) = ([self.to_come_back(-1.0), self.to_come_back(1.0)], self.to_go(settings));
        while path.swaps.len() < settings.most_swaps && error.abs() > settings.error_threshold {
            let is_positive = error > 0.0;
            let candidates = &mut back[usize::from(is_positive)];
            let Some(swap) = gone.next(candidates, is_positive) else { break };
            let next = error + self.contributions[swap.gone] - self.contributions[swap.back];
            let crosses = next != 0.0 && (next > 0.0) != first_is_positive;
            let may_cross = matches!(settings.swaps, Swaps::InRow { sign: SignRule::Any });
            if crosses && !may_cross {
                break;
            }
            error = next;
            path.swaps.push(swap);
            path.errors.push(error);
        }
        path
    }

    fn places(&self, is_meant: impl Fn(usize) -> bool) -> impl Iterator<Item = usize> {
        (0..self.contributions.len()).filter(move |&place| is_meant(place))
    }

    /// Pruned weights whose contribution has this sign, the one to come back first being last; of equal ones the first
    /// comes first.
    fn to_come_back(&self, sign: f64) -> Vec<usize> {
        let mut found: Vec<usize> =
            self.places(|place| self.is_pruned[place] && sign * self.contributions[place] > 0.0).collect();
        let gain = |place: usize| sort_key(sign * self.contributions[place] / self.variances[place]);
        found.sort_by_key(|&place| (gain(place), std::cmp::Reverse(place)));
        found
    }

    fn to_go(&self, settings: &DsnotSettings) -> ToGo {
        let descending = |is_meant: &dyn Fn(usize) -> bool| {
            let mut found: Vec<usize> =
                self.places(|place| !self.is_pruned[place] && is_meant(place)).collect();
            found.sort_by_key(|&place| std::cmp::Reverse((sort_key(self.importance[place]), place)));
            found
        };
        match settings.swaps {
            Swaps::InRow { .. } => ToGo::InRow {
                positive: descending(&|place| self.contributions[place] > 0.0),
                negative: descending(&|place| self.contributions[place] < 0.0),
            },
            Swaps::InGroup { of } => {
                let of_group = |group| descending(&|place| place / of == group);
                ToGo::InGroup { of, groups: (0..self.contributions.len() / of).map(of_group).collect() }
            }
        }
    }
}

/// Kept weights that may go, the first to go being last.
enum ToGo {
    InRow { positive: Vec<usize>, negative: Vec<usize> },
    InGroup { of: usize, groups: Vec<Vec<usize>> },
}

impl ToGo {
    /// The next pair; a candidate whose group has nothing left to give is passed over.
    fn next(&mut self, candidates: &mut Vec<usize>, error_is_positive: bool) -> Option<Swap> {
        match self {
            Self::InRow { positive, negative } => {
                let pool = if error_is_positive { negative } else { positive };
                let swap = Swap { back: *candidates.last()?, gone: *pool.last()? };
                candidates.pop();
                pool.pop();
                Some(swap)
            }
            Self::InGroup { of, groups } => loop {
                let back = candidates.pop()?;
                if let Some(gone) = groups[back / *of].pop() {
                    return Some(Swap { back, gone });
                }
            },
        }
    }
}

#[cfg(test)]
mod tests;
