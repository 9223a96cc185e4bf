//! Columns of o and of down that change ranks, where compensation has changed them: they come from their owners and not
//! from the model's folder.

use crate::compensation::as_stored;
use crate::factors::split_features;
use crate::fault::Result;
use crate::frozen::FrozenWeight;
use crate::layer::Narrowing;
use crate::shard::Shard;
use crate::shrink::Moves;
use crate::source::select;
use recipe::Compensation;
use sharding::RankLayer;
use tch::{Kind, Tensor};

/// The moved columns of all layers, on every rank.
pub(crate) struct MovedColumns<'a> {
    /// f64 `[columns, d]`: those of layer 0's o, of its down, of layer 1's o, …
    rows: Tensor,
    moves: &'a Moves,
}

impl Shard {
    /// Each owner writes its own columns into a buffer of zeros, and one all-reduce gives all of them to everybody.
    /// Nothing when they are still those of the model's folder.
    pub(crate) fn exchange_columns<'a>(&mut self, moves: &'a Moves) -> Result<Option<MovedColumns<'a>>> {
        match self.setup.recipe.pruning.as_ref().map(|pruning| pruning.compensation) {
            Some(Compensation::LeastSquares(_)) => {}
            Some(Compensation::None) | None => return Ok(None),
        }
        let count: usize = (0..moves.features.len())
            .flat_map(|layer| {
                Narrowing::BOTH.map(|which| moves.features[layer][which.projection().index()].len())
            })
            .sum();
        let spec = self.source.spec();
        let (hidden, head_dim) = (spec.hidden_size as i64, spec.head_dim);
        let mut moved = MovedColumns {
            rows: Tensor::f_zeros([count as i64, hidden], (Kind::Double, self.device))?,
            moves,
        };
        if count == 0 {
            return Ok(Some(moved));
        }
        for (layer, shard) in self.model.layers.iter().enumerate() {
            for which in Narrowing::BOTH {
                let held = &self.placement.ranks[self.setup.tp_rank][layer];
                let held = split_features(held, which.projection(), head_dim);
                let (places, sources) = pairs(moved.features(layer, which), &held);
                if places.is_empty() {
                    continue;
                }
                let places = Tensor::f_from_slice(&places)?.f_to_device(self.device)?;
                let mine = select(as_stored(shard.narrowing(which))?, 1, &sources)?.f_tr()?;
                let _ =
                    moved.slot(layer, which)?.f_index_copy_(0, &places, &mine.f_to_kind(Kind::Double)?)?;
            }
        }
        self.communicator.all_reduce_sum(&mut moved.rows)?;
        Ok(Some(moved))
    }
}

impl MovedColumns<'_> {
    fn features(&self, layer: usize, which: Narrowing) -> &[i64] {
        &self.moves.features[layer][which.projection().index()]
    }

    fn slot(&self, layer: usize, which: Narrowing) -> Result<Tensor> {
        let both = |layer: usize| Narrowing::BOTH.map(|which| self.features(layer, which).len());
        let mut start: usize = (0..layer).flat_map(both).sum();
        match which {
            Narrowing::O => {}
            Narrowing::Down => start += self.features(layer, Narrowing::O).len(),
        }
        Ok(self.rows.f_narrow(0, start as i64, self.features(layer, which).len() as i64)?)
    }

    /// The columns of `then`, of which `held` has those of `now`.
    pub(crate) fn put_together(
        &self,
        held: &FrozenWeight,
        layer: usize,
        which: Narrowing,
        [now, then]: [&RankLayer; 2],
        head_dim: usize,
    ) -> Result<FrozenWeight> {
        let held = as_stored(held)?;
        let [now, then] = [now, then].map(|layer| split_features(layer, which.projection(), head_dim));
        let (kept, sources) = pairs(&then, &now);
        let (came, rows) = pairs(&then, self.features(layer, which));
        let place = |places: &[i64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(places)?.f_to_device(held.device())?)
        };
        let shape = [held.size()[0], then.len() as i64];
        let mut whole = Tensor::f_zeros(shape, (held.kind(), held.device()))?;
        let _ = whole.f_index_copy_(1, &place(&kept)?, &select(held, 1, &sources)?.f_contiguous()?)?;
        let received = select(&self.slot(layer, which)?, 0, &rows)?.f_tr()?.f_to_kind(held.kind())?;
        let _ = whole.f_index_copy_(1, &place(&came)?, &received.f_contiguous()?)?;
        Ok(FrozenWeight::Dense(whole))
    }
}

/// Positions in `wanted` of the features that `have` has too, and their positions there. `have` is ascending.
fn pairs(wanted: &[i64], have: &[i64]) -> (Vec<i64>, Vec<i64>) {
    wanted
        .iter()
        .enumerate()
        .filter_map(|(place, feature)| Some((place as i64, have.binary_search(feature).ok()? as i64)))
        .unzip()
}
