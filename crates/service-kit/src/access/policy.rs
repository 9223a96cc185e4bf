//! The decision about a call, by what the caller shows.

use super::{Access, Grant, Method, Principal, Process, TokenTable};
use wire::reloading::Reloading;
use wire::status::{Failure, Reason};

/// How a server tells callers apart.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) tokens: Option<Reloading<TokenTable>>,
    /// What callers may do who show nothing.
    pub(crate) anonymous: Option<Grant>,
}

/// What came with a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a> {
    /// The `authorization` header.
    pub(crate) authorization: Option<&'a [u8]>,
    pub(crate) certificate: Option<&'a Principal>,
}

/// A refusal, and who was refused as far as is known.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) principal: Principal,
    pub(crate) failure: Failure,
}

impl Policy {
    /// Who calls, if that caller may. `method` is absent for a path without a row.
    pub(crate) fn admit(&self, method: Option<&Method>, shown: Shown<'_>) -> Result<Principal, Box<Refusal>> {
        let access = method.map(|method| method.access);
        let anonymous = self.anonymous.map(Principal::anonymous);
        let token = match (&self.tokens, shown.authorization) {
            (Some(tokens), Some(header)) => {
                let found = bearer(header).and_then(|token| tokens.current().find(token));
                // A health check answers whatever else is wrong with the call.
                if found.is_none() && access != Some(Access::Open) {
                    return Err(Box::new(Refusal {
                        principal: Principal::anonymous(Grant::Nothing),
                        failure: Failure::new(
                            Reason::Unauthenticated,
                            "the token is not known here; was it withdrawn, or made for another server?",
                        ),
                    }));
                }
                found
            }
            (Some(_), None) | (None, _) => None,
        };
        let candidates = [token, shown.certificate.cloned(), anonymous];
        let known: Vec<Principal> = candidates.into_iter().flatten().collect();
        let allowed = |principal: &&Principal| match access {
            Some(access) => principal.grant.allows(access),
            None => matches!(principal.grant, Grant::Everything | Grant::Role(super::Role::Admin)),
        };
        if let Some(principal) = known.iter().find(allowed) {
            return Ok(principal.clone());
        }
        if access == Some(Access::Open) {
            return Ok(Principal::anonymous(Grant::Nothing));
        }
        let shown_something = known.first().filter(|principal| principal.name != "anonymous");
        let (principal, failure) = match shown_something {
            Some(principal) => {
                let message = format!(
                    "`{}` has the role {}; this call needs {}",
                    principal.name,
                    principal.grant,
                    access.map_or("one that exists here", needed)
                );
                (principal.clone(), Failure::new(Reason::PermissionDenied, message))
            }
            None => {
                let message = match access {
                    Some(Access::Process(_)) => {
                        "this call needs a coordinator's or worker's client certificate"
                    }
                    Some(Access::Open | Access::People(_)) | None => {
                        "this call needs a token: `authorization: Bearer TOKEN`, or --token-file"
                    }
                };
                (Principal::anonymous(Grant::Nothing), Failure::new(Reason::Unauthenticated, message))
            }
        };
        Err(Box::new(Refusal { principal, failure }))
    }
}

fn needed(access: Access) -> &'static str {
    match access {
        Access::Open => "nothing",
        Access::People(role) => role.name(),
        Access::Process(Process::Coordinator) => "the coordinator's certificate",
        Access::Process(Process::Worker) => "a worker's certificate",
    }
}

/// The token of a `Bearer` header.
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = header.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}
