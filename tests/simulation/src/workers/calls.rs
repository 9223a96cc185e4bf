//! Serving a call: loading, copying, writing and exporting take their time; the rest is done together (`meeting`).

use super::shard::digest;
use super::{Call, Doing, Held, Shard};
use crate::chance::mix;
use crate::coordinator::Session;
use crate::network::Node;
use crate::scenario::{MILLISECOND, SECOND};
use crate::world::{Happening, World};
use pruning_run::{Event, ExportResult, Fault, Restore, ShardFile};

/// A call that its caller still waits for.
#[derive(Debug, Clone)]
pub struct OpenCall {
    pub session: Session,
    pub tp_rank: usize,
    pub worker: usize,
    /// The checkpoint that is written, once the rank has taken its copy.
    pub writes: Option<String>,
    pub since: u64,
    /// Answers arrive in order.
    last_arrival: u64,
    is_broken: bool,
}

/// What takes a worker some time.
#[derive(Debug, Clone)]
pub enum Work {
    Load { tp_rank: usize, group: Vec<usize>, restore: Option<Restore> },
    Upload { name: String },
    Export { event: Event },
}

impl World {
    /// Sends a call to a worker.
    pub fn call(&mut self, session: Session, tp_rank: usize, worker: usize, what: Call) {
        self.last_call += 1;
        let call = self.last_call;
        let is_abort = matches!(what, Call::Abort);
        if !is_abort {
            let open = OpenCall {
                session,
                tp_rank,
                worker,
                writes: None,
                since: self.now,
                last_arrival: self.now,
                is_broken: false,
            };
            self.calls.insert(call, open);
        }
        match self.network.carry(Node::Coordinator, Node::Worker(worker), &mut self.chance) {
            Some(delay) => self.after(delay, Happening::Called { call, worker, session, what }),
            None if is_abort => {}
            None => self.break_call(call, 2 * SECOND, "it cannot be reached"),
        }
    }

    /// The caller hears that a call has failed, unless it has ended by then.
    pub fn break_call(&mut self, call: u64, delay: u64, cause: &'static str) {
        if let Some(open) = self.calls.get_mut(&call) {
            open.is_broken = true;
            self.after(delay, Happening::Broken { call, cause });
        }
    }

    /// Sends what a call has to say.
    pub fn answer(&mut self, call: u64, events: Vec<Event>, ends: bool) {
        let Some(open) = self.calls.get(&call) else { return };
        if open.is_broken {
            return;
        }
        let Some(delay) = self.network.carry(Node::Worker(open.worker), Node::Coordinator, &mut self.chance)
        else {
            return self.break_call(call, 2 * SECOND, "the connection was lost");
        };
        let arrival = (self.now + delay).max(open.last_arrival + 1);
        if let Some(open) = self.calls.get_mut(&call) {
            open.last_arrival = arrival;
        }
        self.at(arrival, Happening::Answered { call, events, ends });
    }

    /// A call reaches its worker.
    pub fn called(&mut self, call: u64, worker: usize, session: Session, what: Call) {
        let state = &mut self.workers[worker];
        if !state.is_up {
            return self.break_call(call, 20 * MILLISECOND, "connection refused");
        }
        if state.is_stuck {
            return;
        }
        state.progress += 1;
        if session < state.newest {
            return self.break_call(call, MILLISECOND, "a newer session has begun");
        }
        match what {
            Call::Abort => {
                state.held.take_if(|held| held.session == session);
            }
            Call::Load { tp_rank, group, restore } => {
                (state.newest, state.held) = (session, None);
                let time = self.chance.between(100 * MILLISECOND, 2 * SECOND);
                self.work(time, call, worker, session, Work::Load { tp_rank, group, restore });
            }
            Call::Export { checkpoint, shards, keep_mask } => {
                (state.newest, state.held) = (session, None);
                let run = self.run_named(&checkpoint.run_id);
                let event = match self.store.read(run, &checkpoint.name) {
                    Ok(saved) if saved.shards == shards && saved.keep_mask == *keep_mask => {
                        let trajectory = self.store.files[&(run, checkpoint.name, 0)].trajectory;
                        Event::Exported { result: exported(mix(trajectory ^ digest(&keep_mask))) }
                    }
                    Ok(_) => {
                        self.violation(format!(
                            "run {run}: an export is asked for of another state than saved"
                        ));
                        return;
                    }
                    Err(cause) => Event::RankFailed { tp_rank: 0, fault: Fault::Lasting(cause) },
                };
                let time = self.chance.between(200 * MILLISECOND, 3 * SECOND);
                self.work(time, call, worker, session, Work::Export { event });
            }
            Call::OpenRendezvous
            | Call::Join
            | Call::Evaluate(_)
            | Call::Train { .. }
            | Call::Calibrate { .. }
            | Call::ApplyMask { .. }
            | Call::Checkpoint { .. } => self.called_in_session(call, worker, session, what),
        }
    }

    fn called_in_session(&mut self, call: u64, worker: usize, session: Session, what: Call) {
        let held =
            self.workers[worker].held.as_mut().filter(|held| held.session == session && held.doing.is_none());
        let Some(held) = held else {
            return self.break_call(call, MILLISECOND, "there is no such session, or it is busy");
        };
        let (tp_rank, steps_done, generation) = (held.tp_rank, held.shard.steps_done, held.shard.generation);
        match what {
            Call::OpenRendezvous => {
                self.answer(call, vec![Event::RendezvousOpened { rendezvous: vec![1] }], true);
            }
            Call::Checkpoint { name } => {
                let copy = held.shard.copy(tp_rank);
                self.copies.insert((worker, self.workers[worker].process, name.clone()), copy);
                self.answer(call, vec![Event::Snapshotted { tp_rank, name: name.clone() }], false);
                let time = self.chance.between(50 * MILLISECOND, 3 * SECOND);
                self.work(time, call, worker, session, Work::Upload { name });
            }
            Call::Train { step, generation: asked, .. } if (step, asked) != (steps_done, generation) => {
                self.violation(format!(
                    "rank {tp_rank} is to train step {step} of generation {asked}, \
                     but stands before step {steps_done} of generation {generation}"
                ));
            }
            Call::ApplyMask { generation: asked, ref keep_mask }
                if asked != generation.next()
                    || keep_mask.check_subset_of(&held.shard.keep_mask).is_err() =>
            {
                self.violation(format!("rank {tp_rank} holds mask {generation} and is to apply {asked}"));
            }
            Call::Calibrate { generation: asked } if asked != generation => {
                self.violation(format!("rank {tp_rank} holds mask {generation} and is to calibrate {asked}"));
            }
            Call::Join
            | Call::Evaluate(_)
            | Call::Train { .. }
            | Call::Calibrate { .. }
            | Call::ApplyMask { .. } => {
                held.doing = Some(Doing { call, what, waits: false });
                self.arrive(worker);
            }
            Call::Load { .. } | Call::Export { .. } | Call::Abort => {}
        }
    }

    fn work(&mut self, time: u64, call: u64, worker: usize, session: Session, work: Work) {
        let process = self.workers[worker].process;
        self.after(time, Happening::Worked { call, worker, process, session, work });
    }

    /// What takes time is done, if the process still lives and the session still stands.
    pub fn worked(&mut self, call: u64, worker: usize, process: u64, session: Session, work: Work) {
        let state = &mut self.workers[worker];
        if !state.is_up || state.process != process || state.is_stuck || state.newest != session {
            return;
        }
        state.progress += 1;
        match work {
            Work::Load { tp_rank, group, restore } => {
                self.load(call, worker, session, tp_rank, group, restore)
            }
            Work::Export { event } => self.answer(call, vec![event], true),
            Work::Upload { name } => {
                let Some(held) = state.held.as_ref().filter(|held| held.session == session) else { return };
                let (tp_rank, run) = (held.tp_rank, session.run);
                let Some(copy) = self.copies.remove(&(worker, process, name.clone())) else { return };
                if self.store.is_down || self.chance.happens(self.network.loss * 5.0) {
                    let cause = "the store does not answer".into();
                    return self.answer(call, vec![Event::CheckpointFailed { name, cause }], true);
                }
                let file = format!("{name}/rank-{tp_rank}");
                let shard = ShardFile { file, sha256: copy.digest(), size_bytes: 1 };
                self.store.files.insert((run, name.clone(), tp_rank), copy);
                self.answer(call, vec![Event::Checkpointed { tp_rank, name, shard }], true);
            }
        }
    }

    fn load(
        &mut self,
        call: u64,
        worker: usize,
        session: Session,
        tp_rank: usize,
        group: Vec<usize>,
        restore: Option<Restore>,
    ) {
        let plan = &self.scenario.plans[session.run];
        let shard = match restore {
            None => Shard::dense(plan, group.len()),
            Some(Restore { checkpoint, state }) => {
                let from = self.run_named(&checkpoint.run_id);
                let rank = if state.shards.len() == group.len() { tp_rank } else { 0 };
                let copy = match self.store.read(from, &checkpoint.name) {
                    Ok(_) => self.store.files[&(from, checkpoint.name, rank)].clone(),
                    Err(cause) => {
                        let event = Event::RankFailed { tp_rank, fault: Fault::Lasting(cause) };
                        return self.answer(call, vec![event], true);
                    }
                };
                if (copy.steps_done, copy.generation) != (state.steps_done, state.generation) {
                    let (is, says) = (copy.steps_done, state.steps_done);
                    return self.violation(format!("a file is of step {is}, its manifest of step {says}"));
                }
                Shard::restored(&plan.setup, &state, &copy, group.len())
            }
        };
        let held = Held { session, tp_rank, group, shard, meeting: 0, doing: None };
        self.workers[worker].held = Some(held);
        let mut events = vec![Event::Loaded { tp_rank, data_sha256: "d".into() }];
        if self.chance.happens(0.1) {
            events.push(events[0].clone());
        }
        self.answer(call, events, true);
    }
}

fn exported(digest: u64) -> ExportResult {
    ExportResult {
        path: "/out".into(),
        parameters: 1,
        weight_bytes: 4,
        model_type: "llama".into(),
        manifest_sha256: format!("{digest:016x}"),
        max_logit_difference: 0.0,
        max_logit: 1.0,
        top_token_agreement: 1.0,
        mean_kl: 0.0,
    }
}
