use crate::{Violations, in_unit_interval};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Learning rate over the steps `t = 0 .. steps`.
///
/// ```text
/// course(t, n) = peak * (t + 1) / warmup                                              t < warmup
///              = peak * (floor + (1 - floor) * d((t - warmup) / (n - warmup)))        else
/// d(x) = (1 + cos(pi x)) / 2   cosine,      1 - x   linear,      1   constant
/// ```
///
/// The rate is `course(t, steps)`, but for what `recovery` says of the steps after the last removal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LearningRate {
    pub peak: f64,
    pub warmup_steps: u64,
    pub decay: Decay,
    /// Fraction of `peak` that the decay ends at.
    pub floor: f64,
    pub recovery: Recovery,
}

/// What the rate does for the steps after the last removal, in which the final structure is tuned. Without pruning all
/// are `continue`. With `z` the first step after the last removal:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// One course over the whole run: what is removed last is tuned at a dying rate.
    #[default]
    Continue,
    /// The peak is held until then, and the decay has the steps after: `d((t - z) / (steps - z))`.
    Hold,
    /// One course over the whole run until then, and another, warm-up and all, after: `course(t - z, steps - z)`.
    Restart,
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
        Self { peak: 1e-3, warmup_steps: 0, decay: Decay::Cosine, floor: 0.0, recovery: Recovery::Continue }
    }
}

impl LearningRate {
    /// Rate of `step` of `steps`, the last mask being decided after step `last_removal`.
    #[must_use]
    pub fn at(&self, step: u64, steps: u64, last_removal: Option<u64>) -> f64 {
        let Some(last) = last_removal else { return self.course(step, steps) };
        let first_left = last.saturating_add(1);
        let left = || steps.saturating_sub(first_left);
        match (self.recovery, step.checked_sub(first_left)) {
            (Recovery::Continue, _) | (Recovery::Restart, None) => self.course(step, steps),
            (Recovery::Restart, Some(since)) => self.course(since, left()),
            (Recovery::Hold, _) if step < self.warmup_steps => self.course(step, steps),
            (Recovery::Hold, None) => self.peak,
            (Recovery::Hold, Some(since)) => self.decayed(since, left()),
        }
    }

    fn course(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        self.decayed(step - self.warmup_steps, steps.saturating_sub(self.warmup_steps))
    }

    fn decayed(&self, step: u64, steps: u64) -> f64 {
        let progress = step as f64 / steps.max(1) as f64;
        let shape = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Decay::Linear => 1.0 - progress,
            Decay::Constant => 1.0,
        };
        self.peak * (self.floor + (1.0 - self.floor) * shape)
    }

    pub(crate) fn check(&self, steps: u64, last_removal: Option<u64>, found: &mut Violations) {
        found.require(self.peak.is_finite() && self.peak >= 0.0, "learning_rate.peak", || {
            format!("must be zero or positive; got {}", self.peak)
        });
        found.require(in_unit_interval(self.floor, true), "learning_rate.floor", || {
            format!("must lie in [0, 1]; got {}", self.floor)
        });
        found.require(self.warmup_steps <= steps, "learning_rate.warmup_steps", || {
            format!("must not exceed `steps` ({steps}); got {}", self.warmup_steps)
        });
        if let (Recovery::Restart, Some(last)) = (self.recovery, last_removal) {
            let left = steps.saturating_sub(last.saturating_add(1));
            found.require(self.warmup_steps <= left, "learning_rate.warmup_steps", || {
                format!(
                    "must not exceed the {left} steps after the last removal, where `recovery: restart` warms up \
                     again; got {}",
                    self.warmup_steps
                )
            });
        }
    }
}

/// Sparsity over the steps: none, then a rise, then the target. `share` is the part of the target that is due.
///
/// ```text
/// w = round(warmup * steps)   c = round(cooldown * steps)
/// share(t) = 0                                       t <= w
///          = 1 - (1 - (t - w) / (steps - w - c))^3   w < t < steps - c     cubic
///          = 1                                       t >= steps - c
/// ```
///
/// `cubic`: a mask is decided after the steps between the two ends that are divisible by `every`, and once more at
/// `steps - c`, where the target is met exactly. (The published code leaves that last decision out and so ends one
/// group short.) `one_shot`: a single mask, decided after step `max(w, 1)`; `cooldown` and `every` say nothing then.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ramp {
    /// Fraction of the steps before anything is removed.
    pub warmup: f64,
    /// Fraction of the steps after the last removal.
    pub cooldown: f64,
    /// Steps between mask decisions.
    pub every: u64,
    pub shape: RampShape,
}

/// How the removal is spread over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RampShape {
    /// Many decisions, the most early (Zhu & Gupta, arXiv:1710.01878, eq. 1; LoRAPrune).
    #[default]
    Cubic,
    /// All at once at the end of `warmup`, then recovery (LLM-Pruner, arXiv:2305.11627).
    OneShot,
}

impl Default for Ramp {
    fn default() -> Self {
        Self { warmup: 0.05, cooldown: 0.67, every: 10, shape: RampShape::Cubic }
    }
}

impl Ramp {
    /// LoRAPrune's: a tenth of the steps before and after, a decision every ten.
    #[must_use]
    pub fn published() -> Self {
        Self { warmup: 0.1, cooldown: 0.1, every: 10, shape: RampShape::Cubic }
    }

    #[must_use]
    pub fn start_step(&self, steps: u64) -> u64 {
        (self.warmup * steps as f64).round() as u64
    }

    /// The step of the last decision, from which on the target holds.
    #[must_use]
    pub fn end_step(&self, steps: u64) -> u64 {
        match self.shape {
            RampShape::Cubic => steps - ((self.cooldown * steps as f64).round() as u64).min(steps),
            RampShape::OneShot => self.start_step(steps).max(1),
        }
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
        step == end
            || match self.shape {
                RampShape::Cubic => start < step && step < end && step.is_multiple_of(self.every),
                RampShape::OneShot => false,
            }
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
                || match self.shape {
                    RampShape::Cubic => format!(
                        "`warmup` {} and `cooldown` {} leave no step of {steps} for the last decision; \
                         the cooldown must hold at least one step",
                        self.warmup, self.cooldown
                    ),
                    RampShape::OneShot => format!(
                        "`warmup` {} leaves no step of {steps} for the decision, which falls on step {}",
                        self.warmup,
                        self.end_step(steps)
                    ),
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
        let ramp = Ramp::published();
        for (step, expected) in [(0, 0.0), (10, 0.0), (50, 0.875), (90, 1.0), (99, 1.0)] {
            assert!((ramp.share_at(step, 100) - expected).abs() < 1e-12, "step {step}");
        }
        assert!((0..99).all(|step| ramp.share_at(step, 100) <= ramp.share_at(step + 1, 100)));
    }

    #[test]
    fn decisions_fall_on_multiples_and_on_the_end_of_the_ramp() {
        let ramp = Ramp::published();
        assert_eq!(ramp.pruning_steps(100), [20, 30, 40, 50, 60, 70, 80, 90]);
        // 312 steps are the paper's two epochs of 20,000 samples in batches of 128.
        let published = ramp.pruning_steps(312);
        assert_eq!(published.first(), Some(&40));
        assert_eq!(published.last(), Some(&281));
        assert_eq!(published.len(), 26);
    }

    #[test]
    fn a_warm_up_beyond_all_steps_is_refused_without_overflow() {
        let ramp = Ramp { warmup: 1e300, shape: RampShape::OneShot, ..Ramp::published() };
        assert_eq!(ramp.end_step(100), u64::MAX);
        let rate = LearningRate { warmup_steps: 1, recovery: Recovery::Restart, ..LearningRate::default() };
        let mut found = Violations::default();
        ramp.check(100, &mut found);
        rate.check(100, Some(ramp.end_step(100)), &mut found);
        let fields: Vec<&str> = found.0.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, ["pruning.ramp.warmup", "learning_rate.warmup_steps"]);
    }

    #[test]
    fn one_shot_decides_once_at_the_end_of_the_warm_up() {
        let ramp = Ramp { shape: RampShape::OneShot, warmup: 0.25, cooldown: 0.9, every: 1 };
        assert_eq!(ramp.pruning_steps(40), [10]);
        assert_eq!([0, 9, 10, 39].map(|step| ramp.share_at(step, 40)), [0.0, 0.0, 1.0, 1.0]);
        let at_once = Ramp { warmup: 0.0, ..ramp };
        assert_eq!(at_once.pruning_steps(40), [1]);
        for (ramp, steps, fits) in
            [(at_once, 2, true), (at_once, 1, false), (Ramp { warmup: 0.99, ..ramp }, 10, false)]
        {
            let mut found = Violations::default();
            ramp.check(steps, &mut found);
            assert_eq!(found.0.is_empty(), fits, "{:?}", found.0);
        }
    }

    const RATE: LearningRate = LearningRate {
        peak: 2.0,
        warmup_steps: 4,
        decay: Decay::Cosine,
        floor: 0.1,
        recovery: Recovery::Continue,
    };

    #[test]
    fn the_learning_rate_warms_up_and_decays_to_its_floor() {
        for last_removal in [None, Some(50)] {
            let at = |step| RATE.at(step, 104, last_removal);
            assert_eq!([0, 3, 4].map(at), [0.5, 2.0, 2.0]);
            assert!((at(54) - 1.1).abs() < 1e-12);
            assert!(at(103) > 0.2 && at(103) < 0.21);
            let linear = LearningRate { decay: Decay::Linear, floor: 0.0, ..RATE };
            assert!((linear.at(54, 104, last_removal) - 1.0).abs() < 1e-12);
            let constant = LearningRate { decay: Decay::Constant, ..RATE };
            assert_eq!(constant.at(90, 104, last_removal), 2.0);
        }
    }

    #[test]
    fn a_held_rate_decays_after_the_last_removal_alone() {
        let held = LearningRate { recovery: Recovery::Hold, decay: Decay::Linear, floor: 0.0, ..RATE };
        // Steps 64 to 103 come after the last removal.
        let at = |step| held.at(step, 104, Some(63));
        assert_eq!([0, 3, 4, 63, 64].map(at), [0.5, 2.0, 2.0, 2.0, 2.0]);
        assert!((at(84) - 1.0).abs() < 1e-12 && (at(103) - 0.05).abs() < 1e-12);
        let without_removal: Vec<f64> = (0..104).map(|step| held.at(step, 104, None)).collect();
        let one_course = LearningRate { recovery: Recovery::Continue, ..held };
        assert!((0..104).all(|step| one_course.at(step, 104, None) == without_removal[step as usize]));
    }

    #[test]
    fn a_restarted_rate_warms_up_and_decays_again_after_the_last_removal() {
        let restarted = LearningRate { recovery: Recovery::Restart, ..RATE };
        let at = |step| restarted.at(step, 104, Some(59));
        assert!((0..=59).all(|step| at(step) == RATE.at(step, 104, None)), "nothing differs before");
        // 44 steps are left: 4 of warm-up, 40 of decay.
        assert_eq!([60, 63, 64].map(at), [0.5, 2.0, 2.0]);
        assert!((at(84) - 1.1).abs() < 1e-12);
        assert!(at(103) > 0.2 && at(103) < 0.21);
    }

    #[test]
    fn a_restart_needs_room_for_its_warm_up() {
        let restarted = LearningRate { recovery: Recovery::Restart, ..RATE };
        for (last_removal, refused) in [(None, false), (Some(99), false), (Some(100), true)] {
            let mut found = Violations::default();
            restarted.check(104, last_removal, &mut found);
            assert_eq!(!found.0.is_empty(), refused, "{last_removal:?}");
        }
    }
}
