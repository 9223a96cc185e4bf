//! Links that delay, lose and fail to carry.

use crate::chance::Chance;
use crate::scenario::{MILLISECOND, Time};
use std::collections::{BTreeMap, BTreeSet};

/// One end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Coordinator,
    Worker(usize),
}

#[derive(Debug, Clone, Default)]
pub struct Network {
    cut: BTreeSet<(Node, Node)>,
    /// Links that take so many times as long.
    slow: BTreeMap<(Node, Node), u64>,
    /// Share of messages lost.
    pub loss: f64,
}

fn link(one: Node, other: Node) -> (Node, Node) {
    (one.min(other), one.max(other))
}

impl Network {
    #[must_use]
    pub fn losing(share: f64) -> Self {
        Self { loss: share, ..Self::default() }
    }

    pub fn cut(&mut self, one: Node, other: Node) {
        self.cut.insert(link(one, other));
    }

    pub fn mend(&mut self, one: Node, other: Node) {
        self.cut.remove(&link(one, other));
        self.slow.remove(&link(one, other));
    }

    pub fn slow(&mut self, one: Node, other: Node, factor: u64) {
        self.slow.insert(link(one, other), factor);
    }

    pub fn heal(&mut self) {
        *self = Self::default();
    }

    #[must_use]
    pub fn is_up(&self, one: Node, other: Node) -> bool {
        !self.cut.contains(&link(one, other))
    }

    #[must_use]
    pub fn factor(&self, one: Node, other: Node) -> u64 {
        self.slow.get(&link(one, other)).copied().unwrap_or(1)
    }

    /// How long a message takes; none when it does not come through.
    pub fn carry(&self, one: Node, other: Node, chance: &mut Chance) -> Option<Time> {
        let lost = chance.happens(self.loss);
        let delay = chance.between(MILLISECOND / 5, 20 * MILLISECOND) * self.factor(one, other);
        (self.is_up(one, other) && !lost).then_some(delay)
    }
}
