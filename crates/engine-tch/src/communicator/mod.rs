//! Reductions between the ranks of one tensor-parallel group.

mod gloo;
mod meeting;
mod nccl;
mod watched;

use crate::fault::{Fault, Result};
use engine::Progress;
use tch::Tensor;

pub(crate) use gloo::{Gloo, Store};
pub(crate) use meeting::Meeting;
pub(crate) use nccl::{Nccl, unique_id};
pub(crate) use watched::Watched;

/// Values follow c10d's `ReduceOp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReduceOp {
    Sum = 0,
    Max = 4,
}

/// One rank's membership of a group. Every rank calls the same methods in the same order.
pub(crate) trait Communicator {
    fn tp_degree(&self) -> usize;

    fn tp_rank(&self) -> usize;

    /// Replaces `values`, contiguous and of equal shape on all ranks, by the reduction over the ranks. All ranks get
    /// the same bits.
    fn all_reduce(&mut self, values: &mut Tensor, op: ReduceOp) -> Result<()>;

    fn all_reduce_sum(&mut self, values: &mut Tensor) -> Result<()> {
        self.all_reduce(values, ReduceOp::Sum)
    }
}

/// A group of one: reductions are the identity.
pub(crate) struct Alone;

impl Communicator for Alone {
    fn tp_degree(&self) -> usize {
        1
    }

    fn tp_rank(&self) -> usize {
        0
    }

    fn all_reduce(&mut self, _values: &mut Tensor, _op: ReduceOp) -> Result<()> {
        Ok(())
    }
}

/// An error once the session is over: nobody wants what is waited for.
fn still_wanted(progress: &Progress) -> Result<()> {
    if progress.gives_up() {
        return Err(Fault::Collective("given up, as the session is over".into()));
    }
    Ok(())
}
