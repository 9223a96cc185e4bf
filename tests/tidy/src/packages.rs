//! The packages of the workspace, as `cargo metadata` lists them.

use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

/// A package of ours.
#[derive(Debug, Clone)]
pub struct Package {
    pub name: String,
    /// From the root of the repository.
    pub folder: PathBuf,
    pub dependencies: Vec<Dependency>,
}

/// An entry of a package's dependencies.
#[derive(Debug, Clone)]
pub struct Dependency {
    pub name: String,
    pub kind: Kind,
    /// Whether it is a package of ours.
    pub is_ours: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Dev,
    Build,
}

/// All packages of the workspace.
#[must_use]
pub fn packages() -> Vec<Package> {
    let root = crate::root();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(&root)
        .output()
        .expect("cargo runs, since it runs this test");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    list(&metadata["packages"])
        .iter()
        .map(|package| {
            let manifest = PathBuf::from(text(&package["manifest_path"]));
            let manifest = manifest.canonicalize().expect("cargo names files that are there");
            let folder = manifest.parent().expect("a manifest lies in a folder");
            Package {
                name: text(&package["name"]).to_owned(),
                folder: folder.strip_prefix(&root).expect("below the root").to_owned(),
                dependencies: list(&package["dependencies"]).iter().map(dependency).collect(),
            }
        })
        .collect()
}

fn dependency(entry: &Value) -> Dependency {
    let kind = match entry["kind"].as_str() {
        None => Kind::Normal,
        Some("dev") => Kind::Dev,
        Some("build") => Kind::Build,
        Some(other) => panic!("a dependency of kind {other}"),
    };
    Dependency { name: text(&entry["name"]).to_owned(), kind, is_ours: !entry["path"].is_null() }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list in cargo's metadata")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text in cargo's metadata")
}
