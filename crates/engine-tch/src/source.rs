//! Frozen weights from a model folder: a rank's rows and columns, in the run's storage format, on its device.

use crate::factors::split_features;
use crate::fault::{Fault, Result, chain};
use crate::layer::LayerShard;
use checkpoint::{Dtype, ModelFolder, TensorView, Weights};
use model_spec::{ModelSpec, Projection, Split};
use recipe::{Compute, Storage};
use sharding::RankLayer;
use std::ops::Range;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// A model folder, opened and checked, its weights mapped.
pub(crate) struct Source {
    pub(crate) folder: ModelFolder,
    weights: Weights,
}

pub(crate) fn compute_kind(compute: Compute) -> Kind {
    match compute {
        Compute::F32 => Kind::Float,
        Compute::F64 => Kind::Double,
        Compute::Bf16 => Kind::BFloat16,
    }
}

pub(crate) fn storage_kind(storage: Storage) -> Kind {
    match storage {
        Storage::F32 => Kind::Float,
        Storage::F64 => Kind::Double,
        Storage::Bf16 => Kind::BFloat16,
    }
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = ModelFolder::open(path).map_err(|error| Fault::File(chain(&error)))?;
        let weights = folder.open_weights().map_err(|error| Fault::File(chain(&error)))?;
        Ok(Self { folder, weights })
    }

    pub(crate) fn spec(&self) -> &ModelSpec {
        self.folder.spec()
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    pub(crate) fn view(&self, name: &str) -> Result<TensorView<'_>> {
        self.weights.tensor(name).ok_or_else(|| Fault::File(format!("the model has no tensor `{name}`")))
    }

    /// A whole tensor as it lies in the file, on the CPU.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        as_tensor(&self.view(name)?)
    }

    /// The part of `tensor` that `place` takes, as a new tensor of `kind`; refuses numbers that are not finite.
    fn placed(&self, name: &str, part: &Tensor, kind: Kind, device: Device) -> Result<Tensor> {
        let placed = part.f_to_kind(kind)?.f_contiguous()?;
        // A tensor of the file's own kind may still lie in the map, which must not outlive `self`.
        let placed = if placed.data_ptr() == part.data_ptr() { placed.f_detach_copy()? } else { placed };
        if placed.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            checkpoint::check_finite(&self.view(name)?).map_err(|error| Fault::File(error.to_string()))?;
            return Err(Fault::File(format!(
                "tensor `{name}` exceeds the range of the storage format {kind:?}"
            )));
        }
        Ok(placed.f_to_device(device)?)
    }

    pub(crate) fn norm(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        self.placed(name, &self.tensor(name)?, kind, device)
    }

    /// Rows of the embedding or of the head.
    pub(crate) fn vocabulary(
        &self,
        name: &str,
        rows: &Range<usize>,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor> {
        let part = self.tensor(name)?.f_narrow(0, rows.start as i64, rows.len() as i64)?;
        self.placed(name, &part, kind, device)
    }

    /// What a rank holds of one projection: rows of a column-parallel, columns of a row-parallel one.
    pub(crate) fn projection(
        &self,
        layer: usize,
        projection: Projection,
        held: &RankLayer,
        kind: Kind,
        device: Device,
    ) -> Result<Tensor> {
        let name = checkpoint::projection_weight(layer, projection);
        let features = split_features(held, projection, self.spec().head_dim);
        let dim = match projection.split() {
            Split::Column => 0,
            Split::Row => 1,
        };
        let part = select(&self.tensor(&name)?, dim, &features)?;
        self.placed(&name, &part, kind, device)
    }

    /// The frozen part of layer `layer` that a rank holds.
    pub(crate) fn layer(
        &self,
        layer: usize,
        held: &RankLayer,
        storage: Kind,
        compute: Kind,
        device: Device,
    ) -> Result<LayerShard> {
        let projection = |projection| self.projection(layer, projection, held, storage, device);
        let spec = self.spec();
        let indices = |projection| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(&split_features(held, projection, spec.head_dim))?.f_to_device(device)?)
        };
        Ok(LayerShard {
            input_norm: self.norm(&checkpoint::input_norm(layer), compute, device)?,
            post_attention_norm: self.norm(&checkpoint::post_attention_norm(layer), compute, device)?,
            qkv: Tensor::f_cat(
                &[projection(Projection::Q)?, projection(Projection::K)?, projection(Projection::V)?],
                0,
            )?,
            o: projection(Projection::O)?,
            gate_up: Tensor::f_cat(&[projection(Projection::Gate)?, projection(Projection::Up)?], 0)?,
            down: projection(Projection::Down)?,
            query_heads: held.query_heads.len() as i64,
            kv_heads: held.kv_heads.len() as i64,
            channels: held.channels.len() as i64,
            head_features: indices(Projection::O)?,
            channel_features: indices(Projection::Down)?,
            head_keep: None,
            channel_keep: None,
        })
    }
}

/// `indices` along `dim`; a view where they are consecutive.
pub(crate) fn select(tensor: &Tensor, dim: i64, indices: &[i64]) -> Result<Tensor> {
    let consecutive = indices.windows(2).all(|pair| pair[1] == pair[0] + 1);
    Ok(match indices.first() {
        Some(&first) if consecutive => tensor.f_narrow(dim, first, indices.len() as i64)?,
        Some(_) => {
            tensor.f_index_select(dim, &Tensor::f_from_slice(indices)?.f_to_device(tensor.device())?)?
        }
        None => tensor.f_narrow(dim, 0, 0)?,
    })
}

pub(crate) fn kind_of(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
    }
}

/// A tensor over mapped bytes: without a copy where they are aligned, which today's writers see to.
fn as_tensor(view: &TensorView<'_>) -> Result<Tensor> {
    let kind = kind_of(view.dtype);
    let shape: Vec<i64> = view.shape.iter().map(|size| *size as i64).collect();
    if (view.bytes.as_ptr() as usize).is_multiple_of(view.dtype.byte_width()) {
        // SAFETY: the bytes are those of `shape` elements, aligned, and stay mapped while the caller, who borrows the
        // source, reads the tensor; every tensor that is kept is a copy (`Source::placed`). Nothing writes to it.
        Ok(unsafe { Tensor::f_from_blob(view.bytes.as_ptr(), &shape, &[], kind, Device::Cpu)? })
    } else {
        Ok(Tensor::f_from_data_size(view.bytes, &shape, kind)?)
    }
}
