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
        .define("USE_C10D_GLOO", None)
        .include("shim/gloo_decls")
        .include(include.join("torch/csrc/api/include"))
        .include(&include)
        .files(["shim/collective.cpp", "shim/ops.cpp"])
        .compile("espalier_shim");
}
