use clap::{Args, ValueEnum};
use recipe::{
    Budget, Compute, Criterion, HeadGrouping, LoraPruneForm, Protection, Pruning, Recipe, Recompute, Shape,
    Shrink, Storage,
};

/// Flags that override a recipe, each named as the field that it sets.
#[derive(Debug, Default, Args)]
pub(crate) struct RecipeFlags {
    /// Fraction of the prunable weights to remove, in [0, 1) [default: 0.5]
    #[arg(
        long,
        value_name = "FRACTION",
        conflicts_with = "parameters",
        allow_negative_numbers = true,
        help_heading = "Pruning"
    )]
    pub sparsity: Option<f64>,
    /// Parameters of the whole model that stay, instead of a sparsity
    #[arg(long, value_name = "N", help_heading = "Pruning")]
    pub parameters: Option<u64>,
    /// Formula behind a group's importance [default: loraprune-code]
    #[arg(long, value_name = "NAME", help_heading = "Pruning")]
    pub criterion: Option<CriterionName>,
    /// Widths that the layers of the result may have [default: uniform]
    #[arg(long, value_name = "NAME", help_heading = "Pruning")]
    pub shape: Option<ShapeName>,
    /// What stands or falls together in attention [default: kv-groups]
    #[arg(long, value_name = "NAME", help_heading = "Pruning")]
    pub head_grouping: Option<HeadGroupingName>,
    /// Kept channels of a layer are a multiple of this [default: 1]
    #[arg(long, value_name = "N", help_heading = "Pruning")]
    pub channel_multiple: Option<usize>,
    /// Tensor-parallel degrees at which the result must be servable, such as 1,2,4
    #[arg(long, value_name = "N,…", value_delimiter = ',', help_heading = "Pruning")]
    pub serve_tp: Option<Vec<usize>>,
    /// Layers never pruned, 0-based, such as 0,1,5
    #[arg(long, value_name = "LAYER,…", value_delimiter = ',', help_heading = "Pruning")]
    pub protect: Option<Vec<usize>>,
    /// Slice the tensors at every decision, or only mask them (slower, the same result) [default: live]
    #[arg(long, value_name = "WHEN", help_heading = "Pruning")]
    pub shrink: Option<ShrinkName>,
    /// Fraction of the steps before anything is removed [default: 0.1]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help_heading = "Pruning")]
    pub warmup: Option<f64>,
    /// Fraction of the steps after the last removal [default: 0.1]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help_heading = "Pruning")]
    pub cooldown: Option<f64>,
    /// Steps between mask decisions [default: 10]
    #[arg(long, value_name = "STEPS", help_heading = "Pruning")]
    pub every: Option<u64>,
    /// Optimizer steps [default: 200]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub steps: Option<u64>,
    /// Tokens of a training window [default: 256]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub window_tokens: Option<usize>,
    /// Windows in one forward and backward pass [default: 4]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub rows: Option<usize>,
    /// Passes summed into one optimizer step [default: 1]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub micro_batches: Option<usize>,
    /// Highest learning rate [default: 0.001]
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, help_heading = "Training")]
    pub learning_rate: Option<f64>,
    /// Rank of the LoRA factors [default: 8]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub lora_rank: Option<usize>,
    /// LoRA's product is scaled by alpha / rank [default: 16]
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true, help_heading = "Training")]
    pub lora_alpha: Option<f64>,
    /// Dropout of the low-rank path's input, in [0, 1) [default: 0.05]
    #[arg(long, value_name = "CHANCE", allow_negative_numbers = true, help_heading = "Training")]
    pub dropout: Option<f64>,
    /// Seed of everything random [default: 0]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub seed: Option<u64>,
    /// Format of products; f64 is for checks [default: f32]
    #[arg(long, value_name = "FORMAT", help_heading = "Precision and memory")]
    pub compute: Option<ComputeName>,
    /// Format of the frozen weights [default: f32]
    #[arg(long, value_name = "FORMAT", help_heading = "Precision and memory")]
    pub storage: Option<StorageName>,
    /// Run layers forward again instead of keeping what they computed [default: none]
    #[arg(long, value_name = "WHAT", help_heading = "Precision and memory")]
    pub recompute: Option<RecomputeName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CriterionName {
    /// LoRAPrune as its authors' code has it: absolute value, L2 norm per projection
    #[value(name = "loraprune-code")]
    LoraPruneCode,
    /// LoRAPrune as in the paper: square, plain sum
    #[value(name = "loraprune-paper")]
    LoraPrunePaper,
    /// First-order Taylor with the gradient of every weight
    Taylor,
    /// L1 norm of the weights
    Magnitude,
    /// A fixed random order
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShapeName {
    /// Every layer keeps the same counts: loads in stock transformers and vLLM
    Uniform,
    /// The published rule: first tenth and last layer protected
    Paper,
    /// One ranking over all layers
    Global,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HeadGroupingName {
    /// A key/value head with all its query heads
    KvGroups,
    /// Single query heads, equally many from each key/value head
    QueryHeads,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShrinkName {
    /// Tensors are sliced at every decision
    Live,
    /// Removed groups are multiplied by zero
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeName {
    /// 32-bit floating point
    F32,
    /// 64-bit floating point
    F64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StorageName {
    /// 32-bit floating point
    F32,
    /// 64-bit floating point, with --compute f64
    F64,
    /// bfloat16
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RecomputeName {
    /// Keep what the backward pass reads
    None,
    /// Keep each layer's input alone
    Layer,
}

impl RecipeFlags {
    /// Sets what the flags say, and nothing else.
    pub(crate) fn apply(&self, recipe: &mut Recipe) {
        set(&mut recipe.seed, self.seed);
        set(&mut recipe.steps, self.steps);
        set(&mut recipe.batch.window_tokens, self.window_tokens);
        set(&mut recipe.batch.rows, self.rows);
        set(&mut recipe.batch.micro_batches, self.micro_batches);
        set(&mut recipe.lora.rank, self.lora_rank);
        set(&mut recipe.lora.alpha, self.lora_alpha);
        set(&mut recipe.lora.dropout, self.dropout);
        set(&mut recipe.learning_rate.peak, self.learning_rate);
        set(&mut recipe.precision.compute, self.compute.map(ComputeName::choice));
        set(&mut recipe.precision.storage, self.storage.map(StorageName::choice));
        set(&mut recipe.recompute, self.recompute.map(RecomputeName::choice));
        if self.says_pruning() {
            self.apply_pruning(recipe.pruning.get_or_insert_with(Pruning::default));
        }
    }

    fn says_pruning(&self) -> bool {
        self.sparsity.is_some()
            || self.parameters.is_some()
            || self.criterion.is_some()
            || self.shape.is_some()
            || self.head_grouping.is_some()
            || self.channel_multiple.is_some()
            || self.serve_tp.is_some()
            || self.protect.is_some()
            || self.shrink.is_some()
            || self.warmup.is_some()
            || self.cooldown.is_some()
            || self.every.is_some()
    }

    fn apply_pruning(&self, pruning: &mut Pruning) {
        set(&mut pruning.budget, self.sparsity.map(Budget::Sparsity));
        set(&mut pruning.budget, self.parameters.map(Budget::Parameters));
        set(&mut pruning.criterion, self.criterion.map(CriterionName::choice));
        set(&mut pruning.shape, self.shape.map(ShapeName::choice));
        set(&mut pruning.head_grouping, self.head_grouping.map(HeadGroupingName::choice));
        set(&mut pruning.channel_multiple, self.channel_multiple);
        set(&mut pruning.serve_tp, self.serve_tp.clone());
        set(&mut pruning.protection, self.protect.clone().map(Protection::Layers));
        set(&mut pruning.shrink, self.shrink.map(ShrinkName::choice));
        set(&mut pruning.ramp.warmup, self.warmup);
        set(&mut pruning.ramp.cooldown, self.cooldown);
        set(&mut pruning.ramp.every, self.every);
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

impl CriterionName {
    fn choice(self) -> Criterion {
        match self {
            Self::LoraPruneCode => Criterion::LoraPrune { form: LoraPruneForm::Code },
            Self::LoraPrunePaper => Criterion::LoraPrune { form: LoraPruneForm::Paper },
            Self::Taylor => Criterion::Taylor,
            Self::Magnitude => Criterion::Magnitude,
            Self::Random => Criterion::Random,
        }
    }
}

impl ShapeName {
    fn choice(self) -> Shape {
        match self {
            Self::Uniform => Shape::Uniform,
            Self::Paper => Shape::Paper,
            Self::Global => Shape::Global,
        }
    }
}

impl HeadGroupingName {
    fn choice(self) -> HeadGrouping {
        match self {
            Self::KvGroups => HeadGrouping::KvGroups,
            Self::QueryHeads => HeadGrouping::QueryHeads,
        }
    }
}

impl ShrinkName {
    fn choice(self) -> Shrink {
        match self {
            Self::Live => Shrink::Live,
            Self::Never => Shrink::Never,
        }
    }
}

impl ComputeName {
    fn choice(self) -> Compute {
        match self {
            Self::F32 => Compute::F32,
            Self::F64 => Compute::F64,
        }
    }
}

impl StorageName {
    fn choice(self) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::F64 => Storage::F64,
            Self::Bf16 => Storage::Bf16,
        }
    }
}

impl RecomputeName {
    fn choice(self) -> Recompute {
        match self {
            Self::None => Recompute::None,
            Self::Layer => Recompute::Layer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_flag_changes_nothing() {
        let mut recipe = Recipe { pruning: None, ..Recipe::default() };
        RecipeFlags::default().apply(&mut recipe);
        assert_eq!(recipe, Recipe { pruning: None, ..Recipe::default() });
    }

    #[test]
    fn a_flag_sets_its_field_alone() {
        let flags = RecipeFlags {
            sparsity: Some(0.3),
            criterion: Some(CriterionName::LoraPrunePaper),
            protect: Some(vec![0, 3]),
            steps: Some(9),
            storage: Some(StorageName::Bf16),
            ..RecipeFlags::default()
        };
        let mut recipe = Recipe::default();
        flags.apply(&mut recipe);
        let mut expected = Recipe { steps: 9, ..Recipe::default() };
        expected.precision.storage = Storage::Bf16;
        let pruning = expected.pruning.as_mut().unwrap();
        pruning.budget = Budget::Sparsity(0.3);
        pruning.criterion = Criterion::LoraPrune { form: LoraPruneForm::Paper };
        pruning.protection = Protection::Layers(vec![0, 3]);
        assert_eq!(recipe, expected);
    }
}
