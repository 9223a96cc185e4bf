//! Bounds on what crosses the wire: a peer that exceeds them is refused before anything is allocated for it.

use std::time::Duration;

/// Largest message of ordinary calls.
pub const MESSAGE_BYTES: usize = 4 << 20;
/// Largest message of calls that carry masks or scores: 80 layers of 22016 channels are 8 MB.
pub const MASK_MESSAGE_BYTES: usize = 16 << 20;
/// Largest payload of one score chunk.
pub const SCORE_CHUNK_BYTES: usize = 256 << 10;
/// Largest set of response headers that a client takes: error details travel in them.
pub const HEADER_BYTES: u32 = 64 << 10;

/// Longest that connecting may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Deadline of calls that only look something up or write it down.
pub const QUICK_CALL: Duration = Duration::from_secs(30);
/// Silence on a connection after which its peer is asked for a sign of life.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Longest that the sign of life may take before the connection counts as broken.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Steps of a run.
pub const MAX_STEPS: u64 = 10_000_000;
/// Tokens of a window.
pub const MAX_WINDOW_TOKENS: u32 = 1 << 20;
/// Windows in a pass, and passes in a step.
pub const MAX_ROWS: u32 = 1 << 16;
/// Layers of a model, files of a data set, entries of a list.
pub const MAX_ENTRIES: usize = 4096;
/// Units of one kind in a layer.
pub const MAX_UNITS: usize = 1 << 20;
/// Workers of a run.
pub const MAX_TP_DEGREE: u32 = 1024;
/// Bytes of a path or a name.
pub const MAX_TEXT_BYTES: usize = 4096;
