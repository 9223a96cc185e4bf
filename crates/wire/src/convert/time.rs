//! Durations and points in time.

use prost_types::{Duration as PbDuration, Timestamp};
use std::time::{Duration, SystemTime};

#[must_use]
pub fn duration_to_pb(duration: Duration) -> PbDuration {
    PbDuration::try_from(duration).unwrap_or(PbDuration { seconds: i64::MAX, nanos: 0 })
}

/// Nothing for an absent or negative duration.
#[must_use]
pub fn duration_from_pb(message: Option<PbDuration>) -> Option<Duration> {
    Duration::try_from(message?).ok()
}

#[must_use]
pub fn time_to_pb(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// Nothing for an absent time or one that the system cannot hold.
#[must_use]
pub fn time_from_pb(message: Option<Timestamp>) -> Option<SystemTime> {
    SystemTime::try_from(message?).ok()
}
