//! What survives every crash: the runs' events, and the checkpoints' files and manifests.

use crate::workers::ShardCopy;
use pruning_run::{RunEvent, SavedState};
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Clone, Default)]
pub struct Store {
    /// By run.
    pub logs: Vec<Vec<RunEvent>>,
    /// By run, checkpoint and rank.
    pub files: BTreeMap<(usize, String, usize), ShardCopy>,
    /// By run and checkpoint; it comes last.
    pub manifests: BTreeMap<(usize, String), Arc<SavedState>>,
    /// Nothing can be written.
    pub is_down: bool,
}

impl Store {
    /// Drops a checkpoint, its manifest first.
    pub fn remove(&mut self, run: usize, name: &str) {
        self.manifests.remove(&(run, name.to_owned()));
        self.files.retain(|(of, checkpoint, _), _| *of != run || checkpoint != name);
    }

    /// A checkpoint whose files are all there and as they were written; else whether that will never change.
    pub fn read(&self, run: usize, name: &str) -> Result<Arc<SavedState>, String> {
        let state = self.manifests.get(&(run, name.to_owned())).ok_or("its manifest is missing")?;
        for (rank, shard) in state.shards.iter().enumerate() {
            let file = self
                .files
                .get(&(run, name.to_owned(), rank))
                .ok_or(format!("`{}` is missing", shard.file))?;
            if file.digest() != shard.sha256 {
                return Err(format!("`{}` has another digest than recorded", shard.file));
            }
        }
        Ok(state.clone())
    }
}
