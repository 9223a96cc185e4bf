use serde::{Deserialize, Serialize};

/// The formula behind a group's importance. `pruning::criterion` holds the plain references.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Criterion {
    /// LoRA-guided: the weight gradient is read off the gradients of the LoRA factors (arXiv:2305.18403, eq. 10).
    LoraPrune {
        #[serde(default)]
        form: LoraPruneForm,
    },
    /// LoRA-guided, by the part of the weight gradient that lies in the tangent space of `B A`: it does not depend on how the
    /// product is split into factors (with the projections of arXiv:2410.20625).
    Tangent,
    /// First-order Taylor with the true gradient of every weight (LLM-Pruner's `param_first`, arXiv:2305.11627).
    /// Costs a gradient of the size of the weights, one projection at a time.
    Taylor,
    /// L1 norm of the adapted weights.
    Magnitude,
    /// Squared weights of o and down times the squares of their inputs, summed over a group's columns (Wanda,
    /// arXiv:2306.11695, in its structured form). Reads the inputs of the training passes: no gradient, and no more memory.
    #[default]
    Wanda,
    /// How much the inputs of o and down vary, times their columns' squared lengths, standardised in each layer (FLAP,
    /// arXiv:2312.11983): comparable over layers, so best with the shape `global`. As published but for its bias, which
    /// compensation makes needless. Reads the inputs of the training passes: no gradient, and no more memory.
    Flap,
    /// A fixed random order, keyed by the recipe's seed: the floor that a criterion must beat.
    Random,
}

/// The two ways LoRAPrune has been written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraPruneForm {
    /// Absolute value, each projection's group sums divided by their L2 norm: what produced the published numbers.
    #[default]
    Code,
    /// Square, plain sum: the equations of the paper.
    Paper,
}

impl Criterion {
    /// Whether group sums of a projection are divided by their L2 norm before the projections are added.
    #[must_use]
    pub fn normalises_projections(self) -> bool {
        match self {
            Self::LoraPrune { form: LoraPruneForm::Code } | Self::Tangent => true,
            Self::LoraPrune { form: LoraPruneForm::Paper }
            | Self::Taylor
            | Self::Magnitude
            | Self::Wanda
            | Self::Flap
            | Self::Random => false,
        }
    }

    /// Whether scores are read from the gradients of the LoRA factors.
    #[must_use]
    pub fn is_lora_guided(self) -> bool {
        match self {
            Self::LoraPrune { .. } | Self::Tangent => true,
            Self::Taylor | Self::Magnitude | Self::Wanda | Self::Flap | Self::Random => false,
        }
    }

    /// Whether the workers compute scores for it at every step.
    #[must_use]
    pub fn is_scored_by_workers(self) -> bool {
        match self {
            Self::LoraPrune { .. }
            | Self::Tangent
            | Self::Taylor
            | Self::Magnitude
            | Self::Wanda
            | Self::Flap => true,
            Self::Random => false,
        }
    }
}
