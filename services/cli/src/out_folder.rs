//! What `prune` leaves: OUT/model, report.html, report.svg, run.json, events.jsonl, removals.json, logs, state.

use crate::failure::Failure;
use crate::report::{History, Removals, page, picture};
use crate::{local_paths, proto_json};
use anyhow::Context;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use wire::pb;

pub(crate) const RUN_FILE: &str = "run.json";
pub(crate) const REMOVALS_FILE: &str = "removals.json";

/// The folder of one run.
#[derive(Debug)]
pub(crate) struct OutFolder {
    root: PathBuf,
    events: File,
}

impl OutFolder {
    /// Creates the folder, which must not exist or be empty.
    ///
    /// # Errors
    /// When it cannot be created or holds something.
    pub(crate) fn create(folder: &Path) -> Result<Self, Failure> {
        let root = local_paths::new_folder(folder)?;
        let logs = root.join("logs");
        std::fs::create_dir(&logs).with_context(|| format!("failed to create `{}`", logs.display()))?;
        let path = root.join("events.jsonl");
        let events = File::create(&path).with_context(|| format!("failed to create `{}`", path.display()))?;
        Ok(Self { root, events })
    }

    #[must_use]
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    #[must_use]
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// What the coordinator of the run keeps: its record and the ranks' checkpoints.
    #[must_use]
    pub(crate) fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    #[must_use]
    pub(crate) fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// Adds an event to `events.jsonl` at once, so that a killed run leaves what it did.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub(crate) fn note_event(&mut self, event: &pb::RunEvent) -> Result<(), Failure> {
        let mut line = proto_json::to_json(event)?.to_string();
        line.push('\n');
        self.events.write_all(line.as_bytes()).context("failed to write an event to `events.jsonl`")?;
        Ok(())
    }

    /// Writes the run, the removals and the report; returns the report's path.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub(crate) fn finish(&self, history: &History) -> anyhow::Result<PathBuf> {
        if let Some(run) = &history.run {
            self.write(RUN_FILE, &pretty(&proto_json::to_json(run)?)?)?;
        }
        if let Some(removals) = &history.removals {
            self.write(REMOVALS_FILE, &serde_json::to_string(removals).context("failed to write removals")?)?;
        }
        self.write("report.svg", &picture(history))?;
        self.write("report.html", &page(history)?)
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(name);
        std::fs::write(&path, text).with_context(|| format!("failed to write `{}`", path.display()))?;
        Ok(path)
    }
}

/// Reads what stands beside events: the run (from `run_file`, else `run.json`) and `removals.json`.
///
/// # Errors
/// When a file that is there, or was asked for, cannot be read.
pub(crate) fn read_beside(
    events: &Path,
    run_file: Option<&Path>,
    history: &mut History,
) -> anyhow::Result<()> {
    let beside = |name: &str| events.with_file_name(name);
    let run_path = run_file.map_or_else(|| beside(RUN_FILE), Path::to_owned);
    if run_file.is_some() || run_path.is_file() {
        history.run = Some(proto_json::from_json(&read_json(&run_path)?).with_context(|| quoted(&run_path))?);
    }
    let removals_path = beside(REMOVALS_FILE);
    if removals_path.is_file() {
        let removals: Removals =
            serde_json::from_value(read_json(&removals_path)?).with_context(|| quoted(&removals_path))?;
        history.removals = Some(removals);
    }
    Ok(())
}

fn read_json(path: &Path) -> anyhow::Result<serde_json::Value> {
    let text = std::fs::read(path).with_context(|| format!("failed to read {}", quoted(path)))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", quoted(path)))
}

fn quoted(path: &Path) -> String {
    format!("`{}`", path.display())
}

/// # Errors
/// Never for values made of the schema.
pub(crate) fn pretty(value: &serde_json::Value) -> anyhow::Result<String> {
    let mut text = serde_json::to_string_pretty(value).context("failed to write JSON")?;
    text.push('\n');
    Ok(text)
}
