//! Paths below the allowed roots, and URLs of blob stores. Nothing that is accepted leads out.

#![no_main]

#[allow(dead_code)]
#[path = "../../crates/blob-store/src/location.rs"]
mod location;
// The path is that of a folder, so that the module finds its own parts.
#[allow(dead_code, unused_imports)]
#[path = "../../crates/service-kit/src"]
mod service_kit {
    pub mod roots;
}

use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use location::Location;
use service_kit::roots::{self, Roots};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// `in/` is a root, as is a folder of a bucket; `in/way_out` and `in/nowhere` are links to the outside.
static TREE: LazyLock<(Folder, PathBuf, Roots)> = LazyLock::new(|| {
    let folder = Folder::new();
    let inside = folder.path("in");
    for name in ["in/model", "out"] {
        fs::create_dir_all(folder.path(name)).expect("a folder");
        folder.write(&format!("{name}/file"), b"x");
    }
    symlink(folder.path("out"), inside.join("way_out")).expect("a link");
    symlink(folder.path("out/new"), inside.join("nowhere")).expect("a link");
    let roots = Roots::new(&[inside.clone(), "s3://models/runs".into()]).expect("two roots");
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
    let urls = [data, &format!("file://{below}"), &format!("s3://models/{data}")].map(str::to_owned);
    for url in &urls {
        for allowed in [roots.input_url(url), roots.output_url(url)].into_iter().flatten() {
            match allowed {
                roots::Location::Path(path) => assert!(path.starts_with(inside), "{url:?} gives {path:?}"),
                roots::Location::S3 { bucket, prefix } => {
                    let is_below = prefix == "runs" || prefix.starts_with("runs/");
                    let leads_out = prefix.split('/').any(|part| matches!(part, "" | "." | ".."));
                    assert!(bucket == "models" && is_below && !leads_out, "{url:?} gives {prefix:?}");
                }
            }
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
