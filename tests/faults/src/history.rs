//! What must hold of a run's events, and what a run comes to.

use crate::watcher::has_ended;
use std::collections::BTreeMap;
use std::time::Duration;
use wire::client::RunClient;
use wire::pb::{self, RunState, run_event::Kind};

/// Longest that fetching the exported files may take.
const DOWNLOAD: Duration = Duration::from_secs(60);

/// What a run came to, to hold two runs against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Bits of each step's loss, the last time that the step was taken.
    losses: BTreeMap<u64, u64>,
    /// Step and mask by generation.
    masks: BTreeMap<u64, (u64, pb::KeepMask)>,
    /// Bits of each perplexity by label and window, the last time that it was measured.
    perplexities: BTreeMap<(String, u64), u64>,
    /// Bytes of each exported file.
    files: BTreeMap<String, Vec<u8>>,
}

impl Outcome {
    /// Reads the outcome of a run that has ended.
    ///
    /// # Errors
    /// When a mask or a file cannot be read.
    pub(crate) async fn read(
        mut client: RunClient,
        id: &str,
        events: &[pb::RunEvent],
    ) -> Result<Self, String> {
        let mut outcome = Self {
            losses: BTreeMap::new(),
            masks: BTreeMap::new(),
            perplexities: BTreeMap::new(),
            files: files(&mut client, id).await?,
        };
        // The manifest names its run, and is the same otherwise.
        if let Some(manifest) = outcome.files.get_mut("espalier_manifest.json") {
            *manifest = String::from_utf8_lossy(manifest).replace(id, "RUN").into_bytes();
        }
        for event in events {
            match &event.kind {
                Some(Kind::Step(step)) => {
                    outcome.losses.insert(step.step, step.loss.to_bits());
                }
                Some(Kind::Decision(decision)) => {
                    let generation = decision.generation;
                    let request = pb::GetKeepMaskRequest { id: id.to_owned(), generation: Some(generation) };
                    let answer = client.get_keep_mask(request).await;
                    let mask = answer.map_err(|status| format!("mask {generation} is gone: {status}"))?;
                    let mask = mask.into_inner().keep_mask.ok_or("a mask without a mask")?;
                    outcome.masks.insert(generation, (decision.step, mask));
                }
                Some(Kind::Evaluation(measured)) => {
                    let name = (measured.label.clone(), u64::from(measured.window_tokens));
                    outcome.perplexities.insert(name, measured.perplexity.to_bits());
                }
                Some(
                    Kind::StateChange(_)
                    | Kind::Task(_)
                    | Kind::Export(_)
                    | Kind::Checkpoint(_)
                    | Kind::Restart(_)
                    | Kind::Guard(_)
                    | Kind::Calibration(_),
                )
                | None => {}
            }
        }
        Ok(outcome)
    }

    /// What differs from another run.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut differ = |what: String| found.push(format!("{what} is not that of the undisturbed run"));
        if self.losses.len() != other.losses.len() {
            differ(format!("the number of steps, {},", self.losses.len()));
        }
        if let Some(step) = self.losses.keys().find(|step| self.losses.get(step) != other.losses.get(step)) {
            differ(format!("the loss of step {step} and perhaps of others"));
        }
        if !self.masks.keys().eq(other.masks.keys()) {
            differ(format!("the list of generations, {:?},", self.masks.keys()));
        }
        for generation in self.masks.keys() {
            if self.masks.get(generation) != other.masks.get(generation) {
                differ(format!("mask {generation}"));
            }
        }
        if self.perplexities != other.perplexities {
            differ(format!("a perplexity of {:?}", self.perplexities));
        }
        if !self.files.keys().eq(other.files.keys()) {
            differ(format!("the list of exported files, {:?},", self.files.keys()));
        }
        for name in self.files.keys() {
            if self.files.get(name) != other.files.get(name) {
                differ(format!("the exported file `{name}`"));
            }
        }
        found
    }
}

/// Every exported file, by its name.
async fn files(client: &mut RunClient, id: &str) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let reading = async {
        let listed = client.list_artifacts(pb::ListArtifactsRequest { id: id.to_owned() }).await?;
        let mut found = BTreeMap::new();
        for artifact in listed.into_inner().artifacts {
            let name = artifact.name;
            let request = pb::DownloadArtifactRequest { id: id.to_owned(), name: name.clone(), offset: 0 };
            let mut stream = client.download_artifact(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(part) = stream.message().await? {
                bytes.extend_from_slice(&part.data);
            }
            found.insert(name, bytes);
        }
        Ok::<_, tonic::Status>(found)
    };
    match tokio::time::timeout(DOWNLOAD, reading).await {
        Ok(found) => found.map_err(|status| format!("the exported files cannot be fetched: {status}")),
        Err(_) => Err(format!("the exported files are not fetched within {DOWNLOAD:?}")),
    }
}

/// What is wrong with a run's events, taken by themselves: revisions, steps, generations, checkpoints, the end.
pub(crate) fn check_events(events: &[pb::RunEvent]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut next_step = 0;
    let mut generation = 0;
    let mut saved_steps = 0;
    let mut restarts = 0;
    let mut ended = false;
    let mut decisions: BTreeMap<u64, &pb::Decision> = BTreeMap::new();
    for (index, event) in events.iter().enumerate() {
        let revision = event.revision;
        if revision != index as u64 + 1 {
            wrong.push(format!("event {} has revision {revision}", index + 1));
        }
        if ended {
            wrong.push(format!("event {revision} comes after the end"));
        }
        match &event.kind {
            Some(Kind::StateChange(change)) => ended |= has_ended(change.state()),
            Some(Kind::Step(step)) => {
                // What was decided before a restart is applied again at its place, and not told again.
                let earlier = decisions.get(&(generation + 1));
                if earlier.is_some_and(|decision| decision.step + 1 == next_step) {
                    generation += 1;
                }
                if step.step != next_step || step.generation != generation {
                    wrong.push(format!(
                        "event {revision} is step {} under mask {}, not {next_step} under {generation}",
                        step.step, step.generation
                    ));
                }
                next_step = step.step + 1;
            }
            Some(Kind::Decision(decision)) => {
                if decision.generation != generation + 1 {
                    wrong.push(format!("decision {} follows {generation}", decision.generation));
                }
                generation = decision.generation;
                if decisions.insert(generation, decision).is_some_and(|earlier| earlier != decision) {
                    wrong.push(format!("decision {generation} was made twice, and differently"));
                }
            }
            Some(Kind::Checkpoint(checkpoint)) => {
                if checkpoint.steps_done < saved_steps {
                    wrong.push(format!("the checkpoint of event {revision} is older than the one before"));
                }
                saved_steps = checkpoint.steps_done;
            }
            Some(Kind::Restart(restart)) => {
                if restart.next_step < saved_steps {
                    wrong.push(format!(
                        "event {revision} goes back to step {}, before the checkpoint of {saved_steps} steps",
                        restart.next_step
                    ));
                }
                if restart.restarts < restarts {
                    wrong.push(format!(
                        "event {revision} counts {} restarts after {restarts}",
                        restart.restarts
                    ));
                }
                restarts = restart.restarts;
                next_step = restart.next_step;
                generation = restart.generation;
            }
            Some(
                Kind::Evaluation(_) | Kind::Task(_) | Kind::Export(_) | Kind::Guard(_) | Kind::Calibration(_),
            ) => {}
            None => wrong.push(format!("event {revision} says nothing")),
        }
    }
    let end = events.iter().rev().find_map(|event| {
        if let Some(Kind::StateChange(change)) = &event.kind { Some(change) } else { None }
    });
    match end {
        Some(change) if change.state() == RunState::Succeeded => {}
        Some(change) => wrong.push(format!("the run ended {:?}: {}", change.state(), change.message)),
        None => wrong.push("the run has no state".to_owned()),
    }
    wrong
}
