//! Frozen weights from a model folder: a rank's rows and columns, in the run's storage format, on its device.

use crate::dropout::splitmix;
use crate::factors::split_features;
use crate::fault::{Fault, Result, chain};
use crate::frozen::{FrozenFormat, FrozenWeight};
use crate::layer::LayerShard;
use checkpoint::{Dtype, ModelFolder, TensorView, Weights};
use model_spec::{ModelSpec, Projection, Split};
use recipe::Compute;
use sharding::RankLayer;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tracing::debug;

/// Where frozen weights come from.
pub(crate) struct Source {
    origin: Origin,
}

enum Origin {
    /// A model folder, opened and checked, its weights mapped.
    Folder { folder: Box<ModelFolder>, weights: Box<Weights> },
    /// Normal numbers that depend on the tensor's name alone, made on the device: for measurements.
    Random { spec: Box<ModelSpec>, shapes: HashMap<String, Vec<usize>>, device: Device },
}

/// Standard deviation of random weights, as models are initialised.
const RANDOM_DEVIATION: f64 = 0.02;

pub(crate) fn compute_kind(compute: Compute) -> Kind {
    match compute {
        Compute::F32 => Kind::Float,
        Compute::F64 => Kind::Double,
        Compute::Bf16 => Kind::BFloat16,
    }
}

impl Source {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let folder = ModelFolder::open(path).map_err(|error| Fault::File(chain(&error)))?;
        let weights = folder.open_weights().map_err(|error| Fault::File(chain(&error)))?;
        Ok(Self { origin: Origin::Folder { folder: Box::new(folder), weights: Box::new(weights) } })
    }

    /// A model of shape `spec` with random weights, which are made on `device` when they are asked for.
    pub(crate) fn random(spec: ModelSpec, device: Device) -> Self {
        let shapes = checkpoint::required_tensors(&spec).into_iter().collect();
        Self { origin: Origin::Random { spec: Box::new(spec), shapes, device } }
    }

    pub(crate) fn spec(&self) -> &ModelSpec {
        match &self.origin {
            Origin::Folder { folder, .. } => folder.spec(),
            Origin::Random { spec, .. } => spec,
        }
    }

    pub(crate) fn folder(&self) -> Result<(&ModelFolder, &Weights)> {
        match &self.origin {
            Origin::Folder { folder, weights } => Ok((folder, weights)),
            Origin::Random { .. } => Err(Fault::Refused("a random model has no files".into())),
        }
    }

    /// Gives back the memory of what has been read.
    pub(crate) fn release_pages(&self) {
        if let Origin::Folder { weights, .. } = &self.origin
            && let Err(error) = weights.release_pages()
        {
            debug!(%error, "pages of the model's files stay in memory");
        }
    }

    pub(crate) fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let (_, weights) = self.folder()?;
        weights.tensor(name).ok_or_else(|| Fault::File(format!("the model has no tensor `{name}`")))
    }

    /// A whole tensor as it lies in the file, on the CPU; a random one on its device.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        match &self.origin {
            Origin::Folder { .. } => as_tensor(&self.view(name)?),
            Origin::Random { shapes, device, .. } => {
                let shape = shapes
                    .get(name)
                    .ok_or_else(|| Fault::File(format!("the model has no tensor `{name}`")))?;
                random_tensor(name, shape, *device)
            }
        }
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
        format: FrozenFormat,
        device: Device,
    ) -> Result<FrozenWeight> {
        let name = checkpoint::projection_weight(layer, projection);
        let features = split_features(held, projection, self.spec().head_dim);
        let whole = self.tensor(&name)?;
        if let FrozenFormat::Dense(kind) = format {
            let dim = match projection.split() {
                Split::Column => 0,
                Split::Row => 1,
            };
            return Ok(FrozenWeight::Dense(self.placed(
                &name,
                &select(&whole, dim, &features)?,
                kind,
                device,
            )?));
        }
        let quantised = FrozenWeight::quantise(&whole, projection.split(), &features, format, device)?;
        if !quantised.is_finite()? {
            checkpoint::check_finite(&self.view(&name)?).map_err(|error| Fault::File(error.to_string()))?;
            return Err(Fault::File(format!("tensor `{name}` exceeds the range of f32")));
        }
        Ok(quantised)
    }

    /// The frozen part of layer `layer` that a rank holds.
    pub(crate) fn layer(
        &self,
        layer: usize,
        held: &RankLayer,
        storage: FrozenFormat,
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
            qkv: FrozenWeight::stack(vec![
                projection(Projection::Q)?,
                projection(Projection::K)?,
                projection(Projection::V)?,
            ])?,
            o: projection(Projection::O)?,
            gate_up: FrozenWeight::stack(vec![projection(Projection::Gate)?, projection(Projection::Up)?])?,
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

/// Ones for a norm, else small normal numbers from a seed made of the name.
fn random_tensor(name: &str, shape: &[usize], device: Device) -> Result<Tensor> {
    let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
    let options = (Kind::BFloat16, device);
    if shape.len() == 1 {
        return Ok(Tensor::f_ones(&shape, options)?);
    }
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| splitmix(hash ^ u64::from(byte)));
    tch::manual_seed((seed >> 1) as i64);
    Ok(Tensor::f_randn(&shape, options)?.f_mul_scalar_(RANDOM_DEVIATION)?)
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
