//! RunSpec messages: what passes the checks is the same after a trip over the wire.

#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use wire::{convert::run, pb};

fuzz_target!(|data: &[u8]| {
    let Ok(message) = pb::RunSpec::decode(data) else { return };
    let Ok(spec) = run::checked(Some(message)) else { return };
    let _ = spec.recipe.pruning_steps();
    let _ = spec.recipe.learning_rate_at(spec.recipe.steps / 2);
    let sent = run::to_pb(&spec).encode_to_vec();
    let received = pb::RunSpec::decode(sent.as_slice()).expect("what was encoded can be decoded");
    assert_eq!(run::checked(Some(received)), Ok(spec));
});
