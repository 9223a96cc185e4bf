//! Many clients that watch one run and lose nothing.

use crate::statistics::Sorted;
use anyhow::{Context as _, ensure};
use std::time::{Duration, SystemTime};
use tokio::task::JoinSet;
use wire::client::{Connection, connected_channel, run_client};
use wire::convert::time::time_from_pb;
use wire::pb;

/// What the clients have seen.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) clients: usize,
    /// Of each client: the run's last revision.
    pub(crate) events: u64,
    /// From an event's time to its arrival, over all clients.
    pub(crate) delays: Sorted,
}

/// Clients that wait for a run's events, over so many connections.
#[derive(Debug)]
pub(crate) struct Watchers(JoinSet<anyhow::Result<(u64, Vec<Duration>)>>);

impl Watchers {
    /// # Errors
    /// When a connection is not made.
    pub(crate) async fn start(
        coordinator: &str,
        run_id: &str,
        clients: usize,
        connections: usize,
    ) -> anyhow::Result<Self> {
        let mut channels = Vec::new();
        for _ in 0..connections.max(1) {
            channels.push(connected_channel(coordinator).await?);
        }
        let mut watching = JoinSet::new();
        for client in 0..clients {
            let connection = Connection::from(channels[client % channels.len()].clone());
            watching.spawn(watch(connection, run_id.to_owned()));
        }
        Ok(Self(watching))
    }

    /// # Errors
    /// When a client has lost an event, seen one twice, or been cut off.
    pub(crate) async fn end(mut self) -> anyhow::Result<Watched> {
        let mut watched = Watched { clients: 0, events: 0, delays: Sorted::default() };
        let mut delays = Vec::new();
        while let Some(ended) = self.0.join_next().await {
            let (last, own) = ended.context("a client panicked")??;
            ensure!(
                watched.clients == 0 || watched.events == last,
                "one client ended with revision {last}, another with {}",
                watched.events
            );
            watched.events = last;
            watched.clients += 1;
            delays.extend(own);
        }
        watched.delays = Sorted::of(delays);
        Ok(watched)
    }
}

async fn watch(connection: Connection, run_id: String) -> anyhow::Result<(u64, Vec<Duration>)> {
    let request = pb::WatchRunRequest { id: run_id, after_revision: 0 };
    let mut events = run_client(connection).watch_run(request).await?.into_inner();
    let (mut seen, mut delays) = (0, Vec::new());
    let began = SystemTime::now();
    while let Some(message) = events.message().await? {
        let event = message.event.context("a message without an event")?;
        ensure!(event.revision == seen + 1, "revision {} came after {seen}", event.revision);
        seen = event.revision;
        let time = time_from_pb(event.time).context("an event without a time")?;
        // What was there before is no news.
        if time > began {
            delays.push(SystemTime::now().duration_since(time).unwrap_or_default());
        }
    }
    Ok((seen, delays))
}
