//! Paths below the allowed roots, and URLs of blob stores. Nothing that is accepted leads out.

#![no_main]

#[allow(dead_code)]
#[path = "../../crates/blob-store/src/location.rs"]
mod location;
#[allow(dead_code)]
#[path = "../../crates/service-kit/src/roots.rs"]
mod roots;

use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use location::Location;
use roots::Roots;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// `in/` is the root; `in/way_out` and `in/nowhere` are links to the outside.
static TREE: LazyLock<(Folder, PathBuf, Roots)> = LazyLock::new(|| {
    let folder = Folder::new();
    let inside = folder.path("in");
    for name in ["in/model", "out"] {
        fs::create_dir_all(folder.path(name)).expect("a folder");
        folder.write(&format!("{name}/file"), b"x");
    }
    symlink(folder.path("out"), inside.join("way_out")).expect("a link");
    symlink(folder.path("out/new"), inside.join("nowhere")).expect("a link");
    let roots = Roots::new(std::slice::from_ref(&inside)).expect("a root");
    let inside = inside.canonicalize().expect("it is there");
    (folder, inside, roots)
});

fuzz_target!(|data: &str| {
    let (_folder, inside, roots) = &*TREE;
    let below = format!("{}/{data}", inside.display());
    for path in [data, &below] {
        for allowed in [roots.input(path), roots.input_folder(path), roots.output(path)].into_iter().flatten()
        {
            assert!(allowed.starts_with(inside), "{path:?} gives {allowed:?}");
        }
    }
    if let Ok(location) = data.parse::<Location>() {
        let shown = location.to_string();
        assert_eq!(shown.parse::<Location>().as_ref(), Ok(&location), "{shown}");
        if let Location::Folder(path) = &location {
            assert!(path.is_absolute() && !path.iter().any(|part| part == ".."));
        }
    }
    if location::name_problem(data).is_none() {
        let root = Location::Folder(Path::new("/blobs").to_owned());
        assert!(root.holds(&root.join(data)));
    }
});
