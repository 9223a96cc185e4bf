//! Tables, by version. A version is added at the end of the list and never changed.

/// The statements of each version, in both dialects: `BYTES` stands for the type of bytes.
const VERSIONS: &[&[&str]] = &[&[
    "CREATE TABLE epoch (id BIGINT PRIMARY KEY, value BIGINT NOT NULL)",
    "INSERT INTO epoch (id, value) VALUES (1, 0)",
    "CREATE TABLE runs (
        number BIGINT PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        request_id TEXT UNIQUE,
        request_digest BYTES NOT NULL,
        create_millis BIGINT NOT NULL,
        record BYTES NOT NULL,
        late_export BYTES
    )",
    "CREATE TABLE events (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        revision BIGINT NOT NULL,
        payload BYTES NOT NULL,
        PRIMARY KEY (run_id, revision)
    )",
    "CREATE TABLE decisions (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        generation BIGINT NOT NULL,
        revision BIGINT NOT NULL,
        payload BYTES NOT NULL,
        importance BYTES,
        PRIMARY KEY (run_id, generation)
    )",
    "CREATE TABLE checkpoints (
        run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        name TEXT NOT NULL,
        steps_done BIGINT NOT NULL,
        generation BIGINT NOT NULL,
        payload BYTES NOT NULL,
        PRIMARY KEY (run_id, name)
    )",
    "CREATE TABLE audit (
        number BIGINT PRIMARY KEY,
        time_millis BIGINT NOT NULL,
        principal TEXT NOT NULL,
        method TEXT NOT NULL,
        target TEXT NOT NULL,
        outcome TEXT NOT NULL
    )",
]];

/// The newest version that this program knows.
pub(crate) const KNOWN: i64 = VERSIONS.len() as i64;

/// The statements that lead from version `from` to the newest.
pub(crate) fn statements(from: i64, is_sqlite: bool) -> Vec<String> {
    let bytes = if is_sqlite { "BLOB" } else { "BYTEA" };
    let skip = usize::try_from(from).unwrap_or(0);
    let all = VERSIONS.iter().skip(skip).flat_map(|version| version.iter());
    all.map(|statement| statement.replace("BYTES", bytes)).collect()
}
