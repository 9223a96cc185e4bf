use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Add;

/// What memory is taken by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Frozen weights as they are stored, norms and indices of features included.
    Weights,
    /// Master copy of the LoRA factors, and their copy in the format of the products.
    Lora,
    /// Sums of the factors' gradients.
    Gradients,
    /// The optimizer's moments.
    Moments,
    /// What the forward pass leaves for the backward pass, and the tensors of the layer under way.
    Activations,
    /// Weights widened for a product, logits of a chunk, what a criterion or a compensation sums up, what the unpruned
    /// model has taught, copies of a checkpoint.
    Buffers,
    /// The process itself: libraries, device context, memory that its allocator cannot use.
    Process,
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::Weights,
        Self::Lora,
        Self::Gradients,
        Self::Moments,
        Self::Activations,
        Self::Buffers,
        Self::Process,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "frozen weights",
            Self::Lora => "LoRA factors",
            Self::Gradients => "gradients",
            Self::Moments => "optimizer moments",
            Self::Activations => "activations",
            Self::Buffers => "buffers",
            Self::Process => "process",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes of one rank at one moment, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Memory {
    pub weights: u64,
    pub lora: u64,
    pub gradients: u64,
    pub moments: u64,
    pub activations: u64,
    pub buffers: u64,
    pub process: u64,
}

impl Memory {
    #[must_use]
    pub fn of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Weights => self.weights,
            Kind::Lora => self.lora,
            Kind::Gradients => self.gradients,
            Kind::Moments => self.moments,
            Kind::Activations => self.activations,
            Kind::Buffers => self.buffers,
            Kind::Process => self.process,
        }
    }

    #[must_use]
    pub fn total(&self) -> u64 {
        Kind::ALL.iter().map(|kind| self.of(*kind)).sum()
    }

    /// The kind that takes most; of equal ones the first.
    #[must_use]
    pub fn dominant(&self) -> Kind {
        let most = Kind::ALL.iter().map(|kind| self.of(*kind)).max().unwrap_or(0);
        Kind::ALL.into_iter().find(|kind| self.of(*kind) == most).unwrap_or(Kind::Weights)
    }

    /// The greater of two moments.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        if other.total() > self.total() { other } else { self }
    }
}

impl Add for Memory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            lora: self.lora + other.lora,
            gradients: self.gradients + other.gradients,
            moments: self.moments + other.moments,
            activations: self.activations + other.activations,
            buffers: self.buffers + other.buffers,
            process: self.process + other.process,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_the_sum_of_the_kinds_and_the_largest_dominates() {
        let memory =
            Memory { weights: 5, lora: 1, gradients: 1, moments: 2, activations: 9, buffers: 9, process: 3 };
        assert_eq!(memory.total(), 30);
        assert_eq!(memory.dominant(), Kind::Activations);
        let twice = memory + memory;
        assert!(Kind::ALL.iter().all(|kind| twice.of(*kind) == 2 * memory.of(*kind)));
        assert_eq!(memory.max(twice), twice);
        assert_eq!(twice.max(memory), twice);
    }
}
