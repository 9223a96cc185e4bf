use crate::{Violations, in_unit_interval};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Learning rate over the steps `t = 0 .. steps`.
///
/// ```text
/// t < warmup:  peak * (t + 1) / warmup
/// else:        peak * (floor + (1 - floor) * d((t - warmup) / (steps - warmup)))
/// d(x) = (1 + cos(pi x)) / 2   cosine,      1 - x   linear,      1   constant
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LearningRate {
    pub peak: f64,
    pub warmup_steps: u64,
    pub decay: Decay,
    /// Fraction of `peak` that the decay ends at.
    pub floor: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    Cosine,
    Linear,
    Constant,
}

impl Default for LearningRate {
    fn default() -> Self {
        Self { peak: 1e-3, warmup_steps: 0, decay: Decay::Cosine, floor: 0.0 }
    }
}

impl LearningRate {
    #[must_use]
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let progress = (step - self.warmup_steps) as f64 / (steps - self.warmup_steps).max(1) as f64;
        let shape = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
            Decay::Constant => 1.0,
        };
        self.peak * (self.floor + (1.0 - self.floor) * shape)
    }

    pub(crate) fn check(&self, steps: u64, found: &mut Violations) {
        found.require(self.peak.is_finite() && self.peak >= 0.0, "learning_rate.peak", || {
            format!("must be zero or positive; got {}", self.peak)
        });
        found.require(in_unit_interval(self.floor, true), "learning_rate.floor", || {
            format!("must lie in [0, 1]; got {}", self.floor)
        });
        found.require(self.warmup_steps <= steps, "learning_rate.warmup_steps", || {
            format!("must not exceed `steps` ({steps}); got {}", self.warmup_steps)
        });
    }
}

/// Sparsity over the steps: none, then the cubic ramp of Zhu & Gupta (arXiv:1710.01878, eq. 1), then the target.
///
/// ```text
/// w = round(warmup * steps)   c = round(cooldown * steps)
/// share(t) = 0                                       t <= w
///          = 1 - (1 - (t - w) / (steps - w - c))^3   w < t < steps - c
///          = 1                                       t >= steps - c
/// ```
///
/// `share` is the part of the target that is due. A mask is decided after the steps between the two ends that are
/// divisible by `every`, and once more at `steps - c`, where the target is met exactly. (The published code leaves that
/// last decision out and so ends one group short.)
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ramp {
    /// Fraction of the steps before anything is removed.
    pub warmup: f64,
    /// Fraction of the steps after the last removal.
    pub cooldown: f64,
    /// Steps between mask decisions.
    pub every: u64,
}

impl Default for Ramp {
    fn default() -> Self {
        Self { warmup: 0.1, cooldown: 0.1, every: 10 }
    }
}

impl Ramp {
    #[must_use]
    pub fn start_step(&self, steps: u64) -> u64 {
        (self.warmup * steps as f64).round() as u64
    }

    /// The step of the last decision, from which on the target holds.
    #[must_use]
    pub fn end_step(&self, steps: u64) -> u64 {
        steps - ((self.cooldown * steps as f64).round() as u64).min(steps)
    }

    /// Part of the target sparsity due at `step`, in `[0, 1]`.
    #[must_use]
    pub fn share_at(&self, step: u64, steps: u64) -> f64 {
        let (start, end) = (self.start_step(steps), self.end_step(steps));
        if step >= end {
            1.0
        } else if step <= start {
            0.0
        } else {
            1.0 - (1.0 - (step - start) as f64 / (end - start) as f64).powi(3)
        }
    }

    #[must_use]
    pub fn decides_at(&self, step: u64, steps: u64) -> bool {
        let (start, end) = (self.start_step(steps), self.end_step(steps));
        step == end || (start < step && step < end && step.is_multiple_of(self.every))
    }

    #[must_use]
    pub fn pruning_steps(&self, steps: u64) -> Vec<u64> {
        (0..steps).filter(|step| self.decides_at(*step, steps)).collect()
    }

    pub(crate) fn check(&self, steps: u64, found: &mut Violations) {
        for (field, value) in [("pruning.ramp.warmup", self.warmup), ("pruning.ramp.cooldown", self.cooldown)]
        {
            found.require(in_unit_interval(value, false), field, || {
                format!("must lie in [0, 1); got {value}")
            });
        }
        found.require(self.every >= 1, "pruning.ramp.every", || "must be at least 1".into());
        if steps > 0 && in_unit_interval(self.warmup, false) && in_unit_interval(self.cooldown, false) {
            found.require(
                self.end_step(steps) < steps && self.start_step(steps) <= self.end_step(steps),
                "pruning.ramp",
                || {
                    format!(
                        "`warmup` {} and `cooldown` {} leave no step of {steps} for the last decision; \
                         the cooldown must hold at least one step",
                        self.warmup, self.cooldown
                    )
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ramp_holds_then_rises_then_holds() {
        let ramp = Ramp { warmup: 0.1, cooldown: 0.1, every: 10 };
        for (step, expected) in [(0, 0.0), (10, 0.0), (50, 0.875), (90, 1.0), (99, 1.0)] {
            assert!((ramp.share_at(step, 100) - expected).abs() < 1e-12, "step {step}");
        }
        assert!((0..99).all(|step| ramp.share_at(step, 100) <= ramp.share_at(step + 1, 100)));
    }

    #[test]
    fn decisions_fall_on_multiples_and_on_the_end_of_the_ramp() {
        let ramp = Ramp { warmup: 0.1, cooldown: 0.1, every: 10 };
        assert_eq!(ramp.pruning_steps(100), [20, 30, 40, 50, 60, 70, 80, 90]);
        // 312 steps are the paper's two epochs of 20,000 samples in batches of 128.
        let published = ramp.pruning_steps(312);
        assert_eq!(published.first(), Some(&40));
        assert_eq!(published.last(), Some(&281));
        assert_eq!(published.len(), 26);
    }

    #[test]
    fn the_learning_rate_warms_up_and_decays_to_its_floor() {
        let rate = LearningRate { peak: 2.0, warmup_steps: 4, decay: Decay::Cosine, floor: 0.1 };
        assert_eq!(rate.at(0, 104), 0.5);
        assert_eq!(rate.at(3, 104), 2.0);
        assert_eq!(rate.at(4, 104), 2.0);
        assert!((rate.at(54, 104) - 1.1).abs() < 1e-12);
        assert!(rate.at(103, 104) > 0.2 && rate.at(103, 104) < 0.21);
        let linear = LearningRate { decay: Decay::Linear, floor: 0.0, ..rate };
        assert!((linear.at(54, 104) - 1.0).abs() < 1e-12);
        assert_eq!(LearningRate { decay: Decay::Constant, ..rate }.at(90, 104), 2.0);
    }
}
