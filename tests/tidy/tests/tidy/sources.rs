//! What no source file may hold.

use tidy_tests::packages::packages;
use tidy_tests::{files, read, report};

/// Lines beyond which a file has more than one subject. A longer one is named here, with its reason, or split.
const MOST_LINES: usize = 800;
const LONGER_FILES: [(&str, &str); 1] = [("docs/api.md", "written from the schema")];

#[test]
fn domain_packages_compute_and_nothing_else() {
    // Time comes in as a value, so that naming its type is fine and asking for it is not.
    let forbidden = [
        "async fn",
        ".await",
        "std::env",
        "std::fs",
        "std::io",
        "std::net",
        "std::process",
        "std::thread",
        "Instant",
        "SystemTime::now",
        "println!",
    ];
    let mut problems = Vec::new();
    for package in ["model-spec", "recipe", "pruning", "sharding", "pruning-run", "planner"] {
        for path in files(&format!("crates/{package}/src"), &[".rs"]) {
            for (number, line) in read(&path).lines().enumerate() {
                let code = line.split("//").next().unwrap_or_default();
                for word in forbidden.iter().filter(|word| code.contains(*word)) {
                    problems.push(format!("{}:{}: `{word}`", path.display(), number + 1));
                }
            }
        }
    }
    report("domain packages read no clock, disk or environment, and wait for nothing", &problems);
}

#[test]
fn nothing_is_left_undone_or_skipped() {
    // Put together here, so that this file does not hold them.
    let rust =
        [["to", "do!("], ["unimple", "mented!("], ["#[ig", "nore"], ["db", "g!("]].map(|word| word.concat());
    let python = [["pytest.sk", "ip"], ["mark.sk", "ip"], ["xf", "ail"]].map(|word| word.concat());
    let mut problems = Vec::new();
    for (extension, words) in [(".rs", rust.as_slice()), (".py", python.as_slice())] {
        for path in files(".", &[extension]) {
            let text = read(&path);
            for word in words.iter().filter(|word| text.contains(*word)) {
                problems.push(format!("{}: `{word}`", path.display()));
            }
        }
    }
    report("unfinished code and skipped tests", &problems);
}

#[test]
fn files_have_one_subject() {
    let mut problems = Vec::new();
    for path in files(".", &[".rs", ".py", ".proto", ".cpp", ".h", ".sh", ".md"]) {
        let lines = read(&path).lines().count();
        let named = LONGER_FILES.iter().any(|(name, _)| path.ends_with(name));
        if lines > MOST_LINES && !named {
            problems.push(format!("{} has {lines} lines; the most is {MOST_LINES}", path.display()));
        }
    }
    for (name, _) in LONGER_FILES {
        if read(name).lines().count() <= MOST_LINES {
            problems.push(format!("{name} is no longer that long; strike it off LONGER_FILES"));
        }
    }
    report("long files", &problems);
}

#[test]
fn every_package_takes_the_lints_and_the_common_fields_of_the_workspace() {
    let mut problems = Vec::new();
    for package in packages() {
        let manifest = read(package.folder.join("Cargo.toml"));
        for wanted in ["[lints]\nworkspace = true", "edition.workspace = true", "license.workspace = true"] {
            if !manifest.contains(wanted) {
                problems.push(format!("`{}`: {}", package.name, wanted.replace('\n', " ")));
            }
        }
    }
    report("missing in Cargo.toml", &problems);
}

#[test]
fn unsafe_code_stays_where_it_is_expected() {
    // Foreign functions: libtorch's, signals to child processes, maps of files.
    let allowed = [
        "crates/engine-tch/",
        "crates/checkpoint/src/mapped_file.rs",
        "services/cli/src/children.rs",
        "services/worker/src/parent.rs",
        "services/worker/tests/binary.rs",
    ];
    let mut problems = Vec::new();
    for path in files(".", &[".rs"]).iter().filter(|path| !path.starts_with("tests")) {
        let text = read(path);
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") {
                continue;
            }
            let place = format!("{}:{}", path.display(), number + 1);
            if !allowed.iter().any(|allowed| path.to_string_lossy().starts_with(allowed)) {
                problems.push(format!("{place}: this file should need no `unsafe`"));
            }
            let above: Vec<&str> = text.lines().take(number).collect();
            let explained = above.iter().rev().take(6).any(|line| line.contains("// SAFETY:"));
            if !explained {
                problems.push(format!("{place}: no `// SAFETY:` above it"));
            }
        }
    }
    report("unsafe code", &problems);
}
