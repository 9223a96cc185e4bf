use super::{Communicator, ReduceOp};
use crate::fault::Result;
use engine::Progress;
use std::sync::Arc;
use tch::Tensor;

/// A membership whose collectives are counted: every layer has some, forward and backward, so they show how far a shard
/// is, also in a group of one.
pub(crate) struct Watched {
    inner: Box<dyn Communicator>,
    progress: Arc<Progress>,
}

impl Watched {
    pub(crate) fn new(inner: Box<dyn Communicator>, progress: Arc<Progress>) -> Self {
        Self { inner, progress }
    }
}

impl Communicator for Watched {
    fn tp_degree(&self) -> usize {
        self.inner.tp_degree()
    }

    fn tp_rank(&self) -> usize {
        self.inner.tp_rank()
    }

    fn all_reduce(&mut self, values: &mut Tensor, op: ReduceOp) -> Result<()> {
        if self.inner.tp_degree() == 1 {
            self.progress.tick();
            return self.inner.all_reduce(values, op);
        }
        let inner = &mut self.inner;
        let _span = tracing::info_span!("collective").entered();
        self.progress.collective(|| inner.all_reduce(values, op))
    }
}
