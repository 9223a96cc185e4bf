//! The store's promises, held over SQLite and over a real PostgreSQL server.

mod backends;
mod crash;
mod model;
mod promises;
