use service_kit::access::{Access, METHODS};
use service_kit::{Process, Role};
use std::path::Path;

fn needs(access: Access) -> &'static str {
    match access {
        Access::Open => "nothing",
        Access::People(Role::Read) => "read",
        Access::People(Role::Operate) => "operate",
        Access::People(Role::Admin) => "admin",
        Access::People(Role::Internal) => "internal",
        Access::Process(Process::Coordinator) => "the coordinator's certificate",
        Access::Process(Process::Worker) => "a worker's certificate",
    }
}

#[test]
fn the_table_of_roles_in_the_documents_is_the_codes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/security.md");
    let text = std::fs::read_to_string(path).unwrap();
    let documented: Vec<&str> = text
        .lines()
        .filter(|line| ["| `espalier.v1.", "| `grpc."].iter().any(|start| line.starts_with(start)))
        .collect();
    let rows: Vec<String> = METHODS
        .iter()
        .map(|row| {
            let changing = if row.changes { "yes" } else { "no" };
            format!("| `{}` | {} | {changing} |", row.path.trim_start_matches('/'), needs(row.access))
        })
        .collect();
    assert_eq!(documented, rows);
}
