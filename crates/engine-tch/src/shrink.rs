//! Putting a mask decision into force: slicing everything that follows a group, and moving groups between uneven ranks.

use crate::factors::{Factor, FactorLayout, is_replicated, split_features};
use crate::fault::{Fault, Result};
use crate::frozen::FrozenFormat;
use crate::importance::LiveGroups;
use crate::layer::{LayerShard, Narrowing};
use crate::shard::Shard;
use crate::source::{compute_kind, select};
use engine::MaskApplied;
use model_spec::{Projection, Split};
use pruning::KeepMask;
use recipe::Shrink;
use sharding::{Placement, RankLayer};
use tch::{Kind, Tensor};

impl Shard {
    pub(crate) fn apply(
        &mut self,
        generation: u64,
        keep_mask: &KeepMask,
        calibration: &[&[u32]],
    ) -> Result<MaskApplied> {
        if generation == self.generation {
            return Ok(MaskApplied { received_groups: 0 });
        }
        if generation != self.generation + 1 {
            return Err(Fault::Refused(format!(
                "generation {generation} does not follow generation {}, which is in force",
                self.generation
            )));
        }
        if keep_mask.layers.len() != self.keep_mask.layers.len() {
            return Err(Fault::Refused(format!(
                "the mask has {} layers, the model {}",
                keep_mask.layers.len(),
                self.keep_mask.layers.len()
            )));
        }
        keep_mask.check_subset_of(&self.keep_mask).map_err(|error| Fault::Refused(error.to_string()))?;
        let shrink = match &self.setup.recipe.pruning {
            Some(pruning) => pruning.shrink,
            None => return Err(Fault::Refused("the recipe does not prune".into())),
        };
        self.compensate(keep_mask, calibration)?;
        let received_groups = match shrink {
            Shrink::Never => {
                self.mask_only(keep_mask)?;
                0
            }
            Shrink::Live => {
                self.slice(self.placement.restricted_to(keep_mask).rebalanced(self.source.spec()))?
            }
        };
        self.keep_mask = keep_mask.clone();
        self.model.passed_over = self.removed_layers();
        self.generation = generation;
        Ok(MaskApplied { received_groups })
    }

    /// Puts the mask in force into force once more, on a shard that was loaded whole.
    pub(crate) fn mask_again(&mut self) -> Result<()> {
        let keep_mask = self.keep_mask.clone();
        self.mask_only(&keep_mask)
    }

    /// Nothing is sliced: removed features are multiplied by zero from now on.
    fn mask_only(&mut self, keep_mask: &KeepMask) -> Result<()> {
        let compute = compute_kind(self.setup.recipe.precision.compute);
        let head_dim = self.source.spec().head_dim;
        let held = &self.placement.ranks[self.setup.tp_rank];
        let live = self.placement.restricted_to(keep_mask);
        let live = &live.ranks[self.setup.tp_rank];
        for (layer, (held, live)) in held.iter().zip(live).enumerate() {
            let shard = &mut self.model.layers[layer];
            let keep = |projection| -> Result<Tensor> {
                let all = split_features(held, projection, head_dim);
                let kept = split_features(live, projection, head_dim);
                let ones: Vec<f32> =
                    all.iter().map(|feature| f32::from(kept.binary_search(feature).is_ok())).collect();
                Ok(Tensor::f_from_slice(&ones)?.f_to_kind(compute)?.f_to_device(shard.o.device())?)
            };
            let (heads, channels) = (keep(Projection::O)?, keep(Projection::Down)?);
            // What the factors' removed features hold reaches no output, but products of whole factors.
            for projection in Projection::ALL {
                let keep = keep(projection)?
                    .f_to_kind(self.factors.kind())?
                    .f_unsqueeze(1 - split_dim(projection))?;
                for flat in [&self.factors].into_iter().chain(&self.moments.flats) {
                    let _ =
                        self.layout.view(flat, layer, projection, split_factor(projection))?.f_mul_(&keep)?;
                }
            }
            shard.head_keep = Some(heads);
            shard.channel_keep = Some(channels);
            let among = |live: &[usize], held: &[usize]| -> Result<Option<Tensor>> {
                let positions: Vec<i64> = live
                    .iter()
                    .filter_map(|unit| held.binary_search(unit).ok())
                    .map(|place| place as i64)
                    .collect();
                Ok(Some(Tensor::f_from_slice(&positions)?.f_to_device(self.device)?))
            };
            self.live[layer] = LiveGroups {
                query_heads: among(&live.query_heads, &held.query_heads)?,
                kv_heads: among(&live.kv_heads, &held.kv_heads)?,
                channels: among(&live.channels, &held.channels)?,
            };
        }
        Ok(())
    }

    /// Brings weights, factors and moments from the placement in force to `next`; returns the groups received.
    fn slice(&mut self, next: Placement) -> Result<u64> {
        let _span = tracing::info_span!("shrink").entered();
        let rank = self.setup.tp_rank;
        let (mine, then) = (self.placement.ranks[rank].clone(), &next.ranks[rank]);
        let spec = self.source.spec().clone();
        let received = |now: &[usize], then: &[usize]| {
            then.iter().filter(|unit| now.binary_search(unit).is_err()).count() as u64
        };
        let moves = Moves::between(&self.placement, &next, spec.head_dim);
        let columns = self.exchange_columns(&moves)?;
        let mut received_groups = 0;
        for (layer, (now, then)) in mine.iter().zip(then).enumerate() {
            if now == then {
                continue;
            }
            let groups = received(&now.kv_heads, &then.kv_heads) + received(&now.channels, &then.channels);
            received_groups += groups;
            let precision = self.setup.recipe.precision;
            self.model.layers[layer] = if groups > 0 {
                let (storage, compute) =
                    (FrozenFormat::of(precision.storage), compute_kind(precision.compute));
                let mut fresh = self.source.layer(layer, then, storage, compute, self.device)?;
                if let Some(columns) = &columns {
                    for which in Narrowing::BOTH {
                        let held = self.model.layers[layer].narrowing(which);
                        *fresh.narrowing_mut(which) =
                            columns.put_together(held, layer, which, [now, then], spec.head_dim)?;
                    }
                }
                fresh
            } else {
                slice_layer(&self.model.layers[layer], now, then, spec.head_dim)?
            };
        }
        drop(columns);
        self.observed = None;

        let layout = FactorLayout::new(&spec, then, self.setup.recipe.lora.rank);
        let [first, second] = &self.moments.flats;
        let flats = [&self.factors, first, second].into_iter().chain(&self.ledger);
        let old: Vec<Tensor> = flats.map(Tensor::shallow_clone).collect();
        let exchanged = self.exchange(&old, &moves)?;
        let mut new = Vec::with_capacity(old.len());
        for (index, old) in old.iter().enumerate() {
            let flat = layout.zeros(old.kind(), self.device)?;
            for (layer, (now, then)) in mine.iter().zip(then).enumerate() {
                for projection in Projection::ALL {
                    let now = split_features(now, projection, spec.head_dim);
                    let then = split_features(then, projection, spec.head_dim);
                    for factor in Factor::BOTH {
                        let from = self.layout.view(old, layer, projection, factor)?;
                        let mut to = layout.view(&flat, layer, projection, factor)?;
                        if is_replicated(projection, factor) {
                            to.f_copy_(&from)?;
                            continue;
                        }
                        let dim = split_dim(projection);
                        let (kept, sources): (Vec<i64>, Vec<i64>) = then
                            .iter()
                            .enumerate()
                            .filter_map(|(place, feature)| {
                                Some((place as i64, now.binary_search(feature).ok()? as i64))
                            })
                            .unzip();
                        let kept = Tensor::f_from_slice(&kept)?.f_to_device(self.device)?;
                        let _ =
                            to.f_index_copy_(dim, &kept, &select(&from, dim, &sources)?.f_contiguous()?)?;
                        exchanged.receive(index, layer, projection, &then, &mut to)?;
                    }
                }
            }
            new.push(flat);
        }
        self.ledger = new.split_off(3);
        let [factors, first, second] = <[Tensor; 3]>::try_from(new)
            .map_err(|_| Fault::Refused("a mask must carry factors and both moments along".into()))?;
        self.gradients = factors.f_zeros_like()?;
        self.factors = factors;
        self.moments.flats = [first, second];
        self.layout = layout;
        self.placement = next;
        drop(old);
        crate::device::give_back(self.device)?;
        Ok(received_groups)
    }

    /// Rows of the split factors that change ranks: each owner writes its own into a buffer of zeros, and one all-reduce
    /// gives all of them to everybody. A few groups move at a time, so this is small.
    fn exchange<'a>(&mut self, old: &[Tensor], moves: &'a Moves) -> Result<Exchanged<'a>> {
        let lora_rank = self.setup.recipe.lora.rank as i64;
        let per_flat: i64 =
            moves.features.iter().flatten().map(|features| features.len() as i64 * lora_rank).sum();
        let kind = old.first().map_or(Kind::Float, Tensor::kind);
        let mut buffer = Tensor::f_zeros([per_flat * old.len() as i64], (kind, self.device))?;
        let exchanged = Exchanged { buffer: buffer.shallow_clone(), per_flat, lora_rank, moves };
        if per_flat == 0 {
            return Ok(exchanged);
        }
        let head_dim = self.source.spec().head_dim;
        for (index, old) in old.iter().enumerate() {
            for (layer, held) in self.placement.ranks[self.setup.tp_rank].iter().enumerate() {
                for projection in Projection::ALL {
                    let held = split_features(held, projection, head_dim);
                    let (places, sources): (Vec<i64>, Vec<i64>) = moves.features[layer][projection.index()]
                        .iter()
                        .enumerate()
                        .filter_map(|(place, feature)| {
                            Some((place as i64, held.binary_search(feature).ok()? as i64))
                        })
                        .unzip();
                    if places.is_empty() {
                        continue;
                    }
                    let dim = split_dim(projection);
                    let from = self.layout.view(old, layer, projection, split_factor(projection))?;
                    let mut slot = exchanged.slot(index, layer, projection)?;
                    let places = Tensor::f_from_slice(&places)?.f_to_device(self.device)?;
                    let _ =
                        slot.f_index_copy_(dim, &places, &select(&from, dim, &sources)?.f_contiguous()?)?;
                }
            }
        }
        self.communicator.all_reduce_sum(&mut buffer)?;
        Ok(exchanged)
    }
}

/// The factor of a projection that is split over ranks, and along which dimension.
fn split_factor(projection: Projection) -> Factor {
    match projection.split() {
        Split::Column => Factor::B,
        Split::Row => Factor::A,
    }
}

fn split_dim(projection: Projection) -> i64 {
    match projection.split() {
        Split::Column => 0,
        Split::Row => 1,
    }
}

/// Features that change ranks: `features[layer][projection]`, ascending; the same list on every rank.
pub(crate) struct Moves {
    pub(crate) features: Vec<[Vec<i64>; 7]>,
}

impl Moves {
    fn between(now: &Placement, then: &Placement, head_dim: usize) -> Self {
        let layers = now.ranks.first().map_or(0, Vec::len);
        let features = (0..layers)
            .map(|layer| {
                Projection::ALL.map(|projection| {
                    let mut moved: Vec<i64> = now
                        .ranks
                        .iter()
                        .zip(&then.ranks)
                        .flat_map(|(now, then)| {
                            let now = split_features(&now[layer], projection, head_dim);
                            let then = split_features(&then[layer], projection, head_dim);
                            then.into_iter().filter(move |feature| now.binary_search(feature).is_err())
                        })
                        .collect();
                    moved.sort_unstable();
                    moved
                })
            })
            .collect();
        Self { features }
    }
}

/// The moved rows of every factor and moment, on every rank.
struct Exchanged<'a> {
    buffer: Tensor,
    per_flat: i64,
    lora_rank: i64,
    moves: &'a Moves,
}

impl Exchanged<'_> {
    /// The rows of one projection's split factor in flat tensor `index`, shaped like the factor.
    fn slot(&self, index: usize, layer: usize, projection: Projection) -> Result<Tensor> {
        let lists = self.moves.features.iter().flatten();
        let before: usize = lists.take(layer * 7 + projection.index()).map(Vec::len).sum();
        let count = self.moves.features[layer][projection.index()].len() as i64;
        let start = index as i64 * self.per_flat + before as i64 * self.lora_rank;
        let shape = match projection.split() {
            Split::Column => [count, self.lora_rank],
            Split::Row => [self.lora_rank, count],
        };
        Ok(self.buffer.f_narrow(0, start, count * self.lora_rank)?.f_view(shape)?)
    }

    /// Copies what came to this rank into `to`, the split factor of the features `then`.
    fn receive(
        &self,
        index: usize,
        layer: usize,
        projection: Projection,
        then: &[i64],
        to: &mut Tensor,
    ) -> Result<()> {
        let moved = &self.moves.features[layer][projection.index()];
        let (sources, places): (Vec<i64>, Vec<i64>) = moved
            .iter()
            .enumerate()
            .filter_map(|(source, feature)| Some((source as i64, then.binary_search(feature).ok()? as i64)))
            .unzip();
        if places.is_empty() {
            return Ok(());
        }
        let dim = split_dim(projection);
        let places = Tensor::f_from_slice(&places)?.f_to_device(to.device())?;
        let rows = select(&self.slot(index, layer, projection)?, dim, &sources)?.f_contiguous()?;
        let _ = to.f_index_copy_(dim, &places, &rows)?;
        Ok(())
    }
}

/// A layer's frozen weights with only the groups of `then`, all of which are in `now`.
fn slice_layer(shard: &LayerShard, now: &RankLayer, then: &RankLayer, head_dim: usize) -> Result<LayerShard> {
    let positions = |projection, offset: i64| -> Vec<i64> {
        let now = split_features(now, projection, head_dim);
        split_features(then, projection, head_dim)
            .iter()
            .filter_map(|feature| now.binary_search(feature).ok())
            .map(|place| place as i64 + offset)
            .collect()
    };
    let (query, key) = (shard.query_heads * head_dim as i64, shard.kv_heads * head_dim as i64);
    let qkv =
        [positions(Projection::Q, 0), positions(Projection::K, query), positions(Projection::V, query + key)]
            .concat();
    let gate_up = [positions(Projection::Gate, 0), positions(Projection::Up, shard.channels)].concat();
    let indices = |projection| -> Result<Tensor> {
        let features = split_features(then, projection, head_dim);
        Ok(Tensor::f_from_slice(&features)?.f_to_device(shard.o.device())?)
    };
    Ok(LayerShard {
        input_norm: shard.input_norm.shallow_clone(),
        post_attention_norm: shard.post_attention_norm.shallow_clone(),
        qkv: shard.qkv.sliced(Split::Column, &qkv)?,
        o: shard.o.sliced(Split::Row, &positions(Projection::O, 0))?,
        gate_up: shard.gate_up.sliced(Split::Column, &gate_up)?,
        down: shard.down.sliced(Split::Row, &positions(Projection::Down, 0))?,
        query_heads: then.query_heads.len() as i64,
        kv_heads: then.kv_heads.len() as i64,
        channels: then.channels.len() as i64,
        head_features: indices(Projection::O)?,
        channel_features: indices(Projection::Down)?,
        head_keep: None,
        channel_keep: None,
    })
}
