use crate::args::{ImportArgs, ImportDtype};
use crate::failure::{Failure, OrBadInput};
use crate::output::say;
use crate::units;
use checkpoint::{Dtype, import_gguf};

/// # Errors
/// When the file is not one that we read, or the folder cannot be written.
pub(crate) fn run(args: &ImportArgs) -> Result<(), Failure> {
    let dtype = match args.dtype {
        ImportDtype::Bf16 => Dtype::Bf16,
        ImportDtype::F16 => Dtype::F16,
        ImportDtype::F32 => Dtype::F32,
    };
    let report = import_gguf(&args.gguf, &args.out, dtype).or_bad_input()?;
    let types: Vec<String> = report
        .tensors_by_block_type
        .iter()
        .map(|(block_type, count)| format!("{count} {block_type}"))
        .collect();
    say(format!(
        "{}: {} parameters in {} layers, from {} tensors",
        args.out.display(),
        units::grouped(report.parameter_count),
        report.spec.layers.len(),
        types.join(", ")
    ));
    Ok(())
}
