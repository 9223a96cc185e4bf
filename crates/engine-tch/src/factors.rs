//! The LoRA factors of a rank: one flat tensor, so that reduction, clipping and the optimizer are single operations, and
//! a view of it for every factor.
//!
//! The replicated factors (`lora_a` of column-parallel, `lora_b` of row-parallel projections) come first: their
//! gradients are partial on every rank, and one all-reduce over that prefix completes them.

use crate::dropout::splitmix;
use crate::fault::Result;
use model_spec::{ModelSpec, Projection, Split};
use sharding::RankLayer;
use tch::{Device, Kind, Tensor};

/// Which of the two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Factor {
    /// `[rank, in]`
    A,
    /// `[out, rank]`
    B,
}

impl Factor {
    pub(crate) const BOTH: [Self; 2] = [Self::A, Self::B];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::A => "lora_a",
            Self::B => "lora_b",
        }
    }
}

/// Whether every rank holds all of a factor.
pub(crate) fn is_replicated(projection: Projection, factor: Factor) -> bool {
    match (projection.split(), factor) {
        (Split::Column, Factor::A) | (Split::Row, Factor::B) => true,
        (Split::Column, Factor::B) | (Split::Row, Factor::A) => false,
    }
}

/// Indices into the unpruned model of the features along the split dimension of `projection` that a rank holds.
pub(crate) fn split_features(held: &RankLayer, projection: Projection, head_dim: usize) -> Vec<i64> {
    let of_heads = |heads: &[usize]| {
        heads.iter().flat_map(|head| (head * head_dim..(head + 1) * head_dim).map(|row| row as i64)).collect()
    };
    match projection {
        Projection::Q | Projection::O => of_heads(&held.query_heads),
        Projection::K | Projection::V => of_heads(&held.kv_heads),
        Projection::Gate | Projection::Up | Projection::Down => {
            held.channels.iter().map(|channel| *channel as i64).collect()
        }
    }
}

/// Offset and shape.
type Place = (i64, [i64; 2]);

/// Where each factor lies in the flat tensor.
#[derive(Debug, Clone)]
pub(crate) struct FactorLayout {
    /// `[layer][projection][factor]`
    places: Vec<[[Place; 2]; 7]>,
    replicated_len: i64,
    len: i64,
}

impl FactorLayout {
    pub(crate) fn new(dense: &ModelSpec, held: &[RankLayer], lora_rank: usize) -> Self {
        let mut places = vec![[[(0, [0, 0]); 2]; 7]; held.len()];
        let mut offset = 0;
        let mut replicated_len = 0;
        for replicated in [true, false] {
            for (layer, held) in held.iter().enumerate() {
                for projection in Projection::ALL {
                    let split = split_features(held, projection, dense.head_dim).len() as i64;
                    let [rows, columns] = match projection.split() {
                        Split::Column => [split, dense.hidden_size as i64],
                        Split::Row => [dense.hidden_size as i64, split],
                    };
                    for factor in Factor::BOTH {
                        if is_replicated(projection, factor) == replicated {
                            let shape = match factor {
                                Factor::A => [lora_rank as i64, columns],
                                Factor::B => [rows, lora_rank as i64],
                            };
                            places[layer][projection.index()][factor as usize] = (offset, shape);
                            offset += shape[0] * shape[1];
                        }
                    }
                }
            }
            if replicated {
                replicated_len = offset;
            }
        }
        Self { places, replicated_len, len: offset }
    }

    pub(crate) fn layer_count(&self) -> usize {
        self.places.len()
    }

    /// Projections with an adapter.
    pub(crate) fn pair_count(&self) -> i64 {
        (self.places.len() * Projection::ALL.len()) as i64
    }

    /// The view of one factor in a flat tensor of this layout.
    pub(crate) fn view(
        &self,
        flat: &Tensor,
        layer: usize,
        projection: Projection,
        factor: Factor,
    ) -> Result<Tensor> {
        let (offset, shape) = self.places[layer][projection.index()][factor as usize];
        Ok(flat.f_narrow(0, offset, shape[0] * shape[1])?.f_view(shape)?)
    }

    /// `lora_a` of consecutive projections that read the same input, stacked: `[count * rank, in]`.
    pub(crate) fn stacked_a(
        &self,
        flat: &Tensor,
        layer: usize,
        projections: &[Projection],
    ) -> Result<Tensor> {
        let (offset, [lora_rank, columns]) = self.places[layer][projections[0].index()][Factor::A as usize];
        let rows = lora_rank * projections.len() as i64;
        Ok(flat.f_narrow(0, offset, rows * columns)?.f_view([rows, columns])?)
    }

    /// The prefix that holds the replicated factors.
    pub(crate) fn replicated(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, 0, self.replicated_len)?)
    }

    /// The rest, which holds the split ones.
    pub(crate) fn split(&self, flat: &Tensor) -> Result<Tensor> {
        Ok(flat.f_narrow(0, self.replicated_len, self.len - self.replicated_len)?)
    }

    pub(crate) fn zeros(&self, kind: Kind, device: Device) -> Result<Tensor> {
        Ok(Tensor::f_zeros([self.len], (kind, device))?)
    }

    /// Fresh factors: `lora_a` uniform in `±1/sqrt(in)`, `in` being the unpruned width, `lora_b` zero. Each value depends
    /// on the seed and on its place in the unpruned model alone, so any tensor-parallel degree starts alike.
    pub(crate) fn fresh(
        &self,
        dense: &ModelSpec,
        held: &[RankLayer],
        seed: u64,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor> {
        let flat = self.zeros(Kind::Double, Device::Cpu)?;
        for (layer, held) in held.iter().enumerate() {
            for projection in Projection::ALL {
                let columns: Vec<u64> = match projection.split() {
                    Split::Column => (0..dense.hidden_size as u64).collect(),
                    Split::Row => split_features(held, projection, dense.head_dim)
                        .iter()
                        .map(|index| *index as u64)
                        .collect(),
                };
                let [_, fan_in] = dense.projection_shape(layer, projection);
                let bound = 1.0 / (fan_in as f64).sqrt();
                let key = splitmix(
                    splitmix(seed ^ 0x004C_6F52_415F_4100) ^ (layer * 7 + projection.index()) as u64,
                );
                let (_, [lora_rank, _]) = self.places[layer][projection.index()][Factor::A as usize];
                let mut values = Vec::with_capacity(columns.len() * lora_rank as usize);
                for row in 0..lora_rank as u64 {
                    for column in &columns {
                        let bits = splitmix(key ^ splitmix(row << 40 | column)) >> 11;
                        let unit = bits as f64 / (1u64 << 53) as f64;
                        values.push((2.0 * unit - 1.0) * bound);
                    }
                }
                let mut view = self.view(&flat, layer, projection, Factor::A)?;
                view.f_copy_(&Tensor::f_from_slice(&values)?.f_view([lora_rank, columns.len() as i64])?)?;
            }
        }
        Ok(flat.f_to_kind(kind)?.f_to_device(device)?)
    }
}
