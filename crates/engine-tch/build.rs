//! Compiles the C++ half: what libtorch has and tch's generated bindings leave out.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(root) = std::env::var_os("LIBTORCH").map(PathBuf::from) else {
        panic!("LIBTORCH is not set: build inside the repository, whose .cargo/config.toml sets it");
    };
    let include = root.join("include");
    assert!(include.exists(), "{} is missing: run `make setup` once", include.display());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .debug(false)
        .opt_level(2)
        .define("USE_C10D_GLOO", None)
        .include("shim/gloo_decls")
        .include(include.join("torch/csrc/api/include"))
        .include(&include)
        .files([
            "shim/collective.cpp",
            "shim/ops.cpp",
            "shim/fused.cpp",
            "shim/low_rank_ops.cpp",
            "shim/attention_ops.cpp",
            "shim/scores_ops.cpp",
            "shim/matmul.cpp",
            "shim/device.cpp",
        ])
        .compile("espalier_shim");
    // One build of the loops for each level of instructions; NaN and infinity keep their meaning in all of them.
    for (level, flags) in [
        ("baseline", [].as_slice()),
        ("avx2", ["-march=x86-64-v3"].as_slice()),
        ("avx512", ["-march=x86-64-v4", "-mprefer-vector-width=512"].as_slice()),
    ] {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3).debug(false).define("LEVEL", level).files([
            "shim/kernels.cpp",
            "shim/low_rank.cpp",
            "shim/attention.cpp",
            "shim/scores.cpp",
        ]);
        for flag in ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"] {
            build.flag(flag);
        }
        for flag in flags {
            build.flag(flag);
        }
        build.compile(&format!("espalier_kernels_{level}"));
    }
}
