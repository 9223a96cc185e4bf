//! What the coordinator has stored: runs, events, and packed masks. The first byte picks one.

#![no_main]

#[allow(dead_code)]
#[path = "../../services/coordinator/src/records.rs"]
mod records;

use libfuzzer_sys::fuzz_target;
use pruning::LayerKeep;
use records::{StoredEvent, StoredRun};

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    match choice % 3 {
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
        _ => {
            if let Ok(layers) = records::unpack::<Vec<LayerKeep>>("a mask", bytes) {
                let stored = records::pack("a mask", &layers).expect("what was read can be stored");
                assert_eq!(records::unpack::<Vec<LayerKeep>>("a mask", &stored).ok(), Some(layers));
            }
        }
    }
});
