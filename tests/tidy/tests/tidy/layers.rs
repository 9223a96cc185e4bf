//! Which package may know which (ARCHITECTURE.md, "Layers").

use std::collections::{BTreeMap, BTreeSet};
use tidy_tests::packages::{Kind, Package, packages};
use tidy_tests::report;

const DOMAIN: [&str; 6] = ["model-spec", "recipe", "pruning", "sharding", "pruning-run", "planner"];

/// Lowest first. An edge goes to a lower layer only, so packages of one layer never know each other.
const LAYERS: [&[&str]; 12] = [
    &["model-spec"],
    &["recipe"],
    &["pruning"],
    &["sharding"],
    &["pruning-run", "planner"],
    &["engine", "token-batches", "checkpoint", "run-store", "blob-store"],
    &["engine-tch", "wire"],
    &["service-kit"],
    &["coordinator", "worker"],
    &["espalier"],
    &[
        "cluster-tests",
        "processes-tests",
        "security-tests",
        "simulation-tests",
        "tidy-tests",
        "benches",
        "load-bench",
    ],
    &["fault-tests"],
];

/// From this layer on packages are programs and suites: nothing below may know them, not even in its tests.
const SERVICES: usize = 8;

fn layer_of(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

#[test]
fn every_package_has_its_layer() {
    let packages = packages();
    let there: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let placed: BTreeSet<&str> = LAYERS.iter().flat_map(|layer| layer.iter().copied()).collect();
    assert_eq!(there, placed, "the packages of the workspace and those of LAYERS");
}

#[test]
fn edges_go_to_lower_layers_only() {
    let mut problems = Vec::new();
    for package in packages() {
        let from = layer_of(&package.name).expect("every package has its layer");
        for dependency in package.dependencies.iter().filter(|dependency| dependency.is_ours) {
            let to = layer_of(&dependency.name).expect("every package has its layer");
            let allowed = match dependency.kind {
                Kind::Normal | Kind::Build => to < from,
                // Tests may look up, but not at programs.
                Kind::Dev => to < from || to < SERVICES,
            };
            if !allowed {
                problems.push(format!("`{}` must not depend on `{}`", package.name, dependency.name));
            }
        }
    }
    report("edges that do not go down", &problems);
}

#[test]
fn domain_packages_need_next_to_nothing_from_outside() {
    let mut problems = Vec::new();
    for package in packages().iter().filter(|package| DOMAIN.contains(&package.name.as_str())) {
        for dependency in package.dependencies.iter().filter(|dependency| !dependency.is_ours) {
            let allowed: &[&str] = match dependency.kind {
                Kind::Normal => &["serde", "thiserror"],
                Kind::Dev => &["proptest", "serde_json"],
                Kind::Build => &[],
            };
            if !allowed.contains(&dependency.name.as_str()) {
                problems.push(format!("`{}` depends on `{}`", package.name, dependency.name));
            }
        }
    }
    report("outside dependencies of domain packages", &problems);
}

#[test]
fn one_package_knows_libtorch() {
    let holders = holders(|name| name == "tch" || name == "torch-sys");
    assert_eq!(holders, BTreeSet::from(["engine-tch".to_owned()]));
}

#[test]
fn coordinator_and_command_line_never_reach_libtorch() {
    let packages = packages();
    for program in ["coordinator", "espalier"] {
        let reached = reached_from(program, &packages);
        assert!(!reached.contains("engine-tch"), "`{program}` reaches `engine-tch` through {reached:?}");
    }
    assert!(reached_from("worker", &packages).contains("engine-tch"), "the worker computes");
}

#[test]
fn grpc_stays_at_the_edge() {
    let allowed = |name: &str| {
        matches!(name, "wire" | "service-kit") || layer_of(name).is_some_and(|layer| layer >= SERVICES)
    };
    let others: Vec<String> =
        holders(|name| name.starts_with("tonic")).into_iter().filter(|name| !allowed(name)).collect();
    report("packages that know gRPC", &others);
}

/// Packages with a dependency, of whatever kind, that `is_it`.
fn holders(is_it: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let has = |package: &Package| package.dependencies.iter().any(|dependency| is_it(&dependency.name));
    packages().into_iter().filter(has).map(|package| package.name).collect()
}

/// What a package links, itself included, among our packages.
fn reached_from(name: &str, packages: &[Package]) -> BTreeSet<String> {
    let by_name: BTreeMap<&str, &Package> =
        packages.iter().map(|package| (package.name.as_str(), package)).collect();
    let mut reached = BTreeSet::new();
    let mut open = vec![name.to_owned()];
    while let Some(name) = open.pop() {
        let links = |kind| matches!(kind, Kind::Normal | Kind::Build);
        let dependencies = by_name[name.as_str()].dependencies.iter();
        if reached.insert(name) {
            let ours = dependencies.filter(|dependency| dependency.is_ours && links(dependency.kind));
            open.extend(ours.map(|dependency| dependency.name.clone()));
        }
    }
    reached
}
