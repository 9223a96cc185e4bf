//! The pruned model as a folder: factors merged into the frozen weights, groups cut out, written in Hugging Face layout
//! and checked by a process of its own before it appears under its name.

use crate::export_check::{LogitCheck, check_folder};
use crate::factors::{Factor, is_replicated, split_features};
use crate::fault::{Fault, Result, chain};
use crate::frozen::{FrozenFormat, FrozenWeight};
use crate::source::{Source, compute_kind, kind_of, select};
use crate::state_file::{RankState, base_name, factor_name, ledger_prefix, to_bytes};
use checkpoint::{Dtype, ExportManifest, FolderWriter, LayerKept, MANIFEST_FILE, SourceModel, TensorHeader};
use engine::{ExportDtype, ExportJob, ExportWritten};
use model_spec::{Block, ModelSpec, Projection, Split};
use pruning::LayerKeep;
use recipe::Compensation;
use sharding::RankLayer;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::{Device, Kind, Tensor};

pub(crate) fn export(job: &ExportJob, logits_program: &Path) -> Result<ExportWritten> {
    let source = Source::open(&job.model)?;
    let dense = source.spec();
    if job.keep_mask.layers.len() != dense.layers.len() {
        let (mask, model) = (job.keep_mask.layers.len(), dense.layers.len());
        return Err(Fault::Refused(format!("the keep mask has {mask} layers, the model {model}")));
    }
    let ranks = job
        .shards
        .iter()
        .enumerate()
        .map(|(rank, (path, sha256))| RankState::read(path, sha256, rank, job.shards.len()))
        .collect::<Result<Vec<_>>>()?;
    let pruned = job.keep_mask.pruned_spec(dense);
    let written_spec = checkpoint::padded_spec(&pruned.without_removed_layers());
    let sources =
        (0..dense.layers.len()).filter(|layer| !job.keep_mask.layers[*layer].is_removed()).collect();
    let dtype = match job.dtype {
        ExportDtype::Bf16 => Dtype::Bf16,
        ExportDtype::F16 => Dtype::F16,
        ExportDtype::F32 => Dtype::F32,
        ExportDtype::Source => match source.view(checkpoint::EMBEDDING)?.dtype {
            Dtype::F64 => Dtype::F32,
            narrow @ (Dtype::F32 | Dtype::Bf16 | Dtype::F16) => narrow,
        },
    };
    let file = |error: &dyn std::error::Error| Fault::File(chain(error));
    let unwritten = |error: &dyn std::error::Error| Fault::Unwritten(chain(error));
    let config = checkpoint::export_config(&source.folder()?.0.config().raw, &written_spec, dtype)
        .map_err(|e| file(&e))?;
    let headers = checkpoint::required_tensors(&written_spec)
        .into_iter()
        .map(|(name, shape)| TensorHeader { name, dtype, shape })
        .collect();
    let mut writer = FolderWriter::create(&job.out, headers, job.max_shard_bytes).map_err(|e| file(&e))?;
    let merge =
        Merge { source: &source, ranks: &ranks, job, pruned: &pruned, written: &written_spec, sources };
    let mut weight_bytes = 0;
    for (name, shape) in checkpoint::required_tensors(&written_spec) {
        let merged = merge.tensor(&name)?;
        let sizes: Vec<usize> = merged.size().iter().map(|size| *size as usize).collect();
        if sizes != shape {
            return Err(Fault::Refused(format!(
                "merged tensor `{name}` has shape {sizes:?}, expected {shape:?}"
            )));
        }
        let rounded = merged.f_to_kind(kind_of(dtype))?;
        if rounded.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(Fault::Refused(format!(
                "tensor `{name}` exceeds the range of {dtype:?}; export as f32 or bf16"
            )));
        }
        let (_, _, bytes) = to_bytes(&rounded)?;
        weight_bytes += bytes.len() as u64;
        writer.add_tensor(&name, &bytes).map_err(|e| unwritten(&e))?;
        source.release_pages();
    }
    writer.write_json("config.json", &config).map_err(|e| unwritten(&e))?;
    for companion in source.folder()?.0.companion_files() {
        writer.copy_file(&companion).map_err(|e| unwritten(&e))?;
    }
    let check = check_folder(writer.staging_path(), &ranks, dtype, logits_program)?;
    let manifest = manifest(job, &source, &written_spec, &writer, &check)?;
    let text = manifest.to_json();
    writer.write_file(MANIFEST_FILE, text.as_bytes()).map_err(|e| unwritten(&e))?;
    writer.commit().map_err(|e| unwritten(&e))?;
    Ok(ExportWritten {
        parameters: written_spec.parameter_count(),
        weight_bytes,
        model_type: config.get("model_type").and_then(|value| value.as_str()).unwrap_or_default().to_owned(),
        manifest_sha256: checkpoint::Sha256Digest::of(text.as_bytes()).to_string(),
        max_logit_difference: check.max_difference,
        max_logit: check.max_logit,
        top_token_agreement: check.top_token_agreement,
        mean_kl: check.mean_kl,
    })
}

fn manifest(
    job: &ExportJob,
    source: &Source,
    written: &ModelSpec,
    writer: &FolderWriter,
    check: &LogitCheck,
) -> Result<ExportManifest> {
    let narrow = |indices: &[usize]| indices.iter().map(|index| *index as u32).collect();
    let json = |error: serde_json::Error| Fault::File(format!("failed to encode the manifest: {error}"));
    Ok(ExportManifest {
        format_version: checkpoint::MANIFEST_FORMAT_VERSION,
        source_model: SourceModel {
            name: job.model.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            files: {
                let (folder, weights) = source.folder()?;
                folder.digests(weights).map_err(|error| Fault::File(chain(&error)))?
            },
        },
        recipe: serde_json::to_value(&job.recipe).map_err(json)?,
        layers: job
            .keep_mask
            .layers
            .iter()
            .map(|layer| LayerKept {
                kept_query_heads: narrow(&layer.query_heads),
                kept_kv_heads: narrow(&layer.kv_heads),
                kept_channels: narrow(&layer.channels),
            })
            .collect(),
        parameters_before: source.spec().parameter_count(),
        parameters_after: written.parameter_count(),
        files: writer.files().to_vec(),
        versions: BTreeMap::from([
            ("espalier".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("libtorch".to_owned(), "2.11.0".to_owned()),
        ]),
        verification: serde_json::json!({
            "run_id": job.run_id,
            "prompts": check.prompts,
            "max_logit_difference": check.max_difference,
            "max_logit": check.max_logit,
            "top_token_agreement": check.top_token_agreement,
            "mean_kl_nats": check.mean_kl,
        }),
    })
}

/// Makes the tensors of the pruned model, one at a time.
struct Merge<'a> {
    source: &'a Source,
    ranks: &'a [RankState],
    job: &'a ExportJob,
    pruned: &'a ModelSpec,
    written: &'a ModelSpec,
    /// By layer that is written: which of the source's it is.
    sources: Vec<usize>,
}

impl Merge<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let mut of_source = name.to_owned();
        for (layer, &source) in self.sources.iter().enumerate() {
            for projection in Projection::ALL {
                if checkpoint::projection_weight(layer, projection) == name {
                    return self.projection(layer, projection);
                }
            }
            for norm in [checkpoint::input_norm, checkpoint::post_attention_norm] {
                if norm(layer) == name {
                    of_source = norm(source);
                }
            }
        }
        // Neither split nor adapted: embedding and head as they were held, norms as they were computed with.
        let precision = self.job.recipe.precision;
        let compute = compute_kind(precision.compute);
        let held = match name {
            checkpoint::EMBEDDING | checkpoint::LM_HEAD => {
                FrozenFormat::of(precision.storage).of_vocabulary(compute)
            }
            _ => compute,
        };
        Ok(self.source.tensor(&of_source)?.f_to_kind(held)?)
    }

    /// `W0 + s B A` of the kept groups, in f32, padded with zeros to the width that is written. `W0` is what the run
    /// computed with, which the adapters were tuned to: rounded to the format that it was held in, or the values that its
    /// codes stand for. `written` is the layer's place in what is written.
    fn projection(&self, written: usize, projection: Projection) -> Result<Tensor> {
        let head_dim = self.pruned.head_dim;
        let layer = self.sources[written];
        let keep = &self.job.keep_mask.layers[layer];
        let held = RankLayer {
            query_heads: keep.query_heads.clone(),
            kv_heads: keep.kv_heads.clone(),
            channels: keep.channels.clone(),
        };
        let features = split_features(&held, projection, head_dim);
        let dim = match projection.split() {
            Split::Column => 0,
            Split::Row => 1,
        };
        let base = self.base(layer, projection, &features)?;
        let a = self.factor(layer, projection, Factor::A, &features)?;
        let b = self.factor(layer, projection, Factor::B, &features)?;
        let mut update = b.f_mm(&a)?;
        for knot in 0..self.frozen_pairs() {
            let prefix = ledger_prefix(knot);
            let a = self.factor_of(&prefix, layer, projection, Factor::A, &features)?;
            let b = self.factor_of(&prefix, layer, projection, Factor::B, &features)?;
            update = update.f_addmm(&b, &a)?;
        }
        let update = update.f_mul_scalar_(self.job.recipe.lora.scaling())?;
        let merged = base.f_add(&update.f_to_kind(Kind::Float)?)?;
        self.pad(written, projection, keep, merged, dim)
    }

    /// `W0` of the kept features, in f32.
    fn base(&self, layer: usize, projection: Projection, features: &[i64]) -> Result<Tensor> {
        if self.is_compensated(projection) {
            let changed = self.put_together(&base_name(layer, projection), layer, projection, features)?;
            return Ok(changed.f_to_kind(Kind::Float)?);
        }
        let dim = match projection.split() {
            Split::Column => 0,
            Split::Row => 1,
        };
        let whole = self.source.tensor(&checkpoint::projection_weight(layer, projection))?;
        match FrozenFormat::of(self.job.recipe.precision.storage) {
            FrozenFormat::Dense(held) => {
                Ok(select(&whole, dim, features)?.f_to_kind(held)?.f_to_kind(Kind::Float)?)
            }
            format @ (FrozenFormat::Int8 | FrozenFormat::Nf4) => {
                FrozenWeight::quantise(&whole, projection.split(), features, format, Device::Cpu)?
                    .dense(Kind::Float)
            }
        }
    }

    /// Whether the ranks' weights are no longer the source's.
    fn is_compensated(&self, projection: Projection) -> bool {
        match (self.job.recipe.pruning.as_ref().map(|pruning| pruning.compensation), projection.split()) {
            (Some(Compensation::LeastSquares(_)), Split::Row) => true,
            (Some(Compensation::LeastSquares(_)), Split::Column) | (Some(Compensation::None) | None, _) => {
                false
            }
        }
    }

    /// Pairs that knots have frozen.
    fn frozen_pairs(&self) -> usize {
        let has = |knot: &usize| {
            let name = factor_name(&ledger_prefix(*knot), 0, Projection::Q, Factor::A);
            self.ranks.first().is_some_and(|rank| rank.has(&name))
        };
        (0..).take_while(has).count()
    }

    fn factor(
        &self,
        layer: usize,
        projection: Projection,
        factor: Factor,
        features: &[i64],
    ) -> Result<Tensor> {
        self.factor_of("lora", layer, projection, factor, features)
    }

    /// A factor of the kept features, put together from the ranks.
    fn factor_of(
        &self,
        prefix: &str,
        layer: usize,
        projection: Projection,
        factor: Factor,
        features: &[i64],
    ) -> Result<Tensor> {
        let name = factor_name(prefix, layer, projection, factor);
        let Some(first) = self.ranks.first() else {
            return Err(Fault::Refused("an export needs the checkpoint of at least one rank".into()));
        };
        if is_replicated(projection, factor) {
            return first.tensor(&name);
        }
        self.put_together(&name, layer, projection, features)
    }

    /// A tensor that is split over the ranks, its kept features in order.
    fn put_together(
        &self,
        name: &str,
        layer: usize,
        projection: Projection,
        features: &[i64],
    ) -> Result<Tensor> {
        let dim = match projection.split() {
            Split::Column => 0,
            Split::Row => 1,
        };
        let (mut parts, mut places) = (Vec::new(), HashMap::new());
        for rank in self.ranks {
            parts.push(rank.tensor(name)?);
            for feature in split_features(&rank.held[layer], projection, self.pruned.head_dim) {
                places.insert(feature, places.len() as i64);
            }
        }
        let all = Tensor::f_cat(&parts, dim)?;
        let positions = features
            .iter()
            .map(|feature| {
                places.get(feature).copied().ok_or_else(|| {
                    Fault::Refused(format!(
                        "no rank's checkpoint holds feature {feature} of layer {layer} {projection}"
                    ))
                })
            })
            .collect::<Result<Vec<_>>>()?;
        select(&all, dim, &positions)
    }

    /// Zeros after the kept groups; query heads stay with their key/value head.
    fn pad(
        &self,
        written: usize,
        projection: Projection,
        keep: &LayerKeep,
        merged: Tensor,
        dim: i64,
    ) -> Result<Tensor> {
        let (now, then) = (keep.widths(), self.written.layers[written]);
        if now == then {
            return Ok(merged);
        }
        let head_dim = self.pruned.head_dim as i64;
        let width = self.written.projection_shape(written, projection)[dim as usize] as i64;
        let mut shape = merged.size();
        shape[dim as usize] = width;
        let padded = Tensor::f_zeros(&shape, (merged.kind(), Device::Cpu))?;
        let per_group = match (projection, projection.block()) {
            (Projection::Q | Projection::O, _) => {
                Some((now.query_heads_per_kv_head() as i64, then.query_heads_per_kv_head() as i64))
            }
            (_, Block::Attention | Block::Mlp) => None,
        };
        match per_group {
            Some((from, to)) => {
                for group in 0..now.kv_head_count as i64 {
                    let part = merged.f_narrow(dim, group * from * head_dim, from * head_dim)?;
                    padded.f_narrow(dim, group * to * head_dim, from * head_dim)?.f_copy_(&part)?;
                }
            }
            None => padded.f_narrow(dim, 0, merged.size()[dim as usize])?.f_copy_(&merged)?,
        }
        Ok(padded)
    }
}
