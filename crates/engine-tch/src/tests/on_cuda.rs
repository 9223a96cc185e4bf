//! What runs on a CUDA device, as far as a machine without one can tell: the same kernels compiled for the CPU, the plain
//! attention, a whole step in bf16, and who is asked for which library.

use super::group::{fixtures, set_factors, spec_of};
use crate::cuda::launch::{Args, Launcher};
use crate::cuda::library::Library;
use crate::dropout::{Dropout, DropoutSite};
use crate::fault::{Fault, Result};
use crate::frozen::{FrozenFormat, FrozenWeight};
use crate::ops::on_cuda::{self, ScoredWeight, SumsOf};
use crate::ops::{self, RotaryTable, plain};
use crate::shard::Shard;
use crate::source::Source;
use engine::{CollectiveBackend, EngineError, ShardEngine, ShardSetup};
use model_spec::{Projection, Split};
use recipe::{Batch, Compute, Precision, Pruning, Recipe, Storage};
use std::ffi::CString;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
const LORA_RANK: usize = 4;
/// One rounding to bf16, relative.
const BF16_ULP: f64 = 1.0 / 256.0;

/// `kernels.cu` compiled for this machine: every block is one thread.
struct OnHost {
    library: Library,
    place: extern "C" fn(u32, u32, u32, u32),
}

// SAFETY: the library's functions keep their place in a variable of the thread.
unsafe impl Send for OnHost {}
// SAFETY: as above.
unsafe impl Sync for OnHost {}

fn on_host() -> &'static OnHost {
    static ON_HOST: OnceLock<OnHost> = OnceLock::new();
    ON_HOST.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernels.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/on_host.cpp");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let built = Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-shared", "-fPIC"])
            .arg(format!("-DLORA_RANK={LORA_RANK}"))
            .arg("-o")
            .arg(&path)
            .arg(&source)
            .output()
            .unwrap_or_else(|error| panic!("{compiler}: {error}"));
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let library = Library::open(&[path.to_str().unwrap()]).unwrap();
        // SAFETY: the signature in on_host.cpp.
        let place = unsafe { library.function(c"on_host_place") }.unwrap();
        OnHost { library, place }
    })
}

impl Launcher for OnHost {
    fn launch(&self, kernel: &str, grid: [u32; 2], _threads: u32, args: &Args) -> Result<()> {
        let name = CString::new(kernel).unwrap();
        // SAFETY: every kernel has this signature.
        let run: extern "C" fn(Args) = unsafe { self.library.function(&name) }.map_err(Fault::Refused)?;
        for y in 0..grid[1] {
            for x in 0..grid[0] {
                (self.place)(x, y, grid[0], grid[1]);
                run(*args);
            }
        }
        Ok(())
    }

    fn score_threads(&self) -> (u32, u32) {
        (1, 1)
    }
}

fn random(shape: &[i64], seed: i64, kind: Kind) -> Tensor {
    let count: i64 = shape.iter().product();
    let x = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64 * 78.233).sin();
    let x = x * 43_758.545_312_3;
    ((&x - x.floor()) * 2.0 - 1.0).view(shape).to_kind(kind)
}

/// Equal within rounding of the kernel's format, relative to the largest value.
fn assert_same(what: &str, actual: &Tensor, expected: &Tensor, kind: Kind) {
    assert_eq!(actual.size(), expected.size(), "{what}");
    let (actual, expected) = (actual.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    let scale = expected.abs().max().double_value(&[]).max(1e-9);
    let difference = (actual - expected).abs().max().double_value(&[]) / scale;
    let bound = if kind == Kind::BFloat16 { BF16_ULP } else { 2e-6 };
    assert!(difference <= bound, "{what} in {kind:?}: relative difference {difference:.1e}");
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

/// The composition in f32 of values that are exact in `kind`.
fn wide(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Float)
}

#[test]
fn the_kernels_of_norms_are_their_compositions() {
    for kind in KINDS {
        let (x, weight, grad) =
            (random(&[5, 37], 1, kind), random(&[37], 2, kind), random(&[5, 37], 3, kind));
        let (rstd, y) = on_cuda::rms_norm(on_host(), &x, &weight, 1e-5).unwrap();
        let (expected_rstd, expected) = plain::rms_norm(&wide(&x), &wide(&weight), 1e-5).unwrap();
        assert_eq!((rstd.kind(), y.kind()), (Kind::Float, kind));
        assert_same("rstd", &rstd, &expected_rstd, Kind::Float);
        assert_same("y", &y, &expected, kind);
        let again = on_cuda::rms_norm_apply(on_host(), &x, &rstd, &weight).unwrap();
        assert_eq!(again, y);
        let mut actual = random(&[5, 37], 4, kind);
        let mut expected = wide(&actual);
        on_cuda::rms_norm_backward_add(on_host(), &mut actual, &grad, &x, &rstd, &weight).unwrap();
        plain::rms_norm_backward_add(&mut expected, &wide(&grad), &wide(&x), &expected_rstd, &wide(&weight))
            .unwrap();
        assert_same("dx", &actual, &expected, kind);
    }
}

#[test]
fn the_kernels_of_rotation_and_swiglu_are_their_compositions() {
    for kind in KINDS {
        let table = RotaryTable::new(&[1.0, 0.3, 0.01], 4, &Tensor::zeros([1], (kind, Device::Cpu))).unwrap();
        // Columns 6.. of a wider matrix: rows with a stride.
        let x = random(&[8, 30], 5, kind).narrow(1, 6, 12);
        for sign in [1.0, -1.0] {
            let (cos, sin) = table.tables();
            let actual = on_cuda::rotate(on_host(), &x, cos, sin, sign, 2).unwrap();
            let expected = plain::rotate(&wide(&x), &wide(cos), &wide(sin), sign, 2).unwrap();
            assert_same("rotation", &actual, &expected, kind);
        }
        let (gate_up, grad) = (random(&[7, 26], 6, kind) * 4.0, random(&[7, 13], 7, kind));
        let actual = on_cuda::swiglu(on_host(), &gate_up).unwrap();
        assert_same("swiglu", &actual, &plain::swiglu(&wide(&gate_up)).unwrap(), kind);
        let actual = on_cuda::swiglu_backward(on_host(), &grad, &gate_up).unwrap();
        let expected = plain::swiglu_backward(&wide(&grad), &wide(&gate_up)).unwrap();
        assert_same("d swiglu", &actual, &expected, kind);
    }
}

#[test]
fn the_kernel_of_dropout_drops_what_the_cpu_drops() {
    let dropout = Dropout { probability: 0.3, seed: 11, step: 3 };
    let features = Tensor::from_slice(&[0i64, 2, 3, 70_000, 5, 9, 10]);
    let x = random(&[9, 7], 8, Kind::Float) + 2.0;
    let expected = dropout.apply(&x, 2, DropoutSite::O, 1 << 33, &features).unwrap();
    for kind in KINDS {
        let (key, first, threshold) = dropout.kernel_arguments(2, DropoutSite::O, 1 << 33);
        let scale = 1.0 / 0.7;
        let actual =
            on_cuda::dropout(on_host(), &x.to_kind(kind), &features, key, first, threshold, scale).unwrap();
        assert_same("dropout", &actual, &expected, kind);
        assert_eq!(actual.eq(0.0), expected.eq(0.0), "the same elements are zero");
    }
}

#[test]
fn the_kernels_that_widen_weights_give_the_same_bits() {
    let whole = random(&[70, 130], 9, Kind::Float);
    for format in [FrozenFormat::Int8, FrozenFormat::Nf4] {
        for split in [Split::Column, Split::Row] {
            let count = if split == Split::Column { 70 } else { 130 };
            let features: Vec<i64> = (0..count).collect();
            let weight = FrozenWeight::quantise(&whole, split, &features, format, Device::Cpu).unwrap();
            for kind in KINDS {
                let on_device = weight.widened_by(on_host(), kind).unwrap();
                assert_eq!(on_device, weight.dense(kind).unwrap(), "{format:?} {split:?} {kind:?}");
            }
        }
    }
}

#[test]
fn numbers_that_are_none_survive_the_kernels() {
    for kind in KINDS {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let x = random(&[3, 6], 10, kind);
            let _ = x.narrow(0, 1, 1).narrow(1, 2, 1).fill_(bad);
            let gone = |y: &Tensor| y.isfinite().all().int64_value(&[]) == 0;
            assert!(gone(&on_cuda::swiglu(on_host(), &x).unwrap()), "{kind:?} {bad}");
            let weight = random(&[6], 2, kind);
            assert!(gone(&on_cuda::rms_norm(on_host(), &x, &weight, 1e-5).unwrap().1), "{kind:?} {bad}");
        }
    }
    // Rounding to bf16 is to nearest, ties to even, as libtorch rounds.
    let x = random(&[64, 64], 12, Kind::Float);
    let ones = Tensor::ones([64, 1], F32);
    let q = Tensor::ones([64, 64], (Kind::Int8, Device::Cpu));
    let row = x.narrow(1, 0, 1).contiguous();
    let rounded = on_cuda::widen_int8(on_host(), &q, &row, Kind::BFloat16).unwrap();
    assert_eq!(rounded.narrow(1, 0, 1), (row * ones).to_kind(Kind::BFloat16));
}

#[test]
fn the_score_kernel_is_its_formula_for_rows_and_columns() {
    let rank = LORA_RANK as i64;
    for (rows, columns) in [(300, 37), (3, 5), (256, 8)] {
        let (a, grad_a) =
            (random(&[rank, columns], 1, Kind::Float), random(&[rank, columns], 2, Kind::Float));
        let (b, grad_b) = (random(&[rows, rank], 3, Kind::Float), random(&[rows, rank], 4, Kind::Float));
        for kind in KINDS {
            let weight = random(&[rows, columns], 5, kind);
            let scored = ScoredWeight {
                weight: &weight,
                a: &a,
                grad_a: &grad_a,
                b: &b,
                grad_b: &grad_b,
                scaling: 1.5,
            };
            let guide = grad_b.mm(&a) + b.mm(&grad_a) - grad_b.mm(&grad_a);
            let product = guide * (wide(&weight) + b.mm(&a) * 1.5);
            for (sums, dim) in [(SumsOf::Rows, 1i64), (SumsOf::Columns, 0)] {
                for square in [false, true] {
                    let actual = on_cuda::low_rank_sums(on_host(), &scored, sums, square).unwrap();
                    let elements = if square { product.square() } else { product.abs() };
                    let expected = elements.sum_dim_intlist(&[dim][..], false, Kind::Float);
                    assert_same("scores", &actual, &expected, Kind::Float);
                }
            }
        }
    }
    let empty = Tensor::zeros([0, 5], F32);
    let (a, b) = (random(&[rank, 5], 1, Kind::Float), Tensor::zeros([0, rank], F32));
    let scored = ScoredWeight { weight: &empty, a: &a, grad_a: &a, b: &b, grad_b: &b, scaling: 1.0 };
    assert_eq!(
        on_cuda::low_rank_sums(on_host(), &scored, SumsOf::Columns, false).unwrap(),
        Tensor::zeros([5], F32)
    );
}

#[test]
fn kernels_refuse_formats_that_they_do_not_know() {
    let x = random(&[3, 6], 1, Kind::Double);
    assert!(matches!(on_cuda::swiglu(on_host(), &x), Err(Fault::Refused(_))));
    let (x, weight) = (random(&[3, 6], 1, Kind::Float), random(&[6], 1, Kind::BFloat16));
    assert!(matches!(on_cuda::rms_norm(on_host(), &x, &weight, 1e-5), Err(Fault::Refused(_))));
}

#[test]
fn plain_attention_is_the_fused_one() {
    let shape = [2, 6, 3, 8];
    let part = |seed| random(&shape, seed, Kind::Double);
    let (q, k, v, grad) = (part(1), part(2), part(3), part(4));
    let fused = ops::attention(&q, &k, &v).unwrap();
    let (grad_q, grad_k, grad_v) = ops::attention_backward(&grad, &q, &k, &v, &fused).unwrap();
    let first = |x: &Tensor| x.transpose(1, 2);
    let (out, log_sum_exp) = plain::attention(&first(&q), &first(&k), &first(&v)).unwrap();
    let grads =
        plain::attention_backward(&first(&grad), [&first(&q), &first(&k), &first(&v)], &out, &log_sum_exp)
            .unwrap();
    for (what, plain, fused) in
        [("out", out, fused.out), ("dq", grads.0, grad_q), ("dk", grads.1, grad_k), ("dv", grads.2, grad_v)]
    {
        let difference = (plain.transpose(1, 2) - fused).abs().max().double_value(&[]);
        assert!(difference < 1e-12, "{what}: {difference:.1e}");
    }
}

fn setup(model: &str, precision: Precision) -> ShardSetup {
    let mut recipe = Recipe {
        steps: 10,
        batch: Batch { window_tokens: 9, rows: 2, micro_batches: 1 },
        precision,
        pruning: Some(Pruning::published()),
        ..Recipe::default()
    };
    recipe.lora = recipe::Lora { rank: 4, alpha: 8.0, dropout: 0.1 };
    ShardSetup {
        model: fixtures().join("models").join(model),
        recipe,
        tp_rank: 0,
        tp_degree: 1,
        collective_timeout: Duration::from_secs(5),
        restore: None,
        progress: std::sync::Arc::default(),
    }
}

/// A shard on the CPU that computes in bf16, which users are refused: it is slow here, and right.
fn shard(model: &str, compute: Compute, storage: Storage) -> Shard {
    let setup = setup(model, Precision { compute, storage });
    let source = Source::open(&setup.model).unwrap();
    let mut shard = Shard::load_from(setup, source, Device::Cpu).unwrap();
    let spec = spec_of(model);
    let mut initial = Vec::new();
    for layer in 0..spec.layers.len() {
        for projection in Projection::ALL {
            let [rows, columns] = spec.projection_shape(layer, projection);
            for (factor, count) in [("lora_a", 4 * columns), ("lora_b", rows * 4)] {
                let values = (0..count).map(|i| (i as f64 * 0.37).sin() * 0.1).collect();
                initial.push((format!("layers.{layer}.{projection}.{factor}"), values));
            }
        }
    }
    set_factors(&mut shard, &spec, &initial);
    shard
}

#[test]
fn a_step_in_bf16_is_the_f32_one_but_for_rounding() {
    let vocabulary = spec_of("stories260k").vocab_size as u32;
    let rows: Vec<Vec<u32>> = (0..2u32)
        .map(|row| (0..9u32).map(|token| (row * 37 + token * 13 + 5) % vocabulary).collect())
        .collect();
    let micro = || vec![rows.iter().map(Vec::as_slice).collect::<Vec<_>>()];
    for storage in [Storage::Bf16, Storage::Int8, Storage::Nf4] {
        let mut narrow = shard("stories260k", Compute::Bf16, storage);
        let mut exact = shard("stories260k", Compute::F32, storage);
        assert_eq!(narrow.factors.kind(), Kind::Float, "the master copy is f32");
        let (ours, expected) =
            (narrow.train_step(0, &micro()).unwrap(), exact.train_step(0, &micro()).unwrap());
        let loss = (ours.loss - expected.loss).abs() / expected.loss;
        assert!(loss < 5e-3, "{storage:?}: loss {} and {}", ours.loss, expected.loss);
        let norm = (ours.grad_norm - expected.grad_norm).abs() / expected.grad_norm;
        assert!(norm < 3e-2, "{storage:?}: norms {} and {}", ours.grad_norm, expected.grad_norm);
        for (ours, expected) in ours.scores.iter().zip(&expected.scores) {
            let (sum, total) = (ours.values.iter().sum::<f64>(), expected.values.iter().sum::<f64>());
            // What reaches q and k went through differences of nearly equal probabilities, over nine tokens.
            let bound = match ours.projection {
                Projection::Q | Projection::K => 1.0,
                Projection::V | Projection::O | Projection::Gate | Projection::Up | Projection::Down => 0.1,
            };
            assert!((sum - total).abs() < bound * total, "{storage:?} {ours:?} {expected:?}");
        }
        let (ours, expected) =
            (narrow.evaluate(&[&rows[0]], 1).unwrap(), exact.evaluate(&[&rows[0]], 1).unwrap());
        let (ours, expected) = (ours.negative_log_likelihood, expected.negative_log_likelihood);
        assert!((ours - expected).abs() < 1e-2 * expected, "{storage:?}: {ours} {expected}");
    }
}

#[test]
fn bf16_products_are_refused_on_a_cpu() {
    let refused =
        Shard::load(setup("mha", Precision { compute: Compute::Bf16, storage: Storage::Bf16 }), Device::Cpu);
    assert!(matches!(refused.err(), Some(Fault::Refused(text)) if text.contains("CUDA")));
}

#[test]
fn a_cpu_takes_gloo_and_refuses_nccl() {
    let mut shard = shard("mha", Compute::F32, Storage::F32);
    shard.choose_backend(CollectiveBackend::Gloo).unwrap();
    assert!(shard.open_rendezvous("127.0.0.1").unwrap().0.starts_with(b"127.0.0.1:"));
    match shard.choose_backend(CollectiveBackend::Nccl) {
        Err(EngineError::Refused(text)) => assert!(text.contains("CUDA"), "{text}"),
        other => panic!("{other:?}"),
    }
    // What was chosen before stays.
    assert!(shard.open_rendezvous("127.0.0.1").unwrap().0.starts_with(b"127.0.0.1:"));
    let nccl = crate::check_nccl(Device::Cpu, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(&nccl, EngineError::Refused(_) | EngineError::Collective(_)), "{nccl}");
}

#[test]
fn random_weights_are_a_model_without_files() {
    let spec = spec_of("gqa");
    let engine = crate::TchEngine::new(Device::Cpu, 1, "worker".into()).with_random_weights(spec.clone());
    let mut setup = setup("gqa", Precision::default());
    setup.model = "/nowhere".into();
    let losses: Vec<f64> = (0..2)
        .map(|_| {
            let mut shard = engine::Engine::load(&engine, setup.clone()).unwrap();
            let row: Vec<u32> = (0..9).collect();
            shard.train_step(0, &[vec![&row[..]]]).unwrap().loss
        })
        .collect();
    let uniform = (spec.vocab_size as f64).ln();
    assert!((losses[0] - uniform).abs() < 0.2 * uniform, "{} for {uniform}", losses[0]);
    assert_eq!(losses[0], losses[1], "the same weights each time");
}
