//! `KeepMask`, `LayerWidths` and `Projection`.

use super::{below, bounded_list};
use crate::fields::{InvalidFields, Violations};
use crate::{limits, pb};
use model_spec::{LayerSpec, ModelSpec, Projection};
use pruning::{KeepMask, LayerKeep};

/// A keep mask whose lists ascend. Whether it fits a model is [`check_fits`]'s question.
///
/// # Errors
/// Names every list that does not ascend.
pub fn checked(message: Option<pb::KeepMask>, path: &str) -> Result<KeepMask, InvalidFields> {
    let mut found = Violations::default();
    let mask = from_pb(message, path, &mut found);
    found.finish(mask)
}

/// See [`checked`]; what is wrong goes to `found`.
pub fn from_pb(message: Option<pb::KeepMask>, path: &str, found: &mut Violations) -> KeepMask {
    let layers = message.unwrap_or_default().layers;
    if layers.is_empty() {
        found.reject(below(path, "layers"), "must have an entry for every layer");
    }
    if !bounded_list(layers.len(), &below(path, "layers"), found) {
        return KeepMask { layers: Vec::new() };
    }
    let layers = layers
        .into_iter()
        .enumerate()
        .map(|(layer, keep)| {
            let mut list = |indices: Vec<u32>, field: &str| {
                let ascends = indices.windows(2).all(|pair| pair[0] < pair[1]);
                if !ascends || indices.len() > limits::MAX_UNITS {
                    let most = limits::MAX_UNITS;
                    found.reject(
                        below(path, &format!("layers[{layer}].{field}")),
                        format!("must ascend without repetition and hold at most {most} indices"),
                    );
                }
                indices.into_iter().map(|index| index as usize).collect()
            };
            LayerKeep {
                query_heads: list(keep.query_heads, "query_heads"),
                kv_heads: list(keep.kv_heads, "kv_heads"),
                channels: list(keep.channels, "channels"),
            }
        })
        .collect();
    KeepMask { layers }
}

/// Holds a mask against the unpruned model: an entry a layer, indices in range, something of everything kept or nothing at all, each kept
/// query head's key/value head kept, and equally many query heads for each.
///
/// # Errors
/// Names every layer and list at fault.
pub fn check_fits(mask: &KeepMask, dense: &ModelSpec, path: &str) -> Result<(), InvalidFields> {
    let mut found = Violations::default();
    if mask.layers.len() != dense.layers.len() {
        found.reject(
            below(path, "layers"),
            format!("has {} entries, the model has {} layers", mask.layers.len(), dense.layers.len()),
        );
        return found.finish(());
    }
    for (layer, (keep, widths)) in mask.layers.iter().zip(&dense.layers).enumerate() {
        if keep.is_removed() {
            continue;
        }
        let at = |field: &str| below(path, &format!("layers[{layer}].{field}"));
        for (field, kept, count) in [
            ("query_heads", &keep.query_heads, widths.query_head_count),
            ("kv_heads", &keep.kv_heads, widths.kv_head_count),
            ("channels", &keep.channels, widths.intermediate_size),
        ] {
            match kept.last() {
                None => found.reject(at(field), "must keep at least one, or the layer nothing at all"),
                Some(&last) if last >= count => {
                    found.reject(at(field), format!("index {last} is outside the layer's {count}"));
                }
                Some(_) => {}
            }
        }
        let mut per_kv = vec![0usize; keep.kv_heads.len()];
        let mut orphan = None;
        for &query in keep.query_heads.iter().filter(|&&query| query < widths.query_head_count) {
            match keep.kv_heads.binary_search(&widths.kv_head_of(query)) {
                Ok(place) => per_kv[place] += 1,
                Err(_) => orphan = orphan.or(Some(query)),
            }
        }
        if let Some(query) = orphan {
            let kv = widths.kv_head_of(query);
            found.reject(at("query_heads"), format!("keeps {query}, whose key/value head {kv} goes"));
        } else if per_kv.windows(2).any(|pair| pair[0] != pair[1]) {
            found.reject(at("query_heads"), "must keep equally many for each kept key/value head");
        }
    }
    found.finish(())
}

#[must_use]
pub fn to_pb(mask: &KeepMask) -> pb::KeepMask {
    let list = |indices: &[usize]| indices.iter().map(|&index| narrow(index)).collect();
    pb::KeepMask {
        layers: mask
            .layers
            .iter()
            .map(|keep| pb::LayerKeep {
                query_heads: list(&keep.query_heads),
                kv_heads: list(&keep.kv_heads),
                channels: list(&keep.channels),
            })
            .collect(),
    }
}

#[must_use]
pub fn widths_to_pb(widths: &LayerSpec) -> pb::LayerWidths {
    pb::LayerWidths {
        query_heads: narrow(widths.query_head_count),
        kv_heads: narrow(widths.kv_head_count),
        channels: narrow(widths.intermediate_size),
    }
}

#[must_use]
pub fn widths_from_pb(message: &pb::LayerWidths) -> LayerSpec {
    LayerSpec {
        query_head_count: message.query_heads as usize,
        kv_head_count: message.kv_heads as usize,
        intermediate_size: message.channels as usize,
    }
}

#[must_use]
pub fn projection_to_pb(projection: Projection) -> pb::Projection {
    match projection {
        Projection::Q => pb::Projection::Q,
        Projection::K => pb::Projection::K,
        Projection::V => pb::Projection::V,
        Projection::O => pb::Projection::O,
        Projection::Gate => pb::Projection::Gate,
        Projection::Up => pb::Projection::Up,
        Projection::Down => pb::Projection::Down,
    }
}

/// Nothing for an unspecified or unknown member.
#[must_use]
pub fn projection_from_pb(number: i32) -> Option<Projection> {
    match pb::Projection::try_from(number).ok()? {
        pb::Projection::Unspecified => None,
        pb::Projection::Q => Some(Projection::Q),
        pb::Projection::K => Some(Projection::K),
        pb::Projection::V => Some(Projection::V),
        pb::Projection::O => Some(Projection::O),
        pb::Projection::Gate => Some(Projection::Gate),
        pb::Projection::Up => Some(Projection::Up),
        pb::Projection::Down => Some(Projection::Down),
    }
}

/// Indices and counts of a model are far below the bound.
fn narrow(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
