//! `ScoreChunk`: raw group sums in bounded pieces.

use super::mask::{projection_from_pb, projection_to_pb};
use crate::fields::{InvalidFields, Violations};
use crate::{limits, pb};
use model_spec::Projection;

/// A piece of one projection's raw group sums, from place `first_unit` of the rank's list on.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreSlice {
    pub step: u64,
    pub generation: u64,
    pub layer: usize,
    pub projection: Projection,
    pub first_unit: usize,
    pub values: Vec<f64>,
}

/// Width of scores on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreWidth {
    F32,
    /// For runs that compute in f64.
    F64,
}

impl ScoreWidth {
    fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// Where a list of sums belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScorePlace {
    pub step: u64,
    pub generation: u64,
    pub layer: usize,
    pub projection: Projection,
}

/// Cuts one projection's sums into chunks of at most [`limits::SCORE_CHUNK_BYTES`] of values.
pub fn chunks(
    place: ScorePlace,
    values: &[f64],
    width: ScoreWidth,
) -> impl Iterator<Item = pb::ScoreChunk> + '_ {
    let per_chunk = limits::SCORE_CHUNK_BYTES / width.bytes();
    values.chunks(per_chunk).enumerate().map(move |(index, values)| {
        let (values_f32, values_f64) = match width {
            ScoreWidth::F32 => (values.iter().map(|&value| value as f32).collect(), Vec::new()),
            ScoreWidth::F64 => (Vec::new(), values.to_vec()),
        };
        pb::ScoreChunk {
            step: place.step,
            generation: place.generation,
            layer: u32::try_from(place.layer).unwrap_or(u32::MAX),
            projection: projection_to_pb(place.projection).into(),
            first_unit: u32::try_from(index * per_chunk).unwrap_or(u32::MAX),
            values_f32,
            values_f64,
        }
    })
}

/// # Errors
/// When the projection is unknown or both widths are set. Values are taken as they are: a NaN is an event of the run.
pub fn from_pb(message: pb::ScoreChunk) -> Result<ScoreSlice, InvalidFields> {
    let mut found = Violations::default();
    let projection = projection_from_pb(message.projection).unwrap_or_else(|| {
        found.reject("projection", format!("has no usable member {}", message.projection));
        Projection::Q
    });
    if !message.values_f32.is_empty() && !message.values_f64.is_empty() {
        found.reject("values_f64", "must not be set together with `values_f32`");
    }
    let values = if message.values_f64.is_empty() {
        message.values_f32.into_iter().map(f64::from).collect()
    } else {
        message.values_f64
    };
    found.finish(ScoreSlice {
        step: message.step,
        generation: message.generation,
        layer: message.layer as usize,
        projection,
        first_unit: message.first_unit as usize,
        values,
    })
}
