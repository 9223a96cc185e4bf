//! Taking up a checkpoint: frozen weights come from the model's folder, what training has changed from the ranks' files.
//!
//! A group of the degree that wrote the files needs of the others' only what they held, and goes on bit for bit. A group of
//! another degree puts its factors together from all files.

use crate::factors::{Factor, is_replicated, split_features};
use crate::fault::{Fault, Result};
use crate::frozen::FrozenWeight;
use crate::layer::Narrowing;
use crate::shard::Shard;
use crate::source::select;
use crate::state_file::{RankState, base_name, factor_name};
use crate::teacher::Teacher;
use engine::{Restore, ShardSetup};
use model_spec::{ModelSpec, Projection, Split};
use recipe::{Compensation, Shrink};
use sharding::{Placement, RankLayer};
use tch::Tensor;

/// A checkpoint that was read.
pub(crate) struct Restored {
    /// Who holds what from now on.
    pub(crate) placement: Placement,
    restore: Restore,
    /// Those whose tensors are needed.
    files: Vec<RankState>,
}

impl Restored {
    /// Reads what the rank of `setup` needs.
    pub(crate) fn read(restore: &Restore, setup: &ShardSetup, dense: &ModelSpec) -> Result<Self> {
        restore.keep_mask.check_fits(dense).map_err(|error| Fault::Refused(error.to_string()))?;
        let degree = restore.shards.len();
        let file = |rank: usize| -> Result<RankState> {
            let (path, sha256) = restore
                .shards
                .get(rank)
                .ok_or_else(|| Fault::Refused(format!("the checkpoint has no file of rank {rank}")))?;
            let state = RankState::read(path, sha256, rank, degree)?;
            if state.generation != restore.generation {
                let (path, actual) = (path.display(), state.generation);
                return Err(Fault::File(format!(
                    "`{path}` is of generation {actual}, expected {}",
                    restore.generation
                )));
            }
            setup.progress.tick();
            Ok(state)
        };
        let (files, placement) = if degree == setup.tp_degree {
            let ranks: Vec<Vec<RankLayer>> =
                restore.shards.iter().map(|(path, _)| RankState::held_by(path)).collect::<Result<_>>()?;
            (vec![file(setup.tp_rank)?], Placement { ranks })
        } else {
            let files = (0..degree).map(file).collect::<Result<_>>()?;
            (files, dealt_anew(restore, setup, dense)?)
        };
        if placement.ranks.iter().any(|held| held.len() != dense.layers.len()) {
            return Err(Fault::File("the checkpoint is of a model with another number of layers".into()));
        }
        Ok(Self { placement, restore: restore.clone(), files })
    }

    /// Puts factors, moments, changed weights, taught windows and the mask into a shard that was loaded for the placement.
    pub(crate) fn put_into(self, shard: &mut Shard) -> Result<()> {
        let Some(first) = self.files.first() else {
            return Err(Fault::File("the checkpoint has no files".into()));
        };
        shard.moments.updates = first.updates;
        shard.skipped = first.skipped;
        shard.teacher = Teacher::restored(first)?;
        if let Some(pairs) = &mut shard.moments.pairs {
            for (name, tensor) in pairs.named() {
                tensor.f_copy_(&first.tensor(name)?.f_to_device(shard.device)?)?;
            }
        }
        let frozen = shard.setup.recipe.chain.as_ref();
        // Tied before the last step that was taken: the next knot is tied by the step before which it is due.
        let frozen = frozen.map_or(0, |chain| match self.restore.next_step.checked_sub(1) {
            Some(last) => chain.frozen_pairs(last),
            None => 0,
        });
        for _ in 0..frozen {
            shard.ledger.push(shard.factors.f_zeros_like()?);
        }
        for (prefix, flat) in shard.flats() {
            for layer in 0..shard.layout.layer_count() {
                for projection in Projection::ALL {
                    for factor in Factor::BOTH {
                        let name = factor_name(&prefix, layer, projection, factor);
                        let mut view = shard.layout.view(flat, layer, projection, factor)?;
                        let saved = if is_replicated(projection, factor) {
                            first.tensor(&name)?
                        } else {
                            let dim = split_dim(projection);
                            self.put_together(&name, layer, projection, dim, shard)?
                        };
                        if saved.size() != view.size() {
                            return Err(Fault::File(format!(
                                "the checkpoint's `{name}` is {:?}, this rank's part {:?}",
                                saved.size(),
                                view.size()
                            )));
                        }
                        view.f_copy_(&saved.f_to_kind(view.kind())?.f_to_device(shard.device)?)?;
                    }
                }
            }
            shard.setup.progress.tick();
        }
        let compensation = shard.setup.recipe.pruning.as_ref().map(|pruning| pruning.compensation);
        match compensation {
            Some(Compensation::LeastSquares(_)) if self.restore.generation > 0 => {
                for layer in 0..shard.model.layers.len() {
                    for which in Narrowing::BOTH {
                        let name = base_name(layer, which.projection());
                        let saved = self.put_together(&name, layer, which.projection(), 1, shard)?;
                        let held = shard.model.layers[layer].narrowing_mut(which);
                        let kind = crate::compensation::as_stored(held)?.kind();
                        *held = FrozenWeight::Dense(saved.f_to_kind(kind)?.f_to_device(shard.device)?);
                    }
                }
            }
            Some(Compensation::LeastSquares(_) | Compensation::None) | None => {}
        }
        shard.generation = self.restore.generation;
        shard.keep_mask = self.restore.keep_mask;
        shard.model.passed_over = shard.removed_layers();
        let shrink = shard.setup.recipe.pruning.as_ref().map(|pruning| pruning.shrink);
        if shrink == Some(Shrink::Never) && shard.generation > 0 {
            shard.mask_again()?;
        }
        Ok(())
    }

    /// This rank's features of a split tensor, along `dim`, from whichever files have them.
    fn put_together(
        &self,
        name: &str,
        layer: usize,
        projection: Projection,
        dim: i64,
        shard: &Shard,
    ) -> Result<Tensor> {
        let head_dim = shard.source.spec().head_dim;
        let wanted = split_features(&shard.held()[layer], projection, head_dim);
        let mut whole: Option<Tensor> = None;
        let mut found = 0;
        for file in &self.files {
            let has = split_features(&file.held[layer], projection, head_dim);
            let saved = file.tensor(name)?;
            if has == wanted {
                return Ok(saved);
            }
            let (places, sources): (Vec<i64>, Vec<i64>) = wanted
                .iter()
                .enumerate()
                .filter_map(|(place, feature)| Some((place as i64, has.binary_search(feature).ok()? as i64)))
                .unzip();
            found += places.len();
            let mut shape = saved.size();
            shape[usize::from(dim == 1)] = wanted.len() as i64;
            let target = match &mut whole {
                Some(whole) => whole,
                None => whole.insert(Tensor::f_zeros(&shape, (saved.kind(), saved.device()))?),
            };
            let places = Tensor::f_from_slice(&places)?;
            let _ = target.f_index_copy_(dim, &places, &select(&saved, dim, &sources)?.f_contiguous()?)?;
        }
        match whole {
            Some(whole) if found == wanted.len() => Ok(whole),
            Some(_) | None => Err(Fault::File(format!(
                "the checkpoint's files hold {found} of the {} features of `{name}` that this rank needs",
                wanted.len()
            ))),
        }
    }
}

/// Who holds what in a group of another degree: even shares of the dense model, restricted and levelled.
fn dealt_anew(restore: &Restore, setup: &ShardSetup, dense: &ModelSpec) -> Result<Placement> {
    let even = Placement::dense(dense, setup.tp_degree).map_err(|error| Fault::Refused(error.to_string()))?;
    Ok(match setup.recipe.pruning.as_ref().map(|pruning| pruning.shrink) {
        Some(Shrink::Live) => even.restricted_to(&restore.keep_mask).rebalanced(dense),
        // What is removed is still there, multiplied by zero.
        Some(Shrink::Never) | None => even,
    })
}

fn split_dim(projection: Projection) -> i64 {
    match projection.split() {
        Split::Column => 0,
        Split::Row => 1,
    }
}
