//! The table of methods: who may call each, and which calls are written to the audit log.

use super::{Process, Role};

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Everyone: a health check carries no token.
    Open,
    /// People of this role or a higher one.
    People(Role),
    /// This process.
    Process(Process),
}

/// Where a call says which run it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject {
    Nothing,
    /// In field 1 of the request.
    Request,
    /// In field 1 of the run that is field 1 of the response.
    Response,
}

/// A method of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Method {
    /// As in the URL of the call.
    pub path: &'static str,
    pub access: Access,
    /// Each call gives a line in the audit log. Those that repeat while a run goes on (Renew, Train, ApplyMask, ...) do
    /// not: the run's own events tell of them.
    pub changes: bool,
    /// It answers with a stream.
    pub streams: bool,
    pub subject: Subject,
}

/// The row of the method that a URL's path names.
#[must_use]
pub fn method(path: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.path == path)
}

const fn row(path: &'static str, access: Access) -> Method {
    Method { path, access, changes: false, streams: false, subject: Subject::Nothing }
}

impl Method {
    const fn changes(self) -> Self {
        Self { changes: true, ..self }
    }

    const fn streams(self) -> Self {
        Self { streams: true, ..self }
    }

    const fn about(self, subject: Subject) -> Self {
        Self { subject, ..self }
    }
}

const READ: Access = Access::People(Role::Read);
const OPERATE: Access = Access::People(Role::Operate);
const ADMIN: Access = Access::People(Role::Admin);
const WORKER: Access = Access::Process(Process::Worker);
const COORDINATOR: Access = Access::Process(Process::Coordinator);

/// Every method of every service. One without a row is closed to all but admins where access is controlled.
///
/// DeleteRun is an admin's: nothing brings a run back. DrainWorker is an operator's: runs go on from a checkpoint, and
/// the worker may register again.
#[rustfmt::skip]
pub const METHODS: &[Method] = &[
    row("/espalier.v1.RunService/CreateRun", OPERATE).changes().about(Subject::Response),
    row("/espalier.v1.RunService/GetRun", READ),
    row("/espalier.v1.RunService/ListRuns", READ),
    row("/espalier.v1.RunService/WatchRun", READ).streams(),
    row("/espalier.v1.RunService/PauseRun", OPERATE).changes().about(Subject::Request),
    row("/espalier.v1.RunService/ResumeRun", OPERATE).changes().about(Subject::Request),
    row("/espalier.v1.RunService/CancelRun", OPERATE).changes().about(Subject::Request),
    row("/espalier.v1.RunService/DeleteRun", ADMIN).changes().about(Subject::Request),
    row("/espalier.v1.RunService/ForkRun", OPERATE).changes().about(Subject::Response),
    row("/espalier.v1.RunService/EvaluateRun", OPERATE).changes().about(Subject::Request),
    row("/espalier.v1.RunService/ExportRun", OPERATE).changes().about(Subject::Request),
    row("/espalier.v1.RunService/ListDecisions", READ),
    row("/espalier.v1.RunService/GetKeepMask", READ),
    row("/espalier.v1.RunService/WatchImportance", READ).streams(),
    row("/espalier.v1.RunService/QueryWhatIf", READ),
    row("/espalier.v1.RunService/ListArtifacts", READ),
    row("/espalier.v1.RunService/DownloadArtifact", READ).streams(),
    row("/espalier.v1.RegistryService/Register", WORKER).changes(),
    row("/espalier.v1.RegistryService/Renew", WORKER),
    row("/espalier.v1.RegistryService/Deregister", WORKER).changes(),
    row("/espalier.v1.RegistryService/ListWorkers", READ),
    row("/espalier.v1.RegistryService/DrainWorker", OPERATE).changes(),
    row("/espalier.v1.WorkerService/Describe", COORDINATOR),
    row("/espalier.v1.WorkerService/Load", COORDINATOR).changes(),
    row("/espalier.v1.WorkerService/OpenRendezvous", COORDINATOR),
    row("/espalier.v1.WorkerService/JoinGroup", COORDINATOR),
    row("/espalier.v1.WorkerService/Train", COORDINATOR).streams(),
    row("/espalier.v1.WorkerService/ApplyMask", COORDINATOR),
    row("/espalier.v1.WorkerService/Evaluate", COORDINATOR),
    row("/espalier.v1.WorkerService/Calibrate", COORDINATOR).streams(),
    row("/espalier.v1.WorkerService/EvaluateTask", COORDINATOR).streams(),
    row("/espalier.v1.WorkerService/Checkpoint", COORDINATOR).streams(),
    row("/espalier.v1.WorkerService/Export", COORDINATOR).changes(),
    row("/espalier.v1.WorkerService/Abort", COORDINATOR).changes(),
    row("/grpc.health.v1.Health/Check", Access::Open),
    row("/grpc.health.v1.Health/Watch", Access::Open).streams(),
    row("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", READ).streams(),
    row("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", READ).streams(),
];

#[cfg(test)]
mod tests {
    use super::*;
    use prost_reflect::DescriptorPool;
    use std::collections::BTreeSet;

    #[test]
    fn every_method_of_the_schema_has_a_row_and_every_row_a_method() {
        let mut pool = DescriptorPool::decode(wire::pb::DESCRIPTORS).unwrap();
        for more in [
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ] {
            pool.decode_file_descriptor_set(more).unwrap();
        }
        let mut paths = BTreeSet::new();
        for service in pool.services() {
            for described in service.methods() {
                let path = format!("/{}/{}", service.full_name(), described.name());
                let row = method(&path).unwrap_or_else(|| panic!("{path} has no row"));
                assert_eq!(row.streams, described.is_server_streaming(), "{path}");
                let first = |message: prost_reflect::MessageDescriptor| message.get_field(1);
                match row.subject {
                    Subject::Nothing => {}
                    Subject::Request => assert_eq!(first(described.input()).unwrap().name(), "id", "{path}"),
                    Subject::Response => {
                        let run = first(described.output()).unwrap();
                        assert_eq!(run.name(), "run", "{path}");
                        let id = first(run.kind().as_message().unwrap().clone()).unwrap();
                        assert_eq!(id.name(), "id", "{path}");
                    }
                }
                paths.insert(path);
            }
        }
        for row in METHODS {
            assert!(paths.remove(row.path), "{} is no method, or has two rows", row.path);
        }
    }
}
