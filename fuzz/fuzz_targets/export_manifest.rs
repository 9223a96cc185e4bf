//! `espalier_manifest.json` of an exported folder.

#![no_main]

use checkpoint::{ExportManifest, MANIFEST_FILE};
use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);

fuzz_target!(|data: &[u8]| {
    FOLDER.write(MANIFEST_FILE, data);
    let Ok(manifest) = ExportManifest::read(FOLDER.root()) else { return };
    FOLDER.write(MANIFEST_FILE, manifest.to_json().as_bytes());
    let again = ExportManifest::read(FOLDER.root()).expect("what was written can be read");
    assert_eq!(again, manifest);
});
