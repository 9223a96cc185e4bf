use crate::{Placement, RankLayer};

/// What changes hands between two placements of the same mask, layer by layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Moves {
    pub layers: Vec<LayerMoves>,
}

/// The moves of one layer, each list ascending by unit. A key/value head takes its kept query heads with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerMoves {
    pub kv_heads: Vec<Move>,
    pub channels: Vec<Move>,
}

/// One unit, by its index in the unpruned model, goes from one tensor-parallel rank to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    pub unit: usize,
    pub from_rank: usize,
    pub to_rank: usize,
}

impl Moves {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|layer| layer.kv_heads.is_empty() && layer.channels.is_empty())
    }
}

impl Placement {
    /// What must be sent for `self` to become `other`. Units that only one of the two holds do not move.
    #[must_use]
    pub fn moves_to(&self, other: &Self) -> Moves {
        let layer_count = [self, other].iter().flat_map(|placement| &placement.ranks).map(Vec::len).max();
        let layers = (0..layer_count.unwrap_or(0))
            .map(|layer| LayerMoves {
                kv_heads: moves(self, other, layer, |held| &held.kv_heads),
                channels: moves(self, other, layer, |held| &held.channels),
            })
            .collect();
        Moves { layers }
    }
}

fn moves(from: &Placement, to: &Placement, layer: usize, units: fn(&RankLayer) -> &[usize]) -> Vec<Move> {
    let before = holders(from, layer, units);
    let mut before = before.iter().peekable();
    let mut moves = Vec::new();
    for (unit, to_rank) in holders(to, layer, units) {
        while before.next_if(|(held, _)| *held < unit).is_some() {}
        if let Some(&(_, from_rank)) = before.next_if(|(held, _)| *held == unit)
            && from_rank != to_rank
        {
            moves.push(Move { unit, from_rank, to_rank });
        }
    }
    moves
}

/// `(unit, rank)` of everything held in a layer, ascending.
fn holders(placement: &Placement, layer: usize, units: fn(&RankLayer) -> &[usize]) -> Vec<(usize, usize)> {
    let mut holders: Vec<(usize, usize)> = placement
        .ranks
        .iter()
        .enumerate()
        .filter_map(|(rank, layers)| Some((rank, layers.get(layer)?)))
        .flat_map(|(rank, held)| units(held).iter().map(move |&unit| (unit, rank)))
        .collect();
    holders.sort_unstable();
    holders
}
