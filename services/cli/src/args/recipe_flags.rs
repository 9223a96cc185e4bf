use clap::{Args, ValueEnum};
use recipe::{
    AdamW, BlockCriterion, Budget, Chain, Compensation, CompensationTarget, Compute, Criterion, Depth,
    Distillation, HeadGrouping, LeastSquares, LoraPruneForm, LoraRite, Optimizer, Protection, Pruning,
    RampShape, Recipe, Recompute, Recovery, Shape, Shrink, Storage,
};

/// Flags that override a recipe, each named as the field that it sets.
#[derive(Debug, Clone, Default, Args)]
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
    /// Formula behind a group's importance [default: wanda]
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
    /// Remove whole blocks at the first decision, judged by this
    #[arg(long, value_name = "NAME", help_heading = "Pruning")]
    pub depth: Option<DepthName>,
    /// Blocks that go, heads and channels making up the rest [default: as many as meet the budget]
    #[arg(long, value_name = "N", help_heading = "Pruning")]
    pub blocks: Option<usize>,
    /// Keep the first four blocks and the last two [default: true]
    #[arg(long, value_name = "BOOL", help_heading = "Pruning")]
    pub protect_ends: Option<bool>,
    /// Judge the blocks anew after each that goes
    #[arg(long, value_name = "BOOL", help_heading = "Pruning")]
    pub iterative: Option<bool>,
    /// Windows of training text that a decision is calibrated on, where its method needs it [default: 16]
    #[arg(long, value_name = "N", help_heading = "Pruning")]
    pub calibration_windows: Option<usize>,
    /// Change what stays of o_proj and down_proj to make up for what goes [default: layer]
    #[arg(long, value_name = "NAME", help_heading = "Pruning")]
    pub compensation: Option<CompensationName>,
    /// Windows of training text that the compensation is fitted to [default: 48]
    #[arg(long, value_name = "N", help_heading = "Pruning")]
    pub compensation_windows: Option<usize>,
    /// Added to the second moments' diagonal, as a share of its mean [default: 0.01]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help_heading = "Pruning")]
    pub compensation_damping: Option<f64>,
    /// Fraction of the steps before anything is removed [default: 0.05]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help_heading = "Pruning")]
    pub warmup: Option<f64>,
    /// Fraction of the steps after the last removal, with a cubic ramp [default: 0.67]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help_heading = "Pruning")]
    pub cooldown: Option<f64>,
    /// Steps between mask decisions, with a cubic ramp [default: 10]
    #[arg(long, value_name = "STEPS", help_heading = "Pruning")]
    pub every: Option<u64>,
    /// How the removal is spread over the steps [default: cubic]
    #[arg(long, value_name = "NAME", help_heading = "Pruning")]
    pub ramp_shape: Option<RampShapeName>,
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
    /// What turns gradients into steps [default: adamw]
    #[arg(long, value_name = "NAME", help_heading = "Training")]
    pub optimizer: Option<OptimizerName>,
    /// Steps of linear warm-up of the learning rate [default: 0]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub warmup_steps: Option<u64>,
    /// What the learning rate does after the last removal [default: continue]
    #[arg(long, value_name = "NAME", help_heading = "Training")]
    pub recovery: Option<RecoveryName>,
    /// Share of the unpruned model's distribution in the loss, in [0, 1] [default: no distillation]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help_heading = "Training")]
    pub distill: Option<f64>,
    /// Tokens of the unpruned model's distribution kept at each position [default: 64]
    #[arg(long, value_name = "K", help_heading = "Training")]
    pub distill_top_k: Option<usize>,
    /// Rank of the LoRA factors [default: 8]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub lora_rank: Option<usize>,
    /// LoRA's product is scaled by alpha / rank [default: 16]
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true, help_heading = "Training")]
    pub lora_alpha: Option<f64>,
    /// Steps before which the adapter is frozen and a fresh one begun, such as 100,200 [default: one adapter]
    #[arg(long, value_name = "STEP,…", value_delimiter = ',', help_heading = "Training")]
    pub knots: Option<Vec<u64>>,
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
    /// Squared weights of o and down times the squares of their inputs
    Wanda,
    /// LoRA-guided, by the gradient's part in the tangent space of the product
    Tangent,
    /// How much the inputs of o and down vary, standardised in each layer
    Flap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OptimizerName {
    /// AdamW
    #[value(name = "adamw")]
    AdamW,
    /// LoRA-RITE: steps that do not depend on how the product is split into factors
    LoraRite,
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
pub(crate) enum CompensationName {
    /// Tuning alone makes up for what went
    None,
    /// Least squares towards what the layer would have given for the same input
    Layer,
    /// Least squares towards the residual stream before the decision
    Stream,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DepthName {
    /// Sum of the weights' magnitudes
    Magnitude,
    /// Sum of each weight times its gradient, in magnitude
    Taylor,
    /// Perplexity without the block
    Perplexity,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RampShapeName {
    /// Many decisions, the most removed early
    Cubic,
    /// All at once at the end of the warm-up
    OneShot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RecoveryName {
    /// One course over the whole run
    Continue,
    /// The peak is held up to the last removal, then decays
    Hold,
    /// Warm-up and decay begin anew after the last removal
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ComputeName {
    /// 32-bit floating point
    F32,
    /// 64-bit floating point
    F64,
    /// bfloat16, on GPUs
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StorageName {
    /// 32-bit floating point
    F32,
    /// 64-bit floating point, with --compute f64
    F64,
    /// bfloat16
    Bf16,
    /// One byte a weight, a scale for each output row
    Int8,
    /// Half a byte a weight, a scale for 64
    Nf4,
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
        if let Some(knots) = &self.knots {
            recipe.chain.get_or_insert_with(Chain::default).knots.clone_from(knots);
        }
        set(&mut recipe.learning_rate.peak, self.learning_rate);
        if let Some(name) = self.optimizer {
            name.apply(&mut recipe.optimizer);
        }
        set(&mut recipe.learning_rate.warmup_steps, self.warmup_steps);
        set(&mut recipe.learning_rate.recovery, self.recovery.map(RecoveryName::choice));
        if self.distill.is_some() || self.distill_top_k.is_some() {
            let distillation = recipe.distillation.get_or_insert_with(Distillation::default);
            set(&mut distillation.weight, self.distill);
            set(&mut distillation.top_k, self.distill_top_k);
        }
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
            || self.ramp_shape.is_some()
            || self.compensation.is_some()
            || self.compensation_windows.is_some()
            || self.compensation_damping.is_some()
            || self.depth.is_some()
            || self.blocks.is_some()
            || self.iterative.is_some()
            || self.protect_ends.is_some()
            || self.calibration_windows.is_some()
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
        set(&mut pruning.ramp.shape, self.ramp_shape.map(RampShapeName::choice));
        self.apply_compensation(&mut pruning.compensation);
        set(&mut pruning.calibration_windows, self.calibration_windows);
        let says_depth = self.depth.is_some() || self.blocks.is_some();
        if says_depth || self.iterative.is_some() || self.protect_ends.is_some() {
            let depth = pruning.depth.get_or_insert_with(Depth::default);
            set(&mut depth.criterion, self.depth.map(DepthName::choice));
            set(&mut depth.iterative, self.iterative);
            set(&mut depth.protect_ends, self.protect_ends);
            depth.blocks = self.blocks.or(depth.blocks);
        }
    }

    /// Windows or damping alone choose least squares, as its default is.
    fn apply_compensation(&self, compensation: &mut Compensation) {
        let says_how = self.compensation_windows.is_some() || self.compensation_damping.is_some();
        let target = match self.compensation {
            None if !says_how => return,
            None => None,
            Some(CompensationName::None) => {
                *compensation = Compensation::None;
                return;
            }
            Some(CompensationName::Layer) => Some(CompensationTarget::Layer),
            Some(CompensationName::Stream) => Some(CompensationTarget::Stream),
        };
        let mut choice: LeastSquares = compensation.least_squares().unwrap_or_default();
        set(&mut choice.target, target);
        set(&mut choice.windows, self.compensation_windows);
        set(&mut choice.damping, self.compensation_damping);
        *compensation = Compensation::LeastSquares(choice);
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
            Self::Wanda => Criterion::Wanda,
            Self::Tangent => Criterion::Tangent,
            Self::Flap => Criterion::Flap,
        }
    }
}

impl OptimizerName {
    /// With its defaults, unless the recipe has chosen it already.
    fn apply(self, optimizer: &mut Optimizer) {
        match (self, &optimizer) {
            (Self::AdamW, Optimizer::AdamW(_)) | (Self::LoraRite, Optimizer::LoraRite(_)) => {}
            (Self::AdamW, _) => *optimizer = Optimizer::AdamW(AdamW::default()),
            (Self::LoraRite, _) => *optimizer = Optimizer::LoraRite(LoraRite::default()),
        }
    }
}

impl DepthName {
    fn choice(self) -> BlockCriterion {
        match self {
            Self::Magnitude => BlockCriterion::Magnitude,
            Self::Taylor => BlockCriterion::Taylor,
            Self::Perplexity => BlockCriterion::Perplexity,
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

impl RampShapeName {
    fn choice(self) -> RampShape {
        match self {
            Self::Cubic => RampShape::Cubic,
            Self::OneShot => RampShape::OneShot,
        }
    }
}

impl RecoveryName {
    fn choice(self) -> Recovery {
        match self {
            Self::Continue => Recovery::Continue,
            Self::Hold => Recovery::Hold,
            Self::Restart => Recovery::Restart,
        }
    }
}

impl ComputeName {
    fn choice(self) -> Compute {
        match self {
            Self::F32 => Compute::F32,
            Self::F64 => Compute::F64,
            Self::Bf16 => Compute::Bf16,
        }
    }
}

impl StorageName {
    fn choice(self) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::F64 => Storage::F64,
            Self::Bf16 => Storage::Bf16,
            Self::Int8 => Storage::Int8,
            Self::Nf4 => Storage::Nf4,
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
            ramp_shape: Some(RampShapeName::OneShot),
            recovery: Some(RecoveryName::Hold),
            distill: Some(0.7),
            storage: Some(StorageName::Bf16),
            ..RecipeFlags::default()
        };
        let mut recipe = Recipe::default();
        flags.apply(&mut recipe);
        let mut expected = Recipe { steps: 9, ..Recipe::default() };
        expected.precision.storage = Storage::Bf16;
        expected.learning_rate.recovery = Recovery::Hold;
        expected.distillation = Some(Distillation { weight: 0.7, top_k: 64 });
        let pruning = expected.pruning.as_mut().unwrap();
        pruning.budget = Budget::Sparsity(0.3);
        pruning.criterion = Criterion::LoraPrune { form: LoraPruneForm::Paper };
        pruning.protection = Protection::Layers(vec![0, 3]);
        pruning.ramp.shape = RampShape::OneShot;
        assert_eq!(recipe, expected);
    }

    #[test]
    fn compensation_is_chosen_by_name_or_by_a_number_of_it() {
        let chosen = |flags: RecipeFlags, before| {
            let pruning = Pruning { compensation: before, ..Pruning::default() };
            let mut recipe = Recipe { pruning: Some(pruning), ..Recipe::default() };
            flags.apply(&mut recipe);
            recipe.pruning.unwrap().compensation
        };
        let stream = LeastSquares { target: CompensationTarget::Stream, ..LeastSquares::default() };
        let name = |compensation| RecipeFlags { compensation: Some(compensation), ..RecipeFlags::default() };
        assert_eq!(
            chosen(name(CompensationName::Stream), Compensation::None),
            Compensation::LeastSquares(stream)
        );
        assert_eq!(
            chosen(name(CompensationName::None), Compensation::LeastSquares(stream)),
            Compensation::None
        );
        let windows = RecipeFlags { compensation_windows: Some(9), ..RecipeFlags::default() };
        for (before, of) in
            [(Compensation::None, LeastSquares::default()), (Compensation::LeastSquares(stream), stream)]
        {
            let expected = Compensation::LeastSquares(LeastSquares { windows: 9, ..of });
            assert_eq!(chosen(windows.clone(), before), expected);
        }
    }
}
