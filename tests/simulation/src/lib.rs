//! A simulation of coordinator and workers, deterministic to the last bit: a seed decides everything, and the same seed
//! plays out the same way for ever.
//!
//! Real: the run's state machine (`pruning_run::transition`, `Run::resumed`, `History`), decisions, placements, masks.
//!
//! Modelled: time; the coordinator's driver, queue, registry and leases; a store whose writes count once they are
//! acknowledged; workers as processes whose figures hang on every step, mask and restored state before; RPCs that are
//! delayed, lost and cut; collectives that hang until a timeout; watchers that are cut off.
//!
//! Not modelled: gRPC, tokio, SQL and object stores themselves, tensors, disks that lie about what they have written, and
//! messages that arrive altered. The real coordinator's driver is not under test here; the fault suite on real processes is
//! there for it.
//!
//! | folder | what |
//! | --- | --- |
//! | `world` | what happens next, and what goes wrong |
//! | `coordinator` | driver, effects, registry, queue |
//! | `workers` | calls, collectives, a shard's arithmetic |
//! | `checks` | the laws, and watchers |

pub mod chance;
pub mod checks;
pub mod coordinator;
pub mod network;
pub mod scenario;
pub mod store;
pub mod workers;
pub mod world;

pub use world::{Failure, Outcome, World};

/// Plays a seed: once undisturbed, to learn what is right, and once with all that can go wrong.
///
/// # Errors
/// With the first law that is broken, and what led to it.
pub fn play(seed: u64) -> Result<Outcome, Failure> {
    let mut calm = World::new(seed, None);
    let outcome = calm.play()?;
    if outcome.failed + outcome.cancelled > 0 {
        calm.violation("not even in calm weather do all runs succeed at once".into());
        return Err(calm.failure());
    }
    World::new(seed, Some(calm.expected())).play()
}

/// The story of a failing seed, and how to see it again.
#[must_use]
pub fn story(seed: u64, failure: &Failure) -> String {
    format!(
        "seed {seed} breaks a law after {:.6} s: {}\n\nthe last that happened:\n{}\n\nto see it again: \
         SIMULATION_SEEDS={seed}..{} cargo test -p simulation-tests\n",
        failure.at as f64 / 1e6,
        failure.what,
        failure.last.join("\n"),
        seed + 1
    )
}
