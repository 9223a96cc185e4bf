//! Tokens are made here and kept nowhere.

use crate::args::{TokenArgs, TokenCommand};
use crate::failure::{Failure, OrBadInput};
use crate::output::{say, tell};
use service_kit::access::create_token;

pub(crate) fn run(args: &TokenArgs) -> Result<(), Failure> {
    let TokenCommand::Create { name, role } = &args.command;
    let new = create_token(name, *role).or_bad_input()?;
    tell("the token, which is shown only now; its owner puts it into a file for --token-file:");
    say(&new.token);
    tell("its line in the file of the coordinator's --tokens:");
    say(&new.line);
    Ok(())
}
