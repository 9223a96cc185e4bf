//! Estimates into messages. They are never read back.

use crate::pb;
use planner::{Estimate, Memory, Stage, StepFigures};

#[must_use]
pub fn estimate_to_pb(estimate: &Estimate) -> pb::Estimate {
    let [first, last] = &estimate.steps;
    pb::Estimate {
        tp_degree: count(estimate.tp_degree),
        largest_tp_degree: count(estimate.largest_degree),
        stages: estimate
            .stages
            .iter()
            .map(|(stage, memory)| pb::StageMemory {
                stage: stage_to_pb(*stage).into(),
                memory: Some(memory_to_pb(memory)),
            })
            .collect(),
        ranks: estimate.ranks.iter().map(memory_to_pb).collect(),
        first_step: Some(step_to_pb(first)),
        last_step: Some(step_to_pb(last)),
        checkpoint_bytes: estimate.checkpoint.total,
        checkpoint_rank_bytes: estimate.checkpoint.rank,
        notes: estimate.notes.clone(),
    }
}

fn count(of: usize) -> u32 {
    u32::try_from(of).unwrap_or(u32::MAX)
}

fn stage_to_pb(stage: Stage) -> pb::Stage {
    match stage {
        Stage::Loading => pb::Stage::Loading,
        Stage::FirstStep => pb::Stage::FirstStep,
        Stage::Decision => pb::Stage::Decision,
        Stage::LastStep => pb::Stage::LastStep,
        Stage::Checkpoint => pb::Stage::Checkpoint,
    }
}

fn memory_to_pb(memory: &Memory) -> pb::MemoryByKind {
    let Memory { weights, lora, gradients, moments, activations, buffers, process } = *memory;
    pb::MemoryByKind { weights, lora, gradients, moments, activations, buffers, process }
}

fn step_to_pb(step: &StepFigures) -> pb::StepEstimate {
    pb::StepEstimate {
        forward_operations: step.work.forward,
        backward_operations: step.work.backward,
        score_operations: step.work.scores,
        forward_sum_bytes: step.traffic.forward,
        backward_sum_bytes: step.traffic.backward,
        loss_sum_bytes: step.traffic.loss,
        gradient_sum_bytes: step.traffic.lora_gradients,
        score_bytes: step.traffic.scores,
    }
}
