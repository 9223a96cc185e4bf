//! Do real services agree over real gRPC?

mod create_run;
mod ending;
mod faults;
mod watching;
mod whole_runs;
