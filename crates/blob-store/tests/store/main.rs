//! The store's promises, held over a local folder and over a server that speaks S3.

mod backends;
mod faults;
mod promises;
mod proxy;
