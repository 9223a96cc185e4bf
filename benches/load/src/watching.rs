//! Many clients that watch one run, are cut off again and again, go on from the last revision that they have seen, and lose
//! nothing.

use crate::statistics::{Random, Sorted};
use anyhow::{Context as _, bail, ensure};
use prost::Message;
use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use wire::client::{connected_channel, run_client, within};
use wire::convert::time::time_from_pb;
use wire::pb;

const CALL: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Of so many connections one begins when half of the run is over.
const LATE: usize = 20;

/// Who watches what.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) endpoint: String,
    pub(crate) run_id: String,
    pub(crate) steps: u64,
    pub(crate) clients: usize,
    /// Shared by the clients.
    pub(crate) connections: usize,
    /// Events after which a client gives up its stream, and all of a connection together the connection: on average, each
    /// of the two. 0 never.
    pub(crate) cut_every: u64,
}

/// What the clients have seen.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    pub(crate) clients: usize,
    /// Of each client: the run's last revision.
    pub(crate) events: u64,
    /// Streams that were given up, those of a cut connection among them.
    pub(crate) cut_streams: u64,
    pub(crate) cut_connections: u64,
    /// From an event's time to its arrival, over all clients that were not behind.
    pub(crate) delays: Sorted,
}

/// Clients under way.
#[derive(Debug)]
pub(crate) struct Watchers {
    groups: JoinSet<anyhow::Result<Watched>>,
}

/// What a client knows; it outlives its streams.
#[derive(Debug, Default)]
struct Client {
    seen: u64,
    /// Of all events so far, byte by byte.
    digest: DefaultHasher,
    ended: bool,
    delays: Vec<Duration>,
    streams: u64,
}

impl Watchers {
    /// Returns once all that are not late have seen something.
    ///
    /// # Errors
    /// When a connection is not made.
    pub(crate) async fn start(plan: &Plan) -> anyhow::Result<Self> {
        let mut groups = JoinSet::new();
        let (sender, mut begun) = mpsc::channel(plan.connections.max(1));
        for connection in 0..plan.connections {
            let clients = (connection..plan.clients).step_by(plan.connections).count();
            let plan = plan.clone();
            let sender = sender.clone();
            groups.spawn(async move { group(&plan, connection, clients, sender).await });
        }
        drop(sender);
        let early = (0..plan.connections).filter(|connection| !is_late(*connection)).count();
        for _ in 0..early {
            tokio::select! {
                _ = begun.recv() => {}
                Some(ended) = groups.join_next() => {
                    ended.context("a client panicked")??;
                    bail!("the run ended before it began");
                }
            }
        }
        Ok(Self { groups })
    }

    /// Waits until all have seen the run's end.
    ///
    /// # Errors
    /// When a client has lost an event, seen one twice, seen another than the rest, or been cut off by the coordinator.
    pub(crate) async fn end(mut self) -> anyhow::Result<Watched> {
        let mut all = Watched::default();
        let mut delays = Vec::new();
        while let Some(ended) = self.groups.join_next().await {
            let group = ended.context("a client panicked")??;
            let (one, other) = (all.events, group.events);
            ensure!(
                all.clients == 0 || one == other,
                "one client ended with revision {one}, another with {other}"
            );
            all.events = group.events;
            all.clients += group.clients;
            all.cut_streams += group.cut_streams;
            all.cut_connections += group.cut_connections;
            delays.extend(group.delays.into_inner());
        }
        all.delays = Sorted::of(delays);
        Ok(all)
    }
}

fn is_late(connection: usize) -> bool {
    connection % LATE == LATE - 1
}

/// The clients of one connection.
async fn group(plan: &Plan, place: usize, count: usize, begun: mpsc::Sender<()>) -> anyhow::Result<Watched> {
    let mut random = Random::new(place as u64);
    let clients: Vec<Arc<Mutex<Client>>> = (0..count).map(|_| Arc::default()).collect();
    let mut connections = 0;
    let mut channel = connected_channel(&plan.endpoint).await?;
    if is_late(place) {
        half_over(plan, &channel).await?;
    }
    loop {
        connections += 1;
        let limit = random.around(plan.cut_every * count as u64);
        let (news, mut heard) = mpsc::channel(64);
        let mut streams = JoinSet::new();
        for client in &clients {
            let (channel, client, news) = (channel.clone(), client.clone(), news.clone());
            let (run_id, limits) = (plan.run_id.clone(), Random::new(random.next()));
            streams.spawn(watch(channel, run_id, client, plan.cut_every, limits, news));
        }
        drop(news);
        let mut events = 0;
        while events < limit && heard.recv().await.is_some() {
            events += 1;
            if connections == 1 && events == 1 {
                let _ = begun.send(()).await;
            }
        }
        if events < limit {
            // All have ended, one way or another.
            while let Some(ended) = streams.join_next().await {
                ended.context("a client panicked")??;
            }
            break;
        }
        // Wherever they are: what was on its way to them is lost with the connection.
        streams.shutdown().await;
        channel = connected_channel(&plan.endpoint).await?;
    }
    let mut watched =
        Watched { clients: clients.len(), cut_connections: connections - 1, ..Watched::default() };
    let mut delays = Vec::new();
    let mut digest = None;
    for client in clients {
        let client = std::mem::take(&mut *client.lock().unwrap_or_else(PoisonError::into_inner));
        ensure!(client.ended, "a client's stream ended at revision {}, before the run did", client.seen);
        let own = client.digest.finish();
        ensure!(digest.is_none_or(|other| other == own), "clients have seen different events");
        digest = Some(own);
        watched.events = client.seen;
        watched.cut_streams += client.streams - 1;
        delays.extend(client.delays);
    }
    watched.delays = Sorted::of(delays);
    Ok(watched)
}

/// Waits until half of the steps are done.
async fn half_over(plan: &Plan, channel: &Channel) -> anyhow::Result<()> {
    loop {
        let request = within(CALL, pb::GetRunRequest { id: plan.run_id.clone() });
        let run = run_client(channel.clone()).get_run(request).await?.into_inner().run.unwrap_or_default();
        if run.end_time.is_some() || run.last_step.is_some_and(|step| 2 * step.step >= plan.steps) {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One client, stream after stream, to the run's end.
async fn watch(
    channel: Channel,
    run_id: String,
    client: Arc<Mutex<Client>>,
    cut_every: u64,
    mut random: Random,
    news: mpsc::Sender<()>,
) -> anyhow::Result<()> {
    let locked = || client.lock().unwrap_or_else(PoisonError::into_inner);
    while !locked().ended {
        let after_revision = {
            let mut client = locked();
            client.streams += 1;
            client.seen
        };
        let request = pb::WatchRunRequest { id: run_id.clone(), after_revision };
        let began = SystemTime::now();
        let mut events = run_client(channel.clone()).watch_run(request).await?.into_inner();
        for _ in 0..random.around(2 * cut_every) {
            let Some(message) = events.message().await? else {
                let client = locked();
                ensure!(client.ended, "a stream ended at revision {}, before the run did", client.seen);
                return Ok(());
            };
            locked().take_in(&message, began)?;
            let _ = news.send(()).await;
        }
    }
    Ok(())
}

impl Client {
    fn take_in(&mut self, message: &pb::WatchRunResponse, began: SystemTime) -> anyhow::Result<()> {
        let event = message.event.as_ref().context("a message without an event")?;
        ensure!(event.revision == self.seen + 1, "revision {} came after {}", event.revision, self.seen);
        if self.ended {
            bail!("revision {} came after the run's end", event.revision);
        }
        self.seen = event.revision;
        self.digest.write(&message.encode_to_vec());
        if let Some(pb::run_event::Kind::StateChange(change)) = &event.kind {
            use pb::RunState::{Cancelled, Failed, Succeeded};
            self.ended = matches!(change.state(), Succeeded | Failed | Cancelled);
        }
        let time = time_from_pb(event.time).context("an event without a time")?;
        // What was there before is no news.
        if time > began {
            self.delays.push(SystemTime::now().duration_since(time).unwrap_or_default());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::convert::time::time_to_pb;

    fn told(revision: u64, state: pb::RunState) -> pb::WatchRunResponse {
        let kind =
            pb::run_event::Kind::StateChange(pb::StateChange { state: state.into(), ..Default::default() });
        let time = Some(time_to_pb(SystemTime::UNIX_EPOCH));
        pb::WatchRunResponse { event: Some(pb::RunEvent { revision, time, kind: Some(kind) }) }
    }

    #[test]
    fn a_client_notices_what_is_lost_doubled_or_after_the_end() {
        use pb::RunState::{Running, Succeeded};
        let now = SystemTime::now();
        for (revision, ended, is_good) in
            [(3, false, true), (2, false, false), (4, false, false), (3, true, false)]
        {
            let mut client = Client::default();
            client.take_in(&told(1, Running), now).unwrap();
            client.take_in(&told(2, if ended { Succeeded } else { Running }), now).unwrap();
            assert_eq!(client.take_in(&told(revision, Running), now).is_ok(), is_good, "{revision} {ended}");
        }
    }

    #[test]
    fn clients_that_have_seen_different_events_differ() {
        let digest = |states: [pb::RunState; 2]| {
            let mut client = Client::default();
            for (revision, state) in (1..).zip(states) {
                client.take_in(&told(revision, state), SystemTime::now()).unwrap();
            }
            client.digest.finish()
        };
        use pb::RunState::{Queued, Running, Starting};
        assert_eq!(digest([Queued, Running]), digest([Queued, Running]));
        assert_ne!(digest([Queued, Running]), digest([Starting, Running]));
    }
}
