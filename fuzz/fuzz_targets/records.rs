//! What the coordinator has stored: runs, events, packed masks, manifests of checkpoints, and its own part of them. The first
//! byte picks one.

#![no_main]

#[allow(dead_code)]
#[path = "../../services/coordinator/src/records.rs"]
mod records;

use libfuzzer_sys::fuzz_target;
use pruning::LayerKeep;
use pruning_run::SavedState;
use records::{CheckpointManifest, StoredEvent, StoredRun};

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    match choice % 5 {
        0 => {
            if let Ok(run) = StoredRun::decode(bytes) {
                let stored = run.encode().expect("what was read can be stored");
                let again = StoredRun::decode(&stored).expect("and read again");
                assert_eq!(again.spec, run.spec);
            }
        }
        1 => {
            if let Ok(event) = StoredEvent::decode(bytes) {
                let stored = event.encode().expect("what was read can be stored");
                assert_eq!(StoredEvent::decode(&stored).ok(), Some(event));
            }
        }
        2 => {
            if let Ok(layers) = records::unpack::<Vec<LayerKeep>>("a mask", bytes) {
                let stored = records::pack("a mask", &layers).expect("what was read can be stored");
                assert_eq!(records::unpack::<Vec<LayerKeep>>("a mask", &stored).ok(), Some(layers));
            }
        }
        3 => {
            if let Ok(manifest) = CheckpointManifest::decode(bytes) {
                let stored = manifest.encode().expect("what was read can be stored");
                assert_eq!(CheckpointManifest::decode(&stored).ok(), Some(manifest));
            }
        }
        _ => {
            if let Ok(state) = records::unpack::<SavedState>("a checkpoint", bytes) {
                let stored = records::pack("a checkpoint", &state).expect("what was read can be stored");
                records::unpack::<SavedState>("a checkpoint", &stored).expect("and read again");
            }
        }
    }
});
