use clap::{Args, Subcommand};
use service_kit::Role;

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    pub command: TokenCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token: prints it, this once, and below it the line for the file of the coordinator's --tokens
    Create {
        /// Whose it is, as the audit log will say: letters, digits and `.-_@`
        #[arg(long, value_name = "NAME")]
        name: String,
        /// What it allows
        #[arg(long, value_enum)]
        role: Role,
    },
}
