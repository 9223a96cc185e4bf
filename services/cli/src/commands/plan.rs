//! `plan`: what a run will take, without a coordinator or a worker.

use crate::args::{DeviceArgs, PlanArgs};
use crate::failure::{Failure, OrBadInput};
use crate::output::say;
use crate::plan_tables;
use crate::run_file::RunFile;
use anyhow::Context;
use checkpoint::{ModelConfig, export_form};
use model_spec::{Family, ModelSpec};
use planner::{Device, Estimate, Question, Rates, Refusal, estimate, known_device, refusals};
use recipe::Recipe;
use std::path::{Path, PathBuf};
use wire::status::chain;

/// Dimensions of published models, as docs/planning.md has them.
const PUBLISHED: [(&str, &str); 4] = [
    ("LLaMA 7B", include_str!("../../../../crates/planner/models/llama-7b.json")),
    ("LLaMA 13B", include_str!("../../../../crates/planner/models/llama-13b.json")),
    ("LLaMA 65B", include_str!("../../../../crates/planner/models/llama-65b.json")),
    ("Llama 3 70B", include_str!("../../../../crates/planner/models/llama-3-70b.json")),
];

/// # Errors
/// When the input cannot be read, or the run cannot fit or be exported.
pub(crate) fn run(args: &PlanArgs) -> Result<(), Failure> {
    if args.tables {
        return tables();
    }
    let mut file = match &args.recipe {
        Some(path) => RunFile::read(path)?,
        None => RunFile::default(),
    };
    args.recipe_flags.apply(&mut file.recipe);
    let dense = model(args, &file)?;
    let workers = args.workers.or(file.workers).unwrap_or(1);
    let device = device(&args.device, workers)?;
    let question =
        Question { dense: &dense, recipe: &file.recipe, tp_degree: workers as usize, device: &device };
    let estimate = estimate(&question).map_err(|found| refused(&found))?;
    let form = form_of(&dense, &estimate);
    let (form, cannot_export) = match form {
        Ok(form) => (form, None),
        Err(why) => ("none".to_owned(), Some(why)),
    };
    let found = refusals(&estimate, &file.recipe, device.memory_bytes, cannot_export);
    if args.json {
        say(json(&estimate, &device, &file.recipe, &form, &found)?);
    } else {
        say(plan_tables::plan(&estimate, &device, &form));
    }
    if found.is_empty() { Ok(()) } else { Err(refused(&found)) }
}

fn tables() -> Result<(), Failure> {
    let mut models = Vec::new();
    for (name, config) in PUBLISHED {
        let path = Path::new(name);
        let config = ModelConfig::parse(path, config.as_bytes()).context("a built-in model")?;
        models.push((name, config.spec));
    }
    say(planner::page(&models).trim_end());
    Ok(())
}

fn model(args: &PlanArgs, file: &RunFile) -> Result<ModelSpec, Failure> {
    let folder = args.model.as_ref().or(file.model.as_ref());
    let path: PathBuf = match (&args.config, folder) {
        (Some(config), _) => config.clone(),
        (None, Some(folder)) => folder.join("config.json"),
        (None, None) => return Err(Failure::bad_input("name a model by --model or --config")),
    };
    let text = std::fs::read(&path)
        .with_context(|| format!("failed to read `{}`", path.display()))
        .or_bad_input()?;
    Ok(ModelConfig::parse(&path, &text).or_bad_input()?.spec)
}

/// The device by name, with what the flags say of it.
fn device(args: &DeviceArgs, workers: u32) -> Result<Device, Failure> {
    let mut device = match args.device.as_str() {
        "cpu" => Device::cpu(),
        name => known_device(name).ok_or_else(|| {
            let names = planner::KNOWN_DEVICES.map(|known| known.name).join(", ");
            Failure::bad_input(format!(
                "`{name}` is no device that rates are known of; use cpu or one of {names}"
            ))
        })?,
    };
    device.memory_bytes = args.device_memory.or(device.memory_bytes);
    if let Some(rates) = &mut device.rates {
        rates.product_flops = args.flops.unwrap_or(rates.product_flops);
        rates.memory_bytes = args.bandwidth.unwrap_or(rates.memory_bytes);
        rates.link_bytes = args.link.unwrap_or(rates.link_bytes);
        rates.efficiency = args.efficiency.unwrap_or(rates.efficiency);
        return Ok(device);
    }
    let says_something =
        [args.flops, args.bandwidth, args.link, args.efficiency].iter().any(|rate| rate.is_some());
    let link = if workers == 1 { Some(args.link.unwrap_or(1.0)) } else { args.link };
    match (args.flops, args.bandwidth, link) {
        (Some(flops), Some(bandwidth), Some(link)) => {
            device.rates = Some(Rates {
                product_flops: flops,
                single_flops: flops,
                double_flops: flops / 2.0,
                memory_bytes: bandwidth,
                link_bytes: link,
                efficiency: args.efficiency.unwrap_or(1.0),
            });
        }
        _ if says_something => {
            return Err(Failure::bad_input(
                "times on a CPU need --flops and --bandwidth, and --link for more than one worker",
            ));
        }
        _ => {}
    }
    Ok(device)
}

/// How the result is written, or why it cannot be.
fn form_of(dense: &ModelSpec, estimate: &Estimate) -> Result<String, String> {
    let Some(layers) = &estimate.layers else {
        return Ok("llama or mistral, padded to the widest layer".to_owned());
    };
    let pruned = ModelSpec { layers: layers.clone(), ..dense.clone() };
    let form = export_form(&pruned).map_err(|error| chain(&error))?;
    let name = match form.family {
        Family::Llama => "llama",
        Family::Mistral => "mistral",
    };
    Ok(if form.padded { format!("{name}, padded to the widest layer") } else { name.to_owned() })
}

fn json(
    estimate: &Estimate,
    device: &Device,
    recipe: &Recipe,
    form: &str,
    found: &[Refusal],
) -> Result<String, Failure> {
    let (stage, peak) = estimate.peak();
    let value = serde_json::json!({
        "estimate": estimate,
        "device": device,
        "recipe": recipe,
        "export_form": form,
        "peak": { "stage": stage, "memory": peak, "bytes": peak.total() },
        "refusals": found.iter().map(|refusal| serde_json::json!({
            "field": refusal.field(),
            "problem": refusal.to_string(),
        })).collect::<Vec<_>>(),
    });
    Ok(serde_json::to_string_pretty(&value).context("failed to write JSON")?)
}

fn refused(found: &[Refusal]) -> Failure {
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    Failure::bad_input(format!("the run cannot be made: {}", lines.join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use planner::Platform;

    fn flags(device: &str) -> DeviceArgs {
        DeviceArgs {
            device: device.into(),
            device_memory: None,
            flops: None,
            bandwidth: None,
            link: None,
            efficiency: None,
        }
    }

    #[test]
    fn a_device_is_known_by_name_or_by_its_rates() {
        let named = device(&flags("h100"), 2).unwrap();
        assert_eq!((named.platform, named.memory_bytes), (Platform::Cuda, Some(80 << 30)));
        let smaller = DeviceArgs { device_memory: Some(1 << 30), link: Some(7.0), ..flags("A100") };
        let smaller = device(&smaller, 2).unwrap();
        assert_eq!((smaller.memory_bytes, smaller.rates.unwrap().link_bytes), (Some(1 << 30), 7.0));
        let cpu = DeviceArgs { flops: Some(1e11), bandwidth: Some(1e10), ..flags("cpu") };
        assert_eq!(device(&cpu, 1).unwrap().rates.unwrap().efficiency, 1.0);
        for (bad, workers) in
            [(cpu, 2), (flags("abacus"), 1), (DeviceArgs { link: Some(1.0), ..flags("cpu") }, 1)]
        {
            assert!(matches!(device(&bad, workers), Err(Failure::BadInput(_))), "{bad:?}");
        }
        assert_eq!(device(&flags("cpu"), 8).unwrap().rates, None);
    }

    #[test]
    fn the_committed_tables_are_those_that_are_printed() {
        let page = include_str!("../../../../docs/planning.md");
        let models: Vec<(&str, ModelSpec)> = PUBLISHED
            .iter()
            .map(|(name, text)| (*name, ModelConfig::parse(Path::new(name), text.as_bytes()).unwrap().spec))
            .collect();
        let tables = planner::page(&models);
        assert!(page.contains(tables.trim_end()), "run `make docs-planning`");
    }
}
