//! `methods`: every choice of method, with its source and what it costs.

use crate::args::{
    CompensationName, CriterionName, DepthName, HeadGroupingName, MethodsArgs, OptimizerName, RampShapeName,
    ShapeName, StorageName,
};
use crate::failure::Failure;
use crate::output::say;
use crate::tables;
use clap::ValueEnum;
use serde::Serialize;

/// A choice in one slot of the recipe.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Method {
    /// The flag that chooses it.
    pub flag: &'static str,
    /// Its value.
    pub name: String,
    /// What it is.
    pub about: String,
    #[serde(flatten)]
    pub costs: Costs,
}

/// On each rank, beside what every run takes. `r` is the LoRA rank, `K` the inputs of o or of down on all ranks, `d` the width of the
/// residual stream.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Costs {
    pub source: &'static str,
    pub memory: &'static str,
    pub communication: &'static str,
    pub time: &'static str,
    /// Flags that the recipe refuses beside it.
    pub not_with: &'static [&'static str],
}

const NOTHING: Costs = Costs { source: "", memory: "", communication: "", time: "", not_with: &[] };
const QUANTISED: &[&str] = &["--storage int8", "--storage nf4"];

/// # Errors
/// When the list cannot be written as JSON.
pub(crate) fn run(args: &MethodsArgs) -> Result<(), Failure> {
    let methods = methods();
    if args.json {
        say(serde_json::to_string_pretty(&methods).map_err(anyhow::Error::from)?);
    } else {
        say(tables::methods(&methods));
    }
    Ok(())
}

fn methods() -> Vec<Method> {
    let mut all = Vec::new();
    all.extend(of_flag("--criterion", criterion));
    all.extend(of_flag("--depth", blocks));
    all.extend(of_flag("--shape", shape));
    all.extend(of_flag("--head-grouping", head_grouping));
    all.extend(of_flag("--ramp-shape", ramp_shape));
    all.extend(of_flag("--compensation", compensation));
    all.extend(of_flag("--optimizer", optimizer));
    all.push(chain());
    all.push(distillation());
    all.extend(of_flag("--storage", storage));
    all
}

fn of_flag<Name: ValueEnum + 'static>(flag: &'static str, costs: fn(Name) -> Costs) -> Vec<Method> {
    let named = |choice: &Name| {
        let value = choice.to_possible_value()?;
        let about = value.get_help().map(ToString::to_string).unwrap_or_default();
        Some(Method { flag, name: value.get_name().to_owned(), about, costs: costs(choice.clone()) })
    };
    Name::value_variants().iter().filter_map(named).collect()
}

fn criterion(name: CriterionName) -> Costs {
    let guided = Costs {
        source: "LoRAPrune, arXiv:2305.18403",
        memory: "a tile",
        time: "6 r + 3 FLOPs a weight and scored step",
        ..NOTHING
    };
    match name {
        CriterionName::LoraPruneCode | CriterionName::LoraPrunePaper => guided,
        CriterionName::Tangent => Costs {
            source: "projections of LoRA-RITE, arXiv:2410.20625",
            communication: "Gram matrices, r x r, once a scored step",
            ..guided
        },
        CriterionName::Taylor => Costs {
            source: "LLM-Pruner, arXiv:2305.11627",
            memory: "a gradient for each projection weight",
            time: "a third product of the backward pass: 2 FLOPs a weight and token",
            ..NOTHING
        },
        CriterionName::Magnitude => {
            Costs { source: "L1 norm", memory: "a tile", time: "2 r + 2 FLOPs a weight", ..NOTHING }
        }
        CriterionName::Random => Costs { source: "a control", ..NOTHING },
        CriterionName::Wanda => Costs {
            source: "Wanda, arXiv:2306.11695",
            memory: "a number for each input of o and down",
            time: "2 r + 3 FLOPs a weight of o and down",
            ..NOTHING
        },
        CriterionName::Flap => Costs {
            source: "FLAP, arXiv:2312.11983",
            memory: "two f64 for each input of o and down",
            communication: "six numbers a layer, once a scored step",
            time: "2 r + 3 FLOPs a weight of o and down",
            ..NOTHING
        },
    }
}

fn blocks(name: DepthName) -> Costs {
    let shared =
        Costs { source: "Shortened LLaMA, arXiv:2402.02834", not_with: &["--shape paper"], ..NOTHING };
    match name {
        DepthName::Magnitude => Costs {
            memory: "a tile",
            time: "one pass over the weights",
            not_with: &["--shape paper", "--iterative true"],
            ..shared
        },
        DepthName::Taylor => Costs {
            memory: "a gradient for each projection weight, once",
            communication: "that of a step's passes",
            time: "forward and backward passes of the calibration windows",
            not_with: &["--shape paper", "--iterative true"],
            ..shared
        },
        DepthName::Perplexity => Costs {
            communication: "that of forward passes",
            time: "a forward pass of the calibration windows for each block, with --iterative again for each that goes",
            ..shared
        },
    }
}

fn shape(name: ShapeName) -> Costs {
    match name {
        ShapeName::Uniform => Costs { source: "LLM-Pruner's use", not_with: &["--protect 0"], ..NOTHING },
        ShapeName::Paper => {
            Costs { source: "LoRAPrune, arXiv:2305.18403", not_with: &["--depth perplexity"], ..NOTHING }
        }
        ShapeName::Global => {
            Costs { source: "one ranking", time: "a sort of all groups on the coordinator", ..NOTHING }
        }
    }
}

fn head_grouping(name: HeadGroupingName) -> Costs {
    match name {
        HeadGroupingName::KvGroups | HeadGroupingName::QueryHeads => NOTHING,
    }
}

fn ramp_shape(name: RampShapeName) -> Costs {
    match name {
        RampShapeName::Cubic => Costs { source: "arXiv:1710.01878", ..NOTHING },
        RampShapeName::OneShot => Costs { source: "LLM-Pruner, arXiv:2305.11627", ..NOTHING },
    }
}

fn compensation(name: CompensationName) -> Costs {
    let solve = Costs {
        source: "MRP, arXiv:2410.15567",
        memory: "24 K^2 + 16 K d bytes of one matrix at a time, and the windows' streams",
        communication: "8 K^2 + 8 K d bytes for o and down of each layer, once a decision",
        time: "three to five passes of the calibration windows and K^3 / 3 FLOPs a matrix, once a decision",
        not_with: QUANTISED,
    };
    match name {
        CompensationName::None => NOTHING,
        CompensationName::Layer | CompensationName::Stream => solve,
    }
}

fn optimizer(name: OptimizerName) -> Costs {
    match name {
        OptimizerName::AdamW => {
            Costs { source: "arXiv:1711.05101", memory: "two moments a factor", ..NOTHING }
        }
        OptimizerName::LoraRite => Costs {
            source: "LoRA-RITE, arXiv:2410.20625",
            memory: "a moment and a basis a factor, two r x r matrices a pair",
            communication: "Gram matrices, r x r, of all pairs at once, once a step",
            time: "eigenvalues of r x r matrices",
            ..NOTHING
        },
    }
}

fn chain() -> Method {
    Method {
        flag: "--knots",
        name: "STEP,…".into(),
        about: "The adapter is frozen before these steps and a fresh one begun".into(),
        costs: Costs {
            source: "Chain of LoRA, arXiv:2401.04151",
            memory: "a pair of factors a knot",
            time: "a low-rank product a knot in every pass",
            ..NOTHING
        },
    }
}

fn distillation() -> Method {
    Method {
        flag: "--distill",
        name: "WEIGHT".into(),
        about: "The unpruned model's most likely tokens share in the loss".into(),
        costs: Costs {
            source: "arXiv:1503.02531",
            memory: "8 bytes for each of its top tokens and position",
            communication: "that of forward passes, once",
            time: "a forward pass of all training windows, once",
            ..NOTHING
        },
    }
}

fn storage(name: StorageName) -> Costs {
    match name {
        StorageName::F32 => Costs { memory: "4 bytes a frozen weight", ..NOTHING },
        StorageName::F64 => {
            Costs { memory: "8 bytes a frozen weight", not_with: &["--compute f32"], ..NOTHING }
        }
        StorageName::Bf16 => Costs { memory: "2 bytes a frozen weight", ..NOTHING },
        StorageName::Int8 => Costs {
            source: "LLM.int8's rows, arXiv:2208.07339",
            memory: "1 byte a frozen weight of a projection",
            time: "weights are widened in each pass",
            not_with: &["--compensation layer", "--compensation stream"],
            ..NOTHING
        },
        StorageName::Nf4 => Costs {
            source: "QLoRA, arXiv:2305.14314",
            memory: "half a byte a frozen weight of a projection",
            time: "weights are widened in each pass",
            not_with: &["--compensation layer", "--compensation stream"],
            ..NOTHING
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;
    use recipe::Recipe;

    fn violations(flags: &str) -> Vec<String> {
        let line = format!("espalier prune --model m --data d --out o {flags}");
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if !words.contains(&"--compensation") {
            words.extend(["--compensation", "none"]);
        }
        let Command::Prune(args) = Args::try_parse_from(&words).unwrap().command else { unreachable!() };
        let mut recipe = Recipe::default();
        args.recipe_flags.apply(&mut recipe);
        recipe.violations().into_iter().map(|one| one.field).collect()
    }

    /// What the list says does not go together is refused, and each choice is taken by itself.
    #[test]
    fn the_list_and_the_recipes_checks_agree() {
        let mut refused = 0;
        for method in methods() {
            let value = match method.flag {
                "--knots" => "5,9".to_owned(),
                "--distill" => "0.5".to_owned(),
                _ => method.name.clone(),
            };
            let choice = format!("{} {value}", method.flag);
            let needed = if value == "f64" { "--compute f64" } else { "" };
            assert_eq!(violations(&format!("{choice} {needed}")), [""; 0], "{choice}");
            for other in method.costs.not_with {
                assert!(!violations(&format!("{choice} {other}")).is_empty(), "{choice} {other}");
                refused += 1;
            }
        }
        assert!(refused > 10);
    }
}
