//! One module a command.

mod artifacts;
mod eval;
mod import;
mod importance;
mod logits;
pub(crate) mod methods;
mod plan;
mod prune;
mod remote;
mod report;
mod token;

use crate::args::Command;
use crate::failure::Failure;

/// # Errors
/// What the command says went wrong.
pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Prune(args) => prune::run(*args).await,
        Command::Plan(args) => plan::run(&args),
        Command::Methods(args) => methods::run(&args),
        Command::Eval(args) => eval::run(args).await,
        Command::Import(args) => import::run(&args),
        Command::Logits(args) => logits::run(&args).await,
        Command::Report(args) => report::run(&args),
        Command::Create(args) => remote::create(args).await,
        Command::Get(args) => remote::get(args).await,
        Command::List(args) => remote::list(args).await,
        Command::Watch(args) => remote::watch(args).await,
        Command::Pause(args) => remote::pause(args).await,
        Command::Resume(args) => remote::resume(args).await,
        Command::Cancel(args) => remote::cancel(args).await,
        Command::Delete(args) => remote::delete(args).await,
        Command::Fork(args) => remote::fork(args).await,
        Command::WhatIf(args) => importance::what_if(args).await,
        Command::Importance(args) => importance::watch(args).await,
        Command::Artifacts(args) => artifacts::list(args).await,
        Command::Download(args) => artifacts::download(args).await,
        Command::Evaluate(args) => remote::evaluate(args).await,
        Command::Export(args) => remote::export(args).await,
        Command::Decisions(args) => remote::decisions(args).await,
        Command::Mask(args) => remote::mask(args).await,
        Command::Workers(args) => remote::workers(args).await,
        Command::Drain(args) => remote::drain(args).await,
        Command::Token(args) => token::run(&args),
    }
}
