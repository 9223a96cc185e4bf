//! What all ranks do together: nobody passes before all have come and every link between them carries. A rank that waits
//! too long, or whose peer's process has died, gives up and blames a peer.

use super::Call;
use crate::coordinator::Session;
use crate::network::Node;
use crate::scenario::{MILLISECOND, SECOND};
use crate::world::{Happening, World};
use pruning_run::{Event, Fault, Measurement, TaskScore};
use std::time::Duration;

/// How long a collective waits for the others.
const PATIENCE: u64 = 15 * SECOND;

impl World {
    /// A rank has come to its next meeting.
    pub(super) fn arrive(&mut self, worker: usize) {
        let process = self.workers[worker].process;
        let Some(held) = &mut self.workers[worker].held else { return };
        let Some(doing) = &mut held.doing else { return };
        doing.waits = true;
        let (session, meeting, count) = (held.session, held.meeting, held.group.len());
        let step_time = self.scenario.plans[session.run].step_time;
        let time = match &doing.what {
            Call::Train { .. } => step_time,
            Call::Evaluate(_) | Call::Calibrate { .. } => 300 * MILLISECOND,
            Call::Load { .. }
            | Call::OpenRendezvous
            | Call::Join
            | Call::ApplyMask { .. }
            | Call::Checkpoint { .. }
            | Call::Export { .. }
            | Call::Abort => 50 * MILLISECOND,
        };
        let group = held.group.clone();
        let slowest = pairs(&group).map(|(one, other)| self.network.factor(one, other)).max().unwrap_or(1);
        let arrived = self.meetings.entry((session, meeting)).or_default();
        arrived.insert(held.tp_rank);
        if arrived.len() == count {
            self.meetings.remove(&(session, meeting));
            let time = self.chance.between(time * 9 / 10, time * 11 / 10) * slowest;
            self.after(time, Happening::Met { session, meeting, group });
        }
        self.after(PATIENCE * slowest, Happening::GivesUp { worker, process, session, meeting });
    }

    /// All have come, some time ago: they pass, if all are still there.
    pub fn met(&mut self, session: Session, meeting: u64, group: &[usize]) {
        let waits = |worker: usize| {
            let state = &self.workers[worker];
            let held = state.held.as_ref().filter(|held| held.session == session && held.meeting == meeting);
            let waits = held.and_then(|held| held.doing.as_ref()).is_some_and(|doing| doing.waits);
            waits && state.is_up && !state.is_stuck
        };
        let all_wait = group.iter().all(|&worker| waits(worker));
        if !all_wait || pairs(group).any(|(one, other)| !self.network.is_up(one, other)) {
            return;
        }
        let generation = |worker: usize| self.workers[worker].held.as_ref().map(|held| held.shard.generation);
        let trains = |worker: usize| {
            let held = self.workers[worker].held.as_ref();
            let doing = held.and_then(|held| held.doing.as_ref());
            doing.is_some_and(|doing| matches!(doing.what, Call::Train { .. }))
        };
        if group.iter().any(|&worker| trains(worker))
            && group.iter().any(|&worker| generation(worker) != generation(group[0]))
        {
            return self.violation("ranks train under different generations".into());
        }
        group.iter().for_each(|&worker| self.pass(worker));
    }

    fn pass(&mut self, worker: usize) {
        let state = &mut self.workers[worker];
        state.progress += 1;
        let Some(held) = &mut state.held else { return };
        let Some(mut doing) = held.doing.take() else { return };
        held.meeting += 1;
        let (tp_rank, run, call) = (held.tp_rank, held.session.run, doing.call);
        let plan = &self.scenario.plans[run];
        let duration = Duration::from_millis(300);
        let event = match &mut doing.what {
            Call::Join => Event::Joined { tp_rank },
            Call::Evaluate(Measurement::Window { index }) => Event::Evaluated {
                tp_rank,
                window_index: *index,
                negative_log_likelihood: held.shard.nats(plan),
                predicted_tokens: 10,
                window_tokens: 64,
                duration,
            },
            Call::Evaluate(Measurement::Task { index }) => {
                let score = TaskScore {
                    task: format!("task-{index}"),
                    count: 4,
                    correct: 2,
                    correct_normalized: None,
                    log_likelihood: -held.shard.nats(plan),
                    tokens: 9,
                    log_likelihoods: Vec::new(),
                };
                Event::TaskEvaluated { tp_rank, task_index: *index, score, duration }
            }
            Call::Calibrate { generation } => Event::Calibrated {
                tp_rank,
                generation: *generation,
                found: held.shard.calibrate(plan),
                duration,
            },
            Call::ApplyMask { generation, keep_mask } => {
                held.shard.apply(&plan.setup, *generation, keep_mask);
                Event::MaskApplied { tp_rank, generation: *generation }
            }
            Call::Train { step, end_step, .. } => {
                let mut events = held.shard.step(plan, tp_rank);
                if let Some(Event::StepEnded { report, .. }) = events.last_mut()
                    && report.skipped.is_empty()
                    && std::mem::take(&mut state.glitches)
                {
                    report.loss = f64::NAN;
                }
                *step += 1;
                let ends = step == end_step;
                if ends {
                    events.push(Event::TrainEnded { tp_rank });
                } else {
                    held.doing = Some(doing);
                }
                self.answer(call, events, ends);
                if !ends {
                    self.arrive(worker);
                }
                return;
            }
            Call::Load { .. }
            | Call::OpenRendezvous
            | Call::Checkpoint { .. }
            | Call::Export { .. }
            | Call::Abort => return,
        };
        let twice = self.chance.happens(0.1);
        let events = if twice { vec![event.clone(), event] } else { vec![event] };
        self.answer(call, events, true);
    }

    /// A rank has waited for its peers for too long, or has seen one die.
    pub fn gives_up(&mut self, worker: usize, process: u64, session: Session, meeting: u64) {
        let state = &mut self.workers[worker];
        if state.process != process || state.is_stuck {
            return;
        }
        let Some(held) =
            state.held.as_mut().filter(|held| held.session == session && held.meeting == meeting)
        else {
            return;
        };
        let tp_rank = held.tp_rank;
        let Some(doing) = held.doing.take_if(|doing| doing.waits) else { return };
        let fault = Fault::PeerLost("a peer does not answer".into());
        self.answer(doing.call, vec![Event::RankFailed { tp_rank, fault }], true);
    }

    /// A process has died: those who wait for it see their connections close.
    pub fn peers_see_the_death_of(&mut self, worker: usize, session: Session, group: &[usize]) {
        for &peer in group.iter().filter(|peer| **peer != worker) {
            let process = self.workers[peer].process;
            if let Some(held) = self.workers[peer].held.as_ref().filter(|held| held.session == session)
                && self.network.is_up(Node::Worker(peer), Node::Worker(worker))
            {
                let meeting = held.meeting;
                self.after(50 * MILLISECOND, Happening::GivesUp { worker: peer, process, session, meeting });
            }
        }
    }
}

fn pairs(group: &[usize]) -> impl Iterator<Item = (Node, Node)> {
    let pair = |(place, &one): (usize, &usize)| {
        group[..place].iter().map(move |&other| (Node::Worker(one), Node::Worker(other)))
    };
    group.iter().enumerate().flat_map(pair)
}
