//! Messages into domain types, by the first byte.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use wire::{Violations, convert, pb};

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let mut found = Violations::default();
    match choice % 6 {
        0 => {
            let Ok(message) = pb::KeepMask::decode(bytes) else { return };
            let Ok(mask) = convert::mask::checked(Some(message), "keep_mask") else { return };
            let dense = checkpoint::testing::tiny_spec();
            let _ = convert::mask::check_fits(&mask, &dense, "keep_mask");
            let sent = convert::mask::to_pb(&mask);
            assert_eq!(convert::mask::checked(Some(sent), "keep_mask"), Ok(mask));
        }
        1 => {
            let Ok(message) = pb::ScoreChunk::decode(bytes) else { return };
            let _ = convert::scores::from_pb(message);
        }
        2 => {
            let Ok(message) = pb::Recipe::decode(bytes) else { return };
            let Ok(recipe) = convert::recipe::checked(Some(message), "recipe") else { return };
            let sent = convert::recipe::to_pb(&recipe);
            assert_eq!(convert::recipe::checked(Some(sent), "recipe"), Ok(recipe));
        }
        3 => {
            let Ok(message) = pb::EvaluationSpec::decode(bytes) else { return };
            let spec = convert::data::evaluation_from_pb(message, "evaluation", &mut found);
            let Ok(spec) = found.finish(spec) else { return };
            let mut again = Violations::default();
            let sent = convert::data::evaluation_to_pb(&spec);
            assert_eq!(convert::data::evaluation_from_pb(sent, "evaluation", &mut again), spec);
            assert!(again.is_empty());
        }
        4 => {
            let Ok(message) = pb::TaskSpec::decode(bytes) else { return };
            let spec = convert::data::tasks_from_pb(message, "tasks", &mut found);
            let Ok(spec) = found.finish(spec) else { return };
            let mut again = Violations::default();
            let sent = convert::data::tasks_to_pb(&spec);
            assert_eq!(convert::data::tasks_from_pb(sent, "tasks", &mut again), spec);
            assert!(again.is_empty());
        }
        _ => {
            let Ok(message) = pb::RunEvent::decode(bytes) else { return };
            if let Some(time) = convert::time::time_from_pb(message.time) {
                let sent = convert::time::time_to_pb(time);
                assert_eq!(convert::time::time_from_pb(Some(sent)), Some(time));
            }
            if let Some(pb::run_event::Kind::Step(step)) = message.kind {
                let _ = convert::time::duration_from_pb(step.duration);
            }
        }
    }
});
