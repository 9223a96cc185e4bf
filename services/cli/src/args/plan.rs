use super::RecipeFlags;
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// Model folder in Hugging Face layout; only its config.json is read
    #[arg(long, value_name = "DIR", required_unless_present_any = ["config", "recipe", "tables"])]
    pub model: Option<PathBuf>,
    /// A config.json, where there is no folder
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub config: Option<PathBuf>,
    /// YAML file with a recipe, or with a whole run (deploy/runs/*.yaml)
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Workers that share the model [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the tables of docs/planning.md
    #[arg(long, conflicts_with_all = ["model", "config", "recipe", "workers", "json"])]
    pub tables: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub recipe_flags: RecipeFlags,
}

/// What the workers compute on.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// What each worker computes on: cpu, a100 or h100 (80 GiB each)
    #[arg(long, value_name = "NAME", default_value = "cpu", help_heading = "Device")]
    pub device: String,
    /// Memory that a worker may take, such as 80GiB [default: the device's; on a CPU nothing is said about fitting]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Device")]
    pub device_memory: Option<u64>,
    /// Operations of products that the device does in a second, such as 4.5e11; a measured rate of a CPU
    #[arg(long, value_name = "RATE", value_parser = parse_rate, help_heading = "Device")]
    pub flops: Option<f64>,
    /// Bytes that it reads from its memory in a second
    #[arg(long, value_name = "RATE", value_parser = parse_rate, help_heading = "Device")]
    pub bandwidth: Option<f64>,
    /// Bytes that a worker sends to its neighbour in a second
    #[arg(long, value_name = "RATE", value_parser = parse_rate, help_heading = "Device")]
    pub link: Option<f64>,
    /// Share of these rates that a run reaches, in (0, 1] [default: 1 for rates given here, 0.4 for a named GPU's]
    #[arg(long, value_name = "FRACTION", value_parser = parse_efficiency, help_heading = "Device")]
    pub efficiency: Option<f64>,
}

/// `80GiB`, `64 GB`, `1000000`.
fn parse_bytes(text: &str) -> Result<u64, String> {
    const WANTED: &str = "expected a number of bytes such as 80GiB or 64GB";
    let text = text.trim();
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| WANTED)?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(WANTED.into()),
    };
    let bytes = number * factor;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(WANTED.into()) }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        Ok(_) | Err(_) => Err("expected a positive number such as 4.5e11".into()),
    }
}

fn parse_efficiency(text: &str) -> Result<f64, String> {
    match parse_rate(text) {
        Ok(share) if share <= 1.0 => Ok(share),
        Ok(_) | Err(_) => Err("expected a number in (0, 1]".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_their_unit() {
        for (text, expected) in [
            ("80GiB", Some(80 << 30)),
            ("64 GB", Some(64_000_000_000)),
            ("1.5gib", Some(3 << 29)),
            ("123", Some(123)),
            ("0", None),
            ("GiB", None),
            ("80 apples", None),
            ("-1GiB", None),
            ("1e99", None),
        ] {
            assert_eq!(parse_bytes(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn rates_are_positive_and_shares_at_most_one() {
        assert_eq!(parse_rate("4.5e11"), Ok(4.5e11));
        assert!(["0", "-1", "NaN", "inf", "x"].iter().all(|text| parse_rate(text).is_err()));
        assert_eq!(parse_efficiency("1"), Ok(1.0));
        assert!(parse_efficiency("1.1").is_err());
    }
}
