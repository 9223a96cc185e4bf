//! Run files in YAML, up to the checks that the coordinator makes without looking at files.

#![no_main]

#[allow(dead_code, unused_imports)]
#[path = "../../services/cli/src/failure.rs"]
mod failure;
#[allow(dead_code, unreachable_pub)]
#[path = "../../services/cli/src/run_file.rs"]
mod run_file;

use espalier_fuzz::Folder;
use libfuzzer_sys::fuzz_target;
use run_file::RunFile;
use std::sync::LazyLock;

static FOLDER: LazyLock<Folder> = LazyLock::new(Folder::new);

fuzz_target!(|data: &[u8]| {
    let Ok(run) = RunFile::read(&FOLDER.write("run.yaml", data)) else { return };
    let _ = run.recipe.violations();
    let Ok(spec) = wire::convert::run::checked(Some(run.to_spec())) else { return };
    let sent = wire::convert::run::to_pb(&spec);
    assert_eq!(wire::convert::run::checked(Some(sent)), Ok(spec));
});
