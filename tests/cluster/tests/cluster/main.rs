//! Do real services agree over real gRPC?

mod create_run;
mod durable;
mod ending;
mod faults;
mod operating;
mod pools;
mod recovery;
mod watching;
mod whole_runs;
