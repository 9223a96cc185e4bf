//! Every method that a recipe may choose: one rank is two and three, sliced is masked.

use crate::tests::golden_runs::Golden;
use crate::tests::group::{RunInputs, RunRecord, run};
use recipe::{
    BlockCriterion, Chain, Compensation, Criterion, Depth, LeastSquares, LoraRite, Optimizer, Recipe, Shape,
    Shrink,
};

type Change = Box<dyn Fn(&mut Recipe)>;

/// By name, what it changes in a recipe that prunes in f64 with dropout, and what of it may differ: relative in losses,
/// absolute in logits.
fn methods() -> Vec<(&'static str, Change, f64)> {
    let rite = |guard, escaped_mass| {
        move |recipe: &mut Recipe| {
            recipe.optimizer = Optimizer::LoraRite(LoraRite {
                guard,
                escaped_mass,
                weight_decay: 0.01,
                ..LoraRite::default()
            });
            recipe.learning_rate.peak = 2e-3;
        }
    };
    let blocks = |criterion, blocks| {
        move |recipe: &mut Recipe| {
            let pruning = recipe.pruning.as_mut().unwrap();
            let iterative = criterion == BlockCriterion::Perplexity;
            pruning.depth = Some(Depth { criterion, blocks, protect_ends: false, iterative });
            pruning.shape = Shape::Uniform;
            pruning.compensation = Compensation::LeastSquares(LeastSquares::default());
        }
    };
    let flap = |shape| {
        move |recipe: &mut Recipe| {
            let pruning = recipe.pruning.as_mut().unwrap();
            (pruning.criterion, pruning.shape) = (Criterion::Flap, shape);
        }
    };
    let chain = |recipe: &mut Recipe| {
        recipe.chain = Some(Chain { knots: vec![5, 12], warmup_steps: 2, settle_steps: 1 });
        recipe.pruning.as_mut().unwrap().compensation = Compensation::LeastSquares(LeastSquares::default());
    };
    vec![
        ("Chain of LoRA", Box::new(chain), 1e-10),
        ("FLAP over all layers", Box::new(flap(Shape::Global)), 1e-10),
        ("FLAP in each layer", Box::new(flap(Shape::Uniform)), 1e-10),
        ("blocks by magnitude", Box::new(blocks(BlockCriterion::Magnitude, None)), 1e-10),
        ("blocks by Taylor, and widths", Box::new(blocks(BlockCriterion::Taylor, Some(1))), 1e-10),
        ("blocks by perplexity", Box::new(blocks(BlockCriterion::Perplexity, None)), 1e-10),
        ("blocks by perplexity, and widths", Box::new(blocks(BlockCriterion::Perplexity, Some(1))), 1e-10),
        ("LoRA-RITE", Box::new(rite(true, None)), 1e-10),
        ("LoRA-RITE without its guard", Box::new(rite(false, Some(false))), 1e-10),
        (
            "tangent",
            Box::new(|recipe| recipe.pruning.as_mut().unwrap().criterion = Criterion::Tangent),
            1e-10,
        ),
    ]
}

fn run_with(change: &dyn Fn(&mut Recipe), tp_degree: usize, shrink: Shrink) -> RunRecord {
    let golden = Golden::read("gqa_code_kv_groups_f64");
    let mut recipe = golden.recipe(shrink);
    recipe.lora.dropout = 0.1;
    change(&mut recipe);
    run(&RunInputs { model: golden.model(), recipe, tp_degree, initial: None, batches: &golden.batches() })
}

fn assert_alike(what: &str, one: &RunRecord, other: &RunRecord, bound: f64) {
    assert_eq!(one.decisions, other.decisions, "{what}");
    for (step, (one, other)) in one.losses.iter().zip(&other.losses).enumerate() {
        let apart = (one - other).abs() / one;
        assert!(apart <= bound, "{what}: losses of step {step} differ by {apart:.2e}");
    }
    let apart = (&one.logits - &other.logits).abs().max().double_value(&[]);
    assert!(apart <= bound * 10.0, "{what}: logits differ by {apart:.2e}");
}

#[test]
fn every_method_gives_the_same_on_any_number_of_ranks() {
    for (name, change, bound) in methods() {
        let one = run_with(&change, 1, Shrink::Live);
        assert!(one.losses.last() < one.losses.first(), "{name} learns: {:?}", one.losses);
        assert!(!one.decisions.is_empty());
        for degree in [2, 3] {
            let many = run_with(&change, degree, Shrink::Live);
            assert_alike(&format!("{name} on {degree} ranks"), &one, &many, bound);
        }
    }
}

#[test]
fn every_method_gives_the_same_masked_as_sliced() {
    for (name, change, bound) in methods() {
        for degree in [1, 2] {
            let (sliced, masked) =
                (run_with(&change, degree, Shrink::Live), run_with(&change, degree, Shrink::Never));
            assert_alike(&format!("{name} masked on {degree}"), &sliced, &masked, bound);
        }
    }
}
