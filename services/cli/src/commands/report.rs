use crate::args::ReportArgs;
use crate::failure::{Failure, OrBadInput};
use crate::out_folder::read_beside;
use crate::output::say;
use crate::report::{History, page, picture};
use anyhow::Context;
use std::path::Path;

/// # Errors
/// When the events cannot be read or the page not be written.
pub(crate) fn run(args: &ReportArgs) -> Result<(), Failure> {
    let mut history = History::read(&args.events).or_bad_input()?;
    read_beside(&args.events, args.run.as_deref(), &mut history).or_bad_input()?;
    write(&args.out, &page(&history)?)?;
    say(args.out.display().to_string());
    if let Some(svg) = &args.svg {
        write(svg, &picture(&history))?;
        say(svg.display().to_string());
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).with_context(|| format!("failed to write `{}`", path.display())).or_bad_input()
}
