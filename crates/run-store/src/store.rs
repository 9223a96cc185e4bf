use crate::{StoreError, StoreUrl, schema};
use sqlx::any::{AnyPoolOptions, AnyRow};
use sqlx::{Any, AnyPool, Connection, Executor, Row, Transaction};
use std::future::Future;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Calls that the audit goes back.
const KEPT_AUDITS: i64 = 100_000;

/// A store that is open. Clones share it.
#[derive(Debug, Clone)]
pub struct RunStore {
    pool: AnyPool,
    is_sqlite: bool,
    epoch: i64,
    deadline: Duration,
}

/// How a store is used.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Longest that any call may take.
    pub deadline: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10) }
    }
}

/// A run to be created together with its first events.
#[derive(Debug, Clone)]
pub struct NewRun {
    pub id: String,
    /// Repeating a request returns the run that it made.
    pub request_id: Option<String>,
    /// Tells one request from another under the same id.
    pub request_digest: Vec<u8>,
    pub create_time: SystemTime,
    pub record: Vec<u8>,
    /// Revisions 1, 2, …
    pub events: Vec<Vec<u8>>,
    /// Decisions taken over from another run.
    pub decisions: Vec<StoredDecision>,
}

/// What became of a creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    New {
        /// Place in the order of creation.
        number: u64,
    },
    /// The request had made a run before.
    Repeated { id: String, same_request: bool },
}

/// A run as it was created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRunRow {
    pub number: u64,
    pub id: String,
    pub request_id: Option<String>,
    pub request_digest: Vec<u8>,
    pub create_time: SystemTime,
    pub record: Vec<u8>,
    /// What was exported after the run's end.
    pub late_export: Option<Vec<u8>>,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPayload {
    pub revision: u64,
    pub payload: Vec<u8>,
}

/// A decision. It can be megabytes, so that one is read at a time, and its importance by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDecision {
    pub generation: u64,
    /// Revision of its event.
    pub revision: u64,
    pub payload: Vec<u8>,
    /// Not filled in when it is read: see [`RunStore::importance`].
    pub importance: Option<Vec<u8>>,
}

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCheckpoint {
    pub name: String,
    pub steps_done: u64,
    pub generation: u64,
    pub payload: Vec<u8>,
}

/// A call that changed something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditEntry {
    pub time: SystemTime,
    pub principal: String,
    pub method: String,
    pub target: String,
    pub outcome: String,
}

impl RunStore {
    /// Opens a store, makes it or brings its tables up to date, and takes it from whoever had it.
    ///
    /// # Errors
    /// When it cannot be reached or is of a newer version.
    pub async fn open(url: &StoreUrl, options: StoreOptions) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let is_sqlite = url.is_sqlite();
        let address = match url {
            StoreUrl::Sqlite(path) => format!("sqlite://{}?mode=rwc", in_url(path)),
            StoreUrl::Postgres(url) => url.to_string(),
        };
        let millis = options.deadline.as_millis();
        let setting: Vec<String> = if is_sqlite {
            vec![
                format!("PRAGMA busy_timeout = {millis}"),
                "PRAGMA journal_mode = WAL".to_owned(),
                "PRAGMA synchronous = FULL".to_owned(),
                "PRAGMA foreign_keys = ON".to_owned(),
            ]
        } else {
            vec![
                format!("SET statement_timeout = {millis}"),
                format!("SET lock_timeout = {millis}"),
                // A coordinator that hangs in the middle of a write does not keep the next one out.
                format!("SET idle_in_transaction_session_timeout = {millis}"),
                // Whatever the server is set to: what is acknowledged is on disk.
                "SELECT set_config('synchronous_commit', 'on', false) \
                 WHERE current_setting('synchronous_commit') = 'off'"
                    .to_owned(),
            ]
        };
        let opening = async {
            let pool = AnyPoolOptions::new()
                .max_connections(if is_sqlite { 4 } else { 8 })
                .acquire_timeout(options.deadline)
                .after_connect(move |connection, _| {
                    let setting = setting.clone();
                    Box::pin(async move {
                        for statement in setting {
                            connection.execute(sqlx::AssertSqlSafe(statement)).await?;
                        }
                        Ok(())
                    })
                })
                // One whose transaction the database has ended by itself, as on a full disk, counts as open for ever.
                .before_acquire(|connection, _| {
                    let is_usable = !connection.is_in_transaction();
                    Box::pin(async move { Ok(is_usable) })
                })
                .connect(&address)
                .await
                .map_err(failed("opening it"))?;
            let mut store = Self { pool, is_sqlite, epoch: 0, deadline: options.deadline };
            store.migrate().await?;
            store.epoch = store.take_epoch().await?;
            Ok(store)
        };
        in_time(options.deadline, opening).await
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        let doing = "making its tables";
        let mut transaction = self.begin_unfenced(doing).await?;
        if !self.is_sqlite {
            // Two openers at once take turns.
            run(&mut transaction, "SELECT pg_advisory_xact_lock(7369)", doing).await?;
        }
        run(&mut transaction, "CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)", doing)
            .await?;
        let row = sqlx::query("SELECT COALESCE(MAX(version), 0) FROM schema_version")
            .fetch_one(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        let actual: i64 = row.try_get(0).map_err(failed(doing))?;
        if actual > schema::KNOWN {
            return Err(StoreError::NewerSchema { actual, known: schema::KNOWN });
        }
        for statement in schema::statements(actual, self.is_sqlite) {
            sqlx::query(sqlx::AssertSqlSafe(statement))
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
        }
        if actual < schema::KNOWN {
            sqlx::query("INSERT INTO schema_version (version) VALUES ($1)")
                .bind(schema::KNOWN)
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
        }
        transaction.commit().await.map_err(failed(doing))
    }

    async fn take_epoch(&self) -> Result<i64, StoreError> {
        let doing = "taking it over";
        let mut transaction = self.begin_unfenced(doing).await?;
        run(&mut transaction, "UPDATE epoch SET value = value + 1 WHERE id = 1", doing).await?;
        let row = sqlx::query("SELECT value FROM epoch WHERE id = 1")
            .fetch_one(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        transaction.commit().await.map_err(failed(doing))?;
        row.try_get(0).map_err(failed(doing))
    }

    /// A transaction that may write.
    async fn begin_unfenced(&self, doing: &'static str) -> Result<Transaction<'static, Any>, StoreError> {
        let begun = if self.is_sqlite {
            self.pool.begin_with("BEGIN IMMEDIATE").await
        } else {
            self.pool.begin().await
        };
        begun.map_err(failed(doing))
    }

    /// A transaction that may write, as long as the store is still ours.
    async fn begin(&self, doing: &'static str) -> Result<Transaction<'static, Any>, StoreError> {
        let mut transaction = self.begin_unfenced(doing).await?;
        let query = if self.is_sqlite {
            "SELECT value FROM epoch WHERE id = 1"
        } else {
            "SELECT value FROM epoch WHERE id = 1 FOR SHARE"
        };
        let row = sqlx::query(query).fetch_one(&mut *transaction).await.map_err(failed(doing))?;
        let epoch: i64 = row.try_get(0).map_err(failed(doing))?;
        if epoch == self.epoch { Ok(transaction) } else { Err(StoreError::Fenced) }
    }

    /// Makes sure that the store answers and is still ours.
    ///
    /// # Errors
    /// When it does not, or is not.
    pub async fn check(&self) -> Result<(), StoreError> {
        in_time(self.deadline, async {
            let transaction = self.begin("looking whether it answers").await?;
            transaction.commit().await.map_err(failed("looking whether it answers"))
        })
        .await
    }

    /// Creates a run with its first events, all or nothing. Repeating a creation under the same id changes nothing.
    ///
    /// # Errors
    /// When the store fails or has another run under this id.
    pub async fn create_run(&self, new: &NewRun) -> Result<Created, StoreError> {
        let doing = "creating a run";
        in_time(self.deadline, async {
            let mut transaction = self.begin(doing).await?;
            if !self.is_sqlite {
                // Numbers are given out one at a time.
                run(&mut transaction, "SELECT pg_advisory_xact_lock(7370)", doing).await?;
            }
            let row = sqlx::query("SELECT number, request_digest, record FROM runs WHERE id = $1")
                .bind(new.id.clone())
                .fetch_optional(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            if let Some(row) = row {
                let number: i64 = row.try_get(0).map_err(failed(doing))?;
                let digest: Vec<u8> = row.try_get(1).map_err(failed(doing))?;
                let record: Vec<u8> = row.try_get(2).map_err(failed(doing))?;
                // The answer to the same creation was lost.
                return if digest == new.request_digest && record == new.record {
                    Ok(Created::New { number: unsigned(number) })
                } else {
                    Err(StoreError::RunExists { run_id: new.id.clone() })
                };
            }
            if let Some(request_id) = &new.request_id {
                let row = sqlx::query("SELECT id, request_digest FROM runs WHERE request_id = $1")
                    .bind(request_id.clone())
                    .fetch_optional(&mut *transaction)
                    .await
                    .map_err(failed(doing))?;
                if let Some(row) = row {
                    let id: String = row.try_get(0).map_err(failed(doing))?;
                    let digest: Vec<u8> = row.try_get(1).map_err(failed(doing))?;
                    return Ok(Created::Repeated { id, same_request: digest == new.request_digest });
                }
            }
            let row = sqlx::query("SELECT COALESCE(MAX(number), 0) + 1 FROM runs")
                .fetch_one(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            let number: i64 = row.try_get(0).map_err(failed(doing))?;
            sqlx::query(
                "INSERT INTO runs (number, id, request_id, request_digest, create_millis, record) \
                 VALUES ($1, $2, $3, $4, $5, $6)",
            )
            .bind(number)
            .bind(new.id.clone())
            .bind(new.request_id.clone())
            .bind(new.request_digest.clone())
            .bind(millis(new.create_time))
            .bind(new.record.clone())
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
            insert_events(&mut transaction, &new.id, 1, &new.events).await?;
            for decision in &new.decisions {
                insert_decision(&mut transaction, &new.id, decision).await?;
            }
            transaction.commit().await.map_err(failed(doing))?;
            Ok(Created::New { number: unsigned(number) })
        })
        .await
    }

    /// All runs, in the order of creation.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn runs(&self) -> Result<Vec<StoredRunRow>, StoreError> {
        let doing = "reading the runs";
        in_time(self.deadline, async {
            let rows = sqlx::query(
                "SELECT number, id, request_id, request_digest, create_millis, record, late_export FROM runs \
                 ORDER BY number",
            )
            .fetch_all(&self.pool)
            .await
            .map_err(failed(doing))?;
            rows.iter().map(run_row).collect::<Result<_, _>>().map_err(failed(doing))
        })
        .await
    }

    /// Appends events `first_revision`, …, with what comes with them, all or nothing. Repeating an append that has
    /// happened changes nothing.
    ///
    /// # Errors
    /// When the run's events do not end right before `first_revision`, or the store fails.
    pub async fn append(
        &self,
        run_id: &str,
        first_revision: u64,
        events: &[Vec<u8>],
        decision: Option<&StoredDecision>,
        checkpoint: Option<&StoredCheckpoint>,
    ) -> Result<(), StoreError> {
        let doing = "appending to a run";
        in_time(self.deadline, async {
            let mut transaction = self.begin(doing).await?;
            let row = sqlx::query("SELECT COALESCE(MAX(revision), 0) FROM events WHERE run_id = $1")
                .bind(run_id.to_owned())
                .fetch_one(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            let actual = unsigned(row.try_get(0).map_err(failed(doing))?);
            if actual == 0 {
                return Err(StoreError::NoRun { run_id: run_id.to_owned() });
            }
            if actual + 1 != first_revision {
                let same = actual + 1 == first_revision + events.len() as u64
                    && tail_is(&mut transaction, run_id, first_revision, events).await?;
                // The answer to the same append was lost.
                return if same {
                    Ok(())
                } else {
                    Err(StoreError::Revision { run_id: run_id.to_owned(), actual, given: first_revision })
                };
            }
            insert_events(&mut transaction, run_id, first_revision, events).await?;
            if let Some(decision) = decision {
                insert_decision(&mut transaction, run_id, decision).await?;
            }
            if let Some(checkpoint) = checkpoint {
                insert_checkpoint(&mut transaction, run_id, checkpoint).await?;
            }
            transaction.commit().await.map_err(failed(doing))
        })
        .await
    }

    /// Up to `limit` events past `after_revision`, in order.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn events(
        &self,
        run_id: &str,
        after_revision: u64,
        limit: u32,
    ) -> Result<Vec<StoredPayload>, StoreError> {
        let doing = "reading a run's events";
        in_time(self.deadline, async {
            let rows = sqlx::query(
                "SELECT revision, payload FROM events WHERE run_id = $1 AND revision > $2 \
                 ORDER BY revision LIMIT $3",
            )
            .bind(run_id.to_owned())
            .bind(signed(after_revision))
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await
            .map_err(failed(doing))?;
            let event = |row: &AnyRow| {
                Ok(StoredPayload { revision: unsigned(row.try_get(0)?), payload: row.try_get(1)? })
            };
            rows.iter().map(event).collect::<Result<_, _>>().map_err(failed(doing))
        })
        .await
    }

    /// One decision, without its importance.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn decision(
        &self,
        run_id: &str,
        generation: u64,
    ) -> Result<Option<StoredDecision>, StoreError> {
        let doing = "reading a decision";
        in_time(self.deadline, async {
            let row = sqlx::query(
                "SELECT generation, revision, payload FROM decisions WHERE run_id = $1 AND generation = $2",
            )
            .bind(run_id.to_owned())
            .bind(signed(generation))
            .fetch_optional(&self.pool)
            .await
            .map_err(failed(doing))?;
            row.as_ref().map(decision_row).transpose().map_err(failed(doing))
        })
        .await
    }

    /// The importance of one decision, where that was kept.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn importance(&self, run_id: &str, generation: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let doing = "reading the importance of a decision";
        in_time(self.deadline, async {
            let row = sqlx::query("SELECT importance FROM decisions WHERE run_id = $1 AND generation = $2")
                .bind(run_id.to_owned())
                .bind(signed(generation))
                .fetch_optional(&self.pool)
                .await
                .map_err(failed(doing))?;
            row.map_or(Ok(None), |row| row.try_get(0)).map_err(failed(doing))
        })
        .await
    }

    /// The complete checkpoints of a run, in the order of their steps.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn checkpoints(&self, run_id: &str) -> Result<Vec<StoredCheckpoint>, StoreError> {
        let doing = "reading a run's checkpoints";
        in_time(self.deadline, async {
            let rows = sqlx::query(
                "SELECT name, steps_done, generation, payload FROM checkpoints WHERE run_id = $1 \
                 ORDER BY steps_done, name",
            )
            .bind(run_id.to_owned())
            .fetch_all(&self.pool)
            .await
            .map_err(failed(doing))?;
            let checkpoint = |row: &AnyRow| {
                Ok(StoredCheckpoint {
                    name: row.try_get(0)?,
                    steps_done: unsigned(row.try_get(1)?),
                    generation: unsigned(row.try_get(2)?),
                    payload: row.try_get(3)?,
                })
            };
            rows.iter().map(checkpoint).collect::<Result<_, _>>().map_err(failed(doing))
        })
        .await
    }

    /// Notes what was exported after a run's end, in place of what was noted before.
    ///
    /// # Errors
    /// When there is no such run or the store fails.
    pub async fn set_late_export(&self, run_id: &str, payload: &[u8]) -> Result<(), StoreError> {
        let doing = "noting an export";
        in_time(self.deadline, async {
            let mut transaction = self.begin(doing).await?;
            let set = sqlx::query("UPDATE runs SET late_export = $1 WHERE id = $2")
                .bind(payload.to_vec())
                .bind(run_id.to_owned())
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            if set.rows_affected() == 0 {
                return Err(StoreError::NoRun { run_id: run_id.to_owned() });
            }
            transaction.commit().await.map_err(failed(doing))
        })
        .await
    }

    /// Forgets a checkpoint, before its files are removed.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove_checkpoint(&self, run_id: &str, name: &str) -> Result<(), StoreError> {
        let doing = "forgetting a checkpoint";
        in_time(self.deadline, async {
            let mut transaction = self.begin(doing).await?;
            sqlx::query("DELETE FROM checkpoints WHERE run_id = $1 AND name = $2")
                .bind(run_id.to_owned())
                .bind(name.to_owned())
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            transaction.commit().await.map_err(failed(doing))
        })
        .await
    }

    /// Forgets a run with all that belongs to it.
    ///
    /// # Errors
    /// When there is no such run or the store fails.
    pub async fn delete_run(&self, run_id: &str) -> Result<(), StoreError> {
        let doing = "deleting a run";
        in_time(self.deadline, async {
            let mut transaction = self.begin(doing).await?;
            let deleted = sqlx::query("DELETE FROM runs WHERE id = $1")
                .bind(run_id.to_owned())
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            if deleted.rows_affected() == 0 {
                return Err(StoreError::NoRun { run_id: run_id.to_owned() });
            }
            transaction.commit().await.map_err(failed(doing))
        })
        .await
    }

    /// Notes calls that changed something, in order. The oldest go once there are too many.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn audit(&self, entries: &[AuditEntry]) -> Result<(), StoreError> {
        let doing = "noting calls";
        in_time(self.deadline, async {
            let mut transaction = self.begin(doing).await?;
            if !self.is_sqlite {
                run(&mut transaction, "SELECT pg_advisory_xact_lock(7371)", doing).await?;
            }
            for entry in entries {
                sqlx::query(
                    "INSERT INTO audit (number, time_millis, principal, method, target, outcome) \
                     SELECT COALESCE(MAX(number), 0) + 1, $1, $2, $3, $4, $5 FROM audit",
                )
                .bind(millis(entry.time))
                .bind(entry.principal.clone())
                .bind(entry.method.clone())
                .bind(entry.target.clone())
                .bind(entry.outcome.clone())
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            }
            sqlx::query("DELETE FROM audit WHERE number <= (SELECT MAX(number) FROM audit) - $1")
                .bind(KEPT_AUDITS)
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
            transaction.commit().await.map_err(failed(doing))
        })
        .await
    }

    /// The last `limit` calls that changed something, newest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn audits(&self, limit: u32) -> Result<Vec<AuditEntry>, StoreError> {
        let doing = "reading the audit";
        in_time(self.deadline, async {
            let rows = sqlx::query(
                "SELECT time_millis, principal, method, target, outcome FROM audit ORDER BY number DESC LIMIT $1",
            )
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await
            .map_err(failed(doing))?;
            let entry = |row: &AnyRow| {
                Ok(AuditEntry {
                    time: time(row.try_get(0)?),
                    principal: row.try_get(1)?,
                    method: row.try_get(2)?,
                    target: row.try_get(3)?,
                    outcome: row.try_get(4)?,
                })
            };
            rows.iter().map(entry).collect::<Result<_, _>>().map_err(failed(doing))
        })
        .await
    }

    /// Closes the connections.
    pub async fn close(&self) {
        let _ = tokio::time::timeout(self.deadline, self.pool.close()).await;
    }
}

async fn insert_events(
    transaction: &mut Transaction<'static, Any>,
    run_id: &str,
    first_revision: u64,
    events: &[Vec<u8>],
) -> Result<(), StoreError> {
    for (place, payload) in events.iter().enumerate() {
        sqlx::query("INSERT INTO events (run_id, revision, payload) VALUES ($1, $2, $3)")
            .bind(run_id.to_owned())
            .bind(signed(first_revision + place as u64))
            .bind(payload.clone())
            .execute(&mut **transaction)
            .await
            .map_err(failed("storing events"))?;
    }
    Ok(())
}

async fn tail_is(
    transaction: &mut Transaction<'static, Any>,
    run_id: &str,
    first_revision: u64,
    events: &[Vec<u8>],
) -> Result<bool, StoreError> {
    let doing = "comparing events";
    let rows =
        sqlx::query("SELECT payload FROM events WHERE run_id = $1 AND revision >= $2 ORDER BY revision")
            .bind(run_id.to_owned())
            .bind(signed(first_revision))
            .fetch_all(&mut **transaction)
            .await
            .map_err(failed(doing))?;
    let stored: Vec<Vec<u8>> =
        rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(failed(doing))?;
    Ok(stored == events)
}

async fn insert_decision(
    transaction: &mut Transaction<'static, Any>,
    run_id: &str,
    decision: &StoredDecision,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO decisions (run_id, generation, revision, payload, importance) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(run_id.to_owned())
    .bind(signed(decision.generation))
    .bind(signed(decision.revision))
    .bind(decision.payload.clone())
    .bind(decision.importance.clone())
    .execute(&mut **transaction)
    .await
    .map_err(failed("storing a decision"))?;
    Ok(())
}

async fn insert_checkpoint(
    transaction: &mut Transaction<'static, Any>,
    run_id: &str,
    checkpoint: &StoredCheckpoint,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO checkpoints (run_id, name, steps_done, generation, payload) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(run_id.to_owned())
    .bind(checkpoint.name.clone())
    .bind(signed(checkpoint.steps_done))
    .bind(signed(checkpoint.generation))
    .bind(checkpoint.payload.clone())
    .execute(&mut **transaction)
    .await
    .map_err(failed("storing a checkpoint"))?;
    Ok(())
}

async fn run(
    transaction: &mut Transaction<'static, Any>,
    statement: &'static str,
    doing: &'static str,
) -> Result<(), StoreError> {
    transaction.execute(statement).await.map(drop).map_err(failed(doing))
}

fn run_row(row: &AnyRow) -> Result<StoredRunRow, sqlx::Error> {
    Ok(StoredRunRow {
        number: unsigned(row.try_get(0)?),
        id: row.try_get(1)?,
        request_id: row.try_get(2)?,
        request_digest: row.try_get(3)?,
        create_time: time(row.try_get(4)?),
        record: row.try_get(5)?,
        late_export: row.try_get(6)?,
    })
}

fn decision_row(row: &AnyRow) -> Result<StoredDecision, sqlx::Error> {
    Ok(StoredDecision {
        generation: unsigned(row.try_get(0)?),
        revision: unsigned(row.try_get(1)?),
        payload: row.try_get(2)?,
        importance: None,
    })
}

/// A path as part of a URL, where some characters have a meaning.
fn in_url(path: &Path) -> String {
    path.display().to_string().replace('%', "%25").replace('?', "%3F").replace('#', "%23")
}

async fn in_time<T>(
    deadline: Duration,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    tokio::time::timeout(deadline, work).await.unwrap_or(Err(StoreError::Deadline { after: deadline }))
}

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |cause| StoreError::Unreachable { doing, cause }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn millis(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn time(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unsigned(millis))
}
