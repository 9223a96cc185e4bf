use serde::{Deserialize, Serialize};
use std::fmt;

/// The seven linear maps of a decoder layer, each of them frozen and adapted by LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

/// The half of a layer that a projection belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    Attention,
    Mlp,
}

/// How tensor parallelism cuts a projection (Megatron-LM's terms).
///
/// The pruned dimension is the split one, so a group of coupled weights always lies whole on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Output features are split: `lora_b` is split by rows, `lora_a` is replicated.
    Column,
    /// Input features are split: `lora_a` is split by columns, `lora_b` is replicated.
    Row,
}

impl Projection {
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Position in [`Projection::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// Name of the module in Hugging Face checkpoints, such as `q_proj`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    #[must_use]
    pub fn block(self) -> Block {
        match self {
            Self::Q | Self::K | Self::V | Self::O => Block::Attention,
            Self::Gate | Self::Up | Self::Down => Block::Mlp,
        }
    }

    #[must_use]
    pub fn split(self) -> Split {
        match self {
            Self::Q | Self::K | Self::V | Self::Gate | Self::Up => Split::Column,
            Self::O | Self::Down => Split::Row,
        }
    }

    /// The module's path below a layer, such as `self_attn.q_proj`.
    #[must_use]
    pub fn module_path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
